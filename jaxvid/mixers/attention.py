"""Softmax attention over a stream of frames, with an exact key-value cache."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid.kernels.attention import attention
from jaxvid.layers import masks
from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.layers.linear import Linear
from jaxvid.mixers import cache as kv
from jaxvid.parallel.sharding import shard

MASKS = ("causal", "full", "leaky")


class Attention(nn.Module):
    """Frame-block causal multi-head attention with rotary positions over (t, h, w).

    x_BTND -> y_BTND in `dtype`, N = H * W tokens per frame; softmax and normalisation in float32.
    State: a `KVCache`; a frame is written once, by the call that holds it, and read by every later
    call.

    width: D. heads: A, divides D. grid: (H, W) of a frame's tokens. window: frames a query sees
    including its own (UserError below 1), None = all of the past. sinks: first frames that stay
    visible beyond the window. qk_norm: RMS-normalise queries and keys per head (Dehghani et al.
    2023). mask: "causal"; "full" is the non-causal baseline; "leaky" reproduces the mask of the
    released AR-Diffusion weights, whose context tokens see all frames and so carry the future back.
    Only "causal" can stream.
    """

    width: int
    heads: int
    grid: tuple[int, int] = (1, 1)
    window: int | None = None
    sinks: int = 0
    qk_norm: bool = True
    mask: str = "causal"
    dtype: Any = jnp.float32

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

    def _rotated(self, x_BTND, first):
        """q, k, v [B, T, N, A, K] with queries and keys rotated to frames first, first + 1, ..."""
        q, k, v = self._project(x_BTND)
        frame_T = first + np.arange(x_BTND.shape[1], dtype=np.int32)
        angle_TNK = rotary_angles(frame_T, self.grid, q.shape[-1])
        return rotate(q, angle_TNK), rotate(k, angle_TNK), v

    def prefill(self, context_BMD, tokens, future_BTND=None):
        """Read the context that precedes the first frame -> (y_BMD, state); it sees only itself.

        tokens: N of the frames to come. future_BTND: those frames, which the leaky mask shows the
        context.
        """
        q, k, v = self._project(context_BMD)
        state = kv.start(k, v, tokens)
        if self.mask == "leaky":
            k, v, _ = kv.extend(state, *self._rotated(future_BTND, np.int32(0))[1:])
        q_position, k_position = (
            np.full(part.shape[1], masks.CONTEXT, np.int32) for part in (q, k)
        )
        y = attention(q, k, v, q_position_L=q_position, k_position_M=k_position, allow=masks.full)
        return self.out(y.reshape(context_BMD.shape)), state

    def __call__(self, x_BTND, state=None):
        B, T, N, D = x_BTND.shape
        if state is None:
            nothing = jnp.zeros((B, 0, self.heads, D // self.heads), self.dtype)
            state = kv.start(nothing, nothing, N)
        elif self.mask != "causal" and not kv.is_start(state):
            raise ValueError(f"mask={self.mask!r}: only causal attention can continue a stream")
        q_BTNAK, k_BTNAK, v_BTNAK = self._rotated(x_BTND, state.length)
        y_BTND = jnp.zeros((B, T, N, D), self.dtype)
        if x_BTND.size > 0:
            k_BMAK, v_BMAK, position_M = kv.extend(state, k_BTNAK, v_BTNAK)
            y_BLAK = attention(
                shard(q_BTNAK.reshape(B, T * N, *q_BTNAK.shape[3:]), "BLAK"),
                shard(k_BMAK, "BMAK"),
                shard(v_BMAK, "BMAK"),
                q_position_L=position_M[-T * N :],
                k_position_M=position_M,
                allow=masks.full if self.mask == "full" else masks.causal(self.window, self.sinks),
            )
            y_BTND = self.out(y_BLAK.reshape(B, T, N, D))
        return y_BTND, kv.append(state, k_BTNAK, v_BTNAK, window=self.window, sinks=self.sinks)
