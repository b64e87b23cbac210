"""jaxvid: causal video generation in JAX."""
