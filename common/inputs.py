"""Prompts, questions and paths from the command line (spec §13)."""

from pathlib import Path

from common.errors import UserError
from common.files import resolve_path

SEPARATOR = " *** "  # separates several prompts, directions or questions in one argument


def split_pieces(key: str, text: str | None) -> list[str]:
    """The non-empty pieces of `a *** b`.

    Raises:
        UserError: there are none; the message names the setting `key`.
    """
    pieces = [piece for piece in (text or "").split(SEPARATOR) if piece]
    if not pieces:
        raise UserError(f"{key} is not given; add {key}='…' (separate several by '{SEPARATOR}')")
    return pieces


def required_path(key: str, value: str | None) -> Path:
    """The path that the setting `key` names, relative to the current folder or the repository.

    Raises:
        UserError: it is not given or does not exist.
    """
    if not value:
        raise UserError(f"{key} is not given; add {key}=PATH")
    path = resolve_path(value)
    if not path.exists():
        raise UserError(f"{key}={value} does not exist; relative paths start at the current folder or the repository")
    return path


def read_prompts(value: str) -> list[str]:
    """The lines of `validation_prompts_file`, unstripped; used during training and by inference.

    A blank line between others is the empty prompt, as published; blank lines at the end are ignored.

    Raises:
        UserError: the file is missing, not UTF-8 text, or contains no prompt.
    """
    path = required_path("validation_prompts_file", value)
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"validation_prompts_file={value} cannot be read as text ({error})") from None
    if not lines:
        raise UserError(f"validation_prompts_file={value} is empty; write one prompt per line")
    return lines
