"""Linear attention in plain XLA: by matrix products within a chunk, by the state between chunks.

The form is that of GLA (Yang et al. 2024, section 4); with one decay per head it is Lightning
Attention-2 (Qin et al. 2024), with a gradient for the decay too. No exponent here is ever
positive, so that no decay overflows, however strong.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 64
GRAIN = 1 / 64  # of the part of a decay that adds up without rounding
LONGEST = 2048  # tokens whose decays do: sums of 2048 times -128 / GRAIN fill the 24 bits

einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def linear_attention(q_BLAK, k_BLAK, v_BLAV, log_decay, *, scale, state_BAKV, chunk):
    """As `reference.linear_attention`; log_decay is -128 or more."""
    L = q_BLAK.shape[1]
    G = min(chunk or CHUNK, LONGEST, L)
    if log_decay is None:
        within, g = _by_head, jnp.zeros((1, 1, 1, G))
    elif log_decay.ndim == 3:
        within, g = _by_head, split(log_decay, G)
    else:
        G = 1 << (G - 1).bit_length()  # a power of two, to be halved
        within, g = _by_channel, split(log_decay, G)
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


def split(x_BLA, chunk):
    """[B, L, A, ...] -> [S, B, A, G, ...]: S chunks of G tokens, the last filled up with zeros."""
    B, L, *rest = x_BLA.shape
    x_BLA = jnp.pad(x_BLA, [(0, 0), (0, -L % chunk), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(x_BLA.reshape(B, -1, chunk, *rest), (1, 0, 3, 2), (0, 1, 2, 3))


def join(x_SBAGV, length):
    """[S, B, A, G, V] -> [B, L, A, V], the inverse of `split`."""
    S, B, A, G, V = x_SBAGV.shape
    return x_SBAGV.transpose(1, 0, 3, 2, 4).reshape(B, S * G, A, V)[:, :length]


# What a chunk does alone: (y_SBAGV from its own tokens, read_SBAGK and write_SBAGK, the queries and
# keys that meet the states before and after it, keep [S, B, A, 1 or K], what remains of a state).
# The matrices [G, G] are computed again in the backward pass, as they would fill the memory.


@jax.checkpoint
def _by_head(q, k, v, g_SBAG):
    """One decay per head and token: a factor of every score."""
    factor_SBAGH, read_SBAG, write_SBAG, keep_SBA1 = decays(g_SBAG)
    p_SBAGH = einsum("SBAGK,SBAHK->SBAGH", q, k) * factor_SBAGH
    y = einsum("SBAGH,SBAHV->SBAGV", p_SBAGH.astype(v.dtype), v)
    read = q * read_SBAG[..., None].astype(q.dtype)
    write = k * write_SBAG[..., None].astype(k.dtype)
    return y, read, write, keep_SBA1


def decays(g_SBAG):
    """exp(g_{j+1} + .. + g_i) from j to i, 0 where j > i; from before the chunk to i; from j to the
    chunk's end; and over the whole chunk: [.., G, G], [.., G], [.., G] and [.., 1]."""
    # Differences of long sums would lose the small decays among the large. What is a multiple of
    # GRAIN adds up exactly, over LONGEST tokens at most, and the sum of the rest is small.
    coarse = jax.lax.stop_gradient(jnp.round(g_SBAG / GRAIN) * GRAIN)
    coarse, fine = jnp.cumsum(coarse, axis=-1), jnp.cumsum(g_SBAG - coarse, axis=-1)
    from_j, to_i, last = (..., None, slice(None)), (..., slice(None), None), (..., slice(-1, None))

    def between(i, j):
        return (coarse[i] - coarse[j]) + (fine[i] - fine[j])

    # Where i = j nothing lies between, so that no rounded difference may pass a gradient.
    G = g_SBAG.shape[-1]
    i, j = np.arange(G)[:, None], np.arange(G)
    to_i_GH = jnp.where(i > j, between(to_i, from_j), np.where(i == j, 0, -np.inf))
    to_last_G = jnp.where(j < G - 1, between(last, ...), 0)
    total = coarse + fine
    return jnp.exp(to_i_GH), jnp.exp(total), jnp.exp(to_last_G), jnp.exp(total[last])


@jax.checkpoint
def _by_channel(q, k, v, g_SBAGK):
    """One decay per channel: blocks of 1, 2, 4 .. tokens are joined by pairs until one is left.

    A query in the right block of a pair meets a key in the left one by way of their border, with
    the decay from the border to the query, `since`, and from the key to the border, `until`.
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
    """The left and the right blocks of `size` tokens of all P pairs, each [S, B, A, P, size, K]."""
    S, B, A, G, K = x_SBAGK.shape
    pairs = x_SBAGK.reshape(S, B, A, G // (2 * size), 2, size, K)
    return pairs[:, :, :, :, 0], pairs[:, :, :, :, 1]


def _whole(left, right):
    """The inverse of `_halves`: [S, B, A, G, K]."""
    S, B, A, P, size, K = left.shape
    return jnp.stack([left, right], axis=4).reshape(S, B, A, 2 * P * size, K)
