"""Stories: what a file says, and what is none."""

import pytest

from jaxvid.data import story
from jaxvid.errors import UserError


def write(folder, content):
    path = folder / "story.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_prompts_begin_at_their_frames(tmp_path):
    text = "\ufeff# of a square\n0: a red square: it moves left\r\n\n  16 :ein grüner Kreis  \n"
    found = story.read(write(tmp_path, text + " # the end\n100:#3"))
    assert [(line.frame, line.prompt) for line in found] == [
        (0, "a red square: it moves left"),
        (16, "ein grüner Kreis"),
        (100, "#3"),
    ]
    assert found[1].place.endswith("story.txt, line 4")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"0: a\n\n9: gr\xfcn", r"story\.txt, line 3: is not UTF-8; save"),
        (b"0: a\0\xff", r"story\.txt, line 1: is not UTF-8"),
        ("", r"story\.txt: has no line; write lines such as"),
        ("# 0: a\n \n", r"story\.txt: has no line"),
        ("1: a\n5: b", "line 1: the first prompt begins at frame 1; let it begin at 0"),
        ("0: a\n5: b\n5: c", "line 3: frame 5 does not come after 5, that of the prompt before"),
        ("0: a\n5: b\n# back\n3: c", "line 4: frame 3 does not come after 5"),
        ("0: a\n5:  ", "line 2: has no prompt; say what to show from frame 5 on"),
        ("0: a\na red square", "line 2: 'a red square' is not `first_frame: prompt`"),
        ("0: a\n-5: b", "line 2: '-5: b' is not"),
        ("0: a\n5.5: b", "line 2: '5.5: b' is not"),
        ("0: a\n12345678901: b", "line 2: '12345678901: b' is not"),
        ("0: " + "a" * 2**20, r"story\.txt: has more than 1048576 bytes"),
    ],
)
def test_what_is_no_story_is_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(UserError, match=words) as caught:
        story.read(write(tmp_path, content))
    assert str(caught.value).startswith("story=") and "\n" not in str(caught.value)


def test_a_folder_and_nothing_are_no_stories(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is no file; name a text file"):
            story.read(str(path))
