"""Stories: the prompts of a video, each from a frame on, in a text file."""

import re
from pathlib import Path
from typing import NamedTuple

from jaxvid.errors import UserError

MAX_BYTES = 2**20  # of a file
_LINE = re.compile(r"([0-9]{1,10})\s*:(.*)")


class Line(NamedTuple):
    """A prompt from a video frame on, and where it stands, for messages."""

    frame: int
    prompt: str
    place: str


def read(path: str) -> list[Line]:
    """The lines of a story, in order: a file in UTF-8 of lines `first_frame: prompt`.

    The first frame of the first line is 0, and each prompt lasts until the next one. Blank lines
    and lines that begin with # say nothing. Raises UserError for anything else, an empty prompt
    included.
    """
    lines = []
    for number, text in enumerate(_text(path).splitlines(), 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        place, found = f"story={path}, line {number}", _LINE.fullmatch(text.strip())
        if not found:
            raise UserError(f"{place}: {text.strip()[:40]!r} is not `first_frame: prompt`")
        frame, prompt = int(found[1]), found[2].strip()
        if not prompt:
            raise UserError(f"{place}: has no prompt; say what to show from frame {frame} on")
        if not lines and frame:
            raise UserError(f"{place}: the first prompt begins at frame {frame}; let it begin at 0")
        if lines and frame <= lines[-1].frame:
            before = lines[-1].frame
            raise UserError(
                f"{place}: frame {frame} does not come after {before}, that of the "
                "prompt before; write the prompts in order of their frames"
            )
        lines.append(Line(frame, prompt, place))
    if not lines:
        raise UserError(f"story={path}: has no line; write lines such as `0: a red square`")
    return lines


def _text(path):
    """The text of a small file, without a byte order mark."""
    try:
        if not Path(path).is_file():
            raise UserError(f"story={path}: is no file; name a text file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise UserError(f"story={path}: {reason}; name a text file") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"story={path}: has more than {MAX_BYTES} bytes; name a shorter text file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        remedy = "is not UTF-8; save the file in UTF-8"
        raise UserError(f"story={path}, line {number}: {remedy}") from error
