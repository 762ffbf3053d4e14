"""Reads checkpoints by hub name or folder, published and our own; every key is checked, no code is run (spec §12)."""

import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from common.files import REPOSITORY, check_file, expand, folder_aside, read_json
from models.config_fields import check_memory
from models.quantization import is_quantized

logger = logging.getLogger(__name__)

WEIGHT_NAMES = (
    "model.safetensors",
    "pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
INDEX_NAMES = tuple(f"{name}.index.json" for name in WEIGHT_NAMES)  # of sharded checkpoints
SHARD_NAMES = re.compile(r"((diffusion_)?pytorch_)?model-\d+-of-\d+\.(safetensors|bin)")
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt")
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
# Keys of a stored configuration that are the caller's to choose: some would fetch and run code from the hub.
CALLERS_KEYS = ("model_type", "attn_implementation", "experts_implementation", "quantization_config", "auto_map")
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def resolve_folder(name_or_path: str | Path, files: Sequence[str] = CHECKPOINT_FILES, **options) -> Path:
    """The folder of a checkpoint; a hub name is downloaded first.

    Args:
        files: patterns of the files to download.
        options: download options, see `HUB_OPTIONS`.

    Raises:
        UserError: neither an existing folder nor a hub name, or the download failed.
    """
    folder = expand(name_or_path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the checkpoint's folder (the one with config.json)")
    name = str(name_or_path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.parent.is_dir():
        raise UserError(
            f"checkpoint folder {name!r} does not exist; give an existing folder or a hub name like showlab/show-o"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), **options))
    except Exception as error:  # without network the client raises a dozen unrelated classes
        raise UserError(
            f"{name!r} is not a local folder and could not be fetched from the hub ({type(error).__name__}); "
            "download the repository elsewhere and give the path of its folder instead"
        ) from error


def load_weights_file(file: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in one file, `.safetensors` or pickled (read with `weights_only=True`, so no code in it runs).

    A dictionary under the key ``model`` is unwrapped.

    Raises:
        UserError: the file is missing, truncated, or holds anything but tensors.
    """
    file = check_file(file, f"weight file {file}")
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is damaged, or holds more than tensors and was not executed; get a clean copy"
        ) from error
    except Exception as error:  # damaged files raise a dozen unrelated classes
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{file} cannot be read; it may be truncated ({reason}); copy it again") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{file} is not a state dict (a dictionary of tensors); give a file of weights")
    check_finite(file, content)
    return content


def check_finite(source: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `UserError` if one of the tensors, which were read from `source`, holds NaN or an infinite number."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    # The sum costs no memory; only where it overflows or is NaN each number is looked at.
    suspects = [name for name, tensor in floats.items() if not tensor.sum(dtype=torch.float32).isfinite()]
    if bad := [name for name in suspects if not floats[name].isfinite().all()]:
        raise UserError(f"{source} holds weights that are NaN or infinite: {_some(bad)}; take another checkpoint")


def load_state_dict_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint folder, sharded or not, under any of the published file names.

    Rotary buffers, which older checkpoints hold, are left out.

    Raises:
        UserError: there are no weights, or they cannot be read.
    """
    found = [folder / name for name in (*INDEX_NAMES, *WEIGHT_NAMES) if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"{folder} holds no weights; expected one of {', '.join(WEIGHT_NAMES)} or a sharded checkpoint's index"
        )
    state_dict = _load_shards(folder, found[0]) if found[0].name in INDEX_NAMES else load_weights_file(found[0])
    return {key: tensor for key, tensor in state_dict.items() if not key.endswith("rotary_emb.inv_freq")}


def _load_shards(folder: Path, index: Path) -> dict[str, torch.Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; copy the index file again")
    state_dict = {}
    for name in sorted(set(weight_map.values()), key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} refers to a file outside its folder ({name!r}); get a clean copy")
        state_dict.update(load_weights_file(folder / name))
    lost = sorted(set(weight_map) - set(state_dict))
    if lost:
        raise UserError(f"{index} promises {_some(lost)}, absent from the shards; copy the checkpoint again")
    return state_dict


def check_state_dict(name: str, expected: dict, given: dict, allow_missing: tuple[str, ...] = ()) -> None:
    """Compares the keys and shapes of a state dict with those of the model.

    Args:
        name: names the checkpoint in the error message.
        expected, given: key → tensor (or anything with `.shape`).
        allow_missing: prefixes of keys that may be absent.

    Raises:
        UserError: some keys are missing, unexpected or mis-shaped; the message names them.
    """
    missing = sorted(k for k in expected if k not in given and not k.startswith(allow_missing or ("\0",)))
    unexpected = sorted(k for k in given if k not in expected)
    misshaped = [
        f"{k} {list(given[k].shape)} instead of {list(expected[k].shape)}"
        for k in sorted(expected)
        if k in given and given[k].shape != expected[k].shape
    ]
    problems = [
        f"{kind} {_some(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if keys
    ]
    if problems:
        raise UserError(f"{name} does not fit this model: {'; '.join(problems)}")


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} ({', '.join(names[:limit])}{more})"


def portable(path: str) -> str:
    """A path as others can read it: an absolute one from the repository on, or its last part only."""
    place = Path(path)
    if not place.is_absolute():
        return path
    return str(place.relative_to(REPOSITORY)) if place.is_relative_to(REPOSITORY) else place.name


@contextmanager
def replacing(goal: Path) -> Iterator[Path]:
    """A folder to write to that then takes the place of `goal`, along with the files there that are not its weights.

    Raises:
        UserError: it cannot be written; what was there stays.
    """
    old = goal.with_name(f".{goal.name}.old")
    with folder_aside(goal) as new:
        if old.exists() and not goal.exists():
            old.rename(goal)  # an export was killed between the last two renames
        shutil.rmtree(old, ignore_errors=True)
        yield new
        for file in new.rglob("*"):  # safetensors writes files that nobody else may read
            file.chmod(0o755 if file.is_dir() else 0o644)
        if goal.exists():
            _keep_others(goal, new)
            goal.rename(old)
        try:
            new.rename(goal)
        except OSError:
            old.rename(goal)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _keep_others(old: Path, new: Path) -> None:
    """Copies to a checkpoint folder the files of another that it does not have, except for weights."""
    replaced = {*WEIGHT_NAMES, *INDEX_NAMES, *os.listdir(new)}
    for file in old.iterdir():
        if file.is_dir() and not file.is_symlink():
            if (new / file.name).is_dir():
                _keep_others(file, new / file.name)
            else:
                shutil.copytree(file, new / file.name, symlinks=True)
        elif not (SHARD_NAMES.fullmatch(file.name) or file.name in replaced):
            shutil.copy2(file, new / file.name, follow_symlinks=False)


def silence_deepspeed() -> None:
    """Keeps DeepSpeed, which other libraries import where it is installed, from warning that there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def quietly() -> Iterator[None]:
    """Hides transformers' report on keys, which `check_state_dict` replaces, and its bars over copies within memory."""
    silence_deepspeed()
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def resize_rows(tensor: torch.Tensor, rows: int, std: float) -> torch.Tensor:
    """An embedding, head or head bias cut or extended to `rows` rows; new ones are normal with `std` (0 for a bias)."""
    if len(tensor) >= rows:
        return tensor[:rows].clone()
    check_memory(4 * rows * tensor[:1].numel(), f"a matrix of {rows} rows")
    new = torch.randn(rows - len(tensor), *tensor.shape[1:], dtype=torch.float32) * std
    return torch.cat([tensor, new.to(tensor.dtype)])


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether PEFT has put an adapter into a model (models/adapters.py)."""
    return getattr(model, "peft_config", None) is not None


class CheckpointMixin:
    """`from_pretrained` for published folders and our own, on top of transformers' loading.

    A class that uses it sets `config_class` and `published_class_name`, and may override `_adapt_state_dict`.
    """

    published_class_name: str

    @classmethod
    def from_pretrained(
        cls,
        name_or_path,
        *,
        config=None,
        weights_file: str | Path | None = None,
        allow_missing: tuple[str, ...] = (),
        dtype=torch.float32,
        **kwargs,
    ):
        """Loads a model by hub name or folder.

        Args:
            config: used instead of the folder's `config.json`; the vocabulary is resized to its `vocab_size`.
            weights_file: read instead of the folder's weights.
            allow_missing: prefixes of parameters that may be absent from the checkpoint and then keep their
                initialisation.
            dtype: float32 by default, as the published code loads; ``"auto"`` keeps the stored one.
            kwargs: configuration keys to override, download options (`HUB_OPTIONS`) or options of `transformers`
                (`attn_implementation`, `device_map`, `quantization_config`, …).

        Raises:
            UserError: the folder, the weights or the architecture do not fit.
        """
        if name_or_path is None:  # transformers calls it so, with a config and a state dict
            return super().from_pretrained(None, config=config, dtype=dtype, **kwargs)
        folder = resolve_folder(name_or_path, **{key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs})
        if config is None:
            config = cls._read_config(folder, kwargs)
        state_dict = load_weights_file(weights_file) if weights_file else load_state_dict_folder(folder)
        state_dict = cls._adapt_state_dict(state_dict, config)
        skeleton = cls._skeleton(config)
        expected = skeleton.state_dict()
        tied = {k for k in skeleton.all_tied_weights_keys if k not in state_dict}
        needed = {k: v for k, v in expected.items() if k not in tied}
        check_state_dict(str(weights_file or name_or_path), needed, state_dict, allow_missing)
        with quietly():
            model = super().from_pretrained(None, config=config, state_dict=state_dict, dtype=dtype, **kwargs)
        if new := [k for k in expected if k not in state_dict and k not in tied]:
            logger.warning("%s does not hold %s; initialised at random", name_or_path, ", ".join(new))
        model.config.name_or_path = str(name_or_path)
        return model

    def save_pretrained(self, *args, **kwargs):
        """As transformers'; `UserError` where it would write weights that `from_pretrained` does not read."""
        if has_adapter(self):
            raise UserError("the model has an adapter; merge it first, or save it alone (models.adapters.save_adapter)")
        if is_quantized(self):
            raise UserError("quantised weights are not saved; save the model before, and quantise it on loading")
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_config(cls, config, **kwargs):
        """A model with random weights; `ValueError` if this machine has not the memory for them."""
        num_bytes = 4 * sum(parameter.numel() for parameter in cls._skeleton(config).parameters())
        check_memory(num_bytes, f"a {cls.published_class_name} of these sizes")
        return cls._from_config(config, **kwargs)

    @classmethod
    def _skeleton(cls, config):
        """A model without memory for its weights."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def _read_config(cls, folder: Path, kwargs: dict):
        """The folder's configuration, with the keys of it that are in `kwargs` overridden (and removed there)."""
        content = read_json(folder / "config.json")
        kind = content.get("_class_name") or content.get("model_type")
        if kind not in (cls.published_class_name, cls.config_class.model_type):
            raise UserError(f"{folder} holds a {kind!r} checkpoint, expected {cls.published_class_name!r}")
        content = {k: v for k, v in content.items() if not k.startswith("_") and k not in CALLERS_KEYS}
        defaults = cls.config_class().to_dict()
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in defaults}
        if "vocab_size" in overrides:  # the stored one was the last id of the old vocabulary
            content.pop("mask_token_id", None)
        content |= overrides
        try:
            return cls.config_class(**content)
        except UserError:
            raise
        except Exception as error:  # keys of the library's own raise unrelated classes, its downloads OSErrors
            raise UserError(f"{folder / 'config.json'}: {str(error)[:300]}") from error

    @classmethod
    def _adapt_state_dict(cls, state_dict: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
        """A hook for changes that `config` asks for, such as another vocabulary size, before keys are compared."""
        return state_dict
