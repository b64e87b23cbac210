"""Reading weights that others have trained: .npz and .safetensors, never a pickle."""

import hashlib
import json
import math
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxvid.errors import UserError

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path):
    """A file of named arrays -> {name: numpy array}; UserError where it is none."""
    path = Path(path)
    readers = {".npz": _npz, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise UserError(
            f"weights={path}: only .npz and .safetensors are read, for a pickle may run any code; "
            "convert the file where you trust it"
        )
    try:
        return readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"weights={path}: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, struct.error, zipfile.BadZipFile) as error:
        raise UserError(f"weights={path}: damaged, or no such file inside ({error})") from error


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
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _safetensors(path):
    """Length of a header (8 bytes), the header (JSON) and the arrays behind each other."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), entry["data_offsets"]
        count, start = math.prod(entry["shape"]), 8 + length + begin
        if begin < 0 or end - begin != count * dtype.itemsize:
            raise ValueError(f"{name} does not lie where the header says")
        arrays[name] = np.frombuffer(content, dtype, count, start).reshape(entry["shape"])
    return arrays
