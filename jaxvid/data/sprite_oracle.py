"""The oracle of sprites: reads them back from pixels alone, without a network.

A colour is found by hue, a shape by moments that do not depend on position, rotation and size.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxvid.data.sprites import (
    COLOURS,
    FREE_RUN,
    SHAPES,
    SIZES,
    Attributes,
    Description,
    caption,
)

SMALLEST, LARGEST = SIZES["small"][0], SIZES["large"][1]
TOLD = ("colour", "shape", "direction")  # attributes that `agreement` compares
# Limits of `steady_sprites`. Areas are shares of the picture, or of the sprite where so stated.
SPECK = 0.25 * np.pi * SMALLEST**2  # area of a colour that counts as none
AREA = 0.25  # change of the area of a sprite that stands alone, and coverage away from it
WHOLE = 0.95  # area of a sprite that others touch and do not hide
READABLE = 0.15  # share of the frames in which a sprite must stand alone or be whole
FAR = 0.4  # distance of the moments from those of the ideal shape
MISREAD = 0.15  # share of these frames in which its shape may be misread
SOFT = 3.0  # blur: 6 sum a (1 - a) / area of coverage a; 2 w / r for a disc with an edge of width w
PALE = 0.75  # chroma inside a sprite, in that of its colour


def steady_sprites(video_THWC: np.ndarray) -> tuple[tuple[str, str], ...]:
    """(colour, shape) of the sprites of a clip, uint8 [T, H, W, 3], if they stay the same, else ().

    A clip counts if one to three colours are seen and each is one sprite throughout: of a size that
    sprites have, saturated, with an edge and not a haze, and moving by less than its diameter per
    frame. In the frames in which it stands alone it has its whole area. In these and in all others
    that show it whole it has one shape, which may be misread in one frame of seven. It may be
    hidden where it touches another sprite. Frames need 24 pixels a side or more.
    """
    share_VTHW = np.clip(_chroma_share(video_THWC), 0.0, 1.0)
    cover_VTHW = _cover(share_VTHW)
    most_V = cover_VTHW.mean((2, 3)).max(1)
    seen = np.flatnonzero(most_V > SPECK)
    if not 1 <= len(seen) <= 3 or most_V[most_V <= SPECK].sum() > SPECK:
        return ()
    whole_THW = cover_VTHW[seen].sum(0)
    shapes = [_shape(cover_VTHW[v], share_VTHW[v], whole_THW - cover_VTHW[v]) for v in seen]
    return () if None in shapes else tuple(zip(np.array(list(COLOURS))[seen].tolist(), shapes))


def _shape(cover_THW, share_THW, others_THW):
    """The shape of one colour, given the coverage by others; None unless it is a steady sprite."""
    radius = _radius(cover_THW)
    if not 0.85 * SMALLEST < radius < 1.15 * LARGEST:
        return None
    full = np.pi * radius**2
    near_THW = np.abs(_centred(cover_THW)[0]) < 2.0 * radius
    strewn_T = (cover_THW * ~near_THW).mean((1, 2)) / full
    cover_THW, share_THW = cover_THW * near_THW, share_THW * near_THW
    z_THW, centre_T2 = _centred(cover_THW)
    area_T = cover_THW.mean((1, 2)) / full
    is_gone_T = area_T < 0.05
    is_alone_T = ~is_gone_T & ~(_grown(cover_THW > 0.25) & (others_THW > 0.25)).any((1, 2))
    # One that vanishes must have touched another one before, and comes back touching one.
    vanishes = is_gone_T[1:] & is_alone_T[:-1] | is_gone_T[:-1] & is_alone_T[1:]
    is_readable_T = is_alone_T | (area_T > WHOLE)
    if (
        vanishes.any()
        or (strewn_T > AREA).any()
        or (area_T > 1.0 + AREA).any()
        or (area_T[is_alone_T] < 1.0 - AREA).any()
        or is_readable_T.mean() < READABLE
    ):
        return None

    frames = np.flatnonzero(is_readable_T)
    moved = np.linalg.norm(np.diff(centre_T2[frames], axis=0), axis=1)
    if (moved > 2.0 * radius * np.diff(frames)).any():
        return None

    cover_THW, share_THW = cover_THW[frames], share_THW[frames]
    moments_T3 = _moments(cover_THW, z_THW[frames])
    distance_TS = np.abs(moments_T3[:, None] - np.array(list(_PROTOTYPES.values()))).sum(-1)
    shape = np.argmin(np.median(distance_TS, axis=0))
    is_read_T = (distance_TS.argmin(1) == shape) & (distance_TS[:, shape] < FAR)
    blur_T = 6.0 * (share_THW * (1.0 - share_THW)).mean((1, 2)) / full
    inside_T = np.quantile(share_THW.reshape(len(frames), -1), 1.0 - 0.25 * full, axis=1)
    is_right_T = is_read_T & (blur_T < SOFT) & (inside_T > PALE)
    return SHAPES[shape] if is_right_T.mean() >= 1.0 - MISREAD else None


def _grown(mask_THW):
    """The mask and all pixels next to it, also diagonally."""
    H, W = mask_THW.shape[1:]
    padded = np.pad(mask_THW, ((0, 0), (1, 1), (1, 1)))
    shifts = [padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3)]
    return np.any(shifts, axis=0)


def describe(video_THWC: np.ndarray) -> Description:
    """Read size, colour, shape and direction back from uint8 [T, H, W, 3].

    The colour is found by hue, the shape by rotation-invariant moments, the direction by the
    displacement before the first bounce. Frames need about 32 pixels a side or more; frames in
    which a sprite is hidden do not count for it.
    """
    cover_VTHW = _cover(_chroma_share(video_THWC))
    found = [_read_sprite(cover_VTHW[i], colour) for i, colour in enumerate(COLOURS)]
    seen = [pair for pair in found if pair is not None]
    seen.sort(key=lambda pair: -pair[0])
    sprites = tuple(attributes for _, attributes in seen)
    return Description(caption(sprites), sprites)


def agreement(told: Sequence[Attributes], seen: Sequence[Attributes]) -> dict[str, float]:
    """How much of what a caption tells is seen: {"colour", "shape", "direction", "caption"}.

    Every sprite of the caption is matched with one that is seen, or with none, each only once, so
    that the most attributes agree; of equal matchings the one with more colours right, then more
    shapes. An attribute scores the share of the sprites told that have it right. The caption scores
    1 if these attributes of all its sprites are right and no other sprite is seen, else 0.
    """
    others = [*seen, *[None] * (len(told) - len(seen))]
    best = max(
        _agreeing(told, chosen) for chosen in map(list, itertools.permutations(others, len(told)))
    )
    shares = {name: count / len(told) for name, count in zip(TOLD, best[1:])}
    is_whole = best[0] == len(TOLD) * len(told) and len(seen) == len(told)
    return {**shares, "caption": float(is_whole)}


def _agreeing(told, chosen):
    """(attributes that agree, of these colours, shapes and directions) of pairs of sprites."""
    counts = [
        sum(getattr(one, name) == getattr(other, name, None) for one, other in zip(told, chosen))
        for name in TOLD
    ]
    return sum(counts), *counts


def lone_sprite(video_THWC: np.ndarray) -> tuple[str, str]:
    """(colour, shape) of uint8 [T, H, W, 3] with one sprite in sight; frames as of `describe`.

    The colour is "" if none or several are seen. The shape is "" if that colour is not one sprite
    of a size that sprites have, as where it is drawn twice.
    """
    cover_VTHW = _cover(_chroma_share(video_THWC))
    seen = np.flatnonzero(cover_VTHW.mean((2, 3)).max(1) > SPECK)
    if len(seen) != 1:
        return "", ""
    colour = list(COLOURS)[seen[0]]
    found = _read_sprite(cover_VTHW[seen[0]], colour)
    if found is None or _radius(cover_VTHW[seen[0]]) > 1.15 * LARGEST:
        return colour, ""
    return colour, found[1].shape


def _chroma_share(video_THWC):
    """Chroma [V, T, H, W] of each pixel in that of each colour, 0 at pixels nearer to another.

    V counts the colours. It is 1 inside a sprite, one half on its edge and about 0 on the ground.
    """
    chroma_THW = _chroma(np.asarray(video_THWC, np.float32) / 255.0)
    colour_V = _chroma(np.array(list(COLOURS.values()), np.float32))[:, None, None, None]
    share_VTHW = (chroma_THW * np.conj(colour_V)).real / np.abs(colour_V) ** 2
    nearest_THW = np.argmax(share_VTHW, axis=0)
    return share_VTHW * (nearest_THW == np.arange(len(COLOURS))[:, None, None, None])


def _cover(share_VTHW):
    """Coverage with steeper edges: a noisy ground or a blurred edge keeps the half-way line."""
    return np.clip(2.0 * share_VTHW - 0.5, 0.0, 1.0)


def _chroma(rgb):
    """Colour without its grey part, as a complex number; its angle is the hue."""
    thirds = np.exp(2j * np.pi * np.arange(3) / 3).astype(np.complex64)
    return rgb @ thirds


def _read_sprite(cover_THW, colour):
    """Coverage of one colour -> (radius, Attributes), or None if there is no such sprite."""
    radius = _radius(cover_THW)
    if radius < 0.8 * min(low for low, _ in SIZES.values()):
        return None
    cover_THW = cover_THW * (np.abs(_centred(cover_THW)[0]) < 2.0 * radius)  # without stray pixels
    radius = _radius(cover_THW)
    size = min(SIZES, key=lambda name: abs(np.mean(SIZES[name]) - radius))
    area_T, full = cover_THW.mean((1, 2)), np.pi * radius**2
    shown_T = np.flatnonzero(area_T > 0.5 * full)  # half is enough for the direction
    cover_THW, clear_T = cover_THW[shown_T], area_T[shown_T] > 0.96 * full
    z_THW, centre_T2 = _centred(cover_THW)
    moments = np.median(_moments(cover_THW[clear_T], z_THW[clear_T]), axis=0)
    if moments[2] > 2.0:  # scattered pixels, not a shape
        return None
    shape = min(SHAPES, key=lambda name: np.abs(moments - _PROTOTYPES[name]).sum())
    return radius, Attributes(size, colour, shape, _read_direction(shown_T, centre_T2))


def _radius(cover_THW):
    """Radius of the disc of equal area, from the frames with the most coverage."""
    return float(np.sqrt(np.quantile(cover_THW.mean((1, 2)), 0.9) / np.pi))


def _centred(cover_THW):
    """Pixel positions relative to the centroid, complex [T, H, W], and the centroids [T, 2]."""
    H, W = cover_THW.shape[1:]
    x_W, y_H = (np.arange(W) + 0.5) / W, (np.arange(H) + 0.5) / H
    mass_T = cover_THW.sum((1, 2)) + 1e-9
    x_T, y_T = cover_THW.sum(1) @ x_W / mass_T, cover_THW.sum(2) @ y_H / mass_T
    z_THW = (x_W - x_T[:, None])[:, None, :] + 1j * (y_H - y_T[:, None])[:, :, None]
    return z_THW, np.stack([x_T, y_T], axis=1)


# (third harmonic, fourth harmonic, spread) of the ideal shapes; see _moments.
_PROTOTYPES = {
    "circle": (0.0, 0.0, 1.0),
    "square": (0.0, 0.4286, 1.0472),
    "triangle": (0.6589, 0.0, 1.2092),
    "cross": (0.0, 0.6840, 1.3356),
}


def _moments(cover_THW, z_THW):
    """Moments [T, 3] invariant to rotation, position and scale.

    |sum w z^n| / sum w |z|^n for n = 3, 4, and 2 pi sum w |z|^2 / (sum w)^2 (1 for a disc).
    """

    def total(values_THW):
        return (cover_THW * values_THW).mean((1, 2))

    r_THW = np.abs(z_THW)
    third_T, fourth_T = (np.abs(total(z_THW**n)) / total(r_THW**n) for n in (3, 4))
    return np.stack([third_T, fourth_T, 2 * np.pi * total(r_THW**2) / total(1.0) ** 2], axis=1)


def _read_direction(frame_T, centre_T2):
    """The first direction of a track [T, 2], from its free run; "" if it stays."""
    early = np.searchsorted(frame_T, frame_T[0] + FREE_RUN, side="right")
    run = centre_T2[: max(early, 2)][-1] - centre_T2[0]
    axis = int(np.argmax(np.abs(run)))
    if abs(run[axis]) < 0.01:
        return ""
    return ("left", "right", "up", "down")[2 * axis + int(run[axis] > 0)]
