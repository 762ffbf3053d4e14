"""Makes preference pairs with the model itself, for training/train.py task=preference (docs/alignment.md).

    python3 tools/make_pairs.py config=configs/showo_tiny_demo.yaml prompts=data/scenes/captions/train-000000.tar \\
        limit=500 scorer=examples.scenes.reward:claims output_dir=outputs/pairs

Of images: the model samples some of each prompt, a scorer says how good each is, and the best and the worst are a pair.
The scorer is a function or an address, as a policy's reward is; ``questions``: the model answers each record's
`questions`, ``[{"question", "answer"}, …]``, about its own image, and the share of expected answers is the score; or a
jsonl file of images that were made and scored before, ``{"file", "prompt", "score"}``.

Of answers: the model samples some answers to each question of `questions=FILE`, ``{"image", "question", "answer"}`` a
line, and one that is as expected and one that is not are a pair.

The pairs are the lines of `results.jsonl`; those of an earlier run stay.
"""

import math
import os
import string
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import common  # noqa: F401  Ctrl-C is one word from here on

from common.config import load_config
from common.errors import UserError, run_cli
from common.files import check_file, field, json_records
from common.inputs import required_path
from common.progress import progress
from common.results import ResultFolder
from common.schema import TOKENS, WEIGHT, ResultsConfig
from common.settings import setting

QUESTIONS = "questions"  # the scorer that is the model itself


@dataclass
class MakePairsConfig(ResultsConfig):
    """Settings of tools/make_pairs.py."""

    PURPOSE = "tools/make_pairs.py"

    prompts: Any = setting(None, "prompts of pairs of images: shards, jsonl, json or txt", is_data=True)
    questions: str | None = setting(None, "jsonl of questions with images and answers, for pairs of answers")
    scorer: str | None = setting(None, "module:function, an address, questions, or a jsonl file of scored images")
    scorer_timeout: float = setting(60.0, "seconds that an address has to answer", above=0, high=10**5)
    scorer_retries: int = setting(3, "further attempts at an address that does not", low=0, high=100)
    samples: int = setting(10, "images of each prompt, or answers to each question", low=2, high=TOKENS)
    limit: int | None = setting(None, "prompts or questions that are read; null: all", low=1, high=10**9)
    min_score: float = setting(0.6, "the best image of a pair has a higher score", low=-(10**6), high=10**6)
    min_gap: float = setting(0.0, "its score is higher than the worst one's by more than this", **WEIGHT)
    answer_temperature: float = setting(1.0, "of the sampled answers", above=0, high=100)


def pairs_of_images(config, pipeline, results: ResultFolder, score, counters) -> Iterator[str]:
    """Samples, scores and writes; yields what became of each prompt."""
    from models import SamplingParameters
    from models.pipeline_inputs import image_seed
    from training.data.prompts import iter_prompts

    settings = {
        "guidance_scale": config.guidance_scale,
        "timesteps": config.generation_timesteps,
        "temperature": config.generation_temperature,
        "batch_size": config.batch_size,
        "sampling": SamplingParameters(**config.sampling),
    }
    seed = pipeline.generator(config.seed).initial_seed()
    for number, sample in enumerate(islice(iter_prompts("prompts", config.prompts, counters), config.limit)):
        seeds = [image_seed(seed, number * config.samples + place) for place in range(config.samples)]
        text, records = sample["text"], [sample["record"]] * config.samples
        images = pipeline.text_to_image([text], num_images_per_prompt=config.samples, generator=seeds, **settings)
        scores = score([text] * len(images), images, records)
        if found := best_and_worst(scores, config):
            names = [results.save(images[place]) for place in found]
            add_images(results, text, names, [scores[place] for place in found])
            results.show_row([(images[place], f"{scores[place]:.2f}  {text}") for place in found])
        yield "pair" if found else "alike"


def best_and_worst(scores: list[float], config) -> tuple[int, int] | None:
    """The places of the first best and the first worst; None if they are no pair."""
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] <= config.min_score or scores[best] - scores[worst] <= config.min_gap:
        return None
    return best, worst


def add_images(results: ResultFolder, prompt: str, names: list[str], scores: list[float]) -> None:
    pair = {"kind": "image", "caption": prompt, "chosen": names[0], "rejected": names[1]}
    results.add(files=names, mode="pairs", **pair, scores=scores)


def pairs_of_scored(config, results: ResultFolder) -> Iterator[str]:
    """Pairs of the images of a file, which stay where they are."""
    path, by_prompt = required_path("scorer", config.scorer), {}
    for number, record in json_records(path, f"scorer={config.scorer}"):
        where = f"scorer={config.scorer}: line {number}"
        image = path.parent / field(record, "file", str, where)
        score = float(field(record, "score", float, where))
        if not math.isfinite(score):
            raise UserError(f"{where}: field 'score' is {score}, expected a finite number")
        one = score, check_file(image, f"{where}: image {image}")
        by_prompt.setdefault(field(record, "prompt", str, where), []).append(one)
    for prompt, scored in islice(by_prompt.items(), config.limit):
        scores = [score for score, _ in scored]
        if found := best_and_worst(scores, config):
            names = [os.path.relpath(scored[place][1], results.folder) for place in found]
            add_images(results, prompt, names, [scores[place] for place in found])
        yield "pair" if found else "alike"


def self_questions(pipeline):
    """The score of images by the model's own answers, as a function of prompts, images and records."""

    def score(prompts, images, records) -> list[float]:
        scores = []
        for prompt, image, record in zip(prompts, images, records, strict=True):
            where = f"scorer=questions: the record of {prompt!r:.60}"
            asked = field(record, "questions", list, where)
            questions, expected = ([field(one, key, str, where) for one in asked] for key in ("question", "answer"))
            if not asked:
                raise UserError(f"{where} has no questions; give some, or another scorer")
            answers = pipeline.answer_each([image] * len(asked), questions)
            scores.append(sum(map(is_answer, answers, expected)) / len(asked))
        return scores

    return score


def is_answer(answer: str, expected: str) -> bool:
    """Whether they are the same words, but for case, outer punctuation and blanks."""
    first, second = (text.lower().strip(string.punctuation + string.whitespace) for text in (answer, expected))
    return first.split() == second.split()


def pairs_of_answers(config, pipeline, results: ResultFolder) -> Iterator[str]:
    """Samples answers and writes; yields what became of each question."""
    path, generator = required_path("questions", config.questions), pipeline.generator(config.seed)
    settings = {
        "temperature": config.answer_temperature,
        "top_k": None,
        "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
    }
    for number, record in islice(json_records(path, f"questions={config.questions}"), config.limit):
        where = f"questions={config.questions}: line {number}"
        name, question, expected = (field(record, key, str, where) for key in ("image", "question", "answer"))
        image = pipeline.open(path.parent / name)
        images, questions = [image] * config.samples, [question] * config.samples
        answers = pipeline.answer_each(images, questions, generator=generator, **settings)
        right = [answer for answer in answers if is_answer(answer, expected)]
        wrong = [answer for answer in answers if answer and not is_answer(answer, expected)]
        if right and wrong:
            asked = {"kind": "answer", "image": os.path.relpath(path.parent / name, results.folder)}
            asked |= {"question": question, "chosen": right[0], "rejected": wrong[0]}
            results.add(files=[], mode="pairs", **asked)
        yield "pair" if right and wrong else "alike"


def main(argv: list[str]) -> None:
    config = load_config(argv, MakePairsConfig)
    is_file = (config.scorer or "").endswith(".jsonl")
    if bool(config.prompts) != bool(config.scorer) and not is_file:
        missing = "scorer" if config.prompts else "prompts"
        raise UserError(f"{missing} is not given; pairs of images need both, scorer and prompts")
    if is_file and config.prompts:
        raise UserError("prompts has no effect with a file of scores, which has its own; leave it out")
    if not config.scorer and not config.questions:
        raise UserError("nothing to make pairs of; give prompts and a scorer, or questions=FILE")
    results = ResultFolder(config.output_dir or Path(config.experiment.output_dir) / "pairs", config.overwrite)
    from training.data.paths import expand_paths
    from training.data.prompts import FORMATS
    from training.data.sources import SkipCounters
    from training.rewards import open_reward

    counters, score, pipeline = SkipCounters(), None, None
    if config.prompts and not is_file and config.scorer != QUESTIONS:
        score = open_reward("scorer", config.scorer, config.scorer_timeout, config.scorer_retries)
    if config.prompts:  # files are looked for before any weights are read
        expand_paths("prompts", config.prompts, FORMATS)
    if config.questions:
        required_path("questions", config.questions)
    if config.questions or not is_file:
        from models import ShowoPipeline

        pipeline = ShowoPipeline.from_config(config)
    made = []
    if is_file:
        made.append(pairs_of_scored(config, results))
    elif config.prompts:
        made.append(pairs_of_images(config, pipeline, results, score or self_questions(pipeline), counters))
    if config.questions:
        made.append(pairs_of_answers(config, pipeline, results))
    counts = {"pair": 0, "alike": 0}
    with closing(progress(unit=" prompts")) as bar:
        for outcome in (outcome for stream in made for outcome in stream):
            counts[outcome] += 1
            bar.update()
    counters.print()
    if results.rows:
        results.write_grid()
    print(f"{results.lines}: {counts['pair']} pairs; {counts['alike']} prompts or questions gave none")


if __name__ == "__main__":
    run_cli(main)
