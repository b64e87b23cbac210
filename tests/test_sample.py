"""jaxvid.sample: the conditions and the files of its clips."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid import sample
from jaxvid.data import video
from jaxvid.errors import UserError
from jaxvid.training.recorder import STATE, Recorder
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


NOISE_BTHWC = np.random.default_rng(0).integers(0, 256, (2, 40, 15, 16, 3), np.uint8)


def recorder_of(folder, made_with=None):
    return Recorder(folder, 8.0, made_with or {"seed": 0})


def record(recorder, frames, save=True):
    """The next frames of the noise; the state is the number of frames so far."""
    recorder.write(NOISE_BTHWC[:, recorder.frames : recorder.frames + frames])
    if save:
        recorder.save([jnp.int32(recorder.frames)])


def test_a_stream_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    whole, killed = recorder_of(tmp_path / "whole"), recorder_of(tmp_path / "killed")
    for frames in (12, 9, 19):
        record(whole, frames)
    for frames, save in ((12, True), (9, True), (19, False)):
        record(killed, frames, save)
    (tmp_path / "killed" / "parts" / "0-000002.mp4").write_bytes(b"of a part that was not saved")
    again = recorder_of(tmp_path / "killed")
    again.resume()
    assert again.restored([jnp.int32(0)]) == [21] and again.frames == 21
    record(again, 19)
    for recorder in (whole, again):
        recorder.finish(2)
    for clip in ("0.mp4", "1.mp4"):
        files = [tmp_path / name / clip for name in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
        with open(files[0], "rb") as file:
            assert (video.probe(file).fps, video.probe(file).frames) == (8, 40)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: path.unlink(), "holds no stream .* leave --resume out"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged; sample into another"),
        (lambda path: path.write_bytes(b"\x93\x01"), "is damaged; sample into another"),
        (lambda path: flip_a_bit(path), "is damaged; sample into another"),
        (lambda path: flip_a_bit(next(path.parent.glob("parts/1-*"))), "1-.*is missing or damaged"),
        (lambda path: next(path.parent.glob("parts/0-*")).unlink(), "0-.* is missing or damaged"),
        (None, "was made with seed=0, not 1; give the same, or another --out"),
    ],
)
def test_a_stream_that_cannot_go_on_is_refused_in_one_line(tmp_path, damage, words):
    record(recorder_of(tmp_path), 5)
    if damage:
        damage(tmp_path / STATE)
    with pytest.raises(UserError, match=words) as error:
        recorder_of(tmp_path, {"seed": 0 if damage else 1}).resume()
    assert "\n" not in str(error.value)


def test_the_state_of_another_stream_is_refused(tmp_path):
    record(recorder_of(tmp_path), 5)
    recorder = recorder_of(tmp_path)
    recorder.resume()
    with pytest.raises(UserError, match="is that of another stream"):
        recorder.restored([jnp.zeros(3)])


def test_a_stream_is_not_resumed_without_what_it_was_made_with(tmp_path):
    record(recorder_of(tmp_path, {"seed": 0, "history_guidance": 1.5}), 5)
    with pytest.raises(UserError, match=r"was made with history_guidance=1\.5, not None"):
        recorder_of(tmp_path).resume()


def test_a_stream_is_never_overwritten_and_what_a_stop_prevented_is_made_up(tmp_path, monkeypatch):
    record(recorder_of(tmp_path), 5)
    monkeypatch.setattr(sample, "FLAGS", Flags(num=2))
    with pytest.raises(UserError, match="holds a stream; go on with --resume, or name another"):
        sample._sample(None, None, 5, 0, recorder_of(tmp_path))
    monkeypatch.setattr(sample, "FLAGS", Flags(num=2, resume=True))
    sample._sample(None, None, 5, 0, recorder_of(tmp_path))  # all frames are there, but no 0.mp4
    with open(tmp_path / "1.mp4", "rb") as file:
        assert video.probe(file).frames == 5
    with pytest.raises(UserError, match=r"^frames=4: .* has 5 already; ask for more"):
        sample._sample(None, None, 4, 0, recorder_of(tmp_path))
