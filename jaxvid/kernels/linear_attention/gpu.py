"""Linear attention in Pallas for NVIDIA GPUs, lowered by Triton: two kernels in each direction.

The programs of a GPU's grid run in parallel and in any order, so the sequential work has a kernel
of its own. `_states` walks along the tokens with a tile of a state in registers and saves the state
before every chunk. `_mix` then computes all blocks of tokens at once, each from the state before
its chunk and the tokens of its chunk (Dao & Gu 2024, Mamba-2, section 6; split into kernels as in
Flash Linear Attention, Yang & Zhang 2024). The gradients are linear attentions too, two of them in
reverse time:

    y  of (q, k, v)  reads the states S before          dk of (v, dy, q)  reads the dS^T after
    dq of (dy, v, k) reads the S^T before               dv of (k, q, dy)  reads the dS after

`_states` computes the dS in the same way as the S. `_gradients` computes all three gradients of a
block of tokens, because they read the same q, k, v and dy.

Products have operands in the dtype of the inputs and add up in float32. States between chunks have
the dtype of the inputs. Pallas lowers to Triton in jax 0.10 to 0.12, but warns when it compiles
that this support will end; without it, "auto" selects `chunked`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvid.kernels.chunks import GRAIN
from jaxvid.parallel.devices import cuda_capability

try:
    from jax.experimental.pallas import triton
except ImportError:  # a later jax
    triton = None

CHUNK = 256  # tokens between two saved states; fewer states mean less to write and read
BLOCK = 64  # tokens that a program computes at once; also the maximal side of a tile of a state
NARROWEST = 16  # width of an operand of a product
WIDEST = 512  # bytes of a key or value, by the memory of a program
COARSE, FINE, SINCE, UNTIL = range(4)  # rows of `decays`
GATHERED, SENT = range(2)  # rows of the sums of `_gradients`


def linear_attention(q_BLAK, k_BLAK, v_BLAV, log_decay, *, scale, state_BAKV, chunk):
    """As `reference.linear_attention`; log_decay is -128 or more.

    Raises NotImplementedError for a decay per channel, for other types than float32 and bfloat16,
    for keys or values of more than WIDEST bytes, and for GPUs before Ampere.
    """
    B, L, A, K = q_BLAK.shape
    V = v_BLAV.shape[3]
    check(q_BLAK, k_BLAK, v_BLAV, log_decay)
    chunk = BLOCK * pl.cdiv(min(chunk or CHUNK, L), BLOCK)
    g_BLA = jnp.zeros((B, L, A)) if log_decay is None else log_decay

    def fill(x_BLA, width=None):
        """[B, L, A, ...] padded with zeros to whole chunks, and the width to a power of two."""
        widths = [(0, 0)] * (x_BLA.ndim - 2)
        if width is not None:
            widths[-1] = (0, padded(width) - width)
        return jnp.pad(x_BLA, [(0, 0), (0, -L % chunk), *widths])

    q_BLAK = (q_BLAK * scale).astype(q_BLAK.dtype)
    q, k, v, g = fill(q_BLAK, K), fill(k_BLAK, K), fill(v_BLAV, V), fill(g_BLA)
    widths = [(0, 0), (0, 0), (0, padded(K) - K), (0, padded(V) - V)]
    y_BLAV, state_BAKV = attend(chunk, q, k, v, g, jnp.pad(state_BAKV, widths))
    return y_BLAV[:, :L, :, :V], state_BAKV[:, :, :K, :V]


def check(q_BLAK, k_BLAK, v_BLAV, log_decay):
    """Raise NotImplementedError if `linear_attention` does not apply."""
    if triton is None:
        raise NotImplementedError(f"jax {jax.__version__} does not lower Pallas to Triton")
    capability = cuda_capability()
    if capability is not None and capability < 8:
        raise NotImplementedError(f"compute capability {capability}: 8.0 or more is needed")
    if log_decay is not None and log_decay.ndim == 4:
        raise NotImplementedError("a decay per channel has no GPU kernel")
    dtypes = {x.dtype for x in (q_BLAK, k_BLAK, v_BLAV)}
    if dtypes not in ({jnp.dtype(jnp.float32)}, {jnp.dtype(jnp.bfloat16)}):
        names = ", ".join(sorted(map(str, dtypes)))
        raise NotImplementedError(f"q, k, v of {names}: all must be float32, or all bfloat16")
    for x in (k_BLAK, v_BLAV):
        if padded(x.shape[3]) * x.dtype.itemsize > WIDEST:
            raise NotImplementedError(f"width {x.shape[3]} in {x.dtype}: at most {WIDEST} bytes")


def padded(width):
    """The least width of at least `width` that Triton can multiply by."""
    return max(NARROWEST, pl.next_power_of_2(width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(chunk, q_BLAK, k_BLAK, v_BLAV, g_BLA, state_BAKV):
    """(y_BLAV, state_BAKV) for a whole number of chunks and `padded` widths."""
    return _attend_forward(chunk, q_BLAK, k_BLAK, v_BLAV, g_BLA, state_BAKV)[0]


def _attend_forward(chunk, q_BLAK, k_BLAK, v_BLAV, g_BLA, state_BAKV):
    decays_BARL = decays(g_BLA)
    before_BASKV, last_BAKV = _states(chunk, k_BLAK, v_BLAV, decays_BARL, state_BAKV)
    y_BLAV = _mix(chunk, q_BLAK, k_BLAK, v_BLAV, decays_BARL, before_BASKV)
    return (y_BLAV, last_BAKV), (q_BLAK, k_BLAK, v_BLAV, decays_BARL, before_BASKV)


def _attend_backward(chunk, residuals, cotangents):
    q, k, v, decays_BARL, before = residuals
    dy, dlast = cotangents
    after, dfirst = _states(chunk, q, dy, decays_BARL, dlast, reverse=True)
    dq, dk, dv, sums_BARL = _gradients(chunk, q, k, v, dy, decays_BARL, before, after)

    # A decay multiplies what passes from an earlier key to a query at or after its token. Within
    # the chunk: q dq of the queries from here on, minus k dk of the keys from here on. To the state
    # after the chunk: the contributions of the state before it and of the keys before this token.
    def by_chunk(x_BAL):
        return x_BAL.reshape(*x_BAL.shape[:2], -1, chunk)

    gathered_BASC, sent_BASC = (by_chunk(sums_BARL[:, :, row]) for row in (GATHERED, SENT))
    keep_BAS = by_chunk(decays_BARL[:, :, SINCE])[..., BLOCK - 1 :: BLOCK].prod(axis=3)
    kept_BAS = keep_BAS * jnp.einsum(
        "BASKV,BASKV->BAS", before, after, preferred_element_type=jnp.float32
    )
    dg_BASC = jnp.flip(jnp.cumsum(jnp.flip(gathered_BASC, 3), axis=3), 3) + kept_BAS[..., None]
    dg_BASC += jnp.cumsum(sent_BASC, axis=3) - sent_BASC
    dg_BLA = dg_BASC.reshape(*dg_BASC.shape[:2], -1).swapaxes(1, 2)
    return dq, dk, dv, dg_BLA, dfirst


attend.defvjp(_attend_forward, _attend_backward)


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


# Launches. Arrays keep their layout [B, L, A, K]. Heads and rows of a batch share the last axis of
# the grid, so that programs that read the same tokens run close together and find them in cache.


def _states(chunk, k_BLAK, v_BLAV, decays_BARL, first_BAKV, *, reverse=False):
    """(before_BASKV, last_BAKV): the states before all S chunks, and after the last chunk, of

        S_t = exp(g_t) S_{t-1} + k_t^T v_t

    from first_BAKV. In reverse: the states after all chunks, and before the first chunk, of
    S_{t-1} = exp(g_t) (S_t + k_t^T v_t).
    """
    (B, L, A, K), V = k_BLAK.shape, v_BLAV.shape[3]
    rows, columns, S = min(K, BLOCK), min(V, BLOCK), L // chunk
    shapes = (
        jax.ShapeDtypeStruct((B, A, S, K, V), k_BLAK.dtype),
        jax.ShapeDtypeStruct(first_BAKV.shape, jnp.float32),
    )
    state = pl.BlockSpec((None, None, rows, columns), lambda j, i, h: (h // A, h % A, i, j))
    inputs = (k_BLAK, v_BLAV, decays_BARL, first_BAKV)
    return pl.pallas_call(
        functools.partial(_states_kernel, chunk, reverse),
        shapes,
        grid=(V // columns, K // rows, B * A),
        in_specs=[
            pl.BlockSpec((None, L, None, rows), lambda j, i, h: (h // A, 0, h % A, i)),
            pl.BlockSpec((None, L, None, columns), lambda j, i, h: (h // A, 0, h % A, j)),
            pl.BlockSpec((None, None, 4, L), lambda j, i, h: (h // A, h % A, 0, 0)),
            state,
        ],
        out_specs=(
            pl.BlockSpec((None, None, S, rows, columns), lambda j, i, h: (h // A, h % A, 0, i, j)),
            state,
        ),
        cost_estimate=_cost(B * A * L, K * V, 0, inputs, shapes),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        name="linear_attention_states",
    )(*inputs)


def _mix(chunk, q_BLAK, k_BLAK, v_BLAV, decays_BARL, before_BASKV):
    """y_BLAV, from the tokens of each chunk and the state before it."""
    (B, L, A, K), V = q_BLAK.shape, v_BLAV.shape[3]
    columns = min(V, _columns(K))
    own, of_chunk, decay, state = _specs(chunk, A)
    inputs = (q_BLAK, k_BLAK, v_BLAV, decays_BARL, before_BASKV)
    shape = jax.ShapeDtypeStruct(v_BLAV.shape, v_BLAV.dtype)
    products = _mean_context(chunk) * (K * (V // columns) + V) + K * V
    return pl.pallas_call(
        _mix_kernel,
        shape,
        grid=(V // columns, L // BLOCK, B * A),
        in_specs=[
            own(K),
            of_chunk(K),
            of_chunk(columns, _each),
            decay,
            state(K, columns, _each),
        ],
        out_specs=own(columns, _each),
        cost_estimate=_cost(B * A * L, products, BLOCK * (V // columns), inputs, [shape]),
        # Fewer warps have too few registers for a wide query and a wide result.
        compiler_params=triton.CompilerParams(
            num_warps=8 if max(K, columns) > BLOCK else 4, num_stages=2
        ),
        name="linear_attention_mix",
    )(*inputs)


def _gradients(chunk, q_BLAK, k_BLAK, v_BLAV, dy_BLAV, decays_BARL, before_BASKV, after_BASKV):
    """(dq, dk, dv, sums_BARL) from the states before all chunks and the cotangents after them.

    Row GATHERED of the sums is q dq - k dk from the other tokens of the chunk and, in q dq, the
    state before the chunk. Row SENT is k dk from the states after the chunk.
    """
    (B, L, A, K), V = q_BLAK.shape, v_BLAV.shape[3]
    # The registers hold one tile of a gradient and its operands. Every tile recomputes the scores.
    tiles = max(1, min(max(K, V) // _columns(max(K, V)), min(K, V) // NARROWEST))
    own, of_chunk, decay, state = _specs(chunk, A)
    inputs = (q_BLAK, k_BLAK, v_BLAV, dy_BLAV, decays_BARL, before_BASKV, after_BASKV)
    sums = jax.ShapeDtypeStruct((B, A, tiles, 2, L), jnp.float32)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:3]]
    products = _mean_context(chunk) * (tiles * (K + 2 * V) + 2 * K + V) + 3 * K * V
    *gradients, sums = pl.pallas_call(
        functools.partial(_gradients_kernel, tiles),
        (*shapes, sums),
        grid=(tiles, L // BLOCK, B * A),
        in_specs=[*(of_chunk(x.shape[3]) for x in inputs[:4]), decay, state(K, V), state(K, V)],
        out_specs=(
            *(own(x.shape[3] // tiles, _each) for x in inputs[:3]),
            pl.BlockSpec((None, None, None, 2, BLOCK), lambda j, n, h: (h // A, h % A, j, 0, n)),
        ),
        cost_estimate=_cost(B * A * L, products, 2 * BLOCK * tiles, inputs, (*shapes, sums)),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        name="linear_attention_gradients",
    )(*inputs)
    return *gradients, sums.sum(axis=2)


def _specs(chunk, heads):
    """The blocks that `_mix` and `_gradients` use on a grid (columns, blocks, rows and heads).

    Returns three functions of a width and a choice of columns (`_first` or `_each`), for the own
    tokens of the block, all tokens of its chunk, and the state of its chunk; and the decays of the
    chunk.
    """
    blocks = chunk // BLOCK

    def own(width, column=_first):
        return pl.BlockSpec(
            (None, BLOCK, None, width), lambda j, n, h: (h // heads, n, h % heads, column(j))
        )

    def of_chunk(width, column=_first):
        return pl.BlockSpec(
            (None, chunk, None, width),
            lambda j, n, h: (h // heads, n // blocks, h % heads, column(j)),
        )

    def state(rows, width, column=_first):
        return pl.BlockSpec(
            (None, None, None, rows, width),
            lambda j, n, h: (h // heads, h % heads, n // blocks, 0, column(j)),
        )

    decay = pl.BlockSpec(
        (None, None, 4, chunk), lambda j, n, h: (h // heads, h % heads, 0, n // blocks)
    )
    return own, of_chunk, decay, state


def _first(j):
    return 0


def _each(j):
    return j


def _columns(width):
    """Columns of a result that a program holds if operands have this width."""
    return BLOCK if width > 2 * BLOCK else 2 * BLOCK


def _mean_context(chunk):
    """Tokens of its chunk that a token is multiplied by, on average: whole blocks, with its own."""
    return (chunk + BLOCK) // 2


def _cost(tokens, products, exponentials, inputs, outputs):
    """What a kernel computes, and what it moves if only the first program misses the cache.

    Products (multiply-adds) and exponentials are per token and head. A token meets
    C' = (C + BLOCK) / 2 of the C tokens of its chunk, as later blocks are not computed. With I
    tiles of y and J tiles of the gradients, each of which recomputes the scores, the kernels of
    each direction take together, in FLOPs and in numbers moved per token and head,

        forward     2 C' (I K + V) + 4 K V                       3 K + 3 V + 2 K V / C
        backward    2 C' (J (K + 2 V) + 2 K + V) + 8 K V         5 K + 4 V + 3 K V / C

    plus, in float32, decays (4 per token, read twice), sums (2 J) and states at both ends.
    """
    return pl.CostEstimate(
        flops=2 * tokens * products,
        transcendentals=tokens * exponentials,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs)),
    )


# Kernels


def _states_kernel(chunk, reverse, k_ref, v_ref, decays_ref, first_ref, states_ref, last_ref):
    blocks = k_ref.shape[0] // BLOCK
    weight = SINCE if reverse else UNTIL

    def step(count, state_KV):
        @pl.when(jax.lax.rem(count, chunk // BLOCK) == 0)
        def _():
            passed = jax.lax.div(count, chunk // BLOCK)
            index = states_ref.shape[0] - 1 - passed if reverse else passed
            states_ref[index] = state_KV.astype(states_ref.dtype)

        start = BLOCK * (blocks - 1 - count if reverse else count)
        tokens = pl.ds(start, BLOCK)
        k_GK = _times(k_ref[tokens, :], decays_ref[weight, tokens][:, None])
        keep = decays_ref[SINCE, start + BLOCK - 1]
        return keep * state_KV + _dot(k_GK, v_ref[tokens, :], "GK,GV->KV")

    last_ref[...] = jax.lax.fori_loop(0, blocks, step, first_ref[...])


def _mix_kernel(q_ref, k_ref, v_ref, decays_ref, before_ref, y_ref):
    block, tokens = _own(decays_ref)
    q_GK, k_GK, v_GV = q_ref[...], k_ref[tokens, :], v_ref[tokens, :]
    columns = pl.ds(0, v_ref.shape[1])
    near_GV, weight_G1 = _near(block, decays_ref, q_GK, k_ref, v_ref, columns)
    far_GV = weight_G1 * _dot(q_GK, before_ref[...], "GK,KV->GV")
    own_GV = _inner(q_GK, k_GK)[:, None] * v_GV
    y_ref[...] = (near_GV + far_GV + own_GV).astype(y_ref.dtype)


def _gradients_kernel(tiles, *refs):
    """One gradient after the other, so that registers hold only one of them at a time."""
    q_ref, k_ref, v_ref, dy_ref, decays_ref, before_ref, after_ref, *outputs = refs
    dq_ref, dk_ref, dv_ref, sums_ref = outputs
    block, tokens = _own(decays_ref)

    def tile(width):
        return pl.ds(0 if tiles == 1 else pl.program_id(0) * (width // tiles), width // tiles)

    of_K, of_V = tile(q_ref.shape[1]), tile(v_ref.shape[1])

    def own(ref, columns=slice(None)):
        return ref[tokens, columns]

    dy_GV = own(dy_ref)
    near_GK, weight_G1 = _near(block, decays_ref, dy_GV, v_ref, k_ref, of_K)
    far_GK = weight_G1 * _dot(dy_GV, before_ref[of_K, :], "GV,KV->GK")
    score_G1 = _inner(dy_GV, own(v_ref))[:, None]
    dq_ref[...] = (near_GK + far_GK + score_G1 * own(k_ref, of_K)).astype(dq_ref.dtype)
    sums_ref[GATHERED, :] = _inner(own(q_ref, of_K), near_GK + far_GK)

    v_GV = own(v_ref)
    near_GK, weight_G1 = _near(block, decays_ref, v_GV, dy_ref, q_ref, of_K, reverse=True)
    far_GK = weight_G1 * _dot(v_GV, after_ref[of_K, :], "GV,KV->GK")
    dk_ref[...] = (near_GK + far_GK + score_G1 * own(q_ref, of_K)).astype(dk_ref.dtype)
    k_tile = own(k_ref, of_K)
    sums_ref[GATHERED, :] -= _inner(k_tile, near_GK)
    sums_ref[SENT, :] = _inner(k_tile, far_GK)

    k_GK = own(k_ref)
    near_GV, weight_G1 = _near(block, decays_ref, k_GK, q_ref, dy_ref, of_V, reverse=True)
    far_GV = weight_G1 * _dot(k_GK, after_ref[:, of_V], "GK,KV->GV")
    own_GV = _inner(own(q_ref), k_GK)[:, None] * own(dy_ref, of_V)
    dv_ref[...] = (near_GV + far_GV + own_GV).astype(dv_ref.dtype)


def _own(decays_ref):
    """The index of a program's block within its chunk, and its tokens within the chunk."""
    block = jax.lax.rem(pl.program_id(1), decays_ref.shape[1] // BLOCK)
    return block, pl.ds(BLOCK * block, BLOCK)


def _near(block, decays_ref, q_GK, k_ref, v_ref, columns, *, reverse=False):
    """The part of y from earlier tokens of the same chunk; in reverse, from later tokens.

    k_ref and v_ref are keys and values of the chunk; `columns` of the values are read. Returns
    (near_GV, the decay from the state that it reads to each query, [G, 1]).
    """
    blocks = decays_ref.shape[1] // BLOCK
    read, write = (UNTIL, SINCE) if reverse else (SINCE, UNTIL)

    def gather(tokens, factor):
        p_GH = _dot(q_GK, k_ref[tokens, :], "GK,HK->GH") * factor
        v_HV = v_ref[tokens, columns]
        return _dot(p_GH.astype(v_HV.dtype), v_HV, "GH,HV->GV")

    def step(count, carry):
        """Adds the next block away. `keep` is the decay from it to the border of this block."""
        y_GV, keep = carry
        start = BLOCK * (block + 1 + count if reverse else block - 1 - count)
        tokens = pl.ds(start, BLOCK)
        weight_H = keep * decays_ref[write, tokens]
        return (
            y_GV + gather(tokens, weight_H[None, :]),
            keep * decays_ref[SINCE, start + BLOCK - 1],
        )

    others = blocks - 1 - block if reverse else block
    y_GV = jnp.zeros((BLOCK, columns.size), jnp.float32)
    y_GV, keep = jax.lax.fori_loop(0, others, step, (y_GV, jnp.float32(1)))

    tokens = pl.ds(BLOCK * block, BLOCK)
    read_G1 = decays_ref[read, tokens][:, None]
    coarse_G, fine_G = decays_ref[COARSE, tokens], decays_ref[FINE, tokens]
    between_GH = (coarse_G[:, None] - coarse_G[None, :]) + (fine_G[:, None] - fine_G[None, :])
    row_GH, column_GH = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK,) * 2, n) for n in (0, 1))
    if reverse:
        between_GH, row_GH, column_GH = -between_GH, column_GH, row_GH
    factor_GH = jnp.where(row_GH > column_GH, jnp.exp(jnp.minimum(between_GH, 0)), 0)
    return read_G1 * y_GV + gather(tokens, factor_GH), keep * read_G1


def _times(x_GK, factor_G1):
    """A key times its decay, in its own dtype."""
    return (x_GK * factor_G1).astype(x_GK.dtype)


def _inner(x_GK, y_GK):
    """The inner product of x and y at every token, float32 [G]."""
    return jnp.sum(x_GK.astype(jnp.float32) * y_GK.astype(jnp.float32), axis=1)


def _dot(a, b, letters):
    """An einsum of two matrices that adds up in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)
