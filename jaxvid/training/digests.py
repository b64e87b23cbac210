"""A digest of each array of a checkpoint, so that damage on the disk is found when it is read.

The digest of an array is a sum over its elements, mod 2^32, of a mixed function of bits and index.
The mixing is one to one, so any change of a single element changes the sum; other changes, such as
exchanged elements, pass with a probability of 2^-32. A sum of integers is the same for any
sharding, so a device adds up its own part and the digest is independent of the mesh.
"""

import functools
import json
import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.parallel.sharding import path_name

ITEM = "digests"  # its name in a checkpoint
SMALL = 2**20  # bytes of an array that the host adds up before a device could compile the sum


class DamageError(ValueError):
    """What was read is not what was saved; all processes find the same."""


def of_arrays(tree) -> dict[str, int]:
    """{path: digest} of the arrays of a tree. Large ones stay on their devices."""
    sums = {
        path_name(path): _on_host(np.asarray(leaf)) if _is_for_host(leaf) else _on_device(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def of_json(value) -> int:
    """The digest of a value that is stored as JSON."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def load(folder) -> dict | None:
    """The digests in the folder of a checkpoint; None for one of a version without them.

    Raises ValueError or OSError if they cannot be read.
    """
    if not Path(folder, ITEM).is_dir():
        return None
    found = json.loads(Path(folder, ITEM, "metadata").read_text())
    if not isinstance(found, dict) or not isinstance(found.get("state"), dict):
        raise ValueError("its digests cannot be read")
    return found


def check_arrays(tree, wanted: dict[str, int]) -> None:
    """Raise DamageError, naming an array, unless the arrays of a tree have the digests `wanted`."""
    bad = [name for name, value in of_arrays(tree).items() if wanted.get(name) != value]
    if bad:
        more = f" and {len(bad) - 1} more arrays differ" if len(bad) > 1 else " differs"
        raise DamageError(f"{bad[0]}{more} from what was saved")


def check_json(name: str, value, wanted: dict) -> None:
    """Raise DamageError unless the JSON item `name` has the digest `wanted[name]`."""
    if wanted.get(name) != of_json(value):
        raise DamageError(f"{name} differs from what was saved")


def _is_for_host(leaf):
    if isinstance(leaf, np.ndarray):
        return True
    return leaf.nbytes <= SMALL and (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _digest(x, xp):
    """The digest of an array of elements of 1, 2 or 4 bytes; uint32 []. xp: numpy or jax.numpy."""
    x = x.reshape(x.shape or 1)
    bits = x.view(xp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(xp.uint32)
    index = xp.zeros((), xp.uint32)
    for axis, size in enumerate(x.shape):  # not one reshaped range, which would not be sharded
        after = x.shape[axis + 1 :]
        stride = xp.uint32(math.prod(after) % 2**32)
        index = index + (xp.arange(size, dtype=xp.uint32) * stride).reshape(-1, *[1] * len(after))
    mixed = bits + index * xp.uint32(0x9E3779B9)  # then the finalizer of MurmurHash3
    mixed = (mixed ^ (mixed >> 16)) * xp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * xp.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> 16)).sum(dtype=xp.uint32)


_on_device = jax.jit(functools.partial(_digest, xp=jnp))
_on_host = functools.partial(_digest, xp=np)
