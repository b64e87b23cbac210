"""A work folder, opened: the task of its config, its weights, its tokenizer."""

import hashlib
import inspect
import json
import re
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxvid import checks, modules, schema
from jaxvid import config as config_lib
from jaxvid.errors import UserError, within
from jaxvid.models.tokenizer import FrozenTokenizer
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import path_name, shard_params
from jaxvid.tasks.base import Run, Task
from jaxvid.training import exported
from jaxvid.training.restore import restore_weights

WITHOUT_S = ("synchronous", "autoregressive")  # frame schedules that know when frames start
DIGEST = 16  # hexadecimal digits that name a tokenizer


def open_run(workdir, sampler: dict | None = None) -> Run:
    """The Run in a work folder, on all devices of this machine, whatever it was trained on.

    sampler: values that replace those of config.task.sampler. Reads config.json and the newest
    checkpoint, executes nothing stored and changes nothing. Weights too large for one device are
    split: the mesh is fsdp alone. Raises UserError.
    """
    workdir = checks.local_path("workdir", workdir)
    config = _load_config(workdir)
    if sampler and "sampler" in config.task:
        _set_sampler(config, sampler)
    task = make_task(config.task)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    step, params = restore_weights(workdir, config, task, mesh)
    with within("task"):
        frozen = task.frozen()
    frozen = jax.device_put(frozen, shard_params(frozen, mesh))
    return Run(config, task, params, frozen, step, mesh)


def with_sampler(run: Run, sampler: dict) -> Run:
    """The run with these values of config.task.sampler. Raises UserError."""
    config = ConfigDict(run.config.to_dict())
    _set_sampler(config, sampler)
    return run._replace(config=config, task=make_task(config.task))


def _set_sampler(config, sampler):
    fields = config.task.sampler
    schema.check("task.sampler", {**fields}, {"schedule": str, schema.OPEN: None})
    for name, value in sampler.items():
        if name not in fields:
            raise UserError(f"{name}={value}: samplers of this run have none; leave it out")
    with config.ignore_type():  # s counts iterations, or parts of one for a pyramid
        fields.update(sampler)
    if "s" in sampler and fields.schedule in WITHOUT_S:
        raise UserError(
            f"s={fields.s:g}: schedule={fields.schedule} has no s; leave --s out, or use ad"
        )


def _load_config(workdir):
    """The config of a run. Raises UserError for one that no run has."""
    path = Path(workdir, "config.json")
    config = config_lib.load(path)
    try:
        config_lib.validate(config)
    except UserError as error:
        raise UserError(f"config={path}: {error}") from error
    if config.task.get("tokenizer") and Path(workdir, exported.FILE).is_file():
        config.task.tokenizer = str(Path(workdir, exported.TOKENIZER))  # in an export, beside it
    return config


def make_task(fields: ConfigDict, tokenizer=None) -> Task:
    """The Task of `config.task`: class Task of the module jaxvid.tasks.<name>, with its tokenizer.

    tokenizer: in the place of the one that the field names, unless it is None. A work folder in the
    field `tokenizer` is opened. Its weights must be those that `tokenizer_digest` names, unless
    that is empty. Raises UserError.
    """
    if tokenizer:
        fields = ConfigDict({**fields, "tokenizer": tokenizer})
    try:
        return _make_task(fields)
    except UserError as error:
        # These two follow the data, where the user sets them.
        follows = re.sub(r"^task\.(size|frames)=", r"data.\1=", str(error))
        raise UserError(follows) from error


def _make_task(fields):
    options = {name: value for name, value in fields.items() if name != "name"}
    with within("task"):
        make = modules.find("jaxvid.tasks", fields.get("name"), Task)
        digest = options.pop("tokenizer_digest", "")
        workdir = options.get("tokenizer")
        if workdir == "":
            options["tokenizer"] = None
        elif isinstance(workdir, str):
            options["tokenizer"] = open_tokenizer(workdir)
            found = options["tokenizer"].digest
            if digest not in ("", found):
                raise UserError(
                    f"tokenizer={workdir}: its weights are {found}, but this run was made with "
                    f"{digest}; restore these or train again"
                )
        try:
            inspect.signature(make).bind(**options)
        except TypeError as error:
            raise UserError(
                f"name={fields.name}: config.task holds the fields of another task ({error}); "
                "choose the task by its own config file"
            ) from error
        return schema.build(make, options)


def open_tokenizer(workdir, field: str = "tokenizer") -> FrozenTokenizer:
    """The trained tokenizer in a work folder, frozen; UserError if it holds anything else."""
    fields, task, weights = open_weights(workdir, "tokenizer", field)
    params = {name: weights[name] for name in ("network", "codebook", "latents")}
    made_of = {name: fields[name] for name in ("arch", "network", "quantizer")}
    return FrozenTokenizer(task.tokenizer, params, weights_digest(made_of, params))


def open_weights(workdir, kind: str, field: str):
    """(config.task, Task, weights in numpy) of a run of the task `kind`.

    Raises UserError, naming the config field that asks for it, if the folder holds no such run.
    """
    workdir = checks.local_path(field, workdir)
    try:
        config = _load_config(workdir)
        name = config.task.name
        if name != kind:
            raise UserError(f"holds a run of task {name!r}; name the folder of a run of {kind!r}")
        task = make_task(config.task)
        _, weights = restore_weights(workdir, config, task)
    except UserError as error:
        raise UserError(f"{field}={workdir}: {error}") from error
    return config.task, task, weights


def weights_digest(fields, params) -> str:
    """A name for settings and weights that changes whenever they do."""
    sha256 = hashlib.sha256(json.dumps(ConfigDict(fields).to_dict(), sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(params):
        sha256.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}".encode())
        sha256.update(np.ascontiguousarray(leaf).tobytes())
    return sha256.hexdigest()[:DIGEST]
