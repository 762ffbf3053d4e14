"""95 % intervals of figures, and the comparison of two finished evaluations.

Percentile bootstrap: groups of items are resampled within strata of fixed size; two runs are resampled together.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType

import numpy as np

from common.errors import UserError, shown
from common.files import field, read_json
from evaluation.output import COMPARED, COUNTS, RESULTS, Output
from evaluation.task import Task

CHUNK = 50  # resamples at once
SUMMARY = {"headline": str, "unit": str, "differs": str, "settings": dict, "figures": dict, "ceilings": list}
SUMMARY |= {"paper": (dict, NoneType)}  # of a task in `results.json`
Figures = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass
class Counts:
    """Additive counts of every group of a task.

    Args:
        groups, strata: G names each.
        columns: name → (G,) float64.
    """

    groups: list[str]
    strata: list[str]
    columns: dict[str, np.ndarray]

    @classmethod
    def of(cls, groups: Sequence[str], strata: Sequence[str], rows: Sequence[Mapping[str, float]]) -> "Counts":
        """From one mapping per group; missing names count 0."""
        names = sorted({name for row in rows for name in row})
        columns = {name: np.array([row.get(name, 0) for row in rows], dtype=float) for name in names}
        return cls(list(groups), list(strata), columns)

    def tree(self) -> dict:
        """As stored in `counts.json`."""
        columns = {name: values.tolist() for name, values in self.columns.items()}
        return {"groups": self.groups, "strata": self.strata, "columns": columns}

    @classmethod
    def load(cls, path: Path) -> "Counts":
        """Of a finished evaluation; `UserError` if they are none."""
        tree, where = read_json(path), str(path)
        groups, strata = (field(tree, name, list, where) for name in ("groups", "strata"))
        columns = field(tree, "columns", dict, where)
        try:
            columns = {name: np.array(values, dtype=float) for name, values in columns.items()}
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{where}: field 'columns' holds other things than numbers; evaluate it again") from None
        if any(values.shape != (len(groups),) for values in (np.array(strata), *columns.values())):
            raise UserError(f"{where}: its fields differ in length; expected one value for each group")
        if not all(isinstance(name, str) for name in (*groups, *strata)) or len(set(groups)) < len(groups):
            raise UserError(f"{where}: groups and strata must be names, each group once; evaluate it again")
        if not columns or not all(np.isfinite(values).all() for values in columns.values()):
            raise UserError(f"{where}: its counts are missing, NaN or infinite; evaluate it again")
        return cls(groups, strata, columns)

    def in_order_of(self, groups: Sequence[str]) -> "Counts":
        """The same counts, rows in the order of `groups`."""
        place = {group: index for index, group in enumerate(self.groups)}
        order = [place[group] for group in groups]
        columns = {name: values[order] for name, values in self.columns.items()}
        return Counts(list(groups), [self.strata[index] for index in order], columns)

    def totals(self) -> Mapping[str, np.ndarray]:
        return _zero_by_default({name: values.sum() for name, values in self.columns.items()}, ())

    def resampled(self, samples: int, seed: int) -> Mapping[str, np.ndarray]:
        """Column sums of `samples` resamples, (samples,) each; the same groups and seed give the same draws."""
        matrix = np.stack(list(self.columns.values()), axis=1)  # (G, columns)
        sums = np.zeros((samples, matrix.shape[1]))
        rng, strata = np.random.default_rng(seed), np.array(self.strata)
        for stratum in sorted(set(self.strata)):
            part = matrix[strata == stratum]
            for start in range(0, samples, CHUNK):
                size = min(CHUNK, samples - start)
                times = rng.multinomial(len(part), np.full(len(part), 1 / len(part)), size)  # (size, groups)
                sums[start : start + size] += times @ part
        return _zero_by_default(dict(zip(self.columns, sums.T, strict=True)), (samples,))


def _zero_by_default(columns: dict[str, np.ndarray], shape: tuple[int, ...]) -> Mapping[str, np.ndarray]:
    return defaultdict(lambda: np.zeros(shape), columns)


@dataclass
class Estimate:
    """A figure with its 95 % interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.value:.1f}{interval}"


@dataclass
class Difference:
    """A figure of two runs, and their difference (second − first).

    Args:
        p: two-sided, from the share of resamples on the other side of 0; None where nothing was resampled.
    """

    first: float
    second: float
    difference: Estimate
    p: float | None


def estimates(counts: Counts, figures: Figures, samples: int, seed: int) -> dict[str, Estimate]:
    """Every figure of a task with its interval."""
    values, resampled = figures(counts.totals()), figures(counts.resampled(samples, seed))
    return {name: Estimate(float(value), *_interval(resampled[name])) for name, value in values.items()}


def differences(first: Counts, second: Counts, figures: Figures, samples: int, seed: int) -> dict[str, Difference]:
    """Every figure of two runs that asked the same, resampled together.

    Args:
        first, second: the same groups and strata in one order.
    """
    assert first.groups == second.groups and first.strata == second.strata
    one, two = (figures(counts.totals()) for counts in (first, second))
    resampled_one, resampled_two = (figures(counts.resampled(samples, seed)) for counts in (first, second))
    found = {}
    for name in one:
        resampled = resampled_two[name] - resampled_one[name]
        tail = min((resampled <= 0).mean(), (resampled >= 0).mean())
        p = float(min(1.0, max(2 * tail, 2 / samples)))
        difference = Estimate(float(two[name] - one[name]), *_interval(resampled))
        found[name] = Difference(float(one[name]), float(two[name]), difference, p)
    return found


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def set_estimate(values: np.ndarray) -> Estimate:
    """A figure of a whole set (`Task.set_figures`) with the interval of 1.96 standard deviations of its resamples.

    Not their percentiles: a resample holds fewer different items, which moves such figures all to one side.

    Args:
        values: (1 + R,), the figure and its resampled values.
    """
    value, resampled = float(values[0]), values[1:]
    if len(resampled) < 2:
        return Estimate(value)
    spread = 1.96 * float(resampled.std(ddof=1))
    return Estimate(value, value - spread, value + spread)


def set_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """A figure of two whole sets, (1 + R,) each, and their difference; p is that of a normal distribution."""
    difference = set_estimate(second - first)
    spread = difference.high - difference.value if difference.high is not None else None
    shift = abs(difference.value)
    p = None if spread is None else math.erfc(1.96 * shift / spread / math.sqrt(2)) if spread else float(not shift)
    return Difference(float(first[0]), float(second[0]), difference, p)


def compare(first: Path, second: Path, tasks: Sequence[Task], output: Output, samples: int, seed: int) -> str:
    """Writes `compare.json` and `compare.md`; returns the table.

    Args:
        first, second: output folders of finished evaluations.

    Raises:
        UserError: one of them did not finish a task, or they did not ask the same.
    """
    found, left_out = {}, []
    for task in tasks:
        if task.has_answers:
            found[task.name], alone = _compare_task(task, first, second, samples, seed)
            left_out += [f"{task.name} {name}" for name in alone]
    tree = {name: {key: asdict(value) for key, value in figures.items()} for name, figures in found.items()}
    text = _comparison_table(first, second, found, left_out)
    output.write_json(COMPARED[0], {"first": shown(first), "second": shown(second), "tasks": tree})
    output.write_text(COMPARED[1], text)
    return text


def _compare_task(
    task: Task, first: Path, second: Path, samples: int, seed: int
) -> tuple[dict[str, Difference], list[str]]:
    """The figures that both runs have, and the names of those that only one has."""
    summaries = [_summary_of(folder, task) for folder in (first, second)]
    refusal = f"compare: {first} and {second} did not ask the same of {task.name}"
    for key in task.asked_by:  # items may have the same names and yet be others
        one, two = (summary["settings"].get(key, "not set") for summary in summaries)
        if one != two:
            raise UserError(
                f"{refusal}: {key} is {one} and {two}; evaluate one of them again with the other's settings"
            )
    one, two = (Counts.load(folder / task.name / COUNTS) for folder in (first, second))
    if differ := len(set(one.groups) ^ set(two.groups)):
        raise UserError(f"{refusal}: {differ} groups are in one only")
    two = two.in_order_of(one.groups)
    if one.strata != two.strata:
        raise UserError(f"{refusal}: the groups' strata differ")
    figures = differences(one, two, task.figures, samples, seed)
    sets = [task.set_figures(folder / task.name, samples, seed) for folder in (first, second)]
    figures |= {name: set_difference(sets[0][name], sets[1][name]) for name in sets[0] if name in sets[1]}
    own, others = (set(summary["figures"]) for summary in summaries)
    return {name: value for name, value in figures.items() if name in own & others}, sorted(own ^ others)


def read_summaries(file: Path) -> dict[str, dict]:
    """The tasks in a `results.json` by name; `UserError` if they are not as `evaluation/report.py` writes them."""
    tasks = field(read_json(file), "tasks", dict, str(file))
    for name in tasks:
        one, where = field(tasks, name, dict, str(file)), f"{file}, {name}"
        one.setdefault("ceilings", [])  # older files do not say
        for key, kind in SUMMARY.items():
            field(one, key, kind, where)
        for figure in one["figures"].values():
            for key in ("value", "low", "high"):
                field(figure, key, float if key == "value" else (float, NoneType), where)
    return tasks


def _summary_of(folder: Path, task: Task) -> dict:
    """One task of a finished evaluation in its `results.json`."""
    done = read_summaries(folder / RESULTS)
    if task.name not in done:
        raise UserError(
            f"compare: {folder} has no {task.name}, only {', '.join(done) or 'nothing'}; evaluate it there first, or "
            "leave it out of tasks"
        )
    return done[task.name]


def _comparison_table(
    first: Path, second: Path, found: Mapping[str, Mapping[str, Difference]], left_out: Sequence[str]
) -> str:
    lines = [
        f"First: `{shown(first)}`, second: `{shown(second)}`. p: two-sided, paired bootstrap.",
        "",
        "| task | figure | first | second | second − first [95 % interval] | p |",
        "|---|---|---|---|---|---|",
    ]
    for task, figures in found.items():
        for name, value in figures.items():
            p = "" if value.p is None else f"{value.p:.3f}"
            lines.append(f"| {task} | {name} | {value.first:.1f} | {value.second:.1f} | {value.difference} | {p} |")
    lines += ["", f"Left out, since only one of them has it: {', '.join(left_out)}."] if left_out else []
    return "\n".join(lines) + "\n"
