"""Opening a finished (or running) run, for the entry points that use its weights."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxvid import config as config_lib
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import shard_params
from jaxvid.train import make_task
from jaxvid.training.restore import restore_weights


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
    if sampler:
        config.task.sampler.update(sampler)
    task = make_task(config.task)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    step, params = restore_weights(workdir, config, task, mesh)
    frozen = task.frozen()
    frozen = jax.device_put(frozen, shard_params(frozen, mesh, task.sharding_rules))
    return Run(config, task, params, frozen, step, mesh)
