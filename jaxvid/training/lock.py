"""A lock of a work folder: two runs would overwrite each other's files."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxvid.errors import UserError
from jaxvid.parallel import multihost

NAME = "lock"


@contextlib.contextmanager
def locked(folder, field: str = "workdir") -> Iterator[None]:
    """A context in which no other run may use the folder that `field` names.

    Raises UserError, on all processes.

    The lock is one of the system on the file `lock`, which ends with its process, so a file that a
    killed run left locks nothing. Process 0 holds it and writes its host and process id into it.
    File systems that cannot lock, or lock within a host alone, protect no more than that.
    """
    path = Path(folder, NAME)
    file = _take(path) if jax.process_index() == 0 else None
    (is_free,) = multihost.agreed(file is not None)
    if not is_free:
        raise UserError(
            f"{field}={folder}: is in use by {_owner(path)}; wait for it, stop it, or choose "
            f"another --{field}"
        )
    try:
        yield
    finally:
        if file:
            path.unlink(missing_ok=True)
            file.close()


def _take(path):
    """The locked file, or None if another process holds it."""
    while True:
        # Not flock: loaders that are forked would inherit it and outlive the run.
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        if _is_at(file, path):
            break
        file.close()  # its owner removed it between the two lines above
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
    file.flush()
    return file


def _is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(path):
    try:
        found = json.loads(path.read_text())
        return f"process {found['process']} on {found['host']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process"
