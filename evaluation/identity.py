"""What the answers of a run depend on besides the questions, so that answers of two models never mix."""

import hashlib
from pathlib import Path
from typing import Any

from models.backbones import DEFAULT_LLM
from models.loading import choose_device, choose_dtype, find_folder

SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".txt")
NUM_BLOCKS, BLOCK = 16, 1 << 16  # of a large file, this much is read


def model_settings(config) -> dict[str, Any]:
    """Checkpoints by name and fingerprint, resolution and precision.

    Raises:
        UserError: a checkpoint is not there.
    """
    showo = config.model.showo
    names = {"checkpoint": showo.pretrained_model_path, "image_tokenizer": config.model.vq_model.vq_model_name}
    names |= {"llm": showo.llm_model_path or DEFAULT_LLM} | (
        {"clip": config.model.clip_vit_name} if showo.w_clip_vit else {}
    )
    parts = {part: f"{Path(name).name} ({fingerprint(find_folder(name))})" for part, name in names.items()}
    if file := config.model.vq_model.pretrained_model_path:
        parts["image_tokenizer"] += f" with {Path(file).name}"
    dtype = choose_dtype(config.dtype, choose_device(config.device))
    resolution = config.dataset.preprocessing.resolution
    return parts | {"dtype": str(dtype).removeprefix("torch."), "resolution": resolution}


def fingerprint(folder: Path) -> str:
    """Twelve digits from names, sizes and samples of the content of a checkpoint's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for number in range(NUM_BLOCKS):
                file.seek(max(0, size - BLOCK) * number // (NUM_BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:12]
