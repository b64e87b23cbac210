"""Teacher forcing holds every clean frame and its noisy copy as neighbours on the frame axis.

The order clean, noisy, clean, noisy .. keeps a frame and its copy on one device where a mesh splits
the frames, and all layers that work on single frames need no other code.
"""

import jax
import jax.numpy as jnp


def join(clean: jax.Array, noisy: jax.Array) -> jax.Array:
    """Two arrays [B, T, ...] -> [B, 2 T, ...]."""
    B, T, *rest = clean.shape
    return jnp.stack([clean, noisy], axis=2).reshape(B, 2 * T, *rest)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `join`."""
    B, T, *rest = x.shape
    pairs = x.reshape(B, T // 2, 2, *rest)
    return pairs[:, :, 0], pairs[:, :, 1]
