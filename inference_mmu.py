"""Answers questions about images (spec §8, §13).

    python3 inference_mmu.py config=configs/showo_tiny_demo.yaml mmu_image_root=mmu_validation/emoji \\
        question='What is this?'
    python3 inference_mmu.py config=configs/showo_demo_w_clip_vit_512x512.yaml max_new_tokens=100 \\
        mmu_image_root=./mmu_validation question='Please describe this image in detail. *** Where is it?'

Every question is asked about every image of the folder `mmu_image_root`, which may also be a single file;
`question=null` asks for the bare caption, which models trained on captions without an instruction give. Answers are
printed while they are generated. `output_dir` (default: `{experiment.output_dir}/mmu`) gets `results.jsonl`, the images
as the model sees them (`0000.png` …) and `grid.png`; wandb gets the panel `multimodal understanding`.
"""

import mimetypes
from collections import Counter, defaultdict
from pathlib import Path

from common.config import InferenceConfig, load_config
from common.errors import UserError, run_cli, shown
from common.files import visible_in
from common.inputs import required_path, rotation_note, split_pieces
from common.results import ResultFolder, copies_in
from common.tracking import Tracker

PANEL_SIZE = 100  # images logged to wandb at once
MAX_NAMED = 10  # unreadable images that have a line each


def find_images(config) -> list[Path]:
    """The images of `mmu_image_root`, sorted by name, without what earlier runs wrote for people to look at.

    What is passed over is told on the terminal: images that cannot be read by name, other files by their number.

    Raises:
        UserError: there is no usable image.
    """
    from models.images import ImageOptions, has_rotation, load_image, resized_size

    options, resolution = ImageOptions(**config.image), config.dataset.preprocessing.resolution
    root = required_path("mmu_image_root", config.mmu_image_root)
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
        raise UserError(f"mmu_image_root={config.mmu_image_root} contains no readable image; give a folder of images")
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
    paths = find_images(config)
    pipeline = ShowoPipeline.from_config(config)
    pipeline.check_questions(questions, config.max_new_tokens)
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

    def __init__(self, paths: list[Path], questions: list[str | None]):
        self.pairs = [(image, question) for image in range(len(paths)) for question in range(len(questions))]
        self.paths, self.questions = paths, questions
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
                print(shown(self.paths[image].name), flush=True)
            asked = self.questions[question]
            print("  Caption: " if asked is None else f"  User: {asked}\n  Answer: ", end="", flush=True)


def answer_all(pipeline, config, paths: list[Path], questions, results: ResultFolder, tracker: Tracker) -> None:
    """Asks every question about every image with one random generator; prints, writes and logs as answers arrive."""
    generator = pipeline.generator(config.seed)
    answers = pipeline.iter_answers(
        paths,
        questions,
        batch_size=config.batch_size,
        generator=generator,
        stream=Transcript(paths, questions).add,
        **{key: config[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p")},
    )
    panel, start = [], 0
    for path in paths:
        replies = [(question, next(answers)[2]) for question in questions]  # ordered by image, then question
        image = pipeline.view(path)
        caption = "".join(a if q is None else f"User: {q}\n Answer : {a}\n" for q, a in replies)
        record = {"file": results.save(image), "mode": "mmu", "image": path.name}
        for question, answer in replies:
            results.add(**record, question=question, answer=answer, seed=generator.initial_seed())
        results.show(image, caption)
        panel.append((image, caption))
        if len(panel) == PANEL_SIZE or path is paths[-1]:
            images, captions = zip(*panel, strict=True)
            tracker.log_images("multimodal understanding", list(images), list(captions), start, save=False)
            panel, start = [], results.count


if __name__ == "__main__":
    run_cli(main)
