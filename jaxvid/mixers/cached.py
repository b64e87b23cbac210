"""The base of the mixers that attend to a key-value cache: what their kinds of scores share."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least
from jaxvid.layers import masks
from jaxvid.mixers import cache as kv


class Cached(nn.Module):
    """Fields, stream and teacher forcing of frame-block causal attention; state: a `KVCache`.

    The call that holds a frame writes it; every later call reads it. A subclass has the layers
    `q`, `k`, `v` and `out`, with `q_norm` and `k_norm` if `qk_norm`, and `_scored`.

    width: D. heads: A, divides D. grid: (H, W) of the tokens of a frame. window: frames that a
    query sees including its own, None = all of the past. sinks: first frames that stay visible
    beyond the window. Raises UserError for a window below 1 and negative sinks.
    """

    width: int
    heads: int
    grid: tuple[int, int] = (1, 1)
    window: int | None = None
    sinks: int = 0
    qk_norm: bool = True
    dtype: Any = jnp.float32

    def __post_init__(self):
        masks.check_window(self.window)
        at_least("sinks", self.sinks, 0, at_most=masks.MAX_WINDOW)
        super().__post_init__()

    @property
    def streams(self) -> bool:
        return True

    @property
    def constant_state(self) -> bool:
        return self.window is not None

    def __call__(self, x_BTND, state=None):
        state = self._start(x_BTND) if state is None else state
        frame_T = kv.next_frames(state, x_BTND.shape[1])
        q_BTNAK, k_BTNAK, v_BTNAK = self._placed(x_BTND, frame_T)
        y_BTND = jnp.zeros(x_BTND.shape, self.dtype)
        if x_BTND.size > 0:
            y_BTND = self._attend(q_BTNAK, k_BTNAK, v_BTNAK, frame_T, state, self._allow())
        return y_BTND, self._after(state, k_BTNAK, v_BTNAK)

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`) in one masked call for all frames."""
        state = self._start(clean_BTND) if state is None else state
        T = clean_BTND.shape[1]
        frame_T = kv.next_frames(state, T)
        parts = zip(self._placed(clean_BTND, frame_T), self._placed(noisy_BTND, frame_T))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in parts)
        position_T = (np if kv.is_start(state) else jnp).append(frame_T, frame_T + masks.NOISY)
        allow = masks.teacher_forced(self.window, self.sinks)
        y_clean, y_noisy = jnp.split(self._attend(q, k, v, position_T, state, allow), 2, axis=1)
        return y_clean, y_noisy, self._after(state, k[:, :T], v[:, :T])

    def _allow(self):
        """The mask of a stream."""
        return masks.causal(self.window, self.sinks)

    def _start(self, x_BTND):
        """The state before the first frame of a stream without context."""
        no_context = jnp.zeros((len(x_BTND), 0, self.heads, self.width // self.heads), self.dtype)
        return kv.start(no_context, no_context, x_BTND.shape[2])

    def _after(self, state, k_BTNAK, v_BTNAK):
        """The state after these frames."""
        return kv.append(state, k_BTNAK, v_BTNAK, window=self.window, sinks=self.sinks)

    def project(self, x):
        """x [..., D] -> q, k, v [..., A, K], queries and keys normalised."""
        heads = (*x.shape[:-1], self.heads, self.width // self.heads)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def _placed(self, x_BTND, frame_T):
        """q, k, v [B, T, N, A, K] of frames at their places in the stream."""
        del frame_T
        return self.project(x_BTND)

    def _attend(self, q_BTNAK, k_BTNAK, v_BTNAK, position_T, state, allow):
        """y_BTND of frames at these positions, which see each other and the cache as allowed."""
        B, T, N, A, _ = q_BTNAK.shape
        k_BMAK, v_BMAK, position_M = kv.extend(state, k_BTNAK, v_BTNAK, position_T)
        q_BLAK = q_BTNAK.reshape(B, T * N, A, -1)
        y_BLAK = self._scored(q_BLAK, k_BMAK, v_BMAK, position_M[-T * N :], position_M, allow)
        return self.out(y_BLAK.reshape(B, T, N, self.width))

    def _scored(self, q_BLAK, k_BMAK, v_BMAK, position_L, position_M, allow):
        """y_BLAK of queries and keys at these positions."""
        raise NotImplementedError
