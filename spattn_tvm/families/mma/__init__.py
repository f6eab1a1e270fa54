"""Kernels for NVIDIA GPUs from sm_80 on: mma.sync, ldmatrix, cp.async."""
