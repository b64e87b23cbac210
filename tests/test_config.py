"""The config layer: config files, the command line, one-line errors and config.json."""

import errno
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import app
from absl.testing import flagsaver
from ml_collections import ConfigDict

from configs import common
from jaxvid import cli
from jaxvid import config as config_lib
from jaxvid.errors import UserError
from jaxvid.runs import make_task

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

    def run(main, *arguments, commands=None, wanted=""):
        monkeypatch.setattr(sys, "argv", ["entry", *arguments])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
            cli.define_config_flags()
            cli.run(main, commands, wanted)
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
    ([f"--config={FILE}", "--config.optim.learning_rate=1"], "did you mean --config.optim.lr?"),
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
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: allocating 155189014976 bytes."),
            2,
            "the device has too little memory (145 GiB at once); lower data.batch_size, "
            "data.frames, data.size or the width of the model, or raise optim.accumulate",
        ),
    ):
        assert entry(functools.partial(failing, error)) == (status, "", f"error: {message}\n")
    for error in (ValueError("a bug"), FileNotFoundError(2, "a bug")):
        with pytest.raises(type(error), match="a bug"):
            entry(functools.partial(failing, error))


def test_commands(entry):
    names = {"step": lambda: None, "data": lambda: None}
    assert entry(print, "data", commands=names) == (0, "data\n", "")
    assert entry(print, "data", "--verbosity=0", commands=names) == (0, "data\n", "")
    for arguments, message in (
        ((), "command=: missing"),
        (("steps",), "command=steps: unknown"),
        (("step", "data"), "command=step data: unknown"),
    ):
        expected = f"error: {message}; choose one of step, data\n"
        assert entry(print, *arguments, commands=names) == (2, "", expected)


def test_arguments(entry):
    """Flags may follow them."""
    assert entry(print, "a", "b", wanted="RUN OUT") == (0, "a b\n", "")
    assert entry(print, "a", "b", "--verbosity=0", wanted="RUN [RUN ...]") == (0, "a b\n", "")
    for given, wanted in (("a", "RUN OUT"), ("a b c", "RUN OUT"), ("a b", "RUN")):
        expected = f"error: {given}: give {wanted}\n"
        assert entry(print, *given.split(), wanted=wanted) == (2, "", expected)


def test_default_workdir():
    assert cli.default_workdir("configs/ar_diffusion.py") == "runs/ar_diffusion"
    assert cli.default_workdir("x/y.py:size=b,cond=text") == "runs/y-b-text"


def rows(argument):
    """{field: its row of --config_help}."""
    return {line.split()[0]: line for line in cli.describe(argument).splitlines()[1:]}


def test_help_is_no_failure(entry):
    status, out, _ = entry(show, "--help")
    assert status == 0 and out


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


NO_CONFIGS = (
    *(b"", b"{", b"[1]", b"null", b"!!python/object:os.system\n", b'{"a": NaN}', b'{"a": 1e999}'),
    *(b'{"a": 1, "a": 2}', b'{"a.b": 1}', b'{"a": {"b.c": 1}}', b'{"items": 1}', b'{"": 1}'),
    *(b'{"a": "\xff\xfe"}', b'{"a": %s}' % (b"9" * 5000), b"[" * 10**4 + b"]" * 10**4),
    b'{"a":' * 100 + b"1" + b"}" * 100,
)


@pytest.mark.parametrize("options", ["size=s", "size=s,mixer=gla"])
def test_a_config_of_an_earlier_version_says_the_same_today(tmp_path, options):
    now = config_lib.read(f"configs/ar_diffusion.py:{options}")
    before = json.loads(now.to_json())
    fields = [field for field in config_lib.EARLIER if field in config_lib.flatten(now)]
    for field in (*fields, "task.layout", "task.train_frames"):
        section = before
        *path, name = field.split(".")
        for part in path:
            section = section[part]
        del section[name]
    if "gla" in options:
        assert before["task"]["model"]["mixer"].pop("attention") == {}
    before["task"]["clean_prefix"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(before))
    then = config_lib.load(tmp_path / "config.json")
    assert not config_lib.differences(then, now)
    now.task.model.conv = 3
    assert config_lib.differences(then, now) == [("task.model.conv", 1, 3)]


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        config_lib.load(path)
    for content in NO_CONFIGS:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json: not a saved config"):
            config_lib.load(path)


def test_a_saved_config_goes_on_with_its_run(entry, tmp_path, config):
    path = tmp_path / "config.json"
    config.steps = 7
    config_lib.save(config, path)
    shown = entry(show, f"--config={path}", "--config.data.flip")
    assert shown == (0, f"{tmp_path} 7 True 128\n", "")
    assert entry(show, f"--config={path}", "--workdir=x")[1] == "x 7 False 128\n"
    assert "takes no options" in entry(show, f"--config={path}:size=s")[2]
    assert (
        "task.frames=16: differs from data.frames=9; set both"
        in entry(show, f"--config={path}", "--config.data.frames=9")[2]
    )
    path.write_text("[1]")
    assert entry(show, f"--config={path}")[2].count("\n") == 1


def test_differences_names_fields_and_values():
    old = ConfigDict({"steps": 1, "a": {"same": (1, 2), "x": 0.5}, "gone": 0})
    new = ConfigDict({"steps": 2, "a": {"same": [1, 2], "x": 0.5}, "fresh": 3})
    assert sorted(config_lib.differences(old, new)) == [
        ("fresh", None, 3),
        ("gone", 0, None),
        ("steps", 1, 2),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: tree.pop("log"), "^log: missing; add it"),
        (lambda tree: tree["optim"].pop("lr"), r"^optim\.lr: missing; add it"),
        (lambda tree: tree["optim"].update(lrr=1.0), r"^optim\.lrr: no such field here"),
        (lambda tree: tree.update(task=(1,)), r"^task=\(1,\): must be a section of fields"),
        (lambda tree: tree.update(seed=None), "^seed=None: must be of type int"),
        (lambda tree: tree.update(steps=True), "^steps=True: must be of type int"),
        (lambda tree: tree["data"].update(path=1), r"^data\.path=1: must be of type str"),
        (lambda tree: tree["optim"].update(lr="1"), r"^optim\.lr='1': must be of type float"),
        (lambda tree: tree["optim"].update(weight_decay=float("inf")), r"weight_decay=inf: must"),
        (
            lambda tree: tree["task"].update(snr_clip=float("nan")),
            r"^task\.snr_clip=nan: must be",
        ),
        (lambda tree: tree["optim"].update(clip=1e300), r"^optim\.clip=1e\+300: must be"),
        (
            lambda tree: tree["data"].update(workers=10**9),
            r"^data\.workers=.*at most 1024",
        ),
        (
            lambda tree: tree["data"].update(batch_size=10**12),
            r"^data\.batch_size=.*: must be at",
        ),
        (lambda tree: tree["data"].update(difficulty=-1.0), r"^data\.difficulty=-1.0: must lie"),
        (
            lambda tree: (tree["sample"].update(num=2**20), tree["data"].update(size=4096)),
            r"^sample\.num=1048576, data\.frames=16, data\.size=4096: samples take about",
        ),
    ],
)
def test_validate_checks_the_form_of_every_field(config, change, message):
    tree = config.to_dict()
    change(tree)
    with pytest.raises(UserError, match=message):
        config_lib.validate(ConfigDict(tree))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("task.noise.num_steps", 10**12, "^task.noise.num_steps=1000000000000: must be at most"),
        ("task.model.depth", 10**6, "^task.model.depth=1000000: must be at most 256"),
        ("task.model.width", 10**9, "^task.model.width=1000000000: must be at most"),
        ("task.model.mlp_ratio", 1e9, "^task.model.mlp_ratio=1000000000.0: must be at most 1024"),
        ("task.model.mixer.window", 10**9, "^task.model.mixer.window=.*: must be at most"),
        ("task.condition.num_classes", -1, "^task.condition.num_classes=-1: must be at least 0"),
        ("task.sampler.block", -1, "^task.sampler.block=-1: must be at least 1"),
        ("task.sampler.steps", "10", "^task.sampler.steps='10': must be of type int"),
        ("task.model.qk_norm", 1, "^task.model.qk_norm=1: must be of type bool"),
        ("task.model.depthh", 1, "^task.model.depthh: no such field here"),
        ("task.prediction", None, "^task.prediction=None: must be of type str"),
        ("task.model", (1,), r"^task.model=\(1,\): must be of type Mapping"),
    ],
)
def test_tasks_check_what_they_are_built_of(config, field, value, message):
    tree = config.to_dict()
    section = tree
    *sections, name = field.split(".")
    for inner in sections:
        section = section[inner]
    section[name] = value
    with pytest.raises(UserError, match=message):
        make_task(ConfigDict(tree).task)


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
