"""Stories: what a stream shows after its caption changed, and how soon."""

import numpy as np
import pytest

from jaxvid.data.sprites import kind, render, scene
from jaxvid.errors import UserError
from jaxvid.evaluators import stories
from jaxvid.evaluators.held_out import open_held_out
from tests.test_alignment import Drawn, told_run

SWITCHES = [16, 32]


@pytest.fixture
def run():
    return told_run()


class Late:
    """In the place of `Decoded`: clips of the captions it is told, each change some frames late."""

    def __init__(self, task, cond, switches, late):
        self.task, self.told = (
            task,
            {0: cond["text"], **{f: s["text"] for f, s in switches.items()}},
        )
        self.late = late

    def video(self, frames):
        parts, starts = [], [0, *(frame + self.late for frame in [*self.told][1:]), frames]
        for text_BME, first, end in zip(self.told.values(), starts, starts[1:]):
            parts.append(np.stack([self.clip(text_ME, end - first) for text_ME in text_BME]))
        return np.concatenate(parts, axis=1)

    def clip(self, text_ME, frames):
        index = int(np.argmin(np.abs(self.task.known - text_ME).sum((1, 2))))
        return render(scene(index, "validation", **kind(self.task.fields)), frames, 32)


def measured(run, monkeypatch, late, clips=8):
    task = Drawn(run, 1.0)
    monkeypatch.setattr(
        stories, "Decoded", lambda run, cond, frames, rng, switches: (cond, switches)
    )
    monkeypatch.setattr(
        stories, "shown", lambda made, frames: [(Late(task, *made, late).video(frames), 0, 0)]
    )
    with open_held_out(run) as held_out:
        return stories.measure(run, held_out, SWITCHES, clips)


def test_a_stream_that_obeys_at_once_has_the_new_sprites_at_once(run, monkeypatch):
    found, videos = measured(run, monkeypatch, late=0)
    assert found["clips"] == len(videos) == 8 and videos[0].shape == (48, 32, 32, 3)
    assert found["frames"] == stories.length(SWITCHES) == 48
    assert list(found["after"]) == ["0", "8"] and list(found["by_part"]) == ["1", "2", "3"]
    for row in (found["before"], *found["after"].values(), *found["by_part"].values()):
        assert row["colour"] == row["shape"] == row["one_sprite"] == 1
        assert row.get("old_colour", 0) < 0.5
    assert 0 < found["chance"]["colour"] < 0.5


def test_a_stream_that_obeys_late_shows_the_old_sprites_before(run, monkeypatch):
    found, _ = measured(run, monkeypatch, late=8)
    assert found["after"]["0"]["old_colour"] == found["after"]["0"]["old_shape"] == 1
    assert found["after"]["0"]["colour"] < 0.5 and found["after"]["8"]["colour"] == 1
    lines = stories.table(found).splitlines()
    assert lines[2].split()[:2] == ["before", "1.000"] and "0 on" in lines[3]


def test_the_picture_has_a_row_for_each_of_the_first_stories(tmp_path):
    clip = np.zeros((40, 24, 24, 3), np.uint8)
    stories.write_picture([clip] * 6, tmp_path / "story.png")
    assert (tmp_path / "story.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "frames, message",
    [
        (["16", "20"], "--story=20: comes 4 frames after 16; leave 8 or more"),
        (["4"], "--story=4: comes 4 frames after 0"),
        (["x"], "--story=x: write numbers of frames"),
        (["16"], "--story=16: frame=16: streams of this task cannot change their conditions"),
    ],
)
def test_stories_that_cannot_be_told_are_refused(run, frames, message):
    with pytest.raises(UserError, match=rf"^{message}"):
        stories.check(run, frames)


def test_a_run_without_captions_has_no_stories(run):
    assert stories.check(run, []) == []
    run.config.task.condition.kind = "none"
    with pytest.raises(UserError, match=r"^--story: changes captions of sprites"):
        stories.check(run, ["16"])
