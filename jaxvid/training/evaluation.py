"""Scores and samples on held-out clips."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.data.transforms import to_uint8
from jaxvid.parallel.multihost import to_global
from jaxvid.parallel.sharding import batch_sharding, replicated
from jaxvid.training.state import EVALUATE, SAMPLE, stream


class HeldOut:
    """Scores and samples of a task: the same clips and the same noise every time.

    `iterator` yields this host's rows of the held-out batches; it is read from where it stands.
    """

    def __init__(self, task, config, mesh, iterator):
        self.config, self.iterator, self.start = config, iterator, iterator.get_state()
        self.rows = batch_sharding(mesh)
        self.score = jax.jit(task.evaluate, out_shardings=replicated(mesh))

        def clips(weights, frozen, batch):
            rows = jnp.arange(config.sample.num) % config.data.batch_size
            cond = {name: batch[name][rows] for name in ("label", "text", "video") if name in batch}
            cond["num"] = config.sample.num
            return to_uint8(task.sample(weights, stream(config.seed, SAMPLE), cond, frozen=frozen))

        self.clips = jax.jit(clips, out_shardings=replicated(mesh))

    def trace(self, weights, frozen, batch):
        """Names of the metrics. Nothing runs: bad settings show now, not at the first evaluation.

        Arrays or shapes.
        """
        jax.eval_shape(self.clips, weights, frozen, batch)
        return list(jax.eval_shape(self.score, weights, batch, jax.random.key(0), frozen=frozen))

    def evaluate(self, weights, frozen):
        """{metric: mean over config.evaluate.batches}."""
        self.iterator.set_state(self.start)
        found = []
        for index in range(self.config.evaluate.batches):
            batch = to_global(next(self.iterator), self.rows)
            rng = jax.random.fold_in(stream(self.config.seed, EVALUATE), index)
            found.append(jax.device_get(self.score(weights, batch, rng, frozen=frozen)))
        return {name: _mean([scores[name] for scores in found]) for name in found[0]}

    def sample(self, weights, frozen):
        """uint8 clips [num, T, H, W, 3], under the conditions of the first held-out clips."""
        self.iterator.set_state(self.start)
        batch = to_global(next(self.iterator), self.rows)
        return np.asarray(self.clips(weights, frozen, batch))


def _mean(arrays):
    """Mean of what is defined, over batches, clips and frames."""
    values = np.concatenate([np.ravel(array) for array in arrays])
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
