"""Weight files: both formats are read, and everything else is refused."""

import json
import resource
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxvid import weights
from jaxvid.errors import UserError

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(2.5, ml_dtypes.bfloat16),
    "c": np.arange(4, dtype=np.int64),
}


def safetensors(path, arrays, spoil=lambda header: None):
    """The published format, written out."""
    names = {"float32": "F32", "bfloat16": "BF16", "int64": "I64"}
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        offsets = [len(content), len(content) + array.nbytes]
        dtype, shape = names[array.dtype.name], list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        content += array.tobytes()
    spoil(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def test_safetensors(tmp_path):
    safetensors(tmp_path / "w.safetensors", ARRAYS)
    found = weights.read(tmp_path / "w.safetensors")
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_npz(tmp_path):
    plain = {name: ARRAYS[name] for name in ("a.weight", "c")}
    np.savez(tmp_path / "w.npz", **plain)
    found = weights.read(str(tmp_path / "w.npz"))
    np.testing.assert_array_equal(found["a.weight"], plain["a.weight"])
    assert set(found) == set(plain) and found["c"].dtype == np.int64


def test_safetensors_with_false_headers_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    for spoil in (
        lambda header: header["c"].update(shape=[5]),
        lambda header: header["c"].update(data_offsets=[-8, 24]),
        lambda header: header["c"].update(data_offsets=[1000, 1032]),
        lambda header: header["c"].update(dtype="F8"),
        lambda header: header["c"].pop("shape"),
    ):
        safetensors(path, ARRAYS, spoil)
        with pytest.raises(UserError, match=r"^weights=.*: damaged, or not .safetensors"):
            weights.read(path)


def test_other_files_are_refused(tmp_path):
    for name in ("w.pt", "w.pth", "w.ckpt", "w.pkl", "w"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        with pytest.raises(UserError, match=f"^weights=.*/{name}: .* as a pickle may run any code"):
            weights.read(tmp_path / name)
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(UserError, match="No such file"):
            weights.read(tmp_path / f"none{suffix}")
        path = tmp_path / f"w{suffix}"
        for content in (b"", b"\x00" * 4, b"\xff" * 40):
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"damaged, or not {suffix}"):
                weights.read(path)


def encrypted(path):
    """The flag in the directory of a zip."""
    np.savez(path, a=np.ones(3))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def badly_compressed(path):
    np.savez_compressed(path, a=np.ones(300))
    content = bytearray(path.read_bytes())
    begin = content.index(b"a.npy") + len(b"a.npy") + 20  # behind an extra field of the zip
    content[begin : begin + 8] = b"\xff" * 8
    path.write_bytes(content)


def one_array(path):
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


def with_a_note(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("note.txt", "no array")


def test_npz_of_anything_else_names_the_field(tmp_path):
    for write, words in (
        (encrypted, "password"),
        (badly_compressed, "decompressing"),
        (one_array, "one array without a name"),
        (with_a_note, "'note.txt' is not an array of numbers"),
        (lambda path: np.savez(path, a=np.array([print], object)), "allow_pickle=False"),
        (lambda path: np.savez(path, a=np.array(["x"])), "'a' is not an array of numbers"),
        (lambda path: np.savez(path, b=ARRAYS["b"]), "'b' is not an array of numbers"),
    ):
        write(tmp_path / "w.npz")
        with pytest.raises(UserError, match=f"^--i3d=.*w.npz: damaged, or not .npz .*{words}"):
            weights.read(tmp_path / "w.npz", "--i3d")


def test_an_npz_that_would_fill_the_memory_is_not_inflated(tmp_path):
    """1.6 MB on the disk, 1.6 GB in memory."""
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("a.npy", "w") as out:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1600 * 2**18,)}
        np.lib.format.write_array_header_1_0(out, header)
        for _ in range(1600):
            out.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"would fill 1\.6 GiB"):
        weights.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(2**20))
    assert weights.read(tmp_path / "zeros.npz")["a"].size == 2**20


def test_digest_is_the_files_sha256(tmp_path):
    (tmp_path / "w").write_bytes(b"abc")
    assert weights.digest(tmp_path / "w").startswith("ba7816bf8f01cfea")
