"""Atomic writing of files."""

import errno
import os
from pathlib import Path

# Errors that the user can correct outside the program.
DISK_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EDQUOT, errno.ENOSPC, errno.EFBIG, errno.EIO),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


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
