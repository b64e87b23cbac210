"""Shared by the tests of recurrences: cases, inputs, all gradients, and bounds on errors."""

import functools

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.kernels.linear_attention import linear_attention

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

FORMS = ("plain", "packed", "bfloat16")  # float32, float32 with segments, q, k and v in bfloat16

# Every implementation over every length, width, decay, form and chunk. Any two values of two of the
# columns tokens, K and chunk meet in one row (an orthogonal array).
COVER = (
    # op, implementation, tokens, K, V, decay per, strength, form, chunk
    (linear_attention, "chunked", 1, 16, 24, None, "", "plain", None),
    (linear_attention, "chunked", 63, 64, 16, "head", "some", "packed", 16),
    (linear_attention, "chunked", 64, 96, 96, "token", "weak", "plain", 64),
    (linear_attention, "chunked", 65, 128, 64, "token", "strong", "bfloat16", 128),
    (linear_attention, "chunked", 300, 256, 256, "channel", "mixed", "packed", 1000),
    (linear_attention, "tpu", 1, 64, 16, "token", "weak", "bfloat16", 1000),
    (linear_attention, "tpu", 63, 96, 96, "token", "strong", "packed", None),
    (linear_attention, "tpu", 64, 128, 64, "channel", "mixed", "plain", 16),
    (linear_attention, "tpu", 65, 256, 256, None, "", "packed", 64),
    (linear_attention, "tpu", 300, 16, 24, "head", "some", "plain", 128),
    (linear_attention, "gpu", 1, 96, 96, "token", "mixed", "packed", 128),
    (linear_attention, "gpu", 63, 128, 64, None, "", "plain", 1000),
    (linear_attention, "gpu", 64, 256, 256, "head", "some", "bfloat16", None),
    (linear_attention, "gpu", 65, 16, 24, "token", "weak", "packed", 16),
    (linear_attention, "gpu", 300, 64, 16, "token", "strong", "plain", 64),
    (gated_delta, "chunked", 1, 128, 64, "head", "some", "packed", 64),
    (gated_delta, "chunked", 63, 256, 256, "token", "weak", "plain", 128),
    (gated_delta, "chunked", 64, 16, 24, "token", "strong", "packed", 1000),
    (gated_delta, "chunked", 65, 64, 16, "token", "mixed", "plain", None),
    (gated_delta, "chunked", 300, 96, 96, None, "", "bfloat16", 16),
    (gated_delta, "tpu", 1, 256, 256, "token", "strong", "plain", 16),
    (gated_delta, "tpu", 63, 16, 24, "token", "mixed", "bfloat16", 64),
    (gated_delta, "tpu", 64, 64, 16, None, "", "packed", 128),
    (gated_delta, "tpu", 65, 96, 96, "head", "some", "plain", 1000),
    (gated_delta, "tpu", 300, 128, 64, "token", "weak", "packed", None),
)


def make(
    L, K, V, decay=None, strength="mixed", *, packed=False, batch=2, heads=2, op=linear_attention
):
    """(arguments of `op` as float32 arrays, segment_ids or None).

    decay: None or per "head", "token" or "channel". strength: "weak", about 1e-4; "some", about
    0.3; "strong", 50; "mixed", all three. For the delta rule keys have norm 1, and beta in (0, 2)
    follows v. The initial state is last.
    """
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, L, heads, width)) for width in (K, K, V))
    g = None
    if decay:
        shape = {"head": (heads,), "token": (batch, L, heads), "channel": k.shape}[decay]
        strengths = {
            "weak": 1e-4 * rng.random(shape),
            "strong": np.full(shape, 50.0),
            "some": rng.exponential(0.3, shape),
        }
        weak, strong, some = strengths.values()
        choice = rng.integers(0, 6, shape)
        strengths["mixed"] = np.choose(choice, [weak, weak, strong, some, some, some])
        g = -strengths[strength]
    state = rng.normal(size=(batch, heads, K, V))
    # Segments of several lengths, one of them a single token, shifted in the second row.
    cuts = np.isin(np.arange(L), [20, 21, 66, 128])
    segment_ids = np.stack([np.cumsum(np.roll(cuts, row)) for row in range(batch)])
    arrays = (q, k, v, g, state)
    if op is gated_delta:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        arrays = (q, k, v, rng.uniform(0, 2, (batch, L, heads)), g, state)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
    return arrays, jnp.asarray(segment_ids) if packed else None


def value_and_grads(
    arrays, segment_ids=None, *, op=linear_attention, implementation="chunked", chunk=None
):
    """{name: array} of the outputs and, for random cotangents, of all gradients.

    Every call traces again, because tests replace kernels.
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
    """Bound the errors of outputs and gradients, relative to the largest element of each array."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        exact = np.asarray(wanted[name], np.float64)
        error = np.abs(np.asarray(got[name], np.float64) - exact).max()
        error /= max(np.abs(exact).max(), 1e-6)
        assert error <= (gradient if name.startswith("d") else value), f"{name} is off by {error}"


def assert_equals_reference(arrays, segment_ids=None, *, value=1e-5, gradient=1e-4, **run):
    """Compare value_and_grads(**run) with the token recurrence in float32."""
    got = jax.block_until_ready(value_and_grads(arrays, segment_ids, **run))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    run |= dict(implementation="reference", chunk=None)
    assert_close(got, value_and_grads(exact, segment_ids, **run), value, gradient)
    return got


def rounded(arrays):
    """The arrays with q, k and v in bfloat16."""
    return (*(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:])


def interpreter(cores, seed=0):
    """Run parallel axes in random order. Two cores detect races but are slower."""
    return pltpu.InterpretParams(detect_races=True, random_seed=seed, num_cores_or_threads=cores)


def cost_estimates(run, *arguments):
    """The cost estimates of the kernels in a program."""
    jaxprs, estimates = [jax.jit(run).trace(*arguments).jaxpr], []
    while jaxprs:
        for equation in jaxprs.pop().eqns:
            if equation.primitive.name == "pallas_call":
                estimates.append(equation.params["cost_estimate"])
            else:
                jaxprs += jex.core.jaxprs_in_params(equation.params)
    return estimates
