"""The paths that the flows of a configuration read, checked for existence without reading them."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from common.config import resolve_path
from common.errors import UserError
from training.data.paths import JSON, PARQUET, SHARDS, TEXT, existing_folder, expand_paths, has_suffix, is_address

FLOWS = ("t2i", "lm", "mmu")
FORMATS = {
    "imagenet1k": SHARDS,  # or a folder of class folders
    "t2i": SHARDS,
    "t2i_parquet": PARQUET,
    "captioning": SHARDS,
    "captioning_parquet": PARQUET,
    "llava_pretrain": JSON + SHARDS,
    "llava_tuning": JSON + SHARDS,
    "lm": PARQUET + TEXT,
}
SORTS = (SHARDS, PARQUET, JSON + TEXT)  # the files of a flow are all of one of these kinds
LLAVA = ("llava_pretrain", "llava_tuning")


class FlowPaths:
    """The paths of one split.

    Args:
        config: a `TrainingConfig`.
        split: ``train`` or ``eval``.
    """

    def __init__(self, config, split: str):
        self.batch_sizes = {name: config.training[f"batch_size_{name}"] for name in FLOWS}
        self.split, self.params = split, config.dataset.params
        self.kinds = {"t2i": config.dataset.gen_type, "mmu": config.dataset.und_type, "lm": "lm"}

    def check_all(self) -> list[str]:
        """The active flows, after a check that all their paths exist.

        Raises:
            UserError: there is no flow, or paths are not set, missing or of another kind; all of them in one message.
        """
        wanted = self.split == "train"
        names = [name for name in FLOWS if self.batch_sizes[name] and (wanted or self._value(name))]
        if wanted and not names:
            raise UserError("training.batch_size_t2i, batch_size_lm and batch_size_mmu are all 0; nothing to train on")
        all_or_problems([*(partial(self._check, name) for name in names), self._check_captions])
        return names

    def files(self, name: str) -> list[str]:
        """The files of a flow, or the folder of an ImageNet."""
        kind, setting, value = self.kinds[name], self._setting(name), self._value(name)
        if kind == "imagenet1k" and isinstance(value, str) and _has_folders(resolve_path(value)):
            return [str(resolve_path(value))]
        paths = expand_paths(setting, value, FORMATS[kind])
        strange = [path for path in paths if not _is_readable(path, FORMATS[kind])]
        sorts = [paths_of for group in SORTS if (paths_of := [path for path in paths if has_suffix(path, group)])]
        if strange or len(sorts) > 1:
            what = {"t2i": f"dataset.gen_type {kind!r}", "mmu": f"dataset.und_type {kind!r}", "lm": "the lm flow"}[name]
            got = strange[0] if strange else f"{sorts[0][0]} and {sorts[1][0]}"
            fetch = "; only shards can be read from an address: fetch it first" if strange and is_address(got) else ""
            raise UserError(
                f"{setting}: {what} reads files of one sort of {', '.join(FORMATS[kind])}; got {got}{fetch}"
            )
        return paths

    def image_root(self, name: str) -> str | None:
        """The folder that image file names are relative to, if one is given and the flow reads file names."""
        key = self._root_key(name)
        return str(resolve_path(self.params[key])) if key else None

    def _setting(self, name: str) -> str:
        return f"dataset.params.{self.split}_{name}_shards_path_or_url"

    def _value(self, name: str) -> Any:
        return self.params[f"{self.split}_{name}_shards_path_or_url"]

    def _check(self, name: str) -> None:
        checks = [partial(self.files, name)]
        if key := self._root_key(name):
            checks.append(partial(existing_folder, f"dataset.params.{key}", self.params[key]))
        if self.kinds[name] == "imagenet1k" and self.params.class_names_path:
            checks.append(partial(expand_paths, "dataset.params.class_names_path", self.params.class_names_path))
        all_or_problems(checks)

    def _root_key(self, name: str) -> str:
        if self.kinds[name] not in LLAVA and not self.kinds[name].endswith("_parquet"):
            return ""
        keys = (f"{split}_{name}_image_root" for split in (self.split, "train"))
        return next((key for key in keys if self.params[key]), "")

    def _check_captions(self) -> None:
        """The external captions; only the first key switches them on."""
        params, prefix = self.params, "dataset.params.external"
        keys = [f"external_{place}_caption_path" for place in ("laion12m", "cc12m", "journeydb") if self._given(place)]
        if not params.external_caption_path:
            if keys:
                named = ", ".join(f"dataset.params.{key}" for key in keys)
                raise UserError(f"{named} has no effect without {prefix}_caption_path; give that one, too")
            return
        checks = [partial(existing_folder, f"{prefix}_caption_path", params.external_caption_path)]
        for key in keys:
            check = expand_paths if "journeydb" in key else existing_folder
            checks.append(partial(check, f"dataset.params.{key}", params[key]))
        all_or_problems(checks)

    def _given(self, place: str) -> bool:
        return bool(self.params[f"external_{place}_caption_path"])


def _is_readable(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a flow of files with these suffixes can open it; only WebDataset opens URLs."""
    if is_address(path):
        return SHARDS[0] in suffixes and not has_suffix(path, PARQUET + JSON + TEXT)
    return has_suffix(path, suffixes)


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() for entry in path.iterdir())


def all_or_problems(calls: Iterable[Callable[[], Any]]) -> list:
    """The results of all calls.

    Raises:
        UserError: the problems of all of them in one message.
    """
    results, problems = [], []
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return results
