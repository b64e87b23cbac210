"""Foreign text, such as names of files, cannot control the terminal."""

import os
from types import SimpleNamespace

from jaxvid import cli, prepare, tokenize
from jaxvid.data import clips
from jaxvid.errors import UserError, printable


def test_foreign_text_cannot_reach_the_terminal():
    assert printable("é 犬.mp4") == "é 犬.mp4"
    hostile = "\x1b[2J\nerror: \u202e\x9b" + os.fsdecode(b"\xff")
    assert printable(hostile) == r"\x1b[2J\nerror: \u202e\x9b\xff"


def test_every_printer_of_names_escapes_them(tmp_path, capsys, monkeypatch):
    name = "\x1b[2J\nerror: forged.mp4"
    assert clips.report([(name, "is empty\x1b")], 1).isprintable()
    assert cli._report(UserError(f"clip={name}: bad")) == 2
    assert capsys.readouterr().err == "error: clip=\\x1b[2J error: forged.mp4: bad\n"
    entry = {"name": name, "reason": "is empty"}
    manifest = {"splits": {}, "skipped": [entry], "cut": [entry], "shape": [1], "dtype": "uint16"}
    flags = SimpleNamespace(src="", out="", size=2, frames=1, fps=1, workers=1, flip=False, batch=1)
    flags.workdir, flags.text = "run", ""
    for module in (prepare, tokenize):
        monkeypatch.setattr(module, "FLAGS", flags)
        monkeypatch.setattr(module, module.__name__.split(".")[1], lambda *a, **k: manifest)
        module.main()
        lines = capsys.readouterr().out.splitlines()
        assert sum(r"\x1b[2J\nerror: forged.mp4" in line for line in lines) == 2
        assert not any("\x1b" in line or line.startswith("error") for line in lines)
