"""Clips that test memory: the same for every gap, silent in the gap, and read without error."""

import dataclasses
import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid import data
from jaxvid.data import needle, sprites, sprites_recall
from jaxvid.errors import UserError

NAMES = ("sprites_recall", "needle")


def fields(name, **changes):
    values = dict(
        **{"name": name, "frames": 30, "size": 24, "gap": (2, 8), "num_clips": 50, "stride": 1},
        **{"crop": "random", "flip": False, "difficulty": 0.0, "fps": 0.0},
    )
    return ConfigDict(values | changes)


def clips(name, split="validation", **changes):
    return data.make_source(fields(name, **changes), split)


def answer(source, index):
    """The scores of the real frames after the gap."""
    back = source.back(index)
    return source.scores(index, source.read(index)["video"][back : back + source.answer])


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_is_a_function_of_split_and_index(name):
    source, again, train = clips(name), clips(name), clips(name, "train")
    video = source.read(3, np.random.default_rng(0))["video"]
    assert video.shape == (30, 24, 24, 3) and video.dtype == np.uint8
    np.testing.assert_array_equal(video, again.read(3)["video"])
    assert (video != source.read(4)["video"]).any() and (video != train.read(3)["video"]).any()
    assert len(train) == 50 and len(source) == 1024


@pytest.mark.parametrize("name", NAMES)
def test_a_longer_clip_continues_a_shorter_one(name):
    for index in range(5):
        long = clips(name, frames=64).read(index)["video"]
        np.testing.assert_array_equal(clips(name).read(index)["video"], long[:30])


@pytest.mark.parametrize("name", NAMES)
def test_a_gap_changes_nothing_before_it_and_nothing_of_the_answer(name):
    """So the same clips can be asked after any gap, however long."""
    near, far = clips(name, gap=(2, 2)), clips(name, gap=(99, 99), frames=120)
    compared = [(near, far), (near.with_gap(2), near.with_gap(99)), (near, near.with_gap(2))]
    for (a, b), index in itertools.product(compared, range(8)):
        first, second = a.read(index)["video"], b.read(index)["video"]
        after = [video[s.back(index) :][: s.answer] for video, s in ((first, a), (second, b))]
        np.testing.assert_array_equal(*after)
        if (a, b) != compared[2]:  # the same lead
            assert b.back(index) - a.back(index) == 97
            lead = a.back(index) - 2
            assert near.leads[0] <= lead <= near.leads[1]
            np.testing.assert_array_equal(first[:lead], second[:lead])


@pytest.mark.parametrize("name", NAMES)
def test_clips_of_a_gap_have_the_longest_lead_and_end_with_the_answer(name):
    source = clips(name).with_gap(20)
    for index in range(8):
        assert source.back(index) == clips(name).leads[1] + 20
        assert len(source.read(index)["video"]) == source.back(index) + source.answer


@pytest.mark.parametrize("name", NAMES)
def test_gaps_and_leads_take_every_value_of_their_range(name):
    source = clips(name, gap=(3, 6))
    backs = [source.back(index) for index in range(300)]
    low, high = source.leads[0] + 3, source.leads[1] + 6
    assert set(backs) == set(range(low, high + 1))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sprites_recall", dict(size=24)),
        ("sprites_recall", dict(size=24, difficulty=1.0)),
        ("sprites_recall", dict(size=64, difficulty=1.0)),
        ("needle", dict(size=16)),
        ("needle", dict(size=8)),
        ("needle", dict(size=29)),
    ],
)
def test_the_oracle_reads_all_answers_of_real_clips_and_others_are_chance(name, changes):
    source, other = clips(name, **changes), clips(name, "train", **changes)
    count = 60
    right = [answer(source, index) for index in range(count)]
    assert {key: np.mean([row[key] for row in right]) for key in right[0]} == dict.fromkeys(
        source.chance, 1.0
    )
    guesses = []
    for index in range(count):
        back = other.back(index % 50)
        frames = other.read(index % 50)["video"][back : back + source.answer]
        guesses.append(source.scores(index, frames))
    for score, chance in source.chance.items():
        spread = np.sqrt(chance * (1 - chance) / count)  # or less, of a mean of several cells
        assert np.mean([row[score] for row in guesses]) == pytest.approx(chance, abs=4 * spread)


def test_nothing_of_the_sprite_shows_in_the_gap():
    """Scenes that differ in the sprite alone have the same frames in the gap, bit for bit."""
    for index, (colour, shape) in enumerate(
        zip(sprites.COLOURS, (*sprites.SHAPES, "cross", "circle"))
    ):
        view = clips("sprites_recall", gap=(6, 6)).scene(index)
        [sprite] = view.sprites
        attributes = sprite.attributes._replace(colour=colour, shape=shape)
        other = dataclasses.replace(
            view, sprites=(dataclasses.replace(sprite, attributes=attributes),)
        )
        videos = []
        for scene in (view, other):
            videos.append(sprites.render(scene, 24, 32, difficulty=1.0))
            sprites_recall.paint_clock(videos[-1], scene)
        gap = slice(sprite.lead, sprite.lead + 6)
        np.testing.assert_array_equal(videos[0][gap], videos[1][gap])
        # All shapes show in the frames next to the gap, so the gap has the same length for all.
        empty = dataclasses.replace(view, sprites=(), painting=())
        bare = sprites.render(empty, 24, 32, difficulty=1.0)
        for t in (sprite.lead - 1, sprite.lead + 6):
            assert (videos[1][t] != bare[t]).any()


def test_the_clock_says_when_and_nothing_else():
    """It is full until its last frames, neutral, and gone with the return."""
    source = clips("sprites_recall", gap=(7, 7))
    for index in range(6):
        video, back = source.read(index)["video"], source.back(index)
        grey = int(video[0, 0, 0, 0])
        widths = (video[:, -1, :, :] != grey).any(-1).sum(1)  # of what is drawn on the lower edge
        assert widths[back - 7 : back].tolist() == [24, 24, 24, 24, 18, 12, 6]
        assert not widths[: back - 7].any() and not widths[back:].any()
        inks = np.unique(video[back - 7 : back])
        assert set(inks) == {grey, 0 if grey > 127 else 255}
    # Beyond its last frames a long gap has only frames that a short one has too.
    long = source.with_gap(40).read(0)["video"]
    back = source.leads[1] + 7
    np.testing.assert_array_equal(long[back - 7 : back + 25], long[back - 7][None].repeat(32, 0))


def test_an_answer_counts_only_if_there_is_one_sprite():
    source = clips("sprites_recall")
    back = source.back(0)
    frames = source.read(0)["video"][back : back + source.answer]
    right = {"colour": 1.0, "shape": 1.0, "both": 1.0}
    assert source.scores(0, frames) == right
    grey = np.full_like(frames, 100)
    assert source.scores(0, grey) == dict.fromkeys(right, 0.0)
    [sprite] = source.scene(0).sprites
    for change, part in (({"colour": None}, "shape"), ({"shape": None}, "colour")):
        [key] = change
        values = sprites.COLOURS if key == "colour" else sprites.SHAPES
        change[key] = next(v for v in values if v != getattr(sprite.attributes, key))
        other = dataclasses.replace(sprite, attributes=sprite.attributes._replace(**change))
        view = dataclasses.replace(source.scene(0), sprites=(other,))
        video = sprites.render(view, 30, 24)[back : back + source.answer]
        assert source.scores(0, video) == {n: float(n == part) for n in right}
    is_ground = (frames == frames[:, :1, :1]).all(-1, keepdims=True)
    twice = np.where(is_ground, np.roll(frames, 10, axis=2), frames)
    assert source.scores(0, twice) == {"colour": 1.0, "shape": 0.0, "both": 0.0}
    two = frames.copy()
    colour = "red" if sprite.attributes.colour == "blue" else "blue"
    two[:, :6, :6] = np.rint(255 * np.array(sprites.COLOURS[colour]))
    assert source.scores(0, two) == dict.fromkeys(right, 0.0)


def test_of_the_cards_one_has_a_border_and_the_question_is_empty():
    """Read by colours at fixed pixels, without the oracle."""
    source = clips("needle", size=16, gap=(3, 8))
    places = np.array([[5, 5], [5, 10], [10, 5], [10, 10]])
    same = []
    for index in range(60):
        video, back = source.read(index)["video"], source.back(index)
        corner = video[:, 0, 0]
        cells = video[:, places[:, 0], places[:, 1]]
        is_marked = (corner == 255).all(-1)
        [lead] = np.flatnonzero(is_marked[: back - 1])
        assert is_marked[back - 1 :].all() and (cells[back - 1] == 128).all()
        assert (cells[back:] == cells[lead]).all() and np.ptp(cells[lead]) > 0
        same.append((cells[lead + 1] == cells[lead]).all(-1).mean())
        assert (corner[~is_marked] == 128).all()
    assert np.mean(same) == pytest.approx(1 / 6, abs=4 * np.sqrt(5 / 36 / 240))  # independent


def test_cards_that_pass_do_not_depend_on_the_marked_one(monkeypatch):
    source = clips("needle", size=16)
    video, back = source.read(0)["video"], source.back(0)
    cards = source.cards(0)
    other = cards._replace(marked=(cards.marked + 1) % 6)
    monkeypatch.setattr(source, "cards", lambda index: other)
    changed = source.read(0)["video"]
    lead = cards.lead
    np.testing.assert_array_equal(changed[lead:back], video[lead:back])
    assert (changed[lead - 1] != video[lead - 1]).any() and (changed[back] != video[back]).any()


def test_cells_of_no_colour_are_wrong():
    source = clips("needle", size=16)
    colours = source.cards(0).marked
    frame = needle.draw_frame(colours, 1.0, 16)
    assert source.scores(0, frame[None]) == {"cells": 1.0, "card": 1.0}
    pale = (0.5 * frame + 64).astype(np.uint8)
    assert source.scores(0, pale[None]) == {"cells": 0.0, "card": 0.0}
    frame[:8, :8] = 128
    assert source.scores(0, frame[None]) == {"cells": 0.75, "card": 0.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(gap=(2,)), r"gap=\(2,\): write its least and its most frames"),
        (dict(gap=(0, 3)), r"gap=\(0, 3\): 0 is not a whole number of at least 1"),
        (dict(gap=(3, 2)), r"gap=\(3, 2\): must rise"),
        (dict(frames=11), "frames=11: .* end before the answer; use 1[2-8] or more"),
        (dict(stride=2), "stride=2: a gap counts frames; use 1"),
        (dict(size=7), "size=7: must be at least"),
        (dict(flip=True), "flip=True: .* use flip=False"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_fields_are_refused(name, changes, words):
    with pytest.raises(UserError, match=f"^{words}"):
        clips(name, **changes)


def test_a_config_without_gaps_is_refused():
    config = fields("needle")
    del config.gap
    with pytest.raises(UserError, match=r"^name='needle': has a gap; use --config=configs/recall"):
        data.make_source(config, "train")
