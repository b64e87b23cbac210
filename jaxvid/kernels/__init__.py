"""Compute kernels: jax and pallas only, one folder per operation."""
