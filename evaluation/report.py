"""What an evaluation leaves on disk and in wandb, all made by the main process.

`results.json`, `results.md`, and for each task a folder with `predictions.jsonl`, `submission/`, `counts.json` and the
sheet `best_worst.png`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.contact_sheet import contact_sheet
from common.errors import shown
from common.tracking import Tracker
from evaluation.bootstrap import Counts, Estimate, estimates, read_summaries, set_estimate
from evaluation.output import COUNTS, PREDICTIONS, RESULTS, SHEET, TABLE, Output
from evaluation.runner import Run
from evaluation.task import Item, Verdict

NUM_SHOWN = 8  # best items on the sheet, and as many worst ones


@dataclass
class Scored:
    """One task with its answers and, where the right ones are known, its scores."""

    run: Run
    answers: list[str]
    verdicts: list[Verdict]
    figures: dict[str, Estimate]

    @property
    def differs(self) -> str:
        """Known differences from the paper's protocol, and notes on this run."""
        run, task = self.run, self.run.task
        parts = [task.paper.differs] if task.paper else []
        if len(run.items) < run.size:
            parts.append(f"{len(run.items)} of {run.size} items")
        if task.official_size not in (None, run.size):
            parts.append(f"the files hold {run.size} items, the official ones {task.official_size}")
        if not task.has_answers:
            parts.append("no public answers: submit the predictions")
        return "; ".join(parts + task.notes())


def score(run: Run, samples: int, seed: int) -> Scored:
    """Judges a finished run and writes its folder."""
    task, output, answers = run.task, run.task.output, run.complete()
    verdicts = task.judge(run.items, answers) if task.has_answers else []
    figures = {}
    if verdicts:
        counts = count(run, verdicts)
        output.write_json(COUNTS, counts.tree())
        figures = estimates(counts, task.figures, samples, seed)
        figures |= {
            name: set_estimate(values) for name, values in task.set_figures(output.folder, samples, seed).items()
        }
    output.write_json_lines(PREDICTIONS, records(run.items, answers, verdicts))
    task.write_submission(run.items, answers)
    return Scored(run, answers, verdicts, figures)


def count(run: Run, verdicts: Sequence[Verdict]) -> Counts:
    """The task's counts, a row for each group."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(run.items):
        groups.setdefault(item.resampled_with, []).append(index)
    rows = [
        run.task.counts([run.items[index] for index in indices], [verdicts[index] for index in indices])
        for indices in groups.values()
    ]
    return Counts.of(list(groups), [run.items[indices[0]].stratum for indices in groups.values()], rows)


def records(items: Sequence[Item], answers: Sequence[str], verdicts: Sequence[Verdict]) -> list[dict]:
    """A line per item: prompt, answer and, if judged, the parsed answer and its score.

    Numbers have five decimals, since further ones of network outputs depend on the number of threads.
    """
    lines = [
        {"key": item.key, "image": item.image, "prompt": item.prompt, "answer": answer}
        for item, answer in zip(items, answers, strict=True)
    ]
    for line, item, verdict in zip(lines, items, verdicts, strict=False):
        found = {"expected": item.expected, "parsed": verdict.parsed, "score": verdict.score, **verdict.facts}
        line |= {name: round(value, 5) if isinstance(value, float) else value for name, value in found.items()}
    return lines


def report(scored: Sequence[Scored], output: Output, tracker: Tracker) -> str:
    """Writes the results of all tasks, those of earlier commands included; returns the Markdown table."""
    model = scored[0].run.model
    tasks = earlier(output.folder / RESULTS, model) | {one.run.task.name: summary(one) for one in scored}
    output.write_json(RESULTS, {"tasks": tasks})
    text = markdown(tasks)
    output.write_text(TABLE, text)
    for one in scored:
        show(one, tracker)
    return text


def earlier(file: Path, model: dict) -> dict[str, dict]:
    """The summaries of earlier commands about the same model; says which others are dropped."""
    if not file.exists():
        return {}
    tasks = read_summaries(file)
    kept = {k: one for k, one in tasks.items() if model == {key: one["settings"].get(key) for key in model}}
    if dropped := [name for name in tasks if name not in kept]:
        print(f"{shown(file)} loses {', '.join(dropped)}: evaluated with another checkpoint, precision or resolution")
    return kept


def summary(one: Scored) -> dict:
    """One task in `results.json`."""
    task = one.run.task
    paper = {"vq": task.paper.vq, "clip_vit": task.paper.clip_vit} if task.paper else None
    return {
        "items": len(one.run.items),
        "settings": one.run.store.settings,
        "headline": task.headline,
        "unit": task.unit,
        "figures": {name: asdict(figure) for name, figure in one.figures.items()},
        "ceilings": list(task.ceilings),
        "paper": paper,
        "differs": one.differs,
    }


def markdown(tasks: Mapping[str, dict]) -> str:
    """The paper's figures beside ours, and below every figure there is.

    Args:
        tasks: their parts of `results.json`, by name.
    """
    lines = [
        "| task | figure | ours [95 % interval] | paper, 512², VQ | paper, 512², CLIP-ViT | what differs in protocol |",
        "|---|---|---|---|---|---|",
    ]
    figures = {
        name: {figure: Estimate(one["value"], one["low"], one["high"]) for figure, one in task["figures"].items()}
        for name, task in tasks.items()
    }
    for name, one in tasks.items():
        both = (one["paper"]["vq"], one["paper"]["clip_vit"]) if one["paper"] else (None, None)
        paper = [
            "" if value is None else f"{value:.1f}" if value == round(value, 1) else f"{value:g}" for value in both
        ]
        ours = str(figures[name][one["headline"]]) if one["headline"] in figures[name] else "not scored"
        row = [name, f"{one['headline']} ({one['unit']})", ours, *paper, one["differs"]]
        lines.append(f"| {' | '.join(row)} |")
    plain = [name for name, one in tasks.items() if figures[name] and not one["ceilings"]]
    lines += ["", "| task | figure | value [95 % interval] |", "|---|---|---|"] if plain else []
    for name in plain:
        lines += [f"| {name} | {figure} | {value} |" for figure, value in figures[name].items()]
    for name, one in tasks.items():
        lines += beside_ceilings(name, figures[name], one["ceilings"]) if figures[name] and one["ceilings"] else []
    return "\n".join(lines) + "\n"


def beside_ceilings(task: str, figures: Mapping[str, Estimate], ceilings: Sequence[str]) -> list[str]:
    """A table of its own for a task with ceilings: a row a figure."""
    lines = [
        "",
        f"| {task} | ours [95 % interval] | {' | '.join(ceilings)} |",
        "|---|---|" + "---|" * len(ceilings),
    ]
    for name, value in figures.items():
        if not any(name.endswith(f": {ceiling}") for ceiling in ceilings):
            beside = [figures.get(f"{name}: {ceiling}") for ceiling in ceilings]
            cells = [str(value), *("" if figure is None else str(figure) for figure in beside)]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def show(one: Scored, tracker: Tracker) -> None:
    """The best and the worst items on a sheet, and tables in wandb."""
    task, run = one.run.task, one.run
    tracker.log({f"{task.name}/{name}": figure.value for name, figure in one.figures.items()}, step=0)
    rows = [[name, figure.value, figure.low, figure.high] for name, figure in one.figures.items()]
    tracker.log_table(f"{task.name} figures", ["figure", "value", "low", "high"], rows)
    chosen = extremes(run.items, one.verdicts)
    images = [task.sheet_image(run.items[index], one.answers[index]) for _, index in chosen]
    if not chosen or images[0] is None:
        return
    lines = records(run.items, one.answers, one.verdicts)
    captions = [caption(which, lines[index], task.answers_are_files) for which, index in chosen]
    sheet = contact_sheet(images, captions, columns=4, title=f"{task.name}: the best items, then the worst")
    task.output.save(SHEET, sheet)
    columns = ["picture", "which", "prompt", "answer", "expected", "parsed", "score"]
    rows = [
        [image, which, *(lines[index][name] for name in columns[2:])]
        for image, (which, index) in zip(images, chosen, strict=True)
    ]
    tracker.log_table(f"{task.name} items", columns, rows)


def extremes(items: Sequence[Item], verdicts: Sequence[Verdict]) -> list[tuple[str, int]]:
    """("best" | "worst", index) of items; among equals an arbitrary choice that stays the same."""

    def rank(index: int) -> tuple[float, str]:
        return verdicts[index].score, hashlib.sha256(items[index].key.encode()).hexdigest()

    ranked = sorted(range(len(items)), key=rank) if verdicts else []
    number = min(NUM_SHOWN, len(ranked) // 2)
    best, worst = ranked[len(ranked) - number :][::-1], ranked[:number]
    return [("best", index) for index in best] + [("worst", index) for index in worst]


def caption(which: str, line: dict, is_file: bool) -> str:
    """Below an item on the sheet; in place of a file that is shown, how it was read, if it was."""
    answer = line["parsed"] if is_file and line["parsed"] else line["answer"]
    return (
        f"{which}: {line['score']:.2f}\nanswer: {answer or '(nothing)'}\n"
        f"expected: {line['expected']}\n{line['prompt']}"  # last, since a long one is cut
    )
