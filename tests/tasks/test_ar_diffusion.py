"""The AR-Diffusion task: its objective, its conditions, its samples, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ar_diffusion
from jaxvid.data.source import Source
from jaxvid.data.text import embed
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.models.pixels import PixelTokenizer
from jaxvid.models.tokenizer import VideoTokenizer
from jaxvid.tasks.ar_diffusion import Task


def fields(options="", **changes):
    """The config's task at the size of a test; changes are dotted fields, dots written as __."""
    config = ar_diffusion.get_config(options)
    config.update_from_flattened_dict(
        {
            "data.size": 8,
            "data.frames": 6,
            "task.patch": 4,
            "task.given": 2,
            "task.model.width": 16,
            "task.model.depth": 1,
            "task.model.heads": 2,
            "task.sampler.steps": 4,
            "task.sampler.s": 2,
            **{f"task.{name.replace('__', '.')}": value for name, value in changes.items()},
        }
    )
    task = config.copy_and_resolve_references().task.to_dict()
    assert task.pop("name") == "ar_diffusion"
    assert (task.pop("tokenizer"), task.pop("tokenizer_digest")) == ("", "")
    return task


def batch(num=2, seed=0, size=8):
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 256, (num, 6, size, size, 3), dtype=np.uint8),
        "id": np.arange(num, dtype=np.int32),
        "label": np.arange(num, dtype=np.int32),
        "text": rng.standard_normal((num, 20, 64)).astype(np.float32),
    }


def opened(task):
    """Parameters off their zero initialisation."""
    params, extra = jax.jit(task.init)(jax.random.key(0), batch(size=task.size))
    assert extra == {}
    return jax.tree.map(lambda p: p + 0.05 * jnp.sin(jnp.arange(p.size).reshape(p.shape)), params)


def objective(task):
    """The jitted loss: (params, data, seed) -> (loss, metrics)."""

    @jax.jit
    def run(params, data, seed):
        value, (metrics, _, _) = task.loss(
            params, data, jax.random.key(seed), step=0, frozen=task.frozen(), extra={}
        )
        return value, metrics

    return run


@pytest.mark.parametrize(
    "options, prediction", [("", "x0"), ("", "v"), ("noise=flow", "v"), ("cond=text", "x0")]
)
def test_a_network_of_zeros_has_the_loss_of_its_target(options, prediction):
    """At initialisation the head is zero, so the unweighted error is the target's own power."""
    task = Task(**fields(options, prediction=prediction, weight="uniform", clean_prefix=0.0))
    params, _ = jax.jit(task.init)(jax.random.key(0), batch(64))
    value, metrics = objective(task)(params, batch(64), 1)
    power = float(np.square(normalize(batch(64)["video"])).mean())
    bounds = {"x0": (power, power), "v": (min(power, 1), 1 + power)}[prediction]
    assert bounds[0] - 1e-4 <= value <= bounds[1] + 1e-2
    np.testing.assert_allclose(metrics["mse"], value, rtol=1e-6)


def test_clean_frames_are_condition_and_not_target():
    """A prefix frame changes the loss through the other frames alone."""
    task = Task(**fields(clean_prefix=1.0, timesteps="full_sequence", prediction="x0"))
    data = batch(1)
    changed = {**data, "video": data["video"].copy()}
    changed["video"][:, 0] = 255
    run = objective(task)
    blind, _ = jax.jit(task.init)(jax.random.key(0), data)  # its prediction is zero
    seeing = opened(task)
    for seed in range(4):
        assert run(blind, data, seed)[0] == run(blind, changed, seed)[0]
        assert run(seeing, data, seed)[0] != run(seeing, changed, seed)[0]


def test_the_weight_counts_the_frames_that_are_targets():
    """Frames of their own brightness, so the loss of zeros says how many of them it averages."""
    options = dict(clean_prefix=0.8, prediction="x0", weight="uniform")
    task = Task(**fields(**options))
    data = batch(1)
    data["video"][:] = 20 * np.arange(1, 7, dtype=np.uint8)[:, None, None, None]
    power_T = np.square(normalize(data["video"])).mean((0, 2, 3, 4))
    means = [power_T[first:].mean() for first in range(6)]
    params, _ = jax.jit(task.init)(jax.random.key(0), data)

    def loss(rng):
        return task.loss(params, data, rng, step=0, frozen={}, extra={})

    values, (_, _, weights) = jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(0), 16))
    first = np.abs(np.asarray(values)[:, None] - means).argmin(axis=1)
    assert len(set(first)) > 2
    np.testing.assert_array_equal(weights, 6 - first)


def test_a_step_trains_on_successive_frames_from_a_random_one():
    """Frames of their own brightness, so the loss of zeros says which of them it averages."""
    options = dict(clean_prefix=0.0, prediction="x0", weight="uniform", train_frames=3)
    task = Task(**fields(**options))
    data = batch(1)
    data["video"][:] = 20 * np.arange(1, 7, dtype=np.uint8)[:, None, None, None]
    power_T = np.square(normalize(data["video"])).mean((0, 2, 3, 4))
    means = np.array([power_T[first : first + 3].mean() for first in range(4)])
    params, _ = jax.jit(task.init)(jax.random.key(0), data)

    def loss(rng):
        return task.loss(params, data, rng, step=0, frozen={}, extra={})

    values, (_, _, weights) = jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(0), 32))
    first = np.abs(np.asarray(values)[:, None] - means).argmin(axis=1)
    np.testing.assert_allclose(values, means[first], rtol=1e-5)
    assert set(first) == {0, 1, 2, 3}
    np.testing.assert_array_equal(weights, 3)


class Spy(Task):
    """Records which conditions training drops."""

    def _context(self, params, drop_B, batch):
        jax.debug.callback(lambda drop_B: self.dropped.extend(np.asarray(drop_B)), drop_B)
        return super()._context(params, drop_B, batch)


def test_the_condition_is_dropped_at_the_stated_rate():
    task = Spy(**fields("cond=class", condition__drop=0.2))
    task.dropped = []
    params = opened(task)
    data = batch(256)
    step = jax.jit(
        lambda rng: task.loss(params, data, rng, step=0, frozen={}, extra={})[0],
    )
    for seed in range(16):
        jax.block_until_ready(step(jax.random.key(seed)))
    jax.effects_barrier()
    assert len(task.dropped) == 16 * 256
    assert abs(np.mean(task.dropped) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(task.dropped))


def test_the_null_context_has_its_own_row():
    task = Task(**fields("cond=class", condition__num_classes=3))
    params = opened(task)["conditioner"]
    context_BME = task.conditioner.apply(
        {"params": params}, jnp.array([True, False]), jnp.array([1, 1])
    )
    np.testing.assert_array_equal(context_BME[0], params["null"])
    np.testing.assert_array_equal(context_BME[1], params["classes"][1])
    assert np.abs(params["null"] - params["classes"]).max((1, 2)).min() > 0


def test_a_caption_without_words_is_the_null_context():
    task = Task(**fields("cond=text"))
    params, data = opened(task)["conditioner"], batch()
    text = jnp.asarray([data["text"][0], embed("", 20, 64)])
    context_BME = task.conditioner.apply({"params": params}, jnp.zeros(2, bool), text_BME=text)
    np.testing.assert_array_equal(context_BME[0], text[0])
    np.testing.assert_array_equal(context_BME[1], params["null"])


@pytest.mark.parametrize("options", ["", "cond=text"])
def test_a_sample_equals_its_stream_and_begins_with_the_given_frames(options):
    guidance = 2.0 if "text" in options else 1.0
    task = Task(**fields(options, sampler__guidance=guidance))
    params = opened(task)
    data = batch()
    cond = {"num": 2, "text": data["text"], "first_frames": data["video"][:, :2]}
    rng = jax.random.key(3)
    video = task.sample(params, rng, cond, frozen={}, frames=9)
    assert video.shape == (2, 9, 8, 8, 3)
    np.testing.assert_allclose(video[:, :2], normalize(data["video"][:, :2]), atol=1e-6)
    parts = list(task.stream(params, rng, cond, frozen={}, frames=9))
    assert [part.shape[1] for part in parts] == [2, *[1] * 7]
    streamed = [task.decode({}, part)[0] for part in parts]
    np.testing.assert_allclose(np.concatenate(streamed, axis=1), video, atol=1e-5)
    whole = Task(**fields(options, sampler__guidance=guidance, sampler__memory="none"))
    uncached = whole.sample(params, rng, cond, frozen={}, frames=9)
    np.testing.assert_allclose(uncached, video, atol=1e-4)


def test_guidance_one_is_the_condition_alone_and_zero_the_null():
    data = batch()
    rng, text = jax.random.key(0), data["text"]
    make = {scale: Task(**fields("cond=text", sampler__guidance=scale)) for scale in (0.0, 1.0)}
    params = opened(make[1.0])
    params["conditioner"]["null"] = jnp.asarray(text[0])
    unconditional = make[0.0].sample(params, rng, {"num": 2, "text": text}, frozen={})
    conditional = make[1.0].sample(params, rng, {"num": 2, "text": text[[0, 0]]}, frozen={})
    np.testing.assert_allclose(unconditional, conditional, atol=1e-5)


class HalfRate(VideoTokenizer):
    """A tiny learned tokenizer: one token per frame, two frames per latent after the first."""

    channels = 5

    def __init__(self):
        self.params = {"basis": jax.random.normal(jax.random.key(0), (8 * 8 * 3, 5)) / 14}

    def grid(self, size):
        return (1, 1)

    def latents_for_frames(self, frames):
        return 1 + (frames - 1) // 2

    def encode(self, params, video, state=None):
        flat = video.reshape(*video.shape[:2], -1)
        pairs = flat[:, 1:].reshape(len(flat), -1, 2, flat.shape[-1]).mean(2)
        z = jnp.concatenate([flat[:, :1], pairs], axis=1) @ params["basis"]
        return z[:, :, None], None

    def decode(self, params, z, grid, state=None):
        flat = z[:, :, 0] @ params["basis"].T
        if state is None:
            flat = jnp.concatenate([flat[:, :1], jnp.repeat(flat[:, 1:], 2, axis=1)], axis=1)
        else:
            flat = jnp.repeat(flat, 2, axis=1)
        return flat.reshape(*flat.shape[:2], 8, 8, 3), jnp.ones(())


def test_trains_and_samples_on_the_latents_of_a_frozen_tokenizer():
    tokenizer = HalfRate()
    task = Task(**{**fields(frames=5, weight="uniform"), "tokenizer": tokenizer})
    data = {**batch(), "video": batch()["video"][:, :5]}
    params, _ = jax.jit(task.init)(jax.random.key(0), data)
    assert params["model"]["head"]["kernel"].shape[-1] == 5
    frozen = task.frozen()
    assert frozen is tokenizer.params

    def value(params, frozen):
        rng = jax.random.key(0)
        return task.loss(params, data, rng, step=0, frozen=frozen, extra={})[0]

    by_params, by_frozen = jax.jit(jax.grad(value, argnums=(0, 1)))(params, frozen)
    assert np.abs(by_params["model"]["head"]["kernel"]).max() > 0
    np.testing.assert_array_equal(by_frozen["basis"], 0)

    cond = {"num": 2, "first_frames": data["video"][:, :3]}
    video = task.sample(params, jax.random.key(1), cond, frozen=frozen, frames=7)
    assert video.shape == (2, 7, 8, 8, 3)
    state, parts = None, []
    for z in task.stream(params, jax.random.key(1), cond, frozen=frozen, frames=7):
        part, state = task.decode(frozen, z, state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), video, atol=1e-5)


def test_evaluate_scores_the_continuation_beside_the_copy():
    task = Task(**fields(size=12))  # SSIM needs 11 pixels
    data = batch(size=12)
    data["video"][:] = data["video"][:, :1]  # nothing moves, so copying is perfect
    metrics = jax.jit(lambda p: task.evaluate(p, data, jax.random.key(0), frozen={}))(opened(task))
    assert metrics["loss_by_level"].shape == (2, 10)
    level_means = metrics["loss_by_level"].mean(0)
    assert level_means[0] < level_means[9]
    for name in ("psnr", "ssim", "psnr_copy_last", "ssim_copy_last"):
        assert np.isnan(metrics[name][:, :2]).all() and not np.isnan(metrics[name][:, 2:]).any()
    assert (metrics["ssim_copy_last"][:, 2:] > 0.999).all()
    assert (metrics["psnr"][:, 2:] < metrics["psnr_copy_last"][:, 2:]).all()


def test_a_mask_that_sees_the_future_samples_without_a_cache():
    options = dict(model__mixer__mask="full", sampler__memory="none")
    task = Task(**fields("cond=class", **options))
    video = task.sample(opened(task), jax.random.key(0), {"num": 1}, frozen={})
    assert np.isfinite(video).all() and video.shape == (1, 6, 8, 8, 3)


@pytest.mark.parametrize("mixer", ["gla", "gated_delta"])  # a matrix; with past inputs
def test_a_recurrent_mixer_samples_the_same_from_its_state_as_from_all_frames(mixer):
    videos = []
    for memory in ("cache", "none"):
        task = Task(**fields(f"cond=class,mixer={mixer}", sampler__memory=memory))
        cond = {"num": 2, "label": np.arange(2)}
        videos.append(task.sample(opened(task), jax.random.key(0), cond, frozen={}, frames=9))
    np.testing.assert_allclose(*videos, atol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch": 3}, "^patch=3: does not divide size=8"),
        ({"patch": 0}, "^patch=0: "),
        ({"model__depth": 0}, "^model.depth=0: must be at least 1"),
        ({"model__heads": 3}, "^model.heads=3: does not divide width=16"),
        ({"model__mlp_ratio": float("nan")}, "^model.mlp_ratio=nan"),
        ({"model__arrangement": "x"}, "^model.arrangement='x': unknown; use one of joint"),
        ({"model__dtype": "float33"}, "^model.dtype='float33': unknown; use one of float32"),
        ({"model__mixer__name": "gla"}, "^model.mixer.mask='causal': gla has no such option"),
        ({"model__mixer__window": 0}, "^model.mixer.window=0: must be at least 1"),
        ({"timesteps": "fop"}, "^timesteps='fop': unknown; use one of fopp"),
        ({"condition__kind": "image"}, "^condition.kind='image'"),
        ({"condition__drop": 1.5}, "^condition.drop=1.5"),
        ({"given": 6}, "^given=6: must lie between 1 and 5"),
        ({"prediction": "y"}, "^prediction='y'"),
        ({"prediction": "eps", "noise__name": "flow"}, "^prediction='eps': .* use v or x0"),
        ({"weight": "snr"}, "^weight='snr'"),
        ({"noise__name": "quadratic"}, "^noise.name='quadratic'"),
        ({"noise__shift": 2.0}, "^noise.shift=2.0: only name='flow'"),
        ({"snr_clip": 0.0}, "^snr_clip=0.0"),
        ({"model__mixer__name": "lstm"}, "^model.mixer.name='lstm'"),
        ({"sampler__guidance": 2.0}, "^sampler.guidance=2.0: .* use 1"),
        ({"model__mixer__mask": "full"}, "^sampler.memory='cache'"),
        ({"sampler__s": 9}, "^sampler.s=9: use 0 .* to 4"),
        ({"sampler__schedule": "sync"}, "^sampler.schedule='sync': .* use one of"),
        ({"sampler__steps": 0}, "^sampler.steps=0: .* use 1 to 999"),
        ({"sampler__eta": 1.5}, "^sampler.eta=1.5"),
        ({"sampler__end": "x0"}, "^sampler.end='x0': unknown; use one of clean, noisy"),
        ({"sampler__eta": float("nan")}, "^sampler.eta=nan"),
    ],
)
def test_bad_settings_are_refused_in_one_line(changes, words):
    with pytest.raises(UserError, match=words.replace("(", "\\(")) as caught:
        Task(**fields(**changes))
    assert "\n" not in str(caught.value)


def test_too_small_a_step_between_frames_is_refused_when_it_matters():
    task = Task(**fields(sampler__s=0))
    with pytest.raises(UserError, match="s=0: 9 frames would be noisy at once but window=6"):
        task.sample(opened(task), jax.random.key(0), {"num": 1}, frozen={}, frames=9)


class Classes(Source):
    """A data source with classes and without captions."""

    num_classes = 24


def test_data_without_the_condition_are_refused():
    Task(**fields("cond=class", condition__num_classes=24)).check(Classes())
    with pytest.raises(UserError, match="num_classes=23: the data has 24 classes"):
        Task(**fields("cond=class", condition__num_classes=23)).check(Classes())
    with pytest.raises(UserError, match="no captions"):
        Task(**fields("cond=text")).check(Classes())


def test_pixel_tokens_are_an_exact_inverse():
    video = jnp.asarray(normalize(batch()["video"]))
    patches = PixelTokenizer(4)
    z, _ = patches.encode({}, video)
    assert z.shape == (2, 6, 4, 48)
    np.testing.assert_array_equal(patches.decode({}, z, patches.grid(8))[0], video)
    np.testing.assert_array_equal(z[0, 0, 1].reshape(4, 4, 3), video[0, 0, :4, 4:])
