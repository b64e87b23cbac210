import hashlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.parallel import multihost
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import batch_sharding


def fake_mesh(processes, data, fsdp, tensor):
    """A mesh whose devices belong to the given processes, in order."""
    devices = np.array([SimpleNamespace(process_index=process) for process in processes])
    return SimpleNamespace(
        devices=devices.reshape(data, fsdp, tensor),
        shape={"data": data, "fsdp": fsdp, "tensor": tensor},
    )


@pytest.mark.parametrize(
    "processes, axes, shares",
    [
        ([0, 0, 1, 1], (4, 1, 1), [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], (1, 4, 1), [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], (1, 1, 4), [(0, 1), (0, 1)]),  # tensor across hosts: all feed all rows
        ([0, 1, 0, 1], (2, 1, 2), [(0, 1), (0, 1)]),
        ([0, 1, 1, 0], (4, 1, 1), [(0, 2), (1, 2)]),  # a TPU ring: hosts not in a row
        ([0, 0, 1, 1, 2, 2, 3, 3], (2, 1, 4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_share_of_the_batch(monkeypatch, processes, axes, shares):
    mesh = fake_mesh(processes, *axes)
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert multihost.batch_share(mesh) == share


def test_to_global_keeps_every_row():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = {"video": np.arange(24, dtype=np.uint8).reshape(8, 3), "id": np.arange(8)}
    placed = multihost.to_global(batch, batch_sharding(mesh))
    assert placed["video"].dtype == np.uint8
    np.testing.assert_array_equal(placed["video"], batch["video"])
    assert placed["id"].addressable_shards[0].data.shape == (2,)


def test_initialize_after_jax_was_used_goes_on(monkeypatch, caplog):
    jax.devices()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    multihost.initialize()
    assert "SIGTERM" in caplog.text


@pytest.mark.parametrize(
    "given, message",
    [
        (("nonsense", 2, 0), "coordinator=nonsense: write HOST:PORT of process 0"),
        (("host:0", 2, 0), "coordinator=host:0: write HOST:PORT"),
        (("host:99999", 2, 0), "coordinator=host:99999: write HOST:PORT"),
        (("a b:80", 2, 0), "coordinator=a b:80: write HOST:PORT"),
        (("host:80", 0, 0), "num_processes=0: must be at least 1"),
        (("host:80", 2, 2), "process_id=2: must be"),
        (("[::1]:80", 2, -1), "process_id=-1: must be"),
        (("host:80", 2, None), "process_id: missing; give all of coordinator"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_in_one_line(monkeypatch, given, message):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("was started"))
    with pytest.raises(UserError, match=f"^{message}"):
        multihost.initialize(*given)


def test_all_equal(monkeypatch):
    """Of two simulated processes, of which the other has "a"."""
    others = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost.multihost_utils, "process_allgather", lambda x: np.stack([*others, x])
    )
    for text, equal in (("a", True), ("a", True), ("b", False)):
        assert multihost.all_equal(text) == equal
        others = others or [np.frombuffer(hashlib.sha256(b"a").digest(), np.int32)]
