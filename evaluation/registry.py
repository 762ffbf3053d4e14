"""The benchmarks by name. A new one is a subclass of `Task` in `evaluation/tasks/` and one name here."""

from evaluation.task import Task
from evaluation.tasks.flickr30k import Flickr30k
from evaluation.tasks.gqa import GQA
from evaluation.tasks.mme import MME
from evaluation.tasks.mmmu import MMMU
from evaluation.tasks.pope import POPE
from evaluation.tasks.vqav2 import VQAv2

TASKS: dict[str, type[Task]] = {task.name: task for task in (POPE, MME, Flickr30k, VQAv2, GQA, MMMU)}
