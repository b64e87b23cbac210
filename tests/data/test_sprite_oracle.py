"""The oracle names what was drawn, and nothing else counts as a clip of sprites."""

import dataclasses

import numpy as np
import pytest

from jaxvid.data import sprite_oracle, sprites


def hidden_share(view, frames):
    """Largest share of any sprite that the ones painted after it hide, on average over time."""
    time, size = np.arange(frames, dtype=float), 32
    covers = [sprites._coverage(view.sprites[i], time, size) for i in view.painting]
    shares = [0.0]
    for i, cover in enumerate(covers[:-1]):
        over = np.max(covers[i + 1 :], axis=0)
        shares.append((cover * over).sum() / cover.sum())
    return max(shares)


def accuracy(size, difficulty, noise=0.0):
    """Share of the clips without heavy occlusion whose whole description is read back."""
    rng, right = np.random.default_rng(0), []
    for index in range(100):
        view = sprites.scene(index, "validation")
        if hidden_share(view, 16) < 0.25:
            video = sprites.render(view, 16, size, difficulty=difficulty)
            video = np.clip(video + noise * rng.standard_normal(video.shape), 0, 255)
            right.append(sprite_oracle.describe(video.astype(np.uint8)) == view.description)
    assert len(right) > 70
    return np.mean(right)


@pytest.mark.parametrize(("size", "difficulty"), [(64, 0.0), (64, 1.0), (32, 1.0)])
def test_oracle_reads_the_caption_from_pixels(size, difficulty):
    assert accuracy(size, difficulty) >= 0.97


def test_oracle_bears_noise():
    assert accuracy(32, 0.25, noise=15.0) >= 0.95


def test_oracle_sees_the_mirrored_and_the_reversed_clip():
    mirror = {"left": "right", "right": "left", "up": "up", "down": "down"}
    singles = [i for i in range(60) if len(sprites.scene(i).sprites) == 1]
    for index in singles:
        view = sprites.scene(index)
        [truth] = view.description.sprites
        video = sprites.render(view, 7, 64)
        [seen] = sprite_oracle.describe(video[:, :, ::-1]).sprites
        assert seen == truth._replace(direction=mirror[truth.direction])
        [seen] = sprite_oracle.describe(video[::-1]).sprites
        assert seen.direction != truth.direction


def test_oracle_finds_nothing_in_noise_or_on_bare_ground():
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    assert len(sprite_oracle.describe(np.full((8, 32, 32, 3), 90, np.uint8)).sprites) == 0
    still = sprites.render(sprites.scene(2), 1, 64).repeat(4, axis=0)
    assert all(sprite.direction == "" for sprite in sprite_oracle.describe(still).sprites)
    assert sprite_oracle.describe(noise).caption == ""


def ball(colour, shape, start, velocity=(0.04, 0.0), size=""):
    """A sprite that does not turn."""
    radius = np.mean(sprites.SIZES[size])
    attributes = sprites.Attributes(size, colour, shape, "right")
    return sprites.Sprite(attributes, radius, np.array(start), np.array(velocity), 0.3, 0.0)


def drawn(*balls, frames=16, size=32):
    """Video of sprites on a grey ground, the last in front."""
    view = sprites.Scene(balls, tuple(range(len(balls))), 0.4, sprites.scene(0).waves)
    return sprites.render(view, frames, size)


@pytest.mark.parametrize(
    ("size", "options"),
    [(24, dict(most=1, sizes=1, turning=False)), (32, dict(most=2)), (64, dict(most=2))],
)
def test_real_clips_are_read_as_drawn(size, options):
    """Those of the default preset, and harder ones."""
    views = [sprites.scene(index, "validation", **options) for index in range(150)]
    found = [sprite_oracle.steady_sprites(sprites.render(view, 16, size)) for view in views]
    truth = [{(a.colour, a.shape) for a in view.description.sprites} for view in views]
    assert np.mean([bool(pairs) for pairs in found]) >= 0.95
    assert np.mean([set(p) == t for p, t in zip(found, truth) if p]) >= 0.97


@pytest.mark.parametrize("shape", sprites.SHAPES)
def test_a_sprite_may_touch_the_border_and_pass_behind_another(shape):
    small = ball("cyan", shape, (0.2, 0.5), (0.05, 0.0), "small")
    at_border = ball("red", shape, (0.21, 0.21), (0.0, 0.05))
    still = ball("red", "circle", (0.6, 0.5), (0.0, 0.0), "large")
    assert sprite_oracle.steady_sprites(drawn(at_border)) == (("red", shape),)
    video = drawn(small, still)
    seen = (video[..., 2] > 200) & (video[..., 0] < 80)
    assert seen[0].any() and not seen[8].any() and seen[15].any()  # it is hidden in between
    assert sprite_oracle.steady_sprites(video) == (("red", "circle"), ("cyan", shape))


def test_slight_noise_and_blur_are_borne():
    video = drawn(ball("green", "triangle", (0.25, 0.3)), ball("blue", "cross", (0.3, 0.75)))
    noisy = video + 6.0 * np.random.default_rng(0).standard_normal(video.shape)
    soft = (video + np.roll(video, 1, 2).astype(float) + np.roll(video, 1, 1)) / 3
    for clip in (noisy, soft):
        clip = np.clip(clip, 0, 255).astype(np.uint8)
        assert sprite_oracle.steady_sprites(clip) == (("green", "triangle"), ("blue", "cross"))


def haze(centre_T2, width, size=32):
    """Red Gaussians on grey; uint8 [T, H, W, 3]."""
    pixel = (np.arange(size) + 0.5) / size
    y, x = (pixel - centre_T2[:, i : i + 1] for i in (1, 0))
    mass = np.exp(-(x[:, None, :] ** 2 + y[:, :, None] ** 2) / (2 * width**2))[..., None]
    return np.rint(102 + mass * (255 * np.array(sprites.COLOURS["red"]) - 102)).astype(np.uint8)


def counterexamples():
    rng, late = np.random.default_rng(0), slice(8, None)
    square = ball("red", "square", (0.3, 0.3))
    video, grey = drawn(square), np.full((16, 32, 32, 3), 102, np.uint8)
    yield "empty", grey
    yield "noise", rng.integers(0, 256, grey.shape, dtype=np.uint8)
    path_T2 = np.stack([np.linspace(0.3, 0.7, 16), np.full(16, 0.5)], axis=1)
    for width in (0.06, 0.1, 0.14):
        yield f"a haze of {width}", haze(path_T2, width)
    crowd = np.kron(rng.random((16, 8, 8, 3)) > 0.5, np.ones((1, 4, 4, 1)))
    yield "a crowd of colours", (255 * crowd).astype(np.uint8)
    half = np.kron(rng.random((16, 8, 8, 1)) > 0.7, np.ones((1, 4, 4, 1)))
    yield "scattered squares of one colour", np.where(half, np.uint8([230, 38, 38]), grey)
    yield "a pale sprite", (0.4 * video + 0.6 * grey).astype(np.uint8)
    for name, other in {
        "colour": ball("blue", "square", (0.3, 0.3)),
        "shape": ball("red", "triangle", (0.3, 0.3)),
        "place": dataclasses.replace(square, start=np.array([0.2, 0.8])),
    }.items():
        yield f"the {name} changes", np.concatenate([video[:8], drawn(other)[late]])
    yield "it vanishes", np.concatenate([video[:8], grey[late]])
    yield "it appears", np.concatenate([grey[:8], video[late]])
    yield "two of one colour", drawn(square, ball("red", "square", (0.3, 0.75)))
    places = [(0.2, 0.2), (0.2, 0.7), (0.6, 0.2), (0.6, 0.7)]
    small = [ball(c, "circle", p, (0.01, 0), "small") for c, p in zip(sprites.COLOURS, places)]
    yield "four sprites", drawn(*small)
    below_T2 = path_T2 + np.array([0.0, 0.25])
    sharp = drawn(ball("cyan", "square", (0.3, 0.2), size="small"))
    yield "a sprite and a haze", np.minimum(sharp, haze(below_T2, 0.12))


@pytest.mark.parametrize(
    "video", [pytest.param(video, id=name) for name, video in counterexamples()]
)
def test_what_is_no_steady_sprite_does_not_count(video):
    assert sprite_oracle.steady_sprites(video) == ()
