"""What a training step asks of its clips: noise levels, targets, sizes of steps, and the past."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvid.diffusion import shortcut, timesteps
from jaxvid.diffusion.layouts import ALONE, TOGETHER, Layout
from jaxvid.diffusion.shortcut import Shortcut


class TrainingClip(NamedTuple):
    """The clips of one step, drawn.

    z_BTNC: clean frames, those that have no past first. t_BT int32: timesteps, 0 for frames that
    are read clean. is_target_BT: the frames whose prediction counts. size_BT int32: sizes of steps
    (`diffusion.shortcut`). larger_t, larger_size, is_larger: the same for the clips that learn
    larger steps, and which of their frames do; None if there are none. begin int32: the frame of
    the clips that stands first. kind int32: what the noisy frames of all clips read
    (`layouts.TOGETHER`, FORCED or ALONE).
    """

    z_BTNC: jax.Array
    t_BT: jax.Array
    is_target_BT: jax.Array
    size_BT: jax.Array
    begin: jax.Array | int
    kind: jax.Array
    larger_t: jax.Array | None = None
    larger_size: jax.Array | None = None
    is_larger: jax.Array | None = None


def draw(
    rng: jax.Array,
    z_BFNC: jax.Array,
    step: jax.Array,
    *,
    frames: int,
    sinks: int,
    draw_timesteps: Callable,
    num_steps: int,
    layout: Layout,
    history_dropout: float,
    shortcut_forcing: Shortcut,
) -> TrainingClip:
    """Draw a step's `TrainingClip` from clean clips.

    frames: of a clip, all or fewer than it has; see `part` for these and `sinks`. draw_timesteps: a
    function of `diffusion.timesteps`.
    """
    B, T = len(z_BFNC), frames
    rng_t, rng_prefix = jax.random.split(rng)
    z_BTNC, is_cut_BT = z_BFNC, jnp.zeros((B, T), bool)
    if z_BFNC.shape[1] > T:
        z_BTNC, is_cut_BT = part(jax.random.fold_in(rng, 5), z_BFNC, T, sinks)
    t_BT = draw_timesteps(rng_t, B, T, num_steps)
    begin, frames = 0, T
    if history_dropout:
        rng_drop = jax.random.fold_in(rng, 2)
        begin, z_BTNC, t_BT = drop_history(rng_drop, z_BTNC, t_BT, history_dropout, num_steps)
        # A first frame has no past to lose.
        is_cut_BT = jnp.roll(is_cut_BT, -begin, axis=1).at[:, 0].set(False)
        frames = T - begin
    t_BT, prefix_B = timesteps.clean_prefix(rng_prefix, t_BT, layout.prefix, frames)
    is_target_BT = jnp.arange(T) >= prefix_B[:, None]
    kind = jax.random.choice(jax.random.fold_in(rng, 3), 3, p=jnp.array(layout.kinds))
    if layout.together < 1:
        iid_BT, is_iid = timesteps.iid(rng_t, B, T, num_steps), kind != TOGETHER
        t_BT, is_target_BT = jnp.where(is_iid, iid_BT, t_BT), is_iid | is_target_BT
    is_target_BT &= (jnp.arange(T) < frames) & ~(is_cut_BT & (kind != ALONE))

    size_BT = jnp.zeros_like(t_BT)
    clip = TrainingClip(z_BTNC, t_BT, is_target_BT, size_BT, begin, kind)
    if not shortcut_forcing.finest:
        return clip
    rows, rng_size = shortcut_forcing.rows(B), jax.random.fold_in(rng, 4)
    larger = shortcut.draw(rng_size, t_BT[rows].shape, shortcut_forcing.finest, num_steps)
    is_larger = is_target_BT[rows] & (step >= shortcut_forcing.after)
    return clip._replace(
        t_BT=t_BT.at[rows].set(jnp.where(is_larger, larger[0], t_BT[rows])),
        size_BT=size_BT.at[rows].set(jnp.where(is_larger, larger[1], 0)),
        larger_t=larger[0],
        larger_size=larger[1],
        is_larger=is_larger,
    )


def part(rng: jax.Array, z_BFNC: jax.Array, frames: int, sinks: int) -> tuple[jax.Array, jax.Array]:
    """(z_BTNC, is_cut_BT): `frames` successive frames of each clip, from a frame drawn for each.

    With `sinks` the frames after so many come from a random later place of the clip, as if those
    between had left the window. Anchored sinks have the same positions either way. is_cut_BT: the
    frame that has lost those just before it, which no frame has in sampling. One frame alone after
    the sinks stays where it is, for nothing would be learned from it.
    """
    B, F = z_BFNC.shape[:2]
    rng_first, rng_gap = jax.random.split(rng)
    first_B = jax.random.randint(rng_first, (B,), 0, F - frames + 1)
    gap_B = jnp.zeros(B, jnp.int32)
    if 0 < sinks < frames - 1:
        gap_B = jax.random.randint(rng_gap, (B,), 0, F - frames + 1 - first_B)
    frame_T = jnp.arange(frames)
    frame_BT = first_B[:, None] + frame_T + gap_B[:, None] * (frame_T >= sinks)
    z_BTNC = jnp.take_along_axis(z_BFNC, frame_BT[:, :, None, None], axis=1)
    return z_BTNC, (frame_T == sinks) & (gap_B > 0)[:, None]


def drop_history(
    rng: jax.Array, z_BTNC: jax.Array, t_BT: jax.Array, probability: float, num_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(begin, z_BTNC, t_BT) at the rate of `history_dropout`.

    The frames from `begin` on come first, and the dropped ones last, where none of them reads
    them. begin is that of the batch, int32 below T, mostly 0.
    """
    B, T = t_BT.shape
    rng_whether, rng_begin, rng_clip, rng_t = jax.random.split(rng, 4)
    is_iid_B1 = jax.random.bernoulli(rng_clip, probability, (B, 1))
    iid_BT = timesteps.iid(rng_t, B, T, num_steps)
    dropped = jax.random.bernoulli(rng_whether, probability) & (T > 1)
    begin = jnp.where(dropped, jax.random.randint(rng_begin, (), 1, max(T, 2), jnp.int32), 0)
    return begin, jnp.roll(z_BTNC, -begin, axis=1), jnp.where(is_iid_B1, iid_BT, t_BT)
