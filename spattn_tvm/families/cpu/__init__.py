"""Kernels for CPUs in s_tir, compiled by LLVM."""
