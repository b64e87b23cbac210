"""Softmax attention over a stream, with scores that fall with the distance in frames."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least
from jaxvid.layers import masks
from jaxvid.layers.bias import COSINE_SCALE, MASKED, CosineNorm, alibi_slopes, attend
from jaxvid.layers.linear import Linear
from jaxvid.mixers import cache as kv
from jaxvid.parallel.sharding import shard


class Alibi(nn.Module):
    """Frame-block causal attention with linear biases instead of positions (Press et al. 2022).

    x_BTND -> y_BTND in `dtype`: the temporal attention of C-ViViT (Villegas et al. 2023). State: a
    `KVCache`. Memory holds the scores of all pairs at once, so the mixer suits one location over
    time better than all tokens of a clip. width, heads, window, sinks, errors: as in
    `mixers.attention.Attention`. qk_norm: cosine similarity times 8, with a learned scale per
    channel. grid: unused; the tokens of a frame have no positions within it.
    """

    width: int
    heads: int
    grid: tuple[int, int] = (1, 1)
    window: int | None = None
    sinks: int = 0
    qk_norm: bool = True
    dtype: Any = jnp.float32

    streams: ClassVar[bool] = True

    def __post_init__(self):
        masks.check_window(self.window)
        at_least("sinks", self.sinks, 0, at_most=masks.MAX_WINDOW)
        super().__post_init__()

    @property
    def constant_state(self) -> bool:
        return self.window is not None

    def setup(self):
        dense = dict(use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        self.q, self.k, self.v, self.out = (Linear(self.width, **dense) for _ in range(4))
        if self.qk_norm:
            self.q_norm = CosineNorm(dtype=self.dtype)
            self.k_norm = CosineNorm(dtype=self.dtype)

    def _project(self, x):
        """x [..., D] -> q, k, v [..., A, K]."""
        heads = (*x.shape[:-1], self.heads, self.width // self.heads)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def _attend(self, q_BLAK, k_BMAK, v_BMAK, bias_ALM):
        scale = COSINE_SCALE if self.qk_norm else None
        q, k, v = shard(q_BLAK, "BLAK"), shard(k_BMAK, "BMAK"), shard(v_BMAK, "BMAK")
        return attend(q, k, v, bias_ALM, scale)

    def _bias(self, q_position_L, k_position_M, allow):
        """-slope (q - k) where q may see k; the distance to the context is 0."""
        q_L1, k_1M = q_position_L[:, None], k_position_M[None]
        xp = np if isinstance(k_position_M, np.ndarray) else jnp
        distance_LM = q_L1 % masks.NOISY - k_1M % masks.NOISY
        distance_LM = xp.where(k_1M == masks.CONTEXT, 0, distance_LM).astype(np.float32)
        allowed_LM = allow(q_L1, k_1M)
        slope_A11 = alibi_slopes(self.heads)[:, None, None]
        return xp.where(allowed_LM, -slope_A11 * distance_LM, np.float32(MASKED))

    def prefill(self, context_BMD, tokens: int):
        """Read the context that precedes the first frame -> (y_BMD, state); it sees only itself."""
        q, k, v = self._project(context_BMD)
        y = self._attend(q, k, v, None)
        return self.out(y.reshape(context_BMD.shape)), kv.start(k, v, tokens)

    def __call__(self, x_BTND, state=None):
        state = self._start(x_BTND) if state is None else state
        q_BTNAK, k_BTNAK, v_BTNAK = self._project(x_BTND)
        y_BTND = jnp.zeros(x_BTND.shape, self.dtype)
        if x_BTND.size > 0:
            frame_T = kv.next_frames(state, x_BTND.shape[1])
            allow = masks.causal(self.window, self.sinks)
            y_BTND = self._mix(q_BTNAK, k_BTNAK, v_BTNAK, frame_T, state, allow)
        return y_BTND, kv.append(state, k_BTNAK, v_BTNAK, window=self.window, sinks=self.sinks)

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`) in one masked call for all frames."""
        state = self._start(clean_BTND) if state is None else state
        T = clean_BTND.shape[1]
        q, k, v = self._project(jnp.concatenate([clean_BTND, noisy_BTND], axis=1))
        frame_T = kv.next_frames(state, T)
        position_T = (np if kv.is_start(state) else jnp).append(frame_T, frame_T + masks.NOISY)
        allow = masks.teacher_forced(self.window, self.sinks)
        y_clean, y_noisy = jnp.split(self._mix(q, k, v, position_T, state, allow), 2, axis=1)
        state = kv.append(state, k[:, :T], v[:, :T], window=self.window, sinks=self.sinks)
        return y_clean, y_noisy, state

    def _start(self, x_BTND):
        """The state before the first frame of a stream without context."""
        no_context = jnp.zeros((len(x_BTND), 0, self.heads, self.width // self.heads), self.dtype)
        return kv.start(no_context, no_context, x_BTND.shape[2])

    def _mix(self, q_BTNAK, k_BTNAK, v_BTNAK, position_T, state, allow):
        """y_BTND of frames at these positions, which see each other and the cache as allowed."""
        B, T, N, A, K = q_BTNAK.shape
        k_BMAK, v_BMAK, position_M = kv.extend(state, k_BTNAK, v_BTNAK, position_T)
        bias_ALM = self._bias(position_M[-T * N :], position_M, allow)
        y_BLAK = self._attend(q_BTNAK.reshape(B, T * N, A, K), k_BMAK, v_BMAK, bias_ALM)
        return self.out(y_BLAK.reshape(B, T, N, self.width))
