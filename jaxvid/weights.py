"""Reading weights that others have trained: .npz and .safetensors, never a pickle."""

import hashlib
from pathlib import Path

import ml_dtypes  # noqa: F401, by which numpy knows bfloat16
import numpy as np
from safetensors import safe_open

from jaxvid.errors import UserError


def read(path, field="weights"):
    """A file of named arrays -> {name: numpy array}; UserError, naming the field, if it is none."""
    path = Path(path)
    readers = {".npz": _npz, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise UserError(
            f"{field}={path}: only .npz and .safetensors are read, for a pickle may run any code; "
            "convert the file where you trust it"
        )
    try:
        return _numbers(readers[path.suffix](path))
    except OSError as error:
        raise UserError(f"{field}={path}: {error.strerror or error}") from error
    except Exception as error:  # what others have made may be broken in any way
        raise UserError(f"{field}={path}: damaged, or no such file inside ({error})") from error


def digest(path):
    """SHA-256 of a file, hexadecimal: what a score was measured with."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take(arrays, name, shape, path="weights"):
    """The array called `name` as float32; UserError where it is missing or of another shape."""
    if name not in arrays:
        raise UserError(f"{path}: holds no {name!r}; is it of another network?")
    if arrays[name].shape != tuple(shape):
        found = arrays[name].shape
        raise UserError(f"{path}: {name!r} has shape {found}, not {tuple(shape)}")
    return np.asarray(arrays[name], np.float32)


def _npz(path):
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise ValueError("one array without a name; save it by numpy.savez")
    with found as file:
        return dict(file)


def _safetensors(path):
    with safe_open(path, framework="np") as file:
        return file.get_tensors()


def _numbers(arrays):
    for name, array in arrays.items():
        # A member of a .npz that is no array comes as bytes; of ml_dtypes .npz keeps but the bits.
        if not isinstance(array, np.ndarray) or array.dtype.type in (np.void, np.str_, np.bytes_):
            raise ValueError(f"{name!r} is no array of numbers")
    return arrays
