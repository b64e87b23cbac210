"""The stream of batches: same on any topology, exactly resumable, honest about bad settings."""

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from jaxvid import data
from jaxvid.errors import UserError


def sprites_config(**changes):
    config = ConfigDict(
        dict(
            name="sprites",
            path="",
            frames=4,
            size=16,
            stride=1,
            batch_size=4,
            flip=False,
            crop="random",
            difficulty=0.5,
            num_clips=10,
            workers=0,
            threads=0,
            text_tokens=24,
            text_width=8,
        )
    )
    config.update(changes)
    return config


def batches(config, count, state=None, **options):
    options = dict(split="train", seed=3, batch_size=4, process_index=0, process_count=1) | options
    iterator = data.make_iterator(config, **options)
    if state is not None:
        iterator.set_state(state)
    taken = [next(iterator) for _ in range(count)]
    state = iterator.get_state()
    iterator.close()
    return taken, state


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def global_batches(config, count, hosts, state=None, **options):
    parts = [
        batches(config, count, state, process_index=host, process_count=hosts, **options)[0]
        for host in range(hosts)
    ]
    return [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts)
    ]


def test_batch_has_the_promised_keys_shapes_and_types():
    [batch], _ = batches(sprites_config(), 1)
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
    assert shapes == {
        "video": ((4, 4, 16, 16, 3), np.uint8),
        "id": ((4,), np.int32),
        "label": ((4,), np.int32),
        "text": ((4, 24, 8), np.float32),
    }
    [batch], _ = batches(sprites_config(text_tokens=0), 1)
    assert "text" not in batch


def test_batch_rows_are_the_clips_they_name():
    config = sprites_config()
    source = data.make_source(config, "train")
    [batch], _ = batches(config, 1)
    for row, index in enumerate(batch["id"]):
        np.testing.assert_array_equal(batch["video"][row], source[int(index)]["video"])
        assert batch["label"][row] == source[int(index)]["label"]


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(hosts):
    config = sprites_config()
    assert_same(batches(config, 6)[0], global_batches(config, 6, hosts))


def test_global_batches_do_not_depend_on_threads():
    assert_same(batches(sprites_config(), 6)[0], batches(sprites_config(threads=3), 6)[0])


def test_resume_is_exact_on_other_hosts_and_threads():
    whole, _ = batches(sprites_config(), 9)
    _, state = batches(sprites_config(threads=2), 4)
    resumed = global_batches(sprites_config(), 5, 2, state)
    assert_same(whole[4:], resumed)


@pytest.mark.slow
def test_workers_change_nothing():
    flags.FLAGS.mark_as_parsed()
    _, state = batches(sprites_config(), 3)
    rest, _ = batches(sprites_config(), 5, state)
    assert_same(rest, batches(sprites_config(workers=2), 5, state)[0])


def test_train_visits_every_clip_once_an_epoch_in_a_new_order():
    config = sprites_config(num_clips=12)
    ids = np.concatenate([batch["id"] for batch in batches(config, 6)[0]])
    first, second = ids[:12], ids[12:24]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()
    other = np.concatenate([batch["id"] for batch in batches(config, 3, seed=4)[0]])
    assert first.tolist() != other.tolist()


def test_validation_comes_in_order():
    ids = np.concatenate([b["id"] for b in batches(sprites_config(), 3, split="validation")[0]])
    assert ids.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "sprits"}, "data.name='sprits'"),
        ({"flip": True}, "data.flip=True"),
        ({"size": 0}, "data.size=0"),
        ({"crop": "middle"}, "data.crop='middle'"),
        ({"difficulty": 2.0}, "data.difficulty=2.0"),
        ({"num_clips": 0}, "no clips in the train split"),
    ],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        batches(sprites_config(**changes), 1)


def test_batch_must_divide_among_the_hosts():
    with pytest.raises(UserError, match=r"data\.batch_size=4: .* 3 hosts"):
        batches(sprites_config(), 1, process_count=3)


def test_throughput_counts_frames():
    assert data.throughput(sprites_config(), 0.2) > 100
