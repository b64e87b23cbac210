"""The masked transformer as a task: loss, guidance, streams, conditions of pixels, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import masked_transformer
from jaxvid import data
from jaxvid.bench import masked as bench
from jaxvid.bench import timing
from jaxvid.data.transforms import normalize, to_uint8
from jaxvid.errors import UserError
from jaxvid.masking import commit, draws
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import batch_sharding, shard_params
from jaxvid.runs import make_task, open_tokenizer
from jaxvid.tasks.base import Run
from jaxvid.tasks.streaming import Decoded
from jaxvid.tasks.windows import Carry
from jaxvid.training.recorder import Recorder
from tests.tokenizer_runs import FAST, coded, encoded, gaussian

pytestmark = pytest.mark.slow
MASK = 16  # the id after the codes of `coded`
CLIPS = 2


def config_of(options="", **changes):
    """A model of 3 latents of 3 x 3 tokens, of which the network sees 2 at once."""
    config = masked_transformer.get_config(options)
    model = {"model.width": 16, "model.depth": 1, "model.heads": 2, "model.scan": False}
    own = {"given": 1, "window": 3, "tokenizer": str(coded()), "sampler.steps": 3}
    own |= {"sampler.keep": 1}
    config.update_from_flattened_dict(
        FAST
        | {f"task.{name}": value for name, value in (model | own).items()}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config.lock()


@functools.cache
def made(options="", **changes):
    """(config, task, parameters that have moved from zero, a batch of two clips)."""
    config = config_of(options, **changes)
    task = make_task(config.task)
    iterator = data.make_iterator(config.data, split="train", seed=0, batch_size=CLIPS)
    batch = next(iterator)
    params, _ = jax.jit(task.init)(jax.random.key(1), batch)
    leaves, form = jax.tree.flatten(params)
    rngs = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.3 * jax.random.normal(rng, x.shape) for x, rng in zip(leaves, rngs)]
    return config, task, jax.tree.unflatten(form, moved), batch


def cond_of(batch, **others):
    return {"num": CLIPS, "text": batch["text"], **others}


def ids_of(task, params, cond, seed=0, frames=5, carry=None):
    """All ids of a stream, and the stream."""
    rng = jax.random.key(seed)
    stream = task.stream(params, rng, cond, frozen=task.frozen(), frames=frames, carry=carry)
    return np.concatenate([np.asarray(ids) for ids in stream], axis=1), stream


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("of", ["masked", "all"])
def test_the_loss_is_the_cross_entropy_of_its_targets(parts, of):
    smoothing = 0.2
    changes = {"task__model__parts": parts, "task__mask__loss": of, "task__mask__prefix": 0.0}
    _, task, params, batch = made(task__mask__smoothing=smoothing, **changes)
    ids_BTN = jax.random.randint(jax.random.key(0), (CLIPS, 2, 9), 0, MASK)
    context_BME = task._context(params, jnp.zeros(CLIPS, bool), batch)
    seen = []

    def recorded(variables, ids, *others):
        logits, scores = task.model.__class__.apply(task.model, variables, ids, *others)
        seen.append((np.asarray(ids), np.asarray(logits, np.float64)))
        return logits, scores

    object.__setattr__(task.model, "apply", recorded)
    try:
        arguments = ids_BTN, True, context_BME, None, jax.random.key(3)
        loss, metrics, weight = task._loss(params, *arguments)
    finally:
        object.__delattr__(task.model, "apply")
    [(inputs_BTN, logits_BTNPV)] = seen
    masked, V = inputs_BTN == MASK, 16 // (4 if parts == 2 else 1)
    np.testing.assert_array_equal(inputs_BTN[~masked], ids_BTN[~masked])
    total, right = 0.0, 0
    targets = np.argwhere(masked if of == "masked" else np.ones_like(masked))
    for b, t, n in targets:
        digits = [int(ids_BTN[b, t, n]) // V**p % V for p in range(parts)]
        for p, digit in enumerate(digits):
            log_V = logits_BTNPV[b, t, n, p]
            log_V = log_V - np.log(np.exp(log_V - log_V.max()).sum()) - log_V.max()
            wanted = np.full(V, smoothing / V)
            wanted[digit] += 1 - smoothing
            total -= (wanted * log_V).sum()
        is_right = list(logits_BTNPV[b, t, n].argmax(-1)) == digits
        right += bool(masked[b, t, n] and is_right)
    assert weight == len(targets)
    np.testing.assert_allclose(loss, total / len(targets), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], right / masked.sum(), rtol=1e-6)


def test_only_free_tokens_are_masked_and_as_many_as_asked():
    rng = np.random.default_rng(0)
    is_free_BTN = rng.random((64, 3, 9)) < 0.5
    is_free_BTN[0] = False
    is_free_BTN[0, 0, 0] = True
    share_B = jnp.asarray(rng.random(64), jnp.float32).at[:2].set(0)
    masked = np.asarray(draws.masked_at(jax.random.key(0), jnp.asarray(is_free_BTN), share_B))
    assert not (masked & ~is_free_BTN).any()
    free_B = is_free_BTN.sum((1, 2))
    expected = np.maximum(np.round(np.float32(share_B) * free_B), 1)
    np.testing.assert_array_equal(masked.sum((1, 2)), expected)


def test_known_first_latents_are_as_frequent_as_asked():
    is_free_BTN = np.asarray(draws.after_prefix(jax.random.key(0), (4000, 5, 3), 0.3))
    known_B = 5 - is_free_BTN[:, :, 0].sum(1)
    np.testing.assert_array_equal(is_free_BTN[:, :, 0], np.arange(5) >= known_B[:, None])
    assert (is_free_BTN == is_free_BTN[:, :, :1]).all()
    shares = np.bincount(known_B, minlength=5) / 4000
    expected = np.array([0.7, *[0.3 / 4] * 4])
    assert (np.abs(shares - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5).all()


def test_conditions_are_dropped_at_the_stated_rate(monkeypatch):
    _, task, params, _ = made(task__condition__drop=0.3)
    drops = []
    monkeypatch.setattr(task, "_context", lambda params, drop_B, batch: drops.append(drop_B))
    monkeypatch.setattr(task, "_loss", lambda *arguments: (0.0, {}, 1))
    batch = {"tokens": jnp.zeros((4000, 3, 9), jnp.int32)}
    task.loss(params, batch, jax.random.key(0), step=0, frozen={}, extra={})
    assert abs(float(drops[0].mean()) - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_guidance_1_is_conditional_and_0_is_null():
    _, task, params, batch = made()
    contexts = task._contexts(params, cond_of(batch))
    ids_BTN = jnp.full((CLIPS, 2, 9), MASK)
    calls = []

    def apply(ids, is_first, context):
        calls.append(len(ids))
        return task.model.apply({"params": params["model"]}, ids, is_first, context)[0]

    def guided(scale):
        task.guidance = scale
        return task._guided(apply, (ids_BTN, True), contexts)

    old = task.guidance
    try:
        conditional, null = (apply(ids_BTN, True, context) for context in contexts)
        assert np.abs(conditional - null).max() > 0.01
        calls.clear()
        np.testing.assert_array_equal(guided(1.0), conditional)
        assert calls == [CLIPS]  # no evaluation of the null condition
        np.testing.assert_allclose(guided(0.0), null, atol=1e-6)
        expected = null + 3 * (conditional - null)
        np.testing.assert_allclose(guided(3.0), expected, atol=1e-5)
        assert calls == [CLIPS, 2 * CLIPS, 2 * CLIPS]
    finally:
        task.guidance = old


def test_streams_repeat_and_do_not_depend_on_their_batch():
    _, task, params, batch = made()
    cond = cond_of(batch)
    ids_BTN, _ = ids_of(task, params, cond)
    assert ids_BTN.shape == (CLIPS, 3, 9) and ids_BTN.min() >= 0 and ids_BTN.max() < MASK
    np.testing.assert_array_equal(ids_of(task, params, cond)[0], ids_BTN)
    assert (ids_of(task, params, cond, seed=1)[0] != ids_BTN).any()
    alone = {"num": 1, "text": batch["text"][:1]}
    np.testing.assert_array_equal(ids_of(task, params, alone)[0], ids_BTN[:1])


def test_a_stream_goes_on_to_the_same_latents_by_one_program():
    _, task, params, batch = made(task__sampler__steps=2)
    cond = cond_of(batch)
    before = task._advance._cache_size()
    whole, _ = ids_of(task, params, cond, frames=17)
    assert whole.shape == (CLIPS, 9, 9)
    for frames in (3, 5, 7):
        begun, stream = ids_of(task, params, cond, frames=frames)
        later, _ = ids_of(task, params, cond, frames=17, carry=stream.carry)
        np.testing.assert_array_equal(np.concatenate([begun, later], axis=1), whole)
    assert task._advance._cache_size() == before + 1


def test_a_switch_changes_the_latents_after_it_alone():
    _, task, params, batch = made(task__sampler__steps=2)
    cond, rng = cond_of(batch), jax.random.key(0)
    whole, _ = ids_of(task, params, cond, frames=17)
    other = {**cond, "text": cond["text"][::-1]}

    def run(place, resumed):
        stream = task.stream(params, rng, cond, frozen=task.frozen(), frames=17)
        ids = [next(stream) for _ in range(place)]
        stream.switch(other)
        if resumed:  # after the next latent; the conditions travel in `carry`
            ids.append(next(stream))
            options = dict(frozen=task.frozen(), frames=17, carry=stream.carry)
            stream = task.stream(params, rng, cond, **options)
        return np.concatenate([*ids, *stream], axis=1)

    for place in (1, 3, 6):
        ids = run(place, resumed=False)
        assert ids.shape == whole.shape
        np.testing.assert_array_equal(ids[:, :place], whole[:, :place])
        assert (ids[:, place:] != whole[:, place:]).any()
        np.testing.assert_array_equal(run(place, resumed=True), ids)
        if place == 1:  # its window was finished, and is not kept
            assert (ids[:, 1] != whole[:, 1]).any()
    task.check_switch(3, given=0, frames=17)
    with pytest.raises(UserError, match=r"^frame=4: does not suit the tokenizer"):
        task.check_switch(4, given=0, frames=17)


def test_a_negative_text_takes_the_place_of_no_text():
    _, task, params, batch = made()
    negative = cond_of(batch, negative_text=batch["text"][::-1])
    context_BME, null_BME = task._contexts(params, negative)
    swapped = task._contexts(params, cond_of({"text": batch["text"][::-1]}))[0]
    np.testing.assert_allclose(null_BME, swapped, atol=1e-6)
    np.testing.assert_array_equal(context_BME, task._contexts(params, cond_of(batch))[0])


def test_a_stream_goes_on_from_what_the_disk_keeps(tmp_path):
    config, task, params, batch = made(task__sampler__steps=2)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    run, cond = Run(config, task, params, task.frozen(), 2, mesh), cond_of(batch)

    def opened():
        return Decoded(run, cond, 17, jax.random.key(0), {7: {"text": batch["text"][::-1]}})

    def taken(pieces, count):
        return [next(pieces)[0] for _ in range(count)]

    with jax.set_mesh(mesh):
        whole = np.concatenate(taken(opened(), 9), axis=1)
        for count in (2, 4, 6):  # within a window, at the switch and after it
            pieces, recorder = opened(), Recorder(tmp_path / str(count), 8.0, {})
            for clip_BTHWC in taken(pieces, count):
                recorder.write(clip_BTHWC)
            recorder.save(pieces.state())
            recorder = Recorder(tmp_path / str(count), 8.0, {})
            recorder.resume()
            later = opened()
            taken(later, 1)
            later.restore(recorder.restored(later.state()), recorder.frames)
            rest = np.concatenate(taken(later, 9 - count), axis=1)
            np.testing.assert_array_equal(rest, whole[:, 2 * count - 1 :])


def test_parallel_decoding_is_timed(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST", 1)
    monkeypatch.setattr(bench, "STEPS", (2,))
    figures = bench.sample(config_of(), None)
    row = figures["by_steps"][2]
    # 3 latents in windows of 2 that share 1; guidance evaluates twice.
    assert (row["windows"], row["evaluations"]) == (2, 8)
    assert row["clip_s"] > 0 and row["tokens_per_s"] > 0
    with pytest.raises(UserError, match=r"^latents: have no codes"):
        bench.sample(config_of(), object())


def test_the_tokenizer_has_no_options_of_the_model():
    assert masked_transformer.get_config("stage=tokenizer").task.name == "tokenizer"
    with pytest.raises(ValueError, match=r"^stage=tokenizer: has no critic; leave critic out"):
        masked_transformer.get_config("stage=tokenizer,critic=self")


def test_given_frames_begin_the_stream():
    _, task, params, batch = made()
    frozen = task.frozen()
    for given in (1, 3, 5):
        cond = cond_of(batch, first_frames=batch["video"][:, :given])
        tokens, _ = task.tokenizer.tokens(frozen, normalize(cond["first_frames"]))
        ids_BTN, _ = ids_of(task, params, cond, frames=7)
        assert ids_BTN.shape[1] == 4
        np.testing.assert_array_equal(ids_BTN[:, : tokens.shape[1]], tokens)


def test_windows_hold_the_last_latents_of_the_one_before():
    _, task, _, _ = made()
    ids_BWN = jnp.arange(2)[None, :, None] + jnp.zeros((CLIPS, 2, 9), jnp.int32)
    moved, first, known = task._place(Carry((), ids_BWN, 4, 2, 6))
    assert (first, known) == (5, 1)
    np.testing.assert_array_equal(moved[:, :1], ids_BWN[:, 1:])
    assert task._place(Carry((), ids_BWN, 0, 1, 1))[1:] == (0, 1)  # the first one is not full


@pytest.mark.parametrize("critic", ["self", "network"])
def test_critics_learn_from_drawn_tokens_and_rank_them(critic):
    _, task, params, batch = made(f"critic={critic}")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def of_critic(params):
        rng = jax.random.key(0)
        loss, (metrics, _, _) = task.loss(
            params, batch, rng, step=0, frozen=task.frozen(), extra={}
        )
        return metrics["critic"], loss

    (critic_loss, loss), gradient = of_critic(params)
    assert 0 < critic_loss < loss
    own = gradient["critic" if critic == "network" else "model"]
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(own["critic"]))
    if critic == "network":  # its gradient does not reach the generator
        assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(gradient["model"]))
    ids_BTN, _ = ids_of(task, params, cond_of(batch))
    assert ids_BTN.min() >= 0 and ids_BTN.max() < MASK


def test_conditions_of_pixels_stand_where_known_pixels_reach():
    changes = {"task__window": 5, "task__mask__commit": 1.0, "task__mask__prefix": 0.0}
    _, task, params, batch = made(**changes)
    frozen, seen = task.frozen(), []
    ids_BTN, _ = task.tokenizer.tokens(frozen, normalize(batch["video"]))
    known = task._condition(frozen, batch, jax.random.key(5))

    def recorded(variables, ids, is_first, context, is_condition):
        seen.append((np.asarray(ids), np.asarray(is_condition)))
        return task.model.__class__.apply(
            task.model, variables, ids, is_first, context, is_condition
        )

    object.__setattr__(task.model, "apply", recorded)
    try:
        context_BME = task._context(params, jnp.zeros(CLIPS, bool), batch)
        task._loss(params, ids_BTN, True, context_BME, known, jax.random.key(6))
    finally:
        object.__delattr__(task.model, "apply")
    [(inputs, is_condition)] = seen
    padded_ids, is_known = map(np.asarray, known)
    kept = (inputs != MASK) & ~is_condition
    np.testing.assert_array_equal(inputs[kept], np.asarray(ids_BTN)[kept])
    np.testing.assert_array_equal(inputs[is_condition], padded_ids[is_condition])
    assert (is_known[is_condition]).all() and not (is_known & (inputs == MASK)).any()
    assert is_condition.any() and (inputs == MASK).any()


@pytest.mark.parametrize("kind", commit.KINDS)
def test_filling_in_keeps_known_pixels(kind):
    _, task, params, batch = made(task__window=5, task__mask__commit=0.5)
    cond = {"num": CLIPS, "text": batch["text"], "video": batch["video"]}
    clips = to_uint8(
        np.asarray(task.fill(params, jax.random.key(0), cond, kind, frozen=task.frozen()))
    )
    known = commit.condition(kind, 5, (12, 12), 1).is_known_THW
    np.testing.assert_array_equal(clips[:, known], batch["video"][:, known])
    assert (clips[:, ~known] != batch["video"][:, ~known]).any()


def test_cached_tokens_give_the_loss_of_video():
    _, task, params, batch = made(task__mask__images=0.5)
    tokens, _ = task.tokenizer.tokens(task.frozen(), normalize(batch["video"]))
    cached = {"id": batch["id"], "text": batch["text"], "tokens": np.asarray(tokens)}

    @jax.jit
    def loss(params, rows, seed):
        rng = jax.random.key(seed)
        return task.loss(params, rows, rng, step=0, frozen=task.frozen(), extra={})[0]

    for seed in range(4):
        np.testing.assert_allclose(*(loss(params, x, seed) for x in (batch, cached)), rtol=1e-6)


def test_eight_devices_compute_the_loss_of_one():
    _, task, params, batch = made()
    batch = {name: np.concatenate([x, x]) for name, x in batch.items()}

    @jax.jit
    def loss(params, batch):
        rng = jax.random.key(3)
        return task.loss(params, batch, rng, step=0, frozen=task.frozen(), extra={})[0]

    expected = jax.value_and_grad(loss)(params, batch)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shard_params(params, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
        found = jax.value_and_grad(loss)(params, batch)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        # The small queries of the text reader enlarge the rounding of its gradients.
        np.testing.assert_allclose(x, y, atol=5e-4 * max(1.0, np.abs(y).max()))


def test_evaluation_of_cached_and_sampled_clips():
    config = config_of("data=latents,cond=none", data__path=str(encoded(coded())))
    task = make_task(config.task)
    task.check(data.make_source(config.data, "validation"))
    iterator = data.make_iterator(config.data, split="validation", seed=0, batch_size=1)
    batch = next(iterator)
    params, _ = task.init(jax.random.key(0), batch)
    scores = task.evaluate(params, batch, jax.random.key(1), frozen=task.frozen())
    # The head starts at zero: all tokens are as likely.
    np.testing.assert_allclose(scores["loss_by_level"], np.log(16), rtol=1e-5)
    assert scores["psnr"].shape == (1, 5) and np.isnan(scores["psnr"][0, 0])


@pytest.mark.parametrize(
    "options, changes, message",
    [
        ("", {"task__tokenizer": ""}, r"^task.tokenizer='': its tokens are what"),
        ("", {"task__tokenizer": "GAUSSIAN"}, r"^task.tokenizer='\w+': its latents have no codes"),
        ("", {"task__window": 4}, r"^task.window=4: does not suit the tokenizer: frames=4"),
        ("", {"task__window": 7}, r"^task.window=7: must lie between 2 and 5"),
        ("", {"task__given": 2}, r"^task.given=2: does not suit the tokenizer"),
        ("", {"task__sampler__keep": 2}, r"^task.sampler.keep=2: must lie between 1 and 1"),
        ("", {"task__sampler__top_p": 2.0}, r"^task.sampler.top_p=2.0: must lie between 0 and 1"),
        ("", {"task__mask__schedule": "sine"}, r"^task.mask.schedule='sine': unknown"),
        ("", {"task__mask__smoothing": 1.0}, r"^task.mask.smoothing=1.0: must be at least 0"),
        ("", {"task__mask__commit": 0.5}, r"^task.mask.commit=0.5: pixels are known of whole"),
        ("", {"task__model__parts": 3}, r"^task.model.parts=3: the tokenizer has 16 codes"),
        ("", {"task__critic": "both"}, r"^task.critic='both': unknown; use one of none"),
        (
            "",
            {"task__sampler__guidance": 1e9},
            r"^task.sampler.guidance=1000000000.0: must be at most",
        ),
        ("cond=none", {"task__sampler__guidance": 2.0}, r"^task.sampler.guidance=2.0: condition"),
    ],
)
def test_bad_settings(options, changes, message):
    changes = {n: str(gaussian()) if v == "GAUSSIAN" else v for n, v in changes.items()}
    with pytest.raises(UserError, match=message):
        make_task(config_of(options, **changes).task)


def test_what_training_never_saw_is_refused():
    _, task, params, batch = made(task__window=5)
    with pytest.raises(UserError, match=r"^frames=7: training saw only first windows"):
        ids_of(task, params, cond_of(batch), frames=7)
    cond = cond_of(batch, video=batch["video"])
    arguments = params, jax.random.key(0), cond, "inpaint_central"
    with pytest.raises(UserError, match=r"^fill='inpaint_central': training had no conditions"):
        task.fill(*arguments, frozen=task.frozen())


def test_another_tokenizer_is_refused():
    config = config_of(task__tokenizer_digest="0" * 16)
    digest = open_tokenizer(str(coded())).digest
    with pytest.raises(UserError, match=rf"its weights are {digest}"):
        make_task(config.task)
