"""Softmax attention over a stream, with scores that fall with the distance in frames."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid.layers import masks
from jaxvid.layers.bias import COSINE_SCALE, MASKED, CosineNorm, alibi_slopes, attend
from jaxvid.layers.linear import Linear
from jaxvid.mixers import cache as kv
from jaxvid.mixers.cached import Cached
from jaxvid.parallel.sharding import shard


class Alibi(Cached):
    """Frame-block causal attention with linear biases instead of positions (Press et al. 2022).

    x_BTND -> y_BTND in `dtype`: the temporal attention of C-ViViT (Villegas et al. 2023). Memory
    holds the scores of all pairs at once, so the mixer suits one location over time better than all
    tokens of a clip. width, heads, window, sinks, the state and errors are those of `Cached`.
    qk_norm: cosine similarity times 8, with a learned scale per channel. grid: unused; the tokens
    of a frame have no positions within it.
    """

    def setup(self):
        dense = dict(use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        self.q, self.k, self.v, self.out = (Linear(self.width, **dense) for _ in range(4))
        if self.qk_norm:
            self.q_norm = CosineNorm(dtype=self.dtype)
            self.k_norm = CosineNorm(dtype=self.dtype)

    def _softmax(self, q_BLAK, k_BMAK, v_BMAK, bias_ALM):
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
        q, k, v = self.project(context_BMD)
        y = self._softmax(q, k, v, None)
        return self.out(y.reshape(context_BMD.shape)), kv.start(k, v, tokens)

    def _scored(self, q_BLAK, k_BMAK, v_BMAK, position_L, position_M, allow):
        return self._softmax(q_BLAK, k_BMAK, v_BMAK, self._bias(position_L, position_M, allow))
