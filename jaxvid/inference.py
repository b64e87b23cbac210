"""Making the task of a config, and opening what a run has left: its weights, its tokenizer."""

import hashlib
import importlib
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxvid import config as config_lib
from jaxvid.errors import UserError
from jaxvid.models.tokenizer import FrozenTokenizer
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import path_name, shard_params
from jaxvid.training.restore import restore_weights

TASKS = ("ar_diffusion", "tokenizer", "mqar")  # modules of jaxvid.tasks
WITHOUT_S = ("synchronous", "autoregressive")  # frame schedules that know when frames start
PIECE = 32  # frames, about, that pass through a tokenizer's stream at once
DIGEST = 16  # hexadecimal digits that name a tokenizer


class Run(NamedTuple):
    """A run as its work folder describes it; `params` are the averaged weights at `step`."""

    config: ConfigDict
    task: Any
    params: Any
    frozen: Any
    step: int
    mesh: jax.sharding.Mesh


def open_run(workdir, sampler=None):
    """The Run in a work folder, on all devices of this machine, whatever it was trained on.

    sampler: values that replace those of config.task.sampler. Reads config.json and the newest
    checkpoint, executes nothing stored and changes nothing. Weights too large for one device are
    split: the mesh is fsdp alone. Raises UserError.
    """
    config = config_lib.load(Path(workdir, "config.json"))
    if "task" not in config:
        raise UserError(f"workdir={workdir}: its config.json has no task; is it that of a run?")
    if sampler and "sampler" in config.task:
        fields = config.task.sampler
        with config.ignore_type():  # s counts iterations or, of a pyramid, parts of one
            fields.update(sampler)
        if "s" in sampler and fields.schedule in WITHOUT_S:
            raise UserError(
                f"s={fields.s:g}: schedule={fields.schedule} has no s; leave --s out, or use ad"
            )
    task = make_task(config.task)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    step, params = restore_weights(workdir, config, task, mesh)
    frozen = task.frozen()
    frozen = jax.device_put(frozen, shard_params(frozen, mesh, task.sharding_rules))
    return Run(config, task, params, frozen, step, mesh)


def make_task(fields):
    """The Task of `config.task`: class Task of the module named, built from the other fields.

    A work folder in the field `tokenizer` becomes the tokenizer in it. Its weights must be those
    that `tokenizer_digest` names; an empty one is filled in, which binds a run to its latents.
    """
    if fields.name not in TASKS:
        raise UserError(f"task.name={fields.name}: unknown; use one of {', '.join(TASKS)}")
    module = importlib.import_module(f"jaxvid.tasks.{fields.name}")
    options = {name: value for name, value in fields.items() if name != "name"}
    digest = options.pop("tokenizer_digest", "")
    workdir = options.get("tokenizer")
    if workdir == "":
        options["tokenizer"] = None
    elif isinstance(workdir, str):
        options["tokenizer"] = open_tokenizer(workdir)
        found = fields.tokenizer_digest = options["tokenizer"].digest
        if digest not in ("", found):
            raise UserError(
                f"task.tokenizer={workdir}: its weights, {found}, are not those that this run was "
                f"made with, {digest}; bring these back or train again"
            )
    try:
        inspect.signature(module.Task).bind(**options)
    except TypeError as error:
        raise UserError(
            f"task.name={fields.name}: config.task holds the fields of another task ({error}); "
            "choose the task by its own config file"
        ) from error
    return module.Task(**options)


def open_tokenizer(workdir):
    """The trained tokenizer in a work folder, frozen; UserError where it holds anything else."""
    fields, task, weights = open_weights(workdir, "tokenizer", "task.tokenizer")
    params = {name: weights[name] for name in ("network", "codebook", "latents")}
    made_of = {name: fields[name] for name in ("arch", "network", "quantizer")}
    return FrozenTokenizer(task.tokenizer, params, _digest(made_of, params))


def open_weights(workdir, kind, field):
    """(config.task, Task, weights in numpy) of a run of the task `kind`.

    Raises UserError, naming the config field that asks for it, where the folder holds none.
    """
    try:
        config = config_lib.load(Path(workdir, "config.json"))
        name = config.get("task", {}).get("name")
        if name != kind:
            raise UserError(f"holds a run of task {name!r}; name the folder of a run of {kind!r}")
        task = make_task(config.task)
        _, weights = restore_weights(workdir, config, task)
    except UserError as error:
        raise UserError(f"{field}={workdir}: {error}") from error
    return config.task, task, weights


def pieces(tokenizer, frames, about=PIECE):
    """Lengths of the pieces that a stream of so many frames is cut into, whole latents each.

    The first frame and `about` later ones, as many again and again, and what is left.
    """
    group = tokenizer.frames_for_latents(2) - 1
    later = max(about // group, 1) * group
    whole, rest = divmod(frames - 1, later)
    if not whole:
        return [frames]
    return [1 + later, *[later] * (whole - 1), *([rest] if rest else [])]


def _digest(fields, params):
    """A name for settings and weights that changes whenever they do."""
    sha256 = hashlib.sha256(json.dumps(ConfigDict(fields).to_dict(), sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(params):
        sha256.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}".encode())
        sha256.update(np.ascontiguousarray(leaf).tobytes())
    return sha256.hexdigest()[:DIGEST]
