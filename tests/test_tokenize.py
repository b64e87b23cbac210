"""jaxvid.tokenize: pieces, resuming, splits, and refusals."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxvid import data, tokenize
from jaxvid.data import clips, journal, shards
from jaxvid.data.source import SPLITS
from jaxvid.errors import UserError
from jaxvid.models.tokenizer import Tokenizer
from tests.tokenizer_runs import gaussian, prepared, videos
from tests.videos import data_config, prepare_here, write_clip

pytestmark = pytest.mark.slow

encode = functools.partial(tokenize.tokenize, fps=0)


def read_all(path, split="train", *, frames=5, name="latents"):
    source = data.make_source(data_config(name, path, frames=frames, size=12), split)
    return {source.name(index): source[index] for index in range(len(source))}


def test_pieces_equal_the_whole(tmp_path, monkeypatch):
    """Videos of 6 .. 9 frames as clips of 7: a stream of pieces of 3, 2 and 2."""
    found = []
    for about in (32, 2):
        monkeypatch.setattr(
            Tokenizer, "pieces", functools.partialmethod(Tokenizer.pieces, about=about)
        )
        path = tmp_path / str(about)
        manifest = encode(gaussian(), videos(), path, frames=7, batch=2)
        assert manifest["skipped"] == [{"name": "a/0.mp4", "reason": "has 6 frames, 7 are needed"}]
        found.append(read_all(path, frames=7) | read_all(path, "validation", frames=7))
    assert sorted(found[0]) == ["a/2.mp4#0", "b/1.mp4#0", "b/3.mp4#0"]
    for name, example in found[0].items():
        np.testing.assert_allclose(found[1][name]["latents"], example["latents"], atol=1e-5)


@pytest.mark.parametrize("kind", ["set", "videos"])
def test_a_killed_run_resumes(kind, tmp_path, monkeypatch):
    """With the same bits, between items or in the middle of a video; nothing is done twice."""
    src, options = prepared(), dict(batch=1)
    if kind == "videos":
        src, options = tmp_path / "clips", dict(batch=1, frames=3)
        for name in "ab":
            write_clip(src / f"{name}.mp4", 8, height=12, width=16)  # two clips each
    whole, out = tmp_path / "whole", tmp_path / "set"
    encode(gaussian(), src, whole, **options)
    monkeypatch.setattr(journal, "SAVE_SECONDS", 0)
    done, call = [], tokenize.Encoder.__call__

    def die_at_the_fourth(encoder, pieces):
        done.append(call(encoder, pieces))
        if len(done) == 4:
            raise KeyboardInterrupt
        return done[-1]

    monkeypatch.setattr(tokenize.Encoder, "__call__", die_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        encode(gaussian(), src, out, **options)
    partial = tmp_path / "set.partial"
    saved = json.loads((partial / "journal.json").read_text())
    assert (saved["done"], saved["part"]) == ((3, 0) if kind == "set" else (1, 1))
    (partial / f"train-{len(saved['records']['train']):05d}").write_bytes(b"half")
    assert not out.exists()
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        shards.read_manifest(partial, "latents")
    with pytest.raises(UserError, match="the beginning of another set"):
        encode(gaussian(), src, out, **options, mirrored=True)
    encode(gaussian(), src, out, **options)
    assert len(done) == 5 and done[3] == done[4]  # four clips, one of them twice
    manifests = [shards.read_manifest(path, "latents") for path in (whole, out)]
    assert manifests[0]["splits"]["train"]["records"] == (3 if kind == "set" else 2)
    for split in ("train", "validation"):
        counts = [manifest["splits"][split]["records"] for manifest in manifests]
        assert counts[0] == counts[1] > 0
        frames = manifests[0]["frames"]
        sets = [read_all(path, split, frames=frames) for path in (whole, out)]
        jax.tree.map(np.testing.assert_array_equal, *sets)


def test_splits_are_those_of_prepare(tmp_path):
    """Also if the first scenes are too short, or break off after clips that can be read."""
    src = tmp_path / "clips"
    order = clips.Splits([f"{number}.mkv" for number in range(15)]).order
    for place, name in enumerate(order):
        write_clip(src / name, 3 if place == 0 else 10, height=12, width=16, gop=1)
    content = (src / order[1]).read_bytes()
    (src / order[1]).write_bytes(content[: -len(content) // 8] + bytes(len(content) // 8))
    skipped = prepare_here(src, tmp_path / "array_record", size=12, frames=5)["skipped"]
    assert [entry["name"] for entry in skipped] == order[:2]
    encode(gaussian(), src, tmp_path / "latents")
    found = {
        name: [set(read_all(tmp_path / name, split, name=name)) for split in SPLITS]
        for name in ("array_record", "latents")
    }
    assert found["latents"] == found["array_record"]
    assert {name.partition("#")[0] for name in found["latents"][1]} == set(order[2:4])
    held_out = set(read_all(src, "validation", frames=3, name="folder"))
    assert held_out.isdisjoint(name.partition("#")[0] for name in found["latents"][0])


@pytest.mark.parametrize("lengths, split", [((9,), "validation"), ((9, 3, 3), "train")])
def test_a_set_without_a_split_is_refused(tmp_path, lengths, split):
    src = tmp_path / "clips"
    for number, frames in enumerate(lengths):
        write_clip(src / f"{number}.mp4", frames, height=12, width=16)
    for make in (
        lambda: encode(gaussian(), src, tmp_path / "latents"),
        lambda: prepare_here(src, tmp_path / "pixels", size=12, frames=5),
    ):
        with pytest.raises(UserError, match=f"^src={src}: gives no clips for {split}; add videos"):
            make()
    assert not (tmp_path / "latents").exists() and not (tmp_path / "pixels").exists()


def test_names_need_not_be_utf_8(tmp_path):
    for name in (b"\xff.mp4", b"\xfe.mp4"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(UserError, match=r"skipped 2 of 2 files.* \\xff.mp4 is empty"):
        encode(gaussian(), tmp_path, tmp_path / "latents")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frames": 6}, "frames=6: .* use 5 or 7"),
        ({"size": 10}, "size=10: .*does not divide frames of 10 x 10"),
        ({"batch": 0}, "batch=0: must be at least 1"),
        ({"batch": 10**9}, "batch=1000000000: must be at most 1048576"),
        ({"batch": 10**6, "size": 1020}, "batch=1000000, frames=5, size=1020: clips take about"),
        ({"src": "/nowhere"}, "src='/nowhere': no such directory"),
        ({"workdir": "/nowhere"}, "workdir=/nowhere: /nowhere/config.json: no such file"),
        ({"fps": -1}, "fps=-1: must lie"),
        ({"size": 0}, "size=0: must be at least 1"),
        ({"frames": 0}, "frames=0: must be at least 1"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    arguments = dict(workdir=gaussian(), src=prepared(), out=tmp_path / "set") | options
    with pytest.raises(UserError, match=f"^{message}") as caught:
        tokenize.tokenize(**arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "jaxvid.tokenize", "--workdir", str(gaussian())]
    command += ["--src", str(prepared()), f"--out={tmp_path / 'set'}"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=300)
    failed = run([*command, "--frames=6"])
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: --frames=6: ")
    made = run([*command, "--flip", "--batch=2"])
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [
        "of each clip 3 x 9 x 8 float32",
        "train: 3 clips",
        "validation: 1 clips",
    ]
    assert "3/3 batches, 0 skipped" in made.stderr
    assert shards.read_manifest(tmp_path / "set", "latents")["mirrored"]
