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
POSITIONS = ("absolute", "anchored")


class Attention(nn.Module):
    """Frame-block causal multi-head attention with rotary positions over (t, h, w).

    x_BTND -> y_BTND in `dtype`, N = H * W tokens per frame; softmax and normalisation in float32.
    State: a `KVCache`. The call that holds a frame writes it; every later call reads it.

    width: D. heads: A, divides D. grid: (H, W) of the tokens of a frame. window: frames that a
    query sees including its own, None = all of the past. sinks: first frames that stay visible
    beyond the window. qk_norm: RMS-normalise queries and keys per head (Dehghani et al. 2023).
    positions: "absolute", or "anchored": once the window has left the sinks, they and
    the context move along just before it, so no distance exceeds window + sinks - 1 in a stream of
    any length, as with the sinks of Rolling Forcing and LongLive. mask: "causal", or "full", the
    non-causal baseline, which cannot stream. Raises UserError for a window below 1, negative sinks,
    and unknown positions and masks.
    """

    width: int
    heads: int
    grid: tuple[int, int] = (1, 1)
    window: int | None = None
    sinks: int = 0
    qk_norm: bool = True
    positions: str = "absolute"
    mask: str = "causal"
    dtype: Any = jnp.float32

    def __post_init__(self):
        masks.check_window(self.window)
        at_least("sinks", self.sinks, 0, at_most=masks.MAX_WINDOW)
        choose("positions", self.positions, POSITIONS)
        choose("mask", self.mask, MASKS)
        super().__post_init__()

    @property
    def streams(self) -> bool:
        return self.mask == "causal"

    @property
    def constant_state(self) -> bool:
        return self.window is not None

    @property
    def _anchored(self) -> bool:
        return self.positions == "anchored" and self.window is not None

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
        state = self._start(x_BTND) if state is None else state
        message = "cannot continue a stream; use causal"
        require(self.streams or kv.is_start(state), "mask", self.mask, message)
        frame_T = kv.next_frames(state, x_BTND.shape[1])
        q_BTNAK, k_BTNAK, v_BTNAK = self._rotated(x_BTND, frame_T)
        y_BTND = jnp.zeros(x_BTND.shape, self.dtype)
        if x_BTND.size > 0:
            allow = masks.causal(self.window, self.sinks) if self.streams else masks.full
            y_BTND = self._attend(q_BTNAK, k_BTNAK, v_BTNAK, frame_T, state, allow)
        return y_BTND, kv.append(state, k_BTNAK, v_BTNAK, window=self.window, sinks=self.sinks)

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`) in one masked call for all frames."""
        state = self._start(clean_BTND) if state is None else state
        require(self.streams, "mask", self.mask, "has no past to be forced to; use causal")
        T = clean_BTND.shape[1]
        frame_T = kv.next_frames(state, T)
        parts = zip(self._rotated(clean_BTND, frame_T), self._rotated(noisy_BTND, frame_T))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in parts)
        position_T = (np if kv.is_start(state) else jnp).append(frame_T, frame_T + masks.NOISY)
        allow = masks.teacher_forced(self.window, self.sinks)
        y_clean, y_noisy = jnp.split(self._attend(q, k, v, position_T, state, allow), 2, axis=1)
        state = kv.append(state, k[:, :T], v[:, :T], window=self.window, sinks=self.sinks)
        return y_clean, y_noisy, state

    def _start(self, x_BTND):
        """The state before the first frame of a stream without context."""
        no_context = jnp.zeros((len(x_BTND), 0, self.heads, self.width // self.heads), self.dtype)
        return kv.start(no_context, no_context, x_BTND.shape[2])

    def _rotated(self, x_BTND, frame_T):
        """Queries and keys turned to their frames, and values [B, T, N, A, K].

        With anchored positions queries have two halves, see `_anchored_keys`.
        """
        q, k, v = self._project(x_BTND)
        angle_TNK = rotary_angles(frame_T, self.grid, self.width // self.heads)
        turned = [rotate(q, angle_TNK)]
        if self._anchored:
            xp = np if isinstance(frame_T, np.ndarray) else jnp
            nearest_T = xp.minimum(frame_T, self.window + self.sinks - 1)
            angle_of_sinks = rotary_angles(nearest_T, self.grid, self.width // self.heads)
            turned.append(rotate(q, angle_of_sinks))
        return jnp.concatenate(turned, axis=-1), rotate(k, angle_TNK), v

    def _attend(self, q_BTNAK, k_BTNAK, v_BTNAK, position_T, state, allow):
        """y_BTND of frames at these positions, which see each other and the cache as allowed."""
        B, T, N, A, _ = q_BTNAK.shape
        k_BMAK, v_BMAK, position_M = kv.extend(state, k_BTNAK, v_BTNAK, position_T)
        if self._anchored:
            k_BMAK = self._anchored_keys(k_BMAK, position_M)
        y_BLAK = attention(
            shard(q_BTNAK.reshape(B, T * N, A, -1), "BLAK"),
            shard(k_BMAK, "BMAK"),
            shard(v_BMAK, "BMAK"),
            q_position_L=position_M[-T * N :],
            k_position_M=position_M,
            allow=allow,
            scale=v_BMAK.shape[-1] ** -0.5,
        )
        return self.out(y_BLAK.reshape(B, T, N, self.width))

    def _anchored_keys(self, k_BMAK, position_M):
        """Keys of twice the width for the queries of `_rotated`.

        To query q, sink j stands at j + d, where d = max(0, q - (window + sinks - 1)) does not
        depend on j. Its key, rotated to j, gives the same score with a query rotated to q - d. So a
        key of the sinks or the context lies in the second half and meets that query, and any other
        key lies in the first half and meets the query as it is.
        """
        is_anchored_M11 = (position_M < self.sinks)[:, None, None]
        near = jnp.where(is_anchored_M11, 0, k_BMAK)
        return jnp.concatenate([near, jnp.where(is_anchored_M11, k_BMAK, 0)], axis=-1)
