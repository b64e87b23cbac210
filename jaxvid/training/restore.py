"""The trained weights of a run without its optimiser, for evaluation and sampling."""

import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from jaxvid import config as config_lib
from jaxvid import files
from jaxvid.data import batch_shapes
from jaxvid.errors import UserError
from jaxvid.parallel.sharding import path_name, shard_params
from jaxvid.training import digests, exported
from jaxvid.training.log import say

# Sections and fields that may differ when a run is resumed: they do not change what is learned,
# except `steps`, which stretches a cosine schedule.
FREE = (
    "steps",
    "mesh",
    "checkpoint",
    "log",
    "evaluate",
    "sample",
    "compile_cache",
    "data.workers",
    "data.threads",
    "data.text_path",  # may move, or grow; its encoder's digest may not change
    "task.sampler",
    "task.given",
    "task.tokenizer",  # may move; its digest may not
    "optim.skip_nonfinite",
)

PATHS = ("data.path", "init_from")  # these may be spelled differently

UNVERIFIED = "is of a version without digests: damage on the disk would not be noticed"


def is_free(field: str) -> bool:
    """Whether a field, by its dotted name, is one of FREE or in such a section."""
    return any(field == free or field.startswith(f"{free}.") for free in FREE)


def restore_weights(workdir, config, task, mesh=None):
    """(step, weights) of the newest good checkpoint, in the form of `TrainState.weights`.

    On any mesh; without one, numpy arrays. Changes nothing, so the run may continue meanwhile. A
    damaged checkpoint is passed over, with a line on stderr. A folder of `tools.export` has a file
    of weights instead. Raises UserError if there is no checkpoint, if none is good, and if they
    were made with another config, FREE and PATHS aside.
    """
    folder = os.path.join(os.path.abspath(workdir), "ckpt")
    steps = ocp.utils.checkpoint_steps(folder) if os.path.isdir(folder) else []
    is_export = not steps and os.path.isfile(os.path.join(workdir, exported.FILE))
    if not steps and not is_export:
        raise UserError(f"workdir={workdir}: there is no checkpoint yet; train first")

    def init(batch):
        return task.init(jax.random.key(0), jax.tree.map(jnp.zeros_like, batch))

    part = "ema" if config.optim.ema else "params"
    params, extra = jax.eval_shape(init, batch_shapes(config.data, 1))
    if is_export:
        step, weights, saved = exported.read(workdir, {**params, **extra}, mesh)
        if changed := _changed(saved, config):
            raise UserError(f"workdir={workdir}: config.json differs in {changed}; export again")
        return step, weights
    shapes = {part: params, "extra": extra} if extra else {part: params}
    bad = {}
    for step in sorted(steps, reverse=True):
        try:
            found = _read(os.path.join(folder, str(step)), config, shapes, mesh)
        except Exception as error:  # orbax raises many kinds, tensorstore's among them
            bad[step] = error
            continue
        for other, error in bad.items():
            line = f"checkpoint {other} is damaged ({reason(error)}); reading step {step}"
            print(f"{workdir}: {line}", file=sys.stderr)
        if digests.load(os.path.join(folder, str(step))) is None:
            say(f"{workdir}: checkpoint {step} {UNVERIFIED}")
        return step, {**found[part], **found.get("extra", {})}
    newest, error = max(bad.items())
    raise UserError(
        f"workdir={workdir}: checkpoint {newest} does not fit its config or is damaged "
        f"({reason(error)}); bring back its config.json, or {remedy(folder, steps)}"
    ) from error


def _read(folder, config, shapes, mesh):
    """Arrays of a checkpoint. Raises one of many errors if they or the config are not as saved."""
    sums = digests.load(folder)
    _check_config(folder, config, sums)
    wanted, how = _wanted(shapes, mesh)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(
            os.path.join(folder, "state"),
            args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True),
        )
    _check_shapes(found, wanted)
    if sums is not None:
        digests.check_arrays(found, sums["state"])
    return found


def _check_config(folder, config, sums):
    """Raise ValueError unless a checkpoint was made with this config, in all that must not differ.

    sums: its digests, None in one of a version without them.
    """
    saved = files.parse_json(Path(folder, "config", "metadata").read_bytes())
    if sums is not None:
        digests.check_json("config", saved, sums)
    if changed := _changed(saved, config):
        raise ValueError(f"config.json differs in {changed}")


def _changed(saved, config):
    """What differs from a saved config that must not, in words; "" if nothing does."""
    changed = [
        f"{field}: {old!r} -> {new!r}"
        for field, old, new in config_lib.differences(ConfigDict(config_lib.as_now(saved)), config)
        if not is_free(field) and field not in PATHS
        if field != "data.fps" or old is not None  # a run of an earlier version that goes on
    ]
    return "; ".join(changed)[:150]


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
