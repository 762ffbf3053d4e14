"""Folders that commands make, such as a tokenizer's, without replacing anything that is somebody else's."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files import Owned, disk_errors, make_folder

RUST = "(os error "  # in the messages of tokenizers and safetensors, whose errors are no `OSError`


@contextmanager
def owned_folder(folder: str, setting: str) -> Iterator[Path]:
    """A folder aside to save to; at the end its files move into `folder`, over nothing but what commands of ours wrote.

    Args:
        setting: the key that names the folder, for messages.

    Raises:
        UserError: a file of that name is somebody else's, or the disk is full. What was there stays.
    """
    was_there = os.path.lexists(folder)
    goal = make_folder(folder)
    aside = goal.with_name(f".{goal.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a command that was killed
    make_folder(aside)
    try:
        with disk_errors(goal):
            try:
                yield aside
            except Exception as error:
                if RUST not in str(error):
                    raise
                raise OSError(str(error)) from None
        owned, names = Owned(goal), sorted(file.name for file in aside.iterdir())
        owned.claim(names, f"{setting}={folder}")
        with disk_errors(goal / names[0]):
            for name in names:
                (aside / name).replace(goal / name)
                owned.record(name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not was_there:
            with suppress(OSError):
                goal.rmdir()  # if nothing came of it
