"""The floors of WORKSPACE.md: a room imports only from lower floors, and never in a circle."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def floors(text):
    """{room: floor} of the table of floors in WORKSPACE.md, the ground being the lowest number."""
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE)
    return {room: int(floor) for floor, rooms in rows for room in re.findall(r"`([\w.]+)", rooms)}


def room_of(module):
    """ "jaxvid.tasks.base" -> "tasks"; "jaxvid.train" -> "train"."""
    return [*module.split("."), ""][1]


def imports(source, module):
    """Modules of jaxvid that the source of a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("jaxvid", "configs")}


def modules():
    """{dotted name: source} of the package and the configs."""
    paths = [*ROOT.glob("jaxvid/**/*.py"), *ROOT.glob("configs/*.py")]
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }
    return {name: path.read_text() for name, path in names.items()}


def arrows(sources):
    """{(importing module, imported module)}; a name imported from a module is that module."""
    found = set()
    for module, source in sources.items():
        for name in imports(source, module):
            while name not in sources:
                name = name.rpartition(".")[0]
            if name not in (module, "jaxvid"):
                found.add((module, name))
    return found


def violations(sources, floor_of):
    """Imports that do not go to a lower floor or stay in the room."""
    found = []
    for module, imported in sorted(arrows(sources)):
        if imported.startswith("configs") != module.startswith("configs"):
            found.append(f"{module} imports {imported}")
            continue
        room, other = room_of(module), room_of(imported)
        if module.startswith("jaxvid") and room != other and floor_of[other] >= floor_of[room]:
            span = f"floor {floor_of[room]} to {floor_of[other]}"
            found.append(f"{module} imports {imported}: {span}")
    return found


def circle(edges):
    """Modules that import each other in a circle, [] if none do."""
    left = set(edges)
    while True:
        free = {a for a, _ in left} - {b for _, b in left}
        if not free:
            return sorted({a for a, _ in left})
        left = {(a, b) for a, b in left if a not in free}


@pytest.fixture(scope="module")
def house():
    return modules(), floors((ROOT / "WORKSPACE.md").read_text())


def test_every_room_has_a_floor(house):
    sources, floor_of = house
    rooms = {room_of(name) for name in sources if name.startswith("jaxvid.")}
    assert rooms == set(floor_of)
    assert max(floor_of.values()) <= 8


def test_no_import_goes_up_or_in_a_circle(house):
    sources, floor_of = house
    assert violations(sources, floor_of) == []
    assert circle(arrows(sources)) == []


@pytest.mark.parametrize(
    "module, line, found",
    [
        ("jaxvid.mixers.cache", "from jaxvid.models.dit import DiT", "jaxvid.mixers.cache imports"),
        ("jaxvid.data.text", "import jaxvid.train", "jaxvid.data.text imports"),
        ("configs.common", "from jaxvid.errors import UserError", "configs.common imports"),
    ],
)
def test_an_arrow_up_is_found(house, module, line, found):
    sources, floor_of = house
    (violation,) = violations({**sources, module: f"{sources[module]}\n{line}\n"}, floor_of)
    assert violation.startswith(found)


def test_a_circle_is_found(house):
    sources, _ = house
    line = "\nfrom jaxvid.mixers import attention\n"
    changed = {**sources, "jaxvid.mixers.cache": sources["jaxvid.mixers.cache"] + line}
    assert {"jaxvid.mixers.attention", "jaxvid.mixers.cache"} <= set(circle(arrows(changed)))
