"""The protocol of quantizers, and what several of them share."""

from typing import Any

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST  # products in bfloat16 would flip ids


class Quantizer:
    """A quantizer, with defaults for one that has neither a codebook nor codes.

    features: channels of the encoder's output z. channels: of the latents z_q. size: of the
    vocabulary, 0 without codes.

    Quantizers are static and hashable. Only `VQ` has a codebook, and it is an argument: a tree of
    arrays in two parts, `trained` by gradient and `carried` in the training state.
    """

    features: int
    channels: int
    size: int = 0

    def __call__(
        self, z: jax.Array, codebook: Any = None, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
        """z [..., features] of any float dtype -> (z_q, ids, aux).

        z_q: [..., channels] float32; gradients pass through it to z. ids: [...] int32 in [0, size),
        None without codes. aux: float32 scalars, among them `loss`, a term of the training loss,
        and those of `usage` if there are codes. codebook: trained and carried parts together.
        rng: for latents drawn from a distribution; None gives their mean.
        """
        raise NotImplementedError

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        """(trained, carried) parts of the codebook."""
        del rng
        return {}, {}

    def update(self, codebook: Any, z: jax.Array, ids: jax.Array, rng: jax.Array) -> dict:
        """The carried part after a batch of z and its ids.

        All reductions over tokens span the global batch under jit, so every device computes the
        same.
        """
        del codebook, z, ids, rng
        return {}

    def lookup(self, ids: jax.Array, codebook: Any = None) -> jax.Array:
        """ids [...] -> z_q [..., channels] float32. TypeError without codes."""
        del ids, codebook
        raise TypeError(f"{type(self).__name__} has no codes")


def usage(ids: jax.Array, size: int) -> dict[str, jax.Array]:
    """Perplexity exp(H) of ids, share of the `size` codes in use, number of the unused (`dead`).

    By sorting, so no array is as long as the vocabulary.
    """
    ids = jnp.sort(ids.reshape(-1))
    last, first = (jnp.searchsorted(ids, ids, side=side) for side in ("right", "left"))
    perplexity = jnp.exp(-jnp.log((last - first) / ids.size).mean())
    used = 1.0 + (ids[1:] != ids[:-1]).sum()
    size = float(size)  # may be 2^31, one more than the largest int32
    return {"perplexity": perplexity, "usage": used / size, "dead": size - used}


def straight_through(z: jax.Array, z_q: jax.Array) -> jax.Array:
    """Exactly `z_q`, with the gradient of `z` (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(z_q) + (z - jax.lax.stop_gradient(z))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Dot products along the last axis, which stays with length 1."""
    return (a * b).sum(-1, keepdims=True)


def unit(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis, with a finite gradient at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(dot(x, x), 1e-24))


def mse(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared error, float32 []."""
    return jnp.square(a - b).mean()
