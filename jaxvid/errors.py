"""The one exception that means "the user can fix this"."""

import contextlib
import os


class UserError(ValueError):
    """Bad input. The message is one line: "field=value: what is wrong; the remedy".

    Whatever it quotes, it is printable: see `printable`. The field is named as the code that raises
    it knows it. Each caller that holds a larger section of the config adds its own name with
    `within`. Entry points print the line without a traceback and exit with status 2.
    """

    def __init__(self, message: str):
        super().__init__(printable(" ".join(message.split())))


@contextlib.contextmanager
def within(section):
    """Prefix the field that a UserError names: "s=9: ..." becomes "task.sampler.s=9: ..."."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{section}.{error}") from error


def shown(value) -> str:
    """The repr of a value for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}..."


def printable(text: str) -> str:
    """Foreign text, such as the name of a file, for a terminal, in one line.

    Characters that do not print become escapes: control codes, line ends, marks that reorder a
    line, and the bytes of names that are not UTF-8.
    """
    with contextlib.suppress(UnicodeEncodeError):  # of a surrogate that is no byte of a name
        text = os.fsencode(text).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
