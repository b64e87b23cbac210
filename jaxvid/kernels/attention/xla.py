"""Attention in plain XLA that skips pairs known to be masked while tracing.

Queries are split into chunks of whole positions. If positions are known while tracing, a chunk
reads only the keys that one of its queries may see, and has no mask if all its queries see all of
these keys. If there are many pairs, the backward pass keeps only the peaks and sums of the softmax
and recomputes the probabilities from them (FlashAttention, Dao et al. 2022, algorithm 4). XLA on
CPU is slow where the left operand is contracted over its rows, so the gradients of keys and values
are computed transposed.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.kernels.dispatch import FLOPS, Flops, are_known

_MIN_QUERIES = 128  # per chunk; fewer would waste fewer pairs, but slow the products down
_MAX_CHUNKS = 16  # each chunk is traced separately
_MIN_GAP = 64  # masked keys between two runs; a smaller gap is read and masked
_SMALL = 4096  # scores of a matrix that is faster to transpose than to contract over its rows
_MAX_KEPT = 2**26  # bytes of probabilities to keep for the backward pass
_MASKED = -1e30  # instead of -inf, which would give NaN for a query without keys

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Chunk(NamedTuple):
    """Queries [start, stop), the runs [start, stop) of keys that they read, and a mask over both.

    mask_GM is None if every query may see every key.
    """

    start: int
    stop: int
    runs: tuple
    mask_GM: np.ndarray | None


def attention(q_BLAK, k_BMAK, v_BMAK, *, q_position_L, k_position_M, allow, scale):
    """As `reference.attention`. Numpy positions are static; traced positions give a traced mask."""
    if are_known(q_position_L, k_position_M):
        chunks, mask_LM = query_chunks(q_position_L, k_position_M, allow), None
    else:
        mask_LM = allow(q_position_L[:, None], k_position_M[None, :])
        mask_LM = jnp.broadcast_to(mask_LM, (q_position_L.size, k_position_M.size))
        chunks = [Chunk(0, q_position_L.size, ((0, k_position_M.size),), None)]
    q_BALK, k_BAMK, v_BAMK = (x.swapaxes(1, 2) for x in (q_BLAK * scale, k_BMAK, v_BMAK))

    def softmax_attention(*arrays):  # a call with a name, the key in FLOPS
        return _attend(chunks, *arrays)

    return jax.jit(softmax_attention)(q_BALK, k_BAMK, v_BAMK, mask_LM).swapaxes(1, 2)


FLOPS["softmax_attention"] = Flops(
    all_pairs=lambda q_BALK, k_BAMK, *_: 4 * q_BALK.size * k_BAMK.shape[2]
)


def query_chunks(
    q_position_L: np.ndarray, k_position_M: np.ndarray, allow: Callable
) -> list[Chunk]:
    """The chunks for static positions."""
    L, M = q_position_L.size, k_position_M.size
    least = max(_MIN_QUERIES, -(-L // _MAX_CHUNKS))
    cuts = [0]
    for change in np.flatnonzero(np.diff(q_position_L)) + 1:
        if change - cuts[-1] >= least <= 2 * (L - change):
            cuts.append(int(change))
    return [
        _make_chunk(start, stop, np.broadcast_to(mask_GM, (stop - start, M)))
        for start, stop in itertools.pairwise([*cuts, L])
        for mask_GM in [allow(q_position_L[start:stop, None], k_position_M[None, :])]
    ]


def _make_chunk(start, stop, mask_GM):
    seen = np.flatnonzero(mask_GM.any(axis=0))
    if seen.size == 0:
        seen = np.zeros(1, int)  # a chunk must read a key, so it reads a masked one
    ends = np.flatnonzero(np.diff(seen) > _MIN_GAP)
    runs = tuple(
        (int(seen[first]), int(seen[last]) + 1)
        for first, last in zip([0, *(ends + 1)], [*ends, seen.size - 1])
    )
    mask_GM = np.concatenate([mask_GM[:, first:last] for first, last in runs], axis=1)
    return Chunk(start, stop, runs, None if mask_GM.all() else mask_GM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(chunks, q_BALK, k_BAMK, v_BAMK, mask_LM):
    return _forward(chunks, q_BALK, k_BAMK, v_BAMK, mask_LM)[0]


def _forward(chunks, q_BALK, k_BAMK, v_BAMK, mask_LM):
    ys, peaks, shares, kept = [], [], [], []
    for chunk in chunks:
        score_BAGM = _scores(chunk, q_BALK, k_BAMK, mask_LM)
        peak = score_BAGM.max(axis=-1, keepdims=True)
        p_BAGM = jnp.exp(score_BAGM - peak)
        # Zero for a query without keys.
        share = jnp.where(peak > _MASKED / 2, 1 / p_BAGM.sum(axis=-1, keepdims=True), 0)
        v_chunk = _read(chunk, v_BAMK)
        y_BAGK = _einsum("BAGM,BAMK->BAGK", p_BAGM.astype(v_chunk.dtype), v_chunk)
        ys.append((y_BAGK * share).astype(v_BAMK.dtype))
        peaks.append(peak)
        shares.append(share)
        kept.append(p_BAGM)
    y_BALK, peak_BAL1, share_BAL1 = (jnp.concatenate(parts, 2) for parts in (ys, peaks, shares))
    if sum(p_BAGM.nbytes for p_BAGM in kept) > _MAX_KEPT:
        kept = [None] * len(chunks)
    return y_BALK, (q_BALK, k_BAMK, v_BAMK, mask_LM, y_BALK, peak_BAL1, share_BAL1, kept)


def _backward(chunks, residuals, dy_BALK):
    q_BALK, k_BAMK, v_BAMK, mask_LM, y_BALK, peak_BAL1, share_BAL1, kept = residuals
    dtype = q_BALK.dtype
    dy_BALK = dy_BALK.astype(jnp.float32) * share_BAL1
    inner_BAL1 = (dy_BALK * y_BALK).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], [], []
    for chunk, p_BAGM in zip(chunks, kept):
        k_chunk, v_chunk = _read(chunk, k_BAMK), _read(chunk, v_BAMK)
        q, dy, peak, inner = (
            x[:, :, chunk.start : chunk.stop]
            for x in (q_BALK, dy_BALK.astype(dtype), peak_BAL1, inner_BAL1)
        )
        if p_BAGM is None:
            p_BAGM = jnp.exp(_scores(chunk, q_BALK, k_BAMK, mask_LM) - peak)
        dp_BAGM = _einsum("BAGK,BAMK->BAGM", dy, v_chunk)
        ds_BAGM = (p_BAGM * (dp_BAGM - inner)).astype(dtype)
        dq.append(_einsum("BAGM,BAMK->BAGK", ds_BAGM, k_chunk))
        dk.append(_over_queries(q, ds_BAGM))
        dv.append(_over_queries(dy, p_BAGM.astype(dtype)))
    dk_BAMK, dv_BAMK = (_total(chunks, d, k_BAMK.shape[2]).swapaxes(2, 3) for d in (dk, dv))
    grads = (
        jnp.concatenate(dq, 2).astype(dtype),
        dk_BAMK.astype(dtype),
        dv_BAMK.astype(v_BAMK.dtype),
    )
    # Without the barrier, XLA fuses the sums into their users and computes them once per use.
    return *jax.lax.optimization_barrier(grads), None


_attend.defvjp(_forward, _backward)


def _over_queries(x_BAGK, p_BAGM):
    """Sum over queries of x times p, float32 [B, A, K, M]."""
    if p_BAGM.shape[2] * p_BAGM.shape[3] > _SMALL:
        return _einsum("BAGK,BAGM->BAKM", x_BAGK, p_BAGM)
    # Without the barrier, XLA undoes the transposition, several times slower for small matrices.
    p_BAMG = jax.lax.optimization_barrier(p_BAGM.swapaxes(2, 3))
    return _einsum("BAMG,BAGK->BAMK", p_BAMG, x_BAGK).swapaxes(2, 3)


def _scores(chunk, q_BALK, k_BAMK, mask_LM):
    """The masked scores of a chunk, float32 [B, A, G, M]."""
    q_BAGK = q_BALK[:, :, chunk.start : chunk.stop]
    score_BAGM = _einsum("BAGK,BAMK->BAGM", q_BAGK, _read(chunk, k_BAMK))
    mask_GM = chunk.mask_GM if mask_LM is None else mask_LM
    return score_BAGM if mask_GM is None else jnp.where(mask_GM, score_BAGM, _MASKED)


def _read(chunk, x_BAMK):
    """The keys or values that a chunk reads."""
    return jnp.concatenate([x_BAMK[:, :, start:stop] for start, stop in chunk.runs], 2)


def _total(chunks, parts, size):
    """The sum over chunks of [B, A, K, keys read], each at its keys' place among all `size` keys.

    The result is concatenated from pieces between the ends of runs. XLA on CPU would fuse a sum of
    padded parts into its users and compute it once per use.
    """
    ends = {0, size}.union(*(run for chunk in chunks for run in chunk.runs))
    pieces = []
    for start, stop in itertools.pairwise(sorted(ends)):
        zeros = jnp.zeros((*parts[0].shape[:3], stop - start), jnp.float32)
        terms = [
            part[..., at : at + stop - start]
            for chunk, part in zip(chunks, parts)
            for at in _offsets(chunk, start)
        ]
        pieces.append(functools.reduce(jnp.add, terms) if terms else zeros)
    return jnp.concatenate(pieces, 3)


def _offsets(chunk, key):
    """The place of `key` among the keys that a chunk reads: [offset], or [] if it is not read."""
    before = 0
    for start, stop in chunk.runs:
        if start <= key < stop:
            return [before + key - start]
        before += stop - start
    return []
