"""The trained weights of a run without its optimiser, for evaluation and sampling."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxvid.data import batch_shapes
from jaxvid.errors import UserError
from jaxvid.parallel.sharding import path_name, shard_params
from jaxvid.training import digests
from jaxvid.training.log import say

UNVERIFIED = "is of a version without digests: damage on the disk would not be noticed"


def restore_weights(workdir, config, task, mesh=None):
    """(step, weights) of the newest complete checkpoint, in the form of `TrainState.weights`.

    On any mesh; without one, numpy arrays. Reads nothing else and changes nothing, so the run may
    continue meanwhile. Raises UserError if there is no checkpoint or it is not of this model.
    """
    folder = os.path.join(os.path.abspath(workdir), "ckpt")
    steps = ocp.utils.checkpoint_steps(folder) if os.path.isdir(folder) else []
    if not steps:
        raise UserError(f"workdir={workdir}: there is no checkpoint yet; train first")
    step = max(steps)

    def init(batch):
        return task.init(jax.random.key(0), jax.tree.map(jnp.zeros_like, batch))

    part = "ema" if config.optim.ema else "params"
    params, extra = jax.eval_shape(init, batch_shapes(config.data, 1))
    shapes = {part: params, "extra": extra} if extra else {part: params}
    wanted, how = _wanted(shapes, mesh)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(
                os.path.join(folder, str(step), "state"),
                args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True),
            )
            _check_shapes(found, wanted)
        sums = digests.load(os.path.join(folder, str(step)))
        if sums is None:
            say(f"{workdir}: checkpoint {step} {UNVERIFIED}")
        else:
            digests.check_arrays(found, sums["state"])
    except Exception as error:  # orbax raises many kinds, tensorstore's among them
        raise UserError(
            f"workdir={workdir}: checkpoint {step} does not fit its config or is damaged "
            f"({reason(error)}); bring back its config.json, or {remedy(folder, steps)}"
        ) from error
    return step, {**found[part], **found.get("extra", {})}


def reason(error):
    """The error of orbax or tensorstore about a checkpoint, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return "a description in it is cut short or no JSON"
    text = str(error.args[0] if isinstance(error, KeyError) else error).strip()
    if re.match(r"[A-Z_]+: ", text):  # tensorstore's, with all its drivers and source files
        return "arrays in it cannot be read"
    sentence = next(iter(text.splitlines()), type(error).__name__).partition(". ")[0]
    return sentence if len(sentence) <= 200 else f"{sentence[:200]}..."


def remedy(folder, steps):
    """The remedy for a bad newest checkpoint among `steps` in a folder."""
    *before, last = sorted(steps)
    after = f"go on from step {before[-1]}" if before else "start again"
    return f"delete {os.path.join(folder, str(last))} to {after}"


def _check_shapes(found, wanted):
    for (path, have), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted)):
        if have.shape != want.shape:
            raise ValueError(f"{path_name(path)} has shape {have.shape}, not {want.shape}")


def _wanted(shapes, mesh):
    """(shapes with shardings, orbax's arguments for restoring them)."""
    if mesh is None:
        whole = ocp.RestoreArgs(restore_type=np.ndarray)
        return shapes, jax.tree.map(lambda _: whole, shapes)
    wanted = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        shard_params(shapes, mesh),
    )
    return wanted, ocp.checkpoint_utils.construct_restore_args(wanted)
