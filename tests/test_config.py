"""The config layer: config files, the command line, one-line errors and config.json."""

import errno
import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app
from absl.testing import flagsaver
from ml_collections import ConfigDict

from configs import common
from jaxvid import cli
from jaxvid import config as config_lib
from jaxvid.errors import UserError

ROOT = Path(__file__).parents[1]
FILE = str(ROOT / "configs" / "ar_diffusion.py")
MQAR, TOKENIZER = (FILE.replace("ar_diffusion", name) for name in ("mqar", "tokenizer"))


@pytest.fixture
def config():
    return config_lib.read(FILE)


@pytest.fixture
def entry(monkeypatch, capsys):
    """Runs an entry point in this process: entry(main, *arguments) -> (status, stdout, stderr)."""
    app.define_help_flags()  # once; flagsaver would take them away again
    monkeypatch.setattr(cli.host, "prepare", lambda: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def run(main, *arguments, commands=None):
        monkeypatch.setattr(sys, "argv", ["entry", *arguments])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
            cli.define_config_flags()
            cli.run(main, commands)
        return stop.value.code or 0, *capsys.readouterr()

    return run


def show():
    """The main function of an entry point that prints what it gets."""
    config, workdir = cli.config_from_flags()
    print(workdir, config.steps, config.data.flip, config.task.model.width)


def test_flags_reach_main_in_a_process():
    code = "import sys; from jaxvid import cli; from tests.test_config import show\n"
    arguments = ["--config.steps=7", "--config.data.flip", "--config.task.model.width", "96"]
    done = subprocess.run(
        [
            *(sys.executable, "-c", f"{code}cli.define_config_flags(); cli.run(show)"),
            *(f"--config={FILE}:size=s,data=folder", *arguments),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "runs/ar_diffusion-s-folder 7 True 96\n"
    assert (done.returncode, done.stderr) == (0, "")


MISTAKES = [
    ([], "error: --config=: missing; name a config file"),
    (["--config.steps=1"], "error: --config=: missing; name a config file"),
    ([f"--config={FILE}x"], "no such file; did you mean"),
    ([f"--config={FILE}:size=huge"], "size=huge: choose one of tiny, s, b, l, xl"),
    ([f"--config={FILE}:sizes=b"], "no option 'sizes'; the options are size, data, cond"),
    ([f"--config={FILE}", "--config.optim.lrr=1"], "did you mean --config.optim.lr?"),
    ([f"--config={FILE}", "--config.bacth_size=1"], "did you mean --config.data.batch_size?"),
    ([f"--config={FILE}", "--steps=1"], "did you mean --config.steps?"),
    ([f"--config={FILE}", "--config.data=1"], "--config.data: a section"),
    ([f"--config={FILE}", "--config.steps=1e4"], "--config.steps=1e4: not of type int"),
    ([f"--config={FILE}", "--config.data.flip=maybe"], "not of type bool"),
    ([f"--config={FILE}", "--config.steps=0"], "steps=0: must lie between 1 and 2147483647"),
    ([f"--config={FILE}", "--workdir=gs://b/x"], "--workdir='gs://b/x': is not a folder of a file"),
    ([f"--config={FILE}", "stray"], "stray: unexpected argument"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes_are_one_line_and_status_2(entry, arguments, message):
    status, out, err = entry(show, *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert message in err


def test_the_home_folder_is_expanded(entry, monkeypatch):
    """As no shell does after an equals sign."""
    monkeypatch.setenv("HOME", "/home/me")
    arguments = ["--workdir=~/x", f"--config={FILE}", "--config.data.path=~/y"]
    shown = entry(lambda: print(*seen(*cli.config_from_flags())), *arguments)
    assert shown == (0, "/home/me/x /home/me/y\n", "")


def seen(config, workdir):
    return workdir, config.data.path


def test_errors_of_main(entry):
    """Some are one line, a bug keeps its traceback."""

    def failing(error):
        raise error

    for error, status, message in (
        (UserError("seed=13: unlucky;\n  take another"), 2, "seed=13: unlucky; take another"),
        (PermissionError(13, "Permission denied", "/file"), 2, "/file: Permission denied"),
        (OSError(errno.EFBIG, "File too large", "/file"), 2, "/file: File too large"),
        (OSError(errno.ENAMETOOLONG, "Too long", "x" * 300), 2, f"{'x' * 200}...: Too long"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        assert entry(functools.partial(failing, error)) == (status, "", f"error: {message}\n")
    for error in (ValueError("a bug"), FileNotFoundError(2, "a bug")):
        with pytest.raises(type(error), match="a bug"):
            entry(functools.partial(failing, error))


def test_commands(entry):
    names = {"step": lambda: None, "data": lambda: None}
    assert entry(print, "data", commands=names) == (0, "data\n", "")
    for arguments, message in (
        ((), "command=: missing"),
        (("steps",), "command=steps: unknown"),
        (("step", "data"), "command=step data: unknown"),
    ):
        expected = f"error: {message}; choose one of step, data\n"
        assert entry(print, *arguments, commands=names) == (2, "", expected)


def test_default_workdir():
    assert cli.default_workdir("configs/ar_diffusion.py") == "runs/ar_diffusion"
    assert cli.default_workdir("x/y.py:size=b,cond=text") == "runs/y-b-text"


def rows(argument):
    """{field: its row of --config_help}."""
    return {line.split()[0]: line for line in cli.describe(argument).splitlines()[1:]}


def test_config_help(entry, tmp_path):
    argument = f"{FILE}:cond=text"
    status, out, _ = entry(show, f"--config={argument}", "--config_help")
    assert (status, out) == (0, cli.describe(argument) + "\n")
    table = rows(argument)
    for name, value in config_lib.flatten(config_lib.read(argument)).items():
        assert table[name].split()[1:3] == [type(value).__name__, repr(value)]
    assert table["optim.muon_lr"].endswith("  peak learning rate of the matrices that Muon updates")
    assert table["data.text_tokens"].endswith("; 0 = no text")  # the preset sets 20
    assert table["task.frames"].endswith("same as data.frames")
    assert table["task.condition.tokens"].endswith("same as data.text_tokens")
    assert rows(f"{FILE}:size=s")["task.train_frames"].endswith("same as data.frames")
    mine = tmp_path / "mine.py"
    mine.write_text("import ml_collections as m\ndef get_config(): return m.ConfigDict({'a': 1})")
    assert rows(str(mine)) == {"a": "a      int   1"}


def options(**choices):
    """Every combination of the choices, as the part after the colon."""
    for values in itertools.product(*choices.values()):
        yield ",".join(f"{key}={value}" for key, value in zip(choices, values))


VARIANTS = [
    *(f"{FILE}:{chosen}" for chosen in options(mixer=common.MIXERS, cond=("none", "text"))),
    *(f"{MQAR}:{chosen}" for chosen in options(mixer=common.MIXERS)),
    *(
        f"{TOKENIZER}:{chosen}"
        for chosen in itertools.chain(
            options(
                arch=("cvivit", "omnitokenizer", "ar_vae"),
                quantizer=("fsq", "vq", "lfq", "bsq", "kl"),
                gan=("none", "patch"),
            ),
            options(mixer=("alibi", *common.MIXERS)),
            options(arch=("omnitokenizer",), stage=("image", "joint", "kl")),
        )
    ),
]


def test_every_field_has_a_meaning():
    for argument in VARIANTS:
        table = cli.describe(argument).splitlines()
        place = table[0].index("MEANING")
        assert [row for row in table if len(row[place:]) < 5] == [], argument


def test_presets_are_valid():
    for size in ("tiny", "s", "b", "l", "xl"):
        config = config_lib.read(f"{FILE}:size={size},data=tfds")
        config_lib.validate(config)
    assert config.is_locked and config.data.name == "tfds"
    model = config.task.model  # the largest, of the paper
    assert (model.depth, model.width, model.heads) == (28, 1152, 16)


def test_fields_of_one_value_and_fields_that_follow():
    config = config_lib.read(f"{FILE}:cond=text")
    config.data.size, config.data.text_tokens, config.data.frames = 64, 7, 9
    assert config.task.size == 64
    assert config.task.condition.tokens == 7
    assert config.task.frames == 9
    config.task.train_frames = 5
    assert config.task.model.mixer.window == 5
    config.task.model.mixer.window = 3
    assert (config.task.frames, config.task.train_frames, config.data.frames) == (9, 5, 9)
    config.task.frames = 5
    assert (config.data.frames, config.task.model.mixer.window) == (5, 3)

    config = config_lib.read(f"{TOKENIZER}:arch=omnitokenizer,stage=kl")
    config.steps = 11
    assert config.optim.discriminator.warmup == 11
    config.optim.discriminator.warmup = 2
    assert config.steps == 11


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = (1\n\ny = 2", r"mine\.py:1: SyntaxError: '\(' was never closed; correct"),
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
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "mine.py").write_text(source)
    (configs / "beside.py").write_text("def half(x):\n    return 1 / x")
    with pytest.raises(UserError, match=message):
        config_lib.read(str(configs / "mine.py"))


def test_save_and_load(tmp_path, config):
    """A round trip keeps values and types; a failed save keeps the old file."""
    path = tmp_path / "config.json"
    other = ConfigDict({"a": 1, "b": {"c": 1.0, "d": (1, (2, 3)), "e": "x", "f": True}}).lock()
    for written in (config, other):
        config_lib.save(written, path)
        again = config_lib.load(path)
        assert again == written and again.is_locked
    assert isinstance(again.b.c, float) and isinstance(again.b.d, tuple)
    with pytest.raises(TypeError):
        config_lib.save(ConfigDict({"not_data": object()}), path)
    assert config_lib.load(path) == other
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        config_lib.load(path)
    for content in ("", "{", "[1]", "!!python/object:os.system\n"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"config\.json: not a saved config"):
            config_lib.load(path)


def test_differences_names_fields_and_values():
    old = ConfigDict({"steps": 1, "a": {"same": (1, 2), "x": 0.5}, "gone": 0})
    new = ConfigDict({"steps": 2, "a": {"same": [1, 2], "x": 0.5}, "fresh": 3})
    assert sorted(config_lib.differences(old, new)) == [
        ("fresh", None, 3),
        ("gone", 0, None),
        ("steps", 1, 2),
    ]


FROM_ONE = (
    *("data.frames", "optim.accumulate", "checkpoint.every", "checkpoint.keep", "log.every"),
    *("evaluate.batches", "sample.num"),
)


def test_validate_names_field_value_and_remedy(config):
    config_lib.validate(config)
    for field, value, message in (
        ("steps", 0, "must lie between 1 and 2147483647"),
        ("steps", 2**31, "must lie between 1 and 2147483647"),
        ("seed", -1, "must lie between 0 and 4294967295"),
        ("seed", 2**32, "must lie between 0 and 4294967295"),
        *((field, 0, "must be at least 1") for field in FROM_ONE),
        *((field, -1, "must be at least 0") for field in ("evaluate.every", "sample.every")),
    ):
        changed = ConfigDict(config.to_dict())
        changed.update_from_flattened_dict({field: value})
        with pytest.raises(UserError, match=f"^{field}={value}: {message}"):
            config_lib.validate(changed)


def test_check_batch_counts_the_shards(config):
    config.data.batch_size, config.optim.accumulate = 16, 2
    config_lib.check_batch(config, shards=8)
    with pytest.raises(UserError, match=r"^data.batch_size=16: .* 3 data shards .* try 12 or 18$"):
        config_lib.check_batch(config, shards=3)
    with pytest.raises(UserError, match=r"optim.accumulate=2; try 32$"):
        config_lib.check_batch(config, shards=16)
    config.optim.accumulate = 3
    with pytest.raises(UserError, match=r"accumulate=3; try 15 or 18$"):
        config_lib.validate(config)
