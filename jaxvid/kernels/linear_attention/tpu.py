"""Linear attention in Pallas for TPU: one forward pass over the chunks, one backward in reverse.

The state of a head stays in VMEM from chunk to chunk. The forward pass saves the state before every
chunk, so the backward pass recomputes no state. The chunk form is that of GLA (Yang et al. 2024),
and with one decay per head that of Lightning Attention-2 (Qin et al. 2024). Products have operands
in the dtype of the inputs and add up in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxvid.kernels.chunks import LONGEST
from jaxvid.kernels.pallas_tpu import (
    IN_ORDER,
    LANES,
    arrange,
    decays,
    dot,
    inner,
    iota,
    state_spec,
    times,
    token_specs,
)

CHUNK = 256  # up to about 350 (v5e) to 990 (v6e) the memory is the limit, so size costs no time
CHUNK_PER_CHANNEL = 128  # every doubling adds one product of this size


def linear_attention(q_BLAK, k_BLAK, v_BLAV, log_decay, *, scale, state_BAKV, chunk):
    """As `reference.linear_attention`; log_decay is -128 or more."""
    B, L, A = q_BLAK.shape[:3]
    g = jnp.zeros((B, L, A)) if log_decay is None else log_decay
    by_channel = g.ndim == 4
    chunk = chunk or (CHUNK_PER_CHANNEL if by_channel else CHUNK)
    chunk = LANES * pl.cdiv(min(chunk, LONGEST, L), LANES)
    if by_channel:
        chunk = pl.next_power_of_2(chunk)

    q, k, v, g = (arrange(x, chunk) for x in (q_BLAK * scale, k_BLAK, v_BLAV, g))
    y_BALV, state_BAKV = attend(chunk, q, k, v, g if by_channel else g[:, :, None], state_BAKV)
    return y_BALV[:, :, :L].swapaxes(1, 2), state_BAKV


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(chunk, q_BALK, k_BALK, v_BALV, g, state_BAKV):
    """(y_BALV, state_BAKV) for a whole number of chunks; g is [B, A, 1, L] or [B, A, L, K]."""
    return _forward(chunk, q_BALK, k_BALK, v_BALV, g, state_BAKV, save=False)[:2]


def _attend_forward(chunk, *inputs):
    y_BALV, state_BAKV, before_BASKV = _forward(chunk, *inputs, save=True)
    return (y_BALV, state_BAKV), (*inputs[:-1], before_BASKV)


def _attend_backward(chunk, residuals, cotangents):
    return _backward(chunk, *residuals, *cotangents)


attend.defvjp(_attend_forward, _attend_backward)


# Launches


def _forward(chunk, q_BALK, k_BALK, v_BALV, g, state_BAKV, *, save):
    (B, A, L, K), V = q_BALK.shape, v_BALV.shape[3]
    S = L // chunk
    by_channel = g.shape[2] == L
    token = token_specs(chunk, lambda n: n)
    outputs = [
        (jax.ShapeDtypeStruct(v_BALV.shape, v_BALV.dtype), token(V)),
        (jax.ShapeDtypeStruct(state_BAKV.shape, jnp.float32), state_spec(K, V)),
    ]
    if save:
        before = jax.ShapeDtypeStruct((B, A, S, K, V), q_BALK.dtype)
        outputs.append((before, _saved_spec(K, V, lambda n: n)))
    shapes, specs = zip(*outputs)
    inputs = (q_BALK, k_BALK, v_BALV, g, state_BAKV)
    return pl.pallas_call(
        functools.partial(_forward_kernel, by_channel),
        shapes,
        grid=(B, A, S),
        in_specs=[
            token(K),
            token(K),
            token(V),
            token(K if by_channel else None),
            state_spec(K, V),
        ],
        out_specs=specs,
        scratch_shapes=[pltpu.VMEM((K, V), jnp.float32)],
        compiler_params=IN_ORDER,
        cost_estimate=cost(chunk, K, V, inputs, shapes, by_channel=by_channel),
        name="linear_attention_forward",
    )(*inputs)


def _backward(chunk, q_BALK, k_BALK, v_BALV, g, before_BASKV, dy_BALV, dstate_BAKV):
    (B, A, L, K), V = q_BALK.shape, v_BALV.shape[3]
    S = L // chunk
    by_channel = g.shape[2] == L
    token = token_specs(chunk, lambda n: S - 1 - n)
    decay = token(K if by_channel else None)
    inputs = (q_BALK, k_BALK, v_BALV, g, before_BASKV, dy_BALV, dstate_BAKV)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BALK, k_BALK, v_BALV, g, dstate_BAKV)
    ]
    saved = _saved_spec(K, V, lambda n: S - 1 - n)
    return pl.pallas_call(
        functools.partial(_backward_kernel, by_channel),
        shapes,
        grid=(B, A, S),
        in_specs=[token(K), token(K), token(V), decay, saved, token(V), state_spec(K, V)],
        out_specs=[token(K), token(K), token(V), decay, state_spec(K, V)],
        scratch_shapes=[pltpu.VMEM((K, V), jnp.float32)],
        compiler_params=IN_ORDER,
        cost_estimate=cost(chunk, K, V, inputs, shapes, by_channel=by_channel, backward=True),
        name="linear_attention_backward",
    )(*inputs)


def _saved_spec(K, V, order):
    return pl.BlockSpec((None, None, None, K, V), lambda b, a, n: (b, a, order(n), 0, 0))


def cost(chunk, K, V, inputs, outputs, *, by_channel, backward=False):
    """What a kernel computes, with whole [G, G] tiles, and the bytes that it moves."""
    tokens = math.prod(inputs[0].shape[:3])
    levels = chunk.bit_length() - 1 if by_channel else 1
    if backward:
        products = 2 * chunk * (3 * K * levels + 2 * V) + 8 * K * V
        products += 2 * chunk * K * by_channel  # the sum of the gradients of the decays
    else:
        products = 2 * chunk * (K * levels + V) + 4 * K * V
    return pl.CostEstimate(
        flops=tokens * products,
        transcendentals=tokens * (2 * K * (levels + 1) if by_channel else chunk),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs)),
    )


# Kernels: one chunk of one head, with the state or its cotangent in scratch memory


def _forward_kernel(by_channel, q_ref, k_ref, v_ref, g_ref, first_ref, y_ref, last_ref, *rest):
    *saved, state_ref = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = first_ref[...]

    q, k, v, state_KV = q_ref[...], k_ref[...], v_ref[...], state_ref[...]
    for before_ref in saved:
        before_ref[...] = state_KV.astype(before_ref.dtype)
    parts, read, write, keep = (_decays_per_channel if by_channel else _decays_per_head)(g_ref[...])
    p_GH = sum(factor * dot(times(q, r), times(k, w), "GK,HK->GH") for factor, r, w in parts)
    y_GV = inner(q, k) * v + dot(p_GH.astype(v.dtype), v, "GH,HV->GV")
    y_GV += dot(times(q, read), state_KV.astype(q.dtype), "GK,KV->GV")
    y_ref[...] = y_GV.astype(y_ref.dtype)
    state_ref[...] = keep * state_KV + dot(times(k, write), v, "GK,GV->KV")

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = state_ref[...]


def _backward_kernel(by_channel, *refs):
    q_ref, k_ref, v_ref, g_ref, before_ref, dy_ref, dlast_ref, *outputs = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dfirst_ref, dstate_ref = outputs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dlast_ref[...]

    q, k, v, dy, before_KV = q_ref[...], k_ref[...], v_ref[...], dy_ref[...], before_ref[...]
    dstate_KV = dstate_ref[...]
    parts, read, write, keep = (_decays_per_channel if by_channel else _decays_per_head)(g_ref[...])

    # Between different tokens of the chunk. No decay acts from a token to itself; see the end.
    scores_GH = dot(dy, v, "GV,HV->GH")
    p_GH, dq, dk = 0.0, 0.0, 0.0
    for factor, r, w in parts:
        q_read, k_write = times(q, r), times(k, w)
        p_GH += factor * dot(q_read, k_write, "GK,HK->GH")
        dp_GH = (factor * scores_GH).astype(q.dtype)
        dq += r * dot(dp_GH, k_write, "GH,HK->GK")
        dk += w * dot(dp_GH, q_read, "GH,GK->HK")
    dv = dot(p_GH.astype(v.dtype), dy, "GH,GV->HV")
    # Between the chunk and the states before and after it.
    dq += read * dot(dy, before_KV, "GV,KV->GK")
    dk_state = write * dot(v, dstate_KV.astype(v.dtype), "GV,KV->GK")
    dv += dot(times(k, write), dstate_KV.astype(k.dtype), "GK,KV->GV")

    # The gradient of b, the sum of log decays up to a token: plus q dq of the token, minus k dk. At
    # the last token, plus what the state after the chunk receives, except from the token's own key.
    token_G1 = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], 1), 0)
    not_last = token_G1 < q.shape[0] - 1
    taken = jnp.where(not_last, k * dk_state, 0)
    db = q * dq - k * dk - taken
    carried = keep * (dstate_KV * before_KV)
    if by_channel:
        at_last = jnp.sum(carried, axis=1, keepdims=True).T + jnp.sum(taken, axis=0, keepdims=True)
    else:
        db, at_last = jnp.sum(db, axis=1, keepdims=True), jnp.sum(carried) + jnp.sum(taken)
    db += jnp.where(not_last, 0, at_last)
    since = iota(q.shape[0], 0) >= iota(q.shape[0], 1)
    if by_channel:
        dg_ref[...] = dot(since.astype(jnp.float32), db, "GH,GK->HK")
    else:
        dg_ref[...] = jnp.sum(jnp.where(since, db, 0), axis=0, keepdims=True)

    own_dy_v, own_q_k = inner(dy, v), inner(q, k)
    dq_ref[...] = (dq + own_dy_v * k).astype(dq_ref.dtype)
    dk_ref[...] = (dk + dk_state + own_dy_v * q).astype(dk_ref.dtype)
    dv_ref[...] = (dv + own_q_k * dy).astype(dv_ref.dtype)
    dstate_ref[...] = keep * dstate_KV + dot(times(q, read), dy, "GK,GV->KV")

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dfirst_ref[...] = dstate_ref[...]


# The decays of a chunk: (parts, read, write, keep). The score of query i and an earlier key j is
# the sum over the parts (factor_GH, r, w) of factor_ij (q_i r_i) (k_j w_j). `read` is the decay
# from the state before the chunk to a query, `write` from a key to the state after the chunk,
# `keep` from state to state. No exponent is positive.


def _decays_per_head(g_1G):
    factor_GH, read, write, keep = decays(g_1G)
    return [(factor_GH, 1.0, 1.0)], read, write, keep


def _decays_per_channel(g_GK):
    """As `chunked._within_per_channel`: blocks are joined in pairs, each level of pairs a part."""
    G = g_GK.shape[0]
    i, j = iota(G, 0), iota(G, 1)
    token_G1 = jax.lax.broadcasted_iota(jnp.int32, (G, 1), 0)
    since, until = g_GK, jnp.zeros_like(g_GK)
    parts, level = [], 0
    while (size := 1 << level) < G:
        # Pairs of tokens whose highest different bit is that of this level.
        pair_GH = (j < i) & (jax.lax.shift_right_logical(i ^ j, level) == 1)
        parts.append((pair_GH.astype(jnp.float32), jnp.exp(since), jnp.exp(until)))
        right_G1, total = (token_G1 & size) != 0, since + until
        since += jnp.where(right_G1, pltpu.roll(total, size, 0), 0)
        until += jnp.where(right_G1, 0, pltpu.roll(total, G - size, 0))
        level += 1
    return parts, jnp.exp(since), jnp.exp(until), jnp.exp(since[G - 1 :]).T
