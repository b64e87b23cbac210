"""The DiT under the laws of a stream, at the size of the paper, and its rotary positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxvid.errors import UserError
from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.mixers import cache
from jaxvid.models.dit import ARRANGEMENTS, DiT
from tests import laws

# One mixer per kind of state: a cache of one size, a matrix, a matrix and pasts of convolutions.
MIXERS = [{"name": "softmax", "window": 3, "sinks": 1}, {"name": "linear"}, {"name": "gated_delta"}]
# Softmax in every second layer, of a matrix and of a network whose weights are the state.
HYBRIDS = [
    {"name": "gated_delta", "every": 2, "attention": {"window": 3}},
    {"name": "titans_lmm", "every": 2, "attention": {"window": 3, "sinks": 1}},
]
FRAMES = 7


def build(frames=FRAMES, **options):
    """(model, layer, x): the DiT as a stream layer that starts with a context."""
    model = DiT(width=16, heads=2, grid=(2, 1), input_skip=True, **options)
    rng = jax.random.key(0)
    x = jax.random.normal(rng, (1, frames, 2, 3))
    context = jax.random.normal(rng, (1, 3, 5))
    t = jnp.zeros((1, 1), jnp.int32)
    params = laws.disturbed(jax.jit(model.init)(rng, x[:, :1], t, context))

    def apply(params, x, state):
        # The timestep of a frame is a function of the frame, so a chunk needs only its frames.
        t = jnp.abs(x[:, :, 0, 0]) * 100
        return model.apply(params, x, t, context if state is None else None, state)

    return model, Partial(apply, params), x


@pytest.mark.slow
@pytest.mark.parametrize(
    "arrangement, mixer",
    [(arrangement, MIXERS[0]) for arrangement in ARRANGEMENTS]
    + [("joint", HYBRIDS[0]), ("factorised", HYBRIDS[1])],
)
def test_obeys_the_laws(arrangement, mixer):
    """Two layers with a window of 3 and a convolution over 2 frames see at least 5 frames back."""
    _, layer, x = build(arrangement=arrangement, depth=2, conv=2, mixer=mixer)
    laws.streaming(layer, x, [[1, 2, 4], [0, 1, 6]])
    laws.causality(layer, x, reach=6)
    laws.gradients(layer, x)


@pytest.mark.parametrize(
    "arrangement, mixer",
    [(arrangement, mixer) for arrangement in ARRANGEMENTS for mixer in MIXERS]
    + [("factorised", HYBRIDS[0]), ("joint", HYBRIDS[1])],
)
def test_streams_with_every_kind_of_state(arrangement, mixer):
    """The state keeps its shapes, even through a call of no frame."""
    every = mixer.get("every", 1)
    options = dict(depth=every, conv=3, mixer=mixer, scan=every > 1)
    _, layer, x = build(arrangement=arrangement, **options)

    @jax.jit
    def both(layer, x):
        y, whole = layer(x, None)
        _, start = layer(x[:, :0], None)
        first, early = layer(x[:, :2], start)
        later, late = layer(x[:, 2:], early)
        return y, jnp.concatenate([first, later], axis=1), (whole, early, late)

    y, cut, states = both(layer, x)
    assert np.abs(y).max() > 0.1
    np.testing.assert_allclose(cut, y, atol=1e-5)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in states]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize(
    "arrangement, mixer",
    [(arrangement, {"name": "linear"}) for arrangement in ARRANGEMENTS]
    + [pytest.param("joint", mixer, marks=pytest.mark.slow) for mixer in HYBRIDS],
)
def test_teacher_forcing_is_denoising_and_committing_frame_by_frame(arrangement, mixer):
    """Clean frames have timestep 0."""
    options = dict(arrangement=arrangement, depth=mixer.get("every", 1), conv=2, mixer=mixer)
    model, layer, x = build(10, **options)
    context = jax.random.normal(jax.random.key(0), (1, 3, 5))

    def times(noisy):
        return (jnp.abs(noisy[:, :, 0, 0]) * 100).astype(jnp.int32)

    def commit(params, x, state):
        t = jnp.zeros(x.shape[:2], jnp.int32)
        return model.apply(params, x, t, context if state is None else None, state)

    def denoise(params, x, state):
        start = context if state is None else None
        return model.apply(params, x, times(x), start, state)

    def forced(params, clean, noisy, state):
        start = context if state is None else None
        y_noisy, state = model.apply(params, noisy, times(noisy), start, state, clean)
        return 0 * y_noisy, y_noisy, state

    def silent_commit(params, x, state):
        y, state = commit(params, x, state)
        return 0 * y, state

    (params,) = layer.args
    pair = tuple(Partial(part, params) for part in (denoise, silent_commit))
    laws.teacher_forcing(pair, Partial(forced, params), x[:, :5], x[:, 5:], reach=5)


def test_the_network_of_the_paper_has_the_parameters_of_the_paper():
    """28 x 1152 x 16 heads, 32 latent tokens of 4 channels, 768 numbers in a context token."""
    model = DiT(width=1152, depth=28, heads=16, grid=(1, 32), qk_norm=False)
    shapes = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jnp.zeros((1, 16, 32, 4)),
        jnp.zeros((1, 16), jnp.int32),
        jnp.zeros((1, 77, 768)),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 671_864_836


def test_remat_and_separate_layers_change_no_result():
    x, t = jnp.ones((1, 3, 2, 3)), jnp.zeros((1, 3), jnp.int32)
    plain = DiT(width=16, depth=2, heads=2, grid=(2, 1))
    params = laws.disturbed(jax.jit(plain.init)(jax.random.key(0), x, t))

    def loss(params, **options):
        if not options.get("scan", True):
            model = dict(params["params"])
            stack = model.pop("layers")
            model |= {f"layer_{i}": jax.tree.map(lambda p, i=i: p[i], stack) for i in range(2)}
            params = {"params": model}
        return jnp.square(plain.clone(**options).apply(params, x, t)[0]).mean()

    def gradient(**options):
        return jax.tree.leaves(jax.jit(jax.grad(functools.partial(loss, **options)))(params))

    expected = gradient()
    for options in ({"remat": True}, {"scan": False}):
        for got, wanted in zip(gradient(**options), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_every_nth_layer_is_softmax_and_the_scan_of_groups_is_their_loop():
    """Four layers, of which the second and the fourth hold a cache."""
    x, t = jnp.ones((1, 3, 2, 3)), jnp.zeros((1, 3), jnp.int32)
    model = DiT(width=16, depth=4, heads=2, grid=(2, 1), mixer=HYBRIDS[0])
    params = laws.disturbed(jax.jit(model.init)(jax.random.key(0), x, t))["params"]
    y, (_, groups) = jax.jit(model.apply)({"params": params}, x, t)
    own = dict(params)
    stack = own.pop("layers")
    for i in range(4):
        own[f"layer_{i}"] = jax.tree.map(lambda p, i=i: p[i // 2], stack[f"layer_{i % 2}"])
    for options in ({"scan": False}, {"scan": False, "remat": True}):
        apply = jax.jit(model.clone(**options).apply)
        y_loop, (_, states) = apply({"params": own}, x, t)
        np.testing.assert_allclose(y_loop, y, atol=1e-6)
        assert [isinstance(state, cache.KVCache) for state in states] == [False, True] * 2
    assert groups[1].k_BSNAK.shape == (2, 1, 2, 2, 2, 8)
    y_remat, _ = jax.jit(model.clone(remat=True).apply)({"params": params}, x, t)
    np.testing.assert_allclose(y_remat, y, atol=1e-6)


def test_the_timestep_of_a_frame_modulates_that_frame():
    """Later frames see the change through the mixer; earlier ones do not."""
    model = DiT(width=16, depth=1, heads=2, grid=(2, 1))
    x, t = jnp.ones((1, 4, 2, 3)), jnp.full((1, 4), 500)
    params = laws.disturbed(jax.jit(model.init)(jax.random.key(0), x, t))
    apply = jax.jit(model.apply)
    y = apply(params, x, t)[0]
    changed = apply(params, x, t.at[0, 2].set(0))[0]
    np.testing.assert_array_equal(changed[:, :2], y[:, :2])
    assert (np.abs(changed - y)[0, 2:].max((1, 2)) > 0).all()


def test_options_that_cannot_work_are_refused_in_one_line():
    for field, value, words in (
        ("width", 0, "must be at least 1"),
        ("depth", 0, "must be at least 1"),
        ("conv", 0, "must be at least 1"),
        ("heads", -2, "must be at least 1"),
        ("heads", 3, "does not divide width=16 into even heads; use a divisor of 8"),
        ("mlp_ratio", 0.01, "leaves width=16 no hidden unit; use 4"),
        ("mlp_ratio", float("nan"), "must be a finite number"),
        ("arrangement", "mixed", "unknown; use one of joint, factorised"),
        ("mixer", {"name": "gla", "feature": "elu"}, "mixer.feature='elu': unknown; use one of"),
        ("mixer", {"name": "gla", "every": 1}, "mixer.every=1: must be at least 2"),
        ("mixer", {"name": "gla", "every": 2.0}, "mixer.every=2.0: must be "),
        ("mixer", {"name": "softmax", "every": 2}, "mixer.every=2: this mixer is attention in"),
        ("mixer", HYBRIDS[0] | {"attention": {"window": 0}}, "mixer.attention.window=0: must be"),
        ("mixer", {"name": "gla", "attention": {"window": 0}}, "mixer.attention.window=0: must"),
        ("mixer", HYBRIDS[0] | {"attention": {"local": 2}}, "mixer.attention.local=2: softmax has"),
        ("mixer", HYBRIDS[0] | {"attention": {"name": "gla"}}, "mixer.attention.name='gla': leave"),
        ("mixer", HYBRIDS[0] | {"attention": 4}, "mixer.attention=4: must be a section"),
        ("mixer", HYBRIDS[0], "depth=1: must be a multiple of mixer.every=2"),
        ("mixer", {"name": "lightning", "slopes": "1"}, "mixer.slopes='1': has 1 numbers; give 2"),
    ):
        line = words if field == "mixer" else f"{field}={value!r}: {words}"
        with pytest.raises(UserError, match=f"^{line}"):
            DiT(**{"width": 16, "depth": 1, "heads": 2, "grid": (1, 1), field: value})


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 4, 1, 12))

    def scores(first):
        angles = [rotary_angles(np.array([first + gap]), (2, 2), 12) for gap in (7, 0)]
        return jnp.einsum("BTNAK,BTMAK->BNM", rotate(q, angles[0]), rotate(k, angles[1]))

    near = scores(0)
    for first in (250, 5000, 10**6, 2**31 - 100):
        np.testing.assert_allclose(scores(first), near, atol=5e-5)
    assert np.abs(near[0] - near[0].T).max() > 1e-2


def test_cyclic_angles_make_distinct_whole_turns():
    """From one per cycle to one in two frames, evenly on a logarithmic scale; spare ones rest."""
    for cycle in (1, 2, 3, 7, 16, 33, 100, 1001):
        for size in (1, 2, 5, 16, 48):
            frame_T = np.arange(2 * cycle, dtype=np.int32)
            angle_TK = rotary_angles(frame_T, (1, 1), 2 * size, cycle)[:, 0]
            np.testing.assert_array_equal(angle_TK[:cycle], angle_TK[cycle:])
            assert (angle_TK >= 0).all() and (angle_TK < 2 * np.pi).all()
            turns_K = np.rint(angle_TK[1 % cycle] * cycle / (2 * np.pi)).astype(int)
            exact = 2 * np.pi * (np.outer(frame_T, turns_K) % cycle) / cycle
            np.testing.assert_allclose(angle_TK, exact, rtol=1e-6)
            used, count = turns_K[turns_K > 0], min(size, cycle // 2)
            assert len(set(used)) == len(used) == count and not turns_K[count:].any()
            if count:
                assert used[0] == 1 and used[-1] == (cycle // 2 if count > 1 else 1)
            late = np.array([2**31 - 1 - cycle, 2**31 - 1], np.int32)
            for xp in (np, jnp):
                found = np.asarray(rotary_angles(xp.asarray(late), (1, 1), 2 * size, cycle))[:, 0]
                np.testing.assert_array_equal(found, angle_TK[late % cycle])
    angle_K = rotary_angles(np.array([1]), (1, 1), 8, 1000)[0, 0]
    np.testing.assert_allclose(angle_K * 1000 / (2 * np.pi), [1, 8, 63, 500], rtol=1e-6)


def test_rotary_turns_each_axis_by_its_own_band():
    angle_TNK = rotary_angles(np.array([0, 3]), (2, 3), 12)
    assert angle_TNK.shape == (2, 6, 6)
    time, height, width = np.split(np.asarray(angle_TNK), 3, axis=-1)
    np.testing.assert_array_equal(time[1, :, 0], 3)
    np.testing.assert_array_equal(height[0, :, 0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(width[0, :, 0], [0, 1, 2, 0, 1, 2])
