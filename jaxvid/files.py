"""Atomic writing of files, and JSON from anywhere."""

import errno
import json
import math
import os
from pathlib import Path

# Errors that the user can correct outside the program.
DISK_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EDQUOT, errno.ENOSPC, errno.EFBIG, errno.EIO),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
)

MAX_DEPTH = 64  # of lists and objects within each other


def parse_json(text: str | bytes):
    """The value of a text in JSON, which may be hostile: strict numbers, keys once, MAX_DEPTH.

    Raises ValueError for everything else, in one line.
    """
    try:
        value = json.loads(
            text,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _finite(text):
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def write(path: str | Path, content: str | bytes):
    """Write content to a file, replacing the file that is there.

    A reader finds the old content or the new one and never a part, even after a crash or on a full
    disk. Raises OSError.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
