"""Compute kernels, one folder per operation: jax and pallas, and to split them jaxvid.parallel."""
