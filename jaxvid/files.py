"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write(path, content):
    """Write str or bytes to a file, in the place of one that is there.

    A reader, or whoever comes after a crash or a full disk, finds the old content or the new one
    and never a part. Raises OSError.
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
