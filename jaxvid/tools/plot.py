"""Curves of runs side by side: `python -m jaxvid.tools.plot RUN [RUN ...] [--out=curves.png]`.

Draws every metric of metrics.jsonl that the runs have, the loss first, each in a panel of its own
over the steps. Guesses without a network, which evaluations score beside the model, are dashed
lines in the panel of their metric. --metrics=loss,evaluate/psnr draws only these.
"""

import math
from pathlib import Path

from absl import flags

from jaxvid import cli
from jaxvid.errors import UserError, printable
from jaxvid.evaluators.report import write_plot
from jaxvid.metrics import baselines
from jaxvid.tools import history

# Of the machine, not of the model.
SPEEDS = ("steps_per_s", "frames_per_s", "data_wait", "pauses", "mfu", "lr", "skipped")
GUESSES = (*baselines.NAMES, baselines.BLEND)
COLUMNS, PANEL = 3, (4.4, 3.0)  # panels in a row; inches of each


def panels(runs: dict[str, dict], metrics: list[str]) -> dict[str, list[str]]:
    """{metric: the guesses drawn beside it}, as asked for, or all that have a curve in some run.

    runs: {name: `history.curves`}. Raises UserError for a metric that no run has.
    """
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    for name in metrics:
        if name not in names:
            raise UserError(f"--metrics={name}: no run has it; they have {', '.join(names)}")
    beside = {
        name: [guess for guess in names if _is_guess_of(guess, name)] for name in metrics or names
    }
    if metrics:
        return beside
    left_out = {*SPEEDS, *(guess for found in beside.values() for guess in found)}
    points = {n: max(len(c[n][0]) for c in runs.values() if n in c) for n in names}
    kept = [name for name in names if name not in left_out and points[name] > 1]
    return {name: beside[name] for name in sorted(kept, key=lambda name: name != "loss")}


def draw(figure, runs: dict[str, dict], shown: dict[str, list[str]]) -> None:
    """The panels on a matplotlib Figure, a colour for each run."""
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure.set_size_inches(PANEL[0] * columns, PANEL[1] * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in axes[len(shown) :]:
        panel.set_visible(False)
    for panel, (metric, guesses) in zip(axes, shown.items()):
        for number, (run, curves) in enumerate(runs.items()):
            for name, style in ((metric, "-"), *((guess, "--") for guess in guesses)):
                if name not in curves:
                    continue
                guess = name.removeprefix(f"{metric}_")
                label = _text(run if name == metric else f"{run}: {guess}")
                few = len(curves[name][0]) < 20
                marker = "" if not few else "." if name == metric else "x"
                panel.plot(*curves[name], style, color=f"C{number}", marker=marker, label=label)
        panel.set_title(_text(metric), fontsize="medium")
        panel.set_xlabel("step", fontsize="small")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")


def _text(name):
    """A foreign name for matplotlib, which reads formulas between dollar signs."""
    return printable(name)[:60].replace("$", r"\$")


def read(workdirs) -> dict[str, dict]:
    """{name: curves} of runs, each under the shortest end of its path that tells it apart."""
    paths = [Path(workdir).resolve() for workdir in workdirs]
    if len(set(paths)) < len(paths):
        raise UserError("RUN: the same folder comes twice; name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {
        "/".join(path.parts[-depth:]): history.curves(history.read(workdir))
        for path, workdir in zip(paths, workdirs)
    }


def _is_guess_of(guess, metric):
    return guess.startswith(f"{metric}_") and guess.removeprefix(f"{metric}_") in GUESSES


def main(*workdirs):
    """Entry point."""
    runs, out = read(workdirs), Path(FLAGS.out)
    if out.suffix != ".png":
        raise UserError(f"--out={out}: is no .png; the picture is one")
    shown = panels(runs, FLAGS.metrics)
    if not shown:
        raise UserError("RUN: no metric has two points yet; wait, or name it with --metrics")
    if write_plot(out, lambda figure: draw(figure, runs, shown)):
        print(printable(f"{out}: {', '.join(shown)}"))


FLAGS = flags.FLAGS

if __name__ == "__main__":
    cli.define_path("out", "The picture, a .png.", default="curves.png")
    flags.DEFINE_list("metrics", [], "Metrics to draw. Default: all but speeds.")
    cli.run(main, arguments="RUN [RUN ...]")
