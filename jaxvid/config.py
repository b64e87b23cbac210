"""Configs: reading a Python file into a locked ConfigDict, config.json, and shared checks.

A config file is executed, so run only files that you trust. The `config.json` of a work folder is
data and is never executed.
"""

import difflib
import importlib.util
import os
import sys
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from jaxvid import checks, data, files, memory, schema
from jaxvid.errors import UserError, within

# The fields that all tasks share. Runs of earlier versions lack those with a question mark. The
# task and the source have fields of their own.
_OPTIM = {
    **{"name": str, "lr": float, "muon_lr": float, "warmup": int, "schedule": str},
    **{"b1": float, "b2": float, "weight_decay": float, "clip": float, "ema": float},
    **{"accumulate": int, "skip_nonfinite": int},
}
FORM = {
    **{"seed": int, "steps": int, "init_from": str, "compile_cache": str},
    "task": {"name": str, schema.OPEN: None},
    "data": {
        **{"name": str, "path?": str, "frames": int, "size": int, "fps?": float, "stride": int},
        **{"batch_size": int, "flip": bool, "crop": str, "difficulty?": float, "num_clips?": int},
        **{"max_sprites?": int, "sizes?": int, "turning?": bool},
        **{"workers": int, "threads": int, "text_tokens": int, "text_width": int},
        **{"text?": str, "text_path?": str, "text_digest?": str},
        **{"vocabulary?": int, "pairs?": [int], "gap?": [int], schema.OPEN: None},
    },
    "optim": {
        **_OPTIM,
        "discriminator?": {f"{name}?": form for name, form in _OPTIM.items()},
        "conditioner?": {f"{name}?": form for name, form in _OPTIM.items()},
    },
    "mesh": {"data": int, "fsdp": int, "tensor": int, "seq?": int},
    "checkpoint": {"every": int, "keep": int, "best": str},
    "log": {"every": int, "tensorboard": bool, "parameters?": int},
    "evaluate": {"every": int, "batches": int},
    "sample": {"every": int, "num": int},
}

# Fields that runs of earlier versions lack, and the value that stands for what they did.
EARLIER = {
    "data.max_sprites": 3,
    "data.sizes": 3,
    "data.turning": True,
    "data.text": "words",
    "data.text_path": "",
    "data.text_digest": "",
    "task.model.conv": 1,
    "task.model.mixer.positions": "absolute",
    "task.condition.encoder": "none",
    "task.condition.queries": 0,
    "task.condition.depth": 2,
    "task.condition.heads": 4,
    **{
        f"task.{network}.mixer.{field}": value
        for network in ("model", "network")
        for field, value in {
            **{"every": 0, "attention.window": 4, "attention.sinks": 0},
            **{"attention.positions": "absolute", "write": "committed"},
        }.items()
    },
    "task.history_dropout": 0.0,
    "task.sampler.history.guidance": 1.0,
    "task.sampler.history.level": 0.0,
    "task.sampler.history.window": 0,
    "task.shortcut.finest": 0,
    "task.shortcut.share": 0.25,
    "task.shortcut.after": 0,
    "task.resampling.share": 0.0,
    "task.resampling.after": 0,
    "task.resampling.shift": 0.6,
}

# Reading and writing


def read(argument: str) -> ConfigDict:
    """Runs `get_config` of "file.py" or "file.py:key=value,..."; returns the locked config.

    A "config.json" of a run is read and not executed. Raises UserError when the file is missing,
    fails, or does not know the part after the colon.
    """
    file, colon, options = argument.partition(":")
    path = Path(file)
    if path.suffix == ".json":
        checks.require(not colon, "config", argument, "a saved config takes no options")
        return load(path)
    if not path.is_file():
        others = {other.stem: str(other) for other in sorted(path.parent.glob("*.py"))}
        raise UserError(f"config={file}: no such file{suggest(path.stem, others)}")
    home = str(path.resolve().parent.parent)  # makes `from configs import common` work anywhere
    if home not in sys.path:
        sys.path.append(home)
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(options) if colon else module.get_config()
        return config.lock()
    except ValueError as error:
        raise UserError(f"config={argument}: {error}") from error
    except Exception as error:  # the file is the user's program and may fail in any way
        raise UserError(
            f"config={argument}: {_place(error, path)}: {type(error).__name__}: "
            f"{getattr(error, 'msg', error)}; correct that line"
        ) from error


def save(config: ConfigDict, path) -> None:
    """Writes the config as JSON; the file is replaced whole or not at all."""
    files.write(path, config.to_json(indent=2) + "\n")


def load(path) -> ConfigDict:
    """Reads what `save` wrote; returns the locked config. Raises UserError for a broken file."""
    try:
        tree = files.parse_json(Path(path).read_bytes())
        _check_names(tree)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; is this the folder of a run?") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is this the folder of a run?") from error
    except ValueError as error:
        raise UserError(f"{path}: not a saved config ({error})") from error
    return ConfigDict(_tuples(as_now(tree))).lock()


def as_now(tree: dict) -> dict:
    """A saved config in which fields that earlier versions wrote in another form are as today."""
    task = tree.get("task")
    if isinstance(task, dict) and isinstance(share := task.get("clean_prefix"), float):
        del task["clean_prefix"]
        task["layout"] = f"clean_prefix={share:g},diffusion_forcing={1 - share:g}"
    if isinstance(task, dict) and task.get("name") == "ar_diffusion" and "frames" in task:
        task.setdefault("train_frames", task["frames"])
    return tree


def _check_names(tree):
    """Raise ValueError unless a value of JSON is an object with names that a config can have."""
    if not isinstance(tree, dict):
        raise ValueError(f"a {type(tree).__name__}")
    for name, value in tree.items():
        if not name.isidentifier() or hasattr(ConfigDict, name):
            raise ValueError(f"{name[:60]!r} is no name of a field")
        if isinstance(value, dict):
            _check_names(value)


def expand_home(config: ConfigDict) -> None:
    """Expands ~ at the start of every field, as a shell does not after an equals sign."""
    for name, value in flatten(config).items():
        if isinstance(value, str) and value.startswith("~"):
            section, _, field = name.rpartition(".")
            (config[section] if section else config)[field] = os.path.expanduser(value)


def flatten(config, prefix: str = "") -> dict:
    """{"optim.lr": 0.001, ...}: every leaf of the config by its dotted name, in order."""
    leaves = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def differences(old: ConfigDict, new: ConfigDict) -> list[tuple]:
    """[(dotted field, old value, new value)], with None for a field that one side lacks.

    A field that earlier versions lack is no difference if its new value says what they did.
    """
    old, new = _tuples(flatten(old)), _tuples(flatten(new))
    missing = {name: value for name, value in EARLIER.items() if name in new}
    old = missing | old
    return [
        (name, old.get(name), new.get(name))
        for name in old | new
        if name not in old or name not in new or old[name] != new[name]
    ]


def _tuples(value):
    """JSON has no tuples and configs have no lists, so every list becomes a tuple."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _place(error, path: Path) -> str:
    """ "file:line" of the error, in the config file or in another one of its folder."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    folder = path.resolve().parent
    places = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().parent == folder
    ]
    return places[-1] if places else str(path)


# Checks


def validate(config: ConfigDict) -> None:
    """Checks the fields that all tasks share; raises UserError naming field, value and remedy.

    The task, the data source, the optimizer and the mesh check their own fields when they are made.
    """
    if "task" not in config:
        raise UserError("config: has no section task; use configs/ar_diffusion.py, for example")
    schema.check("", config.to_dict(), FORM)
    for name, value in flatten(config).items():
        if isinstance(value, str):
            checks.no_nul(name, value)
        if isinstance(value, float):
            checks.finite(name, value)
            checks.at_least(name, value, -schema.MAX_FLOAT, at_most=schema.MAX_FLOAT)
    if config.get("init_from"):
        checks.local_path("init_from", config.init_from)
    checks.between("steps", config.steps, 1, 2**31 - 1)
    checks.between("seed", config.seed, 0, 2**32 - 1)
    with within("data"):
        data.check(config.data)
    with within("checkpoint"):
        checks.at_least("every", config.checkpoint.every, 1)
        checks.at_least("keep", config.checkpoint.keep, 1)
    with within("log"):
        checks.at_least("every", config.log.every, 1)
        checks.at_least("parameters", config.log.get("parameters", 0), 0)
    with within("evaluate"):
        checks.at_least("every", config.evaluate.every, 0)
        checks.at_least("batches", config.evaluate.batches, 1)
    with within("sample"):
        checks.at_least("every", config.sample.every, 0)
        checks.at_least("num", config.sample.num, 1, at_most=data.MAX_CLIPS)
    fields = config.data
    whole = f"sample.num={config.sample.num}, data.frames={fields.frames}, data.size={fields.size}"
    samples = 3 * config.sample.num * fields.frames * fields.size**2
    memory.require(whole, "samples", samples)
    for name in ("frames", "size"):  # configs give both the same reference, saved ones the number
        differs = f"differs from data.{name}={fields[name]}; set both to the same"
        own = config.task.get(name, fields[name])
        checks.require(own == fields[name], f"task.{name}", own, differs)
    check_batch(config, shards=1)


def check_batch(config: ConfigDict, shards: int) -> None:
    """Raises UserError unless the global batch splits evenly over `shards` and accumulation."""
    batch, parts = config.data.batch_size, config.optim.accumulate
    with within("optim"):
        checks.at_least("accumulate", parts, 1)
    unit = parts * shards
    near = [str(size) for size in (batch // unit * unit, (batch // unit + 1) * unit) if size]
    split = f"does not split over {shards} data shards and optim.accumulate={parts}"
    with within("data"):
        checks.require(batch % unit == 0, "batch_size", batch, f"{split}; try {' or '.join(near)}")


def check_sequence(config: ConfigDict, frames: int | None, parts: int) -> None:
    """Raises UserError unless mesh.seq, of `parts` devices, divides the frames of the model.

    frames: of a training clip as the model sees it; None for a task that does not split frames.
    """
    if parts == 1:
        return
    remedy = "use 1, and give the devices to mesh.data or mesh.fsdp"
    unsplit = f"task.name={config.task.name} does not split frames over devices; {remedy}"
    uneven = f"does not divide the {frames} frames that the model sees; use a divisor"
    with within("mesh"):
        checks.require(frames is not None, "seq", parts, unsplit)
        checks.require(frames % parts == 0, "seq", parts, f"{uneven}, or change data.frames")


def suggest(name: str, spelling: dict[str, str]) -> str:
    """ "; did you mean X?" for the nearest name, or the name with the nearest last part, else "".

    spelling: {name: how to write it in the message}.
    """
    last = {other.rpartition(".")[2]: other for other in spelling}
    section, dot, word = name.rpartition(".")
    initials = section + dot + "".join(part[:1] for part in word.split("_"))
    near = [initials] if initials in spelling else []
    near = (
        near
        or difflib.get_close_matches(name, spelling, n=1)
        or [last[word] for word in difflib.get_close_matches(name.rpartition(".")[2], last, n=1)]
    )
    return f"; did you mean {spelling[near[0]]}?" if near else ""
