"""Every mixer of the table obeys the laws, over all tokens of a frame and at one location alone."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.layers import masks
from jaxvid.mixers import CHOICES, FLOORS, MIXERS, cache, check
from jaxvid.mixers.linear_attention import slopes
from tests import laws

# One row per variant: the mixer's name and its options. A new mixer joins the laws by its row.
ROWS = [
    ("softmax", {}),
    ("softmax", {"window": 4}),
    ("softmax", {"window": 3, "sinks": 2}),
    ("softmax", {"window": 1, "qk_norm": False}),
    ("alibi", {"window": 3, "sinks": 2}),
    ("linear", {}),
    ("lightning", {"slopes": "fla"}),
    ("gla", {}),
    ("gla", {"feature": "silu"}),
    ("gated_delta", {}),
    ("lightnet", {}),
    ("lightnet", {"lrpe": False, "tpe": 0}),
    ("aaren", {}),
    ("routing", {"clusters": 2, "members": 5}),
]


def build(name, options, grid, context=False):
    """(apply, params, x_BTND) of a mixer; apply starts a stream from a context if asked to."""
    mixer = MIXERS[name](width=16, heads=2, grid=grid, **options)
    rng = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(rng[0], (2, laws.FRAMES, grid[0] * grid[1], 16))
    context_BMD = jax.random.normal(rng[1], (2, 3, 16))
    params = mixer.init(rng[2], x)

    def apply(params, x, state):
        if state is None and context:
            N = x.shape[2]
            _, state = mixer.apply(params, context_BMD, N, method="prefill")
        return mixer.apply(params, x, state)

    return apply, params, x


def test_every_mixer_has_a_row():
    assert {name for name, _ in ROWS} == set(MIXERS)


@pytest.mark.parametrize("grid, context", [((2, 3), True), ((1, 1), False)])
@pytest.mark.parametrize("name, options", ROWS)
def test_streaming(name, options, grid, context):
    apply, params, x = build(name, options, grid, context)
    laws.streaming(functools.partial(apply, params), x)


@pytest.mark.parametrize("name, options", ROWS)
def test_causality(name, options):
    apply, params, x = build(name, options, (2, 3), context=True)
    reach = options.get("window") or laws.FRAMES
    if name == "routing":  # content decides what of the past is read
        reach = 1
    laws.causality(functools.partial(apply, params), x, reach=reach)


@pytest.mark.parametrize("name, options", [row for row in ROWS if row[1].get("window") != 1])
def test_gradients(name, options):
    laws.gradients(*build(name, options, (2, 3)))


@pytest.mark.parametrize("name", sorted(MIXERS.keys() - {"softmax", "alibi"}))
def test_what_a_mixer_of_constant_memory_remembers_does_not_grow(name):
    apply, params, x = build(name, {}, (2, 3))
    first = jax.eval_shape(apply, params, x[:, :1], None)[1]
    later = jax.eval_shape(apply, params, x[:, 1:], first)[1]
    assert first == later
    if name in ("linear", "lightning", "gla"):
        assert first.shape == (2, 2, 8, 9 if name == "linear" else 8)
        assert first.dtype == jnp.float32


def test_aaren_is_softmax_attention_of_a_query_that_is_given():
    """Scores so far apart that sums of their exponentials would overflow, and equal ones."""
    apply, params, x = build("aaren", {"qk_norm": False}, (2, 3))
    params["params"]["query"] *= 1000.0
    y, _ = jax.jit(apply)(params, x, None)
    w = params["params"]
    k, v = (np.float64(x @ w[n]["kernel"] + w[n]["bias"]).reshape(2, -1, 2, 8) for n in "kv")
    score = np.einsum("AK,BMAK->BMA", np.float64(w["query"]), k) * 8**-0.5
    assert np.abs(score).max() > 1000
    for t in (0, 5, laws.FRAMES - 1):
        seen = slice(0, 6 * (t + 1))
        p = np.exp(score[:, seen] - score[:, seen].max(1, keepdims=True))
        mean = np.einsum("BMA,BMAK->BAK", p / p.sum(1, keepdims=True), v[:, seen])
        expected = mean.reshape(2, 16) @ w["out"]["kernel"] + w["out"]["bias"]
        for n in range(6):
            np.testing.assert_allclose(y[:, t, n], expected, atol=2e-4)


def test_linear_attention_is_a_mean_weighted_by_the_kernel():
    """With all queries and keys zero, elu + 1 is one, and the mean is that of all tokens so far."""
    apply, params, x = build("linear", {"qk_norm": False}, (2, 3))
    zero = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (path[1].key not in "qk"), params
    )
    out, value = params["params"]["out"], params["params"]["v"]
    v = x @ value["kernel"] + value["bias"]
    tokens = 6 * np.arange(1, laws.FRAMES + 1)[:, None]
    mean = v.sum(2).cumsum(1) / tokens
    expected = (mean @ out["kernel"] + out["bias"])[:, :, None]
    y, _ = apply(zero, x, None)
    np.testing.assert_allclose(y, jnp.broadcast_to(expected, y.shape), atol=1e-5)


@pytest.mark.parametrize(
    "name, gate, start",
    [
        ("lightning", nn.sigmoid, 0.5),
        ("gla", nn.silu, 1),
        ("gated_delta", nn.silu, 1),
        ("lightnet", nn.silu, 1),
    ],
)
def test_gates_of_outputs_start_near_a_constant_and_learn(name, gate, start):
    mixer = MIXERS[name](width=16, heads=2)
    x_BTND = jax.random.normal(jax.random.key(0), (2, 5, 1, 16))
    params = jax.jit(mixer.init)(jax.random.key(1), x_BTND)

    def loss(params):
        def is_gate(module, _):
            return module.name == "gate"

        (y_BTND, _), seen = mixer.apply(params, x_BTND, capture_intermediates=is_gate)
        return jnp.square(y_BTND).sum(), seen["intermediates"]["gate"]["__call__"][0]

    grads, logit_BTND = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(gate(logit_BTND), start, atol=0.1)
    assert jnp.abs(grads["params"]["gate"]["kernel"]).min() > 0


@pytest.mark.parametrize("heads", [1, 2, 512])
def test_gated_delta_starts_with_heads_that_forget_at_all_rates(heads):
    """From 1.6 a frame down to 0.001, which the last head has; inputs vary it with variance 1/3."""
    width = max(2 * heads, 256)
    x_BTND = jax.random.normal(jax.random.key(0), (64, 1, 1, width))
    mixer = MIXERS["gated_delta"](width=width, heads=heads)
    w = jax.jit(mixer.init)(jax.random.key(1), x_BTND)["params"]
    step_A = np.exp(w["log_rate"]) * np.asarray(nn.softplus(w["step_bias"]))
    wanted_A = 1.6 * (0.001 / 1.6) ** ((np.arange(heads) + 1) / heads)
    np.testing.assert_allclose(step_A, wanted_A, rtol=1e-4)
    if heads > 2:  # statistics
        for name in ("step", "beta"):
            np.testing.assert_allclose((x_BTND @ w[name]["kernel"]).var(), 1 / 3, rtol=0.05)
        steps_BTNA = nn.softplus(x_BTND @ w["step"]["kernel"] + w["step_bias"])
        slow = step_A < 0.01  # softplus is close to exp
        ratio = (steps_BTNA / step_A)[..., slow].mean()
        np.testing.assert_allclose(ratio, np.exp(1 / 6), rtol=0.05)


def test_gla_starts_with_channels_that_forget_in_23_to_6500_frames():
    mixer = MIXERS["gla"](width=16, heads=2)
    w = jax.jit(mixer.init)(jax.random.key(0), jnp.ones((1, 2, 1, 16)))["params"]
    g_AK = np.asarray(nn.log_sigmoid(w["decay_out"]["bias"])).reshape(2, 8) / 16
    np.testing.assert_allclose(-1 / g_AK[:, [0, -1]], [[23.08, 6463]] * 2, rtol=1e-3)
    assert (np.diff(g_AK, axis=1) > 0).all()


def test_published_slopes():
    powers = 2.0 ** -np.arange(1, 9)
    np.testing.assert_allclose(slopes("lightning", 8), powers * (1 + 1e-5))
    np.testing.assert_allclose(slopes("lightning", 8, layer=7, layers=8), powers * 1e-5, rtol=1e-9)
    np.testing.assert_allclose(slopes("fla", 4, layer=1, layers=4), 1.5 * np.arange(4))
    np.testing.assert_allclose(slopes("sglang", 8, layer=1, layers=5), powers * (1 + 1e-5))
    twelve = np.concatenate([powers, 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])])
    np.testing.assert_allclose(slopes("lightning", 12), twelve * (1 + 1e-5))
    np.testing.assert_allclose(slopes("sglang", 8), powers * (1 + 1e-5))  # alone: ALiBi's
    np.testing.assert_allclose(slopes("fla", 4), 2.0 * np.arange(4))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [1 / 16, 1 / 256]),
        ({"slopes": "sglang"}, [1 / 16, 1 / 256]),
        ({"slopes": "fla"}, [0, 4]),
        ({"slopes": "lightning", "layer": 1, "layers": 3}, [1 / 32, 1 / 512]),
        ({"slopes": "sglang", "layer": 1, "layers": 3}, [1 / 16, 1 / 256]),
        ({"slopes": "fla", "layer": 1, "layers": 4}, [0, 3]),
        ({"slopes": (0.5, 0.0)}, [0.5, 0]),
        ({"slopes": "0.5, 2"}, [0.5, 2]),
    ],
)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_what_lightning_forgets_in_a_frame(options, expected, grid):
    """A frame of zeros writes nothing, so that the state only decays."""
    apply, params, x = build("lightning", options, grid)
    _, before = apply(params, x[:, :1], None)
    _, after = apply(params, jnp.zeros_like(x[:, :1]), before)
    lost_A = -np.log(np.abs(after).sum((0, 2, 3)) / np.abs(before).sum((0, 2, 3)))
    np.testing.assert_allclose(lost_A, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("rnn", {}, r"name='rnn': unknown; use one of softmax, "),
        ("gla", {"tpe": 2}, r"tpe=2: gla has no such option; choose a mixer behind the colon"),
        ("gla", {"heads": 2}, r"heads=2: gla has no such option"),  # the model's, not the mixer's
        ("softmax", {"window": 0}, r"window=0: must be at least 1"),
        ("alibi", {"sinks": -1}, r"sinks=-1: must be at least 0"),
        ("softmax", {"mask": "no"}, r"mask='no': unknown; use one of causal, full, leaky"),
        ("gla", {"feature": "elu"}, r"feature='elu': unknown; use one of none, silu"),
        ("gated_delta", {"conv": 0}, r"conv=0: must be at least 1"),
        ("lightnet", {"tpe": -1}, r"tpe=-1: must be at least 0"),
        ("routing", {"clusters": 0}, r"clusters=0: must be at least 1"),
        ("routing", {"members": 0}, r"members=0: must be at least 1"),
        ("lightning", {"layers": 0}, r"layers=0: must be at least 1"),
        ("lightning", {"layer": 3, "layers": 3}, r"layer=3: of layers=3; use 0 to 2"),
        ("lightning", {"slopes": "alibi"}, r"slopes='alibi': unknown; use one of lightning, "),
        ("lightning", {"slopes": "0.5"}, r"slopes='0\.5': 1 numbers; give 2, one per head"),
        ("lightning", {"slopes": (1.0, 2.0, 3.0)}, r"slopes=.*: 3 numbers; give 2"),
        ("lightning", {"slopes": (1.0, -2.0)}, r"slopes=.*: would let a head grow"),
        ("lightning", {"slopes": "nan,1"}, r"slopes=.*: would let a head grow"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(name, options, words):
    with pytest.raises(UserError, match=rf"^task\.model\.mixer\.{words}") as error:
        check("task.model.mixer", {"name": name, **options}, heads=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MIXERS)
def test_the_least_that_options_may_be_works(name):
    """And no option of a mixer is missing from the table of what it may be."""
    least = {}
    for field in dataclasses.fields(MIXERS[name]):
        if field.name in FLOORS and field.name not in ("layer", "layers"):
            least[field.name] = FLOORS[field.name]
        elif field.name not in ("width", "heads", "grid", "qk_norm", "dtype", "parent", "name"):
            assert field.name in {*FLOORS, *CHOICES, "slopes"} or field.type in (bool, "bool")
    check("task.model.mixer", {"name": name, **least}, heads=2)
    if least:
        apply, params, x = build(name, least, (1, 2))
        layer = functools.partial(apply, params)
        laws.streaming(layer, x[:, :3], [[1, 1, 1]], gradients=False)


def test_slopes_that_are_not_one_per_head_are_refused_by_the_layer_too():
    for grid in ((1, 1), (2, 3)):
        with pytest.raises(UserError, match=r"slopes=\(0\.5,\): 1 numbers; give 2, one per head"):
            build("lightning", {"slopes": (0.5,)}, grid)


def test_a_feature_that_is_none_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"mixer\.feature='elu': unknown; use one of none, silu"):
        jax.eval_shape(
            MIXERS["gla"](8, 2, feature="elu").init, jax.random.key(0), jnp.ones((1, 2, 1, 8))
        )


@pytest.mark.parametrize("mask", ["full", "leaky"])
def test_the_law_of_causality_catches_peers_masks(mask):
    from jaxvid.models.dit import DiT

    model = DiT(width=16, depth=2, heads=2, grid=(1, 2), mixer={"name": "softmax", "mask": mask})
    x, t = jnp.ones((1, 4, 2, 3)), jnp.zeros((1, 4), jnp.int32)
    context = jnp.ones((1, 2, 5))
    params = disturbed(model.init(jax.random.key(0), x, t, context))
    with pytest.raises(AssertionError, match="leaks back"):
        laws.causality(lambda x, _: model.apply(params, x, t, context), x)
    _, state = model.apply(params, x, t, context)
    with pytest.raises(ValueError, match="only causal attention can continue a stream"):
        model.apply(params, x, t, None, state)


def disturbed(params):
    """Parameters off their zero initialisation, so that every path carries a signal."""
    leaves, tree = jax.tree.flatten(params)
    rngs = jax.random.split(jax.random.key(9), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(rng, leaf.shape) for leaf, rng in zip(leaves, rngs)]
    return jax.tree.unflatten(tree, noisy)


@pytest.mark.parametrize("name", ["softmax", "alibi"])
@pytest.mark.parametrize("window", [0, -1])
def test_a_frame_that_does_not_see_itself_is_refused(name, window):
    """Where no key is seen, softmax sees all of them alike, those of the future too."""
    mixer = MIXERS[name](width=16, heads=2, window=window)
    x = jax.ShapeDtypeStruct((1, 3, 1, 16), jnp.float32)
    with pytest.raises(UserError, match=f"window={window}: .* use 1 or more"):
        jax.eval_shape(mixer.init, jax.random.key(0), x)


@pytest.mark.parametrize("window, sinks", [(5, 0), (4, 2), (2, 1), (None, 0)])
def test_cache_remembers_what_the_mask_allows(window, sinks):
    frames = 11
    k = jnp.arange(frames, dtype=jnp.float32).reshape(1, frames, 1, 1, 1)
    nothing = jnp.zeros((1, 0, 1, 1))
    state = cache.start(nothing, nothing, 1)
    allow = masks.causal(window, sinks)
    for first in range(frames):
        state = cache.append(
            state, k[:, first : first + 1], k[:, first : first + 1], window=window, sinks=sinks
        )
        held = {int(f): float(v) for f, v in zip(state.frame_S, state.k_BSNAK[0, :, 0, 0, 0])}
        held.pop(int(masks.EMPTY), None)
        assert all(value == frame for frame, value in held.items())
        needed = {past for past in range(first + 1) if allow(np.int32(first + 1), np.int32(past))}
        assert needed <= set(held)
        assert window is None or state.frame_S.shape == (sinks + window - 1,)
    assert int(state.length) == frames
