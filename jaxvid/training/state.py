"""The train state: everything that a step changes, in one tree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxvid.parallel.sharding import shard_params

# Indices of the random generators that belong to no step, from the end where no step can be.
INIT, EVALUATE, SAMPLE = 2**32 - 1, 2**32 - 2, 2**32 - 3


def step_rng(seed: int, index):
    """The rng of step `index`, or of INIT, EVALUATE or SAMPLE: a function of the seed alone."""
    return jax.random.fold_in(jax.random.key(seed), index)


@flax.struct.dataclass
class TrainState:
    """step int32 [] (updates tried); skipped int32 [] (of them not finite); trees of float32.

    `ema` is {} when no average is kept. `extra` persists but is not trained by gradient.
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    extra: Any

    @property
    def weights(self):
        """The weights that are evaluated and sampled: the average, or the parameters without one.

        The arrays of `extra` are among them.
        """
        return {**(self.ema or self.params), **self.extra}


def make_init(task, tx, batch, config, mesh):
    """(init, shardings): `init()` makes the TrainState, sharded, without a copy on one device.

    `batch` gives shapes only; its values are never read.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)

    def create():
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        params, extra = task.init(step_rng(config.seed, INIT), blank)
        zero = jnp.zeros((), jnp.int32)
        ema = jax.tree.map(jnp.copy, params) if config.optim.ema else {}
        return TrainState(zero, zero, params, tx.init(params), ema, extra)

    shardings = shard_params(jax.eval_shape(create), mesh)
    return jax.jit(create, out_shardings=shardings), shardings


def placed(shapes, shardings):
    """The shapes with shardings, as restoring and compiling without arrays need them."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )
