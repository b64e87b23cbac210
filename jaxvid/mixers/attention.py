"""Softmax attention over a stream of frames, with an exact key-value cache."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least, choose, require
from jaxvid.kernels.attention import attention
from jaxvid.layers import masks
from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.layers.linear import Linear
from jaxvid.mixers import cache as kv
from jaxvid.mixers.cached import Cached
from jaxvid.parallel.sharding import shard

MASKS = ("causal", "full")
POSITIONS = ("absolute", "anchored", "cyclic")


class Attention(Cached):
    """Frame-block causal multi-head attention with rotary positions over (t, h, w).

    x_BTND -> y_BTND in `dtype`, N = H * W tokens per frame; softmax and normalisation in float32.
    width, heads, grid, window, sinks and the state are those of `Cached`. qk_norm: RMS-normalise
    queries and keys per head (Dehghani et al. 2023). positions: "absolute", "anchored" or "cyclic".
    mask: "causal", or "full", the non-causal baseline, which cannot stream. Raises UserError as
    `Cached` does, for unknown positions and masks, for cyclic positions without a window, and for a
    cycle shorter than the window.

    anchored: once the window has left the sinks, they and the context move along just before it, so
    no distance exceeds window + sinks - 1 in a stream of any length, as with the sinks of Rolling
    Forcing and LongLive.

    cyclic: a score depends on (q - k) mod cycle alone, since every angle of time makes whole turns
    per cycle. So sinks and context sweep over the distances of training, again and again. Ca2-VDM
    (Gao et al. 2024) adds embeddings of frame mod cycle and trains from random first frames to see
    all rotations; rotary positions need no more than clips of `cycle` frames. cycle: None = window
    + sinks, the least number that tells apart all the frames of a full cache when the window has
    just left the sinks, whose distances are 0 to window + sinks - 1. A smaller one would give the
    first sink the place of the query's own frame there. A model that is to read a shorter past than
    in training keeps the cycle of its training.
    """

    positions: str = "absolute"
    mask: str = "causal"
    cycle: int | None = None

    def __post_init__(self):
        choose("positions", self.positions, POSITIONS)
        choose("mask", self.mask, MASKS)
        super().__post_init__()
        if self.positions == "cyclic":
            remedy = "they repeat once the window has passed; set a window, or use absolute"
            require(self.window is not None, "positions", self.positions, remedy)
            at_least("cycle", self.period, self.window, at_most=2 * masks.MAX_WINDOW)

    @property
    def streams(self) -> bool:
        return self.mask == "causal"

    @property
    def period(self) -> int | None:
        """Frames after which positions repeat; None unless they are cyclic."""
        if self.positions != "cyclic":
            return None
        return self.window + self.sinks if self.cycle is None else self.cycle

    @property
    def _anchored(self) -> bool:
        return self.positions == "anchored" and self.window is not None

    def setup(self):
        dense = dict(dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        self.q, self.k, self.v, self.out = (Linear(self.width, **dense) for _ in range(4))
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(dtype=self.dtype)
            self.k_norm = nn.RMSNorm(dtype=self.dtype)

    def prefill(self, context_BMD, tokens: int):
        """Read the context that precedes the first frame -> (y_BMD, state); it sees only itself.

        tokens: N of the frames that follow.
        """
        q, k, v = self.project(context_BMD)
        position_M = np.full(context_BMD.shape[1], masks.CONTEXT, np.int32)
        y = attention(q, k, v, q_position_L=position_M, k_position_M=position_M, allow=masks.full)
        return self.out(y.reshape(context_BMD.shape)), kv.start(k, v, tokens)

    def __call__(self, x_BTND, state=None):
        continues = state is not None and not kv.is_start(state)
        message = "cannot continue a stream; use causal"
        require(self.streams or not continues, "mask", self.mask, message)
        return super().__call__(x_BTND, state)

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`); UserError with the mask "full"."""
        require(self.streams, "mask", self.mask, "has no past to be forced to; use causal")
        return super().teacher_forced(clean_BTND, noisy_BTND, state)

    def _allow(self):
        return super()._allow() if self.streams else masks.full

    def _placed(self, x_BTND, frame_T):
        """Queries and keys turned to their frames, and values [B, T, N, A, K].

        With anchored positions queries have two halves, see `_anchored_keys`.
        """
        q, k, v = self.project(x_BTND)
        angle_TNK = rotary_angles(frame_T, self.grid, self.width // self.heads, self.period)
        turned = [rotate(q, angle_TNK)]
        if self._anchored:
            xp = np if isinstance(frame_T, np.ndarray) else jnp
            nearest_T = xp.minimum(frame_T, self.window + self.sinks - 1)
            angle_of_sinks = rotary_angles(nearest_T, self.grid, self.width // self.heads)
            turned.append(rotate(q, angle_of_sinks))
        return jnp.concatenate(turned, axis=-1), rotate(k, angle_TNK), v

    def _scored(self, q_BLAK, k_BMAK, v_BMAK, position_L, position_M, allow):
        if self._anchored:
            k_BMAK = self._anchored_keys(k_BMAK, position_M)
        return attention(
            shard(q_BLAK, "BLAK"),
            shard(k_BMAK, "BMAK"),
            shard(v_BMAK, "BMAK"),
            q_position_L=position_L,
            k_position_M=position_M,
            allow=allow,
            scale=v_BMAK.shape[-1] ** -0.5,
        )

    def _anchored_keys(self, k_BMAK, position_M):
        """Keys of twice the width for the queries of `_placed`.

        To query q, sink j stands at j + d, where d = max(0, q - (window + sinks - 1)) does not
        depend on j. Its key, rotated to j, gives the same score with a query rotated to q - d. So a
        key of the sinks or the context lies in the second half and meets that query, and any other
        key lies in the first half and meets the query as it is.
        """
        is_anchored_M11 = (position_M < self.sinks)[:, None, None]
        near = jnp.where(is_anchored_M11, 0, k_BMAK)
        return jnp.concatenate([near, jnp.where(is_anchored_M11, k_BMAK, 0)], axis=-1)
