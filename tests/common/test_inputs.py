"""Prompt files: one reader and one rule for what is drawn during training and after it."""

import pytest

from common.errors import UserError
from common.inputs import read_prompts


def test_lines_stand_as_they_are_and_a_blank_one_is_the_empty_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\n  a cat \n\n \n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a dog", "", "  a cat"]


def test_a_file_from_another_editor_gives_the_same_prompts(tmp_path):
    """A byte order mark and line ends of Windows are no part of a prompt."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffein Hund\r\nкот\r\n".encode())
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["ein Hund", "кот"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b" \n\n", "is empty"), (b"\xff\xfe\x00", "cannot be read as text")]
)
def test_files_without_prompts_are_refused(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / "prompts.txt"))


def test_shipped_files_have_no_blank_line(repository):
    files = sorted((repository / "validation_prompts").glob("*.txt"))
    assert files and all(all(prompt.strip() for prompt in read_prompts(str(file))) for file in files)
