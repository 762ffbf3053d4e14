"""Prompts, questions and pictures as users give them on a command line (SPEC §13)."""

from pathlib import Path

from common.config import resolve_path
from common.errors import UserError

SEPARATOR = " *** "  # between several prompts, directions or questions in one argument


def split_pieces(key: str, text: str | None) -> list[str]:
    """The pieces of `a *** b`, empty ones dropped.

    Raises:
        UserError: nothing was given for `key`, or nothing is left.
    """
    pieces = [piece for piece in (text or "").split(SEPARATOR) if piece]
    if not pieces:
        raise UserError(f"{key} is not given; add {key}='…' (several are separated by '{SEPARATOR}')")
    return pieces


def required_path(key: str, value: str | None) -> Path:
    """The existing path under a key, seen from the current folder or the repository.

    Raises:
        UserError: it was not given or does not exist.
    """
    if not value:
        raise UserError(f"{key} is not given; add {key}=PATH")
    path = resolve_path(value)
    if not path.exists():
        raise UserError(f"{key}={value} does not exist; relative paths start at the current folder or the repository")
    return path


def read_prompts(value: str) -> list[str]:
    """The lines of `validation_prompts_file` as they stand, for drawing after and during training alike.

    A blank line between others is the empty prompt, as published; blank ones at the end do not count.

    Raises:
        UserError: the file is missing, no text, or holds no prompt.
    """
    path = required_path("validation_prompts_file", value)
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"validation_prompts_file={value} cannot be read as text ({error})") from None
    if not lines:
        raise UserError(f"validation_prompts_file={value} is empty; write one prompt per line")
    return lines
