"""Video <-> patches of pixels, plain or as Haar bands; exact inverses, no parameters."""

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxvid import checks


def patchify(video_BTHWC: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """[B, T t, H h, W w, C] -> [B, T, H, W, C t h w] for patch = (t, h, w), channel by channel."""
    t, h, w = patch
    return rearrange(video_BTHWC, "b (T t) (H h) (W w) c -> b T H W (c t h w)", t=t, h=h, w=w)


def unpatchify(x_BTHWD: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """The inverse of `patchify`."""
    t, h, w = patch
    return rearrange(x_BTHWD, "b T H W (c t h w) -> b (T t) (H h) (W w) c", t=t, h=h, w=w)


def haar(video_BTHWC: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """`patchify` into Haar bands instead of pixels (Cosmos tokenizer, NVIDIA 2025).

    Each level turns pairs along every side of the patch longer than 1 into low = (a + b) / 2 and
    high = (a - b) / 2. Bands come in the order LLL, LLH, .. HHH over (t, h, w), each with all
    channels of the level before. Raises UserError unless the sides are powers of two.
    """
    x = video_BTHWC
    for axes in _levels(patch):
        for axis in reversed(axes):
            a, b = (_every_second(x, axis, first) for first in (0, 1))
            x = jnp.concatenate([(a + b) / 2, (a - b) / 2], axis=-1)
    return x


def unhaar(x_BTHWD: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """The inverse of `haar`."""
    x = x_BTHWD
    for axes in reversed(_levels(patch)):
        for axis in axes:
            low, high = jnp.split(x, 2, axis=-1)
            pairs = jnp.stack([low + high, low - high], axis=axis + 1)
            x = pairs.reshape(*low.shape[:axis], 2 * low.shape[axis], *low.shape[axis + 1 :])
    return x


def _levels(patch):
    """The axes of [B, T, H, W, C] that each level halves."""
    is_power = not any(side & (side - 1) for side in patch)
    remedy = "Haar bands need powers of two; use patchify='linear'"
    checks.require(is_power, "patch", patch, remedy)
    depth = max(patch).bit_length() - 1
    return [
        [axis for axis, side in enumerate(patch, start=1) if side > 2**level]
        for level in range(depth)
    ]


def _every_second(x, axis, first):
    return x[(slice(None),) * axis + (slice(first, None, 2),)]
