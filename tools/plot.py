"""Plots the logs of runs: losses of every flow, token accuracy and learning rate, from their `metrics.jsonl`.

    python3 tools/plot.py runs=outputs/stage1,outputs/stage2,outputs/stage3 output=curves.png

Several runs, such as the stages of a training, are plotted side by side; `layout=overlay` puts them in the same axes,
to compare runs of one stage. Thin lines are logged values, thick lines a running mean, dots held-out data. The suffix
of `output` sets the format (png, svg, pdf).
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import common  # noqa: F401  Ctrl-C is one word from here on

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.config import read_settings
from common.errors import UserError, run_cli, shown
from common.files import Owned, expand, field, json_lines, make_folder, real_path, writing
from common.settings import setting

TITLES = {"t2i": "text to image", "mmu": "image to text", "lm": "text"}  # of the published flows; others by name
LOSS = "step_loss_"  # and the flow's name
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#444444")  # told apart by all eyes
ROWS = {"loss": "loss", "accuracy": "token accuracy", "lr": "learning rate"}
LARGEST = 1e30  # greater numbers are no figures, and cannot be drawn
WINDOWS = 40  # the running mean looks back over this share of a run
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "text.parse_math": False,  # names may hold any sign
}

Series = list[tuple[int, float]]  # (step, value), steps rising
Column = tuple[str, list[tuple["Run", str, str]]]  # title, lines: run, flow, colour


@dataclass
class PlotConfig:
    runs: str = setting("???", "comma-separated folders or metrics.jsonl files")
    output: str = setting("curves.png", "the file to write; its suffix sets the format")
    labels: str = setting("", "comma-separated, one for each run; empty: the folders' names")
    layout: str = setting("columns", "runs side by side, or in the same axes", choices=("columns", "overlay"))
    title: str = setting("", "above the figure")


@dataclass
class Run:
    """What one run has logged, by name of the metric."""

    label: str
    metrics: dict[str, Series]

    def flows(self) -> list[str]:
        return flows_of(self.metrics)

    def train(self, row: str, flow: str) -> Series:
        names = {"loss": LOSS + flow, "accuracy": f"accuracy/{flow}", "lr": "lr"}
        return self.metrics.get(names[row], [])

    def held_out(self, row: str, flow: str) -> dict[str, Series]:
        """Mask ratio (empty: as in training) → series."""
        pattern = re.compile(
            {"loss": "eval_loss_", "accuracy": "eval_accuracy/"}.get(row, "$") + re.escape(flow) + r"(?:[/_](.*))?"
        )
        found = {pattern.fullmatch(name): series for name, series in self.metrics.items()}
        return {(match[1] or "").replace("mask_", "mask "): series for match, series in found.items() if match}

    def has(self, row: str) -> bool:
        return any(self.train(row, flow) or self.held_out(row, flow) for flow in self.flows())


# ---- reading logs ----


def read_run(path: Path, label: str) -> Run:
    """A run's numbers. Lines cut in two by a crash are skipped; steps done again count as the last time; `UserError` if
    there is no such file, or no loss in it."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    metrics: dict[str, dict[int, float]] = defaultdict(dict)
    last = 0
    for _, _, values in json_lines(file, f"runs: {shown(file)}"):
        try:
            step = field(values, "step", int, str(file))
        except UserError:
            continue
        if not 0 <= step < LARGEST:
            continue
        if step < last:  # the run was continued from an earlier checkpoint
            metrics = defaultdict(dict, {name: _before(series, step) for name, series in metrics.items()})
        last = step
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float) and abs(value) < LARGEST:
                metrics[name][step] = value
    run = Run(label, {name: list(series.items()) for name, series in metrics.items() if series})
    if not run.flows():
        raise UserError(f"runs: {shown(file)} holds no {LOSS}…, the loss of a flow; only runs of Show-o are plotted")
    return run


def flows_of(names: Iterable[str]) -> list[str]:
    """The flows that have a loss, the published ones first."""
    found = [name.removeprefix(LOSS) for name in names if name.startswith(LOSS)]
    return [flow for flow in TITLES if flow in found] + [flow for flow in dict.fromkeys(found) if flow not in TITLES]


def _before(series: dict[int, float], step: int) -> dict[int, float]:
    return {at: value for at, value in series.items() if at < step}


def running_mean(series: Series) -> Series:
    """An exponential mean over 1/40 of the points, without the usual bias to the first."""
    keep = 1 - 1 / max(1.0, len(series) / WINDOWS)
    total = weight = 0.0
    smooth = []
    for step, value in series:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append((step, total / weight))
    return smooth


# ---- plotting ----


def draw_train(axes: Axes, series: Series, colour: str) -> None:
    if not series:
        return
    axes.plot(*zip(*series, strict=True), color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(*zip(*running_mean(series), strict=True), color=colour, linewidth=1.6)


def draw_held_out(axes: Axes, found: dict[str, Series], colour: str) -> None:
    """Dots; those of a fixed mask ratio are joined and named at their last."""
    for name, series in found.items():
        style = {"linestyle": ":", "linewidth": 0.8, "markersize": 3} if name else {"linestyle": "", "markersize": 5}
        axes.plot(*zip(*series, strict=True), color=colour, marker="o", markeredgecolor="white", **style)
        if name:
            axes.annotate(name, series[-1], xytext=(4, 0), textcoords="offset points", fontsize=7, color=colour)


def columns_of_runs(runs: list[Run]) -> tuple[list[Column], dict[str, str]]:
    """A column for each run, a colour for each flow; and the legend."""
    colours = dict(zip(flows_of(name for run in runs for name in run.metrics), cycle(COLOURS), strict=False))
    columns = [(run.label, [(run, flow, colours[flow]) for flow in run.flows()]) for run in runs]
    return columns, {TITLES.get(flow, flow): colour for flow, colour in colours.items()}


def columns_of_flows(runs: list[Run]) -> tuple[list[Column], dict[str, str]]:
    """A column for each flow, a colour for each run; and the legend."""
    coloured = [(run, COLOURS[index % len(COLOURS)]) for index, run in enumerate(runs)]
    flows = flows_of(name for run in runs for name in run.metrics)
    columns = [(TITLES.get(flow, flow), [(run, flow, colour) for run, colour in coloured]) for flow in flows]
    return columns, {run.label: colour for run, colour in coloured}


def plot(runs: list[Run], layout: str, title: str = "") -> Figure:
    """All curves of some runs; `layout` is of `LAYOUTS`."""
    columns, legend = columns_of_flows(runs) if layout == "overlay" else columns_of_runs(runs)
    rows = [row for row in ROWS if any(run.has(row) for run in runs)]
    size = (max(4.2 * len(columns), 6.5), 2.4 * len(rows) + 1)
    figure, grid = plt.subplots(
        len(rows), len(columns), figsize=size, squeeze=False, sharex="col", layout="constrained"
    )
    for place, (name, lines) in enumerate(columns):
        grid[0, place].set_title(name)
        grid[-1, place].set_xlabel("step")
        for axes, row in zip(grid[:, place], rows, strict=True):
            if row == "lr":
                _draw_rates(axes, lines, COLOURS[-1] if layout == "columns" else None)
                continue
            for run, flow, colour in lines:
                draw_train(axes, run.train(row, flow), colour)
                draw_held_out(axes, run.held_out(row, flow), colour)
    for axes, row in zip(grid, rows, strict=True):
        axes[0].set_ylabel(ROWS[row])
        if row != "lr":
            _same_limits(axes)
    held_out = any(run.held_out(row, flow) for run in runs for row in rows for flow in run.flows())
    _legend(figure, legend, held_out)
    figure.suptitle(title)
    return figure


def _draw_rates(axes: Axes, lines: list[tuple[Run, str, str]], colour: str | None) -> None:
    """The learning rate of each run once, in its own colour or in the given one."""
    for run, _, own in {id(run): (run, flow, own) for run, flow, own in lines}.values():
        if rate := run.train("lr", ""):
            axes.plot(*zip(*rate, strict=True), color=colour or own, linewidth=1.4)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)


def _same_limits(row: list[Axes]) -> None:
    """One scale for the panels of a row; spikes far above 99 % of all values are cut."""
    values = [value for axes in row for line in axes.lines for value in line.get_ydata()]
    low, most = min(values), float(np.percentile(values, 99))
    high = min(max(values), most + 0.3 * (most - low))
    margin = 0.05 * (high - low) or 0.1
    for axes in row:
        axes.set_ylim(low - margin, high + margin)


def _legend(figure: Figure, colours: dict[str, str], held_out: bool) -> None:
    handles = [Line2D([], [], color=colour, label=name, linewidth=1.6) for name, colour in colours.items()]
    handles.append(Line2D([], [], color="#777777", alpha=0.4, linewidth=0.7, label="as logged"))
    if held_out:
        handles.append(Line2D([], [], color="#777777", marker="o", linestyle="", markersize=5, label="held out"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))


# ---- command line ----


def read_runs(config) -> list[Run]:
    """Raises `UserError` for a run that cannot be read, or labels that do not fit the runs."""
    paths = [expand(part.strip()) for part in config.runs.split(",") if part.strip()]
    if not paths:
        raise UserError("runs is empty; give the output_dir of a run, or several with commas between them")
    labels = [label.strip() for label in config.labels.split(",")] if config.labels else [_label(p) for p in paths]
    if len(labels) != len(paths):
        raise UserError(f"labels={config.labels} are {len(labels)}, but runs are {len(paths)}; give one for each run")
    return [read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def _label(path: Path) -> str:
    path = real_path(path)
    return shown(path.parent.name if path.suffix == ".jsonl" else path.name)


def main(argv: list[str]) -> None:
    config = read_settings(argv, PlotConfig, "runs=outputs/stage1,outputs/stage2 output=curves.png")
    output = Path(config.output)
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if output.suffix.lstrip(".").lower() not in formats:
        raise UserError(f"output={config.output} must end in one of .{', .'.join(formats)}")
    owned = Owned(output.parent)
    owned.claim([output.name], f"output={config.output}")
    runs = read_runs(config)
    make_folder(output.parent)
    with plt.rc_context(STYLE):
        figure = plot(runs, config.layout, config.title)
        with writing(output) as temporary:
            figure.savefig(temporary, dpi=130, format=output.suffix[1:].lower())
    owned.record(output.name)
    plt.close(figure)
    print(f"{output}: {', '.join(run.label for run in runs)}")


if __name__ == "__main__":
    run_cli(main)
