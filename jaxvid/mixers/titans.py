"""Titans: the state is the weights of a network that learns the stream while it reads it.

They are causal by frame. A frame is one step of `kernels.neural_memory`: the gradients of all its
tokens are taken at the weights before it (or before its chunk) and added up, the weights decay once
and move once, and then all its tokens read the new weights. So the order of the tokens within a
frame does not matter. A noisy frame reads what it has written itself into a copy of the memory,
which is thrown away: only frames that are committed remain.
"""

import itertools
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least
from jaxvid.kernels.neural_memory import Memory, neural_memory
from jaxvid.layers.conv import MAX_CONV
from jaxvid.mixers.recurrent import Recurrent, decay_biases, unit_length
from jaxvid.parallel.sharding import shard

MAX_DEPTH, MAX_EXPANSION, MAX_CHUNK = 16, 64, 2**10
_STEP, _MOMENTUM = -2.2, 2.2  # logits: step sizes start near 0.1, momentum near 0.9


class NeuralMemory(Recurrent):
    """The long-term memory module of Titans alone, LMM (Behrouz et al. 2025, 2501.00663, sec. 3).

    x_BTND -> y_BTND in `dtype`. q, k, v pass a convolution over `conv` frames and silu. Queries and
    keys have unit length, so `qk_norm` changes nothing. Every head has an MLP of `depth` layers,
    `expansion` times as wide inside, with M(x) = x + LN(MLP(x)). Frames change its weights by
    gradient descent on |M(k) - v|^2 with momentum and decay; step sizes are per token, the other
    gates are averaged over a frame. The output of a head is normalised and gated by silu.

    Step sizes are divided by the tokens of a frame and by the width of a head, so neither of them
    makes the descent unstable. The gates are sigmoids of the input; the paper leaves their form
    open. The learned weights of the start take the place of persistent tokens.

    chunk: frames whose gradients are taken at the same weights. Longer chunks make larger matrix
    products and another model, coarser within the chunk. How a stream is cut does not matter.

    State: (`kernels.neural_memory.State` in float32, the past of each convolution
    [B, conv - 1, N, D]). The context is written as a frame before the first; the convolutions do
    not reach back into it. Raises UserError for options below 1.
    """

    conv: int = 4
    depth: int = 2
    expansion: int = 4
    chunk: int = 1

    momentum: ClassVar[bool] = True

    def __post_init__(self):
        at_least("conv", self.conv, 1, at_most=MAX_CONV)
        at_least("depth", self.depth, 1, at_most=MAX_DEPTH)
        at_least("expansion", self.expansion, 1, at_most=MAX_EXPANSION)
        at_least("chunk", self.chunk, 1, at_most=MAX_CHUNK)
        super().__post_init__()

    def prefill(self, context_BMD, tokens: int):
        """Write the context as a frame before the first -> (y_BMD, state); it sees only itself."""
        y_B1MD, (memory, _) = self._layer(context_BMD[:, None], None, chunk=1)
        if self.chunk > 1:
            memory = memory._replace(start=memory.weights, position=np.int32(0))
        return y_B1MD[:, 0], (memory, self._empty_pasts(len(context_BMD), tokens))

    def __call__(self, x_BTND, state=None):
        return self._layer(x_BTND, state, self.chunk)

    @nn.compact
    def _layer(self, x_BTND, state, chunk):
        state, pasts = (None, None) if state is None else state
        (q, k, v), pasts = self._convolved_qkv(x_BTND, pasts)
        y_BTNAK, state = self._write_and_read(
            x_BTND, unit_length(q), unit_length(k), v, state, chunk
        )
        return self._gated_out(y_BTNAK, x_BTND, nn.silu), (state, pasts)

    def _memory(self, chunk: int) -> Memory:
        """The kind of memory. After a chunk of one frame retention applies before it is read."""
        return Memory(
            chunk=chunk,
            read="after" if chunk == 1 else "causal",
            step_scale=self.heads / self.width,
            writes="mean",
        )

    def _weights(self):
        """The weights of the start, one [A, in, out] per layer."""
        K = self.width // self.heads
        widths = [K, *[self.expansion * K] * (self.depth - 1), K]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        return [
            self.param(f"memory_{i}", init, (self.heads, *pair))
            for i, pair in enumerate(itertools.pairwise(widths))
        ]

    def _radius(self, x_BTND):
        """The radius of the objective, if it has one."""
        del x_BTND

    def _gates(self, x_BTND):
        """(step sizes [B, T, N, A], log decay [B, T, A], log momentum [B, T, A] or None)."""

        def logit(name):
            return self._per_head(name)(x_BTND).astype(jnp.float32)

        bias_A = self.param("decay_bias", decay_biases, (self.heads,))
        log_decay_BTA = -nn.softplus(logit("decay") + bias_A).mean(axis=2)
        bias_A = self.param("step_size_bias", nn.initializers.constant(_STEP), (self.heads,))
        step_BTNA = nn.sigmoid(logit("step_size") + bias_A)
        if not self.momentum:
            return step_BTNA, log_decay_BTA, None
        bias_A = self.param("momentum_bias", nn.initializers.constant(_MOMENTUM), (self.heads,))
        log_momentum_BTA = nn.log_sigmoid(logit("momentum") + bias_A).mean(axis=2)
        return step_BTNA, log_decay_BTA, log_momentum_BTA

    def _write_and_read(self, x_BTND, q, k, v, state, chunk):
        """y_BTNAK in the dtype of v, and the state of the memory."""
        norm_AK = self.param("memory_norm", nn.initializers.ones, (self.heads, v.shape[-1]))
        step, *gates = self._gates(x_BTND)
        q, k, v, step = (shard(part, "B_NAK"[: part.ndim]) for part in (q, k, v, step))
        return neural_memory(
            q,
            k,
            v,
            step,
            *gates,
            memory=self._memory(chunk),
            weights=self._weights(),
            norm_AV=norm_AK,
            radius_BTNA=self._radius(x_BTND),
            state=state,
        )
