"""Quantizers against published numbers, brute force, closed forms, and themselves on 4 devices."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.layers.quantize import BSQ, FSQ, KL, LFQ, VQ
from jaxvid.layers.quantize.vq import rotation

# Three vectors with their codes by vector-quantize-pytorch 1.32.
Z = np.array([(-3, -1, -0.4, -0.05), (0, 0.1, 0.6, 2.5), (1.5, -2, 0.3, -0.7)], np.float32)

QUANTIZERS = {
    "vq": VQ(codes=16, channels=4),
    "vq_gradient": VQ(codes=16, channels=4, ema=0, normalize=False),
    "vq_rotation": VQ(codes=16, channels=4, estimator="rotation"),
    "fsq": FSQ(levels=(8, 5, 3)),
    "lfq": LFQ(channels=5, group=2, sharpness=1.0),
    "bsq": BSQ(channels=5, sharpness=1.0),
}


@functools.partial(jax.jit, static_argnums=0)
def _run(quantizer, z, codebook):
    return quantizer(z, codebook)


@functools.partial(jax.jit, static_argnums=0)
def _update(quantizer, codebook, z, ids, seed):
    return quantizer.update(codebook, z, ids, jax.random.key(seed))


def run(quantizer, z, codebook=None):
    """(z_q, ids, aux) in numpy, by one compilation per quantizer and shape."""
    return jax.device_get(_run(quantizer, z, codebook))


def update(*arguments):
    return jax.device_get(_update(*arguments))


def start(quantizer):
    """The codebook at the start, trained and carried parts together."""
    trained, carried = jax.jit(quantizer.init)(jax.random.key(0))
    return jax.device_get({**trained, **carried})


def tokens(quantizer, shape=(3, 7)):
    rng = np.random.default_rng(1)
    return rng.standard_normal((*shape, quantizer.features), np.float32)


def test_fsq_has_the_published_codes():
    quantizer = FSQ(levels=(8, 5, 5, 5), dialect="vq_pytorch")
    z_q, ids, aux = run(quantizer, Z)
    np.testing.assert_allclose(
        z_q, [(-1, -1, -0.5, 0), (0, 0, 0.5, 1), (0.75, -1, 0.5, -0.5)], atol=1e-6
    )
    assert ids.tolist() == [440, 940, 327]
    assert quantizer.size == 1000 and aux["loss"] == 0


def test_fsq_ids_are_exact_up_to_the_limit_of_int32():
    quantizer = FSQ(levels=(8,) * 9 + (16,))
    ends = np.array([[-6] * 10, [6] * 10], np.float32)
    z_q, ids, aux = run(quantizer, np.concatenate([ends, 3 * tokens(quantizer, (400,))]))
    assert quantizer.size == 2**31 and ids[:2].tolist() == [0, 2**31 - 1]
    assert (ids[2:] > 2**29).any() and (ids % 8 > 0).any(), "beyond the integers of float32"
    np.testing.assert_array_equal(jax.jit(quantizer.lookup)(ids), z_q)
    np.testing.assert_allclose(aux["usage"], 402 / 2**31, rtol=1e-3)
    assert aux["dead"] == np.float32(2.0**31 - 402)


def test_fsq_reaches_every_level_and_no_other():
    for dialect in ("paper", "vq_pytorch"):
        quantizer = FSQ(levels=(8, 5, 3), dialect=dialect)
        grid = np.linspace(-6, 6, 61, dtype=np.float32)
        z = np.stack(np.meshgrid(grid, grid, grid), -1).reshape(-1, 3)
        z_q, ids, aux = run(quantizer, z)
        assert sorted(set(ids.tolist())) == list(range(120))
        assert aux["usage"] == 1 and aux["dead"] == 0
        assert np.abs(z_q).max() == 1
        around_zero = np.array([[-0.02] * 3, [0.02] * 3], np.float32)
        np.testing.assert_array_equal(run(quantizer, around_zero)[0], 0)


@pytest.mark.parametrize(
    "quantizer, entropy, diversity, commitment",
    [(LFQ, 1.22185, 2.188554, 0.942708), (BSQ, 2.403343, 2.69516, 0.136541)],
)
def test_binary_codes_have_the_published_losses(quantizer, entropy, diversity, commitment):
    options = dict(channels=4, sharpness=1.0, group=4)
    _, ids, aux = run(quantizer(**options), Z)
    assert ids.tolist() == [0, 7, 10]
    np.testing.assert_allclose(aux["token_entropy"], entropy, atol=2e-5)
    np.testing.assert_allclose(aux["batch_entropy"], diversity, atol=2e-5)
    for term, wanted in (
        (dict(entropy=0.0, commitment=1.0), commitment),
        (dict(entropy=1.0, diversity=2.0, commitment=0.0), entropy - 2 * diversity),
    ):
        loss = run(quantizer(**options, **term), Z)[2]["loss"]
        np.testing.assert_allclose(loss, wanted, atol=5e-5)


def test_entropies_by_brute_force():
    """The softmax over the matrix of tokens times codes."""
    z = np.asarray(tokens(QUANTIZERS["lfq"], (40,)))
    codes = np.array(list(itertools.product((-1, 1), repeat=5)), np.float32)

    def entropies(bits):
        p = np.exp(2 * z[:, bits] @ np.unique(codes[:, bits], axis=0).T)
        p /= p.sum(1, keepdims=True)
        mean = p.mean(0)
        return -(p * np.log(p)).sum(1).mean(), -(mean * np.log(mean)).sum()

    for group, cuts in ((5, [range(5)]), (2, [(0, 1), (2, 3), (4,)])):
        aux = run(LFQ(channels=5, group=group, sharpness=1.0), z)[2]
        exact = sum(entropies(np.array(bits))[1] for bits in cuts)
        np.testing.assert_allclose(aux["batch_entropy"], exact, rtol=1e-5)
        np.testing.assert_allclose(aux["token_entropy"], entropies(np.arange(5))[0], rtol=1e-5)


def test_entropy_of_underflowed_codes_has_a_finite_gradient():
    """The probability of all codes but one is 0 in float32."""
    z_LZ = jnp.array([[3.0, -2.0, 1.0], [3.0, -2.0, 1.1]])
    quantizer = LFQ(channels=3, sharpness=100.0)
    loss, grad_LZ = jax.jit(jax.value_and_grad(lambda z: quantizer(z)[2]["loss"]))(z_LZ)
    np.testing.assert_allclose(loss, 0.25 * jnp.square(z_LZ - jnp.sign(z_LZ)).mean(), rtol=1e-6)
    np.testing.assert_allclose(grad_LZ, 0.5 * (z_LZ - jnp.sign(z_LZ)) / z_LZ.size, atol=1e-6)


def test_no_array_is_as_large_as_tokens_times_codes():
    quantizer = LFQ(channels=18)
    z = jax.ShapeDtypeStruct((4096, 18), jnp.float32)
    memory = jax.jit(jax.grad(lambda z: quantizer(z)[2]["loss"])).lower(z).compile()
    assert memory.memory_analysis().temp_size_in_bytes < 64 * 4096 * 18 * 4


@pytest.mark.parametrize("name", QUANTIZERS)
def test_lookup_usage_and_gradients(name):
    quantizer = QUANTIZERS[name]
    codebook, z = start(quantizer), tokens(quantizer)
    z_q, ids, aux = run(quantizer, z, codebook)
    assert z_q.shape == (3, 7, quantizer.channels) and ids.shape == (3, 7)
    assert ids.dtype == jnp.int32 and ids.min() >= 0 and ids.max() < quantizer.size
    np.testing.assert_array_equal(jax.jit(quantizer.lookup)(ids, codebook), z_q)
    share = np.unique(ids, return_counts=True)[1] / ids.size
    np.testing.assert_allclose(aux["perplexity"], np.exp(-(share * np.log(share)).sum()), rtol=1e-5)
    np.testing.assert_allclose(aux["usage"], share.size / quantizer.size, rtol=1e-6)
    assert aux["dead"] == quantizer.size - share.size

    weight = tokens(quantizer, z.shape[:-1])
    grads = jax.jit(jax.grad(lambda z: (quantizer(z, codebook)[0] * weight).sum()))(z)
    assert np.isfinite(grads).all() and (np.abs(grads).max((0, 1)) > 0).all()
    if name in ("vq_gradient", "lfq"):  # no function precedes the straight-through estimator
        np.testing.assert_allclose(grads, weight, rtol=1e-6)


@pytest.mark.parametrize("name", ["fsq", "lfq", "bsq", "kl"])
def test_protocol_without_a_codebook(name):
    quantizer = KL(channels=3) if name == "kl" else QUANTIZERS[name]
    z = tokens(quantizer)
    assert quantizer.init(jax.random.key(0)) == ({}, {})
    assert quantizer(z)[0].shape == (3, 7, quantizer.channels)
    assert quantizer.update({}, z, quantizer(z)[1], jax.random.key(0)) == {}
    assert hash(quantizer) == hash(dataclasses.replace(quantizer))
    if name == "kl":
        assert quantizer.size == 0 and quantizer(z)[1] is None
        with pytest.raises(TypeError, match="KL has no codes"):
            quantizer.lookup(None)


def test_the_nearest_code_is_found_and_the_first_of_equals():
    rng = np.random.default_rng(0)
    for normalize in (True, False):
        z_LZ = rng.standard_normal((50, 4), np.float32)
        code_VZ = np.tile(rng.standard_normal((6, 4), np.float32), (2, 1))
        if normalize:
            code_VZ /= np.linalg.norm(code_VZ, axis=1, keepdims=True)
        quantizer = VQ(codes=12, channels=4, normalize=normalize)
        _, ids_L, _ = run(quantizer, z_LZ, {"code_VZ": code_VZ})
        if normalize:
            z_LZ /= np.linalg.norm(z_LZ, axis=1, keepdims=True)
        distance_LV = np.linalg.norm(z_LZ[:, None] - code_VZ, axis=-1)
        np.testing.assert_array_equal(ids_L, distance_LV.argmin(axis=1))


def test_rotation_keeps_angles_between_token_code_and_gradient():
    """The gradient g of the code is |e| / |z| R^T g at the token."""
    z, e, g = np.random.default_rng(3).standard_normal((3, 5, 4), np.float32)
    np.testing.assert_array_equal(jax.jit(rotation)(z, e), e)
    grad = jax.jit(jax.grad(lambda z: (rotation(z, e) * g).sum()))(z)

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    np.testing.assert_allclose(cosine(grad, z), cosine(g, e), atol=1e-5)
    scale = np.linalg.norm(e, axis=-1) / np.linalg.norm(z, axis=-1)
    np.testing.assert_allclose(
        np.linalg.norm(grad, axis=-1), scale * np.linalg.norm(g, axis=-1), rtol=1e-5
    )


def test_rotation_of_a_token_without_direction_is_straight_through():
    """A rotation would divide by its length."""
    z = np.array([[0.0, 0.0], [1e-5, 0.0], [0.0, -2.0]], np.float32)
    e = np.array([[1.0, 0.0], [0.0, 1.0], [4.0, 0.0]], np.float32)
    g = np.array([[1.0, 2.0], [3.0, -1.0], [1.0, 0.5]], np.float32)
    grad = jax.jit(jax.grad(lambda z: (rotation(z, e) * g).sum()))(z)
    np.testing.assert_array_equal(grad[:2], g[:2])
    assert np.abs(grad[2] - g[2]).max() > 1, "a token with a direction is rotated"


@pytest.mark.parametrize("normalize", [True, False])
def test_ema_by_hand(normalize):
    quantizer = VQ(codes=5, channels=3, ema=0.8, normalize=normalize)
    z = np.asarray(tokens(quantizer, (30,)))
    before = {name: np.asarray(x) for name, x in start(quantizer).items()}
    unit = z / np.linalg.norm(z, axis=1, keepdims=True) if normalize else z
    gap = np.square(unit[:, None] - before["code_VZ"]).sum(-1)
    count, total = np.ones(5), before["code_VZ"].copy()
    ids = gap.argmin(1)
    for k in range(5):
        count[k] = 0.8 * count[k] + 0.2 * (ids == k).sum()
        total[k] = 0.8 * total[k] + 0.2 * unit[ids == k].sum(0)
    smooth = (count + 1e-5) / (count.sum() + 5e-5) * count.sum()
    code = total / smooth[:, None]
    if normalize:
        code /= np.linalg.norm(code, axis=1, keepdims=True)

    _, found, aux = run(quantizer, z, before)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_allclose(aux["loss"], 0.25 * gap.min(1).mean() / 3, rtol=1e-5)
    after = update(quantizer, before, z, found, 0)
    np.testing.assert_allclose(after["count_V"], count, rtol=1e-5)
    np.testing.assert_allclose(after["sum_VZ"], total, atol=1e-5)
    np.testing.assert_allclose(after["code_VZ"], code, atol=1e-5)


def test_update_is_the_same_on_one_device_and_on_four():
    quantizer = VQ(codes=6, channels=4, ema=0.5, restart=2.0, kmeans=2)
    z = tokens(quantizer, (8, 6))

    @jax.jit
    def two_updates(z):
        codebook = start(quantizer)
        for step in range(2):
            _, ids, _ = run(quantizer, z, codebook)
            codebook = quantizer.update(codebook, z, ids, jax.random.key(step))
        return codebook

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    alone, shared = two_updates(z), two_updates(jax.device_put(z, rows))
    for name in alone:
        np.testing.assert_allclose(shared[name], alone[name], atol=1e-5, err_msg=name)


def test_restart_moves_dead_codes_to_tokens():
    quantizer = VQ(codes=8, channels=2, ema=0.5, restart=1.0, normalize=False)
    z = np.array([[1.0, 0.0], [0.9, 0.1]] * 20, np.float32)
    codebook = start(quantizer)
    codebook["code_VZ"] = np.array([[1, 1]] + [[50, 50]] * 7, np.float32)
    _, ids, before = run(quantizer, z, codebook)
    assert before["dead"] == 7
    for step in range(2):
        codebook = update(quantizer, codebook, z, ids, step)
        _, ids, _ = run(quantizer, z, codebook)
    gap = np.square(codebook["code_VZ"][1:, None] - z).sum(-1).min(1)
    np.testing.assert_allclose(gap, 0, atol=1e-10)
    assert (codebook["count_V"] >= 1).all()


def test_k_means_finds_the_clusters():
    quantizer = VQ(codes=12, channels=2, normalize=False, kmeans=8)
    centres = np.array([(0, 0), (5, 0), (0, 5)], np.float32)
    z = centres[np.arange(60) % 3] + 0.1 * np.random.default_rng(0).standard_normal(
        (60, 2), np.float32
    )
    codebook = start(quantizer)
    _, ids, _ = run(quantizer, z, codebook)
    codebook = update(quantizer, codebook, z, ids, 4)
    z_q, ids, aux = run(quantizer, z, codebook)
    assert np.abs(z_q - z).max() < 0.5 and aux["usage"] > 0.5
    later = update(quantizer, codebook, z, ids, 5)
    assert np.abs(later["code_VZ"] - codebook["code_VZ"]).max() < 0.1, "k-means runs only once"


def test_codes_trained_by_gradient_carry_nothing():
    quantizer = QUANTIZERS["vq_gradient"]
    trained = start(quantizer)
    z = tokens(quantizer)
    z_q, ids, _ = run(quantizer, z, trained)
    assert quantizer.update(trained, z, ids, None) == {} and set(trained) == {"code_VZ"}
    grads = jax.jit(jax.grad(lambda trained: quantizer(z, trained)[2]["loss"]))(trained)["code_VZ"]
    wanted = np.zeros_like(grads)
    np.add.at(wanted, ids, 2 / z.size * (z_q - z))
    np.testing.assert_allclose(grads, wanted, atol=1e-6)


def test_kl_has_the_closed_form_and_its_draws_the_moments():
    quantizer = KL(channels=2, weight=0.5)
    z = np.array([[1.0, -2.0, 0.0, np.log(4.0)]], np.float32)
    z_q, ids, aux = run(quantizer, z)
    assert ids is None
    np.testing.assert_array_equal(z_q, [[1, -2]])
    kl = 0.5 * (1 + (4 + 4 - 1 - np.log(4)))
    np.testing.assert_allclose([aux["kl"], aux["loss"]], [kl, kl / 2], rtol=1e-6)
    many = np.repeat(z, 20_000, axis=0)
    drawn = np.asarray(jax.jit(lambda z: quantizer(z, rng=jax.random.key(0))[0])(many))
    np.testing.assert_allclose(drawn.mean(0), [1, -2], atol=0.05)
    np.testing.assert_allclose(drawn.std(0), [1, 2], atol=0.05)


def test_kl_sums_over_all_tokens_of_a_sample():
    z = np.random.default_rng(2).standard_normal((3, 5, 2, 8)).astype(np.float32)
    mean, logvar = np.split(z.astype(np.float64), 2, axis=-1)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
    aux = run(KL(channels=4), z)[2]
    np.testing.assert_allclose(aux["kl"], kl.sum() / 3, rtol=1e-5)
    np.testing.assert_allclose(aux["loss"], 1e-6 * kl.sum() / 3, rtol=1e-5)


@pytest.mark.parametrize("name", [*QUANTIZERS, "kl"])
def test_no_tokens_cost_nothing_and_use_no_code(name):
    """A piece of a stream may hold no frames."""
    quantizer = KL(channels=3) if name == "kl" else QUANTIZERS[name]
    codebook = start(quantizer)
    for shape in ((3, 0, 7), (0, 2)):
        z_q, ids, aux = run(quantizer, np.zeros((*shape, quantizer.features), np.float32), codebook)
        assert z_q.shape == (*shape, quantizer.channels)
        assert aux.pop("dead", quantizer.size) == quantizer.size
        assert set(map(float, aux.values())) == {0.0}
        if name != "kl":
            assert quantizer.lookup(ids, codebook).shape == z_q.shape
    if name == "vq":
        after = quantizer.update(codebook, np.zeros((3, 0, 4)), ids, jax.random.key(0))
        assert after.keys() == codebook.keys()
        for key in codebook:
            np.testing.assert_array_equal(after[key], codebook[key])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_ids_of_no_code_give_no_latent(name):
    quantizer = QUANTIZERS[name]
    codebook, last = start(quantizer), quantizer.size - 1
    for wrong in (-1, last + 1):
        ids = np.array([0, wrong, last])
        with pytest.raises(UserError, match=f"^ids={wrong}: must lie between 0 and {last}$"):
            quantizer.lookup(ids, codebook)
        z_q = jax.jit(quantizer.lookup)(ids, codebook)
        np.testing.assert_array_equal(np.isnan(z_q).any(-1), [False, True, False])
    with pytest.raises(UserError, match=r"^ids\.dtype='float32': must be whole numbers"):
        quantizer.lookup(np.zeros(2, np.float32), codebook)


@pytest.mark.parametrize("name", [*QUANTIZERS, "kl"])
def test_another_number_of_features_is_refused(name):
    quantizer = KL(channels=3) if name == "kl" else QUANTIZERS[name]
    codebook, features = start(quantizer), quantizer.features
    for other in (1, 2 * features):
        message = rf"^z.shape=\[2, {other}\]: z must have the features={features} of"
        with pytest.raises(UserError, match=message):
            quantizer(jnp.zeros((2, other)), codebook)


def test_levels_may_be_an_array():
    for levels in (np.array([8, 5, 3]), jnp.array([8, 5, 3]), [8, 5, 3]):
        assert FSQ(levels=levels) == FSQ(levels=(8, 5, 3))


def test_refusals():
    for quantizer, options, message in (
        (FSQ, {"levels": ()}, r"^levels=\(\): has no channel"),
        (FSQ, {"levels": (8, 2)}, r"^levels=\(8, 2\): 2 is not a whole number of at least 3"),
        (FSQ, {"levels": (8.5, 4)}, r"^levels=\(8.5, 4\): 8.5 is not a whole number"),
        (FSQ, {"levels": (8,) * 9 + (17,)}, "^levels=.* more codes than int32"),
        (FSQ, {"dialect": "mine"}, "^dialect='mine'"),
        (VQ, {"codes": 1}, "^codes=1"),
        (VQ, {"channels": 0}, "^channels=0"),
        (VQ, {"ema": 1.0}, "^ema=1.0"),
        (VQ, {"ema": 0.0, "restart": 1.0}, "^restart=1.0: needs .* restart=0 or ema=0.99"),
        (VQ, {"kmeans": -1}, "^kmeans=-1"),
        (VQ, {"estimator": "gumbel"}, "^estimator='gumbel'"),
        (VQ, {"commitment": np.nan}, "^commitment=nan"),
        (LFQ, {"channels": 40}, "^channels=40"),
        (LFQ, {"group": 0}, "^group=0"),
        (LFQ, {"sharpness": 0.0}, "^sharpness=0.0"),
        (BSQ, {"sharpness": np.nan}, "^sharpness=nan"),
        (LFQ, {"diversity": -1.0}, "^diversity=-1.0"),
        (KL, {"channels": 0}, "^channels=0"),
        (KL, {"weight": np.inf}, "^weight=inf"),
    ):
        with pytest.raises(UserError, match=message):
            quantizer(**options)
