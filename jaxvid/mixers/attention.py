"""Softmax attention over a stream of frames, with an exact key-value cache."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least, choose, require
from jaxvid.kernels.attention import attention
from jaxvid.layers import masks
from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.layers.linear import Linear
from jaxvid.mixers import cache as kv
from jaxvid.parallel.sharding import shard

MASKS = ("causal", "full")


class Attention(nn.Module):
    """Frame-block causal multi-head attention with rotary positions over (t, h, w).

    x_BTND -> y_BTND in `dtype`, N = H * W tokens per frame; softmax and normalisation in float32.
    State: a `KVCache`. The call that holds a frame writes it; every later call reads it.

    width: D. heads: A, divides D. grid: (H, W) of the tokens of a frame. window: frames that a
    query sees including its own, None = all of the past. sinks: first frames that stay visible
    beyond the window. qk_norm: RMS-normalise queries and keys per head (Dehghani et al. 2023).
    mask: "causal", or "full", the non-causal baseline, which cannot stream. Raises UserError for a
    window below 1, negative sinks and an unknown mask.
    """

    width: int
    heads: int
    grid: tuple[int, int] = (1, 1)
    window: int | None = None
    sinks: int = 0
    qk_norm: bool = True
    mask: str = "causal"
    dtype: Any = jnp.float32

    def __post_init__(self):
        masks.check_window(self.window)
        at_least("sinks", self.sinks, 0, at_most=masks.MAX_WINDOW)
        choose("mask", self.mask, MASKS)
        super().__post_init__()

    @property
    def streams(self) -> bool:
        return self.mask == "causal"

    @property
    def constant_state(self) -> bool:
        return self.window is not None

    def setup(self):
        dense = dict(dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        self.q, self.k, self.v, self.out = (Linear(self.width, **dense) for _ in range(4))
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(dtype=self.dtype)
            self.k_norm = nn.RMSNorm(dtype=self.dtype)

    def _project(self, x):
        """x [..., D] -> q, k, v [..., A, K], queries and keys normalised but not yet rotated."""
        heads = (*x.shape[:-1], self.heads, self.width // self.heads)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def prefill(self, context_BMD, tokens: int):
        """Read the context that precedes the first frame -> (y_BMD, state); it sees only itself.

        tokens: N of the frames that follow.
        """
        q, k, v = self._project(context_BMD)
        position_M = np.full(context_BMD.shape[1], masks.CONTEXT, np.int32)
        y = attention(q, k, v, q_position_L=position_M, k_position_M=position_M, allow=masks.full)
        return self.out(y.reshape(context_BMD.shape)), kv.start(k, v, tokens)

    def __call__(self, x_BTND, state=None):
        B, T, N, D = x_BTND.shape
        if state is None:
            no_context = jnp.zeros((B, 0, self.heads, D // self.heads), self.dtype)
            state = kv.start(no_context, no_context, N)
        message = "cannot continue a stream; use causal"
        require(self.streams or kv.is_start(state), "mask", self.mask, message)
        q_BTNAK, k_BTNAK, v_BTNAK = self._project(x_BTND)
        frame_T = state.length + np.arange(T, dtype=np.int32)
        angle_TNK = rotary_angles(frame_T, self.grid, D // self.heads)
        q_BTNAK, k_BTNAK = rotate(q_BTNAK, angle_TNK), rotate(k_BTNAK, angle_TNK)
        y_BTND = jnp.zeros((B, T, N, D), self.dtype)
        if x_BTND.size > 0:
            k_BMAK, v_BMAK, position_M = kv.extend(state, k_BTNAK, v_BTNAK)
            y_BLAK = attention(
                shard(q_BTNAK.reshape(B, T * N, *q_BTNAK.shape[3:]), "BLAK"),
                shard(k_BMAK, "BMAK"),
                shard(v_BMAK, "BMAK"),
                q_position_L=position_M[-T * N :],
                k_position_M=position_M,
                allow=masks.causal(self.window, self.sinks) if self.streams else masks.full,
            )
            y_BTND = self.out(y_BLAK.reshape(B, T, N, D))
        return y_BTND, kv.append(state, k_BTNAK, v_BTNAK, window=self.window, sinks=self.sinks)
