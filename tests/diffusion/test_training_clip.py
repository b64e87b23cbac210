"""What a training step draws of its clips: frames, and what the frames read."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.diffusion import timesteps, training_clip
from jaxvid.diffusion.layouts import ALONE, parse_layout
from jaxvid.diffusion.shortcut import Shortcut

FRAMES = jnp.arange(10.0)[None, :, None, None].repeat(512, 0)  # frame f holds the number f


def drawn(layout, sinks, frames=5, rng=None, history_dropout=0.0):
    return training_clip.draw(
        jax.random.key(0) if rng is None else rng,
        FRAMES,
        0,
        frames=frames,
        sinks=sinks,
        draw_timesteps=timesteps.iid,
        num_steps=100,
        layout=parse_layout(layout),
        history_dropout=history_dropout,
        shortcut_forcing=Shortcut(),
    )


def test_a_part_is_successive_frames_from_every_place():
    z_BTNC, is_cut_BT = training_clip.part(jax.random.key(0), FRAMES, 4, 0)
    frame_BT = np.asarray(z_BTNC[:, :, 0, 0], int)
    assert (np.diff(frame_BT) == 1).all() and not is_cut_BT.any()
    counts = np.bincount(frame_BT[:, 0])
    assert len(counts) == 7 and abs(counts - 512 / 7).max() < 40


def test_after_the_sinks_a_part_goes_on_at_every_later_place():
    z_BTNC, is_cut_BT = training_clip.part(jax.random.key(0), FRAMES, 5, 2)
    frame_BT = np.asarray(z_BTNC[:, :, 0, 0], int)
    steps_BT = np.diff(frame_BT)
    assert (steps_BT[:, [0, 2, 3]] == 1).all() and (steps_BT >= 1).all()
    assert set(map(tuple, frame_BT[:, [1, 2]])) == {
        (1 + first, 2 + later) for first in range(6) for later in range(first, 6)
    }
    np.testing.assert_array_equal(is_cut_BT[:, 2], steps_BT[:, 1] > 1)
    assert not np.asarray(is_cut_BT)[:, [0, 1, 3, 4]].any()


def test_a_frame_that_has_lost_its_past_is_no_target_but_as_an_image():
    forced, image = drawn("teacher_forced", sinks=1), drawn("images", sinks=1)
    lost_BT = np.diff(forced.z_BTNC[:, :, 0, 0], prepend=-1) > 1
    lost_BT[:, 0] = False
    assert lost_BT.any(1).mean() > 0.4
    np.testing.assert_array_equal(forced.is_target_BT, ~lost_BT)
    assert image.is_target_BT.all() and image.kind == ALONE
    assert drawn("teacher_forced", sinks=1, frames=10).is_target_BT.all()


def test_a_clip_that_also_drops_its_past_marks_the_frame_that_lost_it():
    for seed in range(8):
        clip = drawn("teacher_forced", sinks=3, rng=jax.random.key(seed), history_dropout=1.0)
        lost_BT = np.diff(clip.z_BTNC[:, :, 0, 0], prepend=-1) > 1
        lost_BT[:, 0] = False
        kept_T = np.arange(5) < 5 - int(clip.begin)
        np.testing.assert_array_equal(clip.is_target_BT, ~lost_BT & kept_T)


def test_every_clip_with_a_clean_prefix_has_a_target():
    for frames, sinks in ((2, 1), (4, 3), (4, 2), (3, 5)):
        assert drawn("clean_prefix", sinks, frames).is_target_BT.any(1).all()


def test_layouts_are_drawn_at_their_shares():
    layout = "clean_prefix=0.1,diffusion_forcing=0.2,teacher_forced=0.4,images=0.3"
    rngs = jax.random.split(jax.random.key(0), 400)
    kinds = np.asarray(jax.jit(jax.vmap(lambda rng: drawn(layout, 0, rng=rng).kind))(rngs))
    shares = np.bincount(kinds, minlength=3) / 400
    assert abs(shares - [0.3, 0.4, 0.3]).max() < 4 * np.sqrt(0.24 / 400)
