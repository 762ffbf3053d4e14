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

from pathlib import Path

from common.config import InferenceConfig, load_config
from common.errors import UserError, run_cli
from common.inputs import required_path, split_pieces
from common.results import ResultFolder, check_output_dir
from common.tracking import Tracker

PANEL_SIZE = 100  # pictures reported to wandb at once


def find_pictures(value: str | None) -> list[Path]:
    """The pictures of `mmu_image_root` in the order of their names; what is none is skipped with a line.

    Raises:
        UserError: there is none.
    """
    from models.images import load_image

    root = required_path("mmu_image_root", value)
    if root.is_file():
        load_image(root)
        return [root]
    pictures = []
    for path in sorted(path for path in root.iterdir() if path.is_file()):
        try:
            load_image(path)
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

    check_config(config)
    paths = find_pictures(config.mmu_image_root)
    pipeline = ShowoPipeline.from_config(config)
    results = ResultFolder(output_dir)
    run = f"{config.experiment.name}_mmu"
    with Tracker(config.experiment.project, run, output_dir, config=config, wandb_config=config.wandb) as tracker:
        answer_all(pipeline, config, paths, questions, results, tracker)
    print(f"answers about {len(paths)} pictures in {results.lines}; all of them: {results.write_grid()}")


def answer_all(pipeline, config, paths: list[Path], questions, results: ResultFolder, tracker: Tracker) -> None:
    """Ask everything with one generator; print, write and report as answers come."""
    generator = pipeline.generator(config.seed)
    streaming = config.batch_size == 1
    answers = pipeline.iter_answers(
        paths,
        questions,
        batch_size=config.batch_size,
        generator=generator,
        callback=(lambda image, question, words: print(words, end="", flush=True)) if streaming else None,
        **{key: config[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p")},
    )
    panel, start = [], 0
    for path in paths:
        print(path.name, flush=True)
        replies = []
        for question in questions:
            print(f"  User: {question}\n  Answer: ", end="", flush=True)
            _, _, answer = next(answers)  # one picture after the other, question by question
            print("" if streaming else answer, flush=True)
            replies.append((question, answer))
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
