"""jaxvid.prepare: a set reads back as its clips, and appears whole or not at all."""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxvid import data
from jaxvid.data import clips, processes, shards, video
from jaxvid.data.source import digest_of
from jaxvid.errors import UserError
from jaxvid.schema import OPEN
from tests.videos import data_config, frame_numbers, prepare_here, write_clip, write_hostile

set_config = functools.partial(data_config, "array_record")
numbers_of_12 = functools.partial(frame_numbers, period=12)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prepared set of two classes at the rate of the source: 5 clips of 17 frames."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("cats/1.mp4", "cats/2.avi", "dogs/1.webm", "dogs/2.mkv", "dogs/3.mp4"):
        write_clip(folder / "src" / name, 17, height=48, width=48)
    prepare_here(folder / "src", folder / "set")
    return folder / "set"


def write_clips(folder, count, frames):
    for number in range(count):
        write_clip(folder / f"{number}.mp4", frames)
    return folder


def test_the_manifest(made):
    manifest = json.loads((made / "dataset.json").read_text())
    digest = manifest.pop("digest")
    assert digest == digest_of(manifest)
    parts = [manifest["splits"][split].pop("shards") for split in ("train", "validation")]
    assert manifest == {
        "schema": 1,
        "codec": "h264",
        "size": 48,
        "frames": 8,
        "fps": 0.0,
        "classes": ["cats", "dogs"],
        "splits": {
            "train": {"clips": 4, "records": 8},
            "validation": {"clips": 1, "records": 2},
        },
        "skipped": [],
        "cut": [],
    }
    for shard in parts[0] + parts[1]:
        content = (made / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(content) == shard["bytes"]
    files = [shard["file"] for shard in parts[0] + parts[1]]
    assert sorted(os.listdir(made)) == sorted(["dataset.json", *files])


def test_the_digest_is_of_the_set_and_not_of_its_place(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    first, second = (data.make_source(set_config(x), "train") for x in (made, tmp_path / "copy"))
    assert first.digest == second.digest != ""
    change = json.loads((made / "dataset.json").read_text())
    change["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "copy" / "dataset.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=r"dataset.json differs from what was written; copy or"):
        data.make_source(set_config(tmp_path / "copy"), "train")
    del change["digest"]  # as in sets of earlier versions
    (tmp_path / "copy" / "dataset.json").write_text(json.dumps(change))
    assert data.make_source(set_config(tmp_path / "copy"), "train").digest != first.digest


def test_chunks_read_back_as_the_clips(made):
    seen = {}
    for split in ("train", "validation"):
        source = data.make_source(set_config(made, frames=8), split)
        assert (source.num_classes, source.captions, source.tokenizer) == (2, True, "")
        for i in range(len(source)):
            name, chunk = source.name(i).split("#")
            seen.setdefault(name, set()).add((split, int(chunk)))
            example, first = source[i], 8 * int(chunk)
            assert numbers_of_12(example["video"]) == [n % 12 for n in range(first, first + 8)]
            assert example["caption"] == name.split("/")[0]
            assert example["label"] == ["cats", "dogs"].index(example["caption"])
    assert len(seen) == 5
    for places in seen.values():  # all chunks of a clip have one split
        assert len(places) == 2
        assert len({split for split, _ in places}) == 1


def test_windows_inside_a_chunk(made):
    source = data.make_source(set_config(made, stride=2, size=24, frames=3), "train")
    rngs = map(np.random.default_rng, range(30))
    shown = {tuple(numbers_of_12(source.read(0, rng)["video"])) for rng in rngs}
    first = 8 * int(source.name(0).split("#")[1])
    assert shown == {tuple((first + s + n) % 12 for n in (0, 2, 4)) for s in range(4)}
    assert source[0]["video"].shape == (3, 24, 24, 3)


def test_resampling_and_cropping(tmp_path):
    src = write_clips(tmp_path / "src", 2, 36)
    prepare_here(src, tmp_path / "set", frames=4, fps=8.0)
    source = data.make_source(set_config(tmp_path / "set"), "train")
    assert (len(source), source.fps) == (3, 8.0)
    assert len(data.make_source(set_config(tmp_path / "set", fps=8.0), "train")) == 3
    with pytest.raises(
        UserError, match=r"^fps=5\.0: the source array_record has a rate of its own"
    ):
        data.make_source(set_config(tmp_path / "set", fps=5.0), "train")
    # Every third frame; the middle 12 of the 16 positions of the bar remain.
    assert numbers_of_12(source[0]["video"])[1:] == [1, 4, 7]


def test_no_chunk_spans_a_gap(tmp_path):
    for name in "ab":
        times = [*range(9), *range(2400, 2415)]
        path = tmp_path / "src" / f"{name}.mp4"
        write_clip(path, 24, width=48, times=times, options={"bf": "0"})
    manifest = prepare_here(tmp_path / "src", tmp_path / "set", frames=4)
    reason = "is cut 1 times, at gaps or stills"
    assert sorted(entry["name"] for entry in manifest["cut"]) == ["a.mp4", "b.mp4"]
    assert {entry["reason"] for entry in manifest["cut"]} == {reason}
    assert manifest["splits"]["train"]["records"] == 2 + 3
    source = data.make_source(set_config(tmp_path / "set"), "train")
    starts = [numbers_of_12(source[i]["video"])[0] for i in range(5)]
    assert starts == [first % 12 for first in (0, 4, 9, 13, 17)]


def test_bad_files_are_skipped_and_named(tmp_path, capsys):
    src = write_hostile(tmp_path / "src")
    write_clip(src / "short.mp4", 5)
    (src / os.fsdecode(b"\xff.mp4")).write_bytes(b"")  # not UTF-8
    manifest = prepare_here(src, tmp_path / "set")
    skipped = {entry["name"]: entry["reason"] for entry in manifest["skipped"]}
    assert skipped.pop(os.fsdecode(b"\xff.mp4")) == "is empty"
    assert sorted(skipped) == ["short.mp4", "sound.mp4", "text.mp4", "truncated.mp4", "zero.mp4"]
    assert skipped["short.mp4"] == "has 5 frames, 8 are needed"
    used = [manifest["splits"][split]["clips"] for split in ("train", "validation")]
    assert used == [1, 1]  # a bad file does not replace the clip that is held out
    assert "8/8 clips, 6 skipped" in capsys.readouterr().err


def test_shards_are_cut_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)
    prepare_here(write_clips(tmp_path / "src", 6, 16), tmp_path / "set", frames=4)
    parts = shards.read_manifest(tmp_path / "set", "h264")["splits"]["train"]["shards"]
    assert len(parts) > 2
    assert parts[1]["file"] == f"train-00001-of-{len(parts):05d}.array_record"
    source = data.make_source(set_config(tmp_path / "set"), "train")
    assert len(source) == sum(shard["records"] for shard in parts) == 20
    assert len({source.name(i) for i in range(20)}) == 20


def test_other_files_are_never_removed(tmp_path):
    """Neither from the source, nor from the folder in which the new set would grow."""
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "notes.mp4").write_text("mine")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "clip.mp4").write_text("")
    for src in ("nowhere", "set.partial", "src"):
        with pytest.raises(UserError):
            prepare_here(tmp_path / src, tmp_path / "set")
        assert (tmp_path / "set.partial" / "notes.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 47}, "size=47: H.264 needs an even number"),
        ({"size": 0}, "size=0: must be at least 1"),
        ({"frames": 0}, "frames=0: must be at least 1"),
        ({"size": 10**6}, "size=1000000: must be at most 8192"),
        ({"frames": 10**9}, "frames=1000000000: must be at most 1048576"),
        ({"frames": 10**6, "size": 8192}, "size=8192, frames=1000000: frames of a clip take about"),
        ({"fps": -1.0}, "fps=-1.0: must lie in"),
        ({"src": "/nowhere"}, "src='/nowhere': no such directory"),
        ({"out": "/proc/set"}, "out=/proc/set: No such file or directory; make room"),
        ({"out": "{folder}/src"}, "out={folder}/src: exists already"),
        ({"frames": 8}, "src={folder}/src: skipped 1 of 1 files: 0.mp4 has 4 frames"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    arguments = dict(src=write_clips(tmp_path / "src", 1, 4), out=tmp_path / "set") | options
    arguments["out"] = str(arguments["out"]).format(folder=tmp_path)
    with pytest.raises(UserError) as caught:
        prepare_here(**arguments)
    assert str(caught.value).startswith(message.format(folder=tmp_path))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["src"] and os.listdir(tmp_path / "src") == ["0.mp4"]


def records(path):
    sources = [data.make_source(set_config(path), split) for split in ("train", "validation")]
    return [{source.name(i): source._records[i] for i in range(len(source))} for source in sources]


def test_an_interrupted_or_failed_run_resumes(tmp_path, monkeypatch, capsys):
    src, cut_of = write_clips(tmp_path / "src", 5, 24), clips.cut
    (src / "bad.mp4").write_bytes(b"")
    prepare_here(src, tmp_path / "whole")
    calls = []

    def interrupted(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return cut_of(*arguments)

    class Failing(shards.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(clips, "cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_here(src, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    with pytest.raises(UserError, match=r"holds the beginning of another set \(with another size"):
        prepare_here(src, tmp_path / "set", size=24)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "ArrayRecordWriter", Failing)
        with pytest.raises(UserError, match=f"out={tmp_path / 'set'}: write.. failed: No space"):
            prepare_here(src, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    manifest = prepare_here(src, tmp_path / "set")
    assert "resuming after 3 of 6 clips" in capsys.readouterr().err
    assert calls[4:7] == calls[7:] and len(set(calls)) == 6  # three clips were not cut again
    assert [entry["name"] for entry in manifest["skipped"]] == ["bad.mp4"]
    assert records(tmp_path / "set") == records(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["set", "src", "whole"]


def test_whatever_a_file_raises_is_its_reason(tmp_path, monkeypatch):
    src = write_clips(tmp_path / "src", 3, 16)
    content = (src / "0.mp4").read_bytes()
    (src / "codec.mp4").write_bytes(content.replace(b"avc1", b"\0\0\0\0"))
    scaler = video._Scaler

    def failing(size, pixel):
        if failing.calls.append(size) or len(failing.calls) == 2:
            raise AttributeError("no\nsuch thing")
        return scaler(size, pixel)

    failing.calls = []
    monkeypatch.setattr(video, "_Scaler", failing)
    manifest = prepare_here(src, tmp_path / "set")
    reasons = {entry["name"]: entry["reason"] for entry in manifest["skipped"]}
    assert reasons.pop("codec.mp4") == "has a codec that FFmpeg does not know"
    assert list(reasons.values()) == ["cannot be decoded (AttributeError: no such thing)"]


def kill_the_process(name):
    """Stands for a file that crashes the decoder."""
    if name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    assert "jax" not in sys.modules  # so that processes start fast
    return name.upper()


@pytest.mark.slow
def test_processes_survive_a_crash():
    outcomes = list(processes.in_processes(kill_the_process, "abc", 1))
    assert outcomes == [("a", "A"), ("b", "brings the decoder down"), ("c", "C")]


@pytest.mark.slow
def test_the_command_and_a_killed_one(tmp_path):
    src = write_clips(tmp_path / "src", 40, 24)
    (src / "zero.mp4").write_bytes(b"")
    command = [sys.executable, "-m", "jaxvid.prepare", "--src", str(src)]
    command += ["--out", str(tmp_path / "set"), "--size=48", "--fps=0", "--workers=1"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=100)
    failed = run([*command, "--workers=0"])
    assert failed.returncode == 2
    assert failed.stderr == "error: --workers=0: must be at least 1\n"

    partial = tmp_path / "set.partial"
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (partial / "train-00000").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert partial.exists()
    assert not (tmp_path / "set").exists()
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        data.make_source(set_config(partial), "train")

    made = run(command)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [
        "train: 36 clips, 36 records",
        "validation: 4 clips, 4 records",
        "skipped 1 files:",
        "  zero.mp4 is empty",
    ]
    assert sorted(os.listdir(tmp_path)) == ["set", "src"]
    assert len(data.make_source(set_config(tmp_path / "set"), "train")) == 36


# The source


def first_shard(**changes):
    return lambda manifest: manifest["splits"]["train"]["shards"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(schema=2), "schema 2, not 1"),
        (first_shard(file="../../etc/passwd"), "'../../etc/passwd', which is not a plain file"),
        (first_shard(file="lost.array_record"), "shard lost.array_record has no bytes"),
        (first_shard(bytes=1), "says 1"),
        (
            lambda manifest: manifest["splits"]["train"].update(records=9),
            "hold 8 records, .* says 9",
        ),
        (lambda manifest: manifest.update(frames="8"), r"\(frames='8': must be a whole number"),
        (lambda manifest: manifest.update(classes=[None]), r"\(classes.0=None: must be of type"),
        (lambda manifest: manifest.pop("splits"), r"bad dataset.json \(splits: missing"),
    ],
)
def test_a_manifest_is_not_trusted(made, tmp_path, change, message):
    changed = shutil.copytree(made, tmp_path / "set")
    manifest = json.loads((changed / "dataset.json").read_text())
    change(manifest)
    manifest["digest"] = digest_of({k: v for k, v in manifest.items() if k != "digest"})
    (changed / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        data.make_source(set_config(changed), "train")


def test_a_missing_or_broken_manifest(tmp_path):
    for content, message in (
        (None, r"holds no dataset\.json"),
        ("[1, 2", r"bad dataset\.json"),
        ("[1, 2]", "schema None"),
    ):
        if content:
            (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(UserError, match=f"^path=.*{message}.*python -m jaxvid.prepare"):
            data.make_source(set_config(tmp_path), "train")


def test_windows_beyond_the_set_are_refused(made):
    with pytest.raises(UserError, match=r"^frames=5: with stride=2 .*spans 9.*stores 8"):
        data.make_source(set_config(made, frames=5, stride=2), "train")
    with pytest.raises(UserError, match=r"^size=64: the set stores 48"):
        data.make_source(set_config(made, size=64), "train")


def test_a_broken_record_is_named(made, monkeypatch):
    source = data.make_source(set_config(made), "train")
    header, chunk = shards.unpack(source._records[0], {OPEN: None})
    for record in (b"", shards.pack(header, chunk[:40])):
        monkeypatch.setattr(source, "_records", [record])
        with pytest.raises(UserError, match=r"^clip=(record 0|(cats|dogs)/\d)"):
            source.read(0)
