"""LoRA and DoRA adapters of a Showo, by PEFT's functions for models of other libraries (`peft.functional`).

The adapter is put into the model's own layers, so whatever runs the model runs it too: losses, both generation loops.
Its folder holds PEFT's two files, which `peft.PeftModel.from_pretrained(showo, folder)` reads as well, and `base.json`,
which says what model it belongs to. Only safetensors are read, and no key of the configuration that imports anything.

PEFT's own ways of training a part of an embedding do not serve a vocabulary head with a bias, and the losses here take
the head's weights. So rows that are trained whole are trained in the model's own matrices; the adapter has them in a
file of their own, and the model keeps what was there before.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import UserError
from common.files import field, read_json, write_json
from models.checkpoint_io import check_state_dict, has_adapter, load_weights_file, portable
from models.quantization import is_quantized

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
ROWS = "rows.safetensors"  # parameter → its last rows, which take the place of the model's
ADAPTER_FILES = (CONFIG, WEIGHTS, BASE, ROWS)
NAME, PREFIX = "default", "base_model.model."  # PEFT's names of a single adapter, and of parameters in files
MOST_RANK = 4096
# Of PEFT's configuration: what is used, what has no effect on a finished adapter. All else must be at its default.
USED = {"r": int, "lora_alpha": (int, float), "target_modules": list, "use_dora": bool, "use_rslora": bool}
WITHOUT_EFFECT = ("base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version")
WITHOUT_EFFECT += ("revision", "task_type", "auto_mapping", "megatron_core")
SAMPLES = 4  # weights of each parameter that `BASE` holds
CLOSE = {"rtol": 2.0**-8, "atol": 1e-7}  # what rounding to bf16 or fp16 may change


def add_adapter(
    model: nn.Module, base: dict[str, dict], first_rows: Mapping[str, int] = MappingProxyType({}), **settings
) -> None:
    """Freezes a model and puts a new adapter in fp32 into its layers, which changes nothing yet.

    Args:
        base: what `describe_base` said of the model before its weights were rounded or quantised.
        first_rows: parameter → the first of its rows that belong to the adapter and are trained whole.
        settings: of `peft.LoraConfig`.
    """
    model.adapter_base = base
    _inject(model, **settings)  # which freezes all that it does not add
    for name in first_rows:
        model.get_parameter(name).requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _keep_rows(model, first_rows)


def _keep_rows(model: nn.Module, first_rows: Mapping[str, int]) -> None:
    """Notes which rows belong to the adapter, and what is there without it."""
    model.adapter_rows = {n: (first, model.get_parameter(n).data[first:].clone()) for n, first in first_rows.items()}


def _exchange_rows(model: nn.Module) -> None:
    """Puts what was there without the adapter in the place of its rows, or these back."""
    for name, (first, other) in model.adapter_rows.items():
        rows = model.get_parameter(name).data[first:]
        model.adapter_rows[name] = first, rows.clone()
        rows.copy_(other)


def _inject(model: nn.Module, **settings) -> None:
    import peft

    with warnings.catch_warnings():  # PEFT asks for activation checkpointing by a name that transformers is giving up
        warnings.simplefilter("ignore", FutureWarning)
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model, NAME)


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes what it does without its adapter: the frozen reference of an objective."""
    layers = list(_layers(model).values())
    trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    _exchange_rows(model)
    try:
        yield
    finally:
        _exchange_rows(model)
        for layer in layers:
            layer.enable_adapters(True)
            layer.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter, by name."""
    if not has_adapter(model):
        raise ValueError("the model has no adapter; load one first")
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def merge_adapter(model: nn.Module) -> None:
    """Adds an adapter to the weights; the model then is an ordinary one, without adapter.

    Raises:
        UserError: the weights are quantised, or the sums are not finite.
    """
    if is_quantized(model):
        raise UserError("an adapter cannot be merged into quantised weights; merge it into those of full precision")
    for layer in _layers(model).values():
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"the adapter cannot be merged: {error}") from None
    _take_off(model)
    del model.adapter_rows


def unload_adapter(model: nn.Module) -> None:
    """Takes the adapter off; the weights are as they were."""
    _take_off(model)
    _exchange_rows(model)
    del model.adapter_rows


def _take_off(model: nn.Module) -> None:
    for name, layer in _layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def save_adapter(model: nn.Module, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the adapter, and which model it is for.

    Args:
        state_dict: of the model; default: its own.
    """
    from peft.functional import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, state_dict, adapter_name=NAME, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    if model.adapter_rows:
        whole = model.state_dict() if state_dict is None else state_dict
        rows = {name: whole[name][first:].contiguous() for name, (first, _) in model.adapter_rows.items()}
        save_file(rows, folder / ROWS)
    config, base = model.peft_config[NAME], portable(str(model.config.name_or_path))
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    write_json(folder / BASE, {"name": base, "weights": model.adapter_base})


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Puts a saved adapter into a model, whose dtype it takes; it is not trained.

    Raises:
        UserError: the files are missing, damaged or no LoRA, they belong to another model, or the model has an adapter
            or quantised weights.
    """
    if has_adapter(model):
        raise UserError("the model has an adapter already; merge it (merge_adapter) or take it off (unload_adapter)")
    if is_quantized(model):
        raise UserError("the weights are quantised; load with adapter=… beside quantization=…, which merges it first")
    from peft.functional import set_peft_model_state_dict

    settings = read_adapter_config(folder)
    check_base(model, folder)
    weights = load_weights_file(folder / WEIGHTS)
    check_state_dict(f"adapter={folder}", _expected(model, settings), weights)
    rows = load_weights_file(folder / ROWS) if (folder / ROWS).is_file() else {}
    first_rows = _first_rows(model, rows, folder)
    model.adapter_base = describe_base(model)
    training = model.training
    _inject(model, **settings, inference_mode=True)
    set_peft_model_state_dict(model, {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}, NAME)
    _keep_rows(model, first_rows)
    for name, first in first_rows.items():
        model.get_parameter(name).data[first:] = rows[name]
    model.train(training)


def _first_rows(model: nn.Module, rows: dict[str, torch.Tensor], folder: Path) -> dict[str, int]:
    """Parameter → the first of its rows that the adapter has; `UserError` if they are no rows of this model."""
    parameters, possible = dict(model.named_parameters()), model.first_new_rows()
    for name, given in rows.items():
        whole = parameters[name] if name in possible else torch.empty(())
        if not given.ndim or given.shape[1:] != whole.shape[1:] or given.numel() > whole.numel():
            raise UserError(
                f"adapter={folder}: {ROWS} holds {list(given.shape)} of {name}, which do not fit this model"
            )
    return {name: len(parameters[name]) - len(given) for name, given in rows.items()}


def read_adapter_config(folder: Path) -> dict:
    """The settings of `peft.LoraConfig` in a folder.

    Raises:
        UserError: it holds no adapter, or one of a form that is not loaded here.
    """
    from peft import LoraConfig

    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"adapter={folder} holds no adapter; expected {CONFIG} and {WEIGHTS}")
    content, where = read_json(folder / CONFIG), str(folder / CONFIG)
    defaults = LoraConfig().to_dict()
    if (kind := content.get("peft_type")) != "LORA":
        raise UserError(f"{where}: peft_type is {str(kind)[:40]!r}; only LORA adapters can be loaded")
    for key in sorted(content.keys() - {"peft_type", *USED, *WITHOUT_EFFECT}):
        if content[key] not in (defaults.get(key), None, False, {}, []):
            raise UserError(f"{where}: {key} is {str(content[key])[:60]!r}; only its default can be loaded")
    settings = {key: field(content, key, kind, where) for key, kind in USED.items() if key in content}
    targets, rank = settings.get("target_modules", []), settings.get("r", defaults["r"])
    if not targets or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{where}: target_modules must be names of layers")
    if not 1 <= rank <= MOST_RANK:
        raise UserError(f"{where}: r is {rank}; it must be from 1 to {MOST_RANK}")
    if not math.isfinite(settings.get("lora_alpha", 1)):
        raise UserError(f"{where}: lora_alpha is {settings['lora_alpha']}; it must be a finite number")
    return {"r": rank} | settings


def _expected(model: nn.Module, settings: dict) -> dict[str, torch.Tensor]:
    """Name → tensor without memory, of each that the file of such an adapter for this model must hold."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in settings["target_modules"]:
            shapes[f"{name}.lora_A.weight"] = settings["r"], module.in_features
            shapes[f"{name}.lora_B.weight"] = module.out_features, settings["r"]
            if settings.get("use_dora"):
                shapes[f"{name}.lora_magnitude_vector"] = (module.out_features,)
    return {PREFIX + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


# ---- which model it is for ----


def describe_base(model: nn.Module) -> dict[str, dict]:
    """Shape and a few numbers of every parameter that is not quantised; they tell a model from others."""
    return {
        name: {"shape": list(parameter.shape), "sample": _sample(parameter).tolist()}
        for name, parameter in model.named_parameters()
        if type(parameter) is nn.Parameter and parameter.is_floating_point()
    }


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """(SAMPLES,) numbers, evenly spread, in fp32 on the host."""
    index = torch.linspace(0, tensor.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return tensor.detach().flatten()[index.to(tensor.device)].float().cpu()


def check_base(model: nn.Module, folder: Path) -> None:
    """Compares a model, without or with its adapter, with the one that the adapter of a folder was made for.

    Raises:
        UserError: it is another.
    """
    if not (folder / BASE).is_file():
        logger.warning("%s does not say which model it was made for; only shapes are compared", folder)
        return
    content = read_json(folder / BASE)
    made_for, here = field(content, "weights", dict, BASE), getattr(model, "adapter_base", None)
    here = here if here is not None and has_adapter(model) else describe_base(model)
    # quantised weights are missing here, and all of another family
    both = made_for.keys() & here.keys()
    other = [name for name in sorted(both) if not _same(made_for[name], here[name])]
    if other or not both:
        cause = f"{other[0]} differs" if other else "no weight has the same name"
        raise UserError(
            f"adapter={folder} was made for another model, {str(content.get('name'))[:80]!r} ({cause}); give the one "
            "that it was trained on"
        )


def _same(one: dict, other: dict) -> bool:
    try:
        samples = torch.tensor(one["sample"]), torch.tensor(other["sample"])
        return one["shape"] == other["shape"] and torch.allclose(*samples, **CLOSE)
    except (TypeError, KeyError, ValueError, RuntimeError):  # a damaged file
        return False
