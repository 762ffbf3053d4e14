"""Make the emoji world, the training set of the small default: real drawings of ~860 things in four styles, with texts.

    python3 examples/emoji_world/make.py output_dir=data/emoji_world size=64 names=all

downloads five npm packages once (into `{output_dir}/packages`), draws them and writes, in half a minute:

    shards/{train,heldout}-NNNNNN.tar   WebDataset samples: key.png, key.txt (caption), key.json
    images/key.png                      the same images, for llava_{train,heldout}.json (questions and answers)
    imagenet/train/<id>/key.JPEG        one folder for each name; imagenet/LOC_synset_mapping.txt has their names
    text/train.parquet, text/train.txt  sentences (column `content`); all texts of training, for a BPE tokenizer
    manifest.json                       settings, every name and image, counts, licences, checksums

Every 8th name holds back one of its styles: those images are only in the held-out files (and in images/), so a model
that draws or names them has understood both the name and the style.

The same versions of the libraries give the same bytes on every machine; other versions may compress or round
differently, so the manifest records them.
"""

import hashlib
import io
import json
import random
import shutil
import sys
import tarfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import common  # noqa: F401  Ctrl-C is one word from here on

import numpy as np
from omegaconf import OmegaConf
from PIL import Image, ImageColor

from common.config import read_settings
from common.errors import UserError, run_cli
from common.settings import setting
from examples.emoji_world.sources import PACKAGES, EmojiPackages, distinctiveness, fetch_packages
from examples.emoji_world.text import STYLES, Name, caption, conversations, picture_key, sentences, tokenizer_lines

HOLD_OUT_EVERY = 8
PRODUCTS = ("shards", "images", "imagenet", "text", "llava_train.json", "llava_heldout.json", "manifest.json")


@dataclass
class EmojiWorldConfig:
    output_dir: str = setting("data/emoji_world", "the folder to make")
    packages_dir: str = setting("", "the downloads; empty: {output_dir}/packages")
    size: int = setting(64, "pixels per side", low=8)
    names: str = setting("all", "or a number: only that many names, the most distinctive that all four styles draw")
    background: str = setting("white", "any colour that PIL knows, under the transparent drawings")
    shard_size: int = setting(256, "images in a shard", low=1)
    seed: int = setting(0, "order of the shards and sentences, and the choice of questions")

    @staticmethod
    def problems(config) -> list[str]:
        found = []
        if config.names != "all" and not (config.names.isdigit() and int(config.names) > 0):
            found.append(f"names={config.names} is not allowed; use names=all or a number from 1")
        try:
            ImageColor.getrgb(config.background)
        except ValueError:
            found.append(f"background={config.background} is no colour; use a name or #rrggbb")
        return found


@dataclass
class Picture:
    name: Name
    style: str
    image: Image.Image  # RGB

    @property
    def key(self) -> str:
        return picture_key(self.name.name, self.style)

    @property
    def held_out(self) -> bool:
        return self.style == self.name.held_out_style


def hold_out(names: list[Name]) -> None:
    """Set `held_out_style` of every 8th name that all styles draw, rotating through the styles.

    Done on the whole list before any selection, so a smaller world holds out a subset of a larger one's, and a
    tokenizer trained on all names has not seen the held-out images of a model trained on some.
    """
    complete = [name for name in names if len(name.styles) == len(STYLES)]
    for turn, name in enumerate(complete[::HOLD_OUT_EVERY]):
        name.held_out_style = STYLES[turn % len(STYLES)]


def most_distinctive(pictures: list[Picture], count: int) -> list[Picture]:
    """The images of the `count` names with the highest `distinctiveness`, in their old order."""
    rows: dict[str, list[Image.Image]] = {}
    for picture in pictures:
        if len(picture.name.styles) == len(STYLES):
            rows.setdefault(picture.name.name, []).append(picture.image)
    if count > len(rows):
        raise UserError(f"names={count}, but only {len(rows)} names are drawn in all styles; use names=all or fewer")
    order = np.argsort(-distinctiveness(list(rows.values())), kind="stable")
    best = {list(rows)[i] for i in order[:count]}
    return [picture for picture in pictures if picture.name.name in best]


def write_world(pictures: list[Picture], output_dir: Path, config: EmojiWorldConfig) -> dict:
    """Write everything. What was there stays whole until the new set is complete.

    Returns:
        the manifest.
    """
    known = [output_dir / product for product in PRODUCTS]
    if any(path.exists() for path in known) and not known[-1].exists():
        raise UserError(f"output_dir={output_dir} holds files that no emoji world wrote; choose another folder")
    names = list({picture.name.name: picture.name for picture in pictures}.values())
    partial = output_dir / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("shards", "images", "text"):
        (partial / folder).mkdir(parents=True)
    manifest = _write_all(pictures, names, partial, config)
    for product in PRODUCTS:
        old, new = output_dir / product, partial / product
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        new.rename(old)
    partial.rmdir()
    return manifest


def _write_all(pictures: list[Picture], names: list[Name], folder: Path, config: EmojiWorldConfig) -> dict:
    for split, held_out in (("train", False), ("heldout", True)):
        chosen = [picture for picture in pictures if picture.held_out == held_out]
        random.Random(f"shards {split} {config.seed}").shuffle(chosen)
        for start in range(0, len(chosen), config.shard_size):
            path = folder / "shards" / f"{split}-{start // config.shard_size:06d}.tar"
            write_shard(path, chosen[start : start + config.shard_size])
        records = conversations(names, held_out, config.seed)
        write_json(folder / f"llava_{split}.json", records)
    for picture in pictures:
        (folder / "images" / f"{picture.key}.png").write_bytes(encoded(picture.image, "PNG"))
    write_imagenet(folder / "imagenet", pictures)
    write_text(folder / "text", names, config.seed)
    manifest = describe(pictures, names, folder, config)
    write_json(folder / "manifest.json", manifest)
    return manifest


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_json(path: Path, value: dict | list) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_shard(path: Path, pictures: list[Picture]) -> None:
    """One WebDataset shard. Owners and times are fixed, so equal images make equal files."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for picture in pictures:
            facts = {field: getattr(picture.name, field) for field in ("name", "group", "subgroup", "hexcode", "tags")}
            facts |= {"style": picture.style, "held_out": picture.held_out}
            parts = {
                "png": encoded(picture.image, "PNG"),
                "txt": caption(picture.name.name, picture.style).encode(),
                "json": json.dumps(facts, ensure_ascii=False).encode(),
            }
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{picture.key}.{suffix}")  # mode 644, owner 0, time 0
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_imagenet(folder: Path, pictures: list[Picture]) -> None:
    """ImageNet's layout: a folder of JPEGs for each class, and one line `id name` for each class."""
    classes = {picture.name.wnid: picture.name.name for picture in pictures}
    for wnid in classes:
        (folder / "train" / wnid).mkdir(parents=True)
    for picture in pictures:
        if not picture.held_out:
            path = folder / "train" / picture.name.wnid / f"{picture.key}.JPEG"
            path.write_bytes(encoded(picture.image, "JPEG"))
    lines = [f"{wnid} {name}\n" for wnid, name in sorted(classes.items())]
    (folder / "LOC_synset_mapping.txt").write_text("".join(lines), encoding="utf-8")


def write_text(folder: Path, names: list[Name], seed: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    lines = sentences(names, seed)
    pa.parquet.write_table(pa.table({"content": lines}), folder / "train.parquet")
    records = conversations(names, held_out=False, seed=seed)
    everything = tokenizer_lines(names, records, lines)
    (folder / "train.txt").write_text("".join(f"{line}\n" for line in everything), encoding="utf-8")


def describe(pictures: list[Picture], names: list[Name], folder: Path, config: EmojiWorldConfig) -> dict:
    """The manifest of `folder`."""
    arguments = {k: v for k, v in asdict(config).items() if k not in ("output_dir", "packages_dir")}
    held_out = sum(picture.held_out for picture in pictures)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".tar", ".json", ".parquet", ".txt"))
    return {
        "arguments": arguments,
        "counts": {"names": len(names), "train": len(pictures) - held_out, "heldout": held_out},
        "packages": [asdict(package) for package in PACKAGES],
        "libraries": {library: version(library) for library in ("pillow", "pyarrow", "resvg-py")},
        "names": [asdict(name) | {"wnid": name.wnid} for name in names],
        "pictures": [{"key": p.key, "name": p.name.name, "style": p.style, "held_out": p.held_out} for p in pictures],
        "sha256": {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }


def read_arguments(argv: list[str]) -> EmojiWorldConfig:
    """`key=value` arguments as a config. There is no config file: the set has few settings, and one usual form."""
    return OmegaConf.to_object(read_settings(argv, EmojiWorldConfig, "output_dir=data/emoji_world size=64"))


def main(argv: list[str]) -> None:
    config = read_arguments(argv)
    output_dir = Path(config.output_dir)
    packages_dir = Path(config.packages_dir or output_dir / "packages")
    fetch_packages(packages_dir)
    packages = EmojiPackages(packages_dir)
    names = packages.names()
    hold_out(names)
    pictures = [
        Picture(name, style, packages.picture(name, style, config.size, config.background))
        for name in names
        for style in name.styles
    ]
    if config.names != "all":
        pictures = most_distinctive(pictures, int(config.names))
    manifest = write_world(pictures, output_dir, config)
    print(f"{output_dir}: " + ", ".join(f"{count} {what}" for what, count in manifest["counts"].items()))


if __name__ == "__main__":
    run_cli(main)
