"""The benchmarks by name. A new one is a subclass of `Task` in `evaluation/tasks/` and one name here."""

from evaluation.task import Task
from evaluation.tasks.coco import COCO
from evaluation.tasks.emoji_drawing import EmojiDrawing
from evaluation.tasks.emoji_questions import EmojiNaming, EmojiStyle, EmojiYesNo
from evaluation.tasks.flickr30k import Flickr30k
from evaluation.tasks.geneval import GenEval
from evaluation.tasks.gqa import GQA
from evaluation.tasks.mme import MME
from evaluation.tasks.mmmu import MMMU
from evaluation.tasks.pope import POPE
from evaluation.tasks.reconstruction import Reconstruction
from evaluation.tasks.vqav2 import VQAv2

UNDERSTANDING = (POPE, MME, Flickr30k, VQAv2, GQA, MMMU)
GENERATION = (GenEval, COCO, Reconstruction)
EMOJI = (EmojiDrawing, EmojiNaming, EmojiYesNo, EmojiStyle)

TASKS: dict[str, type[Task]] = {task.name: task for task in (*UNDERSTANDING, *GENERATION, *EMOJI)}
GROUPS: dict[str, tuple[str, ...]] = {"emoji": tuple(task.name for task in EMOJI)}  # several by one name
