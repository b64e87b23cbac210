"""Attention with a bias on its scores, and the biases that encode positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.layers.linear import Linear

MASKED = -1e30  # instead of -inf, which gives NaN in a row without keys
COSINE_SCALE = 8.0  # of the scores of unit queries and keys


def attend(
    q_BLAK: jax.Array,
    k_BMAK: jax.Array,
    v_BMAK: jax.Array,
    bias_ALM: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v -> y_BLAK in the dtype of v; float32 softmax.

    The scores form one matrix, for the short sequences of one frame or one location. There may be
    more leading axes than B; the bias broadcasts against scores [..., A, L, M]. scale: K^-1/2 by
    default.
    """
    scale = q_BLAK.shape[-1] ** -0.5 if scale is None else scale
    # Heads come first: XLA on CPU takes twice as long over heads between the matrix axes.
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


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of the linear bias -slope |i - j| of each head, numpy [A] (Press et al. 2022).

    Head k of a power of two has 2^(-8 (k + 1) / heads). Other numbers of heads take the slopes of
    the next lower power, then every second slope of twice that power.
    """
    power = 2 ** int(np.log2(heads))

    def slopes(n):
        return 2.0 ** (-8 * np.arange(1, n + 1) / n)

    return np.concatenate([slopes(power), slopes(2 * power)[::2]])[:heads]


class ContinuousBias(nn.Module):
    """Bias of every pair of cells of an (H, W) grid from their offset -> [A, N, N] float32.

    An MLP of sign(d) log(1 + |d|), so one set of weights serves every grid (Swin v2, Liu et al.
    2022). width: of the hidden layers.
    """

    heads: int
    width: int

    @nn.compact
    def __call__(self, grid):
        offset_R2, index_NN = _relative_offsets(grid)
        x = jnp.asarray(np.sign(offset_R2) * np.log1p(np.abs(offset_R2)), jnp.float32)
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
        table_RA = self.param(
            "table", nn.initializers.truncated_normal(0.02), (side * side, self.heads)
        )
        offset_R2, index_NN = _relative_offsets(grid)
        row_R, column_R = (offset_R2 + self.window - 1).T
        return table_RA[row_R * side + column_R].T[:, index_NN]


class DistanceBias(nn.Module):
    """-slope distance, for the cells of a frame and tokens at free positions -> [A, N, N] float32.

    grid: (H, W) cells, N = H W + tokens. The slope of each head and the position of each token
    (`place` [tokens, 2], in heights and widths of the frame) are learned. The unit of distance is
    the spacing of the tokens. Tokens start evenly spread (a Fibonacci lattice) and slopes between
    the two SLOPES. So each token first reads the cells around it and each cell the tokens around
    it; training can undo this by flatter slopes.
    """

    heads: int
    tokens: int

    SLOPES = (8.0, 0.5)

    @nn.compact
    def __call__(self, grid):
        token_M2 = self.param("place", lambda _: jnp.asarray(_fibonacci_lattice(self.tokens)))
        log_slope_A = self.param(
            "log_slope", lambda _: jnp.log(jnp.geomspace(*self.SLOPES, self.heads))
        )
        H, W = grid
        cell_N2 = (np.mgrid[:H, :W].reshape(2, -1).T + 0.5) / grid
        position_N2 = jnp.concatenate([jnp.asarray(cell_N2, jnp.float32), token_M2])
        # In units of a cell; a token has H W / tokens cells.
        offset_NN2 = (position_N2[:, None] - position_N2) * np.array(grid, np.float32)
        squared_NN = jnp.square(offset_NN2).sum(-1) * (self.tokens / (H * W))
        # The root has no gradient at 0, the distance of a token to itself.
        distance_NN = jnp.sqrt(jnp.maximum(squared_NN, 1e-12))
        return -jnp.exp(log_slope_A)[:, None, None] * distance_NN


def _fibonacci_lattice(count):
    """Evenly spread points of the unit square, for any count, float32 [count, 2]."""
    index_M = np.arange(count)
    golden = (5**0.5 - 1) / 2
    row_M, column_M = (index_M + 0.5) / count, (index_M * golden + 0.5) % 1
    return np.stack([row_M, column_M], axis=1).astype(np.float32)


def _relative_offsets(grid):
    """The R offsets (dy, dx) of a grid, int [R, 2], and the index of each pair's offset [N, N]."""
    height, width = grid
    offset_R2 = np.stack(np.mgrid[1 - height : height, 1 - width : width], -1).reshape(-1, 2)
    row_N, column_N = (axis.reshape(-1) for axis in np.mgrid[:height, :width])
    down_NN = row_N[:, None] - row_N + height - 1
    right_NN = column_N[:, None] - column_N + width - 1
    return offset_R2, down_NN * (2 * width - 1) + right_NN
