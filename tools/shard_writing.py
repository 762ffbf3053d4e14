"""Writes shards, each completely or not at all, and the manifest that lists them.

A data set of shards is ``{prefix}-000000.tar``, ``{prefix}-000001.tar``, … and ``{prefix}-manifest.json``, which is
written last: ``{"shards": [{"file", "samples", "sha256"}, …], "samples": n, "skipped": {kind: n}, …}``.
"""

import hashlib
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import webdataset
from omegaconf import OmegaConf
from tqdm import tqdm

from common.errors import UserError, shown
from common.files import folder_aside, make_folder, read_json, write_json, writing
from training.data.sources import SkipCounters, Skipped

KINDS = {"file": str, "samples": int, "sha256": str}  # of a manifest's entry
SETS = ("shards", "heldout", "unfinished")  # the entries of a manifest, all of them shards of ours


def read_prefix(output: str) -> Path:
    """The setting `output`, after creating its folder; `UserError` if it names a folder, or the folder cannot be
    made."""
    prefix = Path(output)
    if output.endswith("/") or prefix.is_dir():
        raise UserError(f"output={output} is a folder; add how the shards' names begin, as in output={prefix}/train")
    make_folder(prefix.parent)
    return prefix


def shard_path(prefix: Path, index: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{index:06d}.tar")


def manifest_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}-manifest.json")


def heldout_prefix(prefix: Path) -> Path:
    """``data/mine/train`` → ``data/mine/train_heldout``, which a pattern ``train-*.tar`` does not match."""
    return prefix.with_name(f"{prefix.name}_heldout")


def find_shards(prefix: Path) -> list[Path]:
    """All existing shards of a prefix, in order."""
    name = re.compile(re.escape(prefix.name) + r"-\d{6,}\.tar")
    return sorted(path for path in prefix.parent.iterdir() if name.fullmatch(path.name))


def leftovers(prefix: Path) -> list[Path]:
    """What killed commands have begun to write."""
    name = re.compile(re.escape(f".{prefix.name}") + r"-\d{6,}\.tar\.\d+\.partial")
    return [path for path in prefix.parent.iterdir() if name.fullmatch(path.name)]


# ---- what may be replaced ----


def made_from(config) -> dict:
    """The settings that the bytes depend on."""
    settings = OmegaConf.to_container(config)
    kept = {key: value for key, value in settings.items() if key not in ("output", "num_workers", "overwrite")}
    return {key: shown(value) if isinstance(value, str) else value for key, value in kept.items()}


def refuse_others(prefix: Path, config) -> None:
    """Makes sure that what is at the prefix may be replaced by the data set of a command's settings; `UserError` if it
    is another data set and `overwrite` is not given, or shards that no command of ours wrote."""
    old, settings = read_manifest(prefix), made_from(config)
    heldout = find_shards(heldout_prefix(prefix)) if config.get("holdout") else []
    if others := foreign_shards([*find_shards(prefix), *heldout], old):
        remedy = "choose another output, or move it away"
        raise UserError(f"{others[0]} is there already, without a manifest that lists it; {remedy}")
    others = old.get("settings") if isinstance(old.get("settings"), dict) else {}
    if not old or config.overwrite or made_from(OmegaConf.structured(OmegaConf.get_type(config))) | others == settings:
        return
    differing = [f"{key}={value}" for key, value in others.items() if settings.get(key) != value]
    of = f" ({', '.join(differing)})" if differing else ""
    remedy = "choose another output, or give overwrite=true"
    raise UserError(f"{manifest_path(prefix)} belongs to another data set{of}; {remedy}")


def foreign_shards(shards: Iterable[Path], manifest: dict) -> list[Path]:
    """The shards that a manifest does not list: no command of ours wrote them, and none replaces them."""
    listed = _listed(manifest)
    return [shard for shard in shards if shard.name not in listed]


def _listed(manifest: dict) -> set[str]:
    return {entry["file"] for key in SETS for entry in manifest.get(key, ())}


# ---- writing ----


@contextmanager
def new_set(config) -> Iterator[Path]:
    """A prefix in a folder aside, for the shards and the manifest of the data set `config.output`; at the end they take
    the place of the old ones. If anything fails, the old ones stay.

    Raises:
        UserError: what is there must not be replaced, see `refuse_others`.
    """
    prefix = read_prefix(config.output)
    refuse_others(prefix, config)
    with folder_aside(prefix) as aside:
        yield aside / prefix.name
        _publish(aside / prefix.name, prefix)


def write_manifest(prefix: Path, shards: list[dict], counters: SkipCounters, config, **more: Any) -> dict:
    """Writes and returns the manifest with the entries of `write_shards` and `more`; `UserError` if there are none."""
    if not shards:
        why = f"skipped {counters.describe()}" if counters.seen else "there is not a single image"
        raise UserError(f"output={config.output}: nothing is left to write: {why}")
    counts = {"samples": sum(shard["samples"] for shard in shards), "skipped": dict(counters.skipped)}
    manifest = {"shards": shards, **counts, **more, "settings": made_from(config)}
    write_json(manifest_path(prefix), manifest)
    return manifest


def _publish(new: Path, prefix: Path) -> None:
    """Puts finished shards in the place of old ones; while it lasts the manifest promises none, but says they are ours.

    A command that is killed here can be repeated with overwrite=true.
    """
    manifest, old, fresh = manifest_path(prefix), read_manifest(prefix), read_manifest(new)
    entries = [entry for content in (old, fresh) for key in SETS for entry in content.get(key, ())]
    write_json(manifest, {"shards": [], "unfinished": entries})
    for name in _listed(old):
        prefix.with_name(name).unlink(missing_ok=True)
    for name in _listed(fresh):
        new.with_name(name).rename(prefix.with_name(name))
    manifest_path(new).rename(manifest)


def write_shards(prefix: Path, samples: Iterator[dict], shard_size: int) -> list[dict]:
    """Writes samples as shards, one after another; returns their entries of the manifest."""
    entries = []
    for index in itertools.count():
        first = next(samples, None)
        if first is None:
            return entries
        rest = itertools.islice(samples, shard_size - 1)
        entries.append(write_shard(shard_path(prefix, index), itertools.chain([first], rest)))


def counted(
    samples: Iterable[dict | Skipped], counters: SkipCounters, bar: tqdm, name: Callable[[str], str] = str
) -> Iterator[dict]:
    """The samples that could be read; every one is counted, and the ``_notes`` of those that are used, by the `name` of
    their key."""
    for number, sample in enumerate(samples, 1):
        bar.total = bar.total and max(bar.total, number)  # an image of several captions is several samples
        bar.update()
        counters.seen += 1
        if isinstance(sample, Skipped):
            counters.skip(sample.kind, sample.detail, sample.count)
            continue
        for note in sample.pop("_notes", ()):
            counters.note(note, name(sample["__key__"]))
        yield sample


def write_shard(path: Path, samples: Iterable[dict]) -> dict:
    """Writes one shard as `writing` does, and returns its entry of a manifest: ``file``, ``samples``, ``sha256``.

    Samples have ``__key__`` (text) and members of bytes by suffix; other keys that begin with ``_`` are left out. The
    same ones give the same bytes.
    """
    count = 0
    # GNU's format: the default refuses names over 100 characters.
    with writing(path) as temporary:
        with (
            temporary.open("wb") as file,
            webdataset.TarWriter(file, encoder=False, mtime=0, format="GNU_FORMAT") as tar,
        ):
            for sample in samples:
                tar.write(sample)
                count += 1
        checksum = sha256(temporary)
    return {"file": path.name, "samples": count, "sha256": checksum}


def read_manifest(prefix: Path) -> dict:
    """The manifest of a prefix; empty where there is none; `UserError` if it is no manifest."""
    path = manifest_path(prefix)
    if not path.exists():
        return {}
    manifest = read_json(path)
    entries = [manifest.get("shards"), *(manifest.get(key, []) for key in SETS[1:])]
    name = re.compile(rf"{re.escape(prefix.name)}(_heldout)?-\d{{6,}}\.tar")
    if not all(isinstance(one, list) and all(_is_entry(entry, name) for entry in one) for one in entries):
        raise UserError(f"{path} is no manifest of shards; remove it, or choose another output")
    return manifest


def _is_entry(entry: Any, name: re.Pattern) -> bool:
    """Whether a manifest may list it: what it lists may be replaced, so it must be a shard of this prefix."""
    has_all = isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in KINDS.items())
    return has_all and bool(name.fullmatch(entry["file"]))


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
