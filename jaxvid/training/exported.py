"""The file of weights in a folder that `tools.export` wrote: safetensors with a digest."""

import hashlib
import json
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


def write(folder: str | Path, step: int, weights, config: str) -> int:
    """Write the weights of a run, a tree of arrays, with step and config (JSON); the bytes."""
    arrays = {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(weights)}
    about = {"step": str(step), "config": config}
    content = save(arrays, {**about, "sha256": _digest(arrays, about)})
    files.write(Path(folder, FILE), content)
    return len(content)


def read(folder: str | Path, shapes, mesh=None):
    """(step, weights, the config that was written) with a tree like `shapes`, on a mesh or numpy.

    Raises UserError for a damaged file and for the weights of another network.
    """
    path = Path(folder, FILE)
    try:
        with safe_open(path, framework="np") as file:
            arrays, found = file.get_tensors(), file.metadata() or {}
        about = {name: found[name] for name in ("step", "config")}
        if found["sha256"] != _digest(arrays, about):
            raise ValueError("its digest is another one")
        step, config = int(about["step"]), files.parse_json(about["config"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"workdir={folder}: {FILE} is damaged ({error}); export again") from error
    wanted = {path_name(place): x for place, x in jax.tree.leaves_with_path(shapes)}
    for name, x in wanted.items():
        have = arrays.get(name)
        if have is None or (have.shape, have.dtype) != (x.shape, x.dtype):
            raise UserError(f"workdir={folder}: {FILE} does not fit its config.json at {name}")
    weights = jax.tree.map_with_path(lambda place, _: arrays[path_name(place)], shapes)
    if mesh is not None:
        weights = jax.device_put(weights, shard_params(weights, mesh))
    return step, weights, config


def _digest(arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> str:
    """SHA-256 of what is said about the arrays, and of their names, types, shapes and contents."""
    sha256 = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        sha256.update(f"{name} {x.dtype} {x.shape}\n".encode())
        sha256.update(x.tobytes())
    return sha256.hexdigest()
