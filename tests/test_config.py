"""The config layer: what a person types, what they are told, and what is kept on disk."""

import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxvid import config as configlib
from jaxvid.errors import UserError

ROOT = Path(__file__).parents[1]
FILE = str(ROOT / "configs" / "ar_diffusion.py")
ENTRY = """
from jaxvid import config
from jaxvid.errors import UserError

def main():
    settings, workdir = config.from_flags()
    if settings.seed == 13:
        raise UserError("seed=13: unlucky;\\n  take another")
    if settings.seed == 15:
        raise PermissionError(13, "Permission denied", "/secret/file")
    if settings.seed == 14:
        raise ZeroDivisionError("a bug")
    print(workdir, settings.steps, settings.data.flip, settings.task.model.width)

config.define_flags()
config.run(main)
"""


def entry(*arguments):
    """Runs an entry point in a process of its own: (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def config():
    return configlib.read(FILE)


def test_flags_reach_main():
    status, out, err = entry(
        f"--config={FILE}:size=s,data=folder",
        "--config.steps=7",
        "--config.data.flip",
        "--config.task.model.width",
        "96",
    )
    assert (status, out.strip(), err) == (0, "runs/ar_diffusion-s-folder 7 True 96", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: config=: missing; name a config file"),
        ([f"--config={FILE}x"], "no such file; did you mean"),
        ([f"--config={FILE}:size=huge"], "size=huge: choose one of tiny, s, b, l, xl"),
        ([f"--config={FILE}:sizes=b"], "no option 'sizes'; the options are size, data, cond"),
        ([f"--config={FILE}", "--config.optim.lrr=1"], "did you mean --config.optim.lr?"),
        ([f"--config={FILE}", "--config.bacth_size=1"], "did you mean --config.data.batch_size?"),
        ([f"--config={FILE}", "--steps=1"], "did you mean --config.steps?"),
        ([f"--config={FILE}", "--config.data=1"], "--config.data: a section"),
        ([f"--config={FILE}", "--config.steps=1e4"], "--config.steps=1e4: not of type int"),
        ([f"--config={FILE}", "--config.data.flip=maybe"], "not of type bool"),
        ([f"--config={FILE}", "--config.steps=0"], "steps=0: must be at least 1"),
        ([f"--config={FILE}", "stray"], "stray: unexpected argument"),
        ([f"--config={FILE}", "--config.seed=13"], "error: seed=13: unlucky; take another\n"),
        ([f"--config={FILE}", "--config.seed=15"], "error: /secret/file: Permission denied\n"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message):
    status, out, err = entry(*arguments)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = (1\n\ny = 2", r"mine\.py:1: SyntaxError: '\(' was never closed; mend"),
        ("import no_such_module", r"mine\.py:1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return width", r"mine\.py:2: NameError: name 'width'"),
        (
            "from configs import beside\ndef get_config():\n    return beside.half(0)",
            r"beside\.py:2: ZeroDivisionError: division by zero",
        ),
        ("x = 1", r"mine\.py: AttributeError: .* has no attribute 'get_config'"),
    ],
)
def test_a_config_that_fails_names_the_line(tmp_path, monkeypatch, source, message):
    monkeypatch.syspath_prepend(tmp_path)
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "mine.py").write_text(source)
    (configs / "beside.py").write_text("def half(x):\n    return 1 / x")
    with pytest.raises(UserError, match=message):
        configlib.read(str(configs / "mine.py"))


def test_a_bug_keeps_its_traceback():
    status, _, err = entry(f"--config={FILE}", "--config.seed=14")
    assert status == 1
    assert "Traceback" in err and "ZeroDivisionError: a bug" in err


def test_config_help_describes_every_field():
    status, out, _ = entry(f"--config={FILE}:size=b", "--config_help")
    assert status == 0
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    fields = configlib.flatten(configlib.read(f"{FILE}:size=b"))
    assert rows.keys() == fields.keys()
    for name, value in fields.items():
        before, default, meaning = rows[name].partition(repr(value))
        assert type(value).__name__ in before and default
        assert len(meaning.strip()) > 5, f"{name} has no comment"


def test_save_load_round_trip(tmp_path):
    config = ConfigDict({"a": 1, "b": {"c": 1.0, "d": (1, (2, 3)), "e": "x", "f": True}}).lock()
    configlib.save(config, tmp_path / "config.json")
    again = configlib.load(tmp_path / "config.json")
    assert again == config and again.is_locked
    assert isinstance(again.b.c, float) and isinstance(again.b.d, tuple)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_failed_save_keeps_the_old_file(tmp_path, config):
    path = tmp_path / "config.json"
    configlib.save(config, path)
    with pytest.raises(TypeError):
        configlib.save(ConfigDict({"not_data": object()}), path)
    assert configlib.differences(config, configlib.load(path)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "!!python/object:os.system\n"])
def test_load_refuses_what_save_did_not_write(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        configlib.load(path)


def test_differences_names_fields_and_values():
    old = ConfigDict({"steps": 1, "a": {"same": (1, 2), "x": 0.5}, "gone": 0})
    new = ConfigDict({"steps": 2, "a": {"same": [1, 2], "x": 0.5}, "fresh": 3})
    assert sorted(configlib.differences(old, new)) == [
        ("fresh", None, 3),
        ("gone", 0, None),
        ("steps", 1, 2),
    ]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("optim.clip", float("nan"), r"optim.clip=nan: must be at least 0"),
        ("seed", 2**32, r"seed=4294967296: must be at most 4294967295"),
        ("optim.accumulate", 3, r"data.batch_size=8: .*accumulate=3; try 6 or 9"),
        ("data.pairs", (4, "x"), r"data.pairs=\(4, 'x'\): 'x' is no whole number from 1 on; use"),
        ("task.sizes", (16.0,), r"task.sizes=\(16.0,\): 16.0 is no whole"),
        ("task.quantizer.levels", (8.5, 4), r"levels=\(8.5, 4\): 8.5 is no whole"),
    ],
)
def test_validate_names_field_value_and_remedy(config, field, value, message):
    config.unlock()
    config.data.pairs, config.task.sizes, config.task.quantizer = (4,), (), {"levels": (8, 5)}
    configlib.validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        configlib.validate(config)


def test_check_batch_counts_the_shards(config):
    config.data.batch_size, config.optim.accumulate = 16, 2
    configlib.check_batch(config, shards=8)
    with pytest.raises(UserError, match=r"3 data shards and optim.accumulate=2; try 12 or 18"):
        configlib.check_batch(config, shards=3)
    with pytest.raises(UserError, match=r"try 32$"):
        configlib.check_batch(config, shards=16)


@pytest.mark.parametrize("size", ["tiny", "s", "b", "l", "xl"])
def test_presets_are_valid(size):
    for data in ("sprites", "folder", "array_record", "tfds"):
        config = configlib.read(f"{FILE}:size={size},data={data}")
        configlib.validate(config)
        assert config.data.name == data
        assert (config.task.size, config.task.frames) == (config.data.size, config.data.frames)
    assert config.is_locked


def test_one_field_under_two_names(config):
    """The task is told size and frames of the data, whatever sets them."""
    config.data.size = 64
    assert config.task.size == 64
    config = configlib.read(f"{FILE}:cond=text")
    config.data.text_tokens = 7
    assert config.task.condition.tokens == 7


def test_the_largest_preset_is_the_papers():
    model = configlib.read(f"{FILE}:size=xl").task.model
    assert (model.depth, model.width, model.heads) == (28, 1152, 16)


def test_default_workdir():
    assert configlib.default_workdir("configs/ar_diffusion.py") == "runs/ar_diffusion"
    assert configlib.default_workdir("x/y.py:size=b,cond=text") == "runs/y-b-text"


def test_the_window_of_attention_follows_the_clips_until_it_is_set():
    config = configlib.read(FILE)
    config.data.frames = 9
    assert config.task.frames == config.task.model.mixer.window == 9
    config.task.model.mixer.window = 3
    assert config.task.frames == config.data.frames == 9
