"""History guidance of AR-Diffusion: how training drops the past, and what sampling reads of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion import samplers, training_clip
from jaxvid.errors import UserError
from jaxvid.mixers import skip
from jaxvid.tasks.ar_diffusion import Task
from tests.tasks.test_ar_diffusion import batch, fields, objective, opened


def make(options="", scale=1.0, level=0.0, window=0, **changes):
    history = dict(guidance=scale, level=level, window=window)
    changes |= {f"sampler__history__{name}": value for name, value in history.items()}
    return Task(**fields(options, **{"history_dropout": 0.1, **changes}))


@pytest.mark.parametrize("layout", ["teacher_forced", "clean_prefix"])
def test_a_batch_without_its_history_trains_a_stream_that_skipped_frames(layout):
    """The loss is the mean error of its frames, one after another, at their own positions."""
    options = dict(prediction="x0", weight="uniform", history_dropout=1.0)
    # The distance to the context counts where the mixer reads it.
    task = make(f"cond=class,layout={layout}", model__arrangement="joint", **options)
    params = jax.tree.map(lambda leaf: 3 * leaf, opened(task))
    data, rng = batch(), jax.random.key(3)
    z_BTNC = task._encode({}, data["video"])
    rng_clip, rng_eps, rng_drop, _ = jax.random.split(rng, 4)
    clip = task._draw(rng_clip, z_BTNC, 0)
    begin, first, t_BT, left = clip.begin, clip.z_BTNC, clip.t_BT, 6 - int(clip.begin)
    assert 2 <= left <= 5
    np.testing.assert_array_equal(first[:, :left], z_BTNC[:, begin:])
    is_forced, is_target_BT = layout == "teacher_forced", np.asarray(clip.is_target_BT)
    prefix_B = (~is_target_BT).argmin(1)
    assert ((t_BT == 0).argmin(1) == prefix_B).all() and not is_target_BT[:, left:].any()
    assert (prefix_B == 0).all() if is_forced else (prefix_B > 0).all() and (prefix_B < left).all()
    x_BTNC = task.noise.add_noise(first, jax.random.normal(rng_eps, z_BTNC.shape), t_BT)
    x_BTNC = jnp.where(is_target_BT[:, :, None, None], x_BTNC, first)
    drop_B = jax.random.bernoulli(rng_drop, task.drop, (2,))
    apply = jax.jit(task._apply)
    _, state = apply(params, x_BTNC[:, :0], t_BT[:, :0], task._context(params, drop_B, data))
    state, errors = skip(state, begin), []
    for f in range(left):
        frame = slice(f, f + 1)
        x0_BTNC, after = apply(params, x_BTNC[:, frame], t_BT[:, frame], None, state)
        if is_forced:
            after = apply(params, first[:, frame], 0 * t_BT[:, frame], None, state)[1]
        state = after
        errors.append(jnp.square(x0_BTNC - first[:, frame]).mean((1, 2, 3)))
    wanted = np.stack(errors, axis=1)[is_target_BT[:, :left]].mean()
    np.testing.assert_allclose(objective(task)(params, data, 3)[0], wanted, rtol=1e-5)


def test_history_is_dropped_at_the_stated_rate_and_every_clip_keeps_a_target():
    z_BTNC, t_BT = jnp.zeros((2, 6, 1, 1)), jnp.full((2, 6), -1)

    @jax.jit
    @jax.vmap
    def draw(rng):
        begin, _, t = training_clip.drop_history(rng, z_BTNC, t_BT, 0.2, 1000)
        return begin, t[:, 0] >= 0

    begins, is_iid = draw(jax.random.split(jax.random.key(0), 4000))
    for shares in (begins > 0, is_iid):
        assert abs(shares.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 4000)
    assert set(begins.tolist()) == {0, 1, 2, 3, 4, 5}

    never = make("layout=clean_prefix", history_dropout=1.0)
    params, data = opened(never), batch()

    def loss(rng):
        value, (_, _, targets) = never.loss(params, data, rng, step=0, frozen={}, extra={})
        return value, targets

    values, targets = jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(1), 32))
    assert np.isfinite(values).all() and targets.min() >= 2 and targets.max() <= 8


STEPS, GIVEN, TOTAL = 3, 2, 7


def by_hand(task, level, window, scale, params, rng, cond):
    """A guided clip, one frame after another, by calls for whole clips and without any cache.

    Without a condition only distances count, so a frame without past is the first of a clip.
    """
    z_BTNC = np.zeros((2, TOTAL, 4, 48), np.float32)
    z_BTNC[:, :GIVEN] = task._encode({}, cond["first_frames"])
    frames, shape = np.arange(TOTAL), z_BTNC.shape
    noise_BTNC = samplers.frame_noise(rng, frames, np.full(TOTAL, 1000), shape)
    past_BTNC = samplers.frame_noise(rng, frames, np.full(TOTAL, 1000 + level), shape)
    short = task._with_window(window, sinks=0) if window else task.model
    run = jax.jit(lambda x, t: task._apply(params, x, t)[0])
    run_short = jax.jit(lambda x, t: task._apply(params, x, t, model=short)[0])
    levels = task.noise.levels(STEPS)
    for f in range(GIVEN, TOTAL):
        is_past = np.arange(TOTAL) < f

        def predict(x_B1NC, t_B1, state, f=f, is_past=is_past):
            def at(f, past_BTNC, past_t):
                x = jnp.where(is_past[:, None, None], past_BTNC, 0).at[:, f].set(x_B1NC[:, 0])
                return x, jnp.where(is_past, past_t, 0).at[f].set(t_B1[0, 0])[None].repeat(2, 0)

            whole = run(*at(f, z_BTNC, 0))[:, f : f + 1]
            guiding = task.noise.add_noise(z_BTNC, past_BTNC, jnp.full((2, TOTAL), level))
            guiding = run_short(*at(f, guiding if level else z_BTNC, level))[:, f : f + 1]
            nothing = run(*at(0, z_BTNC, 0))[:, :1]
            return whole + (scale - 1) * (guiding - nothing), None

        x = noise_BTNC[:, f : f + 1]
        for before, after in itertools.pairwise(levels):
            times = np.array([before]), np.array([after])
            x = task.solver.step(predict, x, *times, None, rng, np.array([f]))
        z_BTNC[:, f : f + 1] = x
    return z_BTNC


@pytest.mark.parametrize(
    "level, window, options",
    [(0.4, 0, ""), (0.0, 3, "size=s"), (0.4, 0, "mixer=lightnet")],
)
def test_a_guided_sample_sums_the_predictions_of_its_pasts(level, window, options):
    """Windows and sinks hold for each past; a stream, cut and resumed, gives the same frames."""
    changes = dict(sampler__steps=STEPS, sampler__s=STEPS, model__dtype="float32")
    if "mixer" not in options:
        changes |= dict(model__mixer__window=5, model__mixer__sinks=1)
    task = make(options, scale=1.5, level=level, window=window, **changes)
    params, rng = opened(task), jax.random.key(3)
    cond = {"num": 2, "first_frames": batch()["video"][:, :GIVEN]}
    wanted = by_hand(task, round(level * 999), window, 1.5, params, rng, cond)
    parts = list(task.stream(params, rng, cond, frozen={}, frames=TOTAL))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), wanted, atol=1e-4)
    early = task.stream(params, rng, cond, frozen={}, frames=5)
    first = list(itertools.islice(early, 3))
    later = task.stream(params, rng, cond, frozen={}, frames=TOTAL, carry=early.carry)
    np.testing.assert_array_equal(np.concatenate([*first, *later], 1), np.concatenate(parts, 1))
    plain = make(options, **changes)
    assert plain.terms == {} and len(task.terms) == 3
    unguided = list(plain.stream(params, rng, cond, frozen={}, frames=TOTAL))
    assert np.abs(np.concatenate(unguided, axis=1) - wanted).max() > 1e-3


def test_a_short_past_keeps_the_cycle_of_positions():
    """Where it hides nothing, the network predicts the same."""
    cyclic = {"window": 5, "sinks": 1, "positions": "cyclic"}
    task = make(scale=1.5, window=3, **{f"model__mixer__{n}": v for n, v in cyclic.items()})
    params, t_BT = opened(task), jnp.full((2, 3), 500)
    x_BTNC = jax.random.normal(jax.random.key(0), (2, 3, 4, 48))
    models = [task._seeing(past, None) for past in task.terms]
    assert [model.mixer["window"] for model in models] == [5, 3, 5]
    whole, short, _ = (task._apply(params, x_BTNC, t_BT, model=model)[0] for model in models)
    np.testing.assert_allclose(short, whole, atol=1e-6)


def test_a_clip_with_history_guidance_equals_its_stream_and_drops_the_condition_too():
    """Frames overlap; and with a null context like the class, its guidance changes nothing."""
    cond = {"num": 1, "label": np.zeros(1, int)}
    rng, videos = jax.random.key(0), {}
    for condition in (1.0, 3.0):
        task = make("cond=class", scale=2.0, sampler__guidance=condition)
        params = opened(task)
        videos[condition, "other"] = task.sample(params, rng, cond, frozen={})
        params["conditioner"]["null"] = params["conditioner"]["classes"][0]
        videos[condition, "same"] = task.sample(params, rng, cond, frozen={})
    np.testing.assert_allclose(videos[1.0, "same"], videos[3.0, "same"], atol=1e-4)
    assert np.abs(videos[1.0, "other"] - videos[1.0, "same"]).max() > 1e-3
    parts = list(task.stream(params, rng, cond, frozen={}))
    streamed = task.decode({}, jnp.concatenate(parts, axis=1))[0]
    np.testing.assert_allclose(streamed, videos[3.0, "same"], atol=1e-5)


@pytest.mark.parametrize(
    "options, changes, words",
    [
        ("", dict(history_dropout=1.5), "^history_dropout=1.5: must lie between 0 and 1"),
        (
            "",
            dict(model__mixer__mask="full", sampler__memory="none"),
            "^history_dropout=0.1: this mixer sees later frames",
        ),
        (
            "",
            dict(scale=1.5, history_dropout=0.0),
            "^sampler.history.guidance=1.5: training never dropped the history; use 1, or train "
            "with task.history_dropout=0.1",
        ),
        ("", dict(scale=-1.0), "^sampler.history.guidance=-1.0: must be at least 0"),
        ("", dict(scale=1.5, sampler__memory="window"), "^sampler.history.guidance=1.5: reads "),
        ("", dict(scale=1.5, level=1.5), "^sampler.history.level=1.5: must lie between 0 and 1"),
        ("layout=teacher_forced", dict(scale=1.5, level=0.5), "^sampler.history.level=0.5: teach"),
        ("", dict(scale=1.5, window=1), "^sampler.history.window=1: a frame would see itself"),
        ("", dict(scale=1.5, window=6), "^sampler.history.window=6: the mixer .* a window of 6"),
        ("mixer=gla", dict(scale=1.5, window=3), "^sampler.history.window=3: this mixer sums all"),
        ("", dict(scale=1.5, window=2, sampler__s=1), "^sampler.s=1: "),
    ],
)
def test_history_guidance_that_cannot_work_is_refused_in_one_line(options, changes, words):
    with jax.transfer_guard("disallow"), pytest.raises(UserError, match=words) as caught:
        make(options, **changes)
    assert "\n" not in str(caught.value)
