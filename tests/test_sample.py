"""jaxvid.sample: the conditions and the files of its clips."""

from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from jaxvid import sample
from jaxvid.data import video
from jaxvid.training.writer import write_clips
from tests.videos import frame_numbers, write_clip


class Flags(dict):
    """Flags of a command line that gives these alone."""

    def __getitem__(self, name):
        return SimpleNamespace(present=name in self, value=self.get(name))

    def __getattr__(self, name):
        return self.get(name)


@pytest.mark.parametrize(
    "fps, stride, numbers, rate",
    [(8.0, 2, [0, 6, 12], 4), (8.0, 1, [0, 3, 6], 8), (0.0, 2, [0, 2, 4], 12)],
)
def test_first_frames_have_the_rate_of_the_run(tmp_path, monkeypatch, fps, stride, numbers, rate):
    write_clip(tmp_path / "bars.mp4", 24, width=48, fps=24)
    monkeypatch.setattr(sample, "FLAGS", Flags(first_frames=tmp_path / "bars.mp4"))
    fields = dict(data=dict(size=48, fps=fps, stride=stride))
    fields["task"] = dict(given=3, condition=dict(kind="none"))
    cond, found = sample.conditions(SimpleNamespace(config=ConfigDict(fields)), 2)
    for clip_THWC in cond["first_frames"]:
        assert frame_numbers(clip_THWC, 12) == [number % 12 for number in numbers]
    assert found == rate
    write_clips(tmp_path / "out", cond["first_frames"], found)
    with open(tmp_path / "out" / "1.mp4", "rb") as file:
        assert video.probe(file).fps == rate


def test_clips_without_a_rate_are_written_at_8(monkeypatch):
    monkeypatch.setattr(sample, "FLAGS", Flags())
    fields = dict(data=dict(size=48, stride=1), task=dict(condition=dict(kind="none")))
    assert sample.conditions(SimpleNamespace(config=ConfigDict(fields)), 2) == ({"num": 2}, 8)
