"""The commands of the README at the smallest size, each in a process of its own."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxvid

ROOT = Path(__file__).parents[1]
SMALL = (
    "--config=configs/ar_diffusion.py",
    "--config.data.frames=4",
    "--config.data.size=16",
    "--config.data.batch_size=4",
    "--config.task.patch=8",
    "--config.task.given=2",
    "--config.task.model.width=16",
    "--config.task.model.depth=1",
    "--config.task.model.heads=2",
    "--config.task.sampler.steps=2",
    "--config.task.sampler.s=2",
    "--config.task.history_dropout=0.5",
    "--config.optim.warmup=1",
    "--config.evaluate.batches=1",
    "--config.sample.num=2",
    "--config.log.every=1",
)


def run(module, *arguments):
    """Output of `python -m jaxvid.<module>` on one CPU device."""
    done = subprocess.run(
        [sys.executable, "-m", f"jaxvid.{module}", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports():
    for module in pkgutil.walk_packages(jaxvid.__path__, "jaxvid."):
        importlib.import_module(module.name)


@pytest.mark.slow
def test_train_resume_evaluate_and_sample(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert "finished at step 2" in run("train", workdir, *SMALL, "--config.steps=2")
    assert "resuming at step 2 of 3" in run("train", workdir, *SMALL, "--config.steps=3")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert (tmp_path / "run" / "ckpt" / "3" / "state").is_dir()
    assert (tmp_path / "run" / "samples" / "3" / "sheet.png").stat().st_size > 0

    out = run("evaluate", workdir)
    assert "the strongest baseline (*)" in out and "sprites keep colour and shape" in out
    scores = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    assert scores["step"] == 3 and scores["psnr"][:2] == [None, None]
    assert len(scores["psnr_copy_last"]) == len(scores["psnr"])
    assert scores["steady_sprites"]["clips"] == 64
    assert (tmp_path / "run" / "evaluate.mp4").stat().st_size > 0

    flags = ("--frames=6", "--num=1", "--history_guidance=1.5", "--history_level=0.4")
    out = run("sample", workdir, *flags, f"--out={tmp_path / 'clips'}")
    assert "1 clips of 6 frames" in out
    assert list((tmp_path / "clips").glob("*.mp4"))


@pytest.mark.slow
def test_train_with_captions_and_sample_a_prompt(tmp_path):
    workdir, small = f"--workdir={tmp_path / 'run'}", [*SMALL, "--config.steps=1"]
    small[0] += ":cond=text"
    assert "finished at step 1" in run("train", workdir, *small)
    flags = ("--prompt=A red square moves left", "--guidance=2", "--frames=6", "--num=1")
    assert "1 clips of 6 frames" in run("sample", workdir, *flags)
