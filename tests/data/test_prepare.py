"""prepare writes a set that reads back as the clips it was made from, whole or not at all."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid import data
from jaxvid.data import array_record, prepare
from jaxvid.errors import UserError


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """Processes take a second to start; only the tests about them do start them."""
    if "processes" not in request.node.name:
        one_by_one = lambda work, names, workers: ((name, work(name)) for name in names)  # noqa: E731
        monkeypatch.setattr(prepare, "in_processes", one_by_one)


def run(src, out, *options):
    return prepare.main(["--src", str(src), "--out", str(out), "--workers=1", *options])


def set_config(path, **changes):
    fields = dict(
        name="array_record", path=str(path), frames=4, size=48, stride=1, batch_size=2, flip=False
    )
    fields |= dict(crop="center", difficulty=0.0, num_clips=0, workers=0, threads=0)
    return ConfigDict(fields | dict(text_tokens=0, text_width=8) | changes)


@pytest.fixture
def made(tmp_path, clip):
    """A prepared set of two classes at the source's rate: 5 clips of 16 frames, one to spare."""
    for name in ("cats/1.mp4", "cats/2.avi", "dogs/1.webm", "dogs/2.mkv", "dogs/3.mp4"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        clip(path, 17, height=48, width=48)
    assert run(tmp_path / "src", tmp_path / "set", "--size=48", "--frames=8", "--fps=0") == 0
    return tmp_path / "set"


def test_the_manifest_tells_all(made):
    manifest = json.loads((made / "dataset.json").read_text())
    shards = [manifest["splits"][split].pop("shards") for split in ("train", "validation")]
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
    }
    for shard in shards[0] + shards[1]:
        content = (made / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(content) == shard["bytes"]
    assert sorted(os.listdir(made)) == sorted(
        ["dataset.json"] + [shard["file"] for shard in shards[0] + shards[1]]
    )


def test_chunks_read_back_as_the_clips(made, numbers):
    seen = {}
    for split in ("train", "validation"):
        source = data.make_source(set_config(made, frames=8), split)
        assert source.num_classes == 2
        for i in range(len(source)):
            clip_name, chunk = source.name(i).split("#")
            seen.setdefault(clip_name, set()).add((split, int(chunk)))
            example = source[i]
            first = 8 * int(chunk)
            expected = [n % 12 for n in range(first, first + 8)]
            assert numbers(example["video"], period=12) == expected
            assert example["caption"] == clip_name.split("/")[0]
            assert example["label"] == ["cats", "dogs"].index(example["caption"])
    assert len(seen) == 5
    for places in seen.values():  # every chunk of a clip is on one side
        assert len(places) == 2
        assert len({split for split, _ in places}) == 1


def test_windows_inside_a_chunk(made, numbers):
    source = data.make_source(set_config(made, stride=2, size=24, frames=3), "train")
    shown = {
        tuple(np.array(numbers(source.read(0, np.random.default_rng(seed))["video"], period=12)))
        for seed in range(30)
    }
    first = 8 * int(source.name(0).split("#")[1])
    assert shown == {tuple((first + s + n) % 12 for n in (0, 2, 4)) for s in range(4)}
    assert source[0]["video"].shape == (3, 24, 24, 3)


def test_batches_through_threads(made):
    options = dict(split="train", seed=0, batch_size=2, process_index=0, process_count=1)
    plain = data.make_iterator(set_config(made), **options)
    threaded = data.make_iterator(set_config(made, threads=2), **options)
    for _ in range(6):
        np.testing.assert_array_equal(next(plain)["video"], next(threaded)["video"])
    threaded.close()


def make_source_folder(tmp_path, clip, count, frames):
    (tmp_path / "src").mkdir()
    for number in range(count):
        clip(tmp_path / "src" / f"{number}.mp4", frames)


def test_resampling_and_cropping(tmp_path, clip, numbers):
    make_source_folder(tmp_path, clip, 2, 36)
    assert run(tmp_path / "src", tmp_path / "set", "--size=48", "--frames=4", "--fps=8") == 0
    source = data.make_source(set_config(tmp_path / "set"), "train")
    assert len(source) == 3
    # Every third frame; of the 16 places of the bar the middle 12 are left.
    assert numbers(source[0]["video"], period=12)[1:] == [1, 4, 7]


def test_bad_files_are_skipped_counted_and_named(hostile, tmp_path, clip, capsys):
    clip(hostile / "short.mp4", 5)
    (hostile / os.fsdecode(b"\xff.mp4")).write_bytes(b"")
    assert run(hostile, tmp_path / "set", "--size=48", "--frames=8", "--fps=0") == 0
    manifest = json.loads((tmp_path / "set" / "dataset.json").read_text())
    skipped = {entry["name"]: entry["reason"] for entry in manifest["skipped"]}
    assert skipped.pop(os.fsdecode(b"\xff.mp4")) == "is empty"  # no UTF-8
    assert sorted(skipped) == ["short.mp4", "sound.mp4", "text.mp4", "truncated.mp4", "zero.mp4"]
    assert skipped["short.mp4"] == "has 5 frames, 8 are needed"
    clips = [manifest["splits"][split]["clips"] for split in ("train", "validation")]
    assert clips == [1, 1]  # a bad file never takes the place of the held-out clip
    printed = capsys.readouterr()
    assert "skipped 6 files" in printed.out
    assert "  zero.mp4 is empty" in printed.out
    assert "\\xff.mp4 is empty" in printed.out
    assert "8/8 clips, 6 skipped" in printed.err


def test_shards_are_cut_by_size(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 3000)
    make_source_folder(tmp_path, clip, 6, 16)
    assert run(tmp_path / "src", tmp_path / "set", "--size=48", "--frames=4", "--fps=0") == 0
    manifest = array_record.read_manifest(tmp_path / "set")
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) > 2
    assert shards[1]["file"] == f"train-00001-of-{len(shards):05d}.array_record"
    source = data.make_source(set_config(tmp_path / "set"), "train")
    assert len(source) == sum(shard["records"] for shard in shards) == 20
    assert len({source.name(i) for i in range(20)}) == 20


def test_an_existing_set_is_never_overwritten(made, tmp_path, capsys):
    before = (made / "dataset.json").read_bytes()
    assert run(tmp_path / "src", made, "--size=48") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "exists already" in error
    assert (made / "dataset.json").read_bytes() == before


@pytest.mark.parametrize("src", ["nowhere", "set.partial", "src"])
def test_a_folder_of_somebody_is_never_removed(tmp_path, src, capsys):
    """Whether it is the source itself or only lies where the new set would grow."""
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "notes.mp4").write_text("mine")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "clip.mp4").write_text("")
    assert run(tmp_path / src, tmp_path / "set", "--size=48") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "set.partial" / "notes.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size=47"], "--size=47: H.264 needs an even"),
        (["--frames=0"], "--frames=0"),
        (["--fps=-1"], "--fps=-1"),
        (["--workers=0"], "--workers=0"),
        (["--src=/nowhere"], "--src='/nowhere': no such directory"),
        (["--out=/proc/set"], "--out=/proc/set: No such file or directory"),
    ],
)
def test_bad_options_are_one_line(tmp_path, clip, capsys, options, words):
    make_source_folder(tmp_path, clip, 1, 4)
    assert run(tmp_path / "src", tmp_path / "set", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_nothing_usable_leaves_nothing(tmp_path, clip, capsys):
    make_source_folder(tmp_path, clip, 1, 4)
    assert run(tmp_path / "src", tmp_path / "set", "--frames=8") == 2
    assert "skipped 1 of 1 files: 0.mp4 has 2 frames" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["src"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, clip, capsys, monkeypatch):
    class FullDisk(prepare.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device")

    make_source_folder(tmp_path, clip, 2, 24)
    monkeypatch.setattr(prepare, "ArrayRecordWriter", FullDisk)
    capsys.readouterr()
    assert run(tmp_path / "src", tmp_path / "set", "--size=48", "--frames=8") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("set: write() failed: No space left on device")
    assert os.listdir(tmp_path) == ["src"]


def test_an_interrupt_is_one_line_and_leaves_nothing(tmp_path, clip, capsys, monkeypatch):
    def interrupted(work, names, workers):
        raise KeyboardInterrupt

    make_source_folder(tmp_path, clip, 1, 4)
    monkeypatch.setattr(prepare, "in_processes", interrupted)
    assert run(tmp_path / "src", tmp_path / "set") == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert os.listdir(tmp_path) == ["src"]


def kill_the_process(name):
    """Stands for a file that crashes the decoder."""
    if name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return name.upper()


@pytest.mark.slow
def test_processes_outlive_a_file_that_kills_one():
    outcomes = list(prepare.in_processes(kill_the_process, "abc", 1))
    assert outcomes == [("a", "A"), ("b", "brings the decoder down"), ("c", "C")]


@pytest.mark.slow
def test_processes_killed_leave_nothing_that_looks_complete(tmp_path, clip):
    make_source_folder(tmp_path, clip, 40, 24)
    command = [sys.executable, "-m", "jaxvid.data.prepare", "--src", str(tmp_path / "src")]
    command += ["--out", str(tmp_path / "set"), "--size=48", "--fps=0", "--workers=1"]
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
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=100).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["set", "src"]
    assert len(data.make_source(set_config(tmp_path / "set"), "train")) == 36


def change_manifest(path, change):
    manifest = json.loads((path / "dataset.json").read_text())
    change(manifest)
    (path / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(schema=2), "schema 2, not 1"),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(file="../../etc/passwd"),
            "'../../etc/passwd', which is not a plain file name",
        ),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(file="/etc/passwd"),
            "'/etc/passwd', which is not a plain file name",
        ),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(file="lost.array_record"),
            "shard lost.array_record has no bytes",
        ),
        (lambda m: m["splits"]["train"]["shards"][0].update(bytes=1), "says 1"),
    ],
)
def test_a_manifest_is_not_trusted(made, change, words):
    change_manifest(made, change)
    with pytest.raises(UserError, match=words):
        data.make_source(set_config(made), "train")


def test_missing_or_broken_manifest(tmp_path):
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        data.make_source(set_config(tmp_path / "nowhere"), "train")
    (tmp_path / "dataset.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"bad dataset\.json"):
        data.make_source(set_config(tmp_path), "train")
    (tmp_path / "dataset.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="schema None"):
        data.make_source(set_config(tmp_path), "train")


def test_more_than_is_stored_is_refused_by_field(made):
    with pytest.raises(UserError, match=r"data\.frames=5, data\.stride=2.*spans 9.*stores 8"):
        data.make_source(set_config(made, frames=5, stride=2), "train")
    with pytest.raises(UserError, match=r"data\.size=64: the set stores 48"):
        data.make_source(set_config(made, size=64), "train")


def test_a_broken_record_is_named(made, monkeypatch):
    source = data.make_source(set_config(made), "train")
    header, chunk = array_record.unpack(source._records[0])
    for record in (b"", array_record.pack(header, chunk[:40])):
        monkeypatch.setattr(source, "_records", [record])
        with pytest.raises(UserError, match=r"clip=(record 0|(cats|dogs)/\d)"):
            source.read(0)
