"""Curves, page and export of a run; what they say is what the run has written."""

import base64
import json
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import masked_transformer
from jaxvid import config as config_lib
from jaxvid.errors import UserError
from jaxvid.runs import make_task, open_run, open_tokenizer
from jaxvid.tools import gallery, history, plot
from jaxvid.tools.export import export
from jaxvid.training import exported
from jaxvid.training.checkpoint import Checkpoints
from jaxvid.training.state import TrainState
from tests.tokenizer_runs import FAST, coded

LINES = [
    {"step": 10, "loss": 2.0, "lr": 0.1, "grad_norm": None},
    {"step": 20, "loss": 1.0, "lr": 0.1, "evaluate/psnr": 20.0, "evaluate/psnr_blend": 21.0},
    {"step": 30, "loss": 0.5, "lr": 0.1, "evaluate/psnr": 22.5, "evaluate/psnr_blend": 21.0},
]


@pytest.fixture
def run(tmp_path):
    """A work folder with metrics, samples of two steps and a config."""
    workdir = tmp_path / "run<1>"
    for step in (8, 16):
        folder = workdir / "samples" / str(step)
        folder.mkdir(parents=True)
        for clip in range(3):
            Image.new("RGB", (4, 4), (step, clip, 0)).save(folder / f"{clip}.gif")
    write_lines(workdir, LINES)
    (workdir / "config.json").write_text('{"steps": 40, "data": {"name": "a<b"}, "task": {"s": 1}}')
    return workdir


def write_lines(workdir, lines, rest=""):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + rest)


def test_history_is_what_was_written(run):
    write_lines(run, LINES, rest='{"step": 40, "lo')  # a line that is being written
    rows = history.read(str(run))
    assert rows == LINES
    curves = history.curves(rows)
    assert curves["loss"] == ([10, 20, 30], [2.0, 1.0, 0.5]) and "grad_norm" not in curves
    assert history.scores(rows) == (30, {"psnr": 22.5, "psnr_blend": 21.0})
    assert history.scores(rows[:1]) is None
    assert {step: len(paths) for step, paths in history.sampled(str(run)).items()} == {8: 3, 16: 3}


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "has no metrics.jsonl; name the work folder of a run"),
        ("", "metrics.jsonl has no line yet"),
        ("[1]\n", "metrics.jsonl is damaged"),
        ("{]\n", "metrics.jsonl is damaged"),
        ('{"step": -1}\n', "metrics.jsonl is damaged"),
        (json.dumps({"step": 1, **dict.fromkeys(map(str, range(300)))}) + "\n", "metrics.jsonl is"),
    ],
)
def test_a_folder_without_a_history_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"^RUN=.*: {message}"):
        history.read(str(tmp_path))


def test_a_guess_is_drawn_in_the_panel_of_its_metric(run):
    curves = {"a": history.curves(LINES)}
    assert plot.panels(curves, []) == {"loss": [], "evaluate/psnr": ["evaluate/psnr_blend"]}
    assert plot.panels(curves, ["lr"]) == {"lr": []}
    with pytest.raises(UserError, match=r"^--metrics=fvd: no run has it; they have loss, lr"):
        plot.panels(curves, ["fvd"])
    figure = pytest.importorskip("matplotlib.figure").Figure()
    plot.draw(figure, curves, plot.panels(curves, []))
    _, panel, _ = [*figure.axes, None]
    assert [line.get_label() for line in panel.lines] == ["a", "a: blend"]
    np.testing.assert_array_equal(panel.lines[0].get_xydata(), [[20, 20], [30, 22.5]])


def test_runs_are_told_apart_by_the_ends_of_their_paths(tmp_path):
    for name in ("x/run", "y/run"):
        (tmp_path / name).mkdir(parents=True)
        write_lines(tmp_path / name, LINES)
    assert list(plot.read([tmp_path / "x/run"])) == ["run"]
    assert list(plot.read([tmp_path / "x/run", tmp_path / "y/run"])) == ["x/run", "y/run"]
    with pytest.raises(UserError, match=r"^RUN: the same folder comes twice"):
        plot.read([tmp_path / "x/run", tmp_path / "y/../x/run"])


def test_the_page_holds_everything_itself(run):
    (run / "evaluate.json").write_text('{"drift": {"psnr": 19.5}, "text": "<script>"}')
    page = gallery.page(str(run))
    assert "run&lt;1&gt;" in page and "a&lt;b" in page and "<script" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert all(source.startswith("data:image/") for source in sources) and "http" not in page
    gifs = [s for s in sources if s.startswith("data:image/gif")]
    newest = (run / "samples" / "16" / "0.gif").read_bytes()
    assert len(gifs) == 6 and base64.b64decode(gifs[0].partition(",")[2]) == newest
    for row in (("evaluate", "psnr", "22.5"), ("", "drift.psnr", "19.5"), ("", "steps", "40")):
        assert f"<tr><td>{row[1]}</td><td>{row[2]}</td></tr>" in page


def test_hostile_files_of_a_run_do_no_harm(run, tmp_path):
    """Nothing is followed out of the run, nothing is taken for mark-up or for a formula."""
    (tmp_path / "secret").write_bytes(b"GIF8 secret")
    (run / "samples" / "16" / "9.gif").symlink_to(tmp_path / "secret")
    (run / "samples" / "16" / "8.gif").write_text("no picture")
    os.mkfifo(run / "samples" / "16" / "7.gif")
    (run / "samples" / "\u00b2").mkdir()
    (run / "evaluate.json").write_text("{}")
    Image.new("RGB", (4, 4)).save(run / 'evaluate"><script>.png')
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace("40", '"<script>"'))
    lines = [
        {"step": s, r"$\frac{x$": s, "big": 10**400, "low": -1e308, "\ud800": s} for s in (1, 2)
    ]
    write_lines(run, lines)
    page = gallery.page(str(run)).encode(errors="backslashreplace")
    assert b"<script" not in page and base64.b64encode(b"secret")[:-2] not in page
    assert page.count(b"image/gif") == 6
    assert "big" not in history.curves(history.read(str(run)))


@pytest.mark.parametrize("name", ["config.json", "evaluate.json"])
@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b'{"task": "x", "task": 1}'])
def test_damaged_json_is_one_line(run, name, content):
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^RUN=.*: {name} is damaged"):
        gallery.page(str(run))


def test_a_run_that_has_not_sampled_has_a_page(run):
    for path in run.glob("samples/*/*"):
        path.unlink()
    write_lines(run, LINES[:1])
    assert "<h2>Samples" not in gallery.page(str(run))


def masked_run(workdir):
    """A masked transformer with random weights on the tokens of `coded`, as a work folder."""
    config = masked_transformer.get_config()
    model = {"width": 16, "depth": 1, "heads": 2}
    fields = {f"task.model.{name}": value for name, value in model.items()}
    fields |= {"task.window": 3, "task.given": 3, "task.tokenizer": str(coded())}
    config.update_from_flattened_dict(FAST | fields | {"task.sampler.keep": 1})
    task = make_task(config.task)
    config.task.update(task.binding())
    batch = {"text": jnp.zeros((2, config.data.text_tokens), jnp.uint8), "id": jnp.arange(2)}
    params, extra = jax.jit(task.init)(jax.random.key(1), batch)
    state = TrainState(jnp.int32(7), jnp.int32(0), params, {}, params, extra)
    with Checkpoints(str(workdir), config) as checkpoints:
        checkpoints.save(7, state, SimpleNamespace(get_state=dict))
    config_lib.save(config, workdir / "config.json")
    write_lines(workdir, LINES)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a run with a tokenizer, its export)."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "run").mkdir()
    masked_run(folder / "run")
    export(str(folder / "run"), str(folder / "out"))
    return folder / "run", folder / "out"


def test_an_export_is_the_run(made):
    run, found = map(open_run, made)
    assert found.step == run.step == 7
    jax.tree.map(np.testing.assert_array_equal, found.params, run.params)
    jax.tree.map(np.testing.assert_array_equal, found.frozen, run.frozen)
    assert open_tokenizer(made[1] / "tokenizer").digest == open_tokenizer(coded()).digest
    files = {path.relative_to(made[1]).as_posix() for path in made[1].rglob("*")}
    own = {"README.md", "config.json", "weights.safetensors"}
    assert files == own | {"tokenizer"} | {f"tokenizer/{name}" for name in own}
    card = (made[1] / "README.md").read_text()
    assert "after 7 steps" in card and "| psnr | 22.5 |" in card and "at step 30" in card


def test_an_export_may_be_moved_and_exported_again(made, tmp_path):
    moved = made[1].rename(tmp_path / "moved")
    try:
        export(str(moved), str(tmp_path / "again"))
        assert open_run(tmp_path / "again").step == 7
    finally:
        moved.rename(made[1])


def test_an_existing_folder_is_left_alone(made, tmp_path):
    with pytest.raises(UserError, match=r"^OUT=.*: exists; name a new folder"):
        export(str(made[0]), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_export_touches_nothing_that_is_there(made, tmp_path):
    """Not the run, not another's folders; after a failure nothing is left."""
    mine = tmp_path / ".out.partial"
    mine.mkdir()
    export(str(made[0]), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial", "out"}
    with pytest.raises(UserError, match=r"^OUT=.*: lies in the run; name a folder elsewhere"):
        export(str(made[0]), str(made[0] / "ckpt" / "99"))
    with pytest.raises(UserError, match=r"^OUT=/proc/x: cannot be written"):
        export(str(made[0]), "/proc/x")


def test_a_damaged_export_is_refused(made):
    path = made[1] / exported.FILE
    content = path.read_bytes()
    try:
        for damaged in (content[:-4], content[:-2] + bytes([content[-2] ^ 1]) + content[-1:], b""):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"weights\.safetensors is damaged .*export again"):
                open_run(made[1])
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"width": 16', '"width": 32', r"weights\.safetensors does not fit its config\.json"),
        ('"given": 3', '"given": 3, "x": 1', "x"),
        ('"smoothing": 0.0', '"smoothing": 0.5', "config.json differs in task.mask.smoothing"),
    ],
)
def test_a_changed_config_of_an_export_is_refused(made, old, new, message):
    path = made[1] / "config.json"
    text = path.read_text()
    assert old in text
    try:
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            open_run(made[1])
    finally:
        path.write_text(text)
