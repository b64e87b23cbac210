"""The optimiser: AdamW or Muon with warm-up, a schedule, clipping, and decay on matrices only."""

import math
import re

import jax
import optax
from ml_collections import ConfigDict
from optax import contrib

from jaxvid.errors import UserError
from jaxvid.parallel.sharding import path_name

NAMES = ("adamw", "muon")
GROUPS = ("discriminator",)  # branches of the parameters that may have an optimiser of their own
SCHEDULES = ("constant", "cosine")

# The matrices inside of transformer layers, which Muon is made for, alone or in stacks of layers.
_HIDDEN = re.compile(r"/(q|k|v|out|up|gate|down)/kernel$")


def make_optimizer(config, steps):
    """(optax transformation, learning-rate schedule) of `config.optim` for a run of `steps`.

    After clipping by global norm (0 = none), adamw (Loshchilov & Hutter 2019, arXiv:1711.05101) or
    muon: orthogonalised momentum (Jordan 2024) at `muon_lr` for the matrices of attention and MLPs,
    and AdamW with Nesterov momentum at `lr` for the rest. A section of `config` called as one of
    GROUPS replaces fields for that branch of the parameters, which is clipped and updated apart.
    Raises UserError on values that cannot train.
    """
    schedule = make_schedule(config, steps)
    groups = {name: {**config, **config[name]} for name in GROUPS if name in config}
    if not groups:
        return _transformation(config, schedule), schedule
    parts = {"": _transformation(config, schedule)}
    for name, fields in groups.items():
        fields = ConfigDict(fields)
        parts[name] = _transformation(fields, make_schedule(fields, steps))

    def labels(params):
        return {
            name: jax.tree.map(lambda _, name=name: name if name in groups else "", branch)
            for name, branch in params.items()
        }

    return optax.multi_transform(parts, labels), schedule


def _transformation(config, schedule):
    _check(config)
    if config.name == "adamw":
        decay = dict(weight_decay=config.weight_decay, mask=decayed)
        tx = optax.adamw(schedule, b1=config.b1, b2=config.b2, **decay)
    else:
        tx = contrib.muon(
            lambda step: config.muon_lr / config.lr * schedule(step),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=hidden,
        )
    if config.clip:
        tx = optax.chain(optax.clip_by_global_norm(config.clip), tx)
    return tx


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


def hidden(params):
    """Tree of how Muon sees each matrix it updates, (in, out) axes; None for what AdamW does."""

    def seen(path, leaf):
        found = _HIDDEN.search(path_name(path))
        if not found:
            return None
        axes = leaf.ndim - 2, leaf.ndim - 1
        is_transposed = found[1] == "down"  # stored [out, in], see layers.linear.Linear
        return contrib.MuonDimensionNumbers(*(reversed(axes) if is_transposed else axes))

    return jax.tree_util.tree_map_with_path(seen, params)


def _check(config):
    if config.name not in NAMES:
        raise UserError(f"optim.name={config.name}: unknown; use one of {', '.join(NAMES)}")
    if config.schedule not in SCHEDULES:
        raise UserError(
            f"optim.schedule={config.schedule}: unknown; use one of {', '.join(SCHEDULES)}"
        )
    for field in ("lr", "muon_lr"):
        if not 0 < config[field] < math.inf:
            raise UserError(
                f"optim.{field}={config[field]}: a learning rate must be positive and finite"
            )
    for field in ("b1", "b2", "ema"):
        if not 0 <= config[field] < 1:
            raise UserError(f"optim.{field}={config[field]}: must be at least 0 and less than 1")
