"""Kernels for sm_90a in TIRx: TMA, wgmma, warp specialisation."""
