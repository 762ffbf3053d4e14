"""Folders that commands make, such as a tokenizer's, without replacing anything that is somebody else's."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError, describe_os_error
from common.files import Owned, disk_errors, make_folder


@contextmanager
def owned_folder(folder: str, setting: str) -> Iterator[Path]:
    """A folder aside to save to; at the end its files move into `folder`, over nothing but what commands of ours wrote.

    Args:
        setting: the key that names the folder, for messages.

    Raises:
        UserError: a file of that name is somebody else's, or the disk is full. What was there stays.
    """
    goal = make_folder(folder)
    aside = make_folder(goal.with_name(f".{goal.name}.partial"))
    try:
        try:
            yield aside
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"cannot write {goal} ({describe_os_error(error)}); make room there") from None
        owned, names = Owned(goal), sorted(file.name for file in aside.iterdir())
        owned.claim(names, f"{setting}={folder}")
        with disk_errors(goal / names[0]):
            for name in names:
                (aside / name).replace(goal / name)
                owned.record(name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
