"""The folder source: labels, splits by clip, windows, and files that are not videos."""

import errno
import functools
import io
import os
import shutil

import numpy as np
import pytest

from jaxvid import data
from jaxvid.data import clips, folder, video
from jaxvid.errors import UserError
from tests.videos import data_config, frame_numbers, write_clip, write_hostile

folder_config = functools.partial(data_config, "folder", size=32, crop="random")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two classes of six clips."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("cats", "dogs"):
        for number in range(6):
            write_clip(root / name / f"{number}.mp4", 20, height=32)
    return root


@pytest.fixture
def copied(tree, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(tree, tmp_path / "videos")


@pytest.fixture
def square(tmp_path):
    """Two clips of 14 frames, one for each split."""
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, 14, height=64)
    return tmp_path


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_classes_and_splits(tree):
    source, held_out = (
        data.make_source(folder_config(tree), split) for split in ("train", "validation")
    )
    assert (source.num_classes, source.captions, source.tokenizer) == (2, True, "")
    for i in range(len(source)):
        expected = source.name(i).split("/")[0]
        assert (source[i]["label"], source[i]["caption"]) == (expected == "dogs", expected)
    assert clips.classes_of(["a.mp4", "b.mp4"]) == clips.classes_of(["only/a.mp4"]) == []
    assert (len(source), len(held_out)) == (11, 1)
    assert source.listing() == "\n".join(names(source))
    assert sorted(names(source) + names(held_out)) == clips.find(tree)


def test_the_digest_is_of_the_clips_and_not_of_their_place(tree, copied):
    first, second = (data.make_source(folder_config(path), "train") for path in (tree, copied))
    assert first.digest == second.digest != ""
    (copied / "cats" / "0.mp4").rename(copied / "cats" / "00.mp4")
    assert data.make_source(folder_config(copied), "train").digest != first.digest


def test_clips_of_one_scene_have_one_split():
    ucf = [
        f"v_Archery_g{group:02}_c{take:02}.avi" for group in range(1, 26) for take in range(1, 5)
    ]
    splits = clips.split_of(ucf)
    held_out = {name for name in ucf if splits[name] == "validation"}
    assert len(held_out) == 8
    assert len({name[:13] for name in held_out}) == 2
    assert splits == clips.split_of(ucf[::-1])
    assert sorted(clips.split_of(["a.mp4", "b.mp4"]).values()) == ["train", "validation"]
    assert clips.split_of(["a.mp4"]) == {"a.mp4": "train"}


@pytest.mark.parametrize("kept", [0, 2**29])
def test_windows(square, kept, monkeypatch):
    """Random with an rng, at every start; the middle without."""
    monkeypatch.setattr(folder, "KEPT_BYTES", kept)
    source = data.make_source(folder_config(square, size=64, stride=3), "train")
    rngs = map(np.random.default_rng, range(30))
    shown = {tuple(frame_numbers(source.read(0, rng)["video"])) for rng in rngs}
    assert shown == {(start, start + 3, start + 6, start + 9) for start in range(5)}
    assert frame_numbers(source[0]["video"]) == [2, 5, 8, 11]


def test_no_window_spans_a_gap(tmp_path, caplog):
    for name in ("a.mp4", "b.mp4"):
        times = [*range(6), *range(2400, 2408)]
        write_clip(tmp_path / name, 14, height=64, times=times, options={"bf": "0"})
    source = data.make_source(folder_config(tmp_path, size=64), "train")
    rngs = map(np.random.default_rng, range(60))
    shown = {frame_numbers(source.read(0, rng)["video"])[0] for rng in rngs}
    assert shown == {0, 1, 2, 6, 7, 8, 9, 10}
    assert frame_numbers(source[0]["video"]) == [8, 9, 10, 11]
    assert "cut 1 of 2 files: " in caplog.text
    with pytest.raises(UserError, match="mp4 has 8 frames in a row, it is cut 1 times"):
        data.make_source(folder_config(tmp_path, frames=9), "train")


@pytest.mark.parametrize("kept", [0, 2**29])
def test_clips_of_different_rates_move_alike(tmp_path, monkeypatch, kept):
    """With `fps`; by index they differ."""
    monkeypatch.setattr(folder, "KEPT_BYTES", kept)
    for name, rate in (("a.mp4", 8), ("b.mp4", 24)):
        write_clip(tmp_path / name, rate, height=64, fps=rate)
    for fps, stride, expected in ((8, 1, {(2, 3, 4, 5), (6, 9, 12, 15)}), (16, 2, None)):
        config = folder_config(tmp_path, size=64, fps=fps, stride=stride)
        sources = [data.make_source(config, split) for split in ("train", "validation")]
        found = {tuple(np.diff(frame_numbers(source[0]["video"]))) for source in sources}
        assert found == {(1, 1, 1), (3, 3, 3)} and sources[0].fps == fps
        if expected:
            assert {tuple(frame_numbers(source[0]["video"])) for source in sources} == expected


def test_a_small_split_is_decoded_once(square, monkeypatch):
    read, calls = video.read, []
    monkeypatch.setattr(video, "read", lambda *a: calls.append(len(a[1])) or read(*a))
    config = folder_config(square, stride=2)
    kept = data.make_source(config, "train")
    monkeypatch.setattr(folder, "KEPT_BYTES", 3 * 14 * 32 * 32 - 1)
    decoded = data.make_source(config, "train")
    for seed in range(5):
        windows = [source.read(0, np.random.default_rng(seed)) for source in (kept, decoded)]
        np.testing.assert_array_equal(windows[0]["video"], windows[1]["video"])
    assert calls == [14, 4, 4, 4, 4, 4]


def test_bad_files_are_skipped_and_named(tmp_path, caplog):
    root = write_hostile(tmp_path / "hostile")
    write_clip(root / "short.mp4", 3)
    source = data.make_source(folder_config(root), "train")
    skipped = dict(source.skipped)
    assert sorted(skipped) == ["short.mp4", "sound.mp4", "text.mp4", "truncated.mp4", "zero.mp4"]
    assert skipped["short.mp4"] == "has 3 frames, a window spans 4"
    assert "skipped 5 of 7 files" in caplog.text
    assert "zero.mp4 is empty" in caplog.text
    assert len(source) + len(data.make_source(folder_config(root), "validation")) == 2


def test_links_are_followed_once_and_other_files_counted(tmp_path, caplog):
    root = tmp_path / "root"
    for name in ("root/cats/1.mp4", "elsewhere/dogs/2.mp4", "elsewhere/dogs/deep/3.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (root / "dogs").symlink_to(tmp_path / "elsewhere/dogs")
    (root / "a loop").symlink_to(root)
    (root / "again").symlink_to(root / "cats")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    for name in ("notes.txt", "more.TXT"):
        (root / name).write_text("no video")
    assert clips.find(root) == ["cats/1.mp4", "dogs/2.mp4", "dogs/deep/3.mp4"]
    assert "2 .txt, 2 links to a directory that is read already, 1 without a suffix" in caplog.text


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, 9)
    source = data.make_source(folder_config(tmp_path), "train")
    assert source.skipped == [("pipe.mp4", "is not a file with content")]


def test_useless_folders_are_refused(tmp_path):
    for path in ("", tmp_path / "none"):
        with pytest.raises(UserError, match=f"^path='{path}': no such directory"):
            data.make_source(folder_config(path), "train")
    (tmp_path / "notes.txt").write_text("no videos here")
    with pytest.raises(UserError, match=r"holds no \.mp4 .*only 1 .txt"):
        data.make_source(folder_config(tmp_path), "train")
    write_clip(tmp_path / "short.mp4", 3)
    with pytest.raises(UserError, match=r"short.mp4 has 3 frames.*\(frames, stride\)") as caught:
        data.make_source(folder_config(tmp_path), "train")
    assert "\n" not in str(caught.value)
    write_clip(tmp_path / "short.mp4", 9)
    with pytest.raises(UserError, match="no clips in the validation split"):
        data.make_source(folder_config(tmp_path), "validation")


def test_the_index_is_kept_and_follows_changes(copied, monkeypatch):
    probed = []
    probe = video.probe
    monkeypatch.setattr(video, "probe", lambda file: probed.append(file.name) or probe(file))
    data.make_source(folder_config(copied), "train")
    assert len(probed) == 12
    data.make_source(folder_config(copied), "validation")
    assert len(probed) == 12
    write_clip(copied / "cats" / "0.mp4", 25)
    source = data.make_source(folder_config(copied), "train")
    assert [os.path.basename(name) for name in probed[12:]] == ["0.mp4"]
    os.remove(copied / source.name(3))
    with pytest.raises(UserError, match=f"^clip={source.name(3)}: "):
        source.read(3)


def test_a_failure_to_read_is_not_kept(square, monkeypatch):
    """Neither of opening nor in the middle of decoding; the index then finds both clips."""
    opened = video.opened

    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, "Input/output error")

    def fail_to_open(path):
        raise OSError(errno.EACCES, "Permission denied")

    for failing, reason in (
        (lambda path: Failing() if path.endswith("b.mp4") else opened(path), "Input/output error"),
        (lambda path: fail_to_open(path) if path.endswith("b.mp4") else opened(path), "Permission"),
    ):
        monkeypatch.setattr(video, "opened", failing)
        infos, ((name, found),) = clips.index(square, ["a.mp4", "b.mp4"])
        assert (list(infos), name) == (["a.mp4"], "b.mp4")
        assert found.startswith(f"cannot be read ({reason}")
    monkeypatch.setattr(video, "opened", opened)
    infos, skipped = clips.index(square, ["a.mp4", "b.mp4"])
    assert (sorted(infos), skipped) == (["a.mp4", "b.mp4"], [])


def test_batches_do_not_depend_on_hosts_or_threads(tree):
    def iterate(threads, host, hosts):
        config = folder_config(tree, flip=True, threads=threads)
        options = dict(process_index=host, process_count=hosts)
        return data.make_iterator(config, split="train", seed=0, batch_size=2, **options)

    alone = [next(iterator) for iterator in [iterate(0, 0, 1)] for _ in range(5)]
    for host in range(2):
        iterator = iterate(2, host, 2)
        for batch in alone:
            np.testing.assert_array_equal(next(iterator)["video"][0], batch["video"][host])
        iterator.close()
