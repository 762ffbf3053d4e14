"""A setting is declared once: its default, one line of help and its rules stand beside its type.

    @dataclass
    class LossSection:
        weight: float = setting(1.0, "weight of the auxiliary loss", low=0)
        kind: str = setting("l1", "distance of two images", choices=("l1", "mse"))

A schema is a dataclass of settings and of sections, which are dataclasses of settings again. A subclass gives another
default by itself (`weight: float = 2.0`); help and rules are inherited. What holds between several settings is said by
`problems(config) -> list[str]`, a static method of any of these classes; those of base classes are called as well.
`common/config.py` loads a schema from a YAML file and a command line.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import II, DictConfig, OmegaConf

from common.files import KINDS

WIDTH, HELP_COLUMN = 118, 44  # of `--help`
MOST = 2**63 - 1  # of whole numbers without a range of their own


@dataclass(frozen=True)
class Rule:
    """What is known about a setting besides its type and default.

    Args:
        help: one line for `--help`.
        low, high: the least and the greatest value.
        above, below: values must be larger, or smaller, than this.
        choices: the allowed values. Null is allowed wherever the type allows it.
        free: no effect on what is trained, so it may change when a run is resumed.
        is_data: a path, or a list of paths, to data: an unset environment variable in it is left as ``$NAME``, so that
            `training/data/paths.py` can list it together with files that are missing.
        alias: the dotted key that this short name sets.
        presets: choice → {dotted key: value}, other settings that it sets; those given at the same place prevail, and a
            command line over a file.
        repeats: the dotted key that this published key repeats; both must have one value, and a command line that
            overrides one of them overrides both.
        is_output: a folder to write to, which must have a name: empty text would be the current folder.
        is_prose: text for a model; elsewhere `~` at the beginning is the home folder.
    """

    help: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple = ()
    free: bool = False
    is_data: bool = False
    alias: str | None = None
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    repeats: str | None = None
    is_prose: bool = False
    is_output: bool = False

    @property
    def range(self) -> str:
        """In words, as in "from 0 to 1"; empty if there is none."""
        if self.above is not None:
            return f"more than {self.above}" + (f", up to {self.high}" if self.high is not None else "")
        if self.below is not None:
            return f"from {self.low}, less than {self.below}"
        if self.low is not None:
            return f"from {self.low} to {self.high}" if self.high is not None else f"{self.low} or more"
        return ""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, or with one in a list, that is not null and has the right type."""
        if OmegaConf.is_list(value):
            return next((problem for one in value if (problem := self.problem(one))), None)
        if self.choices and value not in self.choices:
            return f"is {value!r}; allowed: {', '.join(map(str, self.choices))}"
        if self.is_output and not value.strip():
            return "is empty; give a folder, or . for the current one"
        if self.is_data and not isinstance(value, str):
            return f"is {value!r}; it must be one path or a list of paths"
        if isinstance(value, float) and not math.isfinite(value):
            return f"is {value}; it must be {self.range or 'a finite number'}"
        if self.range and not (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        ):
            return f"is {value}; it must be {self.range}"
        if isinstance(value, int) and abs(value) > MOST:
            return f"is {value}; whole numbers here go up to {MOST:,}"
        return None


@dataclass(frozen=True)
class Setting:
    """A setting of a schema; its dotted key is that of `settings_of`.

    Args:
        path: where it is in the loaded config; the key, but for the underscore of Python's own words (`from_`).
        hint: the type annotation.
    """

    path: str
    hint: Any
    rule: Rule

    @property
    def takes_null(self) -> bool:
        return type(None) in get_args(self.hint)

    @property
    def is_group(self) -> bool:
        """Whether it is a dictionary with keys of its own."""
        return get_origin(self.hint) is dict

    @property
    def type(self) -> str:
        """In words, as in "a whole number or null"."""
        if self.hint is Any:
            return "a path, a list of paths or null" if self.rule.is_data else "anything"
        options = get_args(self.hint) if get_origin(self.hint) in (Union, UnionType) else (self.hint,)
        groups = {dict: "a group of keys"}
        return " or ".join(KINDS.get(option) or groups.get(get_origin(option), "a list") for option in options)

    @property
    def allowed(self) -> str:
        """Type, and range or choices, in words."""
        if self.rule.choices:
            return ", ".join(map(str, self.rule.choices)) + (" or null" if self.takes_null else "")
        return self.type + (f", {self.rule.range}" if self.rule.range else "")


def setting(default: Any, help: str, **rule) -> Any:
    """A field of a schema; `rule` as in `Rule`. The default ``???`` marks one that must be given."""
    metadata = {"rule": Rule(help, **rule)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def repeats(key: str) -> Any:
    """A published key that says again what `key` says."""
    return setting(II(key), f"published key, as {key}", repeats=key, free=True)


def alias(key: str) -> Any:
    """A short name at the top of a schema: setting it sets `key`, and both read the same value."""
    return setting(II(key), f"short for {key}", alias=key, free=True)


@cache
def settings_of(schema: type, prefix: str = "") -> dict[str, Setting]:
    """Every setting of a schema by its dotted key."""
    hints, found = get_type_hints(schema), {}
    for item in fields(schema):
        hint, path = hints[item.name], prefix + item.name
        if is_dataclass(hint):
            found |= settings_of(hint, f"{path}.")
        else:
            found[path.rstrip("_")] = Setting(path, hint, _rule(schema, item.name))
    return found


def free_keys(schema: type) -> set[str]:
    """The dotted keys that may change when a run is resumed, since they have no effect on what is trained."""
    return {key for key, one in settings_of(schema).items() if one.rule.free}


def find_problems(schema: type, config: DictConfig) -> list[str]:
    """One message for each value that is not allowed, then for those that do not go together."""
    found = []
    for key, one in settings_of(schema).items():
        value = OmegaConf.select(config, one.path, throw_on_missing=False)
        if value is not None and (problem := one.rule.problem(value)):
            found.append(f"{key} {problem}")
        if (other := one.rule.repeats) and value != (expected := OmegaConf.select(config, other)):
            found.append(f"{key} is {value} and {other} is {expected}; they must agree (omit the first one)")
    if OmegaConf.missing_keys(config):
        return found  # what holds between settings needs them all
    classes = (base for cls in _classes(schema) for base in cls.__mro__ if "problems" in vars(base))
    for cls in dict.fromkeys(classes):
        found += cls.problems(config)
    return found


def print_help(schema: type, reads_file: bool) -> None:
    """What the running script does, and each of its keys with default, help and allowed values, by section."""
    usage = {"usage": argparse.SUPPRESS, "add_help": False}
    style = {"width": WIDTH, "max_help_position": HELP_COLUMN}
    parser = argparse.ArgumentParser(
        **usage, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, **style)
    )
    parser.description = (sys.modules["__main__"].__doc__ or "").strip()
    keys, config, groups = settings_of(schema), OmegaConf.structured(schema), {}
    for key in sorted(keys, key=lambda key: "." in key):  # first those without a section; otherwise as declared
        one, section = keys[key], key.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "settings, as key=value")
            if reads_file and len(groups) == 1:
                groups[section].add_argument("config=…", help="YAML file with values that replace the defaults below")
        if one.rule.alias:
            groups[section].add_argument(key, help=one.rule.help)
        else:
            text = f"{one.rule.help} [{one.allowed}]".strip().replace("%", "%%")
            groups[section].add_argument(f"{key}={_as_given(config, one.path)}", help=text)
    parser.print_help()


def _rule(schema: type, name: str) -> Rule:
    """The rule of a field, or that of the same field in the nearest base class that has one."""
    for base in schema.__mro__:
        item = getattr(base, "__dataclass_fields__", {}).get(name)
        if item is not None and "rule" in item.metadata:
            return item.metadata["rule"]
    return Rule()


def _classes(schema: type) -> Iterator[type]:
    """The schema and the classes of all its sections."""
    yield schema
    for hint in get_type_hints(schema).values():
        if is_dataclass(hint):
            yield from _classes(hint)


def _as_given(config: DictConfig, path: str) -> str:
    """A default as one would write it on the command line."""
    *sections, name = path.split(".")
    node = OmegaConf.select(config, ".".join(sections)) if sections else config
    value = OmegaConf.to_container(node, resolve=False)[name]
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "…" if value == "???" else str(value)
