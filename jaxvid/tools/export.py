"""A trained run without its training: `python -m jaxvid.tools.export RUN OUT`.

OUT gets weights.safetensors, the weights that sampling and evaluation use, config.json, a README.md
with the figures of the run, and, if the run has a tokenizer, that in OUT/tokenizer. `sample`,
`evaluate` and `task.tokenizer` take OUT as they take RUN. Nothing in it is executed.
"""

import shutil
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxvid import checks, cli, files, runs
from jaxvid import config as config_lib
from jaxvid.errors import UserError
from jaxvid.tools import history
from jaxvid.training import exported
from jaxvid.training.log import figure

CARD = "README.md"


def export(workdir: str, out: str) -> int:
    """Write the folder `out`, which must be new; it appears complete. Returns the bytes of weights.

    Raises UserError for a folder without a trained run and for an `out` that exists.
    """
    out = Path(checks.local_path("OUT", out))
    if out.exists():
        raise UserError(f"OUT={out}: exists; name a new folder")
    run = runs.open_run(workdir)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = ConfigDict(run.config.to_dict())
    if config.task.get("tokenizer"):
        export(config.task.tokenizer, str(partial / exported.TOKENIZER))
        config.task.tokenizer = exported.TOKENIZER
    config_lib.save(config, partial / "config.json")
    size = exported.write(partial, run.step, run.params)
    files.write(partial / CARD, card(workdir, run, out.name))
    partial.rename(out)
    return size


def card(workdir: str, run, name: str) -> str:
    """README.md of an export: what it is, how to use it, and what was measured."""
    parameters = sum(x.size for x in jax.tree.leaves(run.params))
    data, task = run.config.data, run.config.task
    lines = [
        f"# {name}",
        "",
        f"A jaxvid run of the task `{task.name}` on `{data.name}`, clips of {data.frames} frames "
        f"of {data.size} pixels, after {run.step:,} steps; {parameters:,} parameters.",
        "",
        "```sh",
        f"python -m jaxvid.{'evaluate' if task.name == 'tokenizer' else 'sample'} --workdir={name}",
        "```",
        "",
    ]
    source = Path(workdir, CARD)
    if Path(workdir, exported.FILE).is_file() and source.is_file():  # of an export: its own figures
        return source.read_text()
    rows = history.read(workdir) if Path(workdir, "metrics.jsonl").is_file() else []
    if found := history.scores(rows):
        step, scores = found
        lines += [f"Held-out clips, in the evaluation at step {step:,}:", "", "| metric | value |"]
        lines += ["|---|---|", *(f"| {metric} | {figure(x)} |" for metric, x in scores.items())]
    else:
        lines.append("Unmeasured: the run has no evaluation.")
    return "\n".join([*lines, ""])


def main(workdir, out):
    """Entry point."""
    size = export(workdir, out)
    print(f"{out}: {size / 2**20:.1f} MiB of weights; python -m jaxvid.sample --workdir={out}")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    cli.run(main, arguments="RUN OUT")
