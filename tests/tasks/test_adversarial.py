"""Adversarial losses against closed forms, and a tokenizer that is trained with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvid.errors import UserError
from jaxvid.models.discriminator import PatchDiscriminator, StyleDiscriminator
from jaxvid.tasks import adversarial, tokenizer
from jaxvid.tasks.adversarial import Adversary
from jaxvid.tasks.tokenizer import Task
from jaxvid.training.optim import make_optimizer
from tests.tasks.test_tokenizer import batch, fields
from tests.training import toy

OPTIONS = dict(kind="patch", width=8, loss="hinge", image=0.5, video=1.0, start=0, adaptive=False)
OPTIONS |= dict(r1=0.0, lecam=0.0, feature_matching=0.0)
rng = np.random.default_rng(0)


def test_losses_are_their_closed_forms():
    real, fake = rng.standard_normal((2, 4, 5))
    discriminator, generator = adversarial.LOSSES["hinge"]
    wanted = np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()
    np.testing.assert_allclose(discriminator(real, fake), wanted, rtol=1e-5)
    np.testing.assert_allclose(generator(fake), -fake.mean(), rtol=1e-5)
    discriminator, generator = adversarial.LOSSES["non_saturating"]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    wanted = -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean()
    np.testing.assert_allclose(discriminator(real, fake), wanted, rtol=1e-5)
    np.testing.assert_allclose(generator(fake), -np.log(sigmoid(fake)).mean(), rtol=1e-5)
    average = {"real": 0.3, "fake": -0.2}
    wanted = np.maximum(real + 0.2, 0) ** 2, np.maximum(0.3 - fake, 0) ** 2
    np.testing.assert_allclose(
        adversarial.lecam(real, fake, average), sum(x.mean() for x in wanted), rtol=1e-5
    )


def test_gradient_penalty_of_a_linear_discriminator():
    weight_XN = rng.standard_normal((12, 3))
    real = rng.standard_normal((4, 2, 2, 3))
    penalty = adversarial.gradient_penalty(lambda x: x.reshape(4, -1) @ weight_XN, real)
    np.testing.assert_allclose(penalty, np.square(weight_XN.mean(1)).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "module", [PatchDiscriminator(width=8), StyleDiscriminator(width=16)], ids=["patch", "style"]
)
@pytest.mark.parametrize("shape", [(2, 12, 20, 3), (2, 5, 12, 12, 3), (2, 17, 24, 16, 3)])
def test_discriminators_treat_samples_independently(module, shape):
    """By shape at any size; in numbers, a sample's logits are its own."""
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
    logits, features = jax.eval_shape(module.apply, params, jnp.zeros(shape))
    assert logits.shape[0] == 2 and logits.dtype == jnp.float32 and len(features) >= 2
    assert (logits.ndim == 1) == isinstance(module, StyleDiscriminator)
    if len(shape) == 5:
        return
    x = rng.standard_normal(shape).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), x)
    apply = jax.jit(lambda x: module.apply(params, x)[0])
    other = apply(np.concatenate([x[:1], -x[1:]]))
    np.testing.assert_array_equal(other[0], apply(x)[0])
    assert np.abs(other[1] - apply(x)[1]).max() > 1e-3


@pytest.fixture(scope="module")
def pictures():
    """(adversary with all regularizers, its params, real and fake pictures, extra)."""
    options = OPTIONS | dict(r1=0.1, lecam=0.1, feature_matching=0.5, video=0.0)
    adversary = Adversary(**options)
    real, fake = rng.uniform(-1, 1, (2, 2, 8, 8, 3)).astype(np.float32)
    shapes = {"image": (1, 8, 8, 3), "video": (1, 5, 8, 8, 3)}
    params, extra = jax.jit(lambda key: adversary.init(key, shapes))(jax.random.key(0))
    assert set(params) == {"image"}  # a weight of 0 has no discriminator
    return adversary, params, {"image": real}, {"image": fake}, extra


def test_each_side_moves_by_its_own_loss_alone(pictures):
    adversary, params, real, fake, extra = pictures

    def total(params, real, fake):
        loss, _, _ = adversary.discriminator_loss(params, real, fake, extra)
        return loss + generator(fake, params, real)

    def alone(params):
        return adversary.discriminator_loss(params, real, fake, extra)[0]

    def generator(fake, params=params, real=real):
        found = adversary.generator_loss(params, real, fake)
        return found.by_kind["image"] + found.feature_matching

    by_params, by_real, by_fake = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(params, real, fake)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, by_params, jax.jit(jax.grad(alone))(params))
    jax.tree.map(close, by_fake, jax.jit(jax.grad(generator))(fake))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(by_fake))
    np.testing.assert_array_equal(by_real["image"], 0)


def test_feature_matching_is_the_mean_difference_of_activations(pictures):
    adversary, params, real, fake, _ = pictures
    apply = jax.jit(adversary.module.apply)
    pairs = zip(*(apply({"params": params["image"]}, x["image"])[1] for x in (real, fake)))
    wanted = np.mean([np.abs(a - b).mean() for a, b in pairs])
    found = jax.jit(adversary.generator_loss)(params, real, fake)
    np.testing.assert_allclose(found.feature_matching, wanted, rtol=1e-5)
    without = jax.jit(Adversary(**OPTIONS).generator_loss)(params, real, fake)
    np.testing.assert_allclose(without.by_kind["image"], found.by_kind["image"], rtol=1e-6)
    assert without.feature_matching == 0 < found.feature_matching


def test_running_means_of_the_logits(pictures):
    adversary, params, real, fake, extra = pictures
    _, metrics, after = jax.jit(adversary.discriminator_loss)(params, real, fake, extra)
    for side in ("real", "fake"):
        np.testing.assert_allclose(after["image"][side], 0.01 * metrics[f"image_{side}"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "joint"])
def test_a_run_stays_finite_and_each_branch_moves(kind):
    """Images alone, and both kinds; no discriminator moves before the start."""
    changes = {"image": {"frames": 1}, "joint": {}}[kind]
    gan = OPTIONS | dict(start=2, lecam=0.1, feature_matching=1.0)
    gan |= dict(adaptive=kind == "joint", r1=0.1 if kind == "joint" else 0.0)
    task = Task(**fields("quantizer=kl", **changes), gan=gan)
    data = batch()
    data["video"] = data["video"][:, : task.frames]
    params, extra = jax.jit(task.init)(jax.random.key(0), data)
    wanted = {"image": {"image"}, "joint": {"image", "video"}}[kind]
    assert set(params["discriminator"]) == wanted
    optim = toy.config(optim__lr=1e-2, optim__weight_decay=0.0).optim
    optim.discriminator = {"lr": 1e-3, "b1": 0.5}
    tx, _ = make_optimizer(optim, 10)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, extra, number):
        def loss(params):
            key = jax.random.fold_in(jax.random.key(1), number)
            return task.loss(params, data, key, step=number, frozen={}, extra=extra)

        grads, (metrics, extra, _) = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state, extra, metrics

    before = params
    for number in range(6):
        params, state, extra, metrics = step(params, state, extra, number)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, extra, metrics)))
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, before)
        by_path = jax.tree.leaves_with_path(moved["discriminator"])
        # The two sides of a hinge cancel in the last bias.
        is_moved = [move > 0 for path, move in by_path if "kernel" in str(path)]
        assert set(is_moved) == {number >= 2}
        assert (metrics["discriminator"] != 0) == (number >= 2)
    assert (metrics["adaptive"] == 1) == (kind != "joint")


@pytest.mark.slow
def test_the_adaptive_weight_compares_the_gradients_of_the_last_layer():
    """By differentiating the whole network in its last layer, in place of the shortcut."""
    gan = OPTIONS | dict(adaptive=True, video=0.3)
    task = Task(**fields("quantizer=fsq", images=0.0), gan=gan)
    data = batch(1)
    params, extra = jax.jit(task.init)(jax.random.key(0), data)

    def run(params):
        key = jax.random.key(1)
        return task.loss(params, data, key, step=0, frozen={}, extra=extra)[1][0]

    def of_last(name):
        def value(last):
            return run({**params, "network": {**params["network"], "pixels": last}})[name]

        return jax.grad(value)(params["network"]["pixels"])

    @jax.jit
    def weights():
        norms = [
            jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(of_last(name))))
            for name in ("error", "generator")
        ]
        return run(params)["adaptive"], norms[0] / (norms[1] + 1e-4)

    found, wanted = weights()
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_the_generator_loss_is_linear_in_its_weight():
    """The adaptive weight is of unweighted losses, or it would cancel their weights.

    Feature matching has its own weight and remains at a weight of 0.
    """
    task = Task(**fields(), gan=OPTIONS | dict(adaptive=True, feature_matching=0.5))
    guesses, parts = (
        [x[:, :3], x[:, 3:]] for x in rng.uniform(-1, 1, (2, 1, 4, 8, 8, 3)).astype(np.float32)
    )
    shapes = {"video": (1, 3, 8, 8, 3), "image": (1, 8, 8, 3)}
    discriminators, extra = jax.jit(lambda key: task.adversary.init(key, shapes))(jax.random.key(0))

    def distance(guesses):
        return sum(jnp.square(a - b).mean() for a, b in zip(guesses, parts)), {}

    def last_layer_grad_norm(loss):
        return optax.tree.norm(jax.grad(loss)(guesses))

    @jax.jit
    def term(weight):
        task.adversary.weights = {"image": weight, "video": 2 * weight}
        params = {"discriminator": discriminators, "verdicts": extra}
        total, metrics, _ = task._adversarial_loss(
            params, guesses, parts, 0, last_layer_grad_norm, distance
        )
        return total - metrics["discriminator"]

    none, once, ten = term(0.0), term(0.5), term(5.0)
    assert none > 1e-2 and abs(once - none) > 1e-3
    np.testing.assert_allclose(ten - none, 10 * (once - none), rtol=1e-3)


def test_clips_of_one_frame_count_as_images():
    clips, images = np.zeros((2, 1, 4, 4, 3)), np.ones((3, 1, 4, 4, 3))
    found = tokenizer._by_kind([clips, images])
    assert set(found) == {"image"}
    np.testing.assert_array_equal(found["image"].mean((1, 2, 3)), [0, 0, 1, 1, 1])


def test_width_follows_the_longer_side_of_images_and_clips():
    module = StyleDiscriminator(width=512)
    for shape in ((1, 256, 64, 3), (1, 64, 256, 3), (1, 2, 256, 64, 3), (1, 2, 64, 256, 3)):
        params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))["params"]
        assert params["in"]["kernel"].shape[-1] == 16384 // 256


@pytest.mark.parametrize(
    "gan, changes, words",
    [
        ({"kind": "vqgan"}, {}, "^gan.kind='vqgan'"),
        ({"loss": "wgan"}, {}, "^gan.loss='wgan'"),
        ({"r1": -1.0}, {}, "^gan.r1=-1.0"),
        ({"lecam": np.nan}, {}, "^gan.lecam=nan"),
        ({"width": 4}, {}, "^gan.width=4"),
        ({"image": 0.0}, {"frames": 1}, "^gan.image=0.0: leaves no discriminator"),
        ({"video": 0.0}, {"images": 0.0}, "^gan.video=0.0: leaves no discriminator"),
        ({"image": 0.0, "video": 0.0}, {}, "^gan.image=0.0: leaves no discriminator"),
    ],
)
def test_bad_settings_are_refused_in_one_line(gan, changes, words):
    with pytest.raises(UserError, match=words):
        Task(**fields(**changes), gan=OPTIONS | gan)
