"""95 % intervals by percentile bootstrap: groups of items are resampled within strata of fixed size."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from evaluation.official_files import field, read_json, write_json

CHUNK = 50  # resamples at once
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

    def save(self, path: Path) -> None:
        columns = {name: values.tolist() for name, values in self.columns.items()}
        write_json(path, {"groups": self.groups, "strata": self.strata, "columns": columns})

    @classmethod
    def load(cls, path: Path) -> "Counts":
        tree = read_json(path, dict, "the counts that evaluate.py writes for each task")
        groups, strata = (field(str(path), tree, name, list) for name in ("groups", "strata"))
        columns = field(str(path), tree, "columns", dict)
        if any(len(values) != len(groups) for values in (strata, *columns.values())):
            raise UserError(f"{path}: its fields differ in length; expected one value for each group")
        return cls(groups, strata, {name: np.array(values, dtype=float) for name, values in columns.items()})

    def totals(self) -> Mapping[str, np.ndarray]:
        return _sums({name: values.sum() for name, values in self.columns.items()}, ())

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
        return _sums(dict(zip(self.columns, sums.T, strict=True)), (samples,))


def _sums(columns: dict[str, np.ndarray], shape: tuple[int, ...]) -> Mapping[str, np.ndarray]:
    return defaultdict(lambda: np.zeros(shape), columns)


@dataclass
class Estimate:
    """A figure with its 95 % interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


def estimates(counts: Counts, figures: Figures, samples: int, seed: int) -> dict[str, Estimate]:
    """Every figure of a task with its interval."""
    values, drawn = figures(counts.totals()), figures(counts.resampled(samples, seed))
    return {name: Estimate(float(value), *_interval(drawn[name])) for name, value in values.items()}


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


def differences(first: Counts, second: Counts, figures: Figures, samples: int, seed: int) -> dict[str, Difference]:
    """Every figure of two runs that asked the same, resampled together.

    Args:
        first, second: the same groups and strata in one order.
    """
    assert first.groups == second.groups and first.strata == second.strata
    one, two = figures(first.totals()), figures(second.totals())
    drawn_one, drawn_two = (figures(counts.resampled(samples, seed)) for counts in (first, second))
    found = {}
    for name in one:
        drawn = drawn_two[name] - drawn_one[name]
        tail = min((drawn <= 0).mean(), (drawn >= 0).mean())
        p = float(min(1.0, max(2 * tail, 2 / samples)))
        found[name] = Difference(
            float(one[name]), float(two[name]), Estimate(float(two[name] - one[name]), *_interval(drawn)), p
        )
    return found


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
    """What the second has more of a figure of a whole set; p is that of a normal distribution."""
    difference = set_estimate(second - first)
    spread = difference.high - difference.value if difference.high is not None else None
    shift = abs(difference.value)
    p = None if spread is None else math.erfc(1.96 * shift / spread / math.sqrt(2)) if spread else float(not shift)
    return Difference(float(first[0]), float(second[0]), difference, p)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
