"""Recall: held-out clips, continued after gaps of given lengths and read by the oracle of the data.

The clips are real up to the end of the gap, so what is measured is the memory of the run and not
the drift of its own frames.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxvid import data, memory
from jaxvid.data.recall import Recall
from jaxvid.errors import UserError, within
from jaxvid.evaluators import report
from jaxvid.evaluators.drift import windows
from jaxvid.evaluators.held_out import frames_of
from jaxvid.tasks.base import Run
from jaxvid.tasks.streaming import Decoded, shown
from jaxvid.training.state import EVALUATE, step_rng


def check(run: Run, gaps: Sequence[str]) -> list[int]:
    """Gaps from the command line, in order; nothing is compiled.

    Raises UserError for a gap that is no number or too long for the memory of this machine, for
    data without gaps, and for a sampler that cannot stream.
    """
    found = sorted(set(frames_of(gaps, "gaps")))
    for gap in found:
        fields, frames = run.config.data, _clips(run).frames_for(gap)
        names = f"--gaps={gap}, data.batch_size={fields.batch_size}, data.size={fields.size}"
        pixels = 3 * fields.batch_size * frames * fields.size**2
        memory.require(names, "the pixels of clips, in float32,", 4 * pixels)
        try:
            with within("task"):
                jax.eval_shape(functools.partial(_carry, run, gap))
        except UserError as error:
            raise UserError(f"--gaps={gap}: cannot be streamed: {error}") from error
    return found


def measure(run: Run, gaps: Sequence[int], clips: int) -> dict:
    """Scores after each gap -> {"clips", "trained_gap", "chance", "by_gap": {gap: scores}}.

    The first `clips` held-out clips, with the longest lead, are given up to the end of the gap and
    go on as a stream. The scores are the means of
    `data.recall.Recall.scores`. "<score>_real" is the same of the real clips, the ceiling of the
    oracle, and "chance" what guesses without memory reach.
    """
    source, at_once = _clips(run), run.config.data.batch_size
    count, by_gap = min(clips, len(source)), {}
    for gap in gaps:
        clips_of_gap, rows = source.with_gap(gap), []
        for first in range(0, count, at_once):
            rows += _continued(run, clips_of_gap, range(first, min(first + at_once, count)))
        by_gap[str(gap)] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {
        "clips": count,
        "trained_gap": list(run.config.data.gap),
        "chance": dict(source.chance),
        "by_gap": by_gap,
    }


def table(found: dict) -> str:
    """The scores of `measure`, a row for each gap and one for chance."""
    names = [name for score in found["chance"] for name in (score, f"{score}_real")]
    rows = {**found["by_gap"], "chance": found["chance"]}
    lines = [
        (gap, *(f"{row[name]:.3f}" if name in row else "" for name in names))
        for gap, row in rows.items()
    ]
    low, high = found["trained_gap"]
    return "\n".join(
        [
            f"recall of {found['clips']} held-out clips after gaps of so many frames; training had "
            f"gaps of {low} to {high}",
            report.table(("gap", *names), lines),
            "*_real: of the real clips; chance: of guesses without memory",
        ]
    )


def _clips(run) -> Recall:
    """The held-out clips of a run; UserError unless they test memory."""
    with within("data"):
        source = data.make_source(run.config.data, "validation")
    if not isinstance(source, Recall):
        raise UserError(
            f"--gaps: is for data that test memory, and these are of {run.config.data.name}; leave "
            "it out, or train with --config=configs/recall.py"
        )
    return source


def _carry(run, gap):
    """What the stream of a batch begins with, under empty frames."""
    source, fields = _clips(run), run.config.data
    shape = (fields.batch_size, source.leads[1] + gap, fields.size, fields.size, 3)
    cond = {"num": fields.batch_size, "first_frames": np.zeros(shape, np.uint8)}
    options = dict(frozen=run.frozen, frames=shape[1] + source.answer)
    return run.task.stream(run.params, jax.random.key(0), cond, **options).carry


def _continued(run, source, indices):
    """[scores of a clip and of its real frames], of clips of one lead and gap."""
    given, frames = source.back(indices.start), source.back(indices.start) + source.answer
    real_BTHWC = np.stack([source.read(index)["video"] for index in indices])
    cond = {"num": len(indices), "first_frames": real_BTHWC[:, :given]}
    rng = jax.random.fold_in(step_rng(run.config.seed, EVALUATE), indices.start)
    with within("task"):
        pieces = (video for video, *_ in shown(Decoded(run, cond, frames, rng), frames))
        made_BTHWC = windows(pieces, {frames: range(given, frames)})[frames]
    rows = []
    for index, made_THWC, real_THWC in zip(indices, made_BTHWC, real_BTHWC[:, given:]):
        of_real = source.scores(index, real_THWC)
        of_real = {f"{name}_real": value for name, value in of_real.items()}
        rows.append(source.scores(index, made_THWC) | of_real)
    return rows
