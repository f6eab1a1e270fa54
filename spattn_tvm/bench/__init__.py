"""Timing banded attention beside its peers."""
