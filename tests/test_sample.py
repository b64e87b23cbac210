"""jaxvid.sample: the conditions and the files of its clips."""

import os
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from ml_collections import ConfigDict

from jaxvid import sample
from jaxvid.data import video
from jaxvid.errors import UserError
from jaxvid.parallel.mesh import make_mesh
from jaxvid.tasks.ar_diffusion import Task
from jaxvid.tasks.base import Run
from jaxvid.training import interrupt
from jaxvid.training.recorder import DIGEST, STATE, Recorder
from jaxvid.training.writer import write_clips
from tests.tasks.test_ar_diffusion import fields, opened
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


CYCLIC = {"window": 3, "sinks": 1, "positions": "cyclic"}


@pytest.mark.parametrize("mixer, options", [("softmax", CYCLIC), ("gated_delta", {})])
def test_a_sampled_stream_goes_on_bit_for_bit(mixer, options, tmp_path, monkeypatch, capsys):
    """After kill -9, from what was saved before; after SIGTERM, from the piece that was under way.

    The recurrent state has the past inputs of convolutions beside its matrix.
    """
    changes = {f"model__mixer__{name}": value for name, value in options.items()}
    task = Task(**fields(f"mixer={mixer}", sampler__s=3, **changes))
    mesh = make_mesh({}, jax.devices()[:1])
    run = Run(None, task, opened(task), {}, 0, mesh)
    monkeypatch.setattr(sample, "SAVE_EVERY", 3)

    class Watched(Recorder):
        def write(self, clip_BTHWC):
            super().write(clip_BTHWC)
            written.append(clip_BTHWC)
            trouble.get(self.frames, int)()

    def to_the_end(name, resume=False):
        monkeypatch.setattr(sample, "FLAGS", Flags(num=1, seed=5, resume=resume))
        recorder = Watched(tmp_path / name, 8.0, {})
        sample._sample(run, {"num": 1}, 14, 0, recorder)
        return recorder.frames

    def end(name):
        """All frames that were written, and the state that is kept after the last one."""
        content = (tmp_path / name / STATE).read_bytes()[DIGEST:]
        with open(tmp_path / name / "0.mp4", "rb") as file:
            assert video.probe(file).frames == 14
        return np.concatenate(written, axis=1), serialization.msgpack_restore(content)["state"]

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # until a thread has answered

    written, trouble = [], {}
    assert to_the_end("whole") == 14 and "frames/s" in capsys.readouterr().out
    whole = end("whole")

    written, trouble = [], {8: lambda: 1 // 0}
    with pytest.raises(ZeroDivisionError):
        to_the_end("killed")
    written, trouble = written[:6], {}
    to_the_end("killed", resume=True)
    killed = end("killed")

    written, trouble = [], {4: stop}
    frames = to_the_end("stopped")
    assert capsys.readouterr().out.endswith("stopping after a save; Ctrl-C again stops at once\n")
    assert 4 <= frames < 14 and not (tmp_path / "stopped" / "0.mp4").exists()
    to_the_end("stopped", resume=True)
    for frames_and_state in (killed, end("stopped")):
        jax.tree.map(np.testing.assert_array_equal, frames_and_state, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_later_ones_find_their_own_handlers(number):
    before = signal.getsignal(number)
    with interrupt.stops() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(10)
    assert signal.getsignal(number) is before


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
