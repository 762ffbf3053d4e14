"""Benchmarks of text-to-image generation: GenEval and COCO.

GenEval: does the image show the prompt's objects, in number, colour and position? Judged by an object detector.
`geneval/evaluation_metadata.jsonl` of the official repository: 553 prompts, four images each, in the official
layout `{task's folder}/images/00000/{metadata.jsonl, grid.png, samples/0000.png ...}`. Judging is the official
script's, `evaluation/evaluate_images.py`; it runs here if its detector is installed (`geneval_repository`,
`geneval_detector`), otherwise elsewhere, and its `results.jsonl` is put into the task's folder.

COCO: zero-shot FID-30K and CLIPScore. `coco/annotations/captions_val2014.json` (or `coco_captions`, a file of the same
form) and `coco/val2014/`. An image is generated for one caption of each of 30,000 images sampled with `seed`; FID
compares with all images of the file.
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from common.contact_sheet import contact_sheet
from common.errors import UserError
from common.files import check_file, field, read_json
from evaluation.images import FID, check_clip, check_fid, clip_network, clip_scores, fid_metric
from evaluation.official_files import (
    check_filled,
    check_images,
    choice,
    read_json_lines,
    read_official,
    records_of,
    unique_keys,
)
from evaluation.task import GenerationTask, Item, Paper, Verdict, ratio, right_by
from models.images import load_image

PROMPTS, RESULTS = "evaluation_metadata.jsonl", "results.jsonl"
WHAT = "GenEval's prompts, one JSON object a line"
SAMPLES = 4
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SCRIPT = "evaluation/evaluate_images.py"
CAPTIONS = 30_000
FID_FILE = "fid.json"


class GenEval(GenerationTask):
    name = "geneval"
    headline = "overall"
    unit = "x 100"
    official_size = 553 * SAMPLES
    paper = Paper(68.0, None, "guidance and steps of the paper's figure are not known for certain")

    def check(self) -> None:
        self.obstacle = ""  # why the images are not judged here
        if repository := self.config.geneval_repository:
            check_file(Path(repository) / SCRIPT, f"geneval_repository={repository}/{SCRIPT}")

    def read_items(self) -> list[Item]:
        file = self.root / "geneval" / PROMPTS
        items = []
        for index, (place, record) in enumerate(read_json_lines(file, WHAT)):
            prompt, tag = field(record, "prompt", str, place), choice(record, "tag", TAGS, place)
            field(record, "include", list, place)
            facts = {"metadata": record, "prompt": index}
            for sample in range(SAMPLES):
                key = f"{index:05d}/samples/{sample:04d}.png"
                items.append(Item(key, prompt, image=key, group=f"{index:05d}", stratum=tag, facts=facts))
        check_filled(items, file, WHAT)
        return items

    def file_of(self, item) -> str:
        return f"images/{item.key}"

    def files_of(self, item) -> list[str]:
        return [self.file_of(item), self._metadata(item)]

    def _metadata(self, item: Item) -> str:
        return f"images/{item.group}/metadata.jsonl"

    def predict(self, model, items, images, generator) -> list[str]:
        answers = super().predict(model, items, images, generator)
        for item in items:
            self.output.write_text(self._metadata(item), json.dumps(item.facts["metadata"]) + "\n")
        return answers

    def judge(self, items, answers) -> list[Verdict]:
        """The official script's verdicts; empty if it has not run and cannot run here."""
        self._save_grids(answers)
        file = self.folder / RESULTS
        if not file.is_file() and not self._run_script(file):
            return []
        found = read_results(file)
        if missing := [item.key for item in items if item.key not in found]:
            raise UserError(
                f"{file}: field 'filename' names {len(found)} images, but not .../{missing[0]} ({len(missing)} are "
                f"missing); run GenEval's {SCRIPT} on all of {self.folder / 'images'}"
            )
        return [Verdict(found[item.key][1], float(found[item.key][0])) for item in items]

    def _save_grids(self, answers: Sequence[str]) -> None:
        """The official `grid.png` of each prompt, for people."""
        prompts: dict[str, list[str]] = {}
        for answer in answers:
            prompts.setdefault(f"{Path(answer).parents[1]}/grid.png", []).append(answer)
        for name, samples in prompts.items():
            if not (self.folder / name).exists():
                self.output.save(name, contact_sheet(self.generated(samples), [""] * len(samples), columns=2))

    def _run_script(self, file: Path) -> bool:
        config = self.config
        needed = (
            f"GenEval's {SCRIPT} on {self.name}/images with --outfile {self.name}/{file.name}, then start this again"
        )
        if find_spec("mmdet") is None:
            self.obstacle = f"not judged: the detector (mmdet) is not installed here; where it is, run {needed}"
        elif not config.geneval_repository or not config.geneval_detector:
            self.obstacle = f"not judged: give geneval_repository and geneval_detector, or run {needed}"
        if self.obstacle:
            return False
        script, partial = Path(config.geneval_repository) / SCRIPT, file.with_suffix(".partial")
        command = [sys.executable, str(script), str(self.folder / "images"), "--outfile", str(partial)]
        done = subprocess.run([*command, "--model-path", config.geneval_detector], capture_output=True, text=True)
        if done.returncode or not partial.is_file():
            reason = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise UserError(f"GenEval's {script} failed ({reason[:200]}); fix that and start the same command again")
        partial.rename(file)
        return True

    def counts(self, items, verdicts) -> dict[str, float]:
        """Of one prompt: its images by tag, and whether any of the four is right."""
        any_right = float(any(verdict.score for verdict in verdicts))
        return right_by([item.stratum for item in items], verdicts) | {"prompts": 1, "prompts right": any_right}

    def figures(self, sums) -> dict[str, np.ndarray]:
        """As in the official summary, the overall score is the mean over tags of the share of correct images."""
        tags = [tag for tag in TAGS if tag in sums]
        found = {tag: 100 * ratio(sums[f"{tag} right"], sums[tag]) for tag in tags}
        images, right = sum(sums[tag] for tag in tags), sum(sums[f"{tag} right"] for tag in tags)
        return {
            "overall": sum(found.values()) / len(tags),
            "drawings right": 100 * ratio(right, images),
            "prompts with a right drawing": 100 * ratio(sums["prompts right"], sums["prompts"]),
        } | found

    def notes(self) -> list[str]:
        return super().notes() + ([self.obstacle] if self.obstacle else [])


def read_results(file: Path) -> dict[str, tuple[bool, str]]:
    """Whether each image is correct, and why not, by `00000/samples/0000.png`."""
    found = {}
    for place, record in read_json_lines(file, f"what GenEval's {SCRIPT} writes, one JSON object a line"):
        key = "/".join(Path(field(record, "filename", str, place)).parts[-3:])
        reason = field(record, "reason", str, place) if "reason" in record else ""
        found[key] = (field(record, "correct", bool, place), " ".join(reason.split()) or "right")
    return found


class COCO(GenerationTask):
    name = "coco"
    official_size = CAPTIONS
    asked_by = ("captions",)
    images_expected = "COCO's images in coco/val2014"

    def __init__(self, config, root, folder) -> None:
        super().__init__(config, root, folder)
        self.scores = config.coco_scores.split(",")
        self.headline, self.unit = ("FID-30K", "lower is better") if "fid" in self.scores else ("CLIPScore", "x 100")
        if "fid" in self.scores:
            self.paper = Paper(9.24, None, "the paper's captions and resizing are not known")

    def check(self) -> None:
        self.network = check_fid(self.config) if "fid" in self.scores else ""
        if "clip" in self.scores:
            check_clip(self.config)

    def read_items(self) -> list[Item]:
        file = self.root / (self.config.coco_captions or "coco/annotations/captions_val2014.json")
        tree = read_official(file, "COCO's captions of val2014")
        names, captions = {}, {}
        for place, record in records_of(file, tree, "images"):
            names[field(record, "id", int, place)] = field(record, "file_name", str, place)
        for place, record in records_of(file, tree, "annotations"):
            text, key = field(record, "caption", str, place), field(record, "id", int, place)
            if (image := field(record, "image_id", int, place)) not in names:
                raise UserError(f"{place}: field 'image_id' is {image}; expected the 'id' of one of the file's images")
            captions.setdefault(image, []).append((key, " ".join(text.split())))
        self.real = [self.root / "coco/val2014" / name for name in names.values()]
        if "fid" in self.scores:
            named = ((path, f"field 'file_name' ({path.name}) of {file.name}") for path in self.real)
            check_images(named, self.images_expected)
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
            fid.add(len(self.real), lambda number: self.image(self.real[number])(), real=True)
            fid.add(len(answers), lambda number: load_image(self.folder / answers[number]), real=False)
            self.output.write_json(FID_FILE, {"FID-30K": fid.value()})
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
        value = field(read_json(file), "FID-30K", float, str(file))
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
