"""What the Pallas kernels for TPU share: block specs, products of tiles, decays of a chunk."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxvid.kernels.chunks import GRAIN

LANES = 128
IN_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


# Launches, on a grid of rows of the batch, heads and chunks


def arrange(x_BLA: jax.Array, chunk: int) -> jax.Array:
    """[B, L, A, ...] -> [B, A, L, ...], padded with zeros to whole chunks."""
    rest = [(0, 0)] * (x_BLA.ndim - 2)
    return jnp.pad(x_BLA, [(0, 0), (0, -x_BLA.shape[1] % chunk), *rest]).swapaxes(1, 2)


def token_specs(chunk, order):
    """width -> the block [G, width] of a chunk's tokens; None -> [1, G], one number per token.

    order: the place in the grid -> the chunk.
    """

    def spec(width):
        if width is None:
            return pl.BlockSpec((None, None, 1, chunk), lambda b, a, n: (b, a, 0, order(n)))
        return pl.BlockSpec((None, None, chunk, width), lambda b, a, n: (b, a, order(n), 0))

    return spec


def state_spec(K, V):
    """The state of a head, the same block for all chunks."""
    return pl.BlockSpec((None, None, K, V), lambda b, a, n: (b, a, 0, 0))


# Within kernels


def decays(g_1G):
    """As `chunks.decays` for one head, but 0 from a token to itself.

    Returns [G, G], [G, 1], [G, 1] and [1, 1].
    """
    G = g_1G.shape[1]
    i, j = iota(G, 0), iota(G, 1)
    coarse_1G = jnp.round(g_1G / GRAIN) * GRAIN

    def cumulative(x_1G):
        """The sums up to each token, as a column and as a row."""
        sum_G1 = jnp.sum(jnp.where(j <= i, x_1G, 0), axis=1, keepdims=True)
        return sum_G1, jnp.sum(jnp.where(i == j, sum_G1, 0), axis=0, keepdims=True)

    (coarse_G1, coarse_1G), (fine_G1, fine_1G) = map(cumulative, (coarse_1G, g_1G - coarse_1G))
    between_GH = (coarse_G1 - coarse_1G) + (fine_G1 - fine_1G)
    factor_GH = jnp.where(j < i, jnp.exp(jnp.where(j < i, between_GH, 0)), 0)
    to_last_G1 = (coarse_G1[G - 1 :] - coarse_G1) + (fine_G1[G - 1 :] - fine_G1)
    from_first_G1 = jnp.exp(coarse_G1 + fine_G1)
    return factor_GH, from_first_G1, jnp.exp(to_last_G1), from_first_G1[G - 1 :]


def times(x_GK, factor):
    """A query or key times its decay, in its own dtype."""
    return (x_GK * factor).astype(x_GK.dtype)


def inner(x_GK, y_GK):
    """The inner product of x and y at every token, float32 [G, 1]."""
    return jnp.sum(x_GK.astype(jnp.float32) * y_GK.astype(jnp.float32), axis=1, keepdims=True)


def iota(size, axis):
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)


def dot(a, b, letters):
    """An einsum of two matrices that adds up in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)
