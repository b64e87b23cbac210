"""Neural memory in plain XLA, a chunk at a time, by its dual form.

The gradients of a chunk are taken at one set of weights W. That of token j for a layer z = x W is
x_j^T d_j, with the layer's input x_j and the gradient d_j at its output. All later weights are sums
of these products, so a query x reads them through products of tokens alone (Titans, section 3.2;
TTT, Sun et al. 2024, appendix A):

    x W_t = keep_t x W + carried_t x S - sum_j mix_tj (x x_j^T) d_j

There are no weights per token or per frame, whatever the network: it runs once over the keys, with
W, and once over the queries, with these products in the place of its layers.
"""

import functools

import jax
import jax.numpy as jnp

from jaxvid.kernels.chunks import decays, join, split
from jaxvid.kernels.neural_memory import parts

exact = functools.partial(jnp.matmul, precision="highest")


def neural_memory(memory, tokens, frames, flags, offset, norm_AV, initial, carry, surprise):
    """As `reference.neural_memory`; logarithms are -128 or more."""
    B, T, N, A, _ = tokens[0].shape
    aligned = not isinstance(offset, jax.Array)  # the chunks are known while tracing
    G = min(memory.chunk, offset + T) if aligned else memory.chunk
    total = -(-(offset + T if aligned else G - 1 + T) // G) * G

    def place(x, axis):
        """Frames at their places in the chunks, among frames of zeros, which write nothing."""
        padding = [(0, total - T if i == axis else 0) for i in range(x.ndim)]
        return jnp.roll(jnp.pad(x, padding), offset, axis)

    def chunks_of_tokens(x_BTNA):
        x_BTNA = place(x_BTNA, axis=1)
        return split(x_BTNA.reshape(B, total * N, *x_BTNA.shape[3:]), G * N)

    def tokens_of_call(x_SBAGV):
        x_BLAV = join(x_SBAGV, total * N)
        return jnp.roll(x_BLAV.reshape(B, total, N, A, -1), -offset, axis=1)[:, :T]

    tokens = jax.tree.map(chunks_of_tokens, tokens)
    frames = jax.tree.map(lambda x_BTA: split(place(x_BTA, axis=1), G), frames)
    ends_SG, fresh_SG = (place(flag_T, axis=0).reshape(-1, G) for flag_T in flags)
    flags = (ends_SG[:, -1], fresh_SG.any(axis=1))
    whole = aligned and offset == 0 and T % memory.chunk == 0
    if whole:  # every chunk starts with the weights that the one before has left
        carry = (*carry[:2], None)

    chunk = functools.partial(_chunk, memory, surprise)
    heads = jax.vmap(chunk, in_axes=(0, 0, 0, 0, 0, None))
    rows = jax.vmap(heads, in_axes=(None, None, 0, 0, 0, None))
    carry, (y_SBAGV, surprise_SBAG) = _scan(
        lambda carry, chunk: rows(norm_AV, initial, carry, *chunk),
        carry,
        (tokens, frames, flags),
        memory.remat,
    )
    if whole:
        carry = (*carry[:2], carry[0])
    if surprise:
        surprise_SBAG = tokens_of_call(surprise_SBAG[..., None])[..., 0]
    return tokens_of_call(y_SBAGV), surprise_SBAG, carry


def _scan(step, carry, chunks, every):
    """`jax.lax.scan` that keeps for the backward pass one carry in `every`, and nothing else."""
    S, step = len(jax.tree.leaves(chunks)[0]), jax.checkpoint(step)
    if every == 1 or S == 1:
        return jax.lax.scan(step, carry, chunks, unroll=S == 1)

    def group(x_S):
        x_S = jnp.pad(x_S, [(0, -S % every), *[(0, 0)] * (x_S.ndim - 1)])  # these write nothing
        return x_S.reshape(-1, every, *x_S.shape[1:])

    @jax.checkpoint
    def several(carry, chunks):
        return jax.lax.scan(step, carry, chunks)

    carry, outputs = jax.lax.scan(several, carry, jax.tree.map(group, chunks))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:S], outputs)


def _chunk(memory, surprise, norm_V, initial, carry, tokens, frames, flags):
    """One chunk of one head, G frames of N tokens, L in all -> (carry, (y_LV, surprise_L)).

    The last part of the carry is None if it equals the first, as every chunk starts and ends here.
    """
    q_LK, k_LK, v_LV, step_LI, radius_L = tokens
    ends, fresh = flags
    whole = carry[2] is None
    carry = (*carry[:2], carry[0] if whole else carry[2])
    old, momentum, start = parts.begin(memory, fresh, initial, carry)
    anchor, scales = parts.weights(memory, start), [parts.scale(memory, part) for part in start]
    inputs, errors = _gradients(memory, anchor, norm_V, k_LK, v_LV, radius_L)
    surprise_L = None
    if surprise:
        squares = [jnp.square(x).sum(-1) * jnp.square(d).sum(-1) for x, d in zip(inputs, errors)]
        surprise_L = jnp.sqrt(jax.lax.stop_gradient(sum(squares)))
    errors = [step_L[:, None] * d_LF for step_L, d_LF in zip(step_LI.T, errors)]

    coefficients = _coefficients(*frames)
    keep_G, carried_G, mix_GH, *_ = coefficients
    of_tokens = functools.partial(jnp.repeat, repeats=len(k_LK) // len(keep_G), axis=0)

    def written(mix_H):
        """The sum of the gradients of all tokens, each times the factor of its frame."""
        factor_L1 = of_tokens(mix_H)[:, None]
        return [x_LK.T @ (factor_L1 * d_LF) for x_LK, d_LF in zip(inputs, errors)]

    new, new_momentum = _after(old, momentum, coefficients, frames[2], written)
    retained = parts.retain(memory, new, start, keep_G[-1], initial)

    def product(i, x_LK):
        """x W_t for the weights of layer i after the frame t of each token."""
        mix_LL = of_tokens(of_tokens(mix_GH).T).T
        y_LF = of_tokens(keep_G)[:, None] * (x_LK @ old[i])
        y_LF -= (mix_LL * (x_LK @ inputs[i].T)) @ errors[i]
        if momentum is not None:
            y_LF += of_tokens(carried_G)[:, None] * (x_LK @ momentum[i])
        return scales[i] * y_LF

    if memory.read == "before":
        y_LV = parts.recall(memory, anchor, q_LK, norm_V)
    elif memory.read == "after":
        y_LV = parts.recall(memory, parts.weights(memory, retained), q_LK, norm_V)
    elif len(keep_G) == 1:  # the same as below, by matrices instead of products of tokens
        reads = [scale * w for scale, w in zip(scales, new)]
        y_LV = parts.recall(memory, reads, q_LK, norm_V)
    else:
        y_LV = parts.apply(memory, product, len(anchor), q_LK, norm_V)
    start = None if whole else parts.choose(ends, retained, start)
    return (parts.choose(ends, retained, new), new_momentum, start), (y_LV, surprise_L)


def _after(old, momentum, coefficients, writes_G, written):
    """The accumulated and the momentum, or None, after the chunk; see `_coefficients`.

    written(mix_H): the sum of the gradients of all tokens, each times the factor of its frame.
    """
    keep_G, carried_G, mix_GH, momentum_G, momentum_mix_H = coefficients
    if momentum is None:
        return [keep_G[-1] * w - g for w, g in zip(old, written(mix_GH[-1]))], None
    new_momentum = [momentum_G[-1] * m - g for m, g in zip(momentum, written(momentum_mix_H))]
    if len(keep_G) == 1:  # the same as below, of one sum instead of two
        return [keep_G[0] * w + writes_G[0] * m for w, m in zip(old, new_momentum)], new_momentum
    new = [keep_G[-1] * w - g for w, g in zip(old, written(mix_GH[-1]))]
    return [w + carried_G[-1] * m for w, m in zip(new, momentum)], new_momentum


def _gradients(memory, anchor, norm_V, k_LK, v_LV, radius_L):
    """(inputs x_LK, gradients d_LF at the outputs) of every layer, for all tokens of a chunk."""

    def loss(shifts):
        inputs = [None] * len(anchor)

        def layer(i, x_LK):
            inputs[i] = x_LK
            return x_LK @ anchor[i] + shifts[i]

        prediction_LV = parts.apply(memory, layer, len(anchor), k_LK, norm_V)
        return parts.objective(memory, prediction_LV, v_LV, radius_L).sum(), inputs

    shifts = [jnp.zeros((len(k_LK), w_KF.shape[1]), k_LK.dtype) for w_KF in anchor]
    errors, inputs = jax.grad(loss, has_aux=True)(shifts)
    return inputs, errors


def _coefficients(g_G, momentum_g_G, writes_G):
    """What the weights after each frame are made of, from the logarithms of decay and momentum.

    W_t = keep_t W + carried_t S - sum_j mix_tj (gradient of frame j), and at the end of the chunk
    S = momentum S - sum_j momentum_mix_j (gradient of frame j). Returns keep_G, carried_G, mix_GH,
    momentum_G, momentum_mix_H. A frame that does not write adds no momentum to the weights.
    """
    decay_GH, keep_G, _, _ = decays(g_G)
    if momentum_g_G is None:
        return keep_G, None, decay_GH, None, None
    momentum_GH, momentum_G, momentum_mix_H, _ = decays(momentum_g_G)
    added_GH = decay_GH * writes_G
    return (
        keep_G,
        exact(added_GH, momentum_G),
        exact(added_GH, momentum_GH),
        momentum_G,
        momentum_mix_H,
    )
