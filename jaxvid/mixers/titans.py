"""Titans: the state is the weights of a network that learns the stream while it reads it.

They are causal by frame. A frame is one step of `kernels.neural_memory`: the gradients of all its
tokens are taken at the weights before it (or before its chunk) and added up, the weights decay once
and move once, and then all its tokens read the new weights. So the order of the tokens within a
frame does not matter. A noisy frame reads what it has written itself into a copy of the memory,
which is thrown away: only frames that are committed remain.

`NeuralMemory` is the memory alone. The others join it with attention, which sees a few learned
tokens that precede every stream, the persistent memory: `MemoryAsContext`, `MemoryAsGate`,
`MemoryAsLayer` (sections 4.1 to 4.3).
"""

import functools
import itertools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least, choose
from jaxvid.kernels.neural_memory import Memory, neural_memory, recall
from jaxvid.layers import masks, pairs
from jaxvid.layers.conv import MAX_CONV
from jaxvid.mixers.attention import Attention
from jaxvid.mixers.recurrent import Recurrent, decay_biases, unit_length
from jaxvid.parallel.sharding import shard

WRITES = ("committed", "evicted")
MAX_DEPTH, MAX_EXPANSION, MAX_CHUNK, MAX_PERSISTENT = 16, 64, 2**10, 2**10
_STEP, _MOMENTUM = -2.2, 2.2  # logits: step sizes start near 0.1, momentum near 0.9
_KEPT = 4  # chunks for each state that the backward pass keeps; states are larger than frames
# Fast forgetting makes weights small, and the norm after them divides by their size. So gradients
# grow with every frame, the faster the more is forgotten.
_decay_biases = functools.partial(decay_biases, fastest=0.1)


class NeuralMemory(Recurrent):
    """The long-term memory module of Titans alone, LMM (Behrouz et al. 2025, 2501.00663, sec. 3).

    x_BTND -> y_BTND in `dtype`. q, k, v pass a convolution over `conv` frames and silu. Queries and
    keys have unit length, so `qk_norm` changes nothing. Every head has an MLP of `depth` layers,
    `expansion` times as wide inside, with M(x) = x + LN(MLP(x)). Frames change its weights by
    gradient descent on |M(k) - v|^2 with momentum and decay; step sizes are per token, the other
    gates are averaged over a frame. The output of a head is normalised and gated by silu.

    Step sizes are divided by the tokens of a frame and by the width of a head, so neither of them
    changes how far a frame moves the weights. The gates are sigmoids of the input; the paper leaves
    their form open. The learned weights of the start take the place of persistent tokens.

    chunk: frames whose gradients are taken at the same weights. Longer chunks make larger matrix
    products and another model, coarser within the chunk. How a stream is cut does not matter.

    delay: frames after which a frame is written; a frame then reads the frames that lie at least as
    far back. 0 = it reads itself.

    State: (`kernels.neural_memory.State` in float32, the past of each convolution
    [B, conv - 1, N, D]), and with a delay what the last `delay` frames will write, as a list of
    arrays [B, delay, N, ..]. The context is written as a frame before the first, or not at all with
    a delay; the convolutions do not reach back into it. Raises UserError for options below 1, and
    for a negative delay.
    """

    conv: int = 4
    depth: int = 2
    expansion: int = 4
    chunk: int = 1
    delay: int = 0

    momentum: ClassVar[bool] = True

    def __post_init__(self):
        at_least("conv", self.conv, 1, at_most=MAX_CONV)
        at_least("depth", self.depth, 1, at_most=MAX_DEPTH)
        at_least("expansion", self.expansion, 1, at_most=MAX_EXPANSION)
        at_least("chunk", self.chunk, 1, at_most=MAX_CHUNK)
        at_least("delay", self.delay, 0, at_most=masks.MAX_WINDOW)
        super().__post_init__()

    def prefill(self, context_BMD, tokens: int):
        """Write the context as a frame before the first -> (y_BMD, state); it sees only itself."""
        y_B1MD, (memory, *_) = self._layer(context_BMD[:, None], None, chunk=1)
        if self.delay:  # it has read and not written
            empty_B0ND = jnp.zeros((len(context_BMD), 0, tokens, self.width), self.dtype)
            return y_B1MD[:, 0], self._layer(empty_B0ND, None, self.chunk)[1]
        if self.chunk > 1:
            memory = memory._replace(start=memory.weights, position=np.int32(0))
        return y_B1MD[:, 0], (memory, self._empty_pasts(len(context_BMD), tokens))

    def __call__(self, x_BTND, state=None):
        return self._layer(x_BTND, state, self.chunk)

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`); only the memory itself goes frame by frame."""
        x_BTND = pairs.join(clean_BTND, noisy_BTND)
        y_BTND, state = self._layer(x_BTND, state, self.chunk, paired=True)
        return *pairs.split(y_BTND), state

    def recall(self, x_BTND, state):
        """What the memory of a state answers to x, normalised; nothing is written."""
        return self._layer(x_BTND, state, self.chunk, writes=False)

    @nn.compact
    def _layer(self, x_BTND, state, chunk, paired=False, writes=True):
        heads = (*x_BTND.shape[:3], self.heads, self.width // self.heads)
        norm_AK = self.param("memory_norm", nn.initializers.ones, heads[3:])
        shared = dict(memory=self._memory(chunk), norm_AV=norm_AK)
        if not writes:
            q_BTNAK = nn.silu(self._dense(self.width, "q")(x_BTND)).reshape(heads)
            y_BTNAK = recall(unit_length(q_BTNAK), state[0], **shared)
            return self._norm("recall_norm")(y_BTNAK).reshape(x_BTND.shape)
        state, pasts, *late = (None, None) if state is None else state
        (q, k, v), pasts = self._convolved_qkv(x_BTND, pasts, paired)
        weights = self._weights()
        operands = (unit_length(q), unit_length(k), v, *self._gates(x_BTND), self._radius(x_BTND))

        def run(operands, state, mask_BTN=None):
            *operands, radius = operands
            own = dict(weights=weights, radius_BTNA=radius, state=state, write_mask_BTN=mask_BTN)
            return neural_memory(*operands, **own, **shared)

        if self.delay:
            late = late[0] if late else None
            y_BTNAK, state, *late = _late(run, operands, state, late, self.delay, paired)
        else:
            y_BTNAK, state = (_in_pairs if paired else _at_once)(run, operands, state)
        return self._gated_out(y_BTNAK, x_BTND, nn.silu), (state, pasts, *late)

    def _memory(self, chunk: int) -> Memory:
        """The kind of memory. After a chunk of one frame retention applies before it is read."""
        return Memory(
            chunk=chunk,
            read="after" if chunk == 1 else "causal",
            step_scale=self.heads / self.width,
            writes="mean",
            remat=_KEPT,
        )

    def _weights(self):
        """The weights of the start, one [A, in, out] per layer."""
        K = self.width // self.heads
        widths = [K, *[self.expansion * K] * (self.depth - 1), K]
        return [
            self.param(f"memory_{i}", self._init_weights(), (self.heads, *pair))
            for i, pair in enumerate(itertools.pairwise(widths))
        ]

    def _init_weights(self):
        return nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)

    def _radius(self, x_BTND):
        """The radius of the objective, if it has one."""
        del x_BTND

    def _gates(self, x_BTND):
        """(step sizes [B, T, N, A], log decay [B, T, A], log momentum [B, T, A] or None)."""

        def logit(name):
            return self._per_head(name)(x_BTND).astype(jnp.float32)

        bias_A = self.param("decay_bias", _decay_biases, (self.heads,))
        log_decay_BTA = -nn.softplus(logit("decay") + bias_A).mean(axis=2)
        bias_A = self.param("step_size_bias", nn.initializers.constant(_STEP), (self.heads,))
        step_BTNA = nn.sigmoid(logit("step_size") + bias_A)
        if not self.momentum:
            return step_BTNA, log_decay_BTA, None
        bias_A = self.param("momentum_bias", nn.initializers.constant(_MOMENTUM), (self.heads,))
        log_momentum_BTA = nn.log_sigmoid(logit("momentum") + bias_A).mean(axis=2)
        return step_BTNA, log_decay_BTA, log_momentum_BTA


def _whole(part):
    """Every device needs all frames, [B, T, N, A, ..] or [B, T, A]."""
    return shard(part, "B_A" if part.ndim == 3 else "B_NAK"[: part.ndim])


def _at_once(run, operands, state):
    """(y_BTNAK, state) of a stream."""
    return run(jax.tree.map(_whole, operands), state)


def _in_pairs(run, operands, state):
    """(y [B, 2 T, N, A, K], state) of `layers.pairs`, by a scan over frames.

    A copy writes to the memory before its frame as if it came next, and reads; then the clean frame
    does, and its state remains.
    """
    clean, copy = (
        [part if part is None else _whole(pairs.split(part)[i]).swapaxes(0, 1) for part in operands]
        for i in (0, 1)
    )
    _, state = run(jax.tree.map(lambda part: part[:, :0], operands), state)  # that of the start

    def frame(state, operands):
        clean, copy = jax.tree.map(lambda x: x[:, None], operands)
        y_copy, _ = run(copy, state)
        y_clean, state = run(clean, state)
        return state, (y_clean[:, 0], y_copy[:, 0])

    state, ys = jax.lax.scan(frame, jax.tree.map(jnp.asarray, state), (clean, copy))
    return pairs.join(*(y_TBNAK.swapaxes(0, 1) for y_TBNAK in ys)), state


def _late(run, operands, state, late, delay, paired):
    """(y_BTNAK, state, late) of a stream whose frames are written after `delay` frames.

    late: what the last frames will write, and whether there is such a frame; None at the start.
    paired: with copies in between, which read the same memory as their frames and write nothing.
    """
    q, *writes = jax.tree.map(_whole, operands)
    if paired:
        q, copies = pairs.split(q)
        writes = jax.tree.map(lambda x: pairs.split(x)[0], writes)
    B, T, N = q.shape[:3]
    writes = [*writes, jnp.ones((B, T, N), bool)]
    if late is None:
        late = jax.tree.map(lambda x: jnp.zeros((B, delay, *x.shape[2:]), x.dtype), writes)
    seen = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), late, writes)
    k, v, step, decay, momentum, radius, mask_BTN = jax.tree.map(lambda x: x[:, :T], seen)
    if paired:
        q = jnp.concatenate([q, copies], axis=2)
        k, v, step, radius, mask_BTN = jax.tree.map(
            lambda x: jnp.concatenate([x, jnp.zeros_like(x)], axis=2),
            (k, v, step, radius, mask_BTN),
        )
    y_BTNAK, state = run((q, k, v, step, decay, momentum, radius), state, mask_BTN)
    if paired:
        y_BTNAK = pairs.join(y_BTNAK[:, :, :N], y_BTNAK[:, :, N:])
    return y_BTNAK, state, jax.tree.map(lambda x: x[:, T:], seen)


class _WithAttention(Recurrent):
    """A memory and attention, and what their combinations share.

    conv, depth, expansion, chunk: of the memory, see `NeuralMemory`. local: frames that attention
    sees, its own included. persistent: learned tokens before every stream. Raises UserError for
    options below 1.
    """

    conv: int = 4
    depth: int = 2
    expansion: int = 4
    persistent: int = 4

    chunk: ClassVar[int] = 1
    local: ClassVar[int] = 1
    write: ClassVar[str] = "committed"

    def __post_init__(self):
        at_least("local", self.local, 1, at_most=masks.MAX_WINDOW)
        at_least("persistent", self.persistent, 1, at_most=MAX_PERSISTENT)
        choose("write", self.write, WRITES)
        NeuralMemory(self.width, self.heads, **self._of_memory(), parent=None)  # which checks them
        super().__post_init__()

    def _of_memory(self):
        own = dict(conv=self.conv, depth=self.depth, expansion=self.expansion, chunk=self.chunk)
        return own | {"delay": self.local if self.write == "evicted" else 0}

    def setup(self):
        shared = dict(grid=self.grid, qk_norm=self.qk_norm, dtype=self.dtype)
        self.memory = NeuralMemory(self.width, self.heads, **shared, **self._of_memory())
        self.attention = Attention(self.width, self.heads, window=self.local, **shared)
        shape = (self.persistent, self.width)
        self.first = self.param("persistent", nn.initializers.normal(1.0), shape)
        self.attention_norm, self.memory_norm = (nn.RMSNorm(dtype=self.dtype) for _ in range(2))

    def _gate(self, y_BTND, memory_BTND):
        """Both normalised; the memory is the gate."""
        return self.attention_norm(y_BTND) * nn.sigmoid(self.memory_norm(memory_BTND))


class _SideBySide(_WithAttention):
    """Memory and attention with a state each. A subclass says how their outputs meet.

    write: when a frame enters the memory: "committed", at once; "evicted", when attention no longer
    sees it, as in VideoSSM (2512.04519), so that the window and the memory share out the past.
    Attention always sees the persistent tokens and the context, so they do not enter it then.
    """

    chunk: int = 1
    local: int = 4
    write: str = "committed"

    def prefill(self, context_BMD, tokens: int):
        """Read the persistent tokens and then the context -> (y_BMD, state)."""
        first_BMD = jnp.broadcast_to(self.first, (len(context_BMD), *self.first.shape))
        context_BMD = jnp.concatenate([first_BMD.astype(self.dtype), context_BMD], axis=1)
        y_BMD, state = self._read_context(context_BMD, tokens)
        return y_BMD[:, self.persistent :], state

    def __call__(self, x_BTND, state=None):
        memory, cache = self._given(x_BTND, state)
        (y_BTND,), *state = self._over_time("__call__", (x_BTND,), memory, cache)
        return y_BTND, tuple(state)

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`): that of the memory and that of attention."""
        memory, cache = self._given(clean_BTND, state)
        y, *state = self._over_time("teacher_forced", (clean_BTND, noisy_BTND), memory, cache)
        return *y, tuple(state)

    def _given(self, x_BTND, state):
        """The state, that of the persistent tokens at the start of a stream."""
        if state is None:
            _, state = self.prefill(x_BTND[:, :0, 0], x_BTND.shape[2])
        return state


class MemoryAsGate(_SideBySide):
    """Titans MAG (section 4.2): attention to the last frames, gated by the memory of all.

    x_BTND -> y_BTND in `dtype`: norm(attention(x)) * sigmoid(norm(memory(x))). Both read the
    persistent tokens first. Attention is `mixers.attention.Attention` over `local` frames.

    State: (that of `NeuralMemory`, `mixers.cache.KVCache`). Options and errors are those of
    `_WithAttention` and `_SideBySide`.
    """

    def _read_context(self, x_BMD, tokens):
        memory_BMD, memory = self.memory.prefill(x_BMD, tokens)
        y_BMD, cache = self.attention.prefill(x_BMD, tokens)
        return self._gate(y_BMD, memory_BMD), (memory, cache)

    def _over_time(self, verb, frames, memory, cache):
        *recalled, memory = getattr(self.memory, verb)(*frames, memory)
        *attended, cache = getattr(self.attention, verb)(*frames, cache)
        return [self._gate(y, m) for y, m in zip(attended, recalled)], memory, cache


class MemoryAsLayer(_SideBySide):
    """Titans MAL (section 4.3): attention to the last frames of what the memory makes of them.

    x_BTND -> y_BTND in `dtype`: attention(norm(x + memory(x))). The memory reads the persistent
    tokens first, and attention sees what it makes of them. Attention is
    `mixers.attention.Attention` over `local` frames.

    State, options and errors: as of `MemoryAsGate`.
    """

    def _read_context(self, x_BMD, tokens):
        memory_BMD, memory = self.memory.prefill(x_BMD, tokens)
        y_BMD, cache = self.attention.prefill(self.memory_norm(x_BMD + memory_BMD), tokens)
        return y_BMD, (memory, cache)

    def _over_time(self, verb, frames, memory, cache):
        *recalled, memory = getattr(self.memory, verb)(*frames, memory)
        frames = [self.memory_norm(x + m) for x, m in zip(frames, recalled)]
        *y, cache = getattr(self.attention, verb)(*frames, cache)
        return y, memory, cache


class MemoryAsContext(_WithAttention):
    """Titans MAC (section 4.1): attention within a frame and to what the memory recalls of it.

    x_BTND -> y_BTND in `dtype`. A frame is a segment of the paper. The memory M before the frame
    recalls h = M(x); y is attention of x to the persistent tokens, h and x; the memory learns y,
    and with M' after it the output is norm(y) * sigmoid(norm(M'(y))).

    The tokens of the paper's segments are causal, and reading M' breaks that: it has learned the
    end of a segment when the first token reads. A frame has no order within. In every mixer its
    tokens see all of it, and M' has learned nothing later, so nothing leaks.

    State: that of `NeuralMemory`. Options and errors are those of `_WithAttention`, without `chunk`
    and `local`.
    """

    def prefill(self, context_BMD, tokens: int):
        """Read the context as a frame before the first -> (y_BMD, state); it sees only itself."""
        _, state = self.memory(context_BMD[:, None][:, :0])
        seen_BMD = self._before(context_BMD, state)
        seen_BMD = jnp.concatenate([seen_BMD, context_BMD], axis=1)
        y_BMD = self.attention.prefill(seen_BMD, tokens)[0][:, -context_BMD.shape[1] :]
        memory_BMD, state = self.memory.prefill(y_BMD, tokens)
        return self._gate(y_BMD, memory_BMD), state

    def __call__(self, x_BTND, state=None):
        if state is None:
            _, state = self.memory(x_BTND[:, :0])
        if x_BTND.shape[1] == 0:
            return x_BTND.astype(self.dtype), state

        def step(mixer, state, x_BND):
            y_BND, state = mixer._segment(x_BND, state)
            return state, y_BND

        shared = dict(variable_broadcast="params", split_rngs={"params": False})
        scan = nn.scan(step, in_axes=1, out_axes=1, **shared)
        state, y_BTND = scan(self, state, x_BTND)
        return y_BTND, state

    def _before(self, x_BND, state):
        """What attention sees besides the frame: persistent tokens, and what memory recalls."""
        first_BMD = jnp.broadcast_to(self.first, (len(x_BND), *self.first.shape))
        recalled_BND = self.memory.recall(x_BND[:, None], state)[:, 0]
        return jnp.concatenate([first_BMD.astype(self.dtype), recalled_BND], axis=1)

    def _segment(self, x_BND, state):
        """One frame -> (y_BND, state)."""
        _, cache = self.attention.prefill(self._before(x_BND, state), x_BND.shape[1])
        y_B1ND, _ = self.attention(x_BND[:, None], cache)
        memory_B1ND, state = self.memory(y_B1ND, state)
        return self._gate(y_B1ND, memory_B1ND)[:, 0], state
