"""What tests of linear attention share: cases, inputs, all gradients, and what counts as equal."""

import functools

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.kernels.linear_attention import linear_attention

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

# name: (tokens, key width, value width, kind of decay, whether sequences are packed)
CASES = {
    "one token": (1, 16, 16, "token", False),
    "no decay": (65, 96, 96, None, False),
    "no decay, even": (64, 16, 24, None, False),
    "no decay, packed": (130, 16, 16, None, True),
    "decay of a head": (64, 128, 64, "head", False),
    "decay of a token": (63, 64, 256, "token", False),
    "decay of a token, packed": (63, 64, 64, "token", True),
    "decay of a token, long": (1000, 16, 24, "token", True),
    "decay of a channel": (65, 64, 16, "channel", False),
    "decay of a channel, packed": (150, 24, 16, "channel", True),
    "decay of a channel, long": (150, 24, 16, "channel", False),
}


EVERY = (
    (linear_attention, "chunked"),
    (linear_attention, "tpu"),
    (linear_attention, "gpu"),
    (gated_delta, "chunked"),
    (gated_delta, "tpu"),
)
FORMS = ("plain", "packed", "plain", "bfloat16", "packed")
_LENGTHS, _WIDTHS = (1, 63, 64, 65, 1000), (16, 64, 96, 128, 256)
# One weak decay for all tokens is left out: of that the recurrence itself, a power of one rounded
# factor, is off by more than the bound.
_DECAYS = ((None, None), ("head", "some"), ("token", "weak"), ("token", "strong"))
_CHUNKS = (None, 16, 64, 128, 1000)


def cover():
    """(op, implementation, tokens, width, (kind of decay, strength), form, chunk), 25 of them.

    An orthogonal array: every implementation meets each length, width, decay, form and chunk, and
    any two values of two columns meet somewhere. A decay per channel is one per token to those that
    have none.
    """
    for i, (op, implementation) in enumerate(EVERY):
        by_channel = op is linear_attention and implementation != "gpu"
        decays = (*_DECAYS, ("channel" if by_channel else "token", "mixed"))
        columns = (_LENGTHS, _WIDTHS, decays, FORMS, _CHUNKS)
        for row in range(5):
            values = (column[(row + n * i) % 5] for n, column in enumerate(columns))
            yield op, implementation, *values


def inputs(case, strength="mixed", batch=2, heads=2):
    """((q, k, v, log_decay, initial_state), segment_ids) of one of CASES."""
    return make(*CASES[case], strength, batch, heads)


def make(L, K, V, kind, packed, strength="mixed", batch=2, heads=2, op=linear_attention):
    """Arrays of an op, and segment_ids or None, with decays by the name of their strength.

    mixed: some next to nothing, some that forget, most between them. For the delta rule keys have
    norm 1, and beta, in (0, 2), follows v.
    """
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
        decay = -{"weak": weak, "some": some, "strong": strong, "mixed": mixed}[strength]
    state = rng.normal(size=(batch, heads, K, V))
    # Segments of all lengths, one of them a single token, not the same in both rows.
    cuts = np.stack(
        [np.roll(np.isin(np.arange(L), [20, 21, 66, 128]), row) for row in range(batch)]
    )
    segment_ids = jnp.asarray(np.cumsum(cuts, axis=1)) if packed else None
    arrays = (q, k, v, decay, state)
    if op is gated_delta:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        arrays = (q, k, v, rng.uniform(0, 2, (batch, L, heads)), decay, state)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays), segment_ids


def value_and_grads(
    arrays, segment_ids=None, *, op=linear_attention, implementation="chunked", chunk=None
):
    """{name: array} of the outputs and, under random cotangents, of all gradients.

    Traced anew in every call, as the kernels may not be those of the last one.
    """
    run = jax.jit(functools.partial(_value_and_grads, op, implementation, chunk))
    return run(arrays, segment_ids)


def _value_and_grads(op, implementation, chunk, arrays, segment_ids):
    def outputs(*arrays):
        y, state = op(
            *arrays[:-1],
            initial_state=arrays[-1],
            segment_ids=segment_ids,
            return_state=True,
            chunk=chunk,
            implementation=implementation,
        )
        return {"y": y, "state": state}

    values, pull = jax.vjp(outputs, *arrays)
    rng = jax.random.key(1)
    grads = pull({n: jax.random.normal(rng, x.shape).astype(x.dtype) for n, x in values.items()})
    beta = ("dbeta",) if op is gated_delta else ()
    names = ("dq", "dk", "dv", *beta, "dlog_decay", "dinitial_state")
    return values | {name: x for name, x in zip(names, grads) if x is not None}


def assert_close(got, wanted, value=1e-5, gradient=1e-4):
    """Errors of outputs and of gradients, each in units of the largest element (1e-6 at least)."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        exact = np.asarray(wanted[name], np.float64)
        error = np.abs(np.asarray(got[name], np.float64) - exact).max()
        error /= max(np.abs(exact).max(), 1e-6)
        assert error <= (gradient if name.startswith("d") else value), f"{name} is off by {error}"


def assert_equals_reference(arrays, segment_ids=None, *, value=1e-5, gradient=1e-4, **run):
    """That what `run` names, as for `value_and_grads`, is the token recurrence in float32."""
    got = jax.block_until_ready(value_and_grads(arrays, segment_ids, **run))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    run |= dict(implementation="reference", chunk=None)
    assert_close(got, value_and_grads(exact, segment_ids, **run), value, gradient)
    return got


def rounded(arrays):
    """The same with q, k and v in bfloat16."""
    return (*(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:])


def interpreter(cores, seed=0):
    """Programs in any order where axes are parallel; two cores find races, and take longer."""
    return pltpu.InterpretParams(detect_races=True, random_seed=seed, num_cores_or_threads=cores)


def cost_estimates(run, *arguments):
    """What the kernels of a program estimate to cost, by tracing it."""
    jaxprs, estimates = [jax.jit(run).trace(*arguments).jaxpr], []
    while jaxprs:
        for equation in jaxprs.pop().eqns:
            if equation.primitive.name == "pallas_call":
                estimates.append(equation.params["cost_estimate"])
            else:
                jaxprs += jex.core.jaxprs_in_params(equation.params)
    return estimates
