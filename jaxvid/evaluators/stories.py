"""Stories: streams whose caption changes, read by the oracle of sprites in windows of frames."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxvid import files
from jaxvid.data import video
from jaxvid.data.sprite_oracle import agreement, describe
from jaxvid.data.sprites import kind, scene
from jaxvid.errors import UserError
from jaxvid.evaluators import alignment, report
from jaxvid.evaluators.held_out import HeldOut, frames_of
from jaxvid.tasks.base import Run
from jaxvid.tasks.streaming import Decoded, shown

WINDOW = 8  # frames that the oracle reads at once
SCORES = ("colour", "shape")  # a direction holds until the first bounce alone
COLUMNS = (*SCORES, "old_colour", "old_shape", "one_sprite")
PICTURED = 4  # stories in the picture


def check(run: Run, switches: Sequence[str]) -> list[int]:
    """The frames of --story, in order; nothing is compiled.

    Raises UserError for frames at which the run cannot switch, for parts shorter than WINDOW, and
    for a run without captions of sprites.
    """
    if not switches:
        return []
    if not alignment.suits(run):
        raise UserError(
            "--story: changes captions of sprites, and this run has none; leave it out, or train "
            "with --config=configs/ar_diffusion.py:cond=text"
        )
    found = sorted(set(frames_of(switches, "story")))
    for before, frame in zip([0, *found], found):
        if frame - before < WINDOW:
            gap = f"comes {frame - before} frames after {before}"
            raise UserError(f"--story={frame}: {gap}; leave {WINDOW} or more")
    for frame in found:
        try:
            run.task.check_switch(frame, given=0, frames=length(found))
        except UserError as error:
            raise UserError(f"--story={frame}: {error}") from error
    return found


def length(switches: Sequence[int]) -> int:
    """Frames of a story: its last part is as long as the one before."""
    *_, before, last = [0, *switches]
    return 2 * last - before


def measure(run: Run, held_out: HeldOut, switches: Sequence[int], clips: int) -> tuple[dict, list]:
    """(scores, videos) of `clips` streams, each of which is told the captions of held-out clips.

    At every switch a stream is told the caption of another clip. The scores are the shares of
    streams with the colour and shape of their caption in a window of WINDOW frames, "old_*" with
    those of the caption before, and "one_sprite" with one sprite in sight: "before", in the last
    window of the first part; "after", by the first frame of a window after a switch, the mean over
    switches; "by_part", in the last window of each part. "chance" is that of other captions.
    """
    options, parts = kind(held_out.config.data), [0, *switches, length(switches)]
    told, videos = [], []
    for rng, batch, new in held_out.batches(-(-clips // held_out.config.data.batch_size)):
        text = np.asarray(batch["text"])
        cond = {"num": len(text), "text": text}
        later = {
            frame: {"text": np.roll(text, -part, axis=0)} for part, frame in enumerate(switches, 1)
        }
        stream = shown(Decoded(run, cond, parts[-1], rng, later), parts[-1])
        video_BTHWC = np.concatenate([piece for piece, *_ in stream], axis=1)[:, : parts[-1]]
        sprites = [
            scene(clip, "validation", **options).description.sprites
            for clip in np.asarray(batch["id"]).tolist()
        ]
        told += [[sprites[(row + p) % len(sprites)] for p in range(len(parts) - 1)] for row in new]
        videos += [video_BTHWC[row] for row in new]
    told, videos = told[:clips], videos[:clips]

    def mean(part, first):
        """Scores of the window from a frame on, under the caption of a part."""
        rows = []
        for captions, clip in zip(told, videos):
            seen = describe(clip[first : first + WINDOW]).sprites
            now = agreement(captions[part], seen)
            row = {name: now[name] for name in SCORES} | {"one_sprite": float(len(seen) == 1)}
            if part:
                old = agreement(captions[part - 1], seen)
                row |= {f"old_{name}": old[name] for name in SCORES}
            rows.append(row)
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    shortest = min(np.diff(parts[1:]).tolist())
    after = {
        offset: [mean(part, frame + offset) for part, frame in enumerate(switches, 1)]
        for offset in range(0, shortest - WINDOW + 1, WINDOW)
    }
    guesses = [agreement(one[0], other[0]) for one in told for other in told if one[0] != other[0]]
    found = {
        "clips": len(videos),
        "switches": list(switches),
        "frames": parts[-1],
        "chance": {name: float(np.mean([g[name] for g in guesses] or [0.0])) for name in SCORES},
        "before": mean(0, parts[1] - WINDOW),
        "after": {
            str(offset): {name: float(np.mean([row[name] for row in rows])) for name in COLUMNS}
            for offset, rows in after.items()
        },
        "by_part": {str(part + 1): mean(part, end - WINDOW) for part, end in enumerate(parts[1:])},
    }
    return found, videos


def table(found: dict) -> str:
    """The scores of `measure`, by the frames after a switch and by part."""

    def cells(row):
        return [f"{row[name]:.3f}" if name in row else "" for name in COLUMNS]

    rows = [("before", *cells(found["before"]))]
    rows += [(f"{first} on", *cells(row)) for first, row in found["after"].items()]
    rows.append(("chance", *cells(found["chance"])))
    parts = [(part, *cells(row)) for part, row in found["by_part"].items()]
    switches = ", ".join(map(str, found["switches"]))
    return "\n".join(
        [
            f"{found['clips']} stories of {found['frames']} frames whose caption changes at frames "
            f"{switches}: shares with its colour and shape in {WINDOW} frames, by frames after a "
            "change",
            report.table(("frames", *COLUMNS), rows),
            "old_*: of the caption before; chance: of other captions",
            f"the last {WINDOW} frames of each part",
            report.table(("part", *COLUMNS), parts),
        ]
    )


def write_picture(videos: Sequence[np.ndarray], path: Path) -> None:
    """A row for each of the first stories."""
    rows = video.enlarge(np.stack(videos[:PICTURED]))
    files.write(path, video.contact_sheet(rows))
