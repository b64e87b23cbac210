"""Linear attention in plain XLA: matrix products within a chunk, a state between chunks.

The chunk form is that of GLA (Yang et al. 2024, section 4). With one decay per head it is Lightning
Attention-2 (Qin et al. 2024), here with a gradient of the decay. No exponent is ever positive, so
no decay overflows, however strong it is.
"""

import jax
import jax.numpy as jnp

from jaxvid.kernels.chunks import LONGEST, decays, einsum, join, split

CHUNK = 64


def linear_attention(q_BLAK, k_BLAK, v_BLAV, log_decay, *, scale, state_BAKV, chunk):
    """As `reference.linear_attention`; log_decay is -128 or more."""
    L = q_BLAK.shape[1]
    G = min(chunk or CHUNK, LONGEST, L)
    if log_decay is None:
        within, g = _within_per_head, jnp.zeros((1, 1, 1, G))
    elif log_decay.ndim == 3:
        within, g = _within_per_head, split(log_decay, G)
    else:
        G = 1 << (G - 1).bit_length()  # a power of two, for the pairs of blocks
        within, g = _within_per_channel, split(log_decay, G)
    q, k, v = (split(x, G) for x in (q_BLAK * scale, k_BLAK, v_BLAV))
    y, read_SBAGK, write_SBAGK, keep = within(q, k, v, g)
    written_SBAKV = einsum("SBAGK,SBAGV->SBAKV", write_SBAGK, v)

    def step(state_BAKV, chunk):
        keep_BAK, written_BAKV = chunk
        return keep_BAK[..., None] * state_BAKV + written_BAKV, state_BAKV

    keep = jnp.broadcast_to(keep, (*written_SBAKV.shape[:3], keep.shape[3]))
    state_BAKV, before_SBAKV = jax.lax.scan(step, state_BAKV, (keep, written_SBAKV))
    y += einsum("SBAGK,SBAKV->SBAGV", read_SBAGK, before_SBAKV.astype(q.dtype))
    return join(y, L).astype(v_BLAV.dtype), state_BAKV


# Within a chunk: (y_SBAGV from its own tokens; read_SBAGK, queries that read the state before it;
# write_SBAGK, keys that write the state after it; keep [S, B, A, 1 or K], the decay of a state).
# The backward pass recomputes the matrices [G, G], which would fill the memory.


@jax.checkpoint
def _within_per_head(q, k, v, g_SBAG):
    """One decay per head and token: a factor of every score."""
    factor_SBAGH, read_SBAG, write_SBAG, keep_SBA1 = decays(g_SBAG)
    p_SBAGH = einsum("SBAGK,SBAHK->SBAGH", q, k) * factor_SBAGH
    y = einsum("SBAGH,SBAHV->SBAGV", p_SBAGH.astype(v.dtype), v)
    read = q * read_SBAG[..., None].astype(q.dtype)
    write = k * write_SBAG[..., None].astype(k.dtype)
    return y, read, write, keep_SBA1


@jax.checkpoint
def _within_per_channel(q, k, v, g_SBAGK):
    """One decay per channel: blocks of 1, 2, 4 .. tokens are joined in pairs until one is left.

    `since` is the decay from the border of a pair to a query in its right block, `until` the decay
    from a key in its left block to the border. Their product is the decay between key and query.
    """
    y = jnp.sum(q.astype(jnp.float32) * k, axis=-1, keepdims=True) * v
    since, until = g_SBAGK, jnp.zeros_like(g_SBAGK)
    size = 1
    while size < q.shape[3]:
        (k_left, _), (v_left, _), (_, q_right) = (_halves(x, size) for x in (k, v, q))
        (since_left, since_right), (until_left, until_right) = (
            _halves(x, size) for x in (since, until)
        )
        read = q_right * jnp.exp(since_right).astype(q.dtype)
        write = k_left * jnp.exp(until_left).astype(k.dtype)
        p = einsum("SBAPGK,SBAPHK->SBAPGH", read, write)
        y_right = einsum("SBAPGH,SBAPHV->SBAPGV", p.astype(v.dtype), v_left)
        y += _whole(jnp.zeros_like(y_right), y_right)
        since = _whole(since_left, since_right + since_left[..., -1:, :])
        until = _whole(until_left + since_right[..., -1:, :], until_right)
        size *= 2
    read = q * jnp.exp(since).astype(q.dtype)
    write = k * jnp.exp(until).astype(k.dtype)
    return y, read, write, jnp.exp(since[..., -1, :])


def _halves(x_SBAGK, size):
    """The left and right blocks, `size` tokens each, of all P pairs: two [S, B, A, P, size, K]."""
    S, B, A, G, K = x_SBAGK.shape
    pairs = x_SBAGK.reshape(S, B, A, G // (2 * size), 2, size, K)
    return pairs[:, :, :, :, 0], pairs[:, :, :, :, 1]


def _whole(left, right):
    """The inverse of `_halves`: [S, B, A, G, K]."""
    S, B, A, P, size, K = left.shape
    return jnp.stack([left, right], axis=4).reshape(S, B, A, 2 * P * size, K)
