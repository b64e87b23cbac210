"""Where arrays live: parameters by path rules with an FSDP fallback, activations by letter."""

import math
import re

import jax
from jax.sharding import NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")

# Activations: axis letter -> mesh axes. Every other letter is whole on each device: so is `_`, for
# frames that are read one after another, and L, as most mixers need all tokens that came before.
LETTER_AXES = {"B": BATCH_AXES, "T": ("seq",), "A": ("tensor",), "F": ("tensor",)}


def path_name(path):
    """'params/block_0/kernel' of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fit(axes, size, mesh):
    """The mesh axes if together they split a dimension of `size` evenly, else None (whole)."""
    if axes is None:
        return None
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    parts = math.prod(mesh.shape.get(axis, 1) for axis in axes)
    return axes if parts > 1 and size % parts == 0 else None


def partition(name, shape, mesh, rules=()):
    """PartitionSpec of one parameter: the first rule whose regex is found in its path, else FSDP.

    A rule's dims are aligned to the trailing dimensions, so that one rule serves a layer and a
    stack of layers; an axis that does not divide its dimension is dropped. The fallback splits the
    largest divisible dimension over fsdp. Vectors (biases, norms) stay whole there: gathering them
    costs more than keeping them.
    """
    for pattern, dims in rules:
        if re.search(pattern, name):
            dims = tuple(dims or ())[-len(shape) :] if shape else ()
            dims = (None,) * (len(shape) - len(dims)) + dims
            return PartitionSpec(*(_fit(axes, size, mesh) for axes, size in zip(dims, shape)))
    if len(shape) >= 2:
        for dim in sorted(range(len(shape)), key=lambda dim: -shape[dim]):
            if _fit("fsdp", shape[dim], mesh):
                return PartitionSpec(*(None,) * dim, "fsdp")
    return PartitionSpec()


def shard_params(tree, mesh, rules=()):
    """NamedShardings for a tree of arrays or shapes, by `partition`.

    Optimiser moments and averages repeat a parameter's path and shape, so a whole train state may
    be passed: each copy lands where its parameter does.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh, rules)),
        tree,
    )


def replicated(mesh):
    """The sharding of what every device holds whole."""
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
    """Whether the mesh splits frames, so that to merge their axis with another gathers them."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape.get("seq", 1) > 1  # a mesh that is empty has no axes


def partition_letters(letters, shape, mesh):
    """PartitionSpec of an activation by its axis letters."""
    return PartitionSpec(
        *(_fit(LETTER_AXES.get(letter), size, mesh) for letter, size in zip(letters, shape))
    )
