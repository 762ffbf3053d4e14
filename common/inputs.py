"""Prompts, questions and paths from the command line (spec §13)."""

from pathlib import Path

from common.errors import UserError
from common.files import read_text, resolve_path

MAX_PROMPTS = 2**26  # bytes of a file of prompts
SEPARATOR = " *** "  # separates several prompts, directions or questions in one argument


def split_pieces(key: str, text: str | None) -> list[str]:
    """The non-empty pieces of `a *** b`; `UserError` if there are none; the message names the setting `key`."""
    pieces = [piece for piece in (text or "").split(SEPARATOR) if piece]
    if not pieces:
        raise UserError(f"{key} is not given; add {key}='…' (separate several by '{SEPARATOR}')")
    return pieces


def required_path(key: str, value: str | None) -> Path:
    """The path that the setting `key` names, relative to the current folder or the repository; `UserError` if it is not
    given or does not exist."""
    if not value:
        raise UserError(f"{key} is not given; add {key}=PATH")
    path = resolve_path(value)
    if not path.exists():
        raise UserError(f"{key}={value} does not exist; relative paths start at the current folder or the repository")
    return path


def required_folder(key: str, value: str | None) -> Path:
    """`required_path` of a folder; `UserError` if it is a file."""
    path = required_path(key, value)
    if not path.is_dir():
        raise UserError(f"{key}={value} is a file; give a folder")
    return path


def read_prompts(value: str) -> list[str]:
    """The lines of `validation_prompts_file`, unstripped; used during training and by inference.

    A blank line between others is the empty prompt, as published; blank lines at the end are ignored.

    Raises:
        UserError: the file is missing, no text, too large, or contains no prompt.
    """
    path = required_path("validation_prompts_file", value)
    lines = read_text(path, f"validation_prompts_file={value}", MAX_PROMPTS).rstrip().splitlines()
    if not lines:
        raise UserError(f"validation_prompts_file={value} is empty; write one prompt per line")
    return lines


def rotation_note(count: int) -> str:
    """What becomes of the rotations that `count` images carry, for the user to know; empty if there are none."""
    subject, verb, rest = ("1 image", "carries", "it") if count == 1 else (f"{count} images", "carry", "them")
    return f"{subject} {verb} a rotation (EXIF), ignored; image.exif=apply turns {rest}" if count else ""
