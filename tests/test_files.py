"""Files are written whole or not at all."""

import errno
import os

import pytest

from jaxvid import files


def test_the_last_content_replaces_the_file(tmp_path):
    for content, raw in (("text: ä", "text: ä".encode()), (b"\x00\xff", b"\x00\xff")):
        files.write(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == raw
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.write(tmp_path / "file", "old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
