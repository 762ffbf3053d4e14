"""A typed config from a command line: a schema's defaults, then the YAML file of `config=`, then `a.b=c` arguments.

    config = load_config(["config=configs/showo_demo.yaml", "mode=t2i", "training.seed=7"], InferenceConfig)

Nothing is ignored silently: unknown keys, wrong types, unset environment variables and values out of range are
collected and reported in one `UserError`. `${a.b}` and `${oc.env:NAME}` work everywhere. `--help` lists all keys.
"""

import os
import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from io import StringIO
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError
from common.files import MAX_DEPTH, expand, read_text, resolve_path
from common.schema import InferenceConfig, MixedInferenceConfig, TrainingConfig, mask_schedule_of
from common.settings import Setting, find_problems, print_help, settings_of

__all__ = [
    "InferenceConfig",
    "MixedInferenceConfig",
    "TrainingConfig",
    "leaves",
    "load_config",
    "mask_schedule_of",
    "read_key",
    "read_settings",
    "read_yaml",
]

MAX_YAML, MAX_ALIASES = 2**22, 20  # bytes; aliases of aliases of aliases would fill any memory
ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*\}")


def read_settings(argv: list[str], schema: type, example: str) -> DictConfig:
    """Settings of a tool that has no config file, from `key=value` arguments. `--help` prints them and exits.

    Args:
        schema: a dataclass, see `common/settings.py`; a default of `???` marks a setting that must be given.
        example: arguments to quote when one is missing.

    Raises:
        UserError: unknown keys, wrong types, missing settings, values out of range; all of them in one message.
    """
    _answer_help(argv, schema, reads_file=False)
    known, problems = settings_of(schema), []
    arguments = _read_arguments(argv, known, example)
    config = _structured(schema, dict(_flatten(arguments, known, problems)), problems)
    if missing := [key for key, one in known.items() if OmegaConf.is_missing(config, one.path)]:
        problems.append(f"{' and '.join(missing)} not given; for example {example}")
    _expand_home(config, known, problems)
    problems += find_problems(schema, config)
    if problems:
        raise UserError("; ".join(problems))
    return config


def load_config(argv: list[str], schema: type) -> DictConfig:
    """Merges defaults, YAML file and command line into one complete config with all references resolved.

    A file may hold keys of the other scripts that share it; they are skipped. `--help` prints all keys and exits.

    Args:
        argv: `key=value` arguments; the key `config` names the YAML file.
        schema: a dataclass, see `common/settings.py`, with optional attributes: `SHARES_FILES_WITH`, names of the
            schemas of those scripts; for messages `EXAMPLE`, an argument, `PURPOSE`, what the script does, and
            `INSTEAD`, keys to give instead of another script's; `unread(config) -> list[str]`, keys that this run does
            not read, so that their environment variables need not be set.

    Raises:
        UserError: no `config=`, a missing or damaged file; or unknown keys (with the nearest known one), another
            script's keys on the command line, wrong types, unset environment variables, references that lead nowhere,
            values out of range and contradictions, all of them in one message.
    """
    _answer_help(argv, schema, reads_file=True)
    own, others = settings_of(schema), [resolve_name(name) for name in getattr(schema, "SHARES_FILES_WITH", ())]
    known = {key: one for other in others for key, one in settings_of(other).items()} | own
    example = getattr(schema, "EXAMPLE", "config=configs/showo_demo.yaml")
    arguments = _read_arguments(argv, known, example)
    if (path := arguments.pop("config", None)) is None:
        raise UserError(f"no config given; add config=FILE.yaml, for example {example}")
    path, problems = resolve_path(path), []
    for key in [key for key in arguments if _owner(key, known) and not _owner(key, own)]:
        instead = getattr(schema, "INSTEAD", {}).get(key)
        remedy = f"give {instead}" if instead else "leave it out"
        problems.append(f"{key} has no effect on {getattr(schema, 'PURPOSE', 'this script')}; {remedy}")
        del arguments[key]
    in_file = dict(_flatten(read_yaml(path), known, problems))
    elsewhere = {key: in_file.pop(key) for key in list(in_file) if not _owner(key, own)}
    in_file, on_line = (_without_aliases(source, own) for source in (in_file, dict(_flatten(arguments, own, problems))))
    for key, one in own.items():
        other = one.rule.repeats
        if other and (key in on_line) != (other in on_line):
            on_line |= dict.fromkeys((key, other), on_line.get(key, on_line.get(other)))
    for key, presets in ((key, one.rule.presets) for key, one in own.items() if one.rule.presets):
        if key in on_line:  # in place of the file's
            on_line = presets.get(str(on_line[key]), {}) | on_line
        elif key in in_file:
            in_file = presets.get(str(in_file[key]), {}) | in_file
    given = in_file | on_line
    config = _structured(schema, given, problems)
    _resolve(config, schema, others, elsewhere, problems)
    _expand_home(config, own, problems)
    problems += find_problems(schema, config)
    if problems:
        raise UserError(f"config={path} with the command line: " + "; ".join(problems))
    return config


def read_key(argv: list[str], key: str) -> Any:
    """One top-level setting, before it is known which schema the others have; None if it is not given."""
    given = dict(argument.partition("=")[::2] for argument in argv)
    if key not in given and given.get("config"):
        given |= read_yaml(resolve_path(given["config"]))
    return given.get(key)


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested dictionary."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---- reading ----


def _answer_help(argv: list[str], schema: type, reads_file: bool) -> None:
    if {"-h", "--help"} & set(argv):
        print_help(schema, reads_file)
        raise SystemExit(0)


def _read_arguments(argv: list[str], known: dict[str, Setting], example: str) -> dict[str, Any]:
    """{dotted key: value} of `key=value` arguments."""
    values = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise UserError(f"argument {argument!r} is not of the form key=value, as in {example}; --help lists all")
        values[key] = text if key == "config" else _parse(key, text, known.get(key))
    return values


def _parse(key: str, text: str, one: Setting | None) -> Any:
    """Parses a value as YAML, except where text is wanted: a prompt may contain '=', quotes, ': ' and '#'."""
    hint = one.hint if one else None
    if hint is str or set(get_args(hint)) == {str, type(None)} or hint is Any and not text.startswith("["):
        return None if text == "null" else text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        raise UserError(f"{key} is {text!r}, which cannot be read as YAML; quote special characters") from None


def read_yaml(path: Path, what: str | None = None) -> dict[str, Any]:
    """The keys and values of a YAML file; `what` names it in messages, where it is not `config=`; `UserError` if it is
    missing, no YAML, or holds anything else."""
    what = what or f"config={path}"
    text = read_text(path, what, MAX_YAML)
    try:
        depth = aliases = 0
        for event in yaml.parse(text):
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or aliases > MAX_ALIASES:
                raise UserError(f"{what} is nested too deeply, or has more than {MAX_ALIASES} aliases (`*name`)")
        tree = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=False)
    except UserError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} must contain keys and values, not a {type(tree).__name__}")
    return tree


def _owner(key: str, known: dict[str, Setting]) -> Setting | None:
    """The setting that a key sets: its own, or the group of free keys that it is in."""
    group = known.get(key.rpartition(".")[0])
    return known.get(key) or (group if group and group.is_group else None)


def _flatten(tree: dict, known: dict[str, Setting], problems: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a tree, down to the keys of the schema; unknown keys are added to `problems`."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_section = any(other.startswith(f"{key}.") for other in known)
        if value is None and key in known and known[key].is_group:
            continue  # an empty group sets nothing
        if _owner(key, known):
            yield key, value
        elif is_section and isinstance(value, dict):
            yield from _flatten(value, known, problems, f"{key}.")
        elif is_section and value is not None:  # an empty section sets nothing
            problems.append(f"{key} is {value!r}; it must be a group of keys")
        elif not is_section:
            problems.append(f"unknown key {key}; the nearest known key is {_nearest(key, known)}")


def _nearest(key: str, known: dict[str, Setting]) -> str:
    """The known key or section that is most similar to `key`, by the whole name and by its last part."""
    names = {name.rsplit(".", depth)[0] for name in known for depth in range(name.count(".") + 1)}

    def likeness(name: str) -> float:
        last = SequenceMatcher(None, key.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return last + SequenceMatcher(None, key, name).ratio()

    return max(sorted(names), key=likeness)


def _without_aliases(values: dict[str, Any], own: dict[str, Setting]) -> dict[str, Any]:
    """The values with short names replaced by what they set. Null sets it only where null is allowed."""
    found = {key: value for key, value in values.items() if not (key in own and own[key].rule.alias)}
    for key, value in values.items():
        target = own[key].rule.alias if key in own else None
        if target and (value is not None or own[target].takes_null):
            found[target] = value
    return found


# ---- merging ----


def _structured(schema: type, given: dict[str, Any], problems: list[str]) -> DictConfig:
    """The defaults with the given values; those of a wrong type are left out and added to `problems`."""
    config, own = OmegaConf.structured(schema), settings_of(schema)
    for key, value in given.items():
        _set(config, key, value, own, problems)
    return config


def _set(config: DictConfig, key: str, value: Any, own: dict[str, Setting], problems: list[str]) -> None:
    one = own.get(key)
    wants_int = one and (one.hint is int or int in get_args(one.hint))
    if wants_int and isinstance(value, float) and value.is_integer():
        value = int(value)  # YAML reads `4e7` as a float
    try:
        OmegaConf.update(config, one.path if one else key, value)
    except OmegaConfBaseException:
        problems.append(f"{key} is {value!r}; it must be {_owner(key, own).type}")


def _resolve(
    config: DictConfig, schema: type, others: list[type], elsewhere: dict[str, Any], problems: list[str]
) -> None:
    """Replaces every `${…}` by its value, or by the default, where that is impossible; then `problems` says why.

    Settings of `schema.unread` whose environment variables are unset become null. If the other unset variables all
    belong to data, these become ``$NAME``, so that `training/data/paths.py` can list them together with missing files.

    Args:
        others, elsewhere: the schemas that share the file, and the file's keys of theirs, to which `${…}` may refer.
    """
    own, defaults = settings_of(schema), OmegaConf.structured(schema)
    unread = schema.unread(config) if hasattr(schema, "unread") else []
    unset: dict[str, list[str]] = {}
    for key, text in leaves(OmegaConf.to_container(config, resolve=False)):
        if names := [name for name in ENVIRONMENT.findall(str(text)) if not os.environ.get(name)]:
            OmegaConf.update(config, key, None if key in unread else OmegaConf.select(defaults, key))
            if key not in unread:
                unset[key] = names
        elif "${" in str(text):
            try:
                value = _value(config, key, others, elsewhere)
            except OmegaConfBaseException as error:
                problems.append(f"{key} refers to a key that does not exist: {error}")
                value = OmegaConf.select(defaults, key)
            _set(config, key, value, own, problems)
    if all((one := _owner(key, own)) and one.rule.is_data for key in unset):
        for key, names in unset.items():
            OmegaConf.update(config, key, " ".join(f"${name}" for name in names))
    else:
        names = ", ".join(sorted({name for names in unset.values() for name in names}))
        instead = " ".join(f"{key}=…" for key in unset)
        problems.append(f"environment variables are not set: {names}; set them or give {instead}")
    if blank := OmegaConf.missing_keys(config):
        problems.append(f"{', '.join(sorted(blank))} is '???', a placeholder; give a value")


def _expand_home(config: DictConfig, own: dict[str, Setting], problems: list[str]) -> None:
    """Replaces `~` at the beginning of a value by the home folder, which only prose begins with otherwise; no NULs."""
    for key, one in own.items():
        value = OmegaConf.select(config, one.path, throw_on_missing=False)
        texts = list(value) if OmegaConf.is_list(value) else [value]
        if any("\0" in str(text) for text in texts):
            problems.append(f"{key} holds a NUL, which no text does")
        if one.rule.is_prose or not any(str(text).startswith("~") for text in texts):
            continue
        try:
            for text in texts:
                expand(str(text))
        except UserError as error:
            problems.append(f"{key}={error}")
        texts = [os.path.expanduser(text) if isinstance(text, str) else text for text in texts]
        OmegaConf.update(config, one.path, texts if OmegaConf.is_list(value) else texts[0])


def _value(config: DictConfig, key: str, others: list[type], elsewhere: dict[str, Any]) -> Any:
    """The value of `key`, whose references may lead to the config's own keys or to those of the other scripts."""
    try:
        value = OmegaConf.select(config, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        if not others:
            raise
    everything = OmegaConf.create({})
    for other in others:
        everything.merge_with(OmegaConf.to_container(OmegaConf.structured(other), resolve=False))
    for name, given in elsewhere.items():
        OmegaConf.update(everything, name, given)
    everything.merge_with(OmegaConf.to_container(config, resolve=False))
    return _value(everything, key, [], {})
