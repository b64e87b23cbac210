"""The folder source: labels, the split by clip, windows, and files that are not videos."""

import os

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid import data
from jaxvid.data import clips, folder, video
from jaxvid.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder_config(path, **changes):
    fields = dict(
        name="folder", path=str(path), frames=4, size=32, stride=1, batch_size=2, flip=False
    )
    fields |= dict(crop="random", difficulty=0.0, num_clips=0, workers=0, threads=0)
    return ConfigDict(fields | dict(text_tokens=0, text_width=8) | changes)


@pytest.fixture
def tree(tmp_path, clip):
    for name in ("cats", "dogs"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for number in range(6):
            clip(tmp_path / "videos" / name / f"{number}.mp4", 20, height=32)
    return tmp_path / "videos"


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_classes_come_from_directories_and_captions_from_classes(tree):
    source = data.make_source(folder_config(tree), "train")
    assert (source.num_classes, source.captions) == (2, True)
    for i in range(len(source)):
        expected = source.name(i).split("/")[0]
        assert (source[i]["label"], source[i]["caption"]) == (expected == "dogs", expected)
    assert clips.classes_of(["a.mp4", "b.mp4"]) == clips.classes_of(["only/a.mp4"]) == []


def test_the_split_is_by_clip_and_whole(tree):
    config = folder_config(tree)
    train = names(data.make_source(config, "train"))
    validation = names(data.make_source(config, "validation"))
    assert (len(train), len(validation)) == (11, 1)
    assert sorted(train + validation) == clips.find(tree)


def test_clips_of_one_scene_stay_together():
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


@pytest.fixture
def square(tmp_path, clip):
    for name in ("a.mp4", "b.mp4"):
        clip(tmp_path / name, 14, height=64)
    return tmp_path


@pytest.mark.parametrize("kept", [0, 2**29])
def test_windows_move_with_the_rng_and_keep_their_stride(square, numbers, kept, monkeypatch):
    monkeypatch.setattr(folder, "KEPT_BYTES", kept)
    source = data.make_source(folder_config(square, size=64, stride=3), "train")
    rngs = map(np.random.default_rng, range(30))
    shown = {tuple(numbers(source.read(0, rng)["video"])) for rng in rngs}
    assert shown == {(start, start + 3, start + 6, start + 9) for start in range(5)}


def test_middle_window_without_chance(square, numbers):
    source = data.make_source(folder_config(square, size=64), "train")
    assert numbers(source[0]["video"]) == [5, 6, 7, 8]
    np.testing.assert_array_equal(source[0]["video"], source[0]["video"])


def test_hostile_files_are_skipped_counted_and_named(hostile, caplog):
    source = data.make_source(folder_config(hostile), "train")
    skipped = dict(source.skipped)
    assert sorted(skipped) == ["sound.mp4", "text.mp4", "truncated.mp4", "zero.mp4"]
    assert "skipped 4 of 6 files" in caplog.text
    assert "zero.mp4 is empty" in caplog.text
    assert len(source) + len(data.make_source(folder_config(hostile), "validation")) == 2
    batch = next(iter(_iterate(folder_config(hostile))))
    assert batch["video"].shape == (2, 4, 32, 32, 3)


def _iterate(config, **options):
    options = dict(split="train", seed=0, batch_size=2, process_index=0, process_count=1) | options
    return data.make_iterator(config, **options)


def test_short_clips_are_skipped_with_their_length(tree, clip):
    clip(tree / "cats" / "short.mp4", 5)
    source = data.make_source(folder_config(tree, frames=8), "train")
    assert source.skipped == [("cats/short.mp4", "has 5 frames, a window spans 8")]


def test_nothing_usable_is_one_line(tmp_path, clip):
    for path, words in [("", "no such directory"), (tmp_path / "none", "no such directory")]:
        with pytest.raises(UserError, match=words):
            data.make_source(folder_config(path), "train")
    (tmp_path / "notes.txt").write_text("no videos here")
    with pytest.raises(UserError, match=r"holds no \.mp4"):
        data.make_source(folder_config(tmp_path), "train")
    clip(tmp_path / "short.mp4", 3)
    with pytest.raises(UserError, match=r"short.mp4 has 3 frames.*data.frames") as caught:
        data.make_source(folder_config(tmp_path), "train")
    assert "\n" not in str(caught.value)
    clip(tmp_path / "short.mp4", 9)
    with pytest.raises(UserError, match="no clips in the validation split"):
        data.make_source(folder_config(tmp_path), "validation")


def test_the_index_is_kept_and_follows_changes(tree, clip, monkeypatch):
    probed = []
    probe = video.probe
    monkeypatch.setattr(video, "probe", lambda file: probed.append(file.name) or probe(file))
    data.make_source(folder_config(tree), "train")
    assert len(probed) == 12
    data.make_source(folder_config(tree), "validation")
    assert len(probed) == 12
    clip(tree / "cats" / "0.mp4", 25)
    data.make_source(folder_config(tree), "train")
    assert [os.path.basename(name) for name in probed[12:]] == ["0.mp4"]


def test_a_file_lost_while_running_is_named(tree):
    source = data.make_source(folder_config(tree), "train")
    os.remove(tree / source.name(3))
    with pytest.raises(UserError, match=source.name(3)):
        source.read(3)


def test_a_small_split_is_decoded_once_and_shows_the_same(square, monkeypatch):
    read, calls = video.read, []
    monkeypatch.setattr(video, "read", lambda *a: calls.append(len(a[1])) or read(*a))
    config = folder_config(square, stride=2)
    kept = data.make_source(config, "train")
    monkeypatch.setattr(folder, "KEPT_BYTES", 3 * 14 * 32 * 32 - 1)
    unkept = data.make_source(config, "train")
    for seed in range(5):
        windows = [source.read(0, np.random.default_rng(seed)) for source in (kept, unkept)]
        np.testing.assert_array_equal(windows[0]["video"], windows[1]["video"])
    assert calls == [14, 4, 4, 4, 4, 4]


def test_batches_do_not_depend_on_hosts_or_threads(tree):
    config = folder_config(tree, flip=True)
    alone = [next(iterator) for iterator in [_iterate(config)] for _ in range(5)]
    for host in range(2):
        iterator = _iterate(
            folder_config(tree, flip=True, threads=2), process_index=host, process_count=2
        )
        for batch in alone:
            part = next(iterator)
            np.testing.assert_array_equal(part["video"][0], batch["video"][host])
        iterator.close()
