import hashlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.parallel import multihost, peers
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
        (("\udcff:80", 2, 0), r"coordinator=\S*:80: write HOST:PORT"),
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


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("workdir=x: full"), 2, ""),
        (ValueError("broken"), 1, ""),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (ValueError("Gloo: Connection closed by peer [::1]"), None, "another process has ended"),
    ],
)
def test_a_process_that_fails_alone_waits_for_nobody(monkeypatch, capsys, error, status, line):
    ends, at_exit = [], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(peers, "end", ends.append)
    monkeypatch.setattr(peers.atexit, "register", lambda exit, status: at_exit.append(status))
    with pytest.raises(type(error)), multihost.failing_alone():
        raise error
    assert line in capsys.readouterr().err and bool(ends) == bool(line)
    assert status is None or at_exit == [status]


def test_a_single_process_ends_as_always(monkeypatch):
    monkeypatch.setattr(peers.atexit, "register", lambda *_: pytest.fail("was registered"))
    with pytest.raises(ValueError, match="alone"), multihost.failing_alone():
        raise ValueError("alone")


def test_a_peer_is_lost_when_its_beat_stands_still(monkeypatch, capsys):
    """And not while this process itself stood still, as a laptop that slept."""

    class Table:
        def __init__(self):
            self.beats = {}

        def key_value_set(self, key, value, allow_overwrite):
            self.beats[key] = value
            if clock.now < 500:
                self.beats["jaxvid/alive/1"] = value

        def key_value_dir_get(self, prefix):
            return list(self.beats.items())

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += 300 if self.now == 100 else seconds

    class EndError(Exception):
        pass

    def end(status):
        raise EndError(status)

    clock = Clock()
    monkeypatch.setattr(peers, "time", clock)
    monkeypatch.setattr(peers, "end", end)
    with pytest.raises(EndError, match=str(peers.LOST)):
        peers._watch(Table(), 0, 2)
    assert 500 + peers.SILENT - 2 * peers.BEAT < clock.now < 500 + peers.SILENT + 2 * peers.BEAT
    assert "process 1 of 2 gives no sign of life for 40 s" in capsys.readouterr().err


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
