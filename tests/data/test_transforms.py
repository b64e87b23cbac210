"""Window, crop, flip and range."""

import jax.numpy as jnp
import numpy as np

from jaxvid.data import transforms
from jaxvid.data.transforms import Window


def test_range_round_trips_in_numpy_and_jax():
    every = np.arange(256, dtype=np.uint8)
    for array in (every, jnp.asarray(every)):
        scaled = transforms.normalize(array)
        assert scaled.dtype == np.float32
        assert (float(scaled[0]), float(scaled[-1])) == (-1.0, 1.0)
        np.testing.assert_array_equal(transforms.to_uint8(scaled), every)
    np.testing.assert_array_equal(transforms.to_uint8(np.array([-3.0, 3.0])), [0, 255])


def test_window_starts_everywhere_and_never_overruns():
    window = Window(frames=4, size=8, stride=3)
    assert window.span == 10
    rng = np.random.default_rng(0)
    assert {window.start(12, rng) for _ in range(100)} == {0, 1, 2}
    assert window.start(12, None) == 1
    assert window.start(10, rng) == 0


def test_crop_is_random_or_central_and_flip_mirrors():
    video = np.arange(2 * 8 * 11 * 3).reshape(2, 8, 11, 3)
    centre = Window(2, 8).augment(video, np.random.default_rng(0))
    np.testing.assert_array_equal(centre, video[:, :, 1:9])
    window = Window(2, 8, random_crop=True, flip=True)
    np.testing.assert_array_equal(window.augment(video, None), centre)
    rng = np.random.default_rng(0)
    seen = {window.augment(video, rng).tobytes() for _ in range(100)}
    expected = {
        np.ascontiguousarray(video[:, :, left : left + 8][:, :, ::turn]).tobytes()
        for left in range(4)
        for turn in (1, -1)
    }
    assert seen == expected


def test_cover_keeps_the_shape_of_the_picture():
    assert transforms.cover(240, 320, 128) == (128, 171)
    assert transforms.cover(320, 240, 64) == (85, 64)
    assert transforms.cover(50, 50, 64) == (64, 64)
