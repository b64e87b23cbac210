"""Scores and samples of the averaged weights, the same clips and noise each time."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.data.transforms import to_uint8
from jaxvid.parallel.multihost import to_global
from jaxvid.parallel.sharding import batch_sharding, replicated
from jaxvid.training.state import EVALUATE, SAMPLE, stream


def make_evaluate(task, config, mesh, held_out):
    """Function (weights, frozen) -> {metric: mean over the same held-out batches every time}."""
    score = jax.jit(task.evaluate, out_shardings=replicated(mesh))
    first = held_out.get_state()

    def evaluate(weights, frozen):
        held_out.set_state(first)
        found = []
        for index in range(config.evaluate.batches):
            batch = to_global(next(held_out), batch_sharding(mesh))
            rng = jax.random.fold_in(stream(config.seed, EVALUATE), index)
            found.append(jax.device_get(score(weights, batch, rng, frozen=frozen)))
        return {name: _mean([scores[name] for scores in found]) for name in found[0]}

    return evaluate


def make_sample(task, config, mesh, held_out):
    """Function (weights, frozen) -> uint8 clips [num, T, H, W, 3], from the same noise every time.

    Conditions are those of the first held-out clips.
    """
    first = held_out.get_state()

    def clips(weights, frozen, batch):
        rows = jnp.arange(config.sample.num) % config.data.batch_size
        cond = {name: batch[name][rows] for name in ("label", "text") if name in batch}
        cond["num"] = config.sample.num
        return to_uint8(task.sample(weights, stream(config.seed, SAMPLE), cond, frozen=frozen))

    clips = jax.jit(clips, out_shardings=replicated(mesh))

    def sample(weights, frozen):
        held_out.set_state(first)
        batch = to_global(next(held_out), batch_sharding(mesh))
        return np.asarray(clips(weights, frozen, batch))

    return sample


def _mean(arrays):
    """Mean of what is defined, over batches, clips and frames."""
    values = np.concatenate([np.ravel(array) for array in arrays])
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
