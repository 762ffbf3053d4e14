"""The interface of a benchmark: its items, how the model is asked, how answers are scored, the official submission.

The runner knows nothing but `Task`. A benchmark of questions about images subclasses `QuestionTask`, one of
image generation `GenerationTask`; any other task writes its own `predict`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from common.config import mask_schedule_of
from evaluation.output import Output
from models import SamplingParameters, ShowoPipeline
from models.images import DEFAULT, ImageOptions, load_image

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # as LLaVA's evaluation files have it


@dataclass(frozen=True)
class Item:
    """One thing to ask.

    Args:
        key: unique within the task; the official id where there is one.
        prompt: the question as the model gets it, with the benchmark's suffix.
        open_image: reads the image when its turn comes.
        image: the image's name, for people.
        group: items that are resampled together (most often those of one image); default: each by itself.
        stratum: part of the benchmark whose size is fixed when groups are resampled.
        facts: values of the official record, for scoring.
        expected: the right answer, for people.
    """

    key: str
    prompt: str
    open_image: Callable[[], Image.Image] | None = None
    image: str = ""
    group: str = ""
    stratum: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    expected: str = ""

    @property
    def resampled_with(self) -> str:
        """The group's name, the item's own where it has none."""
        return self.group or self.key


@dataclass(frozen=True)
class Verdict:
    """What the official rule makes of one answer.

    Args:
        parsed: how it reads it.
        score: the higher the better.
        facts: further results, for `Task.counts` and `predictions.jsonl`.
    """

    parsed: str
    score: float
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Paper:
    """The paper's figures at 512 x 512 (spec §16), and known differences of our protocol.

    Args:
        vq, clip_vit: by branch; generation is the same in both, so its figures are in `vq`.
    """

    vq: float
    clip_vit: float | None
    differs: str


class Task(ABC):
    """One benchmark.

    Args:
        config: an `EvaluationConfig`.
        root: the folder with all benchmarks' files.
        folder: of this run, for the task's files.
    """

    name: ClassVar[str]
    headline: ClassVar[str]  # the figure that the paper reports
    unit: ClassVar[str] = "%"
    official_size: ClassVar[int | None] = None  # items in the official files
    paper: ClassVar[Paper | None] = None
    asked_by: ClassVar[tuple[str, ...]] = ()  # settings that select items: runs that differ are not compared
    reads_root: ClassVar[bool] = True  # whether its files are in `data_root`
    reads_images: ClassVar[bool] = True  # whether the model is given `Item.open_image()`
    answers_are_files: ClassVar[bool] = False  # names of images, in whose place people are shown how they were read
    images_expected: ClassVar[str] = "the benchmark's images"  # where they are, for the message when some are missing
    ceilings: ClassVar[tuple[str, ...]] = ()  # columns for figures "x: ceiling" beside each figure "x"

    def __init__(self, config, root: Path, folder: Path) -> None:
        self.config, self.root, self.folder = config, root, folder
        self.output = Output(folder)
        self.image_options = ImageOptions(**config.image)

    def check(self) -> None:  # noqa: B027
        """`UserError` where something is missing that asking and scoring needs besides the benchmark's files."""

    @property
    def has_answers(self) -> bool:
        """Whether the files hold the right answers; without them there is a submission and no score."""
        return True

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that answers depend on, besides checkpoints and items."""
        options = {"exif": self.image_options.exif, "background": self.image_options.background}
        return {f"image.{key}": value for key, value in options.items() if value != getattr(DEFAULT, key)}

    @property
    def is_random(self) -> bool:
        """Whether answers are random. A batch, which has one generator, is then answered completely or not at all."""
        return False

    @abstractmethod
    def read_items(self) -> list[Item]:
        """All items in the files' order.

        Raises:
            UserError: a file or field is missing or wrong.
        """

    def named_images(self, items: Sequence[Item]) -> Iterable[tuple[Path, str]]:
        """(path, which file and field names it) of each image that these items need, see `check_images`."""
        return ()

    def files_of(self, item: Item) -> list[str]:
        """The files in the task's folder that `predict` writes for an item."""
        return []

    @abstractmethod
    def predict(
        self, model: ShowoPipeline, items: Sequence[Item], images: Sequence[Image.Image], generator: torch.Generator
    ) -> list[str]:
        """What the model gives for one batch: texts, or names of files it made."""

    @abstractmethod
    def judge(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        """The official rule for single answers; all at once, since some rules look at the whole corpus."""

    @abstractmethod
    def counts(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, float]:
        """Additive counts of one group; `figures` is made of their sums over groups."""

    @abstractmethod
    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The benchmark's figures from summed counts, elementwise; a count that no group has is 0."""

    def set_figures(self, folder: Path, samples: int, seed: int) -> dict[str, np.ndarray]:
        """Figures of a judged run that are no sums over its items, such as a Fréchet distance.

        Args:
            folder: the run's; with the same seed two runs' values are resampled alike.

        Returns:
            (1 + R,) each: the figure, and its values in R resamples; R may be 0 where that would take too long.
        """
        return {}

    def write_submission(self, items: Sequence[Item], answers: Sequence[str]) -> None:  # noqa: B027
        """Writes the predictions in the benchmark's own form, as files ``submission/…``; by default there is none."""

    def sheet_image(self, item: Item, answer: str) -> Image.Image | None:
        """The image of an item on the contact sheet `best_worst.png`."""
        return item.open_image() if item.open_image else None

    def notes(self) -> list[str]:
        """What a reader of this run's figures must know beside `paper.differs`."""
        return []

    def image(self, path: Path) -> Callable[[], Image.Image]:
        """Reads an image of the benchmark when its turn comes."""
        return partial(load_image, path, self.image_options)


class QuestionTask(Task):
    """A benchmark that asks about images."""

    max_new_tokens: ClassVar[int] = 128  # as in LLaVA-1.5's loader of these benchmarks

    @property
    def is_random(self) -> bool:
        return self.config.top_k != 1

    @property
    def settings(self) -> dict[str, Any]:
        config = self.config
        found = {"max_new_tokens": config.max_new_tokens or self.max_new_tokens, "top_k": config.top_k}
        sampled = ("top_p", "temperature", "seed", "batch_size") if self.is_random else ()
        return super().settings | found | {name: config[name] for name in sampled}

    def predict(self, model, items, images, generator) -> list[str]:
        config, questions = self.config, [item.prompt for item in items]
        max_new_tokens = config.max_new_tokens or self.max_new_tokens
        model.check_questions(questions, max_new_tokens)
        return model.answer_each(
            images,
            questions,
            max_new_tokens=max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=generator,
        )


class GenerationTask(Task):
    """A benchmark that generates an image for each prompt, into its folder; an answer is an image's file name."""

    reads_images, answers_are_files = False, True

    @property
    def is_random(self) -> bool:
        return True

    @property
    def settings(self) -> dict[str, Any]:
        names = ("guidance_scale", "generation_timesteps", "generation_temperature", "seed", "batch_size")
        name, parameters = mask_schedule_of(self.config)
        schedule = " ".join([name, *(f"{key}={value}" for key, value in parameters.items())])
        asked = {key: self.config[key] for key in names} | {"mask_schedule": schedule}
        return super().settings | asked | self._options

    @property
    def _options(self) -> dict[str, Any]:
        """The `sampling.*` keys that differ from their defaults."""
        default = SamplingParameters()
        return {f"sampling.{k}": value for k, value in self.config.sampling.items() if value != getattr(default, k)}

    def notes(self) -> list[str]:
        parts = [f"guidance {self.config.guidance_scale:g}", f"{self.config.generation_timesteps} steps"]
        return [", ".join([*parts, *(f"{key}={value}" for key, value in self._options.items())])]

    @abstractmethod
    def file_of(self, item: Item) -> str:
        """File of an item's image, relative to the task's folder."""

    def files_of(self, item) -> list[str]:
        return [self.file_of(item)]

    @property
    def generation(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's generating methods."""
        config = self.config
        return {
            "guidance_scale": config.guidance_scale,
            "timesteps": config.generation_timesteps,
            "temperature": config.generation_temperature,
            "sampling": SamplingParameters(**config.sampling),
        }

    def predict(self, model, items, images, generator) -> list[str]:
        generated = model.text_to_image([item.prompt for item in items], generator=generator, **self.generation)
        return [self.output.save(self.file_of(item), image) for item, image in zip(items, generated, strict=True)]

    def sheet_image(self, item, answer) -> Image.Image:
        return load_image(self.folder / answer)

    def generated(self, answers: Sequence[str]) -> list[Image.Image]:
        return [load_image(self.folder / answer) for answer in answers]


def ratio(count: np.ndarray, total: np.ndarray) -> np.ndarray:
    """count / total, 0 where there is nothing."""
    count, total = np.asarray(count, float), np.asarray(total, float)
    return np.divide(count, total, out=np.zeros(np.broadcast(count, total).shape), where=total != 0)


def right_by(kinds: Sequence[str], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """How many items of each kind there are, and the sum of their scores (`{kind} right`)."""
    found: dict[str, float] = {}
    for kind, verdict in zip(kinds, verdicts, strict=True):
        found[kind] = found.get(kind, 0) + 1
        found[f"{kind} right"] = found.get(f"{kind} right", 0) + verdict.score
    return found


def accuracies(sums: Mapping[str, np.ndarray], kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Figures in percent from the sums of `right_by`: over all items, and of each kind."""
    right, total = (sum(sums[f"{kind}{end}"] for kind in kinds) for end in (" right", ""))
    return {"accuracy": 100 * ratio(right, total)} | {k: 100 * ratio(sums[f"{k} right"], sums[k]) for k in kinds}


def cell(text: str) -> str:
    """An answer on one line, without tabs."""
    return " ".join(text.split())
