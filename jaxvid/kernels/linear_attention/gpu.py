"""Linear attention in Pallas for NVIDIA GPUs, lowered by Triton: one kernel for all four results.

A program walks along the tokens of one head with some columns of its state in registers, and writes
its part of y. Nothing else goes through memory. The gradients are linear attentions too:

    y  of (q, k, v)  with the state S          dk of (v, dy, q)  with dS^T, in reverse time
    dq of (dy, v, k)  with S^T                 dv of (k, q, dy)  with dS, in reverse time

(Yang & Zhang 2024, Flash Linear Attention, and Dao & Gu 2024, Mamba-2, section 6, split the same
products into a kernel of states and a kernel of tokens.) The programs of a GPU's grid run in
parallel and in any order. Where rows and heads are too few to fill the GPU, the tokens are cut into
segments: a kernel of states alone finds what each segment adds to the state, and a short sum over
the segments the states between them.

Products have operands in the dtype of the inputs and add up in float32. Pallas lowers to Triton in
jax 0.10 to 0.12, but warns when it compiles that this support will end; without it, "auto" selects
`chunked`.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvid.kernels.chunks import GRAIN
from jaxvid.kernels.pallas_gpu import check, dot, triton

CHUNK = BLOCK = 64  # tokens that a program computes at once
NARROWEST = 16  # width of an operand of a product
WIDEST = 256  # width of a key or value, by the registers of a program
DTYPES = ("bfloat16",)  # XLA multiplies float32 on tensor cores, Triton does not
COARSE, FINE, SINCE, UNTIL = range(4)  # rows of `decays`
NEAR, FAR = range(2)  # rows of the sums of `_walk`

PROCESSORS = 132  # of the GPU
SEGMENTS = (1, 2, 4, 8)
SHORTEST = 512  # tokens of a segment


class Tile(NamedTuple):
    """The columns of the state that a program holds, its warps and its stages of loads.

    programs: those of a processor, up to which more segments are faster.
    """

    columns: int
    warps: int
    stages: int
    programs: int


# By rows of the state, the fastest of those that `bench kernels --tune` times.
TILES = {
    16: Tile(64, 4, 3, 6),
    32: Tile(64, 4, 3, 6),
    64: Tile(64, 4, 3, 6),
    128: Tile(64, 4, 2, 2),
    256: Tile(32, 4, 2, 2),
}


def linear_attention(q_BLAK, k_BLAK, v_BLAV, log_decay, *, scale, state_BAKV, chunk):
    """As `reference.linear_attention`; log_decay is -128 or more.

    Raises NotImplementedError for a decay per channel, for other types than bfloat16, for keys or
    values wider than WIDEST, and for GPUs before Ampere.
    """
    B, L, A, K = q_BLAK.shape
    V = v_BLAV.shape[3]
    del chunk  # the blocks are as long as the registers allow
    if log_decay is not None and log_decay.ndim == 4:
        raise NotImplementedError("a decay per channel has no GPU kernel")
    check((q_BLAK, k_BLAK, v_BLAV), DTYPES, WIDEST)
    g_BLA = jnp.zeros((B, L, A)) if log_decay is None else log_decay
    segments = segments_of(B * A, L, padded(K), padded(V))

    def fill(x_BLA, width=None):
        """[B, L, A, ...] padded with zeros to whole segments, and the width to a power of two."""
        widths = [(0, 0)] * (x_BLA.ndim - 2)
        if width is not None:
            widths[-1] = (0, padded(width) - width)
        return jnp.pad(x_BLA, [(0, 0), (0, -L % (segments * BLOCK)), *widths])

    q_BLAK = (q_BLAK * scale).astype(q_BLAK.dtype)
    q, k, v, g = fill(q_BLAK, K), fill(k_BLAK, K), fill(v_BLAV, V), fill(g_BLA)
    widths = [(0, 0), (0, 0), (0, padded(K) - K), (0, padded(V) - V)]
    y_BLAV, state_BAKV = attend(segments, q, k, v, g, jnp.pad(state_BAKV, widths))
    return y_BLAV[:, :L, :, :V], state_BAKV[:, :, :K, :V]


def padded(width):
    """The least width of at least `width` that Triton can multiply by."""
    return max(NARROWEST, pl.next_power_of_2(width))


def tile(rows, columns):
    """The tile of a state of so many rows and columns."""
    best = TILES[rows]
    return best._replace(columns=min(columns, best.columns))


def segments_of(heads, L, K, V):
    """The number of segments of L tokens that fills the GPU. heads: of all rows together."""
    columns, _, _, programs = tile(K, V)
    fit = programs * PROCESSORS // (heads * (V // columns))
    return max(n for n in SEGMENTS if n == 1 or (n <= fit and n * SHORTEST <= L))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(segments, q_BLAK, k_BLAK, v_BLAV, g_BLA, state_BAKV):
    """(y_BLAV, state_BAKV) for whole segments of whole blocks and `padded` widths."""
    return _attend_forward(segments, q_BLAK, k_BLAK, v_BLAV, g_BLA, state_BAKV)[0]


def _attend_forward(segments, q_BLAK, k_BLAK, v_BLAV, g_BLA, state_BAKV):
    decays_BARL = decays(g_BLA)
    starts_BASKV = _starts(segments, k_BLAK, v_BLAV, decays_BARL, state_BAKV)
    y_BLAV, last_BASKV = _walk(q_BLAK, k_BLAK, v_BLAV, decays_BARL, starts_BASKV)
    return (y_BLAV, last_BASKV[:, :, -1]), (q_BLAK, k_BLAK, v_BLAV, decays_BARL, starts_BASKV)


def _attend_backward(segments, residuals, cotangents):
    q, k, v, decays_BARL, starts = residuals
    dy, dlast_BAKV = cotangents
    stops = _starts(segments, q, dy, decays_BARL, dlast_BAKV, reverse=True)
    dq, _, read = _walk(dy, v, k, decays_BARL, starts.swapaxes(3, 4), times=q)
    dk, _, sent = _walk(v, dy, q, decays_BARL, stops.swapaxes(3, 4), times=k, reverse=True)
    dv, dfirst = _walk(k, q, dy, decays_BARL, stops, reverse=True)
    dg_BASL = _gradient_of_decays(read, sent, starts, stops, dfirst[:, :, 0])
    dg_BLA = dg_BASL.reshape(*dg_BASL.shape[:2], -1).swapaxes(1, 2)
    return dq, dk, dv, dg_BLA, dfirst[:, :, 0]


attend.defvjp(_attend_forward, _attend_backward)


def _gradient_of_decays(read_BARL, sent_BARL, starts_BASKV, stops_BASKV, dfirst_BAKV):
    """The gradient of log decays, [B, A, S, L of a segment].

    A decay multiplies all that passes its token, from an earlier key to a later query. Within the
    block: what queries from the token on read (NEAR), less what keys from there on send them. From
    the state before the block: what these queries read (FAR), and what no query of the block reads.
    To the state after the block: what earlier keys of the block send (FAR). No term is large where
    decays leave little, so that differences are exact there.
    """
    B, A, S = starts_BASKV.shape[:3]

    def by_block(x_BARL):
        return x_BARL.reshape(B, A, 2, S, -1, BLOCK).swapaxes(0, 2)

    (near_read, far_read), (near_sent, far_sent) = (
        (x.swapaxes(0, 1) for x in by_block(sums)) for sums in (read_BARL, sent_BARL)
    )
    # What passes from one segment, and then from one block, to the next.
    later = [jnp.concatenate([dfirst_BAKV[:, :, None], stops_BASKV[:, :, :-1]], axis=2)]
    first_BAS1 = jnp.einsum("BASKV,BASKV->BAS", starts_BASKV, *later)[..., None]
    change_BASN = far_sent.sum(axis=4) - far_read.sum(axis=4)
    before_BASN = first_BAS1 + jnp.cumsum(change_BASN, axis=3) - change_BASN
    kept_BASN1 = (before_BASN - far_read.sum(axis=4))[..., None]
    to_queries = jnp.flip(jnp.cumsum(jnp.flip(near_read - near_sent + far_read, 4), axis=4), 4)
    from_keys = jnp.cumsum(far_sent, axis=4) - far_sent
    return (to_queries + kept_BASN1 + from_keys).reshape(B, A, S, -1)


def decays(g_BLA):
    """[B, A, R, L] float32: decays from the start of a block of BLOCK tokens to each token, and on.

    Rows COARSE and FINE are sums of g from the start of the block to the token: multiples of GRAIN,
    which add up exactly, and the rest, which is small (as in `chunks.decays`). SINCE is the decay
    from the state before the block to the token, exp(COARSE + FINE), and UNTIL the decay from the
    token to the end of the block. The last entry of SINCE is the decay over the block.
    """
    g_BANG = g_BLA.swapaxes(1, 2).reshape(g_BLA.shape[0], g_BLA.shape[2], -1, BLOCK)
    coarse = jnp.round(g_BANG / GRAIN) * GRAIN
    coarse, fine = jnp.cumsum(coarse, axis=3), jnp.cumsum(g_BANG - coarse, axis=3)
    to_last = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    rows = jnp.stack([coarse, fine, jnp.exp(coarse + fine), jnp.exp(to_last)], axis=2)
    return rows.reshape(*rows.shape[:3], -1)


# Launches. Arrays keep their layout [B, L, A, K]. All programs stand on the first axis of the grid,
# the only one that CUDA lets grow beyond 65,535. Tiles of the same tokens are neighbours there, so
# that one finds in cache what the other has read.


def _starts(segments, k_BLAK, v_BLAV, decays_BARL, first_BAKV, *, reverse=False):
    """The state before every segment, float32 [B, A, S, K, V]; in reverse, after every segment."""
    if segments == 1:
        return first_BAKV[:, :, None]
    B, _, A, _ = k_BLAK.shape
    added_BASKV = _add(segments, k_BLAK, v_BLAV, decays_BARL, reverse=reverse)
    kept = decays_BARL[:, :, SINCE].reshape(B, A, segments, -1, BLOCK)[..., -1].prod(axis=3)
    order = range(segments - 1, -1, -1) if reverse else range(segments)
    states = {order[0]: first_BAKV}
    for segment, later in itertools.pairwise(order):
        keep = kept[:, :, segment, None, None]
        states[later] = keep * states[segment] + added_BASKV[:, :, segment]
    return jnp.stack([states[segment] for segment in range(segments)], axis=2)


def _add(segments, k_BLAK, v_BLAV, decays_BARL, *, reverse):
    """What every segment adds to the state, float32 [B, A, S, K, V]."""
    (B, L, A, K), V = k_BLAK.shape, v_BLAV.shape[3]
    launch = _launch(segments, B, L, A, K, V)
    inputs = (k_BLAK, v_BLAV, decays_BARL)
    shape = jax.ShapeDtypeStruct((B, A, segments, K, V), jnp.float32)
    return pl.pallas_call(
        functools.partial(_add_kernel, reverse),
        shape,
        grid=launch.grid,
        in_specs=[launch.tokens, launch.columns, launch.decays],
        out_specs=launch.state,
        cost_estimate=_cost(B * A * L, K * V, 0, inputs, [shape]),
        compiler_params=launch.params,
        name="linear_attention_add",
    )(*inputs)


def _walk(q_BLAK, k_BLAK, v_BLAV, decays_BARL, first_BASKV, *, times=None, reverse=False):
    """(y_BLAV, the states after all segments), of every segment,

        S_t = exp(g_t) S_{t-1} + k_t^T v_t,    y_t = q_t S_t

    from first_BASKV. In reverse, from and to the other ends of the segments,

        S_{t-1} = exp(g_t) (S_t + k_t^T v_t),    y_t = q_t (S_t + k_t^T v_t)

    times: x_BLAV, for a third result, sums over V of x_t times two parts of y_t, float32
    [B, A, R, L]: NEAR, what other tokens of its block add, and FAR, what the state before the block
    does.
    """
    (B, L, A, K), V = q_BLAK.shape, v_BLAV.shape[3]
    launch = _launch(first_BASKV.shape[2], B, L, A, K, V)
    inputs = [q_BLAK, k_BLAK, v_BLAV, decays_BARL, first_BASKV]
    in_specs = [launch.tokens, launch.tokens, launch.columns, launch.decays, launch.state]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (v_BLAV, first_BASKV)]
    out_specs = [launch.columns, launch.state]
    if times is not None:
        inputs.append(times)
        in_specs.append(launch.columns)
        outputs.append(jax.ShapeDtypeStruct((B, A, launch.tiles, 2, L), jnp.float32))
        out_specs.append(launch.sums)
    tiles = launch.tiles
    products = BLOCK * (tiles * K + V) + 2 * K * V
    y_BLAV, last_BASKV, *sums = pl.pallas_call(
        functools.partial(_walk_kernel, reverse, times is not None),
        outputs,
        grid=launch.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        cost_estimate=_cost(B * A * L, products, BLOCK * tiles, inputs, outputs),
        compiler_params=launch.params,
        name="linear_attention_walk",
    )(*inputs)
    return y_BLAV, last_BASKV, *(x.sum(axis=2) for x in sums)


class _Launch(NamedTuple):
    """A grid of (row, head, segment, tile), flattened, and the blocks of its programs."""

    grid: tuple
    tiles: int
    tokens: pl.BlockSpec
    columns: pl.BlockSpec
    decays: pl.BlockSpec
    state: pl.BlockSpec
    sums: pl.BlockSpec
    params: object


def _launch(segments, B, L, A, K, V):
    width, warps, stages, _ = tile(K, V)
    tiles, T = V // width, L // segments

    def spec(shape, *places):
        """A block whose place is picked from row b, head a, segment s, tile j and zero."""

        def place(program):
            program, j = jax.lax.div(program, tiles), jax.lax.rem(program, tiles)
            program, s = jax.lax.div(program, segments), jax.lax.rem(program, segments)
            names = {"b": jax.lax.div(program, A), "a": jax.lax.rem(program, A), "s": s, "j": j}
            return tuple(names.get(name, 0) for name in places)

        return pl.BlockSpec(shape, place)

    return _Launch(
        grid=(B * A * segments * tiles,),
        tiles=tiles,
        tokens=spec((None, T, None, K), "b", "s", "a", 0),
        columns=spec((None, T, None, width), "b", "s", "a", "j"),
        decays=spec((None, None, 4, T), "b", "a", 0, "s"),
        state=spec((None, None, None, K, width), "b", "a", "s", 0, "j"),
        sums=spec((None, None, None, 2, T), "b", "a", "j", 0, "s"),
        params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    )


def _cost(tokens, products, exponentials, inputs, outputs):
    """What a kernel computes, and what it moves if only the first tile misses the cache.

    Products (multiply-adds) and exponentials are per token and head. A token meets the BLOCK tokens
    of its block, in the scores of every tile and once in y, and its state twice.
    """
    return pl.CostEstimate(
        flops=2 * tokens * products,
        transcendentals=tokens * exponentials,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs)),
    )


# Kernels


def _add_kernel(reverse, k_ref, v_ref, decays_ref, added_ref):
    blocks = k_ref.shape[0] // BLOCK
    write = SINCE if reverse else UNTIL

    def step(count, state_KV):
        start = BLOCK * (blocks - 1 - count if reverse else count)
        tokens = pl.ds(start, BLOCK)
        v_GV = _times(v_ref[tokens, :], decays_ref[write, tokens][:, None])
        keep = decays_ref[SINCE, start + BLOCK - 1]
        return keep * state_KV + dot(k_ref[tokens, :], v_GV, "GK,GV->KV")

    zero_KV = jnp.zeros(added_ref.shape, jnp.float32)
    added_ref[...] = jax.lax.fori_loop(0, blocks, step, zero_KV)


def _walk_kernel(reverse, has_times, q_ref, k_ref, v_ref, decays_ref, first_ref, *refs):
    times_ref = refs[0] if has_times else None
    y_ref, last_ref, *sums_refs = refs[has_times:]
    blocks = k_ref.shape[0] // BLOCK
    read, write = (UNTIL, SINCE) if reverse else (SINCE, UNTIL)
    row_GH, column_GH = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK,) * 2, n) for n in (0, 1))
    if reverse:
        row_GH, column_GH = column_GH, row_GH
    # A token's own term has no decay, so sums for the gradient of decays leave it out.
    seen_GH = row_GH > column_GH if has_times else row_GH >= column_GH

    def step(count, state_KV):
        start = BLOCK * (blocks - 1 - count if reverse else count)
        tokens = pl.ds(start, BLOCK)
        q_GK, k_GK, v_GV = q_ref[tokens, :], k_ref[tokens, :], v_ref[tokens, :]
        score_GH = dot(q_GK, k_GK, "GK,HK->GH")
        coarse_G, fine_G = decays_ref[COARSE, tokens], decays_ref[FINE, tokens]
        between_GH = (coarse_G[:, None] - coarse_G[None, :]) + (fine_G[:, None] - fine_G[None, :])
        between_GH = jnp.minimum(-between_GH if reverse else between_GH, 0)
        factor_GH = jnp.where(seen_GH, jnp.exp(between_GH), 0)
        p_GH = (score_GH * factor_GH).astype(v_GV.dtype)
        far_GV = dot(q_GK, state_KV.astype(q_GK.dtype), "GK,KV->GV")
        near_GV = dot(p_GH, v_GV, "GH,HV->GV")
        far_GV = decays_ref[read, tokens][:, None] * far_GV
        y_GV = near_GV + far_GV
        if has_times:
            x_GV = times_ref[tokens, :].astype(jnp.float32)
            for row, part_GV in ((NEAR, near_GV), (FAR, far_GV)):
                sums_refs[0][row, tokens] = jnp.sum(x_GV * part_GV, axis=1)
            own_G = jnp.sum(jnp.where(row_GH == column_GH, score_GH, 0), axis=1)
            y_GV += own_G[:, None] * v_GV
        y_ref[tokens, :] = y_GV.astype(y_ref.dtype)
        # The narrower operand takes the decay.
        added_KV = dot(k_GK, _times(v_GV, decays_ref[write, tokens][:, None]), "GK,GV->KV")
        return decays_ref[SINCE, start + BLOCK - 1] * state_KV + added_KV

    last_ref[...] = jax.lax.fori_loop(0, blocks, step, first_ref[...])


def _times(x_GK, factor_G1):
    """A vector of every token times its decay, in its own dtype."""
    return (x_GK * factor_G1).astype(x_GK.dtype)
