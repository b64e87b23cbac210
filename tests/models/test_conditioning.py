"""Text as a condition: padding counts nowhere, and the null replaces what is dropped or empty."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import masked_transformer
from jaxvid.data import text
from jaxvid.data.sprites import COLOURS, DIRECTIONS, SHAPES
from jaxvid.errors import UserError
from jaxvid.models.conditioning import Conditioner
from jaxvid.models.text import CONV, ByteEncoder

CAPTIONS = ("a red square moves left", "a", "", "ein größerer Kreis")
SIZES = dict(kind="text", tokens=32, width=16, queries=3, depth=2, heads=2)


def spelled(tokens=32, captions=CAPTIONS):
    return np.stack([text.spell(caption, tokens) for caption in captions])


def embedded(tokens=8, captions=CAPTIONS):
    return np.stack([text.embed(caption, tokens, 12) for caption in captions])


@functools.cache
def conditioner(encoder):
    """(context of a text, params), compiled, with parameters off their symmetric start."""
    module = Conditioner(encoder=encoder, **SIZES)
    inputs = spelled() if encoder == "bytes" else embedded()
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros(4, bool), text=inputs)
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)

    def apply(params, inputs, drop_B=None):
        drop_B = jnp.zeros(len(inputs), bool) if drop_B is None else drop_B
        return module.apply(params, drop_B, text=inputs)

    return jax.jit(apply), params


@pytest.mark.parametrize("encoder, inputs", [("bytes", spelled), ("none", embedded)])
def test_padding_and_the_other_captions_change_nothing(encoder, inputs):
    apply, params = conditioner(encoder)
    context_BQE = apply(params, inputs())
    assert context_BQE.shape == (4, 3, 16) and context_BQE.dtype == jnp.float32
    atol = 1e-6 * np.abs(context_BQE).max()
    np.testing.assert_allclose(apply(params, inputs(49)), context_BQE, atol=atol)
    for row, caption in enumerate(CAPTIONS):
        alone = apply(params, inputs(captions=(caption,)))[0]
        np.testing.assert_allclose(alone, context_BQE[row], atol=atol)
    different = np.abs(context_BQE[:, None] - context_BQE).max((2, 3))
    assert different[~np.eye(4, dtype=bool)].min() > 0.01


@pytest.mark.parametrize("encoder, inputs", [("bytes", spelled), ("none", embedded)])
def test_no_gradient_reaches_padding(encoder, inputs):
    """Of the embeddings, rows of padding; of the bytes, the embedding of 0."""
    apply, params = conditioner(encoder)
    if encoder == "bytes":
        gradient = jax.grad(lambda p: jnp.square(apply(p, inputs())).sum())(params)
        rows = np.asarray(gradient["params"]["encoder"]["bytes"]["embedding"])
        read = np.unique(inputs()[inputs() > 0])
    else:
        rows = np.asarray(jax.grad(lambda x: (apply(params, x) ** 3).sum())(jnp.asarray(inputs())))
        rows, read = rows[0], np.flatnonzero(inputs()[0].any(-1))
    moved = np.flatnonzero(np.abs(rows).max(-1))
    np.testing.assert_array_equal(moved, read)


def test_bytes_are_read_in_order_and_in_both_directions():
    module = ByteEncoder(16, 1, 2)
    ids = spelled(captions=("abcdefghijklmnop", "bacdefghijklmnop", "abcdefghijklmnpo"))
    x_BMD, params = module.init_with_output(jax.random.key(0), ids)
    changed_first, changed_last = (np.abs(x_BMD[row] - x_BMD[0]).max(-1) for row in (1, 2))
    assert (changed_first[:16] > 1e-4).all() and (changed_last[:16] > 1e-4).all()
    np.testing.assert_array_equal(x_BMD[:, 16:], 0)
    assert params["params"]["conv"]["kernel"].shape == (CONV, 16, 16)


@pytest.mark.parametrize("encoder, inputs", [("bytes", spelled), ("none", embedded)])
def test_what_is_dropped_and_what_is_empty_is_the_null(encoder, inputs):
    apply, params = conditioner(encoder)
    context_BQE = apply(params, inputs(), jnp.array([True, False, False, False]))
    null_QE = params["params"]["null"]
    np.testing.assert_array_equal(context_BQE[0], null_QE)
    np.testing.assert_array_equal(context_BQE[2], null_QE)
    assert np.abs(context_BQE[1] - null_QE).max() > 0.1
    gradient = jax.grad(lambda p: apply(p, inputs(captions=("", " "))).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(gradient["params"]["null"], 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoder": "t5"}, "encoder='t5': unknown; use one of none, bytes"),
        ({"encoder": "bytes", "queries": 0}, "queries=0: the padding behind bytes would be read"),
        ({"queries": -1}, "queries=-1: must be at least 0"),
        ({"heads": 3}, "heads=3: does not divide width=16"),
        ({"depth": 0}, "depth=0: must be at least 1"),
    ],
)
def test_impossible_conditions_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Conditioner(**{**SIZES, **changes})


def test_text_of_another_kind_is_refused():
    for encoder, inputs, message in (
        ("none", spelled(), "^encoder='none': .* are bytes; use bytes"),
        ("bytes", embedded(), "^encoder='bytes': .* are embedded already; use none"),
    ):
        module = Conditioner(encoder=encoder, **SIZES)
        with pytest.raises(UserError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(4, bool), text=inputs)
    for tokens, message in ((32, "tokens=32: the text of the data has 8"), (8, "width=16: .* 12")):
        module = Conditioner(**{**SIZES, "queries": 0, "tokens": tokens})
        with pytest.raises(UserError, match=f"^{message}"):
            jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(4, bool), text=embedded())
    with pytest.raises(UserError, match=r"^kind='text': the data has no captions"):
        module.arguments({}, 4)


def test_captions_of_the_preset_differ_by_more_than_they_share():
    """At the start, else a generator learns to leave them out; and they are trained slowly."""
    config = masked_transformer.get_config()
    assert (
        config.optim.conditioner.name == "adamw" and config.optim.conditioner.lr < config.optim.lr
    )
    fields = config.task.condition.to_dict()
    del fields["drop"]
    told = itertools.product(COLOURS, SHAPES, DIRECTIONS)
    ids = np.stack([text.spell(f"a large {a} {b} moves {c}", 128) for a, b, c in told])
    module, apart = Conditioner(**fields), []
    for rng in jax.random.split(jax.random.key(0), 3):
        init = jax.jit(module.init_with_output)
        context_BQE, _ = init(rng, jnp.zeros(len(ids), bool), text=ids)
        apart.append(context_BQE.std(0).mean() / jnp.sqrt(jnp.square(context_BQE).mean()))
    assert np.mean(apart) > 0.3
