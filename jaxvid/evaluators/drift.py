"""Drift: held-out clips, continued as long streams and scored near each of several lengths."""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxvid import data, memory
from jaxvid.data.source import Source
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError, within
from jaxvid.evaluators import report, sprites
from jaxvid.evaluators.held_out import frames_of, strongest
from jaxvid.metrics import baselines, quality
from jaxvid.tasks.base import Run
from jaxvid.tasks.streaming import Decoded, shown
from jaxvid.training.state import EVALUATE, step_rng

WINDOW = 16  # frames up to a length that are scored there, without the given ones
CONDITIONS = ("label", "text")

COLUMNS = {
    "psnr": "dB against the real clip, where it is that long",
    "psnr_guess": "the strongest guess without a network there, named in the column `guess`",
    "steady": "share of clips whose window shows one to three steady sprites",
    "same": "share of clips that show just the sprites of the clip, by colour and shape",
    "mean": "mean of the pixels, from 0 to 1",
    "std": "standard deviation of the pixels of a frame, in the same unit",
    "motion": "mean absolute difference of a pixel from one frame to the next, likewise",
}


def check(run: Run, lengths: Sequence[str], clips: int) -> list[int]:
    """Lengths from the command line, in order; nothing is compiled.

    Raises UserError for a length that is no number, does not suit the tokenizer, is too short to
    be scored, or that the sampler of the run cannot stream.
    """
    found, given = sorted(set(frames_of(lengths))), run.task.given
    for frames in found:
        if frames < given + 2:
            raise UserError(
                f"--frames={frames}: {given} frames are given and two more are needed; use "
                f"{given + 2} or more"
            )
        try:
            run.task.split_frames(frames)
            with within("task"):
                jax.eval_shape(lambda frames=frames: _stream(run, frames, clips).carry)
        except UserError as error:
            raise UserError(f"--frames={frames}: cannot be streamed: {error}") from error
    if found:
        clip = 3 * found[-1] * run.config.data.size**2
        fields = f"--frames={found[-1]}, data.size={run.config.data.size}"
        memory.require(fields, "the pixels of a real clip, in float32,", 4 * clip)
    return found


def measure(run: Run, lengths: Sequence[int], clips: int) -> dict:
    """Scores of continuations near each length -> {"clips", .., "by_length": {length: scores}}.

    One stream to the last length continues the first `clips` held-out clips from the given frames.
    A length is scored on its window, the WINDOW frames up to it, so only windows stay in memory.
    The scores are those of COLUMNS, "steady" and "same" on sprites alone. "<score>_real" is the
    same of the real clips, as far as these go ("real_frames"): the ceiling of the reader, and the
    statistics of the data. What is not known is None.
    """
    given = run.task.given
    source, known = _longest(run, lengths, clips)
    clips = min(clips, len(source))
    real_spans = {frames: _span(min(frames, known), given) for frames in lengths}
    rows = []
    for index in range(clips):  # one at a time: a long clip is large
        row = data.row(source, run.config.data, index)
        video_BTHWC = row.pop("video")[None]
        cond = {name: row[name] for name in CONDITIONS if name in row}
        rows.append((cond, video_BTHWC[:, :given], windows([video_BTHWC], real_spans)))
    conds, first, real = zip(*rows)
    first_BPHWC = np.concatenate(first)
    real = {frames: np.concatenate([row[frames] for row in real]) for frames in lengths}
    cond = {name: np.stack([row[name] for row in conds]) for name in conds[0]}
    cond |= {"num": clips, "first_frames": first_BPHWC}
    with within("task"):
        stream = Decoded(run, cond, lengths[-1], step_rng(run.config.seed, EVALUATE))
        pieces = (video for video, *_ in shown(stream, lengths[-1]))
        made = windows(pieces, {frames: _span(frames, given) for frames in lengths})
    by_length = {}
    for frames in lengths:
        psnr = {"psnr": None, "psnr_guess": None, "guess": None}
        if frames <= known:
            psnr = _psnr(made[frames], real[frames], first_BPHWC)
        of_real = {f"{name}_real": x for name, x in _statistics(run, real[frames]).items()}
        by_length[str(frames)] = psnr | _statistics(run, made[frames]) | of_real
    return {
        "clips": clips,
        "given_frames": given,
        "window": WINDOW,
        "real_frames": known,
        "by_length": by_length,
    }


def windows(pieces: Iterable[np.ndarray], spans: Mapping[int, range]) -> dict[int, np.ndarray]:
    """{length: frames [B, t, H, W, 3] of its span}, of a video that comes in pieces."""
    kept, position = {frames: [] for frames in spans}, 0
    for piece_BTHWC in pieces:
        for frames, span in spans.items():
            first, stop = (max(place - position, 0) for place in (span.start, span.stop))
            if first < min(stop, piece_BTHWC.shape[1]):
                kept[frames].append(piece_BTHWC[:, first:stop].copy())
        position += piece_BTHWC.shape[1]
    return {frames: np.concatenate(parts, axis=1) for frames, parts in kept.items()}


def table(found: dict) -> str:
    """The scores of `measure`, a row for each length, and what the columns are."""
    rows = found["by_length"]
    first, *_ = rows.values()
    pairs = ((name, f"{name}_real") for name in COLUMNS)
    names = [
        "psnr",
        "psnr_guess",
        "guess",
        *(n for pair in pairs for n in pair if pair[1] in first),
    ]
    lines = [(frames, *(_cell(row[name]) for name in names)) for frames, row in rows.items()]
    *_, last = rows
    meanings = {name: meaning for name, meaning in COLUMNS.items() if name in names}
    end = found["real_frames"]
    later = f"; at greater lengths than their {end} frames, of the last of these"
    return "\n".join(
        [
            f"continuations of {found['clips']} held-out clips from {found['given_frames']} frames,"
            f" in windows of the last {found['window']} frames up to each length",
            report.table(("frames", *names), lines),
            *(f"{name}: {meaning}" for name, meaning in meanings.items()),
            f"*_real: of the real clips{later if end < int(last) else ''}",
        ]
    )


def write_picture(found: dict, path) -> None:
    """The scores of `measure` by length, a panel each with its reference."""
    lengths = list(map(int, found["by_length"]))
    rows = list(found["by_length"].values())
    others = {name: f"{name}_real" for name in COLUMNS if f"{name}_real" in rows[0]}
    others = {"psnr": "psnr_guess", **others}

    def draw(figure):
        figure.set_size_inches(3 * len(others), 3)
        for axes, (name, other) in zip(figure.subplots(1, len(others)), others.items()):
            for line, style in ((name, "o-"), (other, "o--")):
                values = [np.nan if row[line] is None else row[line] for row in rows]
                axes.plot(lengths, values, style, label=line)
            axes.set(title=name, xlabel="frames", xscale="log")
            axes.set_xticks(lengths, map(str, lengths))
            axes.set_xticks([], minor=True)
            axes.legend()

    report.write_plot(path, draw)


def _cell(value) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.3f}"


def _span(frames, given):
    return range(max(frames - WINDOW, given), frames)


def _stream(run, frames, clips):
    """The stream of `measure`, under empty conditions."""
    cond = {
        name: np.zeros(x.shape, x.dtype)
        for name, x in data.batch_shapes(run.config.data, clips).items()
    }
    cond |= {"num": clips, "first_frames": cond["video"][:, : run.task.given]}
    rng = jax.random.key(0)
    return run.task.stream(run.params, rng, cond, frozen=run.frozen, frames=frames)


def _longest(run, lengths, clips) -> tuple[Source, int]:
    """(held-out clips, their frames): of the greatest length that as many clips have."""
    fields = ConfigDict(run.config.data.to_dict())

    def source_of(frames):
        fields.frames = frames
        with within("data"):
            return data.make_source(fields, "validation")

    trained = run.config.data.frames
    source = source_of(trained)
    for frames in sorted(lengths, reverse=True):
        if frames <= trained:
            break
        try:
            longer = source_of(frames)
        except UserError:  # no clip is that long
            continue
        if len(longer) >= min(clips, len(source)):
            return longer, frames
    return source, trained


def _psnr(made_BTHWC, real_BTHWC, first_BPHWC):
    """PSNR of the continuation, and of the strongest guess from its given frames."""
    real_BTHWC = normalize(real_BTHWC)
    found = baselines.guesses(normalize(first_BPHWC))

    def score(guess_BTHWC):
        return quality.psnr(guess_BTHWC, real_BTHWC)

    scores = {f"psnr_{name}": score(guess) for name, guess in found.items()}
    blends_KBT = jax.lax.map(score, baselines.blends(found))
    best = baselines.best_blend(blends_KBT.swapaxes(0, 1))
    scores[f"psnr_{baselines.BLEND}"] = blends_KBT[best]
    scores["psnr"] = score(normalize(made_BTHWC))
    guess = strongest(scores, (*baselines.NAMES, baselines.BLEND))["psnr"]
    psnr, other = (float(scores[name].mean()) for name in ("psnr", f"psnr_{guess}"))
    return {"psnr": psnr, "psnr_guess": other, "guess": guess}


def _statistics(run, video_BTHWC):
    """The scores of a window that need no real clip."""
    found = {}
    if run.config.data.name == "sprites":
        found = sprites.kept(run, video_BTHWC)
    video_BTHWC = video_BTHWC.astype(np.float32) / 255
    return found | {
        "mean": float(video_BTHWC.mean()),
        "std": float(video_BTHWC.std((2, 3, 4)).mean()),
        "motion": float(np.abs(np.diff(video_BTHWC, axis=1)).mean()),
    }
