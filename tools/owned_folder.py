"""Folders that commands make, such as a tokenizer's, without replacing anything that is somebody else's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files import Owned, folder_aside, make_folder


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
    try:
        with folder_aside(goal) as aside:
            yield aside
            owned, names = Owned(goal), sorted(file.name for file in aside.iterdir())
            owned.claim(names, f"{setting}={folder}")
            for name in names:
                (aside / name).replace(goal / name)
                owned.record(name)
    finally:
        if not was_there:
            with suppress(OSError):
                goal.rmdir()  # if nothing came of it
