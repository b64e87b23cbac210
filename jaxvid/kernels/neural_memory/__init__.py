"""Neural memory: a network whose weights are the state of the stream (Titans, Miras, TTT, LaCT)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import checks
from jaxvid.kernels import dispatch
from jaxvid.kernels.neural_memory import chunked, parts, reference
from jaxvid.kernels.neural_memory.parts import Memory, State

IMPLEMENTATIONS = {"chunked": chunked.neural_memory, "reference": reference.neural_memory}


def neural_memory(
    q_BTNAK: jax.Array,
    k_BTNAK: jax.Array,
    v_BTNAV: jax.Array,
    step,
    log_decay_BTA=None,
    log_momentum_BTA=None,
    *,
    memory: Memory,
    weights,
    norm_AV=None,
    radius_BTNA=None,
    write_mask_BTN=None,
    state: State | None = None,
    return_surprise: bool = False,
    implementation: str = "auto",
):
    """T frames of N tokens write to a memory and read it -> (y_BTNAV, state).

        S_t = exp(m_t) S_{t-1} - sum_n step_tn grad loss(W; k_tn, v_tn)
        W_t = exp(g_t) W_{t-1} + S_t,    y_tn = M(W_t; q_tn)

    A frame is one step of the recurrence; text has frames of one token, N = 1. The gradients of a
    chunk of frames are taken at one W, the weights before the chunk (Behrouz et al. 2024, Titans,
    eq. 8-18; without momentum and with other losses and retentions Behrouz et al. 2025, Miras).
    `Memory` has the networks M, the losses, the retentions and what a frame reads.

    step: step sizes >= 0, [B, T, N, A], or [B, T, N, A, layers] with one per layer. log_decay: g <=
    0, the logarithm of what is not forgotten, none is forgotten unless given. log_momentum: m <= 0;
    without it S_t is the gradient alone. Minus infinity erases. weights: what a stream starts with,
    [A, in, out] per layer; with retention=softmax their logarithms. norm: scale of the
    layer norm of a residual network, 1 unless given. radius: of the objectives huber and shift.
    write_mask: bool; tokens without it read and do not write, and a frame without any leaves the
    state as it is. state: that of an earlier call, which this one continues. return_surprise: also
    return the norm of every token's gradient, float32 [B, T, N, A], which passes no gradient.

    y has the dtype of v; all else is computed in float32 (in float64 if an input is). All inputs
    have gradients. implementation: a name of IMPLEMENTATIONS, or "auto".

    Raises UserError for shapes that do not fit, and for an unknown implementation.
    """
    q, k, v, step, g, m, radius, write_mask, norm = dispatch.as_arrays(
        q_BTNAK,
        k_BTNAK,
        v_BTNAV,
        step,
        log_decay_BTA,
        log_momentum_BTA,
        radius_BTNA,
        write_mask_BTN,
        norm_AV,
    )
    weights = tuple(dispatch.as_arrays(*weights))
    _check(memory, q, k, v, step, g, m, radius, write_mask, norm, weights)
    B, T, N, A, _ = q.shape
    dtype = jnp.result_type(jnp.float32, q, k, v)
    if state is None:
        state = start(memory, weights, B, momentum=m is not None)
    _check_state(memory, state, weights, B, m)
    if T == 0:
        y = jnp.zeros(v.shape, v.dtype)
        return (y, state, jnp.zeros((B, 0, N, A), dtype)) if return_surprise else (y, state)

    mask = jnp.ones((B, T, N), bool) if write_mask is None else write_mask
    writes_BTA = jnp.broadcast_to(mask.any(axis=2)[..., None], (B, T, A))
    step = jnp.broadcast_to(step[..., None] if step.ndim == 4 else step, (B, T, N, A, len(weights)))
    step = jnp.where(mask[..., None, None], memory.step_scale * step.astype(dtype), 0)
    writers_BT111 = jnp.maximum(mask.sum(axis=2), 1)[..., None, None, None].astype(dtype)
    if memory.writes == "mean":
        step = step / writers_BT111
    elif memory.writes == "keys":
        k = k * jax.lax.rsqrt(writers_BT111)
    g = jnp.zeros((B, T, A)) if g is None else g
    logarithms = [
        None if x is None else jnp.where(writes_BTA, jnp.maximum(x, dispatch.FORGET), 0)
        for x in (g, m)
    ]
    tokens = (q, k, v, step, radius)
    frames = (*logarithms, writes_BTA)
    offset = 0 if memory.chunk == 1 else state.position % memory.chunk
    frame_T = (0 if state.position is None else state.position) + np.arange(T)
    every = memory.reset_every or 1
    flags = ((frame_T + 1) % memory.chunk == 0, (frame_T % every == 0) & (frame_T > 0))
    carry = (state.weights, state.momentum, state.start or state.weights)
    carry = tuple(part and list(part) for part in carry)
    norm = jnp.ones(v.shape[3:]) if norm is None else norm
    tokens, frames, norm, initial, carry = jax.tree.map(
        lambda x: x.astype(dtype), (tokens, frames, norm, list(weights), carry)
    )
    automatic = ("reference",) if T == 1 and memory.chunk > 1 else ("chunked",)
    y, surprise, carry = dispatch.run(
        IMPLEMENTATIONS,
        implementation,
        automatic,
        memory,
        tokens,
        frames,
        flags,
        offset,
        norm,
        initial,
        carry,
        return_surprise,
    )
    new, momentum, chunk_start = (part and tuple(part) for part in carry)
    state = State(
        new,
        momentum,
        None if memory.chunk == 1 else chunk_start,
        None if state.position is None else state.position + np.int32(T),
    )
    y = y.astype(v.dtype)
    return (y, state, surprise) if return_surprise else (y, state)


def start(memory: Memory, weights, batch: int, *, momentum: bool) -> State:
    """The state of `batch` streams that have read nothing."""

    def rows(w_AKF):
        dtype = jnp.result_type(jnp.float32, w_AKF)
        return jnp.broadcast_to(w_AKF.astype(dtype), (batch, *w_AKF.shape))

    first = tuple(rows(w) for w in weights)
    zero = tuple(jnp.zeros_like(w) for w in first) if momentum else None
    counts = memory.chunk > 1 or memory.reset_every is not None
    chunk_start = first if memory.chunk > 1 else None
    return State(first, zero, chunk_start, np.int32(0) if counts else None)


def recall(q_BTNAK: jax.Array, state: State, *, memory: Memory, norm_AV=None) -> jax.Array:
    """What the memory before the current chunk answers to queries -> float32 [B, T, N, A, V]."""
    accumulated = state.start or state.weights
    V = accumulated[-1].shape[-1]
    norm_AV = jnp.ones((q_BTNAK.shape[3], V)) if norm_AV is None else norm_AV

    def head(q_TNK, accumulated, norm_V):
        return parts.recall(memory, parts.weights(memory, accumulated), q_TNK, norm_V)

    heads = jax.vmap(head, in_axes=(2, 0, 0), out_axes=2)
    rows = jax.vmap(heads, in_axes=(0, 0, None))
    return rows(q_BTNAK.astype(accumulated[0].dtype), accumulated, norm_AV)


def _check(memory, q, k, v, step, g, m, radius, write_mask, norm, weights):
    """Raise UserError unless the operands fit."""
    fit = q.ndim == 5 and k.shape == q.shape and v.shape[:-1] == q.shape[:-1]
    checks.require(
        fit and all(q.shape[2:] + v.shape[2:]) and q.shape[0] > 0,
        "q, k, v shapes",
        (q.shape, k.shape, v.shape),
        "must be [B, T, N, A, K] twice and [B, T, N, A, V], all sizes but T at least 1",
    )
    B, T, N, A, K = q.shape
    V, depth = v.shape[-1], len(weights)
    checks.require(depth > 0, "len(weights)", depth, "must be at least 1")
    widths = [K, *(w.shape[-1] for w in weights[:-1]), V]
    shapes = [(A, *pair) for pair in itertools.pairwise(widths)]
    if memory.network == "swiglu":
        checks.require(depth == 3, "len(weights)", depth, "must be 3 with network=swiglu")
        shapes = [(A, K, widths[1]), (A, K, widths[1]), (A, widths[1], V)]
    for i, (w, shape) in enumerate(zip(weights, shapes)):
        dispatch.check_shape(f"weights[{i}]", w, shape)
    if memory.residual:
        checks.require(K == V, "residual", True, f"needs keys as wide as values, not {K} and {V}")
    dispatch.check_shape("step", step, (B, T, N, A), (B, T, N, A, depth))
    dispatch.check_shape("log_decay", g, (B, T, A))
    dispatch.check_shape("log_momentum", m, (B, T, A))
    dispatch.check_shape("radius", radius, (B, T, N, A))
    dispatch.check_shape("write_mask", write_mask, (B, T, N))
    dispatch.check_shape("norm", norm, (A, V))
    needs = memory.objective in ("huber", "shift")
    remedy = "needs a radius" if needs else "has no radius; leave it out"
    checks.require(needs == (radius is not None), "objective", memory.objective, remedy)


def _check_state(memory, state, weights, B, m):
    """Raise UserError unless the state is one of a memory with these options."""
    for i, (old, w) in enumerate(zip(state.weights, weights)):
        dispatch.check_shape(f"state.weights[{i}]", old, (B, *w.shape))
    remedy = "must be given exactly when log_momentum is"
    has = state.momentum is not None
    checks.require(has == (m is not None), "state.momentum", has, remedy)
    counts = memory.chunk > 1 or memory.reset_every is not None
    fits = (state.start is not None) == (memory.chunk > 1)
    fits &= (state.position is not None) == counts
    checks.require(fits, "state", "of another memory", "use one that the same options made")
