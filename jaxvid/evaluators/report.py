"""Figures as tables, and held-out clips as pictures."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxvid import files
from jaxvid.data import clip_rate, mp4, video
from jaxvid.data.transforms import to_uint8
from jaxvid.evaluators.held_out import mean, open_held_out, samples, strongest
from jaxvid.tasks.base import Run
from jaxvid.training.log import figure
from jaxvid.training.state import EVALUATE, step_rng
from jaxvid.training.writer import FPS

SHOWN = 4  # clips in the pictures


def tables(scores: dict[str, np.ndarray], baselines: Sequence[str] = ()) -> str:
    """Scores as tables: by noise level, by frame, then single figures.

    By frame there is a table for each metric with `baselines` (see `tasks.base.Task`), the
    strongest marked, and one for all other metrics of one length.
    """
    scores = dict(scores)
    parts = []
    if (levels := scores.pop("loss_by_level", None)) is not None:
        edges = np.linspace(0, 1, len(levels) + 1)
        rows = [(f"{a:.1f} - {b:.1f}", f"{x:.5f}") for a, b, x in zip(edges, edges[1:], levels)]
        parts.append(table(("noise level", "loss"), rows))
    by_frame = {name: value for name, value in scores.items() if value.ndim == 1}
    for name, best in strongest(by_frame, baselines).items():
        names = {b: f"{name}_{b}" for b in baselines if f"{name}_{b}" in by_frame}
        curves = {b + "*" * (b == best): by_frame.pop(full) for b, full in names.items()}
        curves = {name: by_frame.pop(name), **curves}
        parts.append(_by_frame(curves))
        parts.append(_comparison(name, curves, f"{best}*"))
    for length in sorted({len(curve) for curve in by_frame.values()}):
        curves = {name: curve for name, curve in by_frame.items() if len(curve) == length}
        parts.append(_by_frame(curves))
    parts += [f"{name}  {figure(value)}" for name, value in scores.items() if value.ndim == 0]
    return "\n\n".join(parts) + "\n"


def _by_frame(curves):
    """A table with a row for each frame at which a curve is defined, and their means."""
    frames = np.flatnonzero(~np.all(np.isnan(list(curves.values())), axis=0))
    rows = [
        # Blank if a metric is not defined, as a change is not at the first frame.
        (str(f), *("" if np.isnan(c[f]) else f"{c[f]:.3f}" for c in curves.values()))
        for f in frames
    ]
    rows.append(("mean", *(f"{mean(curve):.3f}" for curve in curves.values())))
    return table(("frame", *curves), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells aligned to the right under their head."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (head, *rows)
    )


def write_plot(path: Path, draw: Callable) -> bool:
    """A matplotlib Figure as draw(figure) leaves it; a line instead, and False, without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed; pip install 'jaxvid[plot]'")
        return False
    figure, picture = Figure(layout="constrained"), io.BytesIO()
    draw(figure)
    figure.savefig(picture, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, picture.getvalue())
    return True


def write_pictures(run: Run, folder: Path) -> None:
    """Real clips above the model's output: evaluate.png a row each, evaluate.mp4 tiled."""
    with open_held_out(run) as clips:
        _, batch, _ = next(clips.batches(1))
    batch = {name: np.asarray(rows[:SHOWN]) for name, rows in batch.items()}
    real = batch["video"]
    output = samples(run, batch, step_rng(run.config.seed, EVALUATE))
    pairs = np.stack([real, to_uint8(np.asarray(output))])  # [2, B, T, H, W, 3]
    pairs = video.enlarge(pairs)
    rows = pairs.swapaxes(0, 1).reshape(-1, *pairs.shape[2:])
    files.write(folder / "evaluate.png", video.contact_sheet(rows))
    _, B, T, H, W, C = pairs.shape
    tiled_THWC = pairs.transpose(2, 0, 3, 1, 4, 5).reshape(T, 2 * H, B * W, C)
    mp4.write(folder / "evaluate.mp4", tiled_THWC, clip_rate(run.config.data) or FPS)
    print(f"pictures: {folder / 'evaluate.png'}, {folder / 'evaluate.mp4'}")


def _comparison(name, curves, best):
    better = np.flatnonzero(curves[name] > curves[best]).tolist()
    frames = ", ".join(map(str, better)) or "none"
    return f"{name} beats {best.rstrip('*')}, the strongest baseline (*), at frames: {frames}"
