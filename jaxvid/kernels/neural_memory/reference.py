"""Neural memory by its definition: a loop over frames that holds the weights after each."""

import jax
import jax.numpy as jnp

from jaxvid.kernels.neural_memory import parts


def neural_memory(memory, tokens, frames, flags, offset, norm_AV, initial, carry, surprise):
    """(y_BTNAV, surprise_BTNA or None, carry) of the operands that `__init__` makes.

    tokens: q, k, v [B, T, N, A, ..], step [B, T, N, A, layers], radius [B, T, N, A] or None.
    frames: log_decay, log_momentum or None, and whether a frame writes, [B, T, A]. flags: whether a
    chunk ends with a frame, and whether the memory starts anew before it, [T]. offset: the frame of
    its chunk at which the call starts. initial: [A, in, out] per layer. carry: (accumulated,
    momentum or None, accumulated at the start of the chunk), [B, A, in, out] per layer each.
    surprise: whether it is asked for. All numbers have one dtype, float32 or float64.
    """
    del offset  # only whole chunks need it

    def head(tokens, frames, norm_V, initial, carry):
        def step(carry, frame):
            return _frame(memory, norm_V, initial, carry, *frame, surprise)

        carry, outputs = jax.lax.scan(step, carry, (tokens, frames, flags))
        return *outputs, carry

    heads = jax.vmap(head, in_axes=(2, 1, 0, 0, 0), out_axes=(2, 2, 0))
    rows = jax.vmap(heads, in_axes=(0, 0, None, None, 0))
    return rows(tokens, frames, norm_AV, initial, carry)


def _frame(memory, norm_V, initial, carry, tokens, frame, flags, surprise):
    """One frame of one head -> (carry, (y_NV, surprise_N or None))."""
    q_NK, k_NK, v_NV, step_NI, radius_N = tokens
    log_decay, log_momentum, writes = frame
    ends, fresh = flags
    old, momentum, start = parts.begin(memory, fresh, initial, carry)
    anchor = parts.weights(memory, start)

    def losses(weights, k_NK, v_NV, radius_N):
        prediction_NV = parts.recall(memory, weights, k_NK, norm_V)
        return parts.objective(memory, prediction_NV, v_NV, radius_N)

    def gradient(i):
        """The gradient of layer i, whose step sizes are its own."""
        return jax.grad(lambda w: step_NI[:, i] @ losses(w, k_NK, v_NV, radius_N))(anchor)[i]

    decay = jnp.exp(log_decay)
    added = [-gradient(i) for i in range(len(anchor))]
    if momentum is not None:
        added = [jnp.exp(log_momentum) * m + g for m, g in zip(momentum, added)]
        momentum = added
    new = [decay * w + writes * s for w, s in zip(old, added)]
    # The decay of a chunk is that of its frame wherever retention asks for it.
    retained = parts.retain(memory, new, start, decay, initial)

    if memory.read == "before":
        reads = anchor
    elif memory.read == "after":
        reads = parts.weights(memory, retained)
    else:
        reads = [parts.scale(memory, a) * w for a, w in zip(start, new)]
    y_NV = parts.recall(memory, reads, q_NK, norm_V)

    surprise_N = None
    if surprise:

        def alone(weights, *token):
            return losses(weights, *jax.tree.map(lambda x: x[None], token))[0]

        per_token = jax.vmap(jax.grad(alone), in_axes=(None, 0, 0, 0))
        squares = [jnp.square(g).sum((1, 2)) for g in per_token(anchor, k_NK, v_NV, radius_N)]
        surprise_N = jnp.sqrt(jax.lax.stop_gradient(sum(squares)))
    carry = (parts.choose(ends, retained, new), momentum, parts.choose(ends, retained, start))
    return carry, (y_NV, surprise_N)
