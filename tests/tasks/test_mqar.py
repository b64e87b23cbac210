"""Associative recall: its answers, a model that streams, and one that learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import mqar as config_file
from jaxvid.data import mqar as symbols
from jaxvid.errors import UserError
from jaxvid.models.recall import Recall
from jaxvid.tasks.mqar import Task, answers, read
from tests import laws
from tests.laws import disturbed


def configuration(mixer, **changes):
    config = config_file.get_config(f"mixer={mixer}")
    small = {"data.vocabulary": 16, "data.frames": 16, "data.pairs": (2, 4), "task.model.heads": 2}
    config.update_from_flattened_dict({**small, "task.model.width": 16, **changes})
    return config.copy_and_resolve_references()


def task(config):
    return Task(**{name: value for name, value in config.task.items() if name != "name"})


def batch(config, size=64, first=0):
    source = symbols.Source(config.data, "train")
    video = np.stack([source[i]["video"] for i in range(first, first + size)])
    return {"video": video, "id": np.arange(size, dtype=np.int32)}


def test_answers_are_the_values_of_the_pairs():
    config = configuration("gla")
    ids = np.asarray(read(batch(config, 20)["video"]))
    answer, is_query = answers(jnp.asarray(ids), 16)
    for row, answer_T, is_query_T in zip(ids, answer, is_query):
        pairs = (row >= 8).sum()
        pairs_of_row = dict(row[: 2 * pairs].reshape(-1, 2).tolist())
        expected = [
            pairs_of_row.get(i, 0) if t >= 2 * pairs else 0 for t, i in enumerate(row.tolist())
        ]
        np.testing.assert_array_equal(answer_T, expected)
        np.testing.assert_array_equal(is_query_T, np.array(expected) > 0)


def test_symbols_above_a_byte_are_read_back():
    ids = np.array([0, 1, 255, 256, 65_535])
    np.testing.assert_array_equal(read(jnp.asarray(symbols.paint(ids, 3))[None])[0], ids)


@pytest.mark.parametrize(
    "mixer", [{"name": "softmax"}, {"name": "gated_delta"}, {"name": "gla", "every": 2}]
)
def test_the_model_streams(mixer):
    model = Recall(12, width=8, depth=2, heads=2, mixer=mixer)
    ids = jax.random.randint(jax.random.key(0), (2, laws.FRAMES), 0, 12)
    params = disturbed(jax.jit(model.init)(jax.random.key(1), ids))
    layer = functools.partial(model.apply, params)
    laws.streaming(layer, ids, plans=([1, 8, 4], [0, 13]), gradients=False)


def learned(config, steps):
    """(task, its parameters after so many steps, the share of right answers in the last one)."""
    learner = task(config)
    params, _ = jax.jit(learner.init)(jax.random.key(0), batch(config))

    tx = optax.adam(0.01)

    @jax.jit
    def step(params, opt_state, rows):
        def loss(params):
            return learner.loss(params, rows, None, step=0, frozen={}, extra={})

        grads, (metrics, _, _) = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, metrics["accuracy"]

    opt_state = tx.init(params)
    for i in range(steps):
        params, opt_state, accuracy = step(params, opt_state, batch(config, 64, 64 * i))
    return learner, params, accuracy


@pytest.mark.slow
def test_a_mixer_of_constant_memory_recalls_through_its_state():
    """Lightning; with heads that forget within a frame, only the convolution remains."""
    accuracy = {}
    for slopes in ("0.0,0.1", "100,100"):
        config = configuration(
            "lightning", **{"task.model.depth": 1, "task.model.mixer.slopes": slopes}
        )
        accuracy[slopes] = float(learned(config, 200)[2])
    assert accuracy["0.0,0.1"] > 0.9 and accuracy["100,100"] < 0.3  # chance is 1/8


@pytest.mark.slow
def test_one_layer_learns_to_recall_and_its_scores_match_its_samples():
    config = configuration("softmax", **{"task.model.depth": 1})
    learner, params, accuracy = learned(config, 150)
    assert accuracy > 0.9  # chance is 1/8

    rows = batch(config, 32, 50_000)
    scores = learner.evaluate(params, rows, None, frozen={})
    shown = learner.sample(params, None, {"num": 32, "video": rows["video"]}, frozen={})
    shown_ids = np.rint((np.asarray(shown)[:, :, 0, 0, 0] + 1) * 127.5)
    answer, is_query = (np.asarray(x) for x in answers(read(rows["video"]), 16))
    right = np.where(is_query, shown_ids == answer, False).sum(1) / is_query.sum(1)
    np.testing.assert_allclose(scores["accuracy"], right)
    weight = jax.jit(lambda: learner.loss(params, rows, None, step=0, frozen={}, extra={})[1][2])
    assert weight() == is_query.sum()
    few = is_query.sum(1) == 2
    np.testing.assert_allclose(scores["accuracy_2"][few], right[few])
    assert np.isnan(scores["accuracy_2"][~few]).all() and np.isnan(scores["accuracy_4"][few]).all()
    assert (shown_ids == np.asarray(read(rows["video"])))[~is_query].all()
    assert (scores["state"] == 15 * 16 * 2).all()  # keys and values of all frames but one


@pytest.mark.parametrize("mixer", ["gla", "softmax"])
def test_the_task_traces(mixer):
    """By shapes alone: nothing is compiled."""
    config = configuration(mixer)
    learner, rows, rng = task(config), batch(config, 2), jax.random.key(0)
    params, extra = jax.eval_shape(learner.init, rng, rows)
    loss = functools.partial(learner.loss, step=0, frozen={}, extra=extra)
    value, (metrics, _, _) = jax.eval_shape(loss, params, rows, rng)
    assert value.shape == metrics["accuracy"].shape == ()
    scores = jax.eval_shape(functools.partial(learner.evaluate, frozen={}), params, rows, rng)
    assert {name: x.shape for name, x in scores.items()} == dict.fromkeys(
        ("accuracy", "accuracy_2", "accuracy_4", "state"), (2,)
    )


@pytest.mark.parametrize(
    "mixer, changes, words",
    [
        ("gla", {"mixer.name": "rnn"}, "model.mixer.name='rnn': unknown; use one of"),
        ("gla", {"heads": 3}, "model.heads=3: does not divide width=16"),
        ("gated_delta", {"mixer.conv": 0}, "model.mixer.conv=0: "),
        ("lightning", {"mixer.slopes": "0.5"}, "model.mixer.slopes='0.5': "),
    ],
)
def test_bad_settings_are_refused_in_one_line(mixer, changes, words):
    changes = {f"task.model.{name}": value for name, value in changes.items()}
    with pytest.raises(UserError, match=f"^{words}"):
        task(configuration(mixer, **changes))


def test_slopes_are_set_from_a_config():
    learner = task(configuration("lightning", **{"task.model.mixer.slopes": "0.5,0.25"}))
    assert learner.model.mixer["slopes"] == "0.5,0.25"
    jax.eval_shape(learner.init, jax.random.key(0), {"video": np.zeros((1, 4, 2, 2, 3), np.uint8)})
