"""What tests of linear attention share: inputs, all gradients, and what counts as equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxvid.kernels.linear_attention import linear_attention

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

# name: (tokens, key width, value width, kind of decay, whether sequences are packed)
CASES = {
    "one token": (1, 16, 16, "token", False),
    "no decay": (65, 96, 96, None, False),
    "no decay, packed": (130, 16, 16, None, True),
    "decay of a head": (64, 128, 64, "head", False),
    "decay of a token": (63, 64, 256, "token", False),
    "decay of a token, packed": (63, 64, 64, "token", True),
    "decay of a token, long": (1000, 16, 24, "token", True),
    "decay of a channel": (65, 64, 16, "channel", False),
    "decay of a channel, packed": (150, 24, 16, "channel", True),
    "decay of a channel, long": (150, 24, 16, "channel", False),
}


def inputs(case, strength="mixed", batch=2, heads=2):
    """((q, k, v, log_decay, initial_state), segment_ids) with decays by the name of their strength.

    mixed: some next to nothing, some that forget, most between them.
    """
    L, K, V, kind, packed = CASES[case]
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, L, heads, width)) for width in (K, K, V))
    shape = {"head": (heads,), "token": (batch, L, heads), "channel": k.shape}.get(kind)
    decay = None
    if shape:
        weak, strong, some = (
            1e-4 * rng.random(shape),
            np.full(shape, 50.0),
            rng.exponential(0.3, shape),
        )
        mixed = np.choose(rng.integers(0, 6, shape), [weak, weak, strong, some, some, some])
        decay = -{"weak": weak, "strong": strong, "mixed": mixed}[strength]
    state = rng.normal(size=(batch, heads, K, V))
    # Segments of all lengths, one of them a single token, not the same in both rows.
    cuts = np.stack(
        [np.roll(np.isin(np.arange(L), [20, 21, 66, 128]), row) for row in range(batch)]
    )
    segment_ids = jnp.asarray(np.cumsum(cuts, axis=1)) if packed else None
    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    return cast((q, k, v, decay, state)), segment_ids


@functools.partial(jax.jit, static_argnames=("implementation", "chunk"))
def value_and_grads(arrays, segment_ids=None, *, implementation, chunk=None):
    """{name: array} of the outputs and, under random cotangents, of all gradients."""

    def outputs(q, k, v, log_decay, state):
        y, state = linear_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=state,
            segment_ids=segment_ids,
            return_state=True,
            chunk=chunk,
            implementation=implementation,
        )
        return {"y": y, "state": state}

    values, pull = jax.vjp(outputs, *arrays)
    rng = jax.random.key(1)
    grads = pull({n: jax.random.normal(rng, x.shape).astype(x.dtype) for n, x in values.items()})
    names = ("dq", "dk", "dv", "dlog_decay", "dinitial_state")
    return values | {name: x for name, x in zip(names, grads) if x is not None}


def assert_close(got, wanted, value=1e-5, gradient=1e-4):
    """Errors of outputs and of gradients, each in units of the largest element (1e-6 at least)."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        exact = np.asarray(wanted[name], np.float64)
        error = np.abs(np.asarray(got[name], np.float64) - exact).max()
        error /= max(np.abs(exact).max(), 1e-6)
        assert error <= (gradient if name.startswith("d") else value), f"{name} is off by {error}"


def interpreter(cores):
    """Programs in any order where axes are parallel; two cores find races, and take longer."""
    return pltpu.InterpretParams(detect_races=True, random_seed=0, num_cores_or_threads=cores)
