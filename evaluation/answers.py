"""Answers on disk as they are given, so that a killed run resumes; and what answers depend on, so that none mix.

`{folder}/answers-{rank:03d}.jsonl` gets a line per answer, a batch at a time. Whatever number of processes wrote them,
all files are read when a run starts.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, shown
from common.files import append_lines, disk_errors, field, json_lines, read_json, visible_in
from evaluation.output import Output
from evaluation.task import Item
from models.backbones import DEFAULT_LLM
from models.loading import choose_device, choose_dtype, find_adapter, find_folder

SETTINGS = "settings.json"
SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".txt")  # of a checkpoint's files
NUM_BLOCKS, BLOCK = 16, 1 << 16  # of a large file, this much is read


class AnswerStore:
    """The answers of one task in one output folder.

    Args:
        output: created if it does not exist.
        settings: everything that an answer depends on besides its item; it is written beside the answers.
    """

    def __init__(self, output: Output, settings: dict) -> None:
        self.output, self.folder, self.settings = output, output.folder, settings

    def check(self) -> None:
        """Refuses a folder with answers that were given under other settings, or that are somebody else's.

        Raises:
            UserError: names the setting or the file.
        """
        self.output.check([SETTINGS, *(file.name for file in self._files())])
        file = self.folder / SETTINGS
        if not file.exists():
            return
        before = read_json(file)
        for key in dict.fromkeys([*self.settings, *before]):
            if before.get(key) != self.settings.get(key):
                was, now = (settings.get(key, "not set") for settings in (before, self.settings))
                raise UserError(
                    f"{self.folder} holds answers given with {key}={was}, now it is {now}; "
                    "give another output_dir or remove that folder"
                )

    def begin(self) -> None:
        """Writes the settings. The main process calls it before any answer is added."""
        self.output.write_json(SETTINGS, self.settings)

    def read(self, items: Sequence[Item]) -> dict[str, str]:
        """Answers that are there, by key; lines that were cut off, or hold none, do not count.

        Raises:
            UserError: an item was asked with another question than now.
        """
        prompts = {item.key: item.prompt for item in items}
        answers = {}
        for file in self._files():
            for _, _, record in json_lines(file):
                try:
                    key, prompt, answer = (field(record, name, str, "") for name in ("key", "prompt", "answer"))
                except UserError:
                    continue
                if prompts.get(key, prompt) != prompt:
                    raise UserError(
                        f"{file} holds an answer to {prompt!r} for item {key}, which now asks {prompts[key]!r}; "
                        f"give another output_dir or remove {self.folder}"
                    )
                answers[key] = answer
        return answers

    def add(self, rank: int, items: Sequence[Item], answers: Sequence[str]) -> None:
        """Appends a batch; it is on the disk when this returns."""
        path = self.output.note(f"answers-{rank:03d}.jsonl")
        records = (
            {"key": item.key, "image": item.image, "prompt": item.prompt, "answer": answer}
            for item, answer in zip(items, answers, strict=True)
        )
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with disk_errors(path):
            append_lines(path, text, flush=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("answers-*.jsonl"))


def model_settings(config) -> dict[str, Any]:
    """Checkpoints by name and fingerprint, resolution and precision.

    Raises:
        UserError: a checkpoint does not exist.
    """
    showo, vq = config.model.showo, config.model.vq_model
    names = {"checkpoint": showo.pretrained_model_path, "image_tokenizer": vq.vq_model_name}
    names["llm"] = showo.llm_model_path or DEFAULT_LLM
    if showo.w_clip_vit:
        names["clip"] = config.model.clip_vit_name
    folders = {part: find_folder(name) for part, name in names.items()}
    parts = {part: f"{shown(Path(name).name)} ({fingerprint(folders[part])})" for part, name in names.items()}
    if vq.pretrained_model_path:
        parts["image_tokenizer"] += f" with {Path(vq.pretrained_model_path).name}"
    if config.adapter:
        parts["adapter"] = f"{shown(Path(config.adapter).name)} ({fingerprint(find_adapter(config.adapter))})"
    if config.quantization:
        parts["quantization"] = config.quantization
    dtype = choose_dtype(config.dtype, choose_device(config.device))
    resolution = config.dataset.preprocessing.resolution
    return parts | {"dtype": str(dtype).removeprefix("torch."), "resolution": resolution}


def fingerprint(folder: Path) -> str:
    """Twelve digits from names, sizes and samples of the content of a checkpoint's files."""
    digest = hashlib.sha256()
    for path in (path for path in visible_in(folder) if path.suffix in SUFFIXES):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for number in range(NUM_BLOCKS):
                file.seek(max(0, size - BLOCK) * number // (NUM_BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:12]
