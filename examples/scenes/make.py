"""Makes the scene world's parts as files that every flow reads.

    python3 examples/scenes/make.py output_dir=data/scenes size=96 seed=0

    classes/train/{name}/*.png                   one large icon each, a folder for each class
    captions/{split}-*.tar, …-manifest.json      shards: png, txt (the caption), json (scene, and what the caption says)
    questions/{split}.json, images/              LLaVA's json: all questions of an image in one conversation
    several/{split}.json, images/                questions on two or three images, in LLaVA's form
    crowds/{split}-*.tar                         shards: png with up to eight things, for the image tokenizer
    edits/{split}.jsonl, images/                 documents of segments: image, instruction, image
    stories/{split}.jsonl, images/               documents: text, image, text, image, …
    texts/{split}.jsonl, train.txt               sentences (`content`); all texts of training, for a BPE tokenizer
    pairs/{split}.jsonl, images/                 two images for a caption, or two answers; the better one is `chosen`
    sheet.png                                    the first samples, to look at
    manifest.json                                settings, icons, rules, counts, checksums

The split `train` keeps the rules of what is held out; `seen` keeps them, too, in scenes that training never shows;
`colours`, `pairs` and `counts` hold nothing but scenes that break that one rule. The same seed gives the same bytes,
with the versions of the libraries in the manifest. A folder that was made before is replaced when the new one is
complete.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import common  # noqa: F401  Ctrl-C is one word from here on

from omegaconf import OmegaConf
from PIL import Image

from common.config import read_settings
from common.contact_sheet import contact_sheet
from common.errors import UserError, run_cli
from common.files import disk_errors, make_folder, read_json, write_json
from common.progress import progress
from common.settings import setting
from examples.scenes.parts import PARTS, Sample, stream
from examples.scenes.world import CELL, COLOURS, GROUNDS, ICONS, LICENCES, SIDES, SPLITS, Scene, png_of, render
from llava import question_prompt_vq
from tools.shard_writing import manifest_path, shard_path, write_shard

DESCRIBE = "describe the image."
HELD_OUT = {"captions": SPLITS[1:], "questions": SPLITS[1:], "classes": ()}  # splits beside train; else the first
MANIFEST, WORLD, SHEET = "manifest.json", "scenes", "sheet.png"


@dataclass
class ScenesConfig:
    output_dir: str = setting("data/scenes", "the folder to make")
    size: int = setting(96, "pixels per side", choices=tuple(SIDES))
    seed: int = setting(0, "of all scenes and texts")
    classes: int = setting(2560, "images of single icons", low=0)
    captions: int = setting(20_000, "images with captions", low=0)
    questions: int = setting(5_000, "images with six to eight questions each", low=0)
    crowds: int = setting(25_000, "images full of things, without texts", low=0)
    edits: int = setting(4_000, "scenes before and after an instruction", low=0)
    stories: int = setting(2_000, "stories of two to four images", low=0)
    several: int = setting(2_000, "questions on several images", low=0)
    texts: int = setting(20_000, "sentences", low=0)
    pairs: int = setting(2_000, "pairs of a better and a worse image or answer", low=0)
    held_out: int = setting(500, "samples of each other split of a part", low=0)
    shard_size: int = setting(1000, "samples in a shard", low=1)


class Writer:
    """Writes one split of one part into a folder.

    Args:
        folder: of the part.
        samples: what is written.
        shard_size: samples in a shard.
    """

    def __init__(self, folder: Path, split: str, samples: Iterator[Sample], shard_size: int):
        self.folder, self.split, self.samples, self.shard_size = folder, split, samples, shard_size
        self.texts: list[str] = []  # all that is said, for a tokenizer

    # ---- one method for each part ----

    def write_classes(self) -> None:
        for one in self.samples:
            place = self.folder / self.split / one.said["class"]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{one.key}.png").write_bytes(_png(one.scenes[0]))
            self.texts.append(one.said["class"])

    def write_captions(self) -> None:
        self._shards(self._caption(one) for one in self.samples)

    def _caption(self, one: Sample) -> dict:
        self.texts.append(one.said["caption"])
        truth = {"scene": one.scenes[0].as_json(), "claims": one.said["claims"]}
        return {
            "__key__": one.key,
            "png": _png(one.scenes[0]),
            "txt": one.said["caption"].encode(),
            "json": _json(truth),
        }

    def write_questions(self) -> None:
        """All questions of an image, and a request for a caption, which may come first or last, in one conversation."""
        records = []
        for number, one in enumerate(self.samples):
            self._image(one.key, one.scenes[0])
            asked = [(asked["question"], asked["answer"]) for asked in one.said["questions"]]
            asked.insert(0 if number % 2 else len(asked), (DESCRIBE, one.said["caption"]))
            records.append(_record(one.key, f"{one.key}.png", asked, "questions", one.scenes))
            self.texts += [f"{question_prompt_vq(question)} {answer}" for question, answer in asked]
        self._json(records)

    def write_crowds(self) -> None:
        self._shards({"__key__": one.key, "png": _png(one.scenes[0])} for one in self.samples)

    def write_several(self) -> None:
        records = []
        for one in self.samples:
            said, images = one.said, self._images(one)
            records.append(_record(one.key, images, [(said["question"], said["answer"])], said["kind"], one.scenes))
            self.texts.append(f"{question_prompt_vq(said['question'])} {said['answer']}")
        self._json(records)

    def write_edits(self) -> None:
        self._documents(
            lambda one, images: [_image(images[0], False), _text(one.said["instruction"]), _image(images[1])]
        )

    def write_stories(self) -> None:
        self._documents(
            lambda one, images: [
                segment
                for number, image in enumerate(images)
                for segment in (_text(one.said["texts"][number], number > 0), _image(image))
            ]
        )

    def _documents(self, segments) -> None:
        records = []
        for one in self.samples:
            record = {"id": one.key, "segments": segments(one, [f"images/{name}" for name in self._images(one)])}
            records.append(record | one.said | {"scenes": [scene.as_json() for scene in one.scenes]})
            self.texts += [segment["text"] for segment in record["segments"] if "text" in segment]
        self._lines(records)

    def write_texts(self) -> None:
        records = [one.said for one in self.samples]
        self.texts += [record["content"] for record in records]
        self._lines(records)

    def write_pairs(self) -> None:
        records = []
        for one in self.samples:
            images, record = [f"images/{name}" for name in self._images(one)], dict(one.said)
            if record["kind"] == "image":
                record |= {"chosen": images[0], "rejected": images[1]}
                self.texts.append(record["caption"])
            else:
                record["image"] = images[0]
                self.texts.append(f"{question_prompt_vq(record['question'])} {record['chosen']}")
            records.append({"id": one.key} | record | {"scenes": [scene.as_json() for scene in one.scenes]})
        self._lines(records)

    # ---- files ----

    def _shards(self, samples: Iterator[dict]) -> None:
        prefix, entries = self.folder / self.split, []
        while chunk := list(islice(samples, self.shard_size)):
            entries.append(write_shard(shard_path(prefix, len(entries)), chunk))
        total = sum(entry["samples"] for entry in entries)
        write_json(manifest_path(prefix), {"shards": entries, "samples": total, "skipped": {}})

    def _image(self, key: str, scene: Scene) -> bytes:
        """The image as PNG, which is also written as a file of its own."""
        png = _png(scene)
        (self.folder / "images").mkdir(exist_ok=True)
        (self.folder / "images" / f"{key}.png").write_bytes(png)
        return png

    def _images(self, one: Sample) -> list[str]:
        keys = [f"{one.key}-{number}" for number in range(len(one.scenes))]
        for key, scene in zip(keys, one.scenes, strict=True):
            self._image(key, scene)
        return [f"{key}.png" for key in keys]

    def _lines(self, records: list[dict]) -> None:
        (self.folder / f"{self.split}.jsonl").write_text(
            "".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8"
        )

    def _json(self, records: list[dict]) -> None:
        """LLaVA's form: one list, here with a record on each line."""
        text = ",\n".join(map(json.dumps, records))
        (self.folder / f"{self.split}.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


def _png(scene: Scene) -> bytes:
    return png_of(render(scene))


def _json(value: dict) -> bytes:
    return json.dumps(value).encode()


def _image(name: str, loss: bool = True) -> dict:
    return {"image": name, "loss": loss}


def _text(text: str, loss: bool = False) -> dict:
    return {"text": text, "loss": loss}


def _record(
    key: str, images: str | list[str], asked: list[tuple[str, str]], task: str, scenes: tuple[Scene, ...]
) -> dict:
    """A record of LLaVA's form, with the true scenes; `asked` are questions with their answers."""
    tags, turns = "<image>\n" * (1 if isinstance(images, str) else len(images)), []
    for question, answer in asked:
        turns += [{"from": "human", "value": f"{tags}{question}"}, {"from": "gpt", "value": answer}]
        tags = ""
    truth = [scene.as_json() for scene in scenes]
    return {"id": key, "image": images, "task": task, "conversations": turns, "scenes": truth}


def plan(config: ScenesConfig) -> Iterator[tuple[str, str, int]]:
    """Part, split and number of samples of everything that is made."""
    for part in PARTS:
        for split in ("train", *HELD_OUT.get(part, SPLITS[1:2])):
            samples = getattr(config, part)
            if samples and split != "train":
                samples = config.held_out
            if samples:
                yield part, split, samples


def write_world(config: ScenesConfig) -> dict:
    """Writes all parts; what was there stays whole until the new ones are complete.

    Returns:
        the manifest.

    Raises:
        UserError: the folder holds files that this command did not write, or cannot be written to.
    """
    folder = make_folder(config.output_dir)
    known = [folder / name for name in (*PARTS, SHEET, MANIFEST)]
    if any(path.exists() for path in known) and not _is_ours(known[-1]):
        raise UserError(f"output_dir={config.output_dir} holds files that no scene world wrote; choose another folder")
    partial = folder / ".partial"
    with disk_errors(folder), ExitStack() as cleaning:
        shutil.rmtree(partial, ignore_errors=True)
        cleaning.callback(shutil.rmtree, partial, ignore_errors=True)
        manifest = _write_parts(config, make_folder(partial))
        for path in reversed(known):  # the manifest goes first and comes last
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in known:
            if (partial / path.name).exists():
                (partial / path.name).rename(path)
    return manifest


def _is_ours(manifest: Path) -> bool:
    return manifest.is_file() and read_json(manifest).get("world") == WORLD


def _write_parts(config: ScenesConfig, folder: Path) -> dict:
    planned, counts, texts = list(plan(config)), {}, []
    with progress(total=sum(samples for *_, samples in planned), unit=" samples") as bar:
        for part, split, samples in planned:
            bar.set_description(f"{part}, {split}", refresh=False)
            made = islice(stream(part, config.seed, split, config.size // CELL), samples)
            writer = Writer(make_folder(folder / part), split, _counting(made, bar), config.shard_size)
            getattr(writer, f"write_{part}")()
            counts.setdefault(part, {})[split] = samples
            texts += writer.texts if split == "train" else []
    if texts:
        (make_folder(folder / "texts") / "train.txt").write_text(
            "".join(text.replace("\n", "") + "\n" for text in texts), encoding="utf-8"
        )
    make_sheet(config.seed, config.size // CELL).save(folder / SHEET)
    manifest = {
        "world": WORLD,
        "arguments": {key: value for key, value in vars(config).items() if key != "output_dir"},
        "counts": counts,
        "icons": ICONS,
        "colours": COLOURS,
        "grounds": GROUNDS,
        "source": LICENCES,
        "libraries": {library: version(library) for library in ("numpy", "resvg-py", "webdataset")},
        "sha256": {str(path.relative_to(folder)): _sha256(path) for path in _listed(folder)},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def make_sheet(seed: int, cells: int) -> Image.Image:
    """Captions with their images, edits, stories and pairs, a row of eight images each or two."""
    images, texts = [], []
    for part, rows in (("captions", 2), ("edits", 1), ("stories", 1), ("pairs", 1)):
        end = len(images) + 8 * rows
        for one in stream(part, seed, cells=cells):
            left, said = end - len(images), one.said
            if not left:
                break
            if len(one.scenes) > left or (part == "stories" and len(one.scenes) < 4) or said.get("kind") == "answer":
                continue
            images += [Image.fromarray(render(scene)) for scene in one.scenes]
            texts += said.get("texts") or [said.get("caption") or "", f"wrong: {said.get('wrong')}"][: len(one.scenes)]
            if part == "edits":
                texts[-2:] = ["before", said["instruction"]]
    return contact_sheet(images, texts, columns=8, cell=max(128, CELL * cells))


def _counting(samples: Iterator[Sample], bar) -> Iterator[Sample]:
    for one in samples:
        yield one
        bar.update()


def _listed(folder: Path) -> list[Path]:
    """The files with a checksum: all but single images."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".tar", ".json", ".jsonl", ".txt"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_arguments(argv: list[str]) -> ScenesConfig:
    """`key=value` arguments as a config."""
    return OmegaConf.to_object(read_settings(argv, ScenesConfig, "output_dir=data/scenes size=96"))


def main(argv: list[str]) -> None:
    config = read_arguments(argv)
    counts = write_world(config)["counts"]
    made = [f"{sum(splits.values())} {part} ({', '.join(splits)})" for part, splits in counts.items()]
    print(f"{config.output_dir}: " + ", ".join(made))


if __name__ == "__main__":
    run_cli(main)
