"""The config layer: plain Python files in, a locked ConfigDict out, one-line errors for people.

An entry point ends with

    if __name__ == "__main__":
        config.define_flags()
        config.run(main)

and its `main` starts with `config.from_flags()`. A config file is executed, so run only files you
trust; a work folder is described by its `config.json` alone, which is data and never executed.
"""

import ast
import difflib
import errno
import functools
import importlib.util
import io
import json
import re
import sys
import tokenize
import traceback
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from jaxvid import files
from jaxvid.errors import UserError
from jaxvid.parallel import host

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # so that --help lists our flags under the entry point that asks

# What a person mends outside the program, when reading or writing files fails.
_DISK_TROUBLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EDQUOT, errno.ENOSPC),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
)

# Inclusive bounds of fields that every task has: (lowest, highest), None = no bound.
_BOUNDS = {
    "steps": (1, 2**31 - 1),
    "seed": (0, 2**32 - 1),
    "data.frames": (1, None),
    "data.size": (1, None),
    "data.stride": (1, None),
    "data.batch_size": (1, None),
    "data.workers": (0, None),
    "data.threads": (1, None),
    "data.num_clips": (1, 2**31 - 1),
    "data.text_tokens": (0, None),
    "data.text_width": (1, None),
    "optim.warmup": (0, None),
    "optim.weight_decay": (0.0, None),
    "optim.clip": (0.0, None),
    "optim.accumulate": (1, None),
    "optim.skip_nonfinite": (0, None),
    "checkpoint.every": (1, None),
    "checkpoint.keep": (1, None),
    "log.every": (1, None),
    "evaluate.every": (0, None),
    "evaluate.batches": (1, None),
    "sample.every": (0, None),
    "sample.num": (1, None),
}

# Fields that hold whole numbers, as many as one likes; flags and files take anything in a tuple.
_WHOLE = ("data.pairs", "task.sizes", "task.quantizer.levels")


# Reading and writing


def read(argument: str) -> ConfigDict:
    """Runs `get_config` of "file.py" or "file.py:key=value,..."; returns the locked config.

    Raises UserError when the file is missing, fails, or does not know the part after the colon.
    """
    file, colon, options = argument.partition(":")
    path = Path(file)
    if not path.is_file():
        others = {other.stem: str(other) for other in path.parent.glob("*.py")}
        raise UserError(f"config={file}: no such file{_suggest(path.stem, others)}")
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
    except Exception as error:  # the file is a program of the user's, which may fail in any way
        raise UserError(
            f"config={argument}: {_place(error, path)}: {type(error).__name__}: "
            f"{getattr(error, 'msg', error)}; mend that line"
        ) from error


def save(config: ConfigDict, path) -> None:
    """Writes the config as JSON; the file appears complete or not at all."""
    files.write(path, config.to_json(indent=2) + "\n")


def load(path) -> ConfigDict:
    """Reads what `save` wrote; returns the locked config. Raises UserError for a broken file."""
    try:
        tree = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"config={path}: no such file; is this the folder of a run?") from error
    except OSError as error:
        raise UserError(f"config={path}: {error.strerror}; is this the folder of a run?") from error
    except ValueError as error:
        raise UserError(f"config={path}: not a saved config ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"config={path}: not a saved config (a {type(tree).__name__})")
    return ConfigDict(_tuples(tree)).lock()


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
    """[(dotted field, old value, new value)]; a field that one side lacks has None there."""
    old, new = _tuples(flatten(old)), _tuples(flatten(new))
    return [
        (name, old.get(name), new.get(name))
        for name in old | new
        if name not in old or name not in new or old[name] != new[name]
    ]


def _tuples(value):
    """JSON knows no tuples and configs use no lists, so every list becomes a tuple."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _place(error, path: Path) -> str:
    """ "file:line" that an error in a config file comes from, of it or of one beside it."""
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

    What only the task, the data source, the optimiser or the mesh can judge is checked by them.
    """
    fields = flatten(config)
    for name, (low, high) in _BOUNDS.items():
        value = fields.get(name)
        if value is None:
            continue
        if not low <= value:  # nor NaN
            raise UserError(f"{name}={value}: must be at least {low}")
        if high is not None and value > high:
            raise UserError(f"{name}={value}: must be at most {high}")
    for name in _WHOLE:
        for number in fields.get(name) or ():
            if type(number) is not int or number < 1:
                raise UserError(
                    f"{name}={fields[name]}: {number!r} is no whole number from 1 on; use these"
                )
    check_batch(config, shards=1)


def check_batch(config: ConfigDict, shards: int) -> None:
    """Raises UserError unless the global batch splits evenly over `shards` and accumulation."""
    batch, parts = config.data.batch_size, config.optim.accumulate
    unit = parts * shards
    if batch % unit:
        near = [str(size) for size in (batch // unit * unit, (batch // unit + 1) * unit) if size]
        raise UserError(
            f"data.batch_size={batch}: does not split over {shards} data shards and "
            f"optim.accumulate={parts}; try {' or '.join(near)}"
        )


def check_sequence(config: ConfigDict, frames: int | None, parts: int) -> None:
    """Raises UserError unless `frames` in a row, None where steps hold them whole, split evenly."""
    if parts == 1:
        return
    if frames is None:
        raise UserError(
            f"mesh.seq={parts}: task.name={config.task.name} splits no frames over devices; "
            "use 1 and give them to mesh.data or mesh.fsdp"
        )
    if frames % parts:
        raise UserError(
            f"mesh.seq={parts}: does not divide the {frames} frames that the model sees of a clip; "
            "use a divisor, or change data.frames"
        )


# Flags


def define_flags() -> None:
    """Defines --config, --workdir and --config_help for the entry point that calls this."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, with options after a colon: configs/ar_diffusion.py:size=s,data=folder. "
        "Set a field with --config.optim.lr=1e-4; see --config_help.",
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run. Default: runs/<config name>, then one -<choice> each."
    )
    flags.DEFINE_boolean("config_help", False, "Print every config field and exit.")


def from_flags() -> tuple[ConfigDict, str]:
    """(validated config, workdir) of the command line."""
    validate(FLAGS.config)
    return FLAGS.config, FLAGS.workdir or default_workdir(FLAGS["config"].config_filename)


def default_workdir(argument: str) -> str:
    """ "configs/ar_diffusion.py:size=s,data=folder" -> "runs/ar_diffusion-s-folder"."""
    file, _, options = argument.partition(":")
    choices = [option.partition("=")[2] for option in options.split(",") if option]
    return str(Path("runs", "-".join([Path(file).stem, *choices])))


def run(main, commands: tuple[str, ...] = ()) -> None:
    """Parses the flags and exits with main(): what a person can mend is one line and status 2.

    With `commands`, the command line must name one of them and it becomes main's argument.
    """
    host.prepare()
    sys.unraisablehook = _unraisable
    app.run(functools.partial(_main, main, commands), flags_parser=_parse)


def _main(main, commands, argv):
    try:
        given = argv[1:]
        if commands and (len(given) != 1 or given[0] not in commands):
            raise UserError(f"command={' '.join(given)}: choose one of {', '.join(commands)}")
        if given and not commands:
            raise UserError(f"{given[0]}: unexpected argument; write options as --name=value")
        return main(*given)
    except UserError as error:
        return _report(error)
    except KeyboardInterrupt:
        _report("interrupted")
        return 130  # as a shell has it for SIGINT
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        return _report(f"{error.filename or 'disk'}: {error.strerror}")


def _unraisable(trouble):
    """Of a damaged checkpoint, reads still under way when one fails find asyncio's loop closed."""
    if str(trouble.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(trouble)


def _report(error) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _parse(argv):
    """flags_parser of absl: fills FLAGS, answers --config_help, turns mistakes into one line."""
    try:
        if "config" in FLAGS:
            _check_fields(argv)
        rest = FLAGS(argv)
    except (flags.Error, UserError) as error:
        sys.exit(_report(_explain(error)))
    if FLAGS["verbosity"].using_default_value:
        FLAGS.verbosity = -1  # warnings: orbax and grain fill the screen at absl's default, info
    if "config_help" in FLAGS and FLAGS.config_help:
        print(describe(FLAGS["config"].config_filename))
        sys.exit(0)
    return rest


def _check_fields(argv) -> None:
    """Names what ml_collections would answer with a traceback: no config, or no such field."""
    flag = re.compile(r"--?config(?:=(.*))?$")
    named = [
        following if match[1] is None else match[1]
        for argument, following in zip(argv, [*argv[1:], ""])
        if (match := flag.match(argument))
    ]
    asks_for_help = any(re.match(r"--?help", argument) for argument in argv)
    if not named:
        if asks_for_help:
            return
        raise UserError("config=: missing; name a config file, --config=configs/ar_diffusion.py")
    fields = flatten(read(named[-1]))
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in fields:
            raise UserError(_no_such_field(match[1], fields))


def _no_such_field(name: str, fields) -> str:
    inside = [field for field in fields if field.startswith(f"{name}.")]
    if inside:
        return f"--config.{name}: a section; set its fields one by one, as --config.{inside[0]}=..."
    spelling = {field: f"--config.{field}" for field in fields}
    return f"--config.{name}: no such field{_suggest(name, spelling)}"


def _explain(error) -> str:
    """What absl says about a flag, in words that name the remedy."""
    config = FLAGS["config"].value if "config" in FLAGS else None
    fields = {f"config.{name}": value for name, value in flatten(config or {}).items()}
    if isinstance(error, flags.UnrecognizedFlagError):
        spelling = {name.removeprefix("config."): f"--{name}" for name in [*FLAGS, *fields]}
        return f"--{error.flagname}: no such flag{_suggest(error.flagname, spelling)}"
    match = re.fullmatch(r"flag --([\w.]+)=(.*?): (.*)", str(error), re.DOTALL)
    if not match:
        return str(error)
    name, value, reason = match.groups()
    if value == "None":
        return f"--{name}: missing; add --{name}=..."
    if name in fields:
        kind = type(fields[name]).__name__
        reason = f"not of type {kind}; the default is {fields[name]!r}"
    return f"--{name}={value}: {reason}"


def _suggest(name: str, spelling: dict[str, str]) -> str:
    """ "; did you mean X?" with the spelling of the name nearest to `name`, whole or last word."""
    last = {other.rpartition(".")[2]: other for other in spelling}
    near = difflib.get_close_matches(name, spelling, n=1) or [
        last[word] for word in difflib.get_close_matches(name.rpartition(".")[2], last, n=1)
    ]
    return f"; did you mean {spelling[near[0]]}?" if near else ""


# --config_help


def describe(argument: str) -> str:
    """The table behind --config_help: field, type, default and the comment beside the source."""
    comments = _comments(Path(argument.partition(":")[0]))
    rows = [("FIELD", "TYPE", "DEFAULT", "MEANING")] + [
        (name, type(value).__name__, repr(value), comments.get(name, ""))
        for name, value in flatten(read(argument)).items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip()
        for row in rows
    )


def _comments(path: Path) -> dict[str, str]:
    """{dotted field: comment on its source line}; the file itself speaks before its imports.

    A field is an assignment `config.optim.lr = ...` or a keyword of `config.optim = dict(lr=...)`.
    """
    source = path.read_text()
    tree = ast.parse(source)
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    comments = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                imported = path.with_name(alias.name.rpartition(".")[2] + ".py")
                if imported.is_file():
                    comments = _comments(imported) | comments
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for name, line in _fields(ast.unparse(node.targets[0]).partition(".")[2], node):
                if name and line in by_line:
                    comments[name] = by_line[line]
    return comments


def _fields(name: str, node):
    """Yields (dotted field, source line) of an assignment and of the keywords nested in it."""
    yield name, node.end_lineno
    value = node.value
    for inner in (value, *value.args) if isinstance(value, ast.Call) else ():
        for keyword in inner.keywords if isinstance(inner, ast.Call) else ():
            if keyword.arg:
                yield from _fields(f"{name}.{keyword.arg}".lstrip("."), keyword)
