"""Clips that are completed from some of their pixels: quality of the rest, and seams."""

import jax.numpy as jnp
import numpy as np

from jaxvid.data.transforms import normalize
from jaxvid.evaluators import report
from jaxvid.evaluators.held_out import HeldOut
from jaxvid.masking import commit
from jaxvid.tasks.base import Run

SCORES = ("psnr", "padding", "tokenizer", "seam", "seam_real")


def suits(run: Run) -> bool:
    """Whether training had conditions of pixels."""
    return run.config.task.get("mask", {}).get("commit", 0) > 0


def measure(run: Run, held_out: HeldOut, batches: int) -> dict:
    """{"clips", "by_kind": {kind of `masking.commit`: SCORES}} of held-out clips.

    psnr: of the unknown pixels of all clips together, dB. padding: that of the padded clip, the
    guess that the network begins with. tokenizer: that of the real clip encoded and decoded, the
    ceiling. seam: the mean step from a known pixel to an unknown neighbour in space or time,
    seam_real: of the real clip.
    """
    task, found, clips = run.task, {kind: [] for kind in commit.KINDS}, 0
    for rng, batch, new in held_out.batches(batches):
        real = normalize(jnp.asarray(batch["video"]))
        rebuilt = task.decode(run.frozen, task.tokens(run.frozen, batch["video"]))[0]
        clips += len(new)
        for kind, rows in found.items():
            made = task.fill(run.params, rng, batch, kind, frozen=run.frozen)
            known = task.known(kind)
            chosen = commit.stacked([known] * len(real))
            guesses = (made, commit.padded(real, chosen), rebuilt)
            errors = [_error(guess, real, known.is_known_THW)[np.array(new)] for guess in guesses]
            seams = [_seam(x, known.is_known_THW)[np.array(new)] for x in (made, real)]
            rows.append(np.stack([*errors, *seams]))
    scores = {kind: np.concatenate(rows, axis=1).mean(1) for kind, rows in found.items()}
    return {
        "clips": clips,
        "by_kind": {kind: _figures(means) for kind, means in scores.items()},
    }


def table(found: dict) -> str:
    """The scores of `measure`, a row for each kind of condition."""
    rows = [(k, *(f"{row[score]:.3f}" for score in SCORES)) for k, row in found["by_kind"].items()]
    return "\n".join(
        [
            f"{found['clips']} held-out clips, completed from some of their pixels: PSNR of the "
            "others, in dB",
            report.table(("known", *SCORES), rows),
            "padding: of the padded clip; tokenizer: of the real clip, encoded and decoded; seam: "
            "mean step from a known pixel to an unknown neighbour, and that in the real clip",
        ]
    )


def _figures(means):
    *errors, seam, seam_real = means.tolist()
    psnr = [float(10 * np.log10(4 / max(error, 1e-12))) for error in errors]  # pixels span 2
    return dict(zip(SCORES, (*psnr, seam, seam_real)))


def _error(video, real, is_known_THW):
    """Mean squared error of the unknown pixels of each clip [B]."""
    error = jnp.square(video - real).mean(-1) * ~is_known_THW
    return np.asarray(error.sum((1, 2, 3)) / (~is_known_THW).sum())


def _seam(video, is_known_THW):
    """Mean absolute step between known pixels and unknown neighbours of each clip [B]."""
    total, count = 0.0, 0
    for axis in range(3):
        at = jnp.abs(jnp.diff(video, axis=axis + 1)).mean(-1)
        is_edge = np.diff(is_known_THW, axis=axis)
        total, count = total + (at * is_edge).sum((1, 2, 3)), count + is_edge.sum()
    return np.asarray(total / count)
