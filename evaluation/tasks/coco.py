"""COCO: zero-shot FID-30K and CLIPScore of images generated from val2014's captions.

`coco/annotations/captions_val2014.json` (or `coco_captions`, a file of the same form) and `coco/val2014/`. An image
is generated for one caption of each of 30,000 images sampled with `seed`; FID compares with all images of the file.
"""

import random
from pathlib import Path

import numpy as np

from common.errors import UserError
from evaluation.generation import GenerationTask
from evaluation.image_scores import FID, check_clip, check_fid, clip_network, clip_scores, fid_metric
from evaluation.official_files import check_filled, check_images, field, read_json, unique_keys, write_json
from evaluation.task import Item, Paper, Verdict, ratio
from models.images import load_image

CAPTIONS = 30_000
FID_FILE = "fid.json"


class COCO(GenerationTask):
    name = "coco"
    official_size = CAPTIONS
    asked_by = ("captions",)

    def __init__(self, config, root, folder) -> None:
        super().__init__(config, root, folder)
        self.scores = config.coco_scores.split(",")
        self.network = check_fid(config) if "fid" in self.scores else ""
        if "clip" in self.scores:
            check_clip(config)
        self.headline, self.unit = ("FID-30K", "lower is better") if "fid" in self.scores else ("CLIPScore", "x 100")
        if "fid" in self.scores:
            self.paper = Paper(9.24, None, "the paper's captions and resizing are not known")

    def read_items(self) -> list[Item]:
        file = self.root / (self.config.coco_captions or "coco/annotations/captions_val2014.json")
        tree = read_json(file, dict, "COCO's captions of val2014")
        names, captions = {}, {}
        for number, record in enumerate(field(str(file), tree, "images", list)):
            place = f"{file}, image {number}"
            names[field(place, record, "id", int)] = field(place, record, "file_name", str)
        for number, record in enumerate(field(str(file), tree, "annotations", list)):
            place = f"{file}, annotation {number}"
            text, key = field(place, record, "caption", str), field(place, record, "id", int)
            if (image := field(place, record, "image_id", int)) not in names:
                raise UserError(f"{place}: field 'image_id' is {image}; expected the 'id' of one of the file's images")
            captions.setdefault(image, []).append((key, " ".join(text.split())))
        self.real = [self.root / "coco/val2014" / name for name in names.values()]
        check_images(
            self.real if "fid" in self.scores else [],
            lambda path: f"field 'file_name' ({path.name}) of {file.name}",
            f"COCO's val2014 images in {self.root / 'coco/val2014'}",
        )
        check_filled(captions, f"{file}: field 'annotations'", "COCO's captions of val2014")
        rng = random.Random(f"captions {self.config.seed}")
        chosen = rng.sample(sorted(captions), min(CAPTIONS, len(captions)))
        pairs = [(image, *rng.choice(captions[image])) for image in chosen]
        unique_keys([str(key) for _, key, _ in pairs], file, "id")
        for score, load in (("fid", fid_metric), ("clip", clip_network)):
            if score in self.scores:
                load(self.config)  # an unusable network is noticed before anything is generated
        return [Item(str(key), text, image=names[image], expected=text) for image, key, text in pairs]

    def file_of(self, item) -> str:
        return f"images/{int(item.key):012d}.png"

    @property
    def settings(self):
        return super().settings | {"captions": self.config.coco_captions or "val2014"}

    def judge(self, items, answers) -> list[Verdict]:
        if "fid" in self.scores:
            fid = FID(self.config)
            fid.add(len(self.real), lambda number: load_image(self.real[number]), real=True)
            fid.add(len(answers), lambda number: load_image(self.folder / answers[number]), real=False)
            write_json(self.folder / FID_FILE, {"FID-30K": fid.value()})
        if "clip" not in self.scores:
            return [Verdict("", 0.0) for _ in items]
        generated = (load_image(self.folder / answer) for answer in answers)
        return [Verdict("", score) for score in clip_scores(self.config, generated, [item.prompt for item in items])]

    def counts(self, items, verdicts) -> dict[str, float]:
        return {"drawings": len(items), "CLIPScore": sum(verdict.score for verdict in verdicts)}

    def figures(self, sums) -> dict[str, np.ndarray]:
        return {"CLIPScore": ratio(sums["CLIPScore"], sums["drawings"])} if "clip" in self.scores else {}

    def set_figures(self, folder: Path, samples, seed) -> dict[str, np.ndarray]:
        """FID without an interval: a resample would take as long as FID itself."""
        file = folder / FID_FILE
        if "fid" not in self.scores or not file.exists():
            return {}
        value = field(str(file), read_json(file, dict, "FID as it was calculated"), "FID-30K", float)
        return {"FID-30K": np.array([value])}

    def notes(self) -> list[str]:
        config = self.config
        found = [f"val2014, one caption each of images sampled with seed {config.seed}", *super().notes()]
        if "fid" in self.scores:
            found.append(f"against all {len(self.real)} images, through {self.network}")
            found.append(f"both sets: shorter side to {config.fid_size} by PIL's bicubic, centre crop")
        if "clip" in self.scores:
            found.append(f"CLIPScore by {Path(config.clip_score_model).name}")
        return found
