"""What a run has written about its training: metrics, samples, figures."""

import json
from pathlib import Path

from jaxvid import checks, files
from jaxvid.errors import UserError

EVALUATE = "evaluate/"


def read(workdir: str) -> list[dict]:
    """The lines of metrics.jsonl of a run, {"step": int, name: number or None}, in order.

    A last line that is cut short, as of a run that writes it now, is left out. Raises UserError.
    """
    path = Path(checks.local_path("RUN", workdir), "metrics.jsonl")
    if not path.is_file():
        raise UserError(f"RUN={workdir}: has no metrics.jsonl; name the work folder of a run")
    *lines, rest = path.read_text().split("\n")
    try:
        rows = [files.parse_json(line) for line in lines]
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError("a line has no step")
    except ValueError as error:
        raise UserError(f"RUN={workdir}: metrics.jsonl is damaged ({error})") from error
    del rest
    if not rows:
        raise UserError(f"RUN={workdir}: metrics.jsonl has no line yet; wait for the first one")
    return rows


def curves(rows: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """{name: (steps, values)} of what is a number, in the order of first appearance."""
    found: dict[str, tuple[list, list]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def scores(rows: list[dict]) -> tuple[int, dict[str, float]] | None:
    """(step, {metric: value}) of the last evaluation, None without any."""
    for row in reversed(rows):
        if found := {
            name.removeprefix(EVALUATE): value
            for name, value in row.items()
            if name.startswith(EVALUATE) and isinstance(value, int | float)
        }:
            return row["step"], found
    return None


def evaluated(workdir: str) -> dict | None:
    """evaluate.json of a run, None without one. Raises UserError for a damaged one."""
    path = Path(workdir, "evaluate.json")
    if not path.is_file():
        return None
    try:
        return files.parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"RUN={workdir}: evaluate.json is damaged ({error})") from error


def sampled(workdir: str) -> dict[int, list[Path]]:
    """{step: the GIFs of its samples}, in order."""
    found = {
        int(folder.name): sorted(folder.glob("*.gif"), key=lambda path: path.name.zfill(32))
        for folder in Path(workdir, "samples").glob("*")
        if folder.name.isdigit()
    }
    return {step: found[step] for step in sorted(found) if found[step]}


def settings(workdir: str) -> dict:
    """config.json of a run as it stands, nested. Raises UserError."""
    path = Path(workdir, "config.json")
    try:
        return json.loads(json.dumps(files.parse_json(path.read_bytes())))
    except (OSError, ValueError) as error:
        raise UserError(f"RUN={workdir}: its config.json cannot be read ({error})") from error
