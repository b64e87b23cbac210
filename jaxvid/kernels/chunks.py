"""Chunks of tokens in plain XLA, and the decays between the tokens of a chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

GRAIN = 1 / 64  # multiples of GRAIN within a decay add up without rounding
LONGEST = 2048  # tokens of such a sum: 2048 times -128 / GRAIN fill the 24 bits of float32

einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def split(x_BLA: jax.Array, chunk: int) -> jax.Array:
    """[B, L, A, ...] -> [S, B, A, G, ...]: S chunks of G tokens, the last one padded with zeros."""
    B, L, *rest = x_BLA.shape
    x_BLA = jnp.pad(x_BLA, [(0, 0), (0, -L % chunk), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(x_BLA.reshape(B, -1, chunk, *rest), (1, 0, 3, 2), (0, 1, 2, 3))


def join(x_SBAGV: jax.Array, length: int) -> jax.Array:
    """[S, B, A, G, V] -> [B, L, A, V], the inverse of `split`."""
    S, B, A, G, V = x_SBAGV.shape
    return x_SBAGV.transpose(1, 0, 3, 2, 4).reshape(B, S * G, A, V)[:, :length]


def decays(g_SBAG: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Decays within a chunk, from the log decays g of its tokens.

    From token j to token i, exp(g_{j+1} + .. + g_i), [.., G, G], 0 where j > i; from the start of
    the chunk to token i, [.., G]; from token j to the end of the chunk, [.., G]; over the whole
    chunk, [.., 1].
    """
    # Differences of long sums would lose small decays among large ones. So multiples of GRAIN add
    # up apart, exactly over LONGEST tokens at most, and the sum of the rest is small.
    coarse = jax.lax.stop_gradient(jnp.round(g_SBAG / GRAIN) * GRAIN)
    coarse, fine = jnp.cumsum(coarse, axis=-1), jnp.cumsum(g_SBAG - coarse, axis=-1)
    from_j, to_i, last = (..., None, slice(None)), (..., slice(None), None), (..., slice(-1, None))

    def between(i, j):
        return (coarse[i] - coarse[j]) + (fine[i] - fine[j])

    # A constant where i = j, so that no rounded difference passes a gradient.
    G = g_SBAG.shape[-1]
    i, j = np.arange(G)[:, None], np.arange(G)
    closed = np.where(i == j, np.float32(0), np.float32(-np.inf))
    to_i_GH = jnp.where(i > j, between(to_i, from_j), closed)
    to_last_G = jnp.where(j < G - 1, between(last, ...), 0)
    total = coarse + fine
    return jnp.exp(to_i_GH), jnp.exp(total), jnp.exp(to_last_G), jnp.exp(total[last])
