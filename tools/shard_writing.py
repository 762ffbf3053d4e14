"""Writes shards, each completely or not at all, and the manifest that lists them.

A data set of shards is ``{prefix}-000000.tar``, ``{prefix}-000001.tar``, … and ``{prefix}-manifest.json``, which is
written last: ``{"shards": [{"file", "samples", "sha256"}, …], "samples": n, "skipped": {kind: n}, …}``.
"""

import hashlib
import json
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import webdataset

from common.errors import UserError


def read_prefix(output: str) -> Path:
    """The setting `output`, after creating its folder.

    Raises:
        UserError: it names a folder, or the folder cannot be made.
    """
    prefix = Path(output).expanduser()
    if output.endswith("/") or prefix.is_dir():
        raise UserError(f"output={output} is a folder; add how the shards' names begin, as in output={prefix}/train")
    make_folder(prefix.parent)
    return prefix


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents; `UserError` if that is impossible."""
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def shard_path(prefix: Path, index: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{index:06d}.tar")


def manifest_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}-manifest.json")


def find_shards(prefix: Path) -> list[Path]:
    """All existing shards of a prefix, in order."""
    name = re.compile(re.escape(prefix.name) + r"-\d{6,}\.tar")
    return sorted(path for path in prefix.parent.iterdir() if name.fullmatch(path.name))


def write_shard(path: Path, samples: Iterable[dict]) -> dict:
    """Writes one shard under a temporary name and renames it; the same samples give the same bytes.

    Args:
        path: its place.
        samples: ``__key__`` (text) and members of bytes by suffix; other keys that begin with ``_`` are left out.

    Returns:
        its entry of a manifest: ``file``, ``samples``, ``sha256``.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    temporary, count = path.with_name(path.name + ".partial"), 0
    with _disk_errors(path):
        # GNU's format: the default refuses names over 100 characters.
        with (
            temporary.open("wb") as file,
            webdataset.TarWriter(file, encoder=False, mtime=0, format="GNU_FORMAT") as tar,
        ):
            for sample in samples:
                tar.write(sample)
                count += 1
        checksum = sha256(temporary)
        temporary.rename(path)
    return {"file": path.name, "samples": count, "sha256": checksum}


def write_json(path: Path, content: dict) -> None:
    """Writes a file completely or not at all; several processes may write the same one."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    with _disk_errors(path):
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.rename(path)


def read_manifest(prefix: Path) -> dict:
    """The manifest of a prefix; empty where there is none.

    Raises:
        UserError: it is no manifest.
    """
    path = manifest_path(prefix)
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {**manifest, "shards": list(manifest["shards"])}
    except (ValueError, TypeError, KeyError, OSError):
        raise UserError(f"{path} is no manifest of shards; remove it, or choose another output") from None


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_order(function: Callable, items: Iterable, threads: int, ahead: int) -> Iterator:
    """`function` of every item, run by several threads; results in order, at most `ahead` of them waiting."""
    waiting = deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); free or choose another place") from None
