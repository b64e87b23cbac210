"""A trained run without its training: `python -m jaxvid.tools.export RUN OUT`.

OUT gets weights.safetensors, the weights that sampling and evaluation use, config.json, a README.md
with the figures of the run, and, if the run has a tokenizer, that in OUT/tokenizer. `sample`,
`evaluate` and `task.tokenizer` take OUT as they take RUN. Nothing in it is executed.
"""

import os
import shutil
import tempfile
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

    Raises UserError for a folder without a trained run, for an `out` that exists or lies in the
    run, and where it cannot be written.
    """
    out = Path(os.path.abspath(checks.local_path("OUT", out)))
    if out.exists():
        raise UserError(f"OUT={out}: exists; name a new folder")
    if out.resolve().is_relative_to(Path(workdir).resolve()):
        raise UserError(f"OUT={out}: lies in the run; name a folder elsewhere")
    run = runs.open_run(workdir)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: nothing that is there is touched.
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            size = _write(workdir, run, partial, out.name)
            partial.chmod(0o755)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror})") from error
    return size


def _write(workdir, run, folder, name):
    """Write the files of an export called `name` to a folder; the bytes of weights."""
    config = ConfigDict(run.config.to_dict())
    if config.task.get("tokenizer"):
        export(config.task.tokenizer, str(folder / exported.TOKENIZER))
        config.task.tokenizer = exported.TOKENIZER
    config_lib.save(config, folder / "config.json")
    source = Path(workdir, CARD)
    is_export = Path(workdir, exported.FILE).is_file() and source.is_file()
    text = source.read_bytes() if is_export else card(workdir, run, name)
    files.write(folder / CARD, text)
    return exported.write(folder, run.step, run.params, config.to_json())


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
    metrics = Path(workdir, "metrics.jsonl")
    rows = history.read(workdir) if metrics.is_file() and metrics.stat().st_size else []
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
    print(f"{out}: {size / 2**20:.1f} MiB of weights; its {CARD} says how to use it")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    cli.run(main, arguments="RUN OUT")
