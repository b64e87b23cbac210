"""The optimiser: AdamW or Muon with warm-up, a schedule, clipping, and decay on matrices only."""

import jax
import optax
from ml_collections import ConfigDict
from optax import contrib

from jaxvid.checks import at_least, below, choose, positive, require
from jaxvid.errors import within
from jaxvid.parallel.sharding import find_rule, path_name

NAMES = ("adamw", "muon")
GROUPS = ("discriminator", "conditioner")  # branches that may have an optimiser of their own
SCHEDULES = ("constant", "cosine")


def make_optimizer(config, steps):
    """(optax transformation, learning-rate schedule) of `config.optim` for a run of `steps`.

    Gradients are clipped by global norm (0 = no clipping). adamw is Loshchilov & Hutter 2019
    (arXiv:1711.05101). muon is orthogonalised momentum (Jordan 2024) at `muon_lr` for the hidden
    matrices of attention and MLPs, and AdamW with Nesterov momentum at `lr` for the rest. A section
    of `config` named in GROUPS replaces fields for that branch of the parameters, which is clipped
    and updated separately.
    Raises UserError for values that cannot train, named relative to `config`.
    """
    _check(config, steps)
    schedule = make_schedule(config, steps)
    groups = {name: ConfigDict({**config, **config[name]}) for name in GROUPS if name in config}
    if not groups:
        return _transformation(config, schedule), schedule
    parts = {"": _transformation(config, schedule)}
    for name, fields in groups.items():
        with within(name):
            _check(fields, steps)
        parts[name] = _transformation(fields, make_schedule(fields, steps))

    def labels(params):
        return {
            name: jax.tree.map(lambda _, name=name: name if name in groups else "", branch)
            for name, branch in params.items()
        }

    return optax.multi_transform(parts, labels), schedule


def _transformation(config, schedule):
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
    # The first update has a rate of lr / warmup, not zero.
    rise = optax.linear_schedule(config.lr / config.warmup, config.lr, config.warmup - 1)
    return optax.join_schedules([rise, after], [config.warmup - 1])


def decayed(params):
    """Tree of bool: True where weight decay acts, i.e. not on biases and norm scales.

    Decided by name and rank, because a stack of layers turns vectors into matrices.
    """

    def is_decayed(path, leaf):
        return leaf.ndim >= 2 and path_name(path).rsplit("/", 1)[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def hidden(params):
    """Tree of what Muon sees of each matrix it updates, (in, out) axes; None for the rest."""

    def dimension_numbers(path, leaf):
        rule = find_rule(path_name(path))
        if rule is None or rule.matrix is None:
            return None
        return contrib.MuonDimensionNumbers(*(leaf.ndim + axis for axis in rule.matrix))

    return jax.tree_util.tree_map_with_path(dimension_numbers, params)


def _check(config, steps):
    """Raise UserError for values that cannot train."""
    choose("name", config.name, NAMES)
    choose("schedule", config.schedule, SCHEDULES)
    for name in ("lr", "muon_lr"):
        positive(name, config[name])
    for name in ("b1", "b2", "ema"):
        below(name, config[name], 0, 1)
    for name in ("warmup", "weight_decay", "clip", "skip_nonfinite"):
        at_least(name, config[name], 0)
    remedy = f"is longer than the run of steps={steps}; use at most {steps}"
    require(config.warmup <= steps, "warmup", config.warmup, remedy)
    at_least("accumulate", config.accumulate, 1)
