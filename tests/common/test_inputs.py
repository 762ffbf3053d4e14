"""Prompt files: one reader and one rule for what is drawn during training and after it."""

import pytest

from common.errors import UserError
from common.inputs import read_prompts

BLANK = b"a dog\n\n  a cat \n\n \n"
WINDOWS = "\ufeffein Hund\r\nкот\r\n"  # a byte order mark and line ends of Windows are no part of a prompt


@pytest.mark.parametrize(
    ("content", "prompts"),
    [(BLANK, ["a dog", "", "  a cat"])] + [(WINDOWS.encode(name), ["ein Hund", "кот"]) for name in ("utf-8", "utf-16")],
    ids=["blank", "windows", "utf-16"],
)
def test_lines_stand_as_they_are_and_a_blank_one_is_the_empty_prompt(tmp_path, content, prompts):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_prompts(str(tmp_path / "prompts.txt")) == prompts


@pytest.mark.parametrize(("content", "message"), [(b" \n\n", "is empty"), (b"\xff\xfe\x00", "no UTF-8 text")])
def test_files_without_prompts_are_refused(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / "prompts.txt"))


def test_enormous_files_of_prompts_are_refused_unread(tmp_path):
    with (tmp_path / "prompts.txt").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(UserError, match="68,719,476,736 bytes; at most"):
        read_prompts(str(tmp_path / "prompts.txt"))
