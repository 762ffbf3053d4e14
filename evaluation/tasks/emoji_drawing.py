"""Image generation on the emoji world: are generated images nearest to real images of the thing that was asked for?

One image is generated per caption and compared with all training images (the gallery), in the features of a frozen
EfficientNet-Lite0 and by pixels. Names are ranked by their nearest gallery image, and top-1 and top-5 accuracy of the
right name are reported. A held-out image is not in the gallery, so its generated image must resemble the same thing in
other styles. Real images and the image tokenizer's reconstructions are ranked too, as upper bounds. Both spaces are
used because the features penalise blur that pixel distances do not.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from evaluation import efficientnet
from evaluation.emoji import KINDS, SPLITS, read_world, world_settings
from evaluation.frechet import frechet_figures
from evaluation.generation import GenerationTask, as_bytes, psnr, save, side_by_side, square
from evaluation.task import Item, Verdict, ratio
from examples.emoji_world.text import caption
from models.images import load_image
from models.pipeline_loading import choose_device

GENERATED, RECONSTRUCTED, REAL = "drawings", "reconstructions", "real pictures"
SOURCES = (GENERATED, RECONSTRUCTED, REAL)
SPACES = ("features", "pixels")
TOPS = (1, 5)
FEATURES = "features.pt"  # inputs of the Fréchet distance, read again by `compare`


class EmojiDrawing(GenerationTask):
    name = "emoji_drawing"
    headline = "held-out top-1, features"
    asked_by = ("emoji_manifest",)
    ceilings = (RECONSTRUCTED, REAL)

    def __init__(self, config, root, folder) -> None:
        super().__init__(config, root, folder)
        efficientnet.check_packages()

    @property
    def settings(self):
        return super().settings | world_settings(self.root / self.config.emoji_world)

    def read_items(self) -> list[Item]:
        self.world = read_world(self.root / self.config.emoji_world)
        return [
            Item(
                picture.key,
                caption(picture.name, picture.style),
                image=picture.path.name,
                stratum=picture.kinds[1],
                facts={"picture": picture},
                expected=picture.name,
            )
            for picture in self.world
        ]

    def file_of(self, item) -> str:
        return f"{GENERATED}/{item.key}.png"

    def predict(self, model, items, images, generator) -> list[str]:
        """Generates images, and saves the tokenizer's reconstructions of the real ones beside them."""
        real = [load_image(item.facts["picture"].path) for item in items]
        for item, image in zip(items, model.decode(model.encode(real)), strict=True):
            save(self.folder, f"{RECONSTRUCTED}/{item.key}.png", image)
        return super().predict(model, items, images, generator)

    def judge(self, items, answers) -> list[Verdict]:
        shown = self._shown(items, answers)
        model = efficientnet.load(choose_device(self.config.device))
        vectors = {
            "features": {source: efficientnet.features(model, images, source) for source, images in shown.items()},
            "pixels": {source: pixels(images) for source, images in shown.items()},
        }
        ranks = self._ranks(items, vectors)  # also reduces the real images to those of the items
        splits = [item.facts["picture"].split for item in items]
        torch.save(vectors["features"] | {"splits": splits}, self.folder / FEATURES)
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
        real = [square(load_image(picture.path), size) for picture in self.world]
        return {GENERATED: self.generated(answers), RECONSTRUCTED: restored, REAL: real}

    def _ranks(self, items: Sequence[Item], vectors: dict[str, dict[str, torch.Tensor]]) -> dict[tuple[str, str], list]:
        """`name_ranks` by source and space; the gallery consists of the seen images."""
        place = {picture.key: number for number, picture in enumerate(self.world)}
        rows = [place[item.key] for item in items]
        seen = [number for number, picture in enumerate(self.world) if picture.split == SPLITS[0]]
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
        for kind in item.facts["picture"].kinds:
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
        kept = torch.load(folder / FEATURES, weights_only=True)
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
        count = {split: sum(picture.split == split for picture in self.world) for split in SPLITS}
        names = len({picture.name for picture in self.world})
        world = f"{names} names, {count['seen']} images seen and {count['held-out']} held out"
        return [world, *super().notes()]

    def picture(self, item, answer) -> Image.Image:
        """The generated image, and the real one to its right."""
        return side_by_side(super().picture(item, answer), load_image(item.facts["picture"].path))


def name_ranks(
    queries: torch.Tensor, gallery: torch.Tensor, names: Sequence[str], wanted: Sequence[str], cosine: bool
) -> list[tuple[int, str]]:
    """Names ranked by their nearest gallery image.

    Args:
        queries: (Q, F).
        gallery: (G, F), of G `names`, which may recur.
        wanted: Q names.
        cosine: compare directions instead of distances.

    Returns:
        for each query the rank of its name (0 = first; the last where the gallery lacks it), and the first name.
    """
    if cosine:
        queries, gallery = (torch.nn.functional.normalize(each, dim=-1) for each in (queries, gallery))
    listed = list(dict.fromkeys(names))
    place = {name: index for index, name in enumerate(listed)}
    index = torch.tensor([place[name] for name in names]).expand(len(queries), -1)
    distances = torch.full((len(queries), len(listed)), torch.inf)
    distances = distances.scatter_reduce(1, index, torch.cdist(queries, gallery), "amin")  # (Q, names)
    found = []
    for row, name in zip(distances, wanted, strict=True):
        rank = int((row < row[place[name]]).sum()) if name in place else len(listed)
        found.append((rank, listed[int(row.argmin())]))
    return found


def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """(N, 3 * H * W) float32 in [0, 1]."""
    return torch.stack([as_bytes(image, image.width).flatten() for image in images]).float() / 255
