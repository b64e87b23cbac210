"""The key-value cache: the memory that softmax attention has of a stream."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxvid.layers import masks


class KVCache(NamedTuple):
    """Keys and values of the context and of S remembered frames.

    context_k_BMAK, context_v_BMAK: prefix tokens, M may be 0. k_BSNAK, v_BSNAK: one slot per
    frame, keys already rotated to their absolute frame. frame_S: int32, the frame in each slot,
    `masks.EMPTY` in an empty slot. length: int32, frames seen so far, which is also the index of
    the next frame. At the start of a stream S is 0 and the positions are numpy arrays, so the mask
    of a whole clip is known at trace time.
    """

    context_k_BMAK: Any
    context_v_BMAK: Any
    k_BSNAK: Any
    v_BSNAK: Any
    frame_S: Any
    length: Any

    def skip(self, frames):
        """The cache after as many frames of which it keeps nothing."""
        return self._replace(length=self.length + frames)


def start(context_k_BMAK, context_v_BMAK, tokens: int) -> KVCache:
    """The cache after the context and before the first frame, of `tokens` tokens per frame."""
    B, _, A, K = context_k_BMAK.shape
    empty_BSNAK = jnp.zeros((B, 0, tokens, A, K), context_k_BMAK.dtype)
    return KVCache(
        context_k_BMAK,
        context_v_BMAK,
        empty_BSNAK,
        empty_BSNAK,
        np.zeros((0,), np.int32),
        np.int32(0),
    )


def is_start(cache: KVCache) -> bool:
    """Whether no call has read frames yet, not even T = 0 frames: positions are still numpy."""
    return isinstance(cache.length, np.integer)


def next_frames(cache: KVCache, T: int):
    """The indices of the next T frames, int32 [T]; numpy at the start of a stream."""
    return cache.length + np.arange(T, dtype=np.int32)


def extend(cache: KVCache, k_BTNAK, v_BTNAK, position_T):
    """(k_BMAK, v_BMAK, position_M) of the context, the cached frames and then the new frames."""
    B, _, N, A, K = k_BTNAK.shape
    positions = [
        np.full(cache.context_k_BMAK.shape[1], masks.CONTEXT, np.int32),
        cache.frame_S.repeat(N),
        position_T.repeat(N),
    ]
    static = all(isinstance(p, np.ndarray) for p in positions)

    def flat(context, slots, new):
        frames = [part.reshape(B, part.shape[1] * N, A, K) for part in (slots, new)]
        return jnp.concatenate([context, *frames], axis=1)

    return (
        flat(cache.context_k_BMAK, cache.k_BSNAK, k_BTNAK),
        flat(cache.context_v_BMAK, cache.v_BSNAK, v_BTNAK),
        (np if static else jnp).concatenate(positions),
    )


def append(cache: KVCache, k_BTNAK, v_BTNAK, *, window: int | None, sinks: int) -> KVCache:
    """The cache after T more frames.

    With window None the cache grows and keeps every frame. Otherwise it has `sinks + window - 1`
    slots, at least sinks + 1: the first `sinks` frames stay, and the other slots are a ring. These
    are all the past frames that a later frame may see.
    """
    T = k_BTNAK.shape[1]
    frame_T = next_frames(cache, T)
    length = cache.length + np.int32(T)
    if window is None:
        return cache._replace(
            k_BSNAK=jnp.concatenate([cache.k_BSNAK, k_BTNAK], axis=1),
            v_BSNAK=jnp.concatenate([cache.v_BSNAK, v_BTNAK], axis=1),
            frame_S=jnp.concatenate([cache.frame_S, frame_T]),
            length=length,
        )
    ring = max(window - 1, 1)
    slots = sinks + ring
    kept = (frame_T < sinks) | (frame_T >= length - ring)
    slot_T = jnp.where(frame_T < sinks, frame_T, sinks + (frame_T - sinks) % ring)
    slot_T = jnp.where(kept, slot_T, slots)

    def write(old_BSNAK, new_BTNAK):
        if old_BSNAK.shape[1] == 0:
            old_BSNAK = jnp.zeros(
                (new_BTNAK.shape[0], slots, *new_BTNAK.shape[2:]), new_BTNAK.dtype
            )
        return old_BSNAK.at[:, slot_T].set(new_BTNAK, mode="drop")

    frame_S = cache.frame_S if len(cache.frame_S) else jnp.full(slots, masks.EMPTY, jnp.int32)
    return cache._replace(
        k_BSNAK=write(cache.k_BSNAK, k_BTNAK),
        v_BSNAK=write(cache.v_BSNAK, v_BTNAK),
        frame_S=frame_S.at[slot_T].set(frame_T, mode="drop"),
        length=length,
    )
