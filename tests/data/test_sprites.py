"""Sprites are a pure function of (split, index), and the oracle reads their captions back."""

import itertools

import numpy as np
import pytest

from configs.common import get_config
from jaxvid.data import sprites
from jaxvid.errors import UserError


def test_clips_are_repeatable_distinct_and_split():
    first = sprites.render(sprites.scene(5), 4, 32)
    np.testing.assert_array_equal(first, sprites.render(sprites.scene(5), 4, 32))
    assert (first != sprites.render(sprites.scene(6), 4, 32)).any()
    assert (first != sprites.render(sprites.scene(5, "validation"), 4, 32)).any()


def test_longer_clip_continues_the_shorter_and_stride_skips():
    view = sprites.scene(1)
    long = sprites.render(view, 13, 32, difficulty=1.0)
    np.testing.assert_array_equal(sprites.render(view, 5, 32, difficulty=1.0), long[:5])
    np.testing.assert_array_equal(sprites.render(view, 5, 32, stride=3, difficulty=1.0), long[::3])


def test_coverage_is_the_area_of_the_shape():
    for shape in sprites.SHAPES:
        attributes = sprites.Attributes("", "red", shape, "up")
        still = np.zeros(2)
        sprite = sprites.Sprite(attributes, 0.15, np.array([0.5, 0.45]), still, 0.3, 0.1)
        area = sprites._coverage(sprite, np.arange(3.0), 64).mean((1, 2))
        np.testing.assert_allclose(area, np.pi * 0.15**2, rtol=0.01)


def test_sprites_stay_inside_and_run_free_before_they_bounce():
    time = np.arange(0, 200, 0.5)
    for index in range(100):
        for sprite in sprites.scene(index).sprites:
            centre = sprite.centre(time)
            assert (centre >= sprite.reach - 1e-6).all()
            assert (centre <= 1 - sprite.reach + 1e-6).all()
            along = centre @ np.array(sprites.DIRECTIONS[sprite.attributes.direction])
            assert (np.diff(along[:9]) > 0).all()


def test_difficulty_leaves_the_ground_plain_or_textures_it():
    view = sprites.scene(0)
    assert np.ptp(sprites._ground(view, 32, 0.0)) == 0
    assert sprites._ground(view, 32, 1.0).std() > 0.02


def test_sprites_of_a_clip_differ():
    counts = set()
    for index in range(200):
        attributes = [sprite.attributes for sprite in sprites.scene(index).sprites]
        counts.add(len(attributes))
        assert len({a.colour for a in attributes}) == len(attributes)
        assert len({a.size for a in attributes}) == len(attributes)
    assert counts == {1, 2, 3}


def test_caption_and_label():
    pair = (
        sprites.Attributes("", "red", "square", "left"),
        sprites.Attributes("small", "blue", "circle", "up"),
    )
    assert sprites.caption(pair) == "a red square moves left, a small blue circle moves up"
    every = itertools.product(sprites.SHAPES, sprites.COLOURS)
    labels = [sprites.label(sprites.Attributes("", c, s, "up")) for s, c in every]
    assert sorted(labels) == list(range(sprites.NUM_CLASSES))


def test_scenes_can_be_made_simpler():
    """Fewer sprites, fewer sizes, and none that turns."""
    for most, sizes in ((1, 1), (2, 2), (1, 3)):
        views = [sprites.scene(i, "train", most, sizes, turning=False) for i in range(40)]
        balls = [ball for view in views for ball in view.sprites]
        assert {len(view.sprites) for view in views} == set(range(1, most + 1))
        assert {ball.attributes.size for ball in balls} == set(list(sprites.SIZES)[:sizes])
        assert all(ball.angle == ball.spin == 0 for ball in balls)
    assert any(ball.spin for i in range(9) for ball in sprites.scene(i).sprites)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sizes": 4}, "sizes=4: "),
        ({"sizes": 1, "max_sprites": 2}, "max_sprites=2: .*use 1 to sizes=1"),
        ({"max_sprites": 0}, "max_sprites=0: "),
    ],
)
def test_sprites_that_cannot_be_are_refused(fields, words):
    config = get_config().data
    config.update(fields)
    with pytest.raises(UserError, match=f"^{words}"):
        sprites.Source(config, "train")
