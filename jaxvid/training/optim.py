"""The optimiser: AdamW with warm-up, a schedule, clipping, and decay on matrices only."""

import jax
import optax

from jaxvid.errors import UserError
from jaxvid.parallel.sharding import path_name

SCHEDULES = ("constant", "cosine")


def make_optimizer(config, steps):
    """(optax transformation, learning-rate schedule) of `config.optim` for a run of `steps`.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) after clipping by global norm (0 = none).
    Raises UserError on values that cannot train.
    """
    _check(config)
    schedule = make_schedule(config, steps)
    tx = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed
    )
    if config.clip:
        tx = optax.chain(optax.clip_by_global_norm(config.clip), tx)
    return tx, schedule


def make_schedule(config, steps):
    """Linear warm-up to lr over `warmup` steps, then constant, or half a cosine down to zero."""
    after = optax.constant_schedule(config.lr)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, max(steps - config.warmup, 1))
    if not config.warmup:
        return after
    # The first update already moves: lr / warmup, not zero.
    rise = optax.linear_schedule(config.lr / config.warmup, config.lr, config.warmup - 1)
    return optax.join_schedules([rise, after], [config.warmup - 1])


def decayed(params):
    """Tree of bool: True where weight decay acts, i.e. not on biases and norm scales.

    Told by name and by rank: a stack of layers makes matrices of its vectors.
    """

    def is_decayed(path, leaf):
        return leaf.ndim >= 2 and path_name(path).rsplit("/", 1)[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _check(config):
    if config.schedule not in SCHEDULES:
        raise UserError(
            f"optim.schedule={config.schedule}: unknown; use one of {', '.join(SCHEDULES)}"
        )
    if config.lr <= 0:
        raise UserError(f"optim.lr={config.lr}: the learning rate must be positive")
    for field in ("b1", "b2", "ema"):
        if not 0 <= config[field] < 1:
            raise UserError(f"optim.{field}={config[field]}: must be at least 0 and less than 1")
