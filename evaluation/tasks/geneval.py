"""GenEval: does the image show the prompt's objects, in number, colour and position? Judged by an object detector.

`geneval/evaluation_metadata.jsonl` of the official repository: 553 prompts, four images each, in the official
layout `{task's folder}/images/00000/{metadata.jsonl, grid.png, samples/0000.png ...}`. Judging is the official
script's, `evaluation/evaluate_images.py`; it runs here if its detector is installed (`geneval_repository`,
`geneval_detector`), otherwise elsewhere, and its `results.jsonl` is put into the task's folder.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from common.contact_sheet import contact_sheet
from common.errors import UserError
from evaluation.generation import GenerationTask
from evaluation.official_files import check_filled, existing, field, read_json_lines
from evaluation.task import Item, Paper, Verdict, ratio, right_by

FILE, RESULTS = "evaluation_metadata.jsonl", "results.jsonl"
WHAT = "GenEval's prompts, one JSON object a line"
SAMPLES = 4
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SCRIPT = "evaluation/evaluate_images.py"


class GenEval(GenerationTask):
    name = "geneval"
    headline = "overall"
    unit = "x 100"
    official_size = 553 * SAMPLES
    paper = Paper(68.0, None, "guidance and steps of the paper's figure are not known for certain")

    def __init__(self, config, root, folder) -> None:
        super().__init__(config, root, folder)
        self.obstacle = ""  # why the images are not judged here
        if config.geneval_repository:
            existing(Path(config.geneval_repository) / SCRIPT, "GenEval's script in geneval_repository")

    def read_items(self) -> list[Item]:
        file = self.root / "geneval" / FILE
        items = []
        for index, (place, record) in enumerate(read_json_lines(file, WHAT)):
            prompt, tag = field(place, record, "prompt", str), field(place, record, "tag", str, TAGS)
            field(place, record, "include", list)
            facts = {"metadata": record, "prompt": index}
            for sample in range(SAMPLES):
                key = f"{index:05d}/samples/{sample:04d}.png"
                items.append(Item(key, prompt, image=key, group=f"{index:05d}", stratum=tag, facts=facts))
        check_filled(items, file, WHAT)
        return items

    def file_of(self, item) -> str:
        return f"images/{item.key}"

    def predict(self, model, items, images, generator) -> list[str]:
        answers = super().predict(model, items, images, generator)
        for item in items:
            file = self.folder / "images" / item.group / "metadata.jsonl"
            file.write_text(json.dumps(item.facts["metadata"]) + "\n", encoding="utf-8")
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
        prompts: dict[Path, list[str]] = {}
        for answer in answers:
            prompts.setdefault((self.folder / answer).parents[1], []).append(answer)
        for folder, samples in prompts.items():
            if not (folder / "grid.png").exists():
                contact_sheet(self.generated(samples), [""] * len(samples), columns=2).save(folder / "grid.png")

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
            raise UserError(f"GenEval's {script} failed ({reason[:200]}); mend that and start the same command again")
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
        key = "/".join(Path(field(place, record, "filename", str)).parts[-3:])
        reason = field(place, record, "reason", str) if "reason" in record else ""
        found[key] = (field(place, record, "correct", bool), " ".join(reason.split()) or "right")
    return found
