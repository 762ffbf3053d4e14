"""Compares two finished evaluations item by item: differences of figures, with a paired bootstrap."""

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
    found, left_out = {}, []
    for task in tasks:
        if task.has_answers:
            found[task.name], alone = compare_task(task, first, second, samples, seed)
            left_out += [f"{task.name} {name}" for name in alone]
    tree = {name: {key: asdict(value) for key, value in figures.items()} for name, figures in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", {"first": str(first), "second": str(second), "tasks": tree})
    text = markdown(first, second, found, left_out)
    (folder / "compare.md").write_text(text, encoding="utf-8")
    return text


def compare_task(
    task: Task, first: Path, second: Path, samples: int, seed: int
) -> tuple[dict[str, Difference], list[str]]:
    """The figures that both runs have, and the names of those that only one has."""
    summaries = [load_summary(folder, task) for folder in (first, second)]
    check_asked(summaries, task, first, second)
    one, two = (Counts.load(folder / task.name / COUNTS) for folder in (first, second))
    figures = differences(one, in_order_of(one, two, task.name, first, second), task.figures, samples, seed)
    sets = [task.set_figures(folder / task.name, samples, seed) for folder in (first, second)]
    figures |= {name: set_difference(sets[0][name], sets[1][name]) for name in sets[0] if name in sets[1]}
    own, others = (set(summary["figures"]) for summary in summaries)
    return {name: value for name, value in figures.items() if name in own & others}, sorted(own ^ others)


def load_summary(folder: Path, task: Task) -> dict:
    """One task of a finished evaluation in its `results.json`."""
    results = read_json(folder / RESULTS, dict, "the results of a finished evaluation")
    done = field(str(folder / RESULTS), results, "tasks", dict)
    if task.name not in done:
        raise UserError(
            f"compare: {folder} has no {task.name}, only {', '.join(done) or 'nothing'}; evaluate it there first, or "
            "leave it out of tasks"
        )
    return done[task.name]


def check_asked(summaries: Sequence[dict], task: Task, first: Path, second: Path) -> None:
    """Refuses runs whose items have the same names but are others."""
    for key in task.asked_by:
        one, two = (summary["settings"].get(key, "not set") for summary in summaries)
        if one != two:
            raise UserError(
                f"compare: {first} and {second} did not ask the same of {task.name}: {key} is {one} and {two}; "
                "evaluate one of them again with the other's settings"
            )


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


def markdown(first: Path, second: Path, found: dict[str, dict[str, Difference]], left_out: Sequence[str]) -> str:
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
    lines += ["", f"Left out, since only one of them has it: {', '.join(left_out)}."] if left_out else []
    return "\n".join(lines) + "\n"
