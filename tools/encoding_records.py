"""Records of encoded shards, their sources and settings, so that restarted processes repeat no work.

While the work goes on, ``.{prefix}.parts/`` holds one record for each finished shard. The process that finds all of
them there joins them into the manifest and removes the folder.
"""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import UserError, shown
from common.files import field, make_folder, read_json, real_path, write_json
from models.images import DEFAULT
from tools.shard_writing import (
    KINDS,
    find_shards,
    foreign_shards,
    leftovers,
    manifest_path,
    read_manifest,
    sha256,
    shard_path,
)
from training.data.shards import with_images
from training.data.sources import SkipCounters


@dataclass(frozen=True)
class Encoding:
    """The settings that codes depend on. `tokenizer` is only a name; the checksum identifies the weights."""

    tokenizer: str
    tokenizer_sha256: str
    resolution: int
    num_vq_tokens: int
    codebook_size: int
    keep_images: bool
    exif: str = DEFAULT.exif
    background: str | None = DEFAULT.background

    def agrees(self, record: dict) -> bool:
        """Whether a record or manifest is of these settings; for those of earlier releases, see `with_images`."""
        record = with_images(record, self.background)
        return all(record.get(key) == value for key, value in asdict(self).items() if key != "tokenizer")


@dataclass
class Plan:
    """Shards to make: number i of ``{prefix}-i.tar`` holds the codes of `sources[i]`.

    Args:
        overwrite: allow existing files at the prefix to be of other sources or another encoding.
    """

    sources: list[str]
    prefix: Path
    encoding: Encoding
    overwrite: bool = False

    @property
    def parts(self) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}.parts")

    def begin(self, is_main: bool) -> None:
        """Checks that the shards may be written here. Every process must call it first; `UserError` if other shards are
        there."""
        outputs = [*find_shards(self.prefix), *(shard_path(self.prefix, index) for index in range(len(self.sources)))]
        if set(map(real_path, outputs)) & set(map(real_path, self.sources)):
            raise UserError(f"output={self.prefix} would replace the very shards that are read; choose another output")
        manifest, begun = read_manifest(self.prefix), _read(self.parts / "encoding.json")
        known = begun or manifest
        # What is there once work has begun was checked then, or written since.
        if not begun and (others := foreign_shards(find_shards(self.prefix), manifest)):
            why = "other shards are there already; choose another output, or move them away"
            raise UserError(f"output={self.prefix}: {why}: no manifest lists {others[0]}")
        if not self.overwrite and (known or find_shards(self.prefix)):
            if not self.encoding.agrees(known):
                self._refuse("other shards are there already" + self._differences(known))
            if len(manifest.get("shards", ())) > len(self.sources):
                self._refuse(f"{len(manifest['shards'])} shards are there already, of more sources than these")
        make_folder(self.parts)
        write_json(self.parts / "encoding.json", asdict(self.encoding))
        if is_main and not self.encoding.agrees(manifest):
            manifest_path(self.prefix).unlink(missing_ok=True)  # before the first shard that it lists is replaced

    def _refuse(self, why: str) -> None:
        raise UserError(f"output={self.prefix}: {why}; choose another output, or give overwrite=true")

    def _differences(self, known: dict) -> str:
        wanted = asdict(self.encoding)
        found = [f"{key}={known[key]}" for key in wanted if key in known and known[key] != wanted[key]]
        return f" ({', '.join(found)})" if found else ""

    def unfinished(self, rank: int, world_size: int) -> list[int]:
        """The numbers of the unfinished shards among every world_size-th one from `rank` on; `UserError` if a shard of
        another source is there."""
        records, missing = self.records(), []
        for index in range(rank, len(self.sources), world_size):
            record, path = records.get(index), shard_path(self.prefix, index)
            same_source = record is not None and record["source"] == _identity(self.sources[index])
            if record is not None and not same_source and not self.overwrite:
                self._refuse(f"{path.name} was made from another {record['source']['file']} than {self.sources[index]}")
            if not same_source or not path.is_file() or sha256(path) != record["sha256"]:
                missing.append(index)
        return missing

    def record(self, index: int, entry: dict, counters: SkipCounters) -> None:
        """Records that a shard is finished; `entry` as `write_shard` returns it."""
        content = {"source": _identity(self.sources[index]), "skipped": dict(counters.skipped)}
        write_json(self.parts / f"{index:06d}.json", entry | content | asdict(self.encoding))

    def records(self) -> dict[int, dict]:
        """Number → record of each shard of this encoding that was finished."""
        files = [file for file in self.parts.glob("*.json") if re.fullmatch(r"\d{6,}", file.stem, re.ASCII)]
        found = {int(file.stem): _read(file) for file in files}
        manifest = read_manifest(self.prefix)  # after the parts, as they are removed only once it is written
        listed = dict(enumerate(manifest["shards"])) if self.encoding.agrees(manifest) else {}
        records = listed | {index: record for index, record in found.items() if self.encoding.agrees(record)}
        for index, record in records.items():
            for key, kind in (KINDS | {"source": dict, "skipped": dict}).items():
                field(record, key, kind, f"{self.parts if index in found else manifest_path(self.prefix)}: {index}")
            field(record["source"], "file", str, f"{self.prefix}: source of {index}")
        return records

    def finish(self) -> dict | None:
        """Writes the manifest if all shards are finished, and returns it; None while other processes are at work.
        `UserError` if not one sample is left."""
        records = self.records()
        if any(index not in records for index in range(len(self.sources))):
            return None
        keys = ("file", "samples", "sha256", "source", "skipped")
        shards = [{key: records[index][key] for key in keys} for index in range(len(self.sources))]
        skipped = SkipCounters()
        for shard in shards:
            skipped.skipped.update(shard["skipped"])
        counts = {"samples": sum(shard["samples"] for shard in shards), "skipped": dict(skipped.skipped)}
        surplus = find_shards(self.prefix) if not counts["samples"] else find_shards(self.prefix)[len(shards) :]
        for path in [*surplus, *leftovers(self.prefix)]:
            path.unlink(missing_ok=True)
        if counts["samples"]:
            write_json(manifest_path(self.prefix), {"shards": shards, **counts, **asdict(self.encoding)})
        shutil.rmtree(self.parts, ignore_errors=True)
        if not counts["samples"]:
            raise UserError(f"not one image in {self.sources[0]} and {len(shards) - 1} more shards can be read")
        return read_manifest(self.prefix)


def _identity(source: str) -> dict[str, str]:
    return {"file": shown(Path(source).name), "sha256": sha256(source)}


def _read(file: Path) -> dict:
    try:
        return read_json(file)
    except UserError:
        if file.exists():
            raise
        return {}  # missing, or merged into the manifest and removed
