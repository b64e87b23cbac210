"""The DiT under the laws of a stream, at the paper's size, and its positions beyond training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.mixers import MIXERS
from jaxvid.models.dit import DiT
from tests import laws
from tests.mixers.test_mixers import disturbed

ARRANGEMENTS = ("joint", "factorised")


def build(arrangement, frames=laws.FRAMES, scan=True, depth=2, **mixer):
    """(apply, params, x): the DiT as a stream layer, started from a context."""
    model = DiT(
        width=16,
        depth=depth,
        heads=2,
        grid=(2, 1),
        arrangement=arrangement,
        mixer={"name": "softmax"} | mixer,
        input_skip=True,
        scan=scan,
    )
    rng = jax.random.key(0)
    x = jax.random.normal(rng, (1, frames, 2, 3))
    context = jax.random.normal(rng, (1, 3, 5))
    params = disturbed(model.init(rng, x, jnp.zeros(x.shape[:2], jnp.int32), context))

    def apply(params, x, state):
        # A timestep that the frame itself carries, so that a chunk needs no more than its frames.
        t = jnp.abs(x[:, :, 0, 0]) * 100
        return model.apply(params, x, t, context if state is None else None, state)

    return apply, params, x


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("scan", [True, False])
def test_streaming(arrangement, scan):
    apply, params, x = build(arrangement, scan=scan, window=4, sinks=1)
    laws.streaming(functools.partial(apply, params), x)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", MIXERS)
def test_streaming_with_every_mixer(arrangement, name):
    """After a context, in one program, as little else is worth its compilation."""
    apply, params, x = build(arrangement, frames=5, scan=False, depth=1, name=name)

    @jax.jit
    def both(x):
        layer = functools.partial(apply, params)
        return laws.run(layer, x, [5]), laws.run(layer, x, [2, 3])

    whole, cut = both(x)
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(cut, whole, atol=1e-5)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_carries_a_state_of_one_shape_from_frame_to_frame(arrangement, name):
    """By shapes alone: a context, no frame, one frame, one more."""
    options = {"window": 2} if name in ("softmax", "alibi") else {}
    model = DiT(16, 2, 2, (2, 1), arrangement=arrangement, mixer={"name": name, **options})
    x, context = jnp.zeros((1, 1, 2, 3)), jnp.zeros((1, 3, 5))

    def stream(x, context):
        t = jnp.zeros((1, 1), jnp.int32)
        params = model.init(jax.random.key(0), x, t, context)
        _, state = model.apply(params, x[:, :0], t[:, :0], context)
        y, first = model.apply(params, x, t, None, state)
        return y, first, model.apply(params, x, t, None, first)[1]

    y, first, second = jax.eval_shape(stream, x, context)
    assert y.shape == x.shape
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(
        lambda x: (x.shape, x.dtype), second
    )


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_causality(arrangement):
    apply, params, x = build(arrangement, frames=5, window=None)
    laws.causality(functools.partial(apply, params), x, reach=5)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_gradients(arrangement):
    laws.gradients(*build(arrangement, frames=3, window=3))


def test_the_papers_network_has_the_papers_parameters():
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


def test_remat_and_layers_apart_change_no_result():
    x, t = jnp.ones((1, 3, 2, 3)), jnp.zeros((1, 3), jnp.int32)
    plain = DiT(width=16, depth=2, heads=2, grid=(2, 1))
    params = disturbed(plain.init(jax.random.key(0), x, t))

    def loss(params, **options):
        if not options.get("scan", True):
            model = dict(params["params"])
            stack = model.pop("layers")
            model |= {f"layer_{i}": jax.tree.map(lambda p, i=i: p[i], stack) for i in range(2)}
            params = {"params": model}
        return jnp.square(plain.clone(**options).apply(params, x, t)[0]).mean()

    def gradient(**options):
        return jax.tree.leaves(jax.jit(jax.grad(functools.partial(loss, **options)))(params))

    for options in ({"remat": True}, {"scan": False}):
        for got, wanted in zip(gradient(**options), gradient(), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_a_frame_is_modulated_by_its_own_timestep_alone():
    model = DiT(width=16, depth=1, heads=2, grid=(2, 1))
    x, t = jnp.ones((1, 4, 2, 3)), jnp.full((1, 4), 500)
    params = disturbed(model.init(jax.random.key(0), x, t))
    y = model.apply(params, x, t)[0]
    changed = model.apply(params, x, t.at[0, 2].set(0))[0]
    np.testing.assert_array_equal(changed[:, :2], y[:, :2])
    assert (np.abs(changed - y)[0, 2:].max((1, 2)) > 0).all()


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 4, 1, 12))

    def scores(first):
        angles = [rotary_angles(np.array([first + gap]), (2, 2), 12) for gap in (7, 0)]
        return jnp.einsum("BTNAK,BTMAK->BNM", rotate(q, angles[0]), rotate(k, angles[1]))

    near, far = scores(0), scores(5000)
    np.testing.assert_allclose(far, near, atol=5e-3)
    assert np.abs(near[0] - near[0].T).max() > 1e-2


def test_rotary_turns_each_axis_by_its_own_band():
    angle_TNK = rotary_angles(np.array([0, 3]), (2, 3), 12)
    assert angle_TNK.shape == (2, 6, 6)
    time, height, width = np.split(np.asarray(angle_TNK), 3, axis=-1)
    np.testing.assert_array_equal(time[1, :, 0], 3)
    np.testing.assert_array_equal(height[0, :, 0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(width[0, :, 0], [0, 1, 2, 0, 1, 2])
