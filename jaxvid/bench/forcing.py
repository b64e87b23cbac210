"""What noisy frames read in training, and how many steps a frame takes: quality and drift.

Trains every row of LAYOUTS, with and without shortcut forcing, over several seeds, at equal steps
and parameters, on sprites. Then held-out clips are continued from four frames, one frame after
another, with STEPS denoising steps per frame, to 4 and to 16 times the frames of training. What is
finished is kept, so the same command goes on where it stopped.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from jaxvid import files
from jaxvid.errors import UserError
from jaxvid.evaluators import drift
from jaxvid.runs import open_run

FRAMES, CLIPS = 4, 8  # frames of a training clip; continued clips of the held-out set
LENGTHS = (4 * FRAMES, 16 * FRAMES)
STEPS = (64, 8, 4, 2, 1)  # those that a network of shortcut.finest=64 knows
# Layout -> fields of the task. The second one cures exposure bias.
LAYOUTS = {
    "teacher_forced": ("layout=teacher_forced",),
    "resampled": ("layout=teacher_forced", "resampling.share=0.5", "resampling.shift=0.2"),
    "iid": ("layout=diffusion_forcing", "timesteps=iid"),
    "fopp": ("layout=diffusion_forcing", "timesteps=fopp"),
    "clean_prefix": ("layout=clean_prefix=0.7,diffusion_forcing=0.3", "timesteps=iid"),
}
FINEST = {"many": 0, "few": 64}  # shortcut.finest
SCORES = ("psnr", "same", "steady", "motion", "motion_real")


def command(layout: str, kind: str, seed: int, steps: int, workdir: Path) -> list[str]:
    """The command line that trains one run."""
    fields = (
        *LAYOUTS[layout],
        f"shortcut.finest={FINEST[kind]}",
        f"train_frames={FRAMES}",
        "patch=6",
        "model.width=96",
        "model.depth=3",
        "sampler.steps=64",
        "sampler.schedule=autoregressive",
    )
    return [
        *(sys.executable, "-m", "jaxvid.train", "--config=configs/ar_diffusion.py:steps=few"),
        *(f"--workdir={workdir}", f"--config.seed={seed}", f"--config.steps={steps}"),
        *(f"--config.task.{field}" for field in fields),
        *("--config.evaluate.every=0", "--config.sample.num=1", "--config.optim.ema=0.99"),
    ]


def measure(out: Path, seeds: int, steps: int) -> dict:
    """Train and score all runs -> {"by_<length>": {"<layout> <kind> <steps>": scores}}.

    A score is the mean over seeds; "<score>_std" its standard deviation, if there are several.
    Raises UserError if a training fails.
    """
    rows = {frames: {} for frames in LENGTHS}
    for layout in LAYOUTS:
        for kind in FINEST:
            runs = [Path(out, f"{layout}_{kind}_{seed}") for seed in range(seeds)]
            for seed, workdir in enumerate(runs):
                _train(command(layout, kind, seed, steps, workdir), workdir, steps)
            for sample_steps in STEPS:
                print(f"{layout} {kind}: {sample_steps} steps per frame", file=sys.stderr)
                found = [_scores(workdir, sample_steps) for workdir in runs]
                for frames in LENGTHS:
                    of_seeds = [by_length[str(frames)] for by_length in found]
                    rows[frames][f"{layout} {kind} {sample_steps}"] = _summary(of_seeds)
    return {f"by_{frames}_frames": table for frames, table in rows.items()}


def _train(arguments, workdir, steps):
    if Path(workdir, "ckpt", str(steps)).exists():
        return
    done = subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(arguments)}: failed: {done.stderr.strip().splitlines()[-1]}")


def _scores(workdir, sample_steps):
    path = Path(workdir, f"drift_{sample_steps}.json")
    if not path.exists():
        run = open_run(workdir, {"steps": sample_steps})
        with jax.set_mesh(run.mesh):
            found = drift.measure(run, LENGTHS, CLIPS)
        files.write(path, json.dumps({"step": run.step, **found}, indent=2) + "\n")
    return json.loads(path.read_text())["by_length"]


def _summary(of_seeds):
    found = {}
    for name in SCORES:
        values = [row[name] for row in of_seeds]
        found[name] = float(np.mean(values))
        if len(values) > 1 and not name.endswith("_real"):
            found[f"{name}_std"] = float(np.std(values, ddof=1))
    return found
