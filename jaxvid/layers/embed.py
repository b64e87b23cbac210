"""Positions and timesteps: rotary angles over (t, h, w), fixed sin-cos grids, timestep features."""

import jax
import jax.numpy as jnp
import numpy as np


def sinusoid(position, width: int, base: float = 10_000.0) -> jax.Array:
    """[cos | sin] features of `position`, any shape -> [..., width] float32.

    Frequencies base^(-i / (width / 2)), as in DiT (Peebles and Xie 2023); `width` is even.
    """
    half = width // 2
    frequency_K = np.exp(-np.log(base) * np.arange(half) / half).astype(np.float32)
    angle = jnp.asarray(position, jnp.float32)[..., None] * frequency_K
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def grid_sincos(grid: tuple[int, int], width: int) -> jax.Array:
    """Fixed sin-cos embedding of a frame's (H, W) tokens -> [N, width] float32, half per axis."""
    height, columns = grid
    h_N, w_N = (axis.reshape(-1) for axis in np.mgrid[:height, :columns])
    half = width // 4 * 2
    embedding_ND = jnp.concatenate([sinusoid(h_N, half), sinusoid(w_N, half)], axis=-1)
    return jnp.pad(embedding_ND, ((0, 0), (0, width - 2 * half)))


def rotary_angles(
    frame_T, grid: tuple[int, int], width: int, cycle: int | None = None, base: float = 10_000.0
):
    """Angles of 3-D rotary embedding -> [T, N, width // 2] float32, numpy if `frame_T` is numpy.

    frame_T: absolute frame indices, integers, so the length of a stream is unbounded. grid: (H, W)
    of a frame's tokens. Time and the axes of the grid longer than one share the half-width evenly,
    one band per axis; time gets the remainder (Su et al. 2021). cycle: frames after which the
    angles of time repeat (`_harmonics`), None = never.
    """
    xp = np if isinstance(frame_T, np.ndarray) else jnp
    height, columns = grid
    h_N, w_N = (axis.reshape(-1) for axis in np.mgrid[:height, :columns])
    spatial = [axis_N for axis_N, extent in ((h_N, height), (w_N, columns)) if extent > 1]
    half = width // 2
    share = half // (1 + len(spatial))
    shape = (len(frame_T), height * columns)

    def band(position, size):
        frequency_K = (base ** (-np.arange(size) / max(size, 1))).astype(np.float32)
        return xp.broadcast_to(_angles(position, frequency_K), (*shape, size))

    of_time = half - share * len(spatial)
    if cycle is None:
        bands = [band(frame_T[:, None], of_time)]
    else:
        turns = np.arange(cycle)[:, None] * _harmonics(cycle, of_time) % cycle
        angle_TK = xp.take((2 * np.pi / cycle * turns).astype(np.float32), frame_T % cycle, axis=0)
        bands = [xp.broadcast_to(angle_TK[:, None], (*shape, of_time))]
    bands += [band(axis_N[None], share) for axis_N in spatial]
    return xp.concatenate(bands, axis=-1)


def _harmonics(cycle: int, size: int) -> np.ndarray:
    """Whole turns per cycle of `size` channels, int64, in ascending order.

    `size` distinct numbers from 1 to cycle // 2, spread geometrically; 1 is always among them. If
    there are fewer numbers than channels, all occur, which can express every function of the
    distance within the cycle (its Fourier series), and the other channels do not turn. More than
    cycle / 2 turns would be the angles of fewer turns backwards.
    """
    most = cycle // 2
    count = min(size, most)
    order = np.arange(count)
    spread = np.rint(most ** (order / max(count - 1, 1))).astype(np.int64)
    # Neighbours that round to the same number move up; the last one still ends at `most`.
    distinct = np.maximum.accumulate(spread - order) + order
    return np.pad(distinct, (0, size - count))


def _angles(position, frequency_K: np.ndarray):
    """position times frequency -> [..., K] float32, up to whole turns, for integers 0 to 2^31 - 1.

    The product of float32 numbers has an error of 0.06 rad at 10^6. So the angles of the four
    digits of a position in base 256 come from tables, less whole turns, and are added. The lowest
    digit keeps the plain product.
    """
    xp = np if isinstance(position, np.ndarray) else jnp
    digit = np.arange(256, dtype=np.float32)[:, None]
    angle = xp.take(digit * frequency_K, position & 255, axis=0)
    for place in (8, 16, 24):
        turns = np.fmod(2.0**place * digit * frequency_K.astype(np.float64), 2 * np.pi)
        angle = angle + xp.take(turns.astype(np.float32), (position >> place) & 255, axis=0)
    return angle


def rotate(x_BTNAK: jax.Array, angle_TNK) -> jax.Array:
    """Rotate the halves of the last axis by angles [T, N, K // 2]; computes in float32.

    The sines of numpy angles are constants of the program. XLA on CPU fuses all other sines into
    their users, where each element of x computes its own, forward and backward.
    """
    xp = np if isinstance(angle_TNK, np.ndarray) else jnp
    cos, sin = xp.cos(angle_TNK)[:, :, None], xp.sin(angle_TNK)[:, :, None]
    x = x_BTNAK.astype(jnp.float32)
    swapped = jnp.roll(x, x.shape[-1] // 2, axis=-1)
    cos, sin = xp.concatenate([cos, cos], axis=-1), xp.concatenate([-sin, sin], axis=-1)
    return (x * cos + swapped * sin).astype(x_BTNAK.dtype)
