"""The gated delta rule in Pallas for TPU: one pass over the chunks, the state in VMEM.

As `chunked` (Yang et al. 2025, section 3.3), but a chunk subtracts what its keys read from the
state before it solves the triangular system, so that the inverse is applied once. The backward pass
is that of `chunked`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxvid.kernels.chunks import LONGEST
from jaxvid.kernels.gated_delta import chunked
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

CHUNK = 128  # the inverse of a larger chunk would dominate the cost
# For the backward pass. XLA for TPU compiles products in full float32 slowly, so a loop has fewer.
INVERT = functools.partial(chunked.inverse, rolled=True)


def gated_delta(q_BLAK, k_BLAK, v_BLAV, beta_BLA, log_decay, *, scale, state_BAKV, chunk):
    """As `reference.gated_delta`; log_decay is -128 or more."""
    L = q_BLAK.shape[1]
    chunk = LANES * pl.cdiv(min(chunk or CHUNK, LONGEST, L), LANES)
    g_BLA = jnp.zeros(beta_BLA.shape) if log_decay is None else log_decay
    beta_BLA = beta_BLA.astype(jnp.float32)
    return _attend(chunk, q_BLAK * scale, k_BLAK, v_BLAV, beta_BLA, g_BLA, state_BAKV)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(chunk, *inputs):
    return _forward(chunk, *inputs)


def _attend_forward(chunk, *inputs):
    return _forward(chunk, *inputs), inputs


def _attend_backward(chunk, inputs, cotangents):
    del chunk

    def attend(*inputs, state_BAKV):
        return chunked.gated_delta(
            *inputs, scale=1.0, state_BAKV=state_BAKV, chunk=None, invert=INVERT
        )

    _, pull = jax.vjp(lambda *inputs: attend(*inputs[:-1], state_BAKV=inputs[-1]), *inputs)
    return pull(cotangents)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(chunk, q_BLAK, k_BLAK, v_BLAV, beta_BLA, g_BLA, state_BAKV):
    (B, L, A, K), V = q_BLAK.shape, v_BLAV.shape[3]
    q, k, v = (arrange(x, chunk) for x in (q_BLAK, k_BLAK, v_BLAV))
    beta, g = (arrange(x, chunk)[:, :, None] for x in (beta_BLA, g_BLA))
    token, state = token_specs(chunk, lambda n: n), state_spec(K, V)
    inputs = (q, k, v, beta, g, state_BAKV)
    shapes = (
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct(state_BAKV.shape, jnp.float32),
    )
    y_BALV, state_BAKV = pl.pallas_call(
        _kernel,
        shapes,
        grid=(B, A, q.shape[2] // chunk),
        in_specs=[token(K), token(K), token(V), token(None), token(None), state],
        out_specs=(token(V), state),
        scratch_shapes=[pltpu.VMEM((K, V), jnp.float32)],
        compiler_params=IN_ORDER,
        cost_estimate=cost(chunk, K, V, inputs, shapes),
        name="gated_delta_forward",
    )(*inputs)
    return y_BALV[:, :, :L].swapaxes(1, 2), state_BAKV


def cost(chunk, K, V, inputs, outputs):
    """What the kernel computes, with whole [G, G] tiles, and the bytes that it moves."""
    batch, heads, length, _ = inputs[0].shape
    levels = (chunk - 1).bit_length()
    inverse = 2 * (levels - 1) * chunk**2
    products = 2 * chunk * (K + V) + 3 * K * V + inverse
    return pl.CostEstimate(
        flops=2 * batch * heads * length * products,
        transcendentals=batch * heads * length * chunk,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs)),
    )


def _kernel(q_ref, k_ref, v_ref, beta_ref, g_ref, first_ref, y_ref, last_ref, state_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = first_ref[...]

    q, k, v, state_KV = q_ref[...], k_ref[...], v_ref[...], state_ref[...]
    G = q.shape[0]
    factor_GH, read_G1, write_G1, keep = decays(g_ref[...])
    beta_G1 = jnp.sum(jnp.where(iota(G, 0) == iota(G, 1), beta_ref[...], 0), axis=1, keepdims=True)
    lower_GH = beta_G1 * factor_GH * dot(k, k, "GK,HK->GH")
    inverse_GH = chunked.inverse(lower_GH)  # stays float32, see `chunked`
    before_KV = state_KV.astype(k.dtype)
    taken_GV = read_G1 * dot(k, before_KV, "GK,KV->GV")
    wanted_GV = beta_G1 * (v - taken_GV)
    new_GV = dot(inverse_GH, wanted_GV, "GH,HV->GV").astype(v.dtype)
    p_GH = (factor_GH * dot(q, k, "GK,HK->GH")).astype(v.dtype)
    y_GV = inner(q, k) * new_GV + dot(p_GH, new_GV, "GH,HV->GV")
    y_GV += read_G1 * dot(q, before_KV, "GK,KV->GV")
    y_ref[...] = y_GV.astype(y_ref.dtype)
    state_ref[...] = keep * state_KV + dot(times(k, write_G1), new_GV, "GK,GV->KV")

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = state_ref[...]
