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

from collections import defaultdict
from pathlib import Path

from common.config import InferenceConfig, load_config
from common.errors import UserError, run_cli
from common.inputs import required_path, split_pieces
from common.results import ResultFolder, check_output_dir
from common.tracking import Tracker

PANEL_SIZE = 100  # images logged to wandb at once


def find_images(value: str | None, resolution: int) -> list[Path]:
    """The images of `mmu_image_root`, sorted by name; unusable files are skipped and named on the terminal.

    Raises:
        UserError: there is no usable image.
    """
    from models.images import load_image, resized_size

    root = required_path("mmu_image_root", value)
    if root.is_file():
        resized_size(load_image(root).size, resolution, root)
        return [root]
    images = []
    for path in sorted(path for path in root.iterdir() if path.is_file()):
        try:
            resized_size(load_image(path).size, resolution, path)
            images.append(path)
        except UserError as error:
            print(f"skipped: {error}", flush=True)
    if not images:
        raise UserError(f"mmu_image_root={value} contains no readable image; give a folder of images")
    return images


def main(argv: list[str]) -> None:
    config = load_config(argv, InferenceConfig)
    questions = [None] if config.question is None else split_pieces("question", config.question)
    output_dir = check_output_dir(config.output_dir or Path(config.experiment.output_dir) / "mmu")

    from models import ShowoPipeline
    from models.loading import check_sizes
    from models.pipeline_showo import check_texts

    check_sizes(config.model.showo, config.dataset.preprocessing.resolution, config.model.vq_model.vq_model_name)
    check_texts(questions)
    paths = find_images(config.mmu_image_root, config.dataset.preprocessing.resolution)
    pipeline = ShowoPipeline.from_config(config)
    results = ResultFolder(output_dir)
    run = f"{config.experiment.name}_mmu"
    with Tracker(config.experiment.project, run, output_dir, config=config, wandb_config=config.wandb) as tracker:
        answer_all(pipeline, config, paths, questions, results, tracker)
    print(f"answers written to {results.lines}, images: {len(paths)}; overview: {results.write_grid()}")


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
                print(self.paths[image].name, flush=True)
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
        callback=Transcript(paths, questions).add,
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
