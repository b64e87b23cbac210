import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from jaxvid.errors import UserError
from jaxvid.training.optim import decayed, make_optimizer, make_schedule


@pytest.mark.parametrize(
    "field, value",
    [
        ("name", "adam"),
        ("schedule", "cosin"),
        *(("lr", value) for value in (0.0, -1.0, float("nan"), float("inf"))),
        ("muon_lr", 0.0),
        ("b1", 1.0),
        ("b2", -0.1),
        ("ema", 1.0),
        ("clip", float("nan")),
        ("weight_decay", float("inf")),
        ("warmup", -1),
        ("accumulate", 0),
    ],
)
def test_bad_values_are_one_line_naming_the_field(field, value):
    config = toy.config(**{f"optim__{field}": value})
    with pytest.raises(UserError, match=f"^{field}={value!r}: ") as error:
        make_optimizer(config.optim, config.steps)
    assert "\n" not in str(error.value)


def test_schedules():
    config = toy.config(optim__lr=1.0, optim__warmup=4).optim
    rates = [float(make_schedule(config, 12)(k)) for k in range(12)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75] + [1.0] * 9)
    config.schedule = "cosine"
    rates = np.array([float(make_schedule(config, 12)(k)) for k in range(13)])
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    expected = (1 + np.cos(np.pi * np.arange(9) / 8)) / 2
    np.testing.assert_allclose(rates[3:12], expected[:9], atol=1e-6)
    config.warmup = 0
    assert make_schedule(config, 12)(0) == 1.0
    config.warmup = 1000  # longer than the run: it only rises
    assert float(make_schedule(config, 12)(11)) == pytest.approx(12 / 1000, rel=1e-4)


def test_decay_spares_biases_norms_and_vectors():
    params = {
        "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "stacked_norm": {"scale": jnp.ones((3, 2)), "bias": jnp.ones((3, 2))},
        "token": jnp.ones(4),
    }
    mask = decayed(params)
    assert jax.tree.leaves_with_path(mask) and mask == {
        "dense": {"kernel": True, "bias": False},
        "stacked_norm": {"scale": False, "bias": False},
        "token": False,
    }
    config = toy.config(optim__weight_decay=0.1, optim__warmup=0, optim__lr=1.0).optim
    tx, _ = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.1, rtol=1e-6)
    assert not updates["stacked_norm"]["scale"].any() and not updates["dense"]["bias"].any()


def test_muon_orthogonalises_the_matrices_of_layers_and_leaves_the_rest_to_adamw():
    rng = np.random.default_rng(0)
    params = {
        "layers": {
            "q": {"kernel": rng.normal(size=(3, 32, 8)), "bias": rng.normal(size=(3, 8))},
            "up": {"kernel": rng.normal(size=(3, 8, 32))},
            "gate": {"kernel": rng.normal(size=(3, 8, 32))},
            "down": {"kernel": rng.normal(size=(3, 8, 32))},  # [out, in]
        },
        "head": {"kernel": rng.normal(size=(8, 8))},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    config = toy.config(optim__warmup=0, optim__clip=0.0, optim__schedule="constant").optim

    config.update(name="muon", lr=1e-3, muon_lr=0.5, weight_decay=0.0)

    def updates(tx):
        return tx.update(params, tx.init(params), params)[0]

    muon = updates(make_optimizer(config, 10)[0])
    nadam = updates(optax.nadamw(1e-3, b1=config.b1, b2=config.b2, weight_decay=0.0))
    for get in (lambda tree: tree["head"]["kernel"], lambda tree: tree["layers"]["q"]["bias"]):
        np.testing.assert_allclose(get(muon), get(nadam), rtol=1e-6)
    # Each layer of a stack by itself: singular values near 1, times lr and the square root of the
    # out-features to an in-feature, where these are more.
    for name, size in (("q", 0.5), ("up", 1.0), ("gate", 1.0), ("down", 0.5)):
        singular = np.linalg.svd(muon["layers"][name]["kernel"], compute_uv=False)
        assert singular.shape == (3, 8)
        assert 0.6 * size < singular.min() and singular.max() < 1.3 * size


def test_a_group_is_clipped_and_updated_by_its_own_fields():
    """The other branches are updated as without that section."""
    config = toy.config(optim__lr=1.0, optim__warmup=0, optim__weight_decay=0.0).optim
    rng = np.random.default_rng(0)
    names = ("network", "codebook", "discriminator")
    params = {name: {"kernel": rng.standard_normal((3, 4))} for name in names}
    grads = {name: {"kernel": 9 * rng.standard_normal((3, 4))} for name in names}

    def updates(config, params, grads):
        tx, _ = make_optimizer(config, 10)
        state = tx.init(params)
        for _ in range(3):
            found, state = tx.update(grads, state, params)
        return found

    def only(tree, *names):
        return {name: tree[name] for name in names}

    main, apart = ("network", "codebook"), ("discriminator",)
    wanted = updates(config, only(params, *main), only(grads, *main))
    own = toy.config(optim__lr=0.1, optim__warmup=0, optim__weight_decay=0.0, optim__b1=0.5).optim
    wanted |= updates(own, only(params, *apart), only(grads, *apart))
    config.discriminator = {"lr": 0.1, "b1": 0.5}
    jax.tree.map(np.testing.assert_array_equal, updates(config, params, grads), wanted)
    with pytest.raises(UserError, match=r"^discriminator\.lr=-1\.0: must be more than 0"):
        config.discriminator.lr = -1.0
        make_optimizer(config, 10)
