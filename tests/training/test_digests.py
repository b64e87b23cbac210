"""Digests of arrays: the same wherever they lie, and changed by any damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxvid.parallel.mesh import make_mesh
from jaxvid.training import digests

rng = np.random.default_rng(0)
ARRAYS = {
    "matrix": rng.standard_normal((8, 6), np.float32),
    "kernel": rng.standard_normal((2, 3, 4, 8), np.float32),
    "half": rng.standard_normal((16, 3)).astype(jnp.bfloat16),
    "count": np.array(7, np.int32),
    "mask": np.array([True, False, True]),
    "empty": np.zeros((0, 4), np.float32),
}


def test_any_device_and_sharding_gives_the_digest_of_the_host(monkeypatch):
    monkeypatch.setattr(digests, "SMALL", -1)  # the host takes nothing from the devices
    mesh = make_mesh({"data": 4, "tensor": 2})
    places = {"matrix": ("data", "tensor"), "kernel": (None, None, "data", "tensor")}
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*places.get(name, ()))))
        for name, x in ARRAYS.items()
    }
    assert digests.of_arrays(placed) == digests.of_arrays(ARRAYS)


@pytest.mark.parametrize("name", ["matrix", "half", "count", "mask"])
def test_every_single_bit_counts(name):
    whole = digests.of_arrays({name: ARRAYS[name]})
    for bit in range(0, 8 * ARRAYS[name].nbytes, 8 if name == "mask" else 1):
        raw = bytearray(ARRAYS[name].tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        damaged = np.frombuffer(raw, ARRAYS[name].dtype).reshape(ARRAYS[name].shape)
        assert digests.of_arrays({name: damaged}) != whole


def test_places_and_pairs_of_bits_count():
    """Exchanged elements, a shifted array, and two signs, which cancel in a weighted sum."""
    x = ARRAYS["matrix"]
    signs = x.copy()
    signs[0, :2] *= -1
    found = [digests.of_arrays({"x": y})["x"] for y in (x, x[::-1], np.roll(x, 1), signs)]
    assert len(set(found)) == 4
