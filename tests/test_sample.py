"""jaxvid.sample: the conditions and the files of its clips."""

import contextlib
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
from PIL import Image

from jaxvid import checks, sample
from jaxvid.data import story, text, video
from jaxvid.errors import UserError
from jaxvid.parallel.mesh import make_mesh
from jaxvid.tasks.ar_diffusion import Task
from jaxvid.tasks.base import Run
from jaxvid.tasks.streaming import Decoded
from jaxvid.training import interrupt
from jaxvid.training.recorder import DIGEST, STATE, Recorder
from jaxvid.training.writer import write_clips
from tests.tasks.test_ar_diffusion import fields, opened
from tests.test_drift import Streams
from tests.videos import frame_numbers, write_clip

NO_PROMPT = [story.Line(0, "", "prompt")]


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
    cond, found = sample.conditions(SimpleNamespace(config=ConfigDict(fields)), 2, NO_PROMPT)
    for clip_THWC in cond["first_frames"]:
        assert frame_numbers(clip_THWC, 12) == [number % 12 for number in numbers]
    assert found == rate
    write_clips(tmp_path / "out", cond["first_frames"], found)
    with open(tmp_path / "out" / "1.mp4", "rb") as file:
        assert video.probe(file).fps == rate


def test_clips_without_a_rate_are_written_at_8(monkeypatch):
    monkeypatch.setattr(sample, "FLAGS", Flags())
    fields = dict(data=dict(size=48, stride=1), task=dict(condition=dict(kind="none")))
    run = SimpleNamespace(config=ConfigDict(fields))
    assert sample.conditions(run, 2, NO_PROMPT) == ({"num": 2}, 8)


def test_an_image_is_a_clip_of_one_frame(tmp_path, monkeypatch):
    Image.new("RGB", (96, 48), (255, 0, 0)).save(tmp_path / "red.PNG")
    run = run_of_text()
    for options, words in (({}, ""), ({"num_first_frames": 4}, "is an image and has one; leave")):
        flags = Flags(first_frames=str(tmp_path / "red.PNG"), prompt="a", **options)
        monkeypatch.setattr(sample, "FLAGS", flags)
        with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
            cond, fps = sample.conditions(run, 2, sample.lines_of(run))
    assert cond["first_frames"].shape == (2, 1, 8, 8, 3) and fps == 8
    assert (cond["first_frames"] == [255, 0, 0]).all()


def run_of_text(kind="text", task=None, **sampler):
    task_fields = dict(given=3, condition=dict(kind=kind, tokens=3, width=4, num_classes=5))
    task_fields["sampler"] = {"guidance": 1.0, **sampler}
    data = dict(size=8, stride=1, frames=6, fps=0.0, text="words", text_tokens=3, text_width=4)
    fields = ConfigDict(dict(task=task_fields, data=data))
    return Run(fields, task, {}, {}, 0, make_mesh({}, jax.devices()[:1]))


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("text", {"negative_prompt": "a"}, "^negative_prompt=a: .* none; add --guidance=3, or le"),
        ("class", {"negative_prompt": "a"}, "^negative_prompt=a: this run's condition is 'class'"),
        (
            "class",
            {"story": "s.txt"},
            r"^story=s\.txt: this run's condition is 'class', not",
        ),
        ("text", {"story": "s.txt", "prompt": "a"}, "^prompt=a: --story has the prompts; leave"),
        ("text", {"story": "s.txt", "prompt": ""}, "^prompt=: --story has the prompts"),
        ("guided", {"negative_prompt": "\udcff"}, r"^negative_prompt='\\udcff': is not UTF-8"),
    ],
)
def test_prompts_that_cannot_work_are_refused_in_one_line(kind, options, words, monkeypatch):
    monkeypatch.setattr(
        sample, "FLAGS", Flags(**({"label": 0} if kind == "class" else {}), **options)
    )
    run = run_of_text("text", guidance=3.0) if kind == "guided" else run_of_text(kind)
    with pytest.raises(UserError, match=words) as caught:
        sample.conditions(run, 2, sample.lines_of(run))
    assert "\n" not in str(caught.value)


def test_a_negative_prompt_is_embedded_as_captions_are(monkeypatch):
    run = run_of_text(guidance=3.0)
    monkeypatch.setattr(sample, "FLAGS", Flags(prompt="a red square", negative_prompt="a circle"))
    lines = sample.lines_of(run)
    cond, _ = sample.conditions(run, 2, lines)
    for name, prompt in (("text", "a red square"), ("negative_text", "a circle")):
        np.testing.assert_array_equal(cond[name], [text.embed(prompt, 3, 4)] * 2)
    assert sample.made_with(run, cond, lines)["negative_prompt"] == "a circle"


class Told(Streams):
    """Every pixel of a frame shows how many words its text had: the frames are told apart.

    Latents are groups of two frames after the first. Pieces have 1, 2, 1, 2 .. latents.
    """

    def split_frames(self, frames):
        return frames

    def check_switch(self, frame, *, given, frames):
        checks.require(frame % 2, "frame", frame, "does not begin a group")

    def stream(self, params, rng, cond, *, frozen, frames=None, carry=None):
        return ToldStream(cond, (frames + 1) // 2, carry)

    def decode(self, frozen, z_BTNC, state=None):
        video_BTNC = jnp.repeat(z_BTNC, 2, axis=1)[:, (state is None) :]
        return jnp.tile(video_BTNC[..., None] / 127.5 - 1, (1, 1, 16, 16, 3)), jnp.zeros(())


class ToldStream:
    is_whole = True

    def __init__(self, cond, latents, carry):
        done, words = (0, 0) if carry is None else carry.tolist()
        self.latents, self.carry = latents, np.array([done, words])
        if carry is None:
            self.switch(cond)

    def switch(self, cond):
        self.carry = np.array([self.carry[0], np.any(cond["text"][0], axis=1).sum()])

    def __next__(self):
        done, words = self.carry
        if done >= self.latents:
            raise StopIteration
        count = min(1 + done % 3 % 2, self.latents - done)  # of latents 0 | 1 2 | 3 | 4 5 | ..
        self.carry = np.array([done + count, words])
        return np.full((1, count, 1, 1), float(words))


STORY = "0: one\n7: one two\n13: one two three\n"


def told_by(story, frames, folder, monkeypatch, stop=None, resume=False, num=1):
    """The first pixel of each frame of `sample`, in which a prompt shows as its words."""
    run, values = run_of_text(task=Told()), []
    (folder / "story.txt").write_text(story)
    flags = Flags(num=num, seed=5, resume=resume, story=str(folder / "story.txt"))
    monkeypatch.setattr(sample, "FLAGS", flags)
    lines = sample.lines_of(run)
    cond, _ = sample.conditions(run, num, lines)
    switches = sample.switches_of(run, lines, 0, frames)

    class Watched(Recorder):
        def write(self, clip_BTHWC):
            super().write(clip_BTHWC)
            values.extend(clip_BTHWC[0, :, 0, 0, 0].tolist())
            if stop and self.frames >= stop:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)  # until a thread has answered

    recorder = Watched(folder / "out", 8.0, sample.made_with(run, cond, lines))
    sample._sample(run, cond, frames, 0, recorder, switches)
    return values


def test_each_prompt_lasts_from_its_frame_to_the_next(tmp_path, monkeypatch):
    assert told_by(STORY, 17, tmp_path, monkeypatch) == [1] * 7 + [2] * 6 + [3] * 4


@pytest.mark.parametrize("stop", [5, 7, 11])
def test_a_story_goes_on_and_its_later_lines_may_change(stop, tmp_path, monkeypatch):
    """Also where it stops just before a new prompt."""
    later = "one two" if stop > 7 else "of another kind"
    first = told_by(f"0: one\n7: {later}\n", 17, tmp_path, monkeypatch, stop=stop)
    rest = told_by(STORY, 17, tmp_path, monkeypatch, resume=True)
    assert first + rest == [1] * 7 + [2] * 6 + [3] * 4 and len(first) == stop
    with pytest.raises(UserError, match=r"made with story=\[\[7, 'one two'\], \[13, .*, not None"):
        told_by("0: one\n", 19, tmp_path, monkeypatch, resume=True)
    more = told_by(STORY + "19: one\n", 21, tmp_path, monkeypatch, resume=True)
    assert more == [3, 3, 1, 1]


def test_a_piece_that_runs_past_a_switch_is_noticed(monkeypatch):
    run = run_of_text(task=Told())
    pieces = Decoded(run, {"text": np.ones((1, 1, 1))}, 17, None, {3: {"text": np.ones((1, 2, 1))}})
    with pytest.raises(ValueError, match="a piece went on to frame 5, past the switch 3"):
        list(pieces)


@pytest.mark.parametrize(
    "line, given, words",
    [
        (8, 0, r"story=.*story\.txt, line 2: frame=8: does not begin a group"),
        (17, 0, "line 2: begins at frame 17, but the clips have 17 frames; ask for more --frames"),
        (3, 3, "line 2: begins at frame 3, but --first_frames has 3, .* begin after frame 3"),
    ],
)
def test_prompts_at_impossible_frames_are_refused(line, given, words, tmp_path, monkeypatch):
    (tmp_path / "story.txt").write_text(f"0: a\n{line}: b")
    monkeypatch.setattr(sample, "FLAGS", Flags(story=str(tmp_path / "story.txt"), num=1))
    run = run_of_text(task=Told())
    with pytest.raises(UserError, match=words):
        sample.switches_of(run, sample.lines_of(run), given, 17)


class Pieceless(Streams):
    """A task of which no stream is asked for."""

    def stream(self, params, rng, cond, *, frozen, frames=None, carry=None):
        raise NotImplementedError

    def decode(self, frozen, z_BTNC, state=None):
        raise NotImplementedError


def test_tasks_that_cannot_change_their_conditions_say_so():
    with pytest.raises(UserError, match="streams of this task cannot change their conditions"):
        Pieceless().check_switch(5, given=0, frames=9)


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
