"""Where arrays live: parameters by path rules with an FSDP fallback, activations by letter."""

import math
import re
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")


class ParamRule(NamedTuple):
    """How parameters whose path matches `pattern` are split and updated.

    axes: mesh axes of the trailing dimensions, so that one rule serves a layer and a stack of
    layers. matrix: (in, out) dimensions, counted from the end, if it is a hidden matrix of a layer,
    which Muon updates; else None.
    """

    pattern: str
    axes: tuple[str, ...]
    matrix: tuple[int, int] | None = None


# One table for all tasks and the optimiser, whose moments and averages repeat the path of their
# parameter. What no rule names is split by the fallback of `partition`.
PARAM_RULES = (
    ParamRule(r"(^|/)(q|k|v|gate|up)/kernel$", ("fsdp", "tensor"), matrix=(-2, -1)),
    ParamRule(r"(^|/)out/kernel$", ("tensor", "fsdp"), matrix=(-2, -1)),
    ParamRule(r"(^|/)down/kernel$", ("fsdp", "tensor"), matrix=(-1, -2)),  # stored [out, in]
    ParamRule(r"(^|/)(decay_out|modulation|time_in|time_out|context)/kernel$", ("fsdp", "tensor")),
    ParamRule(r"(^|/)(q|k|v|gate|decay_out|up)/bias$", ("tensor",)),
)

# Activations: axis letter -> mesh axes. Axes with any other letter are whole on each device: `_`
# marks frames that are read one after another, and L is whole because most mixers need all earlier
# tokens.
LETTER_AXES = {"B": BATCH_AXES, "T": ("seq",), "A": ("tensor",)}


def path_name(path):
    """'params/block_0/kernel' of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fit(axes, size, mesh):
    """The mesh axes if together they split a dimension of `size` evenly, else None (not split)."""
    if axes is None:
        return None
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    parts = math.prod(mesh.shape.get(axis, 1) for axis in axes)
    return axes if parts > 1 and size % parts == 0 else None


def find_rule(name):
    """The first of PARAM_RULES for the path of a parameter, None if there is none."""
    return next((rule for rule in PARAM_RULES if re.search(rule.pattern, name)), None)


def partition(name, shape, mesh):
    """PartitionSpec of one parameter: that of its rule, else FSDP.

    An axis that does not divide its dimension is dropped. The fallback splits the largest divisible
    dimension over fsdp. It leaves vectors (biases, norms) whole: gathering them costs more than
    keeping them.
    """
    rule = find_rule(name)
    if rule and shape:
        axes = rule.axes[-len(shape) :]
        axes = (None,) * (len(shape) - len(axes)) + axes
        return PartitionSpec(*(_fit(axis, size, mesh) for axis, size in zip(axes, shape)))
    if len(shape) >= 2:
        for dim in sorted(range(len(shape)), key=lambda dim: -shape[dim]):
            if _fit("fsdp", shape[dim], mesh):
                return PartitionSpec(*(None,) * dim, "fsdp")
    return PartitionSpec()


def shard_params(tree, mesh):
    """NamedShardings for a tree of arrays or shapes, by `partition`; a whole train state too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh)),
        tree,
    )


def replicated(mesh):
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
    """The sharding of a batch: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard(x, letters):
    """Constrain an activation by its axis letters, e.g. shard(x, "BTND"); no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if x.ndim != len(letters):
        raise ValueError(f"letters {letters!r} for an array of shape {x.shape}")
    return jax.lax.with_sharding_constraint(x, partition_letters(letters, x.shape, mesh))


def frames_are_split():
    """Whether the mesh splits frames. Merging their axis with another would then gather them."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape.get("seq", 1) > 1  # a mesh that is empty has no axes


def partition_letters(letters, shape, mesh):
    """PartitionSpec of an activation by its axis letters."""
    return PartitionSpec(
        *(_fit(LETTER_AXES.get(letter), size, mesh) for letter, size in zip(letters, shape))
    )
