"""Checks of single values. Each raises UserError, one line with the field, its value and a remedy.

A check stands beside the field that it bounds. `field` is the name that the field has there;
`errors.within` adds the sections of the config around it.
"""

import math
import os
import re
import sys
import tempfile
from pathlib import Path

from jaxvid.errors import UserError, shown


def require(holds, field, value, remedy):
    """Raise UserError with `remedy` unless `holds`. For rules that no other check states."""
    if not holds:
        raise UserError(f"{field}={shown(value)}: {remedy}")


def local_path(field, value):
    """The path `value`, with ~ expanded; it must be one of the file systems of this machine."""
    remote = "is not a folder of a file system, and others are not supported yet; name one here"
    require(not re.match(r"\w[\w+.-]+://", str(value)), field, str(value), remote)
    no_nul(field, str(value))
    return os.path.expanduser(value)


def no_nul(field, value):
    """`value` must be a string that can be a path."""
    require("\0" not in value, field, value, "holds the character NUL; take it out")


def choose(field, value, choices):
    """`value` must be one of `choices`."""
    choices = list(choices)  # whose members need no hash
    require(value in choices, field, value, f"unknown; use one of {', '.join(map(str, choices))}")


def finite(field, value):
    """`value` must be neither infinite nor NaN, nor a whole number beyond every float."""
    require(abs(value) <= sys.float_info.max, field, value, "must be a finite number")


def at_least(field, value, low, at_most=math.inf):
    """`value` must be finite and lie in [low, at_most]."""
    finite(field, value)
    require(value >= low, field, value, f"must be at least {low}")
    require(value <= at_most, field, value, f"must be at most {at_most}")


def positive(field, value):
    """`value` must be finite and more than 0."""
    finite(field, value)
    require(value > 0, field, value, "must be more than 0")


def between(field, value, low, high):
    """`value` must lie in [low, high]."""
    require(low <= value <= high, field, value, f"must lie between {low} and {high}")


def below(field, value, low, high):
    """`value` must lie in [low, high), as decays and shares do."""
    require(low <= value < high, field, value, f"must be at least {low} and less than {high}")


def divides(field, value, whole, of):
    """`value` must divide `whole`, which is called `of`."""
    message = f"does not divide {of}={whole}; use a divisor of {whole}"
    require(value >= 1 and whole % value == 0, field, value, message)


def whole_numbers(field, values, low=1):
    """`values` must be whole numbers of `low` or more. A sequence from the command line may hold
    anything."""
    for value in values:
        is_whole = type(value) is int and value >= low
        require(is_whole, field, values, f"{value!r} is not a whole number of at least {low}")


def writable(field: str, folder: str | Path):
    """Make a folder; UserError, naming the field, unless a file can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"room to write")
    except OSError as error:
        raise UserError(
            f"{field}={folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error
