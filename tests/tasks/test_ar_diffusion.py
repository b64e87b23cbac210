"""The AR-Diffusion task: its objective, its conditions, its samples, and what it refuses."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ar_diffusion
from jaxvid.data.source import Source
from jaxvid.data.text import embed
from jaxvid.data.transforms import normalize
from jaxvid.diffusion import resampling, shortcut
from jaxvid.errors import UserError
from jaxvid.models import dit
from jaxvid.models.pixels import PixelTokenizer
from jaxvid.models.tokenizer import VideoTokenizer
from jaxvid.parallel.mesh import make_mesh
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
        "text": rng.integers(1, 256, (num, 128), dtype=np.uint8),
    }


def opened(task):
    """Parameters off their zero initialisation."""
    params, extra = jax.jit(task.init)(jax.random.key(0), batch(size=task.size))
    assert extra == {}
    return moved(params)


@jax.jit
def moved(params):
    """Parameters plus a wave, compiled once and not once for each shape."""
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
    task = Task(
        **fields(options, prediction=prediction, weight="uniform", layout="diffusion_forcing")
    )
    params, _ = jax.jit(task.init)(jax.random.key(0), batch(64))
    value, metrics = objective(task)(params, batch(64), 1)
    power = float(np.square(normalize(batch(64)["video"])).mean())
    bounds = {"x0": (power, power), "v": (min(power, 1), 1 + power)}[prediction]
    assert bounds[0] - 1e-4 <= value <= bounds[1] + 1e-2
    np.testing.assert_allclose(metrics["mse"], value, rtol=1e-6)


def test_clean_frames_are_condition_and_not_target():
    """A prefix frame changes the loss through the other frames alone."""
    task = Task(**fields(layout="clean_prefix", timesteps="full_sequence", prediction="x0"))
    data = batch(1)
    changed = {**data, "video": data["video"].copy()}
    changed["video"][:, 0] = 255
    run = objective(task)
    blind, _ = jax.jit(task.init)(jax.random.key(0), data)  # its prediction is zero
    seeing = opened(task)
    for seed in range(4):
        assert run(blind, data, seed)[0] == run(blind, changed, seed)[0]
        assert run(seeing, data, seed)[0] != run(seeing, changed, seed)[0]


@pytest.mark.parametrize(
    "layout",
    ["clean_prefix=0.8,diffusion_forcing=0.2", "clean_prefix=0.7,teacher_forced=0.3"],
)
def test_the_weight_counts_the_frames_that_are_targets(layout):
    """Frames of their own brightness, so the loss of zeros says how many of them it averages."""
    task = Task(**fields(layout=layout, prediction="x0", weight="uniform"))
    data = batch(1)
    data["video"][:] = 20 * np.arange(1, 7, dtype=np.uint8)[:, None, None, None]
    power_T = np.square(normalize(data["video"])).mean((0, 2, 3, 4))
    means = [power_T[first:].mean() for first in range(6)]
    params, _ = jax.jit(task.init)(jax.random.key(0), data)

    def loss(rng):
        return task.loss(params, data, rng, step=0, frozen={}, extra={})

    values, (_, _, weights) = jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(0), 64))
    first = np.abs(np.asarray(values)[:, None] - means).argmin(axis=1)
    assert len(set(first)) > 2
    np.testing.assert_array_equal(weights, 6 - first)
    assert 0.05 < (first == 0).mean() < 0.5  # all frames are targets in 0.2 or 0.3 of the draws


def test_teacher_forcing_trains_what_sampling_one_frame_after_another_computes():
    """The loss is the mean over frames of the error of denoising each from the state before it."""
    task = Task(**fields("layout=teacher_forced", prediction="x0", weight="uniform"))
    assert task.sampler["schedule"] == "autoregressive"
    params, data, rng = opened(task), batch(), jax.random.key(1)
    z_BTNC = task._encode({}, data["video"])
    rng_clip, rng_eps, *_ = jax.random.split(rng, 4)
    t_BT = task._draw(rng_clip, z_BTNC, 0).t_BT
    noise_BTNC = jax.random.normal(rng_eps, z_BTNC.shape)
    x_BTNC = task.noise.add_noise(z_BTNC, noise_BTNC, t_BT)
    context_BME = task._context(params, jnp.zeros(2, bool), data)
    apply = jax.jit(task._apply)
    _, state = apply(params, z_BTNC[:, :0], t_BT[:, :0], context_BME)
    errors = []
    for f in range(6):
        frame = slice(f, f + 1)
        x0_BTNC, _ = apply(params, x_BTNC[:, frame], t_BT[:, frame], None, state)
        _, state = apply(params, z_BTNC[:, frame], jnp.zeros((2, 1), jnp.int32), None, state)
        errors.append(jnp.square(x0_BTNC - z_BTNC[:, frame]).mean())
    np.testing.assert_allclose(objective(task)(params, data, 1)[0], np.mean(errors), rtol=1e-5)


def test_images_are_streams_of_one_frame():
    """The loss is the mean over frames of the error of denoising each with nothing before it."""
    task = Task(**fields("cond=class", layout="images", prediction="x0", weight="uniform"))
    params, data, rng = opened(task), batch(), jax.random.key(1)
    z_BTNC = task._encode({}, data["video"])
    rng_clip, rng_eps, rng_drop, _ = jax.random.split(rng, 4)
    t_BT = task._draw(rng_clip, z_BTNC, 0).t_BT
    x_BTNC = task.noise.add_noise(z_BTNC, jax.random.normal(rng_eps, z_BTNC.shape), t_BT)
    context_BME = task._context(params, jax.random.bernoulli(rng_drop, task.drop, (2,)), data)
    apply, errors = jax.jit(task._apply), []
    for f in range(6):
        frame = slice(f, f + 1)
        x0_BTNC, _ = apply(params, x_BTNC[:, frame], t_BT[:, frame], context_BME)
        errors.append(jnp.square(x0_BTNC - z_BTNC[:, frame]).mean())
    np.testing.assert_allclose(objective(task)(params, data, 1)[0], np.mean(errors), rtol=1e-5)


def test_a_mixture_of_layouts_has_the_loss_of_the_layout_that_it_draws():
    options = dict(prediction="x0", weight="uniform")
    layouts = ("diffusion_forcing", "teacher_forced", "images")
    mixture = ",".join(f"{layout}={share}" for layout, share in zip(layouts, (0.25, 0.5, 0.25)))
    mixed = Task(**fields(layout=mixture, **options))
    params, data = opened(mixed), batch()
    z_BTNC = mixed._encode({}, data["video"])
    alone = [objective(Task(**fields(layout=layout, **options))) for layout in layouts]
    found, loss = [], objective(mixed)
    for seed in range(40):
        kind = int(mixed._draw(jax.random.split(jax.random.key(seed), 4)[0], z_BTNC, 0).kind)
        if kind not in found:  # the draws of noise and levels are the same
            wanted = alone[kind](params, data, seed)[0]
            np.testing.assert_allclose(loss(params, data, seed)[0], wanted, rtol=1e-5)
            found.append(kind)
    assert sorted(found) == [0, 1, 2]


@pytest.mark.parametrize("mixer", ["softmax", "gated_delta"])
def test_resampled_frames_are_read_and_the_targets_are_those_of_the_data(mixer):
    """By whole clips without a cache: frames made so far, then the next one, noised."""
    options = dict(prediction="x0", weight="uniform", resampling__share=1.0, resampling__after=2)
    task = Task(**fields(f"layout=teacher_forced,mixer={mixer}", **options))
    params, data, rng = opened(task), batch(), jax.random.key(1)
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    z_BTNC, context_BME = task._encode({}, data["video"]), None
    rng_clip, rng_eps, rng_drop, rng_past = jax.random.split(rng, 4)
    context_BME = task._context(params, jax.random.bernoulli(rng_drop, task.drop, (2,)), data)
    rng_t, rng_noise = jax.random.split(jax.random.split(rng_past)[1])
    level_B1 = resampling.draw(rng_t, 2, 0.6, task.noise)[:, None]
    noised = task.noise.add_noise(
        z_BTNC, jax.random.normal(rng_noise, z_BTNC.shape), level_B1.repeat(6, 1)
    )
    made = jnp.zeros_like(z_BTNC)
    apply = jax.jit(task._apply)
    for f in range(6):
        is_this, is_past = (np.arange(6) == f)[:, None, None], np.arange(6) < f
        x_BTNC = jnp.where(is_this, noised, made)
        t_BT = jnp.where(is_past, 0, level_B1)
        x0_BTNC, _ = apply(params, x_BTNC, t_BT, context_BME)
        made = jnp.where(is_this, x0_BTNC, made)

    t_BT = task._draw(rng_clip, z_BTNC, 0).t_BT
    x_BTNC = task.noise.add_noise(z_BTNC, jax.random.normal(rng_eps, z_BTNC.shape), t_BT)

    def mse(params, past_BTNC):
        prediction, _ = task._apply(params, x_BTNC, t_BT, context_BME, clean_BTNC=past_BTNC)
        return jnp.square(prediction - z_BTNC).mean()

    def loss(params, step):
        return task.loss(params, data, rng, step=step, frozen={}, extra={})[0]

    for step, past_BTNC in ((1, z_BTNC), (2, made)):
        found, gradient = jax.jit(jax.value_and_grad(loss))(params, step)
        wanted, without_made = jax.jit(jax.value_and_grad(mse))(params, past_BTNC)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        for leaf, same in zip(*map(jax.tree.leaves, (gradient, without_made))):
            np.testing.assert_allclose(leaf, same, atol=1e-5)
    assert abs(mse(params, z_BTNC) - mse(params, made)) > 1e-4


@pytest.mark.parametrize("layout", ["mixed", "teacher_forced"])
def test_larger_steps_learn_where_two_half_steps_of_the_averaged_weights_end(layout, monkeypatch):
    """By the sampler's own steps, whose velocities have no bound."""
    monkeypatch.setattr(shortcut, "MAX_VELOCITY", np.inf)
    options = dict(shortcut__finest=4, shortcut__share=1.0, shortcut__after=7, weight="uniform")
    options |= dict(noise__num_steps=65, sampler__steps=4)
    if layout == "mixed":
        options["layout"] = "diffusion_forcing"
    task = Task(**fields(f"steps=few,layout={layout}", **options))
    params, data, rng = opened(task), batch(3), jax.random.key(1)
    params["model"]["step_size"]["embedding"] += jnp.arange(3.0)[:, None]  # steps differ
    average = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    zero = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def mse(params, step):
        options = dict(step=step, frozen={}, extra={}, average=average)
        return task.loss(params, data, rng, **options)[1][0]["mse"]

    z_BTNC = task._encode({}, data["video"])
    np.testing.assert_allclose(mse(zero, 6), jnp.square(z_BTNC).mean(), rtol=1e-5)

    rng_clip, rng_eps, *_ = jax.random.split(rng, 4)
    clip = task._draw(rng_clip, z_BTNC, 7)
    t_BT, size_BT = clip.larger_t, clip.larger_size
    noise_BTNC = jax.random.normal(rng_eps, z_BTNC.shape)
    x_BTNC = task.noise.add_noise(z_BTNC, noise_BTNC, t_BT)
    context_BME = task._context(params, jnp.zeros(3, bool), data)
    clean = z_BTNC if layout == "teacher_forced" else None

    @jax.jit
    def half_step(x_BTNC, t_BT):
        half_BT = shortcut.stride(size_BT - 1, 4, 65)
        sizes = dict(size_BT=size_BT - 1, clean_BTNC=clean)
        x0_BTNC, _ = task._apply(average, x_BTNC, t_BT, context_BME, **sizes)
        _, eps_BTNC = task.noise.split(x0_BTNC, x_BTNC, t_BT, "x0")
        return task.noise.step(x0_BTNC, eps_BTNC, t_BT, t_BT - half_BT), t_BT - half_BT

    moved_BTNC, end_BT = half_step(*half_step(x_BTNC, t_BT))
    share = (t_BT / (t_BT - end_BT))[:, :, None, None]
    target_BTNC = x_BTNC + share * (moved_BTNC - x_BTNC)  # x0 whose step ends there
    np.testing.assert_allclose(mse(zero, 7), jnp.square(target_BTNC).mean(), rtol=1e-4)


def test_a_step_trains_on_successive_frames_from_a_random_one():
    """Frames of their own brightness, so the loss of zeros says which of them it averages."""
    options = dict(layout="diffusion_forcing", prediction="x0", weight="uniform", train_frames=3)
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


@pytest.mark.parametrize("kind", ["class", "text"])
def test_the_condition_is_dropped_at_the_stated_rate(kind):
    task = Spy(**fields(f"cond={kind}", condition__drop=0.2))
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
    """Also in runs of earlier versions, whose conditions lack the fields of readers."""
    condition = dict(kind="text", tokens=20, width=64, num_classes=101, drop=0.1)
    task = Task(**{**fields("cond=text,text=words"), "condition": condition})
    text = jnp.asarray([embed("a red square", 20, 64), embed("", 20, 64)])
    context_BME, params = task.conditioner.init_with_output(
        jax.random.key(0), jnp.zeros(2, bool), text=text
    )
    np.testing.assert_array_equal(context_BME[0], text[0])
    np.testing.assert_array_equal(context_BME[1], params["params"]["null"])


HYBRID = dict(model__depth=2, model__mixer__every=2)


@pytest.mark.parametrize(
    "options, changes",
    [
        ("", {}),
        ("cond=text", {"sampler__guidance": 2.0}),
        ("mixer=gated_delta", {**HYBRID, "model__mixer__attention__sinks": 1}),
        pytest.param("mixer=titans_lmm", HYBRID, marks=pytest.mark.slow),
    ],
)
def test_a_sample_equals_its_stream_and_begins_with_the_given_frames(options, changes):
    # Three of four slots are busy at times: a stream then evaluates the one that waits too.
    options = dict(options=options, sampler__s=1, **changes)
    task = Task(**fields(**options))
    params = opened(task)
    data = batch()
    cond = {"num": 2, "text": data["text"], "first_frames": data["video"][:, :2]}
    rng = jax.random.key(3)
    video = task.sample(params, rng, cond, frozen={}, frames=9)
    assert video.shape == (2, 9, 8, 8, 3)
    np.testing.assert_allclose(video[:, :2], normalize(data["video"][:, :2]), atol=1e-6)
    compiled = task._advance._cache_size()
    parts = list(task.stream(params, rng, cond, frozen={}, frames=9))
    assert [part.shape[1] for part in parts] == [2, *[1] * 7]
    streamed = [task.decode({}, part)[0] for part in parts]
    np.testing.assert_allclose(np.concatenate(streamed, axis=1), video, atol=1e-5)
    stream = task.stream(params, rng, cond, frozen={}, frames=3)
    early = list(stream)  # fewer frames than are in flight later on
    assert sum(part.shape[1] for part in early) == 3
    later = task.stream(params, rng, cond, frozen={}, frames=9, carry=stream.carry)
    np.testing.assert_array_equal(np.concatenate([*early, *later], 1), np.concatenate(parts, 1))
    assert task._advance._cache_size() == compiled + 1  # one program for all lengths
    whole = Task(**fields(**options, sampler__memory="none"))
    uncached = whole.sample(params, rng, cond, frozen={}, frames=9)
    np.testing.assert_allclose(uncached, video, atol=1e-4)


def test_guidance_one_is_the_condition_alone_and_zero_the_null():
    data = batch()
    rng, text = jax.random.key(0), data["text"]
    make = {scale: Task(**fields("cond=text", sampler__guidance=scale)) for scale in (0.0, 1.0)}
    params = opened(make[1.0])
    context_BME = make[1.0]._context(params, jnp.zeros(2, bool), data)
    params["conditioner"]["null"] = context_BME[0]
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
    for changes in ({"train_frames": 3}, {"layout": "teacher_forced=0.5,images=0.5"}):
        with pytest.raises(UserError, match=f"^{next(iter(changes))}=.*: a tokenizer encodes"):
            Task(**{**fields(frames=5, **changes), "tokenizer": tokenizer})

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
    metrics = task.pool(metrics)
    ends = ("", *(f"_{baseline}" for baseline in task.baselines))
    for name in (f"{metric}{end}" for metric in ("psnr", "ssim") for end in ends):
        assert np.isnan(metrics[name][:, :2]).all() and not np.isnan(metrics[name][:, 2:]).any()
    assert (metrics["ssim_copy_last"][:, 2:] > 0.999).all()
    assert (metrics["psnr"][:, 2:] < metrics["psnr_copy_last"][:, 2:]).all()
    for other in ("mean_given", "median_given"):  # of frames that are all the same
        assert (metrics[f"ssim_{other}"][:, 2:] > 0.999).all()


def test_a_layer_is_traced_once_for_all_that_call_it_alike(monkeypatch):
    """Layers of one network, widths of the sampler, and evaluation beside sampling."""
    task = Task(**fields(size=12, model__depth=3, model__arrangement="factorised"))
    data, traced = batch(size=12), collections.Counter()
    params, _ = jax.eval_shape(lambda: task.init(jax.random.key(0), data))
    attend = dit.attend_in_frames

    def counted(spatial, x_BTND, context_kv):
        traced[x_BTND.shape[1]] += 1
        return attend(spatial, x_BTND, context_kv)

    monkeypatch.setattr(dit, "attend_in_frames", counted)
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": -1, "tensor": 1})):
        rng = jax.random.key(0)
        jax.eval_shape(lambda p: task.sample(p, rng, {"num": 2}, frozen={}), params)
        sampled = traced.copy()
        jax.eval_shape(lambda p: task.evaluate(p, data, rng, frozen={}), params)
    assert set(sampled) == {0, 1, 2}  # s = 2 and 4 steps: two frames at most are noisy at once
    assert set(traced) == {0, 1, 2, 6}
    assert traced[1] == traced[6] == sampled[2] == 1
    assert traced[2] <= 2  # once more for the given frames, which begin the stream


def test_settings_are_checked_without_running_anything_on_a_device():
    with jax.transfer_guard("disallow"):
        Task(**fields())


def test_a_mask_that_sees_the_future_samples_without_a_cache():
    options = dict(model__mixer__mask="full", sampler__memory="none")
    task = Task(**fields("cond=class", **options))
    video = task.sample(opened(task), jax.random.key(0), {"num": 1}, frozen={})
    assert np.isfinite(video).all() and video.shape == (1, 6, 8, 8, 3)


@pytest.mark.parametrize(
    "mixer, changes",
    [
        ("gla", {}),  # a matrix
        ("gated_delta", {}),  # with past inputs
        ("gla", {**HYBRID, "model__mixer__attention__window": None}),  # with all frames
    ],
)
def test_a_recurrent_mixer_samples_the_same_from_its_state_as_from_all_frames(mixer, changes):
    videos = []
    for memory in ("cache", "none"):
        changes["sampler__memory"] = memory
        task = Task(**fields(f"cond=class,mixer={mixer}", **changes))
        cond = {"num": 2, "label": np.arange(2)}
        videos.append(task.sample(opened(task), jax.random.key(0), cond, frozen={}, frames=9))
    np.testing.assert_allclose(*videos, atol=1e-4)


FEW = {
    "shortcut__finest": 16,
    "noise__name": "flow",
    "noise__num_steps": 1025,
    "sampler__s": 1,
    "sampler__memory": "cache",
}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch": 3}, "^size=8: patch=3 does not divide it; use a multiple"),
        ({"patch": 0}, "^patch=0: "),
        ({"model__depth": 0}, "^model.depth=0: must be at least 1"),
        (
            {"options": "mixer=gla", "model__mixer__every": 2},
            "^model.depth=1: must be a multiple of mixer.every=2",
        ),
        (
            {"options": "mixer=gla", **HYBRID, "model__mixer__attention__window": 0},
            "^model.mixer.attention.window=0: must be at least 1",
        ),
        ({"model__heads": 3}, "^model.heads=3: does not divide width=16"),
        ({"model__mlp_ratio": float("nan")}, "^model.mlp_ratio=nan"),
        ({"model__arrangement": "x"}, "^model.arrangement='x': unknown; use one of joint"),
        ({"model__dtype": "float33"}, "^model.dtype='float33': unknown; use one of float32"),
        ({"model__mixer__name": "gla"}, "^model.mixer.mask='causal': gla has no such option"),
        ({"model__mixer__window": 0}, "^model.mixer.window=0: must be at least 1"),
        ({"shortcut__finest": 6}, "^shortcut.finest=6: use 0, or a power of 2 from 2 on"),
        ({"shortcut__finest": 8}, "^shortcut.finest=8: steps have a size on the flow schedule"),
        ({**FEW, "prediction": "v"}, "^prediction='v': shortcuts are of predictions of x0; use x0"),
        ({**FEW, "noise__num_steps": 1000}, "^noise.num_steps=1000: .* equal steps; use 1009"),
        ({**FEW, "sampler__steps": 5}, "^sampler.steps=5: the network knows 16 steps, half of"),
        ({**FEW, "sampler__steps": 0}, "^sampler.steps=0: the network knows 16 steps, half of"),
        ({**FEW, "sampler__steps": 32}, "^sampler.steps=32: the network knows 16 steps, half of"),
        ({**FEW, "shortcut__share": 0.0}, "^shortcut.share=0.0: must be "),
        ({"resampling__share": 0.5}, "^resampling.share=0.5: only teacher-forced steps read"),
        ({"resampling__shift": 0.0}, "^resampling.shift=0.0: must be "),
        ({"layout": "forced"}, "^layout='forced': unknown; use one of diffusion_forcing, "),
        ({"layout": "teacher_forced=half"}, "^layout=.*: teacher_forced needs a probability"),
        ({"layout": "teacher_forced=0.5"}, "^layout=.*: the shares sum to 0.5; they must sum to 1"),
        (
            {"layout": "teacher_forced", "model__mixer__mask": "full", "sampler__memory": "none"},
            "^layout='teacher_forced': this mixer sees later frames",
        ),
        ({"layout": "clean_prefix,clean_prefix=0"}, "^layout=.*: names clean_prefix twice"),
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
        ({"sampler__guidance": 1e300}, r"^sampler\.guidance=1e\+300: must be at most 1000"),
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


def test_a_pyramid_starts_frames_at_parts_of_iterations():
    task = Task(**fields(sampler__schedule="pyramid", sampler__s=1.5))
    assert [task.schedule(6).start(frame) for frame in range(5)] == [0, 1, 3, 4, 6]


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
