"""Starting from the weights of another run."""

import jax
import jax.numpy as jnp

from jaxvid.errors import UserError
from jaxvid.parallel.sharding import path_name


def adopt(state, weights):
    """(state with the weights of another run, a line that says which were taken).

    weights: in the form of `TrainState.weights`, in numpy. A leaf of the parameters or of `extra`
    is replaced if `weights` has one with its path and shape; others keep their initialisation. The
    average starts from the same parameters. Raises UserError if no leaf fits.
    """
    given = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(weights)}
    left = []

    def take(path, leaf):
        found = given.get(path_name(path))
        if found is None or found.shape != leaf.shape:
            left.append(path_name(path))
            return leaf
        return jax.device_put(found.astype(leaf.dtype), leaf.sharding)

    params, extra = (jax.tree_util.tree_map_with_path(take, x) for x in (state.params, state.extra))
    total = len(jax.tree.leaves((params, extra)))
    if len(left) == total:
        raise UserError(
            "init_from: no array of that run has a name and shape of this one; name a run of "
            "the same architecture"
        )
    ema = jax.tree.map(jnp.copy, params) if state.ema else state.ema
    new = sorted({"/".join(name.split("/")[:3]) for name in left})
    line = f"{total - len(left)} of {total} arrays" + (f", all but {', '.join(new)}" if new else "")
    return state.replace(params=params, extra=extra, ema=ema), line
