"""The gated delta rule in plain XLA, a chunk at a time (Yang et al. 2025, section 3.3).

The writes of a chunk depend on each other, because each subtracts what its key reads from earlier
writes. They solve a triangular system. Its inverse does not depend on the state, so only the
part of the writes that comes from the state before the chunk is sequential.
"""

import functools

import jax
import jax.numpy as jnp

from jaxvid.kernels.chunks import LONGEST, decays, einsum, join, split

CHUNK = 64
exact = functools.partial(einsum, precision="highest")
WHOLE = 16  # tokens of the largest matrix that `by_halves` does not split


def gated_delta(
    q_BLAK, k_BLAK, v_BLAV, beta_BLA, log_decay, *, scale, state_BAKV, chunk, invert=None
):
    """As `reference.gated_delta`; log_decay is -128 or more. invert: `by_halves` unless given."""
    L = q_BLAK.shape[1]
    G = min(chunk or CHUNK, LONGEST, L)
    q, k, v, beta = (split(x, G) for x in (q_BLAK * scale, k_BLAK, v_BLAV, beta_BLA))
    g = jnp.zeros((1, 1, 1, G)) if log_decay is None else split(log_decay, G)
    p_SBAGH, read, write, keep, own_SBAGV, taken_SBAGK = _within(
        invert or by_halves, q, k, v, beta, g
    )

    def step(state_BAKV, chunk):
        own_BAGV, taken_BAGK, write_BAGK, keep_BA1 = chunk
        taken_BAGV = einsum("BAGK,BAKV->BAGV", taken_BAGK, state_BAKV.astype(taken_BAGK.dtype))
        new_BAGV = (own_BAGV - taken_BAGV).astype(own_BAGV.dtype)
        written_BAKV = einsum("BAGK,BAGV->BAKV", write_BAGK, new_BAGV)
        return keep_BA1[..., None] * state_BAKV + written_BAKV, (state_BAKV, new_BAGV)

    keep = jnp.broadcast_to(keep, (*q.shape[:3], 1))
    state_BAKV, (before_SBAKV, new_SBAGV) = jax.lax.scan(
        step, state_BAKV, (own_SBAGV, taken_SBAGK, write, keep)
    )
    y_SBAGV = einsum("SBAGH,SBAHV->SBAGV", p_SBAGH, new_SBAGV)
    y_SBAGV += einsum("SBAGK,SBAKV->SBAGV", read, before_SBAKV.astype(q.dtype))
    return join(y_SBAGV, L).astype(v_BLAV.dtype), state_BAKV


@functools.partial(jax.checkpoint, static_argnums=(0,))
def _within(invert, q, k, v, beta_SBAG, g_SBAG):
    """The work that does not depend on the state S before a chunk, which writes own - taken S."""
    factor_GH, read, write, keep = decays(g_SBAG)
    beta = beta_SBAG.astype(jnp.float32)[..., None]
    G = q.shape[3]
    earlier_GH = jnp.tri(G, k=-1)
    overlap_SBAGH = einsum("SBAGK,SBAHK->SBAGH", k, k)
    lower_SBAGH = beta * overlap_SBAGH * factor_GH * earlier_GH
    # Float32 up to here. With similar keys and beta above 1 the entries of the inverse alternate in
    # sign and hardly shrink. Rounded to bfloat16, a chunk would enlarge the state.
    inverse_SBAGH = inverted(invert, lower_SBAGH)
    own_SBAGV = exact("SBAGH,SBAHV->SBAGV", inverse_SBAGH, beta * v)
    taken_SBAGK = exact("SBAGH,SBAHK->SBAGK", inverse_SBAGH, beta * read[..., None] * k)
    p_SBAGH = einsum("SBAGK,SBAHK->SBAGH", q, k) * factor_GH
    return (
        p_SBAGH.astype(v.dtype),
        q * read[..., None].astype(q.dtype),
        k * write[..., None].astype(k.dtype),
        keep,
        own_SBAGV.astype(v.dtype),
        taken_SBAGK.astype(k.dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def inverted(invert, lower_GG):
    """invert(lower_GG) with the gradient of an inverse, d(A^-1) = -A^-1 dA A^-1."""
    return invert(lower_GG)


def _inverted_forward(invert, lower_GG):
    inverse_GG = invert(lower_GG)
    return inverse_GG, inverse_GG


def _inverted_backward(invert, inverse_GG, cotangent_GG):
    del invert
    transposed_GG = inverse_GG.mT
    product_GG = jnp.matmul(transposed_GG, cotangent_GG, precision="highest")
    return (-jnp.tril(jnp.matmul(product_GG, transposed_GG, precision="highest"), -1),)


inverted.defvjp(_inverted_forward, _inverted_backward)


def by_halves(lower_GG):
    """As `inverse`, faster for many large matrices: the corners are inverted first and then joined.

    `inverse` multiplies whole matrices that are mostly zero, which suits a kernel on one matrix.
    Halving down to WHOLE tokens takes a tenth of that work.
    """
    G = lower_GG.shape[-1]
    if G <= WHOLE:
        return inverse(lower_GG)
    half, odd = -(-G // 2), G % 2
    lower_GG = jnp.pad(lower_GG, [(0, 0)] * (lower_GG.ndim - 2) + [(0, odd)] * 2)
    corners = (lower_GG[..., :half, :half], lower_GG[..., half:, half:])
    first, last = jnp.moveaxis(by_halves(jnp.stack(corners, axis=-3)), -3, 0)
    between = jnp.matmul(last, lower_GG[..., half:, :half], precision="highest")
    between = jnp.matmul(between, first, precision="highest")
    rows = ((first, jnp.zeros_like(first)), (-between, last))
    return jnp.concatenate([jnp.concatenate(row, -1) for row in rows], -2)[..., :G, :G]


def inverse(lower_GG, *, rolled=False):
    """(1 + lower)^-1 of strictly lower triangular matrices, in full float32.

    Blocks of 1, 2, 4 .. tokens are joined in pairs: ((a, 0), (c, b))^-1 = ((a', 0), (-b' c a', b'))
    with a' and b' the inverses of a and b. Powers of `lower` are avoided: if keys are similar, as
    in a still video, powers are far larger than the inverse, which is their sum. rolled: use a
    loop, for a smaller program.
    """
    G = lower_GG.shape[-1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (G, G), axis) for axis in (0, 1))

    def between(level):
        """The entries between the two blocks of each pair of a level."""
        # Pairs of tokens whose highest different bit is that of this level.
        pair_GG = jax.lax.shift_right_logical(i ^ j, level) == 1
        return jnp.where(pair_GG, lower_GG, 0)

    def join(level, inverse_GG):
        between_GG = jnp.matmul(inverse_GG, between(level), precision="highest")
        return inverse_GG - jnp.matmul(between_GG, inverse_GG, precision="highest")

    levels = (G - 1).bit_length()
    inverse_GG = jnp.where(i == j, 1, -between(0))  # blocks of one token are their own inverse
    if rolled:
        return jax.lax.fori_loop(1, levels, join, inverse_GG)
    for level in range(1, levels):
        inverse_GG = join(level, inverse_GG)
    return inverse_GG
