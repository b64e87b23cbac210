"""Compute kernels, one folder per operation. `dispatch`, `chunks` and `pallas_tpu` are shared."""
