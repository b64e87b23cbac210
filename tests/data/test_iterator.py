"""Batches: the same on any topology, exactly resumable; refusals by field."""

import sys

import numpy as np
import pytest
from absl import flags

from jaxvid import data
from jaxvid.errors import UserError
from tests.videos import data_config


def sprites_config(**changes):
    fields = dict(size=16, batch_size=4, crop="random", difficulty=0.5, text_tokens=24)
    return data_config("sprites", **fields | changes)


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


def test_global_batches_do_not_depend_on_hosts_or_threads():
    alone, _ = batches(sprites_config(), 6)
    for hosts, threads in ((1, 3), (2, 2), (4, 0)):
        assert_same(alone, global_batches(sprites_config(threads=threads), 6, hosts))


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
    ("changes", "message"),
    [
        ({"name": "sprits"}, "name='sprits': unknown; use one of array_record, folder, .*sprites"),
        ({"name": "source"}, "name='source': unknown"),
        ({"name": "a.b"}, "name='a.b': unknown"),
        ({"flip": True}, "flip=True"),
        ({"crop": "middle"}, "crop='middle'"),
        ({"difficulty": 2.0}, "difficulty=2.0"),
        ({"num_clips": 0}, "name='sprites': no clips in the train split"),
        ({"batch_size": 6}, "batch_size=6: must be a multiple of the 4 hosts"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    config = sprites_config(**changes)
    with pytest.raises(UserError, match=f"^{message}"):
        batches(config, 1, batch_size=config.batch_size, process_count=4)


def test_check_bounds_the_shared_fields():
    data.check(sprites_config(threads=1, num_clips=1, text_tokens=0, size=1, frames=1))
    lowest = dict(frames=1, size=1, stride=1, batch_size=1, threads=1, text_width=1)
    lowest |= dict(workers=0, text_tokens=0, num_clips=1)
    for field, low in lowest.items():
        with pytest.raises(UserError, match=f"^{field}={low - 1}: must "):
            data.check(sprites_config(**{"threads": 1, field: low - 1}))
    with pytest.raises(
        UserError, match=r"^num_clips=2147483648: must lie between 1 and 2147483647"
    ):
        data.check(sprites_config(threads=1, num_clips=2**31))


def test_a_missing_package_is_not_a_missing_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    monkeypatch.delitem(sys.modules, "jaxvid.data.pipeline", raising=False)
    with pytest.raises(ModuleNotFoundError, match="grain"):
        data.make_source(sprites_config(name="pipeline"), "train")


def test_throughput_counts_frames():
    assert data.throughput(sprites_config(), 0.2) > 100
