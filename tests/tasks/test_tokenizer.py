"""The tokenizer task: its objective, its moving codebook, its scores, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tokenizer as config_file
from jaxvid import config as config_lib
from jaxvid import data
from jaxvid.data.source import Source
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.metrics import i3d, lpips
from jaxvid.runs import make_task
from jaxvid.tasks.tokenizer import Task


def fields(options="", **changes):
    """The config's task at the size of a test; changes are dotted fields, dots written as __."""
    config = config_file.get_config(options)
    network = {"width": 16, "heads": 2, "patch": 4}
    if "ar_vae" in options:
        network |= {"depth": 1, "tokens": 3}
    else:
        network |= {"temporal_depth": 1, "encode_blocks": "t", "decode_blocks": "t"}
    config.update_from_flattened_dict(
        {
            "data.size": 12,
            "data.frames": 5,
            "task.images": 0.4,
            **{f"task.network.{name}": value for name, value in network.items()},
            **{f"task.{name.replace('__', '.')}": value for name, value in changes.items()},
        }
    )
    task = config.copy_and_resolve_references().task.to_dict()
    assert task.pop("name") == "tokenizer"
    return task


def batch(num=2):
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (num, 5, 12, 12, 3), dtype=np.uint8)
    return {"video": video, "id": np.arange(num, dtype=np.int32)}


def loss(task, params, extra, rng):
    return task.loss(params, batch(), rng, step=0, frozen={}, extra=extra)


@pytest.mark.parametrize(
    "options",
    [
        "arch=cvivit,quantizer=vq,size=b",
        "arch=omnitokenizer,quantizer=lfq,size=b",
        "arch=ar_vae,quantizer=kl,size=b",
        "quantizer=bsq,mixer=gated_delta",
    ],
)
def test_every_choice_of_the_config_trains_and_scores(options):
    """By shapes alone: nothing is compiled."""
    task = Task(**fields(options))
    rng = jax.random.key(0)
    params, extra = jax.eval_shape(lambda: task.init(rng, batch()))
    value, (metrics, after, _) = jax.eval_shape(functools.partial(loss, task), params, extra, rng)
    assert value.shape == () and jax.tree.structure(after) == jax.tree.structure(extra)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), extra
    )
    assert all(x.shape == () for x in metrics.values())
    weights = {**params, **extra}
    scores = jax.eval_shape(lambda w: task.evaluate(w, batch(), rng, frozen={}), weights)
    shapes = {name: x.shape for name, x in scores.items()}
    assert all(shapes[name] == (2, 5) for name in ("psnr", "ssim", "motion_error"))
    assert ("ids" in shapes) == ("kl" not in options)
    assert ("usage" in jax.eval_shape(task.pool, scores)) == ("kl" not in options)


@pytest.mark.slow
def test_training_moves_the_network_by_gradient_and_the_codebook_by_its_means():
    options = dict(quantizer__codes=32, quantizer__channels=4, images=0.0)
    task = Task(**fields("quantizer=vq", **options))
    params, extra = jax.jit(task.init)(jax.random.key(0), batch())

    @jax.jit
    def step(params, extra, rng):
        gradient = jax.grad(functools.partial(loss, task), has_aux=True)
        grads, (metrics, extra, _) = gradient(params, extra, rng)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), extra, metrics

    first, moved = None, extra
    for seed in range(12):
        params, moved, metrics = step(params, moved, jax.random.key(seed))
        first = first or float(metrics["error"])
    assert metrics["error"] < 0.9 * first
    assert moved["codebook"]["updates"] == 12
    # The tokens of a batch: 3 latents of each clip. k-means counts codes without any as one.
    assert 54 <= moved["codebook"]["count_V"].sum() < 54 + 32
    assert np.abs(moved["codebook"]["code_VZ"] - extra["codebook"]["code_VZ"]).max() > 0.1

    weights = {**params, **moved}
    scores = jax.jit(lambda w: task.evaluate(w, batch(), jax.random.key(0), frozen={}))(weights)
    cond = {"num": 2, "video": batch()["video"]}
    wrong = np.asarray(task.sample(weights, None, cond, frozen={})) - normalize(batch()["video"])
    psnr = 10 * np.log10(4 / np.square(wrong).mean((2, 3, 4)))
    np.testing.assert_allclose(scores["psnr"], psnr, rtol=1e-4)
    change = np.abs(np.diff(wrong, axis=1)).mean((2, 3, 4))
    np.testing.assert_allclose(scores["motion_error"][:, 1:], change, rtol=1e-4)
    assert np.isnan(scores["motion_error"][:, 0]).all()


@pytest.mark.parametrize("size", ["b"])
@pytest.mark.parametrize("stage", ["image", "joint", "kl"])
def test_stages_are_omnitokenizers(stage, size):
    """By shapes alone. Each stage has its kind of discriminator; only the last is Gaussian."""
    argument = f"{config_file.__file__}:arch=omnitokenizer,stage={stage},size={size}"
    config = config_lib.read(argument)
    config_lib.validate(config)
    assert config.data.frames == (1 if stage == "image" else 17)
    assert config.optim.discriminator.warmup == config.steps
    assert np.isclose(config.optim.discriminator.lr, 0.1 * config.optim.lr)
    if size == "b":
        assert config.optim.lr == (1e-3 if stage == "image" else 5e-5)
        assert config.data.size == (256 if stage == "image" else max(config.task.sizes))
    with config.unlocked():
        config.task.network.dtype = "float32"
    task = make_task(config.task)
    params, extra = jax.eval_shape(lambda: task.init(jax.random.key(0), None))
    assert set(params["discriminator"]) == {"image" if stage == "image" else "video"}
    assert ("codebook" in extra) == (stage != "kl")


@pytest.mark.parametrize(
    "options, message",
    [
        ("stage=image", "stage=image: stages are of arch=omnitokenizer"),
        ("arch=omnitokenizer,stage=joint,quantizer=fsq", "stage=joint: decides the quantizer"),
        ("arch=omnitokenizer,stage=kl,gan=patch", "stage=kl: decides the gan"),
    ],
)
def test_options_that_a_stage_sets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config_file.get_config(options)


@pytest.mark.slow
def test_a_step_draws_the_size_of_its_clips():
    def objective(**changes):
        task = Task(**fields("quantizer=fsq", **changes))
        return task, jax.jit(
            lambda params, extra, video, rng: task.loss(
                params, {"video": video}, rng, step=0, frozen={}, extra=extra
            )[0]
        )

    video, rng = batch()["video"], jax.random.key(2)
    task, run = objective(sizes=(8, 12), images=0.0)
    weights = jax.jit(task.init)(jax.random.key(0), batch())
    found = {float(run(*weights, video, jax.random.fold_in(rng, n))) for n in range(8)}
    wanted = []
    for size in (8, 12):
        shrunk = jax.image.resize(video.astype(np.float32), (2, 5, size, size, 3), "linear")
        _, alone = objective(size=size, images=0.0)
        wanted.append(alone(*weights, shrunk, rng))
    np.testing.assert_allclose(sorted(found), sorted(wanted), rtol=1e-5)
    assert run._cache_size() == 1


def test_images_are_distinct_frames_of_the_clips():
    task = Task(**fields(images=0.6))
    video = normalize(batch(3)["video"])
    images = np.asarray(task._images(video, jax.random.key(1)))
    assert images.shape == (9, 1, 12, 12, 3)
    for clip, drawn in zip(video, images.reshape(3, 3, 12, 12, 3)):
        found = [int(np.flatnonzero((clip == image).all((1, 2, 3)))[0]) for image in drawn]
        assert len(set(found)) == 3


def test_perceptual_distances_are_in_the_loss_if_their_file_is_given(tmp_path, caplog):
    arrays, inputs, index = {}, 3, 0
    for stage, channels in enumerate(lpips.STAGES):
        arrays[f"lin{stage}.model.1.weight"] = np.ones((1, channels[-1], 1, 1), np.float32)
        for outputs in channels:
            arrays[f"features.{index}.weight"] = np.full((outputs, inputs, 3, 3), 0.01, np.float32)
            arrays[f"features.{index}.bias"] = np.zeros(outputs, np.float32)
            inputs, index = outputs, index + 2
        index += 1
    np.savez(tmp_path / "vgg.npz", **arrays)
    options = dict(size=16, perceptual__lpips=str(tmp_path / "vgg.npz"))
    task = Task(**fields("quantizer=fsq", **options))
    frozen = task.frozen()
    data = {"video": np.zeros((2, 5, 16, 16, 3), np.uint8)}
    rng = jax.random.key(0)
    params, extra = jax.eval_shape(lambda: task.init(rng, data))
    _, (metrics, _, _) = jax.eval_shape(
        lambda p, f, e: task.loss(p, data, rng, step=0, frozen=f, extra=e), params, frozen, extra
    )
    assert metrics["lpips"].shape == () and "i3d" not in metrics
    scores = jax.eval_shape(lambda p, f: task.evaluate(p, data, rng, frozen=f), params, frozen)
    assert scores["lpips"].shape == (2, 5)
    with caplog.at_level("WARNING"):
        task.check(Source())
    assert not caplog.records  # I3D, without a file, was not asked for


@pytest.mark.slow
def test_eight_clips_are_memorised_through_their_latents():
    """About 24 dB in 400 steps. Without latents the decoder gives the mean, 11 dB."""
    config = config_file.get_config()
    config.data.size, config.data.frames = 16, 5
    clips = next(data.make_iterator(config.data, split="train", seed=1, batch_size=8))["video"]
    options = dict(size=16, images=0.0, network__width=32)

    def train(task, steps):
        """PSNR of the clips, dB, after so many steps of Adam."""
        params, extra = jax.jit(task.init)(jax.random.key(0), None)
        tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

        def loss(params):
            given = dict(step=0, frozen={}, extra=extra)
            return task.loss(params, {"video": clips}, jax.random.key(0), **given)[0]

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        def run(params):
            (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
            return loss(params)

        return 10 * np.log10(4 / run(params))

    ablated = Task(**fields("quantizer=fsq", **options))
    features = ablated.tokenizer.features
    ablated.tokenizer.features = lambda *given: jax.tree.map(jnp.zeros_like, features(*given))
    assert train(Task(**fields("quantizer=fsq", **options)), 400) > 20
    assert train(ablated, 200) < 13


@pytest.mark.slow
def test_i3d_features_are_in_the_loss_with_their_weight(monkeypatch):
    """A network of random weights at 32 pixels instead of 224; nine frames."""
    monkeypatch.setattr(i3d, "SIZE", 32)
    video = np.random.default_rng(0).integers(0, 256, (1, 9, 12, 12, 3), dtype=np.uint8)
    weights = jax.jit(i3d.I3D().init)(jax.random.key(1), normalize(video))["params"]
    weights["logits"]["kernel"] *= 1000  # so that it shows beside the error
    task = Task(**fields("quantizer=fsq", frames=9, images=0.0, perceptual__i3d_weight=3.0))
    params, extra = jax.jit(task.init)(jax.random.key(0), None)

    @jax.jit
    def run(params, weights):
        data, rng = {"video": video}, jax.random.key(2)
        return task.loss(params, data, rng, step=0, frozen={"i3d": weights}, extra=extra)

    @jax.jit
    def rebuild(params):
        z_BTNZ, _ = task.tokenizer.encode({**params, **extra}, normalize(video))
        return task.tokenizer.decode(params, z_BTNZ, task.tokenizer.grid(12))[0]

    total, (metrics, _, _) = run(params, weights)
    features = jax.jit(i3d.features)
    difference = features(weights, rebuild(params)) - features(weights, normalize(video))
    wanted = np.square(difference).mean()
    assert wanted > 1e-2
    np.testing.assert_allclose(metrics["i3d"], wanted, rtol=1e-3)
    np.testing.assert_allclose(total, metrics["error"] + 3 * wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arch": "vqgan"}, "arch='vqgan'"),
        ({"error": "l3"}, "error='l3'"),
        ({"images": 2.0}, "images=2.0"),
        ({"inflation": "last"}, "inflation='last'"),
        ({"quantizer__levels": (2, 2)}, r"quantizer.levels=\(2, 2\)"),
        ({"network__heads": 3}, "network.heads=3"),
        ({"network__mixer__name": "rnn"}, "network.mixer.name='rnn'"),
        ({"network__mixer__window": 0}, "network.mixer.window=0: must be at least 1"),
        ({"network__dtype": "float8"}, "network.dtype='float8': .* float32, bfloat16"),
        ({"perceptual__i3d_weight": np.nan}, "perceptual.i3d_weight=nan"),
        ({"perceptual__lpips_weight": -1.0}, "perceptual.lpips_weight=-1.0"),
        ({"network__patch": 5}, "network.patch=5: does not divide frames of 12 x 12"),
        ({"frames": 6}, "frames=6: .* use 5 or 7"),
        ({"perceptual__i3d": "i3d.npz"}, "frames=5: must be at least 9"),
        ({"perceptual__lpips": "vgg.npz"}, "size=12: must be at least 16"),
        ({"quantizer__name": "vq"}, "quantizer.levels=.*: vq has no such option"),
        ({"sizes": (8, 16)}, r"sizes=\(8, 16\): .* at most data.size=12"),
        ({"sizes": (8.0,)}, r"sizes=\(8.0,\): 8.0 is not a whole number"),
        ({"sizes": (10,)}, "network.patch=4: does not divide frames of 10 x 10"),
    ],
)
def test_bad_settings_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Task(**fields(**changes))


@pytest.mark.parametrize("name", ["lpips", "i3d"])
def test_a_missing_file_of_weights_is_named_with_its_field(name):
    large = {"size": 16, "frames": 9}  # enough for both networks
    task = Task(**fields(**{f"perceptual__{name}": "/nowhere/weights.npz"}, **large))
    with pytest.raises(UserError, match=f"^perceptual.{name}=/nowhere/weights.npz: No such"):
        task.frozen()
