"""Kernels in TensorIR, one file per family and direction. Everything here imports TVM."""
