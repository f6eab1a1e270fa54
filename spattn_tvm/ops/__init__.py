"""The PyTorch operators and the public functions."""
