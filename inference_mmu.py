"""Questions about pictures (SPEC §8, §13).

    python3 inference_mmu.py config=configs/showo_tiny_demo.yaml mmu_image_root=mmu_validation/emoji \
        question='What is this?'
    python3 inference_mmu.py config=configs/showo_demo_w_clip_vit_512x512.yaml max_new_tokens=100 \
        mmu_image_root=./mmu_validation question='Please describe this image in detail. *** Where is it?'

Every question is asked about every picture of the folder (or about the one file) `mmu_image_root`. Answers go to the
terminal as they are produced, to `{output_dir}/results.jsonl` with the pictures as the model sees them (`0000.png` …),
to `grid.png`, and to the panel `multimodal understanding` in wandb. Without `output_dir` the folder is
`{experiment.output_dir}/mmu`.
"""

from collections import defaultdict
from pathlib import Path

from common.config import InferenceConfig, load_config
from common.errors import UserError, run_cli
from common.inputs import required_path, split_pieces
from common.results import ResultFolder, check_output_dir
from common.tracking import Tracker

PANEL_SIZE = 100  # pictures reported to wandb at once


def find_pictures(value: str | None, resolution: int) -> list[Path]:
    """The pictures of `mmu_image_root` in the order of their names; what cannot be shown is skipped with a line.

    Raises:
        UserError: there is none.
    """
    from models.images import load_image, resized_size

    root = required_path("mmu_image_root", value)
    if root.is_file():
        resized_size(load_image(root).size, resolution, root)
        return [root]
    pictures = []
    for path in sorted(path for path in root.iterdir() if path.is_file()):
        try:
            resized_size(load_image(path).size, resolution, path)
            pictures.append(path)
        except UserError as error:
            print(f"skipped: {error}", flush=True)
    if not pictures:
        raise UserError(f"mmu_image_root={value} holds no readable picture; give a folder of pictures")
    return pictures


def main(argv: list[str]) -> None:
    config = load_config(argv, InferenceConfig)
    questions = split_pieces("question", config.question)
    output_dir = check_output_dir(config.output_dir or Path(config.experiment.output_dir) / "mmu")

    from models import ShowoPipeline
    from models.pipeline_loading import check_config
    from models.pipeline_showo import check_texts

    check_config(config)
    check_texts(questions)
    paths = find_pictures(config.mmu_image_root, config.dataset.preprocessing.resolution)
    pipeline = ShowoPipeline.from_config(config)
    results = ResultFolder(output_dir)
    run = f"{config.experiment.name}_mmu"
    with Tracker(config.experiment.project, run, output_dir, config=config, wandb_config=config.wandb) as tracker:
        answer_all(pipeline, config, paths, questions, results, tracker)
    print(f"answers about {len(paths)} pictures in {results.lines}; all of them: {results.write_grid()}")


class Transcript:
    """Prints the conversation about pictures in its order: of the answer whose turn it is, every word as it comes, of
    later ones what has come when their turn comes."""

    def __init__(self, paths: list[Path], questions: list[str]):
        self.pairs = [(image, question) for image in range(len(paths)) for question in range(len(questions))]
        self.paths, self.questions = paths, questions
        self.waiting: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
        self.turn = 0
        self._ask()

    def add(self, image: int, question: int, words: str) -> None:
        """The next words of an answer; "" ends it."""
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
            print(f"  User: {self.questions[question]}\n  Answer: ", end="", flush=True)


def answer_all(pipeline, config, paths: list[Path], questions, results: ResultFolder, tracker: Tracker) -> None:
    """Ask everything with one generator; print, write and report as answers come."""
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
        replies = [(question, next(answers)[2]) for question in questions]  # in the order of pictures, then questions
        picture, caption = pipeline.view(path), "".join(f"User: {q}\n Answer : {a}\n" for q, a in replies)
        record = {"file": results.save(picture), "mode": "mmu", "image": path.name}
        for question, answer in replies:
            results.add(**record, question=question, answer=answer, seed=generator.initial_seed())
        results.show(picture, caption)
        panel.append((picture, caption))
        if len(panel) == PANEL_SIZE or path is paths[-1]:
            images, captions = zip(*panel, strict=True)
            tracker.log_images("multimodal understanding", list(images), list(captions), start, save=False)
            panel, start = [], results.count


if __name__ == "__main__":
    run_cli(main)
