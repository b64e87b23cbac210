"""The file of weights in a folder that `tools.export` wrote: safetensors with a digest."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxvid import files
from jaxvid.errors import UserError
from jaxvid.parallel.sharding import path_name, shard_params

FILE, TOKENIZER = "weights.safetensors", "tokenizer"


def write(folder: str | Path, step: int, weights) -> int:
    """Write the weights of a run, a tree of arrays, with their step; the size in bytes."""
    arrays = {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(weights)}
    content = save(arrays, {"step": str(step), "sha256": _digest(arrays)})
    files.write(Path(folder, FILE), content)
    return len(content)


def read(folder: str | Path, shapes, mesh=None):
    """(step, weights) as a tree like `shapes`, on a mesh or in numpy.

    Raises UserError for a damaged file and for the weights of another network.
    """
    path = Path(folder, FILE)
    try:
        with safe_open(path, framework="np") as file:
            arrays, found = file.get_tensors(), file.metadata() or {}
        step = int(found["step"])
        if found["sha256"] != _digest(arrays):
            raise ValueError("its digest is another one")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"workdir={folder}: {FILE} is damaged ({error}); export again") from error
    wanted = {path_name(place): x for place, x in jax.tree.leaves_with_path(shapes)}
    for name, x in wanted.items():
        have = arrays.get(name)
        if have is None or (have.shape, have.dtype) != (x.shape, x.dtype):
            raise UserError(f"workdir={folder}: {FILE} does not fit its config.json at {name}")
    weights = jax.tree.map_with_path(lambda place, _: arrays[path_name(place)], shapes)
    return step, weights if mesh is None else jax.device_put(weights, shard_params(weights, mesh))


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and contents."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        sha256.update(f"{name} {x.dtype} {x.shape}\n".encode())
        sha256.update(x.tobytes())
    return sha256.hexdigest()
