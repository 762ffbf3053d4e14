"""Answers questions about images (spec §8, §13).

    python3 inference_mmu.py config=configs/showo_tiny_demo.yaml mmu_image_root=mmu_validation/emoji \\
        question='What is this?'
    python3 inference_mmu.py config=configs/showo_demo_w_clip_vit_512x512.yaml max_new_tokens=100 \\
        mmu_image_root=./mmu_validation question='Please describe this image in detail. *** Where is it?'

Every question is asked about every image of the folder `mmu_image_root`, which may also be a single file;
`question=null` asks for the bare caption, which models trained on captions without an instruction give;
`mmu_together=true` asks each question once, about all images together, in the order of their names. Answers are
printed while they are generated. `output_dir` (default: `{experiment.output_dir}/mmu`) gets `results.jsonl`, the images
as the model sees them (`0000.png` …) and `grid.png`; wandb gets the panel `multimodal understanding`.
"""

import mimetypes
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

from common.config import InferenceConfig, load_config
from common.contact_sheet import Cell, contact_sheet
from common.errors import UserError, run_cli, shown
from common.files import visible_in
from common.inputs import required_path, rotation_note, split_pieces
from common.results import ResultFolder, copies_in
from common.tracking import Tracker

PANEL_SIZE = 100  # images logged to wandb at once
MAX_NAMED = 10  # unreadable images that have a line each


def find_images(config, key: str, value: str | None) -> list[Path]:
    """The images of a folder that the setting `key` names, sorted by name, without what earlier runs wrote for people
    to look at; or one image.

    What is passed over is told on the terminal: images that cannot be read by name, other files by their number.

    Raises:
        UserError: there is no usable image.
    """
    from models.images import ImageOptions, has_rotation, load_image, resized_size

    options, resolution = ImageOptions(**config.image), config.dataset.preprocessing.resolution
    root = required_path(key, value)
    copies = copies_in(root) if root.is_dir() else ()
    paths = [path for path in visible_in(root) if path.name not in copies] if root.is_dir() else [root]
    images, rotated, unreadable, others = [], 0, [], Counter()
    for path in paths:
        try:
            image = load_image(path, options)
            resized_size(image.size, resolution, shown(path))
        except UserError as error:
            if path is root:
                raise
            if (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
                unreadable.append(error)
            else:
                others[path.suffix.lower() or "no suffix"] += 1
            continue
        images.append(path)
        rotated += has_rotation(image)
    for error in unreadable[:MAX_NAMED]:
        print(f"skipped: {error}", flush=True)
    if (more := len(unreadable) - MAX_NAMED) > 0:
        print(f"skipped: {more} more images that cannot be read", flush=True)
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        print(f"skipped: {others.total()} files that are no images ({shown(kinds)})", flush=True)
    if not images:
        raise UserError(f"{key}={value} contains no readable image; give a folder of images")
    if rotated:
        print(rotation_note(rotated), flush=True)
    return images


def main(argv: list[str]) -> None:
    config = load_config(argv, InferenceConfig)
    questions = [None] if config.question is None else split_pieces("question", config.question)
    results = ResultFolder(config.output_dir or Path(config.experiment.output_dir) / "mmu", config.overwrite)

    from models import ShowoPipeline
    from models.loading import check_sizes
    from models.pipeline_inputs import check_texts

    check_sizes(config.model.showo, config.dataset.preprocessing.resolution, config.model.vq_model.vq_model_name)
    check_texts(filter(None, questions))
    paths = find_images(config, "mmu_image_root", config.mmu_image_root)
    pipeline = ShowoPipeline.from_config(config)
    pipeline.check_questions(questions, config.max_new_tokens, len(paths) if config.mmu_together else 1)
    if results.note:
        print(results.note, flush=True)
    run, output_dir = f"{config.experiment.name}_mmu", results.folder
    with Tracker(config.experiment.project, run, output_dir, config=config, wandb_config=config.wandb) as tracker:
        answer_all(pipeline, config, paths, questions, results, tracker)
    print(f"answers written to {shown(results.lines)}, images: {len(paths)}; overview: {shown(results.write_grid())}")


class Transcript:
    """Prints questions and answers in order although the answers of a batch arrive together.

    Words of the current answer are printed at once; words of later answers wait for their turn.
    """

    def __init__(self, names: list[str], questions: list[str | None]):
        self.pairs = [(image, question) for image in range(len(names)) for question in range(len(questions))]
        self.names, self.questions = names, questions
        self.waiting: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
        self.turn = 0
        self._ask()

    def add(self, image: int, question: int, words: str) -> None:
        """Takes the next words of an answer; "" ends it."""
        self.waiting[image, question].append(words)
        while self.turn < len(self.pairs) and (arrived := self.waiting.pop(self.pairs[self.turn], None)):
            print("".join(arrived), end="", flush=True)
            if arrived[-1] == "":
                print(flush=True)
                self.turn += 1
                self._ask()

    def _ask(self) -> None:
        if self.turn < len(self.pairs):
            image, question = self.pairs[self.turn]
            if question == 0:
                print(shown(self.names[image]), flush=True)
            asked = self.questions[question]
            print("  Caption: " if asked is None else f"  User: {asked}\n  Answer: ", end="", flush=True)


def answer_all(pipeline, config, paths: list[Path], questions, results: ResultFolder, tracker: Tracker) -> None:
    """Asks every question about every image, or about all together, with one random generator; prints, writes and logs
    as answers arrive."""
    generator = pipeline.generator(config.seed)
    groups = [paths] if config.mmu_together else [[path] for path in paths]
    answers = pipeline.iter_answers(
        groups,
        questions,
        batch_size=config.batch_size,
        generator=generator,
        stream=Transcript([", ".join(path.name for path in group) for group in groups], questions).add,
        **{key: config[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p")},
    )
    panel, start = [], 0
    for group in groups:
        replies = [(question, next(answers)[2]) for question in questions]  # ordered by image, then question
        images = [pipeline.view(path) for path in group]
        caption = "".join(a if q is None else f"User: {q}\n Answer : {a}\n" for q, a in replies)
        files, names = [results.save(image) for image in images], [shown(path.name) for path in group]
        if config.mmu_together:
            record = {"files": files, "mode": "mmu", "images": names}
        else:
            record = {"file": files[0], "mode": "mmu", "image": names[0]}
        for question, answer in replies:
            results.add(**record, question=question, answer=answer, seed=generator.initial_seed())
        results.show_row(row_of(images, caption))
        panel.append((images[0] if len(images) == 1 else contact_sheet(images), caption))
        if len(panel) == PANEL_SIZE or group is groups[-1]:
            images, captions = zip(*panel, strict=True)
            tracker.log_images("multimodal understanding", list(images), list(captions), start, save=False)
            panel, start = [], results.count


def row_of(images: list[Image.Image], caption: str) -> list[tuple[Cell, str]]:
    """Cells of the overview: an image with the text below it, or several with the text behind the last."""
    if len(images) == 1:
        return [(images[0], caption)]
    return [*((image, "") for image in images), (caption, "")]


if __name__ == "__main__":
    run_cli(main)
