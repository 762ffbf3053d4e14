"""Prompt files: one reader and one rule for what is drawn during training and after it."""

import pytest

from common.errors import UserError
from common.inputs import read_prompts

BLANK = b"a dog\n\n  a cat \n\n \n"
WINDOWS = "\ufeffein Hund\r\nкот\r\n".encode()  # a byte order mark and line ends of Windows are no part of a prompt


@pytest.mark.parametrize(
    ("content", "prompts"),
    [(BLANK, ["a dog", "", "  a cat"]), (WINDOWS, ["ein Hund", "кот"])],
    ids=["blank", "windows"],
)
def test_lines_stand_as_they_are_and_a_blank_one_is_the_empty_prompt(tmp_path, content, prompts):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_prompts(str(tmp_path / "prompts.txt")) == prompts


@pytest.mark.parametrize(("content", "message"), [(b" \n\n", "is empty"), (b"\xff\xfe\x00", "cannot be read as text")])
def test_files_without_prompts_are_refused(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / "prompts.txt"))
