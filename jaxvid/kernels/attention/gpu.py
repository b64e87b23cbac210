"""Softmax attention in Pallas for NVIDIA GPUs, lowered by Triton, that skips masked blocks.

FlashAttention-2 (Dao 2023): a program holds a block of queries and walks along the keys, with the
peaks and sums of the softmax so far; two kernels recompute the probabilities for the gradients, one
by queries and one by keys. Scores never go through memory, and neither does a mask: the kernels
compare positions. A table lists the blocks of keys that each block of queries needs: first those
that it sees whole, which have no comparison, then those that it sees in part (as in FlexAttention,
Dong et al. 2024). Positions that are known while tracing give a constant table.

Widths of heads are split into powers of two, because Triton multiplies by nothing else: 72 channels
are 64 and 16, with 8 of them zero, and not 128.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxvid.kernels import dispatch
from jaxvid.kernels.dispatch import FLOPS, Flops
from jaxvid.kernels.pallas_gpu import check, dot, triton

DTYPES = ("bfloat16", "float16")
WIDEST = 128  # channels of a head, by the registers of a program
FEWEST = 2**14  # pairs of a query and a key, as many as a block has at most
NARROWEST = 16  # channels of an operand of a product
LOG2E = math.log2(math.e)
MASKED = -1e30  # instead of -inf, which would give NaN for a query without keys
NOTHING, SOME, ALL = range(3)  # the pairs of a block that the mask allows


class Tile(NamedTuple):
    """Queries and keys of a block, and the warps and stages of loads of a program."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of the forward pass, the gradient of the queries, and those of keys and values."""

    forward: Tile
    queries: Tile
    keys: Tile


SIDE = 128  # the longest side of a tile
# By the widest head that they suit, the fastest of those that `bench kernels --tune` times.
TILES = {
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    80: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
}


def _tile(width):
    return TILES[min(widest for widest in TILES if widest >= width)]


def attention(q_BLAK, k_BMAK, v_BMAK, *, q_position_L, k_position_M, allow, scale):
    """As `reference.attention`. Raises NotImplementedError if the kernel does not apply.

    It needs bfloat16 or float16, heads of at most WIDEST channels, FEWEST pairs, and a GPU since
    Ampere. On a mesh, batch and heads are split by the sharding table.
    """
    if dispatch.platform() != "gpu":
        raise NotImplementedError("the kernel needs an NVIDIA GPU")
    check((q_BLAK, k_BMAK, v_BMAK), DTYPES, WIDEST)
    if q_BLAK.shape[1] * k_BMAK.shape[1] < FEWEST:
        raise NotImplementedError(f"blocks are for {FEWEST} pairs of a query and a key or more")
    known = dispatch.are_known(q_position_L, k_position_M)
    pairs = Pairs(allow, k_BMAK.shape[1], *((q_position_L, k_position_M) if known else ()))

    def flash_attention(q, k, v, *positions):  # a call with a name, the key in FLOPS
        L, K = q.shape[1], q.shape[3]
        q, k, v = ((jnp.pad(x, _to_whole_blocks(x.shape))) for x in (q, k, v))
        positions = [jnp.pad(x, (0, -x.size % SIDE)) for x in positions]
        return _attend(pairs, scale, q, k, v, *positions)[:, :L, :, :K]

    positions = [jnp.asarray(x) for x in (q_position_L, k_position_M)]
    return dispatch.by_batch_and_head(jax.jit(flash_attention), positions, q_BLAK, k_BMAK, v_BMAK)


def _to_whole_blocks(shape_BLAK):
    return (0, 0), (0, -shape_BLAK[1] % SIDE), (0, 0), (0, -shape_BLAK[3] % NARROWEST)


FLOPS["flash_attention"] = Flops(
    all_pairs=lambda q_BLAK, k_BMAK, *_: 4 * q_BLAK.size * k_BMAK.shape[1]
)


class Pairs(NamedTuple):
    """The mask of queries and M keys, and their positions if they are known while tracing."""

    allow: Callable
    M: int
    q_position_L: np.ndarray | None = None
    k_position_M: np.ndarray | None = None

    def blocks(self, queries, keys, q_position_L, k_position_M):
        """What the mask allows in blocks of so many queries and keys: NOTHING, SOME or ALL.

        The positions are those of whole blocks, traced; only their padding matters if the positions
        are known. Keys of padding are not allowed.
        """
        if self.q_position_L is None:
            exists_M = np.arange(k_position_M.size) < self.M
            mask_LM = self.allow(q_position_L[:, None], k_position_M[None, :]) & exists_M
            mask = mask_LM.reshape(-1, queries, k_position_M.size // keys, keys)
            return mask.any(axis=(1, 3)).astype(jnp.int32) + mask.all(axis=(1, 3))
        # Tokens of a frame share a position, so one comparison serves them all.
        firsts = np.flatnonzero(np.diff(self.k_position_M, prepend=self.k_position_M[0] - 1))
        lengths = np.diff(firsts, append=self.M)
        rows = np.zeros((q_position_L.size // queries, k_position_M.size), np.int32)
        for row in range(-(-self.q_position_L.size // queries)):
            q_position = np.unique(self.q_position_L[row * queries : (row + 1) * queries])
            mask = self.allow(q_position[:, None], self.k_position_M[firsts][None, :])
            mask = np.broadcast_to(mask, (q_position.size, firsts.size))
            rows[row, : self.M] = (mask.any(axis=0).astype(np.int32) + mask.all(axis=0)).repeat(
                lengths
            )
        rows = rows.reshape(rows.shape[0], -1, keys)
        return rows.any(axis=2).astype(np.int32) + (rows == ALL).all(axis=2)


def _parts(width):
    """Slices of the channels of a head, each a power of two wide, that cover all of them."""
    sizes = [size for size in (128, 64, 32, 16) if size & width]
    return [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes))]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(pairs, scale, q_BLAK, k_BMAK, v_BMAK, q_position_L, k_position_M):
    """y_BLAK, for whole blocks."""
    return _forward(pairs, scale, q_BLAK, k_BMAK, v_BMAK, q_position_L, k_position_M)[0]


def _forward(pairs, scale, q_BLAK, k_BMAK, v_BMAK, q_position_L, k_position_M):
    B, L, A, K = q_BLAK.shape
    positions = q_position_L, k_position_M
    y_BLAK, log_sum_BAL = _launch(
        functools.partial(_forward_kernel, pairs, scale),
        pairs.blocks(*_tile(K).forward[:2], *positions),
        _tile(K).forward,
        own=(q_BLAK, q_position_L),
        others=(k_BMAK, v_BMAK, k_position_M),
        outputs=(q_BLAK, jax.ShapeDtypeStruct((B, A, L), jnp.float32)),
        products=2,
        name="attention",
    )
    return y_BLAK, (q_BLAK, k_BMAK, v_BMAK, *positions, y_BLAK, log_sum_BAL)


def _backward(pairs, scale, residuals, dy_BLAK):
    q_BLAK, k_BMAK, v_BMAK, *positions, y_BLAK, log_sum_BAL = residuals
    inner_BAL = jnp.einsum("BLAK,BLAK->BAL", dy_BLAK, y_BLAK, preferred_element_type=jnp.float32)
    tiles = _tile(q_BLAK.shape[3])
    of_queries = q_BLAK, dy_BLAK, log_sum_BAL, inner_BAL, positions[0]
    of_keys = k_BMAK, v_BMAK, positions[1]
    (dq_BLAK,) = _launch(
        functools.partial(_queries_kernel, pairs, scale),
        pairs.blocks(*tiles.queries[:2], *positions),
        tiles.queries,
        own=of_queries,
        others=of_keys,
        outputs=(q_BLAK,),
        products=3,
        name="attention_dq",
    )
    dk_BMAK, dv_BMAK = _launch(
        functools.partial(_keys_kernel, pairs, scale),
        pairs.blocks(*tiles.keys[:2], *positions).T,
        tiles.keys,
        own=of_keys,
        others=of_queries,
        outputs=(k_BMAK, v_BMAK),
        products=4,
        name="attention_dkv",
    )
    return dq_BLAK, dk_BMAK, dv_BMAK, None, None


_attend.defvjp(_forward, _backward)


def _launch(kernel, blocks, tile, *, own, others, outputs, products, name):
    """The outputs of a kernel with one program for every row of `blocks`, row and head.

    A program holds its block of the arrays `own`, and walks along the blocks of `others` that its
    row of `blocks` needs. Arrays are [B, L, A, K], [B, A, L] or [L]. products: of a matrix of
    scores, or as large.
    """
    xp = np if isinstance(blocks, np.ndarray) else jnp
    order = xp.argsort(-blocks, axis=1, stable=True).astype(np.int32)
    counts = xp.stack([(blocks == ALL).sum(axis=1), (blocks != NOTHING).sum(axis=1)], axis=1)
    B, _, A, K = own[0].shape
    rows, columns = blocks.shape

    def spec(x, size=None):
        """A program's block of `size` tokens, or all tokens."""

        def place(program):
            head, row = jax.lax.div(program, rows), jax.lax.rem(program, rows)
            b, a, n = jax.lax.div(head, A), jax.lax.rem(head, A), row if size else 0
            return {4: (b, n, a, 0), 3: (b, a, n), 1: (n,)}[x.ndim]

        tokens = size or x.shape[1 if x.ndim == 4 else -1]
        shape = {4: (None, tokens, None, K), 3: (None, None, tokens), 1: (tokens,)}[x.ndim]
        return pl.BlockSpec(shape, place)

    def of_row(width):
        return pl.BlockSpec((None, width), lambda program: (jax.lax.rem(program, rows), 0))

    size = own[-1].size // rows
    computed = blocks.size if xp is jnp else int((blocks != NOTHING).sum())
    pairs = B * A * computed * tile.queries * tile.keys
    tables = jnp.asarray(order), jnp.asarray(counts, jnp.int32)
    return pl.pallas_call(
        lambda *refs: kernel(
            refs[: len(own)], refs[len(own) : -2 - len(outputs)], *refs[-2 - len(outputs) :]
        ),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        grid=(B * A * rows,),
        in_specs=[
            *(spec(x, size) for x in own),
            *(spec(x) for x in others),
            of_row(columns),
            of_row(2),
        ],
        out_specs=[spec(x, size) for x in outputs],
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * K,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*own, *others, *outputs)),
        ),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name=name,
    )(*own, *others, *tables)


# Kernels


def _forward_kernel(pairs, scale, own, others, order_ref, counts_ref, y_ref, log_sum_ref):
    q_ref, q_position_ref = own
    k_ref, v_ref, k_position_ref = others
    parts, G, size = _parts(q_ref.shape[1]), q_ref.shape[0], _size(k_ref, order_ref)
    q_position_G = q_position_ref[...]
    qs = [q_ref[:, part] for part in parts]

    def step(whole, index, carry):
        peak_G, sum_G, *ys = carry
        start = size * order_ref[index]
        keys = pl.ds(start, size)
        score_GH = sum(dot(q, k_ref[keys, part], "GK,HK->GH") for q, part in zip(qs, parts))
        score_GH *= scale * LOG2E
        if not whole:
            mask_GH = pairs.allow(q_position_G[:, None], k_position_ref[keys][None, :])
            exists_H = start + jax.lax.iota(jnp.int32, size) < pairs.M
            score_GH = jnp.where(mask_GH & exists_H[None, :], score_GH, MASKED)
        peak_next_G = jnp.maximum(peak_G, score_GH.max(axis=1))
        p_GH = jnp.exp2(score_GH - peak_next_G[:, None])
        keep_G = jnp.exp2(peak_G - peak_next_G)
        sum_G = sum_G * keep_G + p_GH.sum(axis=1)
        p_GH = p_GH.astype(v_ref.dtype)
        ys = [
            y * keep_G[:, None] + dot(p_GH, v_ref[keys, part], "GH,HK->GK")
            for y, part in zip(ys, parts)
        ]
        return peak_next_G, sum_G, *ys

    ys = [jnp.zeros((G, part.stop - part.start), jnp.float32) for part in parts]
    start = jnp.full(G, MASKED, jnp.float32), jnp.zeros(G, jnp.float32), *ys
    peak_G, sum_G, *ys = _walk(step, counts_ref, start)
    seen_G = peak_G > MASKED / 2  # false for a query without keys
    share_G = jnp.where(seen_G, 1 / sum_G, 0)
    for y, part in zip(ys, parts):
        y_ref[:, part] = (y * share_G[:, None]).astype(y_ref.dtype)
    log_sum_ref[...] = jnp.where(seen_G, peak_G + jnp.log2(sum_G), 0)


def _queries_kernel(pairs, scale, own, others, order_ref, counts_ref, dq_ref):
    q_ref, dy_ref, log_sum_ref, inner_ref, q_position_ref = own
    k_ref, v_ref, k_position_ref = others
    parts, size = _parts(q_ref.shape[1]), _size(k_ref, order_ref)
    qs, dys = ([ref[:, part] for part in parts] for ref in (q_ref, dy_ref))
    log_sum_G1, inner_G1 = log_sum_ref[...][:, None], inner_ref[...][:, None]
    q_position_G = q_position_ref[...]

    def step(whole, index, dqs):
        start = size * order_ref[index]
        keys = pl.ds(start, size)
        ks = [k_ref[keys, part] for part in parts]
        score_GH = sum(dot(q, k, "GK,HK->GH") for q, k in zip(qs, ks)) * (scale * LOG2E)
        p_GH = jnp.exp2(score_GH - log_sum_G1)
        if not whole:
            mask_GH = pairs.allow(q_position_G[:, None], k_position_ref[keys][None, :])
            exists_H = start + jax.lax.iota(jnp.int32, size) < pairs.M
            p_GH = jnp.where(mask_GH & exists_H[None, :], p_GH, 0)
        dp_GH = sum(dot(dy, v_ref[keys, part], "GK,HK->GH") for dy, part in zip(dys, parts))
        ds_GH = (p_GH * (dp_GH - inner_G1)).astype(k_ref.dtype)
        return [dq + dot(ds_GH, k, "GH,HK->GK") for dq, k in zip(dqs, ks)]

    dqs = _walk(step, counts_ref, [jnp.zeros(q.shape, jnp.float32) for q in qs])
    for dq, part in zip(dqs, parts):
        dq_ref[:, part] = (scale * dq).astype(dq_ref.dtype)


def _keys_kernel(pairs, scale, own, others, order_ref, counts_ref, dk_ref, dv_ref):
    """Scores are transposed, because Triton is wrong about the transpose of a product."""
    k_ref, v_ref, k_position_ref = own
    q_ref, dy_ref, log_sum_ref, inner_ref, q_position_ref = others
    parts, H, size = _parts(k_ref.shape[1]), k_ref.shape[0], _size(q_ref, order_ref)
    ks, vs = ([ref[:, part] for part in parts] for ref in (k_ref, v_ref))
    k_position_H = k_position_ref[...]
    block = jax.lax.rem(pl.program_id(0), pl.cdiv(pairs.M, SIDE) * SIDE // H)
    exists_H = H * block + jax.lax.iota(jnp.int32, H) < pairs.M

    def step(whole, index, carry):
        dks, dvs = carry
        queries = pl.ds(size * order_ref[index], size)
        qs, dys = ([ref[queries, part] for part in parts] for ref in (q_ref, dy_ref))
        score_HG = sum(dot(k, q, "HK,GK->HG") for k, q in zip(ks, qs)) * (scale * LOG2E)
        p_HG = jnp.exp2(score_HG - log_sum_ref[queries][None, :])
        if not whole:
            mask_HG = pairs.allow(q_position_ref[queries][None, :], k_position_H[:, None])
            p_HG = jnp.where(mask_HG & exists_H[:, None], p_HG, 0)
        dp_HG = sum(dot(v, dy, "HK,GK->HG") for v, dy in zip(vs, dys))
        ds_HG = (p_HG * (dp_HG - inner_ref[queries][None, :])).astype(q_ref.dtype)
        p_HG = p_HG.astype(q_ref.dtype)
        dks = [dk + dot(ds_HG, q, "HG,GK->HK") for dk, q in zip(dks, qs)]
        dvs = [dv + dot(p_HG, dy, "HG,GK->HK") for dv, dy in zip(dvs, dys)]
        return dks, dvs

    zeros = [jnp.zeros(k.shape, jnp.float32) for k in ks]
    dks, dvs = _walk(step, counts_ref, (zeros, zeros))
    for dk, dv, part in zip(dks, dvs, parts):
        dk_ref[:, part] = (scale * dk).astype(dk_ref.dtype)
        dv_ref[:, part] = dv.astype(dv_ref.dtype)


def _walk(step, counts_ref, carry):
    """First the blocks in which every pair is allowed, then those that need a mask."""
    carry = jax.lax.fori_loop(0, counts_ref[0], functools.partial(step, True), carry)
    return jax.lax.fori_loop(counts_ref[0], counts_ref[1], functools.partial(step, False), carry)


def _size(ref, order_ref):
    """Tokens of a block of what a program walks along."""
    return ref.shape[0] // order_ref.shape[0]
