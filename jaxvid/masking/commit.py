"""COMMIT: conditions of pixels for masked tokens (MAGVIT, Yu et al. 2023, section 3.2).

One mask over pixels says what is known of a clip. The rest is padded, the padded clip is encoded,
and its tokens stand where known pixels reach, in place of the mask token. So one network predicts
frames, interpolates, and fills in or extends pictures.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KINDS = (
    "prediction",
    "interpolation",
    "outpaint_central",
    "outpaint_vertical",
    "outpaint_horizontal",
    "outpaint_moving",
    "inpaint_central",
    "inpaint_moving",
)
_PADDED_BY_ZEROS = ("outpaint_moving", "inpaint_central", "inpaint_moving")


class Condition(NamedTuple):
    """What is known of a clip, and the pixels that pad the rest.

    is_known_THW: bool. first_THW, second_THW: flat indices of two known pixels for every pixel,
    int32. weight_THW: float32, the share of the second one; `keep_THW` 0 pads by zeros.
    """

    is_known_THW: np.ndarray
    first_THW: np.ndarray
    second_THW: np.ndarray
    weight_THW: np.ndarray
    keep_THW: np.ndarray


def condition(kind: str, frames: int, size: tuple[int, int], given: int = 1) -> Condition:
    """The Condition of a kind, for clips of `frames` frames of (H, W) pixels.

    prediction: the first `given` frames are known; the last of them is repeated. interpolation: the
    first `given` frames and the last one; blends of the two neighbours pad. outpaint_central: the
    middle half of rows and columns, outpaint_vertical: the middle half of the rows,
    outpaint_horizontal: of the columns; the nearest known pixel pads. inpaint_central: all but the
    middle half; zeros pad. moving: a band of half the columns that moves from the left side to the
    right one is known (outpaint) or unknown (inpaint); zeros pad.
    """
    T, (H, W) = frames, size
    t, h, w = np.meshgrid(np.arange(T), np.arange(H), np.arange(W), indexing="ij")
    known, first, second = np.zeros((T, H, W), bool), [t, h, w], [t, h, w]
    weight = np.zeros((T, H, W))

    def middle(x, extent):
        return (x >= extent // 4) & (x < extent - extent // 4)

    def nearest(x, extent):
        return np.clip(x, extent // 4, extent - extent // 4 - 1)

    if kind == "prediction":
        known, first = t < given, [np.minimum(t, given - 1), h, w]
    elif kind == "interpolation":
        known = (t < given) | (t == T - 1)
        first = [np.where(t == T - 1, t, np.minimum(t, given - 1)), h, w]
        second = [np.where(known, t, T - 1), h, w]
        weight = np.where(known, 0.0, (t - given + 1) / (T - given))
    elif kind == "outpaint_central":
        known, first = middle(h, H) & middle(w, W), [t, nearest(h, H), nearest(w, W)]
    elif kind == "outpaint_vertical":
        known, first = middle(h, H), [t, nearest(h, H), w]
    elif kind == "outpaint_horizontal":
        known, first = middle(w, W), [t, h, nearest(w, W)]
    elif kind == "inpaint_central":
        known = ~(middle(h, H) & middle(w, W))
    else:
        left = np.rint(t / max(T - 1, 1) * (W - W // 2))
        band = (w >= left) & (w < left + W // 2)
        known = band if kind == "outpaint_moving" else ~band
    keep = known if kind in _PADDED_BY_ZEROS else np.ones_like(known)

    def flat(place):
        return np.ravel_multi_index(place, (T, H, W)).astype(np.int32)

    return Condition(
        known, flat(first), flat(second), weight.astype(np.float32), keep.astype(np.float32)
    )


def stacked(conditions: list[Condition]) -> Condition:
    """Conditions along a new leading axis, as a clip of a batch may choose among them."""
    return Condition(*map(np.stack, zip(*conditions)))


def padded(video_BTHWC: jax.Array, chosen: Condition) -> jax.Array:
    """The clips with only what is known of them, the rest padded. chosen: fields [B, T, H, W]."""
    B, *_, C = video_BTHWC.shape
    pixels_BLC = video_BTHWC.reshape(B, -1, C)

    def read(index):
        return jnp.take_along_axis(pixels_BLC, index.reshape(B, -1, 1), axis=1)

    weight_BL1 = chosen.weight_THW.reshape(B, -1, 1)
    blend = (1 - weight_BL1) * read(chosen.first_THW) + weight_BL1 * read(chosen.second_THW)
    return (blend * chosen.keep_THW.reshape(B, -1, 1)).reshape(video_BTHWC.shape)


def cells(is_known_THW: np.ndarray, latents: int, grid: tuple[int, int]) -> np.ndarray:
    """Whether known pixels reach a token: bool [T', N] of a causal tokenizer with square cells.

    The first latent holds the first frame, the others equal groups of the rest.
    """
    T, H, W = is_known_THW.shape
    rows, columns = grid
    tiles = is_known_THW.reshape(T, rows, H // rows, columns, W // columns).any((2, 4))
    rest = tiles[1:].reshape(latents - 1, -1, rows, columns).any(1)
    return np.concatenate([tiles[:1], rest]).reshape(latents, rows * columns)
