"""A typed config from a command line: dataclass defaults, then the YAML file of `config=`, then `a.b=c` arguments.

    config = load_config(["config=configs/showo_demo.yaml", "mode=t2i", "training.seed=7"], InferenceConfig)

Nothing is ignored silently: unknown keys, wrong types, unset environment variables and values out of range are
collected and reported in one `UserError`. `${a.b}` and `${oc.env:NAME}` work everywhere.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError
from common.schema import InferenceConfig, ShowoScriptConfig, TrainingConfig, mask_schedule_of

__all__ = [
    "InferenceConfig",
    "ShowoScriptConfig",
    "TrainingConfig",
    "leaves",
    "load_config",
    "read_settings",
    "mask_schedule_of",
    "read_key",
    "resolve_path",
]

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*\}")
DATA_PATH = re.compile(r"dataset\.params\.(train|eval)_(t2i|mmu|lm)_")


def resolve_path(path: str | Path) -> Path:
    """Looks a relative path up in the current folder, then in the repository; returned as it is if neither has it."""
    path = Path(path).expanduser()
    return REPOSITORY / path if not path.exists() and (REPOSITORY / path).exists() else path


def read_settings(argv: list[str], schema: type, example: str) -> DictConfig:
    """Settings of a tool that has no config file, from `key=value` arguments.

    Args:
        schema: a dataclass; a default of `???` marks a setting that must be given.
        example: an argument to quote when one is missing.

    Raises:
        UserError: an unknown key, a wrong type or a missing setting.
    """
    hints, given = get_type_hints(schema), {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        given[key] = _parse(key, text, hints.get(key)) if equals else None
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(given))
    except OmegaConfBaseException as error:
        known = ", ".join(schema.__annotations__)
        raise UserError(f"{str(error).splitlines()[0]}; the settings are {known}") from None
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{', '.join(missing)} not given; for example {example}")
    return config


def load_config(argv: list[str], schema: type) -> DictConfig:
    """Merges defaults, YAML file and command line into one complete config with all references resolved.

    Args:
        argv: `key=value` arguments; the key `config` names the YAML file.
        schema: a dataclass of dataclasses with three optional attributes: `ALIASES` (short name → the dotted key that
            it sets), `problems(config) -> list[str]`, and `unread(config) -> list[str]`, keys that this run does not
            read, so that their environment variables need not be set.

    Raises:
        UserError: no `config=`, a missing or damaged file, unknown keys (with the nearest known one), wrong types,
            unset environment variables, or `schema.problems`.
    """
    known = dict(_leaves(schema))
    path, arguments = _read_arguments(argv, known)
    problems: list[str] = []
    given = {}
    for source in (dict(_flatten(_read_yaml(path), known, problems)), dict(_flatten(arguments, known, problems))):
        for short, key in getattr(schema, "ALIASES", {}).items():
            value = source.pop(short, given)  # `given` itself means "absent", since null is a value
            if value is not given and (value is not None or type(None) in get_args(known[key])):
                source[key] = value
        given |= source
    config = OmegaConf.structured(schema)
    for key, value in given.items():
        try:
            OmegaConf.update(config, key, _integral(value, known.get(key)))
        except OmegaConfBaseException:
            problems.append(f"{key} is {value!r}; it must be {_describe(known[key])}")
    _raise(problems, path)
    _resolve(config, path, schema.unread(config) if hasattr(schema, "unread") else [])
    _raise(schema.problems(config) if hasattr(schema, "problems") else [], path)
    return config


def read_key(argv: list[str], key: str) -> Any:
    """One top-level setting, before it is known which schema the others have; None if it is not given."""
    given = dict(argument.partition("=")[::2] for argument in argv)
    if key not in given and given.get("config"):
        given |= _read_yaml(resolve_path(given["config"]))
    return given.get(key)


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested dictionary."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type annotation) of every leaf of a schema."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hint


def _read_arguments(argv: list[str], known: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Splits the command line into the path of `config=` and {dotted key: value}."""
    path, values = None, {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise UserError(f"argument {argument!r} is not of the form key=value, as in config=configs/showo_demo.yaml")
        if key == "config":
            path = text
        else:
            values[key] = _parse(key, text, known.get(key))
    if path is None:
        raise UserError("no config given; add config=FILE.yaml, for example config=configs/showo_demo.yaml")
    return resolve_path(path), values


def _parse(key: str, text: str, hint: Any) -> Any:
    """Parses a value as YAML, except where text is wanted: a prompt may contain '=', quotes, ': ' and '#'."""
    if hint is str or set(get_args(hint)) == {str, type(None)}:
        return None if text == "null" else text
    if hint is Any and not text.startswith("["):
        return None if text == "null" else text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        raise UserError(f"{key} is {text!r}, which cannot be read as YAML; quote special characters") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"config={path} does not exist or is not a file; relative paths start at the current folder")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"config={path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config={path} must contain keys and values, not a {type(tree).__name__}")
    return tree


def _flatten(tree: dict, known: dict[str, Any], problems: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a tree, down to the keys of the schema; unknown keys are added to `problems`."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_section = any(other.startswith(f"{key}.") for other in known)
        if value is None and get_origin(known.get(key)) is dict:
            continue  # an empty group sets nothing
        if key in known or get_origin(known.get(key.rpartition(".")[0])) is dict:
            yield key, value
        elif is_section and isinstance(value, dict):
            yield from _flatten(value, known, problems, f"{key}.")
        elif is_section and value is not None:  # an empty section sets nothing
            problems.append(f"{key} is {value!r}; it must be a group of keys")
        elif not is_section:
            problems.append(f"unknown key {key}; the nearest known key is {_nearest(key, known)}")


def _nearest(key: str, known: dict[str, Any]) -> str:
    """The known key or section that is most similar to `key`, by the whole name and by its last part."""
    names = {name.rsplit(".", depth)[0] for name in known for depth in range(name.count(".") + 1)}

    def likeness(name: str) -> float:
        last = SequenceMatcher(None, key.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return last + SequenceMatcher(None, key, name).ratio()

    return max(sorted(names), key=likeness)


def _integral(value: Any, hint: Any) -> Any:
    """YAML reads `4e7` as a float; converts it where the schema wants an int."""
    wants_int = hint is int or int in get_args(hint)
    return int(value) if wants_int and isinstance(value, float) and value.is_integer() else value


def _describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return " or ".join(
        words.get(option, "a group of keys" if get_origin(option) is dict else "a list") for option in options
    )


def _resolve(config: DictConfig, path: Path, unread: list[str]) -> None:
    """Replaces every `${…}` by its value; keys of `unread` whose environment variables are unset become null.

    If the other unset variables all belong to data paths, these become ``$NAME``, so that `training/data/paths.py` can
    list them together with the files that are missing.
    """
    unset: dict[str, list[str]] = {}
    for key, value in leaves(OmegaConf.to_container(config, resolve=False)):
        names = [name for name in ENVIRONMENT.findall(str(value)) if not os.environ.get(name)]
        if names and key in unread:
            OmegaConf.update(config, key, None)
        elif names:
            unset[key] = names
    if all(map(DATA_PATH.match, unset)):
        for key, names in unset.items():
            OmegaConf.update(config, key, " ".join(f"${name}" for name in names))
    else:
        names = ", ".join(sorted({name for names in unset.values() for name in names}))
        instead = " ".join(f"{key}=…" for key in unset)
        raise UserError(
            f"config={path} needs environment variables that are not set: {names}; set them or give {instead}"
        )
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise UserError(f"config={path} refers to a key that does not exist: {error}") from None
    if blank := OmegaConf.missing_keys(config):
        raise UserError(f"{', '.join(sorted(blank))} is '???', a placeholder; give a value")


def _raise(problems: list[str], path: Path) -> None:
    if problems:
        raise UserError(f"config={path} with the command line: " + "; ".join(problems))
