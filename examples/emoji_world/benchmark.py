"""The emoji world as four benchmarks of `evaluate.py`: `tasks=emoji`.

`{data_root}/{emoji_world}/` as `make data-emoji` writes it: `manifest.json` and `images/`. Seen images were trained on;
a held-out image's name was seen in other styles only. The questions are those of training.
"""

import hashlib
import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from common.files import check_file, field, is_hidden
from evaluation.images import psnr, side_by_side, square
from evaluation.official_files import (
    check_filled,
    check_images,
    choice,
    read_official,
    records_of,
    unique_keys,
)
from evaluation.task import GenerationTask, Item, QuestionTask, Task, Verdict, ratio
from evaluation.tasks.yes_no import YesNoRule, yes_no_figures
from examples.emoji_world.features import (
    check_packages,
    efficientnet_features,
    frechet_figures,
    load_efficientnet,
    name_ranks,
    pixels,
)
from examples.emoji_world.text import GROUP_QUESTIONS, GROUPS, NAME_QUESTION, STYLE_QUESTION, STYLES, caption
from models.loading import choose_device

SPLITS = ("seen", "held-out")
KINDS = tuple(kind for split in SPLITS for kind in (split, *(f"{split}, {style}" for style in STYLES)))
WHAT = "the manifest of an emoji world, which `make data-emoji` writes"
GENERATED, RECONSTRUCTED, REAL = "drawings", "reconstructions", "real pictures"  # as the results name them
SOURCES = (GENERATED, RECONSTRUCTED, REAL)
SPACES = ("features", "pixels")
TOPS = (1, 5)
FEATURES = "features.pt"  # inputs of the Fréchet distance, read again by `compare`


@dataclass(frozen=True)
class EmojiImage:
    key: str
    name: str
    style: str
    group: str
    split: str  # one of SPLITS
    path: Path

    @property
    def kinds(self) -> tuple[str, str]:
        """The names its figures are counted under."""
        return self.split, f"{self.split}, {self.style}"


def read_world(folder: Path) -> list[EmojiImage]:
    """All images in the manifest's order.

    Raises:
        UserError: a file or field is missing or wrong.
    """
    file = folder / "manifest.json"
    manifest = read_official(file, WHAT)
    groups = {}
    for place, record in records_of(file, manifest, "names"):
        groups[field(record, "name", str, place)] = choice(record, "group", tuple(GROUPS.values()), place)
    images = []
    for place, record in records_of(file, manifest, "pictures"):
        key, name = (field(record, part, str, place) for part in ("key", "name"))
        if Path(key).name != key or is_hidden(key):
            raise UserError(f"{place}: field 'key' is {key!r}; expected the beginning of a file name")
        if name not in groups:
            raise UserError(f"{place}: field 'name' is {name!r}; expected one of the {len(groups)} names of the file")
        style = choice(record, "style", STYLES, place)
        split = SPLITS[field(record, "held_out", bool, place)]
        images.append(EmojiImage(key, name, style, groups[name], split, folder / "images" / f"{key}.png"))
    check_filled(images, f"{file}: field 'pictures'", WHAT)
    unique_keys([image.key for image in images], file, "key")
    return images


def named_images(images: Sequence[EmojiImage]) -> Iterable[tuple[Path, str]]:
    return ((image.path, f"field 'key' of manifest.json ({image.key})") for image in images)


class EmojiTask(Task):
    """A benchmark of one world, which its answers belong to."""

    asked_by = ("emoji_manifest",)
    images_expected = "those of the emoji world"

    def named_images(self, items):
        return named_images([item.facts["image"] for item in items])

    @property
    def folder_of_world(self) -> Path:
        return self.root / self.config.emoji_world

    @property
    def settings(self):
        """With a digest of the manifest, which has the checksums of all files made with the images."""
        manifest = (self.folder_of_world / "manifest.json").read_bytes()
        return super().settings | {"emoji_manifest": hashlib.sha256(manifest).hexdigest()[:12]}


class EmojiDrawing(EmojiTask, GenerationTask):
    """Image generation: are generated images nearest to real images of the thing that was asked for?

    One image is generated per caption and compared with all training images (the gallery), in the features of a frozen
    EfficientNet-Lite0 and by pixels. Names are ranked by their nearest gallery image, and top-1 and top-5 accuracy of
    the right name are reported. A held-out image is not in the gallery, so its generated image must resemble the same
    thing in other styles. Real images and the image tokenizer's reconstructions are ranked too, as upper bounds. Both
    spaces are used because the features penalise blur that pixel distances do not.
    """

    name = "emoji_drawing"
    headline = "held-out top-1, features"
    ceilings = (RECONSTRUCTED, REAL)

    def check(self) -> None:
        check_packages()

    def read_items(self) -> list[Item]:
        self.world = read_world(self.folder_of_world)
        check_images(named_images(self.world), self.images_expected)  # the gallery
        return [
            Item(
                image.key,
                caption(image.name, image.style),
                image=image.path.name,
                stratum=image.kinds[1],
                facts={"image": image},
                expected=image.name,
            )
            for image in self.world
        ]

    def file_of(self, item) -> str:
        return f"{GENERATED}/{item.key}.png"

    def files_of(self, item) -> list[str]:
        return [self.file_of(item), f"{RECONSTRUCTED}/{item.key}.png"]

    def predict(self, model, items, images, generator) -> list[str]:
        """Generates images, and saves the tokenizer's reconstructions of the real ones beside them."""
        real = [self.image(item.facts["image"].path)() for item in items]
        for item, image in zip(items, model.decode(model.encode(real)), strict=True):
            self.output.save(f"{RECONSTRUCTED}/{item.key}.png", image)
        return super().predict(model, items, images, generator)

    def judge(self, items, answers) -> list[Verdict]:
        shown = self._shown(items, answers)
        model = load_efficientnet(choose_device(self.config.device))
        vectors = {
            "features": {source: efficientnet_features(model, images, source) for source, images in shown.items()},
            "pixels": {source: pixels(images) for source, images in shown.items()},
        }
        ranks = self._ranks(items, vectors)  # also reduces the real images to those of the items
        splits = [item.facts["image"].split for item in items]
        torch.save(vectors["features"] | {"splits": splits}, stored := io.BytesIO())
        with self.output.writing(FEATURES) as temporary:
            temporary.write_bytes(stored.getvalue())
        near = torch.cosine_similarity(vectors["features"][GENERATED], vectors["features"][REAL]).tolist()
        quality = psnr(vectors["pixels"][RECONSTRUCTED], vectors["pixels"][REAL]).tolist()
        verdicts = []
        for number, similarity in enumerate(near):
            facts = {f"{source} {space} rank": found[number][0] for (source, space), found in ranks.items()}
            nearest = ", ".join(f"{ranks[GENERATED, space][number][1]} ({space})" for space in SPACES)
            verdicts.append(Verdict(f"nearest: {nearest}", similarity, facts | {"PSNR": quality[number]}))
        return verdicts

    def _shown(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, list[Image.Image]]:
        """Generated and reconstructed images of the items, and all real images of the world, at the model's size."""
        size = self.config.dataset.preprocessing.resolution
        restored = self.generated([f"{RECONSTRUCTED}/{item.key}.png" for item in items])
        real = [square(self.image(image.path)(), size) for image in self.world]
        return {GENERATED: self.generated(answers), RECONSTRUCTED: restored, REAL: real}

    def _ranks(self, items: Sequence[Item], vectors: dict[str, dict[str, torch.Tensor]]) -> dict[tuple[str, str], list]:
        """`name_ranks` by source and space; the gallery consists of the seen images."""
        place = {image.key: number for number, image in enumerate(self.world)}
        rows = [place[item.key] for item in items]
        seen = [number for number, image in enumerate(self.world) if image.split == SPLITS[0]]
        names, wanted = [self.world[number].name for number in seen], [item.expected for item in items]
        ranks = {}
        for space, of_source in vectors.items():
            gallery, of_source[REAL] = of_source[REAL][seen], of_source[REAL][rows]
            for source in SOURCES:
                ranks[source, space] = name_ranks(of_source[source], gallery, names, wanted, space == "features")
        return ranks

    def counts(self, items, verdicts) -> dict[str, float]:
        (item,), (verdict,) = items, verdicts
        found: dict[str, float] = {}
        for kind in item.facts["image"].kinds:
            found |= {kind: 1, f"{kind} PSNR": verdict.facts["PSNR"]}
            for source in SOURCES:
                for space in SPACES:
                    rank = verdict.facts[f"{source} {space} rank"]
                    found |= {f"{kind} {source} {space} {top}": float(rank < top) for top in TOPS}
        return found

    def figures(self, sums) -> dict[str, np.ndarray]:
        found = {}
        for kind in (kind for kind in KINDS if kind in sums):
            for space in SPACES:
                for top in TOPS:
                    for source in SOURCES:
                        name = f"{kind} top-{top}, {space}{'' if source == GENERATED else f': {source}'}"
                        found[name] = 100 * ratio(sums[f"{kind} {source} {space} {top}"], sums[kind])
        for kind in (kind for kind in SPLITS if kind in sums):
            found[f"{kind} PSNR of the reconstructions, dB"] = ratio(sums[f"{kind} PSNR"], sums[kind])
        return found

    def set_figures(self, folder, samples, seed) -> dict[str, np.ndarray]:
        """Fréchet distances to the real images of the same split."""
        kept = read_features(folder / FEATURES)
        found = {}
        for split in SPLITS:
            rows = torch.tensor([one == split for one in kept["splits"]])
            if rows.sum() > 1:
                for source in (GENERATED, RECONSTRUCTED):
                    name = f"{split} Fréchet distance (EfficientNet-Lite0)"
                    name += "" if source == GENERATED else f": {source}"
                    found[name] = frechet_figures(kept[source][rows], kept[REAL][rows], samples, seed)
        return found

    def notes(self) -> list[str]:
        count = {split: sum(image.split == split for image in self.world) for split in SPLITS}
        names = len({image.name for image in self.world})
        world = f"{names} names, {count['seen']} images seen and {count['held-out']} held out"
        return [world, *super().notes()]

    def sheet_image(self, item, answer) -> Image.Image:
        """The generated image, and the real one to its right."""
        return side_by_side(super().sheet_image(item, answer), self.image(item.facts["image"].path)())


class EmojiQuestions(EmojiTask, QuestionTask):
    """One question about every image, of which the answer must be exactly the right one."""

    headline = "held-out"

    def read_items(self) -> list[Item]:
        return [item for image in read_world(self.folder_of_world) for item in self.items_of(image)]

    def question(self, image: EmojiImage, question: str, right: str, end: str = "") -> Item:
        """A question about an image; all about one are resampled together, within its split and style."""
        return Item(
            f"{image.key}{end}",
            question,
            self.image(image.path),
            image.path.name,
            image.key,
            image.kinds[1],
            {"image": image, "split": image.split, "kinds": image.kinds},
            right,
        )

    def items_of(self, image: EmojiImage) -> list[Item]:
        raise NotImplementedError

    def judge(self, items, answers) -> list[Verdict]:
        return [Verdict(text, float(text == item.expected)) for item, text in zip(items, answers, strict=True)]

    def counts(self, items, verdicts) -> dict[str, float]:
        found = {}
        for kind in items[0].facts["kinds"]:
            found |= {kind: len(items), f"{kind} right": sum(verdict.score for verdict in verdicts)}
        return found

    def figures(self, sums) -> dict[str, np.ndarray]:
        return {kind: 100 * ratio(sums[f"{kind} right"], sums[kind]) for kind in KINDS if kind in sums}


class EmojiNaming(EmojiQuestions):
    name = "emoji_naming"

    def items_of(self, image):
        return [self.question(image, NAME_QUESTION, image.name)]


class EmojiStyle(EmojiQuestions):
    name = "emoji_style"

    def items_of(self, image):
        return [self.question(image, STYLE_QUESTION, image.style)]


class EmojiYesNo(YesNoRule, EmojiQuestions):
    """POPE's form: about every image one question to be answered yes and one to be answered no."""

    name = "emoji_yes_no"
    headline = "held-out accuracy"
    asked_by = ("emoji_manifest", "questions")

    def items_of(self, image):
        others = [group for group in GROUPS.values() if group != image.group]
        other = random.Random(f"{self.config.seed} {image.key}").choice(others)
        pairs = ((image.group, "yes"), (other, "no"))
        return [self.question(image, GROUP_QUESTIONS[group], right, f"-{right}") for group, right in pairs]

    @property
    def settings(self):
        return super().settings | {"questions": f"seed {self.config.seed}"}

    def figures(self, sums) -> dict[str, np.ndarray]:
        asked = [split for split in SPLITS if any(f"{split} {kind}" in sums for kind in ("tp", "fp", "tn", "fn"))]
        return yes_no_figures(sums, asked)

    def notes(self) -> list[str]:
        return ["read by POPE's rule; half of the questions are to be answered yes"]


def read_features(file: Path) -> dict:
    """What `judge` stored; `UserError` if it is damaged."""
    try:
        kept = torch.load(check_file(file), map_location="cpu", weights_only=True)
        rows = len(kept["splits"])
        if all(kept[source].ndim == 2 and len(kept[source]) == rows for source in SOURCES):
            return kept
    except (RuntimeError, UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ValueError):
        pass
    raise UserError(f"{file} is damaged; remove {file.parent} and evaluate again")
