"""Asks the model for the answers that are missing, in one or several processes.

Batches are the same whatever number of processes there is and wherever a run was killed: they are cut from the items'
order, dealt out in turn, and sampled from a generator of their own. So the answers are the same too.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
from PIL import Image

from common.errors import UserError
from common.inputs import rotation_note
from common.launch import launched_processes
from common.progress import progress
from evaluation.answers import AnswerStore, model_settings
from evaluation.official_files import check_images
from evaluation.output import COUNTS, PREDICTIONS, SHEET
from evaluation.task import Item, Task
from models import ShowoPipeline
from models.images import has_rotation

READERS = 4  # threads that decode images
TIMEOUT = timedelta(days=7)  # for the slowest process
Batch = tuple[int, list[Item], list[Item]]  # its number within the task, its items, and those without an answer


@dataclass(frozen=True)
class Processes:
    """The processes as `accelerate launch` or `torchrun` starts them; one process needs neither."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


@contextmanager
def joined_processes(config) -> Iterator[Processes]:
    """The processes that were launched; gives each its own GPU.

    They share nothing but the end of each task: answers travel through files, so gloo serves on GPUs as well.

    Raises:
        UserError: several were launched, but each runs alone.
    """
    count = launched_processes()
    if count == 1:
        yield Processes()
        return
    if config.device in (None, "cuda") and torch.cuda.is_available():
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Processes(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()


@dataclass
class Run:
    """One task of one evaluation, with its items.

    Args:
        size: items in the files, of which `items` may be a part.
        model: the settings that all tasks share (`model_settings`).
    """

    task: Task
    items: list[Item]
    size: int
    store: AnswerStore
    model: dict

    @classmethod
    def of(cls, task: Task, settings: dict) -> "Run":
        """Reads the task's files; `UserError` if they, or earlier answers, are unusable."""
        task.check()
        items = task.read_items()
        asked = thin(items, task.config.max_items)
        check_images(task.named_images(asked), task.images_expected)
        store = AnswerStore(task.output, settings | task.settings)
        store.check()
        return cls(task, asked, len(items), store, settings)

    def missing(self) -> list[Item]:
        """The items that have no answer yet, or whose files are gone."""
        done, folder = self.store.read(self.items), self.task.folder
        kept = (all((folder / name).is_file() for name in self.task.files_of(item)) for item in self.items)
        return [item for item, is_kept in zip(self.items, kept, strict=True) if item.key not in done or not is_kept]

    def complete(self) -> list[str]:
        """All answers in the items' order, once all processes are through."""
        answers = self.store.read(self.items)
        if missing := sum(item.key not in answers for item in self.items):
            raise UserError(f"{self.store.folder}: {missing} answers are missing; start the same command again")
        return [answers[item.key] for item in self.items]


def thin(items: Sequence[Item], max_items: int | None) -> list[Item]:
    """At most `max_items`, in whole groups that lie evenly over the files; at least one group."""
    if max_items is None or len(items) <= max_items:
        return list(items)
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.resampled_with, []).append(item)
    listed = list(groups.values())
    for wanted in range(min(len(listed), max_items), 0, -1):
        chosen = [listed[number * len(listed) // wanted] for number in range(wanted)]
        if sum(map(len, chosen)) <= max_items:
            break
    kept = {item.key for group in chosen for item in group}
    return [item for item in items if item.key in kept]


def ask_all(config, tasks: Sequence[Task], processes: Processes) -> list[Run]:
    """Asks everything that has no answer yet; all files are read before any weights are.

    Raises:
        UserError: files, earlier answers or checkpoints are unusable.
    """
    settings = model_settings(config)
    runs = [Run.of(task, settings) for task in tasks]
    model = cache(lambda: ShowoPipeline.from_config(config))
    todo = [run.missing() for run in runs]
    for run, missing in zip(runs, todo, strict=True):
        run.task.output.check(
            [PREDICTIONS, COUNTS, SHEET, *(file for item in missing for file in run.task.files_of(item))]
        )
    processes.wait()  # nobody writes before all have read
    for run, missing in zip(runs, todo, strict=True):
        if processes.is_main:
            run.store.begin()
            print(f"{run.task.name}: {len(run.items)} items, {len(missing)} to ask", flush=True)
        processes.wait()
        ask(run, missing, model, processes)
    processes.wait()
    return runs


def ask(run: Run, missing: Sequence[Item], model: Callable[[], ShowoPipeline], processes: Processes) -> None:
    """This process's share of one task."""
    task = run.task
    batches = list(share(run.items, missing, task.config.batch_size, processes))
    if not batches:
        return
    pipeline, seed = model(), task.config.seed or 0
    if not task.is_random:
        batches = [(number, wanted, wanted) for number, _, wanted in batches]
    read = read_images([batch for _, batch, _ in batches]) if task.reads_images else ([] for _ in batches)
    total, rotated = sum(len(wanted) for _, _, wanted in batches), set()
    with progress(total=total, desc=task.name, disable=not processes.is_main) as bar:
        for (number, batch, wanted), images in zip(batches, read, strict=True):
            rotated |= {item.image for item, image in zip(batch, images, strict=False) if has_rotation(image)}
            generator = torch.Generator(pipeline.device).manual_seed((seed * 1_000_003 + number) % 2**63)
            answers = task.predict(pipeline, batch, images, generator)
            by_key = {item.key: answer for item, answer in zip(batch, answers, strict=True)}
            run.store.add(processes.rank, wanted, [by_key[item.key] for item in wanted])
            bar.update(len(wanted))
    if note := rotation_note(len(rotated)):
        print(f"{task.name}: {note}", flush=True)


def share(items: Sequence[Item], missing: Sequence[Item], size: int, processes: Processes) -> Iterator[Batch]:
    """The batches of this process of which something is missing."""
    keys = {item.key for item in missing}
    for number, start in enumerate(range(0, len(items), size)):
        batch = list(items[start : start + size])
        wanted = [item for item in batch if item.key in keys]
        if wanted and number % processes.count == processes.rank:
            yield number, batch, wanted


def read_images(batches: Sequence[Sequence[Item]]) -> Iterator[list[Image.Image]]:
    """The images of each batch, the next batch's prefetched; one that recurs within a batch is read once."""
    with ThreadPoolExecutor(READERS) as readers:

        def start(batch: Sequence[Item]) -> list:
            items = {item.image: item for item in batch}
            reading = {image: readers.submit(item.open_image) for image, item in items.items()}
            return [reading[item.image] for item in batch]

        coming = start(batches[0])
        for index in range(len(batches)):
            now = coming
            coming = start(batches[index + 1]) if index + 1 < len(batches) else []
            yield [image.result() for image in now]
