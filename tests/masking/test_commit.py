"""Conditions of pixels: what is known, how the rest is padded, and which tokens it reaches."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.masking import commit

T, H, W = 5, 8, 12


def video(seed=0):
    return np.random.default_rng(seed).standard_normal((2, T, H, W, 3)).astype(np.float32)


def padded(kind, clips, given=1):
    chosen = commit.stacked([commit.condition(kind, T, (H, W), given)] * len(clips))
    return np.asarray(commit.padded(jnp.asarray(clips), chosen))


@pytest.mark.parametrize("kind", commit.KINDS)
def test_known_pixels_stay_and_unknown_ones_do_not_matter(kind):
    known = commit.condition(kind, T, (H, W)).is_known_THW
    assert 0 < known.mean() < 1
    clips, others = video(), video(1)
    others = np.where(known[..., None], clips, others)
    found = padded(kind, clips)
    np.testing.assert_array_equal(found[:, known], clips[:, known])
    np.testing.assert_array_equal(found, padded(kind, others))


def test_frames_are_padded_from_their_neighbours():
    clips = video()
    found = padded("prediction", clips, given=2)
    np.testing.assert_array_equal(found[:, 2:], np.repeat(clips[:, 1:2], T - 2, axis=1))
    found = padded("interpolation", clips, given=2)
    for step, frame in enumerate(range(2, T - 1), 1):
        blend = clips[:, 1] + step / (T - 2) * (clips[:, -1] - clips[:, 1])
        np.testing.assert_allclose(found[:, frame], blend, atol=1e-6)


def test_pictures_are_padded_by_their_edge_or_by_zeros():
    clips = video()
    found = padded("outpaint_central", clips)
    np.testing.assert_array_equal(found[:, :, 0, 0], clips[:, :, 2, 3])
    np.testing.assert_array_equal(found[:, :, -1, 4], clips[:, :, 5, 4])
    found = padded("inpaint_central", clips)
    assert (found[:, :, 2:6, 3:9] == 0).all()


def test_bands_move_from_side_to_side():
    known = commit.condition("outpaint_moving", T, (H, W)).is_known_THW
    assert known[0, :, : W // 2].all() and not known[0, :, W // 2 :].any()
    assert known[-1, :, W // 2 :].all() and not known[-1, :, : W // 2].any()
    hidden = commit.condition("inpaint_moving", T, (H, W)).is_known_THW
    np.testing.assert_array_equal(hidden, ~known)


@pytest.mark.parametrize("kind", commit.KINDS)
def test_a_cell_is_reached_if_any_of_its_pixels_is_known(kind):
    known = commit.condition(kind, T, (H, W)).is_known_THW
    found = commit.cells(known, 3, (2, 3))
    groups = [known[:1], known[1:3], known[3:]]
    for t, group in enumerate(groups):
        for n in range(6):
            row, column = divmod(n, 3)
            tile = group[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert found[t, n] == tile.any()
