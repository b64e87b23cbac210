"""The command line: flags, one-line errors, and the table behind --config_help.

An entry point ends with

    if __name__ == "__main__":
        cli.define_config_flags()
        cli.run(main)

and its `main` starts with `cli.config_from_flags()`. Entry points without a config define flags of
their own and call `cli.run` alone.
"""

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from jaxvid import checks, files
from jaxvid import config as config_lib
from jaxvid.errors import UserError, printable
from jaxvid.parallel import host

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # so that --help lists our flags under the entry point

_NO_CONFIG = "--config=: missing; name a config file, --config=configs/ar_diffusion.py"


def define_config_flags() -> None:
    """Defines --config, --workdir and --config_help for the entry point that calls this."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, with options after a colon: configs/ar_diffusion.py:size=s,data=folder; or "
        "config.json of a run, which then goes on. "
        "Set a field with --config.optim.lr=1e-4; see --config_help.",
    )
    FLAGS["config"].parser = _ConfigParser()
    define_path(
        "workdir", "Folder of the run. Default: runs/<config name>, then one -<choice> each."
    )
    flags.DEFINE_boolean("config_help", False, "Print every config field and exit.")


def define_path(
    name: str, meaning: str, required: bool = False, default: str | None = None
) -> None:
    """Defines a flag that names a local file or folder; ~ is expanded."""
    flags.DEFINE(_PathParser(name), name, default, meaning, required=required)


def config_from_flags() -> tuple[ConfigDict, str]:
    """(validated config, workdir) of the command line. Answers --config_help and exits."""
    if FLAGS.config is None:
        raise UserError(_NO_CONFIG)
    argument = FLAGS["config"].config_filename
    if FLAGS.config_help:
        print(describe(argument))
        sys.exit()
    config_lib.expand_home(FLAGS.config)
    config_lib.validate(FLAGS.config)
    return FLAGS.config, FLAGS.workdir or default_workdir(argument)


def default_workdir(argument: str) -> str:
    """ "configs/ar_diffusion.py:size=s,data=folder" -> "runs/ar_diffusion-s-folder".

    "RUN/config.json" -> "RUN".
    """
    file, _, options = argument.partition(":")
    if file.endswith(".json"):  # of a run: its own folder
        return str(Path(file).parent)
    choices = [option.partition("=")[2] for option in options.split(",") if option]
    return str(Path("runs", "-".join([Path(file).stem, *choices])))


def run(
    main: Callable, commands: Mapping[str, Callable] | None = None, arguments: str = ""
) -> None:
    """Parses the flags and exits with main(); a mistake of the user is one line and status 2.

    commands: {name: function that defines its flags}. The command line must then begin with a name,
    and main gets it as its argument. arguments: what the command line has beside flags, as in "RUN
    OUT" or "RUN [RUN ...]"; main gets it.
    """
    commands = commands or {}
    for name in commands.keys() & set(sys.argv[1:2]):
        commands[name]()
    host.prepare()
    sys.unraisablehook = _unraisable
    app.run(functools.partial(_main, main, commands, arguments), flags_parser=_parse)


def _main(main, commands, arguments, argv):
    try:
        given = argv[1:]
        if arguments:
            count, many = len(arguments.partition(" [")[0].split()), "..." in arguments
            if len(given) < count or (len(given) > count and not many):
                raise UserError(f"{' '.join(given) or 'arguments'}: give {arguments}")
            return main(*given)
        choices = f"choose one of {', '.join(commands)}"
        if commands and not given:
            raise UserError(f"command=: missing; {choices}")
        if commands and (len(given) > 1 or given[0] not in commands):
            raise UserError(f"command={' '.join(given)}: unknown; {choices}")
        if given and not commands:
            raise UserError(f"{given[0]}: unexpected argument; write options as --name=value")
        return main(*given)
    except UserError as error:
        is_flag = str(error).partition("=")[0] in FLAGS  # then it is written as on the command line
        return _report(f"--{error}" if is_flag else error)
    except KeyboardInterrupt:
        _report("interrupted")
        return 130  # the status of shells for SIGINT
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = re.search(r"allocating (\d+)", str(error))
        wanted = f" ({int(wanted[1]) / 2**30:.3g} GiB at once)" if wanted else ""
        return _report(
            f"the device has too little memory{wanted}; lower data.batch_size, data.frames, "
            "data.size or the width of the model, or raise optim.accumulate"
        )
    except OSError as error:
        if error.errno not in files.DISK_ERRORS:
            raise
        return _report(f"{_shortened(error.filename or 'disk')}: {error.strerror}")


def _shortened(path):
    """A path for a message; a name that is too long for the disk is too long for the line too."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _unraisable(trouble):
    """Hides one error: pending reads of a damaged checkpoint find asyncio's loop closed."""
    if str(trouble.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(trouble)


def _report(error) -> int:
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return 2


# Flags


class _PathParser(flags.ArgumentParser):
    """Parser of paths whose errors are UserErrors."""

    def __init__(self, name):
        self.name = name

    def parse(self, path):
        return checks.local_path(f"--{self.name}", path)

    def flag_type(self):
        return "path"


class _ConfigParser(flags.ArgumentParser):
    """Parser of --config whose errors are UserErrors, for fields that do not exist too."""

    def parse(self, path):
        """The config. ml_collections would answer an unknown --config.<field> with a traceback."""
        config = config_lib.read(path)
        fields = config_lib.flatten(config)
        for argument in sys.argv:
            match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
            if match and match[1] not in fields:
                raise UserError(_no_such_field(match[1], fields))
        return config


def _no_such_field(name: str, fields) -> str:
    inside = [field for field in fields if field.startswith(f"{name}.")]
    if inside:
        return f"--config.{name}: a section; set its fields one by one, as --config.{inside[0]}=..."
    spelling = {field: f"--config.{field}" for field in fields}
    return f"--config.{name}: no such field{config_lib.suggest(name, spelling)}"


def _parse(argv):
    """The flags_parser of absl: fills FLAGS, turns mistakes into one line."""
    try:
        rest = FLAGS(argv)
    except SystemExit:  # of --help, for which absl has the status of a failure
        sys.exit(0)
    except flags.Error as error:
        sys.exit(_report(_explain(error)))
    if FLAGS["verbosity"].using_default_value:
        FLAGS.verbosity = -1  # warnings: at info, absl's default, orbax and grain fill the screen
    return rest


def _explain(error: flags.Error) -> str:
    """The message of absl about a flag, with a remedy."""
    if isinstance(error.__context__, UserError):  # of _ConfigParser
        return str(error.__context__)
    config = FLAGS["config"].value if "config" in FLAGS else None
    fields = {f"config.{name}": value for name, value in config_lib.flatten(config or {}).items()}
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith("config."):
            return _NO_CONFIG
        spelling = {name.removeprefix("config."): f"--{name}" for name in [*FLAGS, *fields]}
        return f"--{error.flagname}: no such flag{config_lib.suggest(error.flagname, spelling)}"
    match = re.fullmatch(r"flag --([\w.]+)=(.*?): (.*)", str(error), re.DOTALL)
    if not match:
        return str(error)
    name, value, reason = match.groups()
    if value == "None":
        return f"--{name}: missing; add --{name}=..."
    if name in fields:
        reason = f"not of type {type(fields[name]).__name__}; the default is {fields[name]!r}"
    return f"--{name}={value}: {reason}"


# --config_help


def describe(argument: str) -> str:
    """The table behind --config_help: field, type, default and meaning.

    A meaning is the attribute `meaning` of the field's reference (`configs.common.field`); configs
    of users may have fields without.
    """
    config = config_lib.read(argument)
    rows, names = [("FIELD", "TYPE", "DEFAULT", "MEANING")], {}
    for name, value in config_lib.flatten(config).items():
        section, _, field = name.rpartition(".")
        reference = (config[section] if section else config).get_ref(field)
        first = names.setdefault(id(reference), name)
        meaning = vars(reference).get("meaning", "") if first == name else f"same as {first}"
        rows.append((name, type(value).__name__, repr(value), meaning))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip()
        for row in rows
    )
