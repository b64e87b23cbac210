"""The memory of this machine, and the refusal of what cannot fit before it is allocated."""

import contextlib
import os
from pathlib import Path

from jaxvid.errors import UserError

_LIMITS = (  # of the control group, in versions 2 and 1
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def host_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or fewer by its control group."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max" for no limit
            found.append(int(Path(path).read_text()))
    return min(found)


def device_bytes(device, sharing: int) -> int:
    """Bytes of memory of a jax device. `sharing` devices without memory of their own share ours."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or host_bytes() // sharing


def require(
    fields: str, what: str, needed: int, there: int | None = None, remedy: str = "lower them"
) -> None:
    """Raise UserError unless `needed` bytes fit into `there` bytes, by default the host's.

    fields: "name=value, name=value" of the fields that decide. what: takes the memory, in a plural.
    """
    there = host_bytes() if there is None else there
    if needed > there:
        raise UserError(
            f"{fields}: {what} take about {needed / 2**30:.3g} GiB of memory, and there are "
            f"{there / 2**30:.3g}; {remedy}"
        )
