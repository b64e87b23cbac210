"""Alignment with text: whether samples show what held-out captions of sprites tell."""

import functools
import re
from collections.abc import Sequence

import numpy as np

from jaxvid.data.sprite_oracle import TOLD, agreement, describe
from jaxvid.data.sprites import kind, scene
from jaxvid.data.transforms import to_uint8
from jaxvid.errors import UserError
from jaxvid.evaluators import report
from jaxvid.evaluators.held_out import HeldOut
from jaxvid.tasks.base import Generator, Run

SCORES = (*TOLD, "caption")
MAX_SCALES = 64
GUESSES = 256  # held-out scenes whose sprites are taken for guesses


def suits(run: Run) -> bool:
    """Whether the run makes sprites of captions."""
    fields = run.config.task.get("condition", {})
    is_told = isinstance(run.task, Generator) and fields.get("kind") == "text"
    return is_told and run.config.data.name == "sprites"


def check(run: Run, scales: Sequence[str]) -> list[float]:
    """Scales of guidance from the command line, in order; the run's own scale if there are none.

    Raises UserError for what is no scale, and for scales of a run that `suits` denies, which has
    none, [].
    """
    if not suits(run):
        if scales:
            raise UserError(
                "--guidance: scores captions of sprites, and this run has none; leave it out, or "
                "train with --config=configs/ar_diffusion.py:cond=text"
            )
        return []
    if not scales:
        return [float(run.config.task.sampler.guidance)]
    if len(scales) > MAX_SCALES:
        raise UserError(f"--guidance: has {len(scales)} scales; give {MAX_SCALES} or fewer")
    for text in scales:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text.strip()):
            raise UserError(f"--guidance={text[:20]}: write scales, such as 1,3,5")
    return sorted(set(map(float, scales)))


def measure(runs: dict[float, Run], held_out: HeldOut, batches: int) -> dict:
    """Scores of samples by scale of guidance -> {"clips", "chance", "real", "by_guidance"}.

    runs: {scale: a run with it}. Each samples a clip for every caption of the held-out batches,
    without given frames and by the same noise. `sprite_oracle.describe` reads it, and its
    `agreement` with the caption is averaged over clips. "real": the same of the real clips, the
    ceiling of the reader. "chance": of the captions of other held-out clips, as of a model that
    draws perfect clips and does not read.
    """
    options = kind(held_out.config.data)

    @functools.cache
    def sprites_of(clip):
        return scene(clip, "validation", **options).description.sprites

    chance, real, made = [], [], {scale: [] for scale in runs}
    for rng, batch, new in held_out.batches(batches):
        clips = np.asarray(batch["id"])[new].tolist()
        told = list(map(sprites_of, clips))
        for clip, sprites in zip(clips, told):
            others = (sprites_of(other) for other in range(GUESSES) if other != clip)
            chance.append(_means([agreement(sprites, other) for other in others]))
        real += _scores(told, np.asarray(batch["video"])[new])
        cond = {"num": len(batch["id"]), "text": batch["text"]}
        for scale, run in runs.items():
            video = run.task.sample(run.params, rng, cond, frozen=run.frozen)
            made[scale] += _scores(told, to_uint8(np.asarray(video))[new])
    return {
        "clips": len(real),
        "chance": _means(chance),
        "real": _means(real),
        "by_guidance": {f"{scale:g}": _means(rows) for scale, rows in made.items()},
    }


def table(found: dict) -> str:
    """The scores of `measure`, a row for each scale of guidance, for real clips and for chance."""
    rows = {**found["by_guidance"], "real": found["real"], "chance": found["chance"]}
    lines = [(name, *(f"{row[score]:.3f}" for score in SCORES)) for name, row in rows.items()]
    return "\n".join(
        [
            f"samples for the captions of {found['clips']} held-out clips: shares of sprites "
            "with the colour, shape and direction of the caption, and of clips with all of them",
            report.table(("guidance", *SCORES), lines),
            "real: of the real clips, as the same reader sees them; chance: of the clips of other "
            "captions",
        ]
    )


def _scores(told, videos):
    return [agreement(sprites, describe(clip).sprites) for sprites, clip in zip(told, videos)]


def _means(rows):
    return {name: float(np.mean([row[name] for row in rows])) for name in SCORES}
