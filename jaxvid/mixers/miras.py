"""Miras: what a memory minimises and how it retains (Behrouz et al. 2025, 2504.13173), and LaCT.

Moneta, Yaad and Memora are the layer of `titans.NeuralMemory` without momentum, each with its own
objective and retention. Their gates are numbers per head, where the paper has one per channel.
`LaCT` (Zhang et al. 2025, Test-Time Training Done Right, 2505.23884) writes a frame by one large
step and reads the frames before it.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least, require
from jaxvid.kernels.neural_memory import Memory, neural_memory
from jaxvid.layers import masks
from jaxvid.layers.linear import Linear
from jaxvid.mixers.attention import Attention
from jaxvid.mixers.recurrent import Recurrent, unit_length
from jaxvid.mixers.titans import MAX_EXPANSION, NeuralMemory
from jaxvid.parallel.sharding import shard

_SOFTPLUS_INVERSE_OF_ONE = 0.5413248546129181
_LACT = Memory(
    network="swiglu",
    residual=False,
    objective="dot",
    retention="rows",
    chunk=1,
    read="before",
    writes="mean",
)


class Moneta(NeuralMemory):
    """The memory that minimises |M(k) - v|_3^3 and keeps the 4-norm of its weights bounded.

    What frames write adds up to A, and the weights are A / |A|_4^2 (section 5.2 of Miras; the
    paper's p and q). Options, state and errors are those of `NeuralMemory`.
    """

    momentum: ClassVar[bool] = False

    def _memory(self, chunk):
        own = dict(objective="lp", p=3.0, retention="lq", q=4.0)
        return dataclasses.replace(super()._memory(chunk), **own)


class Yaad(NeuralMemory):
    """The memory that is robust to outliers: a Huber loss with a radius that the token chooses.

    Up to the radius it descends |M(k) - v|^2, beyond it the radius times the sum of the absolute
    values (section 5.2 of Miras). The radius is softplus of the input per head, times the square
    root of the width of a head, which is the size of a normalised prediction. Options, state and
    errors are those of `NeuralMemory`.
    """

    momentum: ClassVar[bool] = False

    def _memory(self, chunk):
        return dataclasses.replace(super()._memory(chunk), objective="huber")

    def _radius(self, x_BTND):
        init = nn.initializers.constant(_SOFTPLUS_INVERSE_OF_ONE)
        bias_A = self.param("radius_bias", init, (self.heads,))
        radius_BTNA = nn.softplus(self._per_head("radius")(x_BTND).astype(jnp.float32) + bias_A)
        return (self.width // self.heads) ** 0.5 * radius_BTNA


class Memora(NeuralMemory):
    """The memory whose weights are a softmax: its retention is a KL divergence.

    Frames add up in the logarithm of the weights, which decays towards equal weights (section 5.2
    of Miras). The incoming weights of a unit are positive and sum to the square root of the width
    of a head, so they spread about as far as those of an ordinary layer. Options, state and errors
    are those of `NeuralMemory`, but `chunk` must be 1: within a longer one the weights are not
    known.
    """

    momentum: ClassVar[bool] = False

    def __post_init__(self):
        require(self.chunk == 1, "chunk", self.chunk, "must be 1 for memora")
        super().__post_init__()

    def _memory(self, chunk):
        mass = (self.width // self.heads) ** 0.5
        return dataclasses.replace(super()._memory(chunk), retention="softmax", mass=mass)

    def _init_weights(self):
        return nn.initializers.normal(2.0)


class LaCT(Recurrent):
    """Large-chunk test-time training beside attention to the last frames.

    x_BTND -> y_BTND in `dtype`. The memory of a head is a SwiGLU network, `expansion` times as wide
    inside. A frame adds to each matrix one step along the gradient of sum <M(k), v>, with step
    sizes per token and matrix, and then the incoming weights of every unit get back their norm. It
    reads the memory before it writes, so the memory holds earlier frames, and attention over
    `local` frames holds the frame itself. A noisy frame only reads. Memory and attention share q, k
    and v; the memory's queries and keys are scaled and shifted per channel, pass silu and have unit
    length. Its output is normalised, gated by silu and added.

    The paper sums step sizes of 0.001 over thousands of tokens; here they are averaged over the
    tokens of a frame and start at 1, so that the size of frames does not matter. The paper's
    optional Muon is left out.

    State: (`kernels.neural_memory.State` in float32, `mixers.cache.KVCache`). The context is
    written as a frame before the first. Raises UserError for options below 1.
    """

    expansion: int = 2
    local: int = 4

    def __post_init__(self):
        at_least("expansion", self.expansion, 1, at_most=MAX_EXPANSION)
        at_least("local", self.local, 1, at_most=masks.MAX_WINDOW)
        super().__post_init__()

    def prefill(self, context_BMD, tokens: int):
        """Read the context as a frame before the first -> (y_BMD, state); it sees only itself."""
        (y_B1MD,), state = self._layer((context_BMD[:, None],), None, tokens)
        return y_B1MD[:, 0], state

    def __call__(self, x_BTND, state=None):
        (y_BTND,), state = self._layer((x_BTND,), state)
        return y_BTND, state

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`) in one pass over the clean frames."""
        y, state = self._layer((clean_BTND, noisy_BTND), state)
        return *y, state

    @nn.compact
    def _layer(self, frames, state, context_for=None):
        """(outputs, state) of clean frames, and of their noisy copies if there are any.

        context_for: if the frame is the context, the tokens of the frames that follow.
        """
        shared = dict(grid=self.grid, qk_norm=self.qk_norm, dtype=self.dtype, name="attention")
        attention = Attention(self.width, self.heads, window=self.local, **shared)
        memory, cache = (None, None) if state is None else state
        if context_for is not None:
            y_BMD, cache = attention.prefill(frames[0][:, 0], context_for)
            attended = [y_BMD[:, None]]
        elif len(frames) == 1:
            *attended, cache = attention(*frames, cache)
        else:
            *attended, cache = attention.teacher_forced(*frames, cache)
        # To the memory a noisy copy is more tokens of its frame, which do not write.
        x_BTND = jnp.concatenate(frames, axis=2)
        q, k, v = attention.project(x_BTND)
        q, k = (unit_length(nn.silu(self._moved(name, x))) for name, x in (("q", q), ("k", k)))
        y_BTNAK, memory = self._read_and_write(x_BTND, q, k, v, frames[0].shape[2], memory)
        recalled = jnp.split(self._gated_out(y_BTNAK, x_BTND, nn.silu), len(frames), axis=2)
        return [a + b for a, b in zip(attended, recalled)], (memory, cache)

    def _moved(self, name, x_BTNAK):
        """Scaled and shifted by learned numbers per channel."""
        shape = x_BTNAK.shape[3:]
        scale_AK = self.param(f"{name}_scale", nn.initializers.ones, shape)
        shift_AK = self.param(f"{name}_shift", nn.initializers.zeros, shape)
        return x_BTNAK * scale_AK.astype(self.dtype) + shift_AK.astype(self.dtype)

    def _read_and_write(self, x_BTND, q, k, v, writers, state):
        """y_BTNAK and the state of the memory; the first `writers` tokens of a frame write."""
        B, T, N, A, K = q.shape
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        step = Linear(3 * A, dtype=self.dtype, kernel_init=init, name="step_size")(x_BTND)
        step = step.astype(jnp.float32).reshape(B, T, N, A, 3)
        bias_A3 = self.param(
            "step_size_bias", nn.initializers.constant(_SOFTPLUS_INVERSE_OF_ONE), (A, 3)
        )
        F = self.expansion * K
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        shapes = ((A, K, F), (A, K, F), (A, F, K))
        weights = [self.param(f"memory_{i}", init, shape) for i, shape in enumerate(shapes)]
        step = nn.softplus(step + bias_A3)
        q, k, v, step = (shard(part, "B_NAK"[: part.ndim]) for part in (q, k, v, step))
        return neural_memory(
            q,
            k,
            v,
            step,
            memory=_LACT,
            weights=weights,
            write_mask_BTN=jnp.broadcast_to(np.arange(N) < writers, (B, T, N)),
            state=state,
        )
