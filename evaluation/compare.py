"""Two finished evaluations item by item: what the second has more, with a paired bootstrap."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.errors import UserError
from evaluation.bootstrap import Counts, Difference, differences, set_difference
from evaluation.official_files import field, read_json, write_json
from evaluation.report import COUNTS, RESULTS, spelled
from evaluation.task import Task


def compare(first: Path, second: Path, tasks: Sequence[Task], folder: Path, samples: int, seed: int) -> str:
    """Writes `compare.json` and `compare.md`; returns the table.

    Args:
        first, second: output folders of finished evaluations.

    Raises:
        UserError: one of them did not finish a task, or they did not ask the same.
    """
    found = {}
    for task in tasks:
        if task.has_answers:
            one, two = (load_counts(evaluation, task) for evaluation in (first, second))
            two = in_order_of(one, two, task.name, first, second)
            found[task.name] = differences(one, two, task.figures, samples, seed)
            sets = [task.set_figures(evaluation / task.name, samples, seed) for evaluation in (first, second)]
            found[task.name] |= {name: set_difference(values, sets[1][name]) for name, values in sets[0].items()}
    tree = {name: {key: asdict(value) for key, value in figures.items()} for name, figures in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", {"first": str(first), "second": str(second), "tasks": tree})
    text = markdown(first, second, found)
    (folder / "compare.md").write_text(text, encoding="utf-8")
    return text


def load_counts(folder: Path, task: Task) -> Counts:
    """The counts of one task of a finished evaluation."""
    results = read_json(folder / RESULTS, dict, "the results of a finished evaluation")
    done = field(str(folder / RESULTS), results, "tasks", dict)
    if task.name not in done:
        raise UserError(
            f"compare: {folder} has no {task.name}, only {', '.join(done) or 'nothing'}; evaluate it there first, or "
            "leave it out of tasks"
        )
    return Counts.load(folder / task.name / COUNTS)


def in_order_of(one: Counts, two: Counts, name: str, first: Path, second: Path) -> Counts:
    """The second's counts, rows as in the first."""
    place = {group: index for index, group in enumerate(two.groups)}
    if set(place) != set(one.groups):
        differ = len(set(place) ^ set(one.groups))
        raise UserError(
            f"compare: {first} and {second} did not ask the same of {name}: {differ} groups are in one only"
        )
    order = np.array([place[group] for group in one.groups])
    columns = {key: values[order] for key, values in two.columns.items()}
    return Counts([two.groups[index] for index in order], [two.strata[index] for index in order], columns)


def markdown(first: Path, second: Path, found: dict[str, dict[str, Difference]]) -> str:
    lines = [
        f"First: `{first}`, second: `{second}`. p: two-sided, paired bootstrap.",
        "",
        "| task | figure | first | second | second − first [95 % interval] | p |",
        "|---|---|---|---|---|---|",
    ]
    for task, figures in found.items():
        for name, value in figures.items():
            cells = [f"{value.first:.1f}", f"{value.second:.1f}", spelled(value.difference)]
            cells.append("" if value.p is None else f"{value.p:.3f}")
            lines.append(f"| {' | '.join([task, name, *cells])} |")
    return "\n".join(lines) + "\n"
