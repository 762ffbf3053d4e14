"""Sets of shards as the commands write them."""

import json
from pathlib import Path

from tools.shard_writing import sha256
from training.data.shards import read_shard


def read_set(prefix: Path) -> tuple[list[dict], dict]:
    """The samples in their order, and the manifest, which must describe the shards; nothing else may be there."""
    manifest = json.loads(prefix.with_name(f"{prefix.name}-manifest.json").read_text())
    shards = sorted(prefix.parent.glob(f"{prefix.name}-*.tar"))
    samples = [list(read_shard(str(shard))) for shard in shards]
    told = [(entry["file"], entry["samples"], entry["sha256"]) for entry in manifest["shards"]]
    assert told == [(path.name, len(s), sha256(path)) for path, s in zip(shards, samples, strict=True)]
    assert manifest["samples"] == sum(map(len, samples))
    assert len(list(prefix.parent.iterdir())) == len(shards) + len(manifest.get("heldout", [])) + 1
    return [sample for content in samples for sample in content], manifest
