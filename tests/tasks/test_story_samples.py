"""Streams of AR-Diffusion whose prompt changes, beside clips without any cache."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion import samplers
from jaxvid.errors import UserError
from jaxvid.tasks import streaming
from jaxvid.tasks.ar_diffusion import Task
from tests.tasks.test_ar_diffusion import batch, fields, opened

TOTAL, STEPS = 10, 3
TEXTS = [batch(2, seed)["text"] for seed in range(3)]
RNG = jax.random.key(3)


def make(options="", **changes):
    changes = {"sampler__steps": STEPS, "sampler__s": STEPS, **changes}
    return Task(**fields(f"cond=text{options}", model__dtype="float32", **changes))


def told(task, params, story, frames=TOTAL, **cond):
    """Latents of a stream whose text changes as {frame: text} says; the first one is at 0."""
    cond = {"num": 2, "text": story[0], **cond}
    stream, found, done = task.stream(params, RNG, cond, frozen={}, frames=frames), [], 0
    while done < frames:
        if done in story and done:
            stream.switch({**cond, "text": story[done]})
        found.append(next(stream))
        done += found[-1].shape[1]
    return np.concatenate(found, axis=1)


def by_hand(task, params, story, forgets=None, negative=None):
    """The same by calls for whole clips, in which a frame sees what the mask of the mixer allows.

    forgets: frames that are left after a switch, where the mixer forgets the others.
    """
    schedule, scale = task.schedule(TOTAL), task.sampler["guidance"]
    frames, levels = np.arange(TOTAL), task.noise.levels(STEPS)
    noise_F = np.full(TOTAL, task.noise.num_steps)
    x_BFNC = samplers.frame_noise(RNG, frames, noise_F, (2, TOTAL, 4, 48))
    apply = jax.jit(task._apply)

    def context(text):
        return task._context(params, jnp.zeros(2, bool), {"text": text})

    for k in range(schedule.iterations):
        before = schedule.index_IF[k - 1] if k else 0 * frames
        finished = schedule.finished_I[k - 1] if k else 0
        switch = max(frame for frame in story if frame <= finished)
        first = max(switch - forgets, 0) if forgets and switch else 0

        def predict(x_BTNC, t_BT, state, switch=switch, first=first):
            part = x_BTNC[:, first:], t_BT[:, first:]
            cond = apply(params, *part, context(story[switch]))[0]
            if scale != 1:
                other = apply(params, *part, context(negative))[0]
                cond = other + scale * (cond - other)
            return jnp.pad(cond, ((0, 0), (first, 0), (0, 0), (0, 0))), None

        times = levels[before], levels[schedule.index_IF[k]]
        new = task.solver.step(predict, x_BFNC, *times, None, RNG, frames)
        x_BFNC = jnp.where(schedule.update_IF[k][:, None, None], new, x_BFNC)
    return x_BFNC


ANCHORED = {"window": 4, "sinks": 2, "positions": "anchored"}
ANCHORED_FIELDS = {f"model__mixer__{name}": value for name, value in ANCHORED.items()}


@pytest.mark.parametrize(
    "options, changes, mixer, forgets",
    [
        ("", dict(sampler__s=1), ANCHORED, None),  # three frames are in flight
        ("", dict(sampler__guidance=2.0), {"window": 3}, None),
        (",size=s", dict(model__depth=2), {"window": 10}, None),  # factorised; sees all frames
        (",mixer=gated_delta", {}, {}, 5),
    ],
)
def test_later_frames_read_the_new_prompt_and_the_frames_before_it(
    options, changes, mixer, forgets
):
    """One layer makes keys of single frames, so a window that is read again is the one it was."""
    mixer = {f"model__mixer__{name}": value for name, value in mixer.items()}
    if "size=s" in options:
        mixer["model__arrangement"] = "factorised"
    task = make(options, **changes, **mixer)
    params, story = opened(task), {0: TEXTS[0], 1: TEXTS[1], 8: TEXTS[2]}
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    negative = TEXTS[2][::-1]
    wanted = by_hand(task, params, story, forgets, negative)
    cond = {} if task.sampler["guidance"] == 1 else {"negative_text": negative}
    found = told(task, params, story, **cond)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    other = told(task, params, {0: TEXTS[0], 1: TEXTS[1]}, **cond)
    np.testing.assert_array_equal(other[:, :8], found[:, :8])
    assert np.abs(other[:, 8:] - found[:, 8:]).max((0, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("last, given", [(3, 0), (3, 2), (7, 5), (20, 0)])
def test_what_is_kept_are_the_first_and_the_last_frames(last, given):
    """Of pieces of which only the first frames are finished, as in overlapping schedules."""
    frames = np.arange(1.0, 25)[None, :, None, None]
    kept = streaming.keep(streaming.keep_nothing(2, last, (1, 1, 1)), frames[:, :given], given)
    done = given
    for count in (1, 0, 2, 4, 3, 1):
        kept = streaming.keep(kept, frames[:, done : done + 4], count)
        done += count
        wanted = np.concatenate([np.zeros(last), np.arange(1, done + 1)])[-last:]
        np.testing.assert_array_equal(kept.last_BRNC[0, :, 0, 0], wanted)
        np.testing.assert_array_equal(kept.first_BSNC[0, :, 0, 0], [1, 2 * (done > 1)])
        assert kept.total == done


@pytest.mark.parametrize("window, sinks", [(12, 0), (3, 1)])
def test_every_past_of_history_guidance_reads_the_frames_again(window, sinks):
    """As the stream would have read them under the new prompt, with the noise of their indices."""
    changes = {"history__guidance": 1.5, "history__level": 0.4, "history__window": 2}
    changes = {f"sampler__{name}": value for name, value in {**changes, "guidance": 2.0}.items()}
    mixer = dict(model__mixer__window=window, model__mixer__sinks=sinks)
    task = make(history_dropout=0.1, model__conv=1, **changes, **mixer)
    params, new = opened(task), {"text": TEXTS[1], "negative_text": TEXTS[2]}
    stream = task.stream(params, RNG, {"num": 2, "text": TEXTS[0]}, frozen={}, frames=8)
    z_BTNC = jnp.concatenate(list(itertools.islice(stream, 6)), axis=1)
    before = stream.carry.state
    stream.switch({"num": 2, **new})
    assert len(task.terms) == 4

    @jax.jit
    def wanted():
        predict, state, _ = task._open(params, RNG, new, {}, 2, None)
        return predict.commit(z_BTNC, state)

    def checked(path, found, wanted, before):
        assert not jnp.issubdtype(found.dtype, jnp.integer) or (found == wanted).all(), path
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=str(path))
        return np.abs(found - before).max() > 1e-3

    changed = jax.tree_util.tree_map_with_path(checked, stream.carry.state, wanted(), before)
    # Each of the terms with a condition has the keys and values of its own one.
    assert [sum(jax.tree.leaves(state)) > 0 for state in changed.states] == [1, 1, 1, 0]


def test_a_stream_goes_on_from_before_and_after_a_switch():
    """What it carries is all that a switch needs; frames beyond the last one count too."""
    task, story = make(sampler__s=1, **ANCHORED_FIELDS), {0: TEXTS[0], 5: TEXTS[1]}
    params = opened(task)
    whole = told(task, params, story)
    for stop in (5, 7):
        cond, carry, found = {"num": 2, "text": TEXTS[0]}, None, []
        for frames in (stop, TOTAL):
            stream = task.stream(params, RNG, cond, frozen={}, frames=frames, carry=carry)
            for done in range(len(found), frames):
                if done == 5:
                    stream.switch({"num": 2, "text": TEXTS[1]})
                found.append(next(stream))
            assert stream.is_whole
            carry = jax.device_get(stream.carry)
        np.testing.assert_array_equal(np.concatenate(found, axis=1), whole)


def test_frames_that_are_read_again_begin_with_the_given_ones():
    """A prompt that begins after them gives what it gives from the start."""
    task = make()
    params, given = opened(task), batch(2)["video"][:, :2]
    apart = [told(task, params, {0: text}, first_frames=given, frames=5) for text in TEXTS[:2]]
    story, compiled = {0: TEXTS[0], 2: TEXTS[1]}, task._advance._cache_size()
    found = told(task, params, story, first_frames=given, frames=5)
    assert task._advance._cache_size() == compiled  # one program before and after a switch
    np.testing.assert_allclose(found, apart[1], atol=1e-5)
    assert np.abs(found - apart[0]).max() > 1e-3


@pytest.mark.parametrize(
    "changes, frame, given, words",
    [
        (dict(schedule="ad", s=1), 5, 0, ""),
        (dict(schedule="block_causal", block=3), 6, 0, ""),
        (dict(schedule="block_causal", block=3), 7, 1, ""),
        (dict(schedule="block_causal", block=3), 7, 0, "^frame=7: schedule=block_causal finishes"),
        (dict(schedule="pyramid", s=0.5, steps=2), 2, 0, ""),
        (dict(schedule="pyramid", s=0.5, steps=2), 3, 0, "^frame=3: schedule=pyramid finishes it"),
        (dict(schedule="ad", s=0), 3, 0, "^frame=3: schedule=ad finishes it together .* use the"),
    ],
)
def test_a_switch_is_where_a_piece_ends(changes, frame, given, words):
    changes = {f"sampler__{name}": value for name, value in changes.items()}
    task = make(model__mixer__window=6, **changes)
    frames = 6 if changes.get("sampler__s") == 0 else 9
    if not words:
        task.check_switch(frame, given=given, frames=frames)
        return
    with pytest.raises(UserError, match=words):
        task.check_switch(frame, given=given, frames=frames)


def test_a_stream_without_condition_has_none_to_change():
    task = Task(**fields())
    stream = task.stream(opened(task), RNG, {"num": 2}, frozen={}, frames=3)
    assert stream.carry.kept is None
    with pytest.raises(UserError, match="a stream without condition has none"):
        stream.switch({"num": 2})
