"""Attention whose scores carry a bias, and the biases that say where things are."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.layers.linear import Linear

MASKED = -1e30  # in the place of -inf, which makes NaN of a row without keys
COSINE_SCALE = 8.0  # of the scores of unit queries and keys


def attend(q_BLAK, k_BMAK, v_BMAK, bias_ALM=None, scale=None):
    """softmax(scale q k^T + bias) v -> y_BLAK in the dtype of v; float32 softmax.

    One matrix of scores for all, for the short sequences of one frame or one location. More
    leading axes than B are allowed, and the bias broadcasts against scores [..., A, L, M]. scale:
    K^-1/2 unless given.
    """
    scale = q_BLAK.shape[-1] ** -0.5 if scale is None else scale
    # Products of whole matrices: XLA on CPU takes twice as long over heads amid the axes.
    q_BALK, k_BAMK, v_BAMK = (x.swapaxes(-2, -3) for x in (q_BLAK, k_BMAK, v_BMAK))
    score_BALM = scale * jnp.einsum(
        "...LK,...MK->...LM", q_BALK, k_BAMK, preferred_element_type=jnp.float32
    )
    p_BALM = jax.nn.softmax(score_BALM if bias_ALM is None else score_BALM + bias_ALM)
    return (p_BALM.astype(v_BAMK.dtype) @ v_BAMK).swapaxes(-2, -3)


class CosineNorm(nn.Module):
    """Queries or keys [..., K] -> unit length, times a learned scale per channel (C-ViViT)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale_K = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
        return (scale_K * x).astype(self.dtype)


def alibi_slopes(heads):
    """Slopes of the linear bias -slope |i - j| of each head, numpy [A] (Press et al. 2022).

    A power of two has 2^(-8 (k + 1) / heads). Other numbers take the slopes of the next lower
    power, then every second one of twice that power.
    """
    power = 2 ** int(np.log2(heads))

    def slopes(n):
        return 2.0 ** (-8 * np.arange(1, n + 1) / n)

    return np.concatenate([slopes(power), slopes(2 * power)[::2]])[:heads]


class ContinuousBias(nn.Module):
    """Bias of every pair of cells of an (H, W) grid from their offset -> [A, N, N] float32.

    An MLP of sign(d) log(1 + |d|), so that one set of weights serves every grid (Swin v2, Liu et
    al. 2022).
    """

    heads: int
    width: int

    @nn.compact
    def __call__(self, grid):
        offset_RX, index_NN = _offsets(grid)
        x = jnp.asarray(np.sign(offset_RX) * np.log1p(np.abs(offset_RX)), jnp.float32)
        for name in ("in", "hidden"):
            x = nn.leaky_relu(Linear(self.width, name=name)(x), 0.1)
        bias_RA = Linear(self.heads, name="out")(x)
        return bias_RA.T[:, index_NN]


class TableBias(nn.Module):
    """One learned number per head and offset inside windows of up to `window` cells a side.

    grid: (H, W) of the window -> [A, N, N] float32 (Swin, Liu et al. 2021).
    """

    heads: int
    window: int

    @nn.compact
    def __call__(self, grid):
        side = 2 * self.window - 1
        table_VA = self.param(
            "table", nn.initializers.truncated_normal(0.02), (side * side, self.heads)
        )
        offset_RX, index_NN = _offsets(grid)
        row_R, column_R = (offset_RX + self.window - 1).T
        return table_VA[row_R * side + column_R].T[:, index_NN]


class DistanceBias(nn.Module):
    """-slope distance, of cells of a frame and of tokens that float above it -> [A, N, N] float32.

    grid: (H, W) cells, N = H W + tokens. Learned are the slopes, one for each head, and the places
    of the tokens, `place` [tokens, 2] in heights and widths of the frame. At first the tokens are
    spread evenly (a Fibonacci lattice) and the slopes lie between SLOPES, by one spacing of the
    tokens. So every token starts out reading what is around its place, and every cell the tokens
    around it, which training is free to undo by flatter slopes.
    """

    heads: int
    tokens: int

    SLOPES = (8.0, 0.5)

    @nn.compact
    def __call__(self, grid):
        place_M2 = self.param("place", lambda _: jnp.asarray(_spread(self.tokens)))
        log_slope_A = self.param(
            "log_slope", lambda _: jnp.log(jnp.geomspace(*self.SLOPES, self.heads))
        )
        H, W = grid
        cell_N2 = (np.mgrid[:H, :W].reshape(2, -1).T + 0.5) / grid
        place_N2 = jnp.concatenate([jnp.asarray(cell_N2, jnp.float32), place_M2])
        # In cells, of which every token has H W / tokens.
        apart_NN2 = (place_N2[:, None] - place_N2) * np.array(grid, np.float32)
        squared_NN = jnp.square(apart_NN2).sum(-1) * (self.tokens / (H * W))
        # The root has no gradient at 0, where a token meets itself.
        distance_NN = jnp.sqrt(jnp.maximum(squared_NN, 1e-12))
        return -jnp.exp(log_slope_A)[:, None, None] * distance_NN


def _spread(count):
    """Places in the unit square, evenly spread for any count, float32 [count, 2]."""
    index_M = np.arange(count)
    golden = (5**0.5 - 1) / 2
    row_M, column_M = (index_M + 0.5) / count, (index_M * golden + 0.5) % 1
    return np.stack([row_M, column_M], axis=1).astype(np.float32)


def _offsets(grid):
    """Offsets (dy, dx) that occur in a grid, int [R, 2], and which of them each pair has [N, N]."""
    height, width = grid
    offset_RX = np.stack(np.mgrid[1 - height : height, 1 - width : width], -1).reshape(-1, 2)
    row_N, column_N = (axis.reshape(-1) for axis in np.mgrid[:height, :width])
    down_NN = row_N[:, None] - row_N + height - 1
    right_NN = column_N[:, None] - column_N + width - 1
    return offset_RX, down_NN * (2 * width - 1) + right_NN
