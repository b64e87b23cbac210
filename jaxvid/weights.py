"""Reading weight files: .npz and .safetensors, never a pickle."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401, registers bfloat16 with numpy
import numpy as np
from safetensors import safe_open

from jaxvid.errors import UserError

MAX_INFLATED, RATIO = 2**30, 4  # a .npz may fill this many bytes, or times its own size


def read(path: str | Path, field: str = "weights") -> dict[str, np.ndarray]:
    """A file of named arrays -> {name: array}; UserError, naming `field`, for any other file."""
    path = Path(path)
    readers = {".npz": _npz, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise UserError(
            f"{field}={path}: only .npz and .safetensors are read, as a pickle may run any code; "
            "convert a file that you trust"
        )
    try:
        return _numbers(readers[path.suffix](path))
    except OSError as error:
        raise UserError(f"{field}={path}: {error.strerror or error}") from error
    except Exception as error:  # a broken file may raise anything
        raise UserError(f"{field}={path}: damaged, or not {path.suffix} ({error})") from error


def digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take(
    arrays: dict[str, np.ndarray], name: str, shape: Sequence[int], path: str = "weights"
) -> np.ndarray:
    """The array called `name` as float32; UserError if it is missing or has another shape."""
    if name not in arrays:
        raise UserError(f"{path}: holds no {name!r}; is it of another network?")
    actual, shape = arrays[name].shape, tuple(shape)
    if actual != shape:
        raise UserError(f"{path}: {name!r} has shape {actual}, not {shape}")
    return np.asarray(arrays[name], np.float32)


def _npz(path):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            size = sum(member.file_size for member in file.infolist())
        if size > max(MAX_INFLATED, RATIO * path.stat().st_size):
            raise ValueError(f"would fill {size / 2**30:.1f} GiB; weights hardly compress")
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("one array without a name; save it with numpy.savez")
    with loaded as file:
        return dict(file)


def _safetensors(path):
    with safe_open(path, framework="np") as file:
        return file.get_tensors()


def _numbers(arrays):
    for name, array in arrays.items():
        # numpy returns .npz members that are not arrays as bytes, and ml_dtypes as raw bits.
        if not isinstance(array, np.ndarray) or array.dtype.type in (np.void, np.str_, np.bytes_):
            raise ValueError(f"{name!r} is not an array of numbers")
    return arrays
