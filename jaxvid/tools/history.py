"""What a run has written about its training: metrics, samples, figures."""

import re
import stat
from pathlib import Path

from jaxvid import checks, files
from jaxvid.errors import UserError

EVALUATE = "evaluate/"
MAX_METRICS, MAX_FIGURE = 200, 1e300
MAX_PICTURE = 64 * 2**20  # bytes


def read(workdir: str) -> list[dict]:
    """The lines of metrics.jsonl of a run, {"step": int, name: number or None}, in order.

    A last line that is cut short, as of a run that writes it now, is left out. Raises UserError.
    """
    path = Path(checks.local_path("RUN", workdir), "metrics.jsonl")
    if not path.is_file():
        raise UserError(f"RUN={workdir}: has no metrics.jsonl; name the work folder of a run")
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        rows = [files.parse_json(line) for line in lines]
        if not all(isinstance(row, dict) and _is_step(row.get("step")) for row in rows):
            raise ValueError("a line has no step")
        if len({name for row in rows for name in row}) > MAX_METRICS:
            raise ValueError(f"it has more than {MAX_METRICS} metrics")
    except ValueError as error:
        raise UserError(f"RUN={workdir}: metrics.jsonl is damaged ({error})") from error
    if not rows:
        raise UserError(f"RUN={workdir}: metrics.jsonl has no line yet; wait for the first one")
    return rows


def curves(rows: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """{name: (steps, values)} of what is a number, in the order of first appearance."""
    found: dict[str, tuple[list, list]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and _is_figure(value):
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
            if name.startswith(EVALUATE) and _is_figure(value)
        }:
            return row["step"], found
    return None


def evaluated(workdir: str) -> dict | None:
    """evaluate.json of a run, None without one. Raises UserError for a damaged one."""
    path = Path(workdir, "evaluate.json")
    if not path.is_file():
        return None
    return _sections(workdir, path)


def sampled(workdir: str) -> dict[int, list[Path]]:
    """{step: the GIFs of its samples}, in order; files that are something else are left out."""
    found = {
        int(folder.name): sorted(pictures(folder, "*.gif"), key=lambda path: path.name.zfill(32))
        for folder in Path(workdir, "samples").glob("*")
        if re.fullmatch("[0-9]{1,12}", folder.name) and not folder.is_symlink()
    }
    return {step: found[step] for step in sorted(found) if found[step]}


def pictures(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that are GIF or PNG by their first bytes; links are not followed."""
    return [path for path in sorted(folder.glob(pattern)) if _is_picture(path)]


def _is_picture(path):
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_PICTURE:
        return False
    with open(path, "rb") as file:
        return file.read(4) in (b"GIF8", b"\x89PNG")


def settings(workdir: str) -> dict:
    """config.json of a run as it stands, nested. Raises UserError."""
    found = _sections(workdir, Path(workdir, "config.json"))
    if not all(isinstance(found.get(name, {}), dict) for name in ("task", "data")):
        raise UserError(f"RUN={workdir}: config.json is damaged (task and data are sections)")
    return found


def _sections(workdir, path):
    """The object in a JSON file; UserError for any other content."""
    try:
        found = files.parse_json(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise UserError(f"RUN={workdir}: {path.name} is damaged ({error})") from error
    return found


def _is_step(value):
    return isinstance(value, int) and 0 <= value < 2**53


def _is_figure(value):
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and abs(value) < MAX_FIGURE
