"""The image loop with every sampling option, position by position in plain Python, which tests compare ours to."""

import math
from collections.abc import Callable

import torch

from models import SamplingParameters

MASK = None  # an unknown code
OPTIONS = {
    "order entropy": {"order": "entropy"},
    "order margin": {"order": "margin"},
    "order halton": {"order": "halton"},
    "order halton_roll": {"order": "halton_roll"},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.3},
    "logit_scale": {"logit_scale": 2.0},
    "guidance_ramp": {"guidance_ramp": 2.0, "guidance_start": 0.3},
    "cap": {"remask_rate": 0.4},
    "rescale": {"remask": "rescale", "remask_rate": 1.0},
    "confidence": {"remask": "confidence", "remask_rate": 1.0, "remask_start": 0.2, "remask_stop": 0.9},
    "several": {"order": "margin", "top_k": 20, "top_p": 0.9, "logit_scale": 1.2, "remask_rate": 0.3},
    "halton, masked again": {"order": "halton_roll", "remask": "rescale", "remask_rate": 0.7, "guidance_ramp": 1.0},
}


def generate(
    logits_at: Callable[[int, list], torch.Tensor],
    codes: list[list[int | None]],
    sampling: SamplingParameters,
    *,
    timesteps: int,
    temperature: float,
    schedule: Callable[[float], float],
    generator: torch.Generator,
) -> list[list[list[int]]]:
    """The codes of each step, as sampled.

    Args:
        logits_at: (step, codes) → (B, N, C), with guidance.
        codes: B lists of N.
    """
    codes, steps = [list(row) for row in codes], []
    rows, positions = range(len(codes)), range(len(codes[0]))
    given = [[code is not MASK for code in row] for row in codes]
    drawn_with = [{} for _ in rows]
    sequence = halton_sequence(math.isqrt(len(positions))) if "halton" in sampling.order else []
    shifts = [0 for _ in rows]
    if sampling.order == "halton_roll":
        shifts = torch.randint(len(positions), (len(rows), 1), generator=generator)[:, 0].tolist()
    for step in range(timesteps):
        logits = logits_at(step, codes).double()
        temperature *= 1 - (step + 1) / timesteps
        again = [set() for _ in rows]
        counts = [num_masked(row, schedule((step + 1) / timesteps)) for row in codes]
        if sampling.remask_rate > 0 and sampling.remask_start <= step / timesteps < sampling.remask_stop:
            uniform = torch.rand(len(rows), len(positions), generator=generator).tolist()
            for row in rows:
                known = [i for i in positions if codes[row][i] is not MASK and not given[row][i]]
                again[row] = masked_again(known, counts[row], drawn_with[row], sampling, uniform[row])
        factor = 1 + (sampling.logit_scale - 1) * step / max(timesteps - 1, 1)
        kept = [[distribution((factor * one).tolist(), sampling) for one in row] for row in logits]
        flat = torch.tensor([one for row in kept for one in row], dtype=torch.float32)
        drawn = torch.multinomial(flat, 1, generator=generator).view(len(rows), -1).tolist()
        noise = [[0.0 for _ in positions] for _ in rows]
        if not sequence:
            uniform = torch.rand(len(rows), len(positions), generator=generator).tolist()
            noise = [[-temperature * math.log(-math.log(max(u, 1e-20))) for u in row] for row in uniform]
        sampled = [[drawn[r][i] if codes[r][i] is MASK else codes[r][i] for i in positions] for r in rows]
        steps.append(sampled)
        for row in rows:
            unknown = [i for i in positions if codes[row][i] is MASK]
            for i in unknown:
                drawn_with[row][i] = kept[row][i][drawn[row][i]]
            if sequence:
                rolled = sequence[-shifts[row] :] + sequence[: -shifts[row]] if shifts[row] else sequence
                worst_first = [i for i in reversed(rolled) if i in unknown]
            else:
                score = {i: math.log(score_of(sampling.order, kept[row][i], drawn[row][i])) for i in unknown}
                worst_first = sorted(unknown, key=lambda i: score[i] + noise[row][i])  # noqa: B023
            left = again[row] | set(worst_first[: counts[row] - len(again[row])])
            codes[row] = [MASK if i in left else sampled[row][i] for i in positions]
    return steps


def num_masked(row: list, share: float) -> int:
    return max(1, min(row.count(MASK) - 1, math.floor(len(row) * share)))


def distribution(logits: list[float], sampling: SamplingParameters) -> list[float]:
    """Probabilities of the codes that top-k and then top-p leave."""
    best_first = sorted(range(len(logits)), key=lambda code: -logits[code])[: sampling.top_k]
    weights = {code: math.exp(logits[code] - logits[best_first[0]]) for code in best_first}
    total, kept, mass = sum(weights.values()), [], 0.0
    for code in best_first:
        if sampling.top_p is None or mass < sampling.top_p:
            kept.append(code)
        mass += weights[code] / total
    total = sum(weights[code] for code in kept)
    return [weights[code] / total if code in kept else 0.0 for code in range(len(logits))]


def score_of(order: str, probabilities: list[float], code: int) -> float:
    if order == "entropy":
        return math.exp(sum(p * math.log(p) for p in probabilities if p > 0))
    if order == "margin":
        best, second = sorted(probabilities)[:-3:-1]
        return max(best - second, 1e-20)
    return max(probabilities[code], 1e-20)


def masked_again(
    known: list[int], most: int, drawn_with: dict, sampling: SamplingParameters, uniform: list[float]
) -> set[int]:
    """ReMDM: each known position with its own probability, but at most so many: those that were the nearest to it."""
    if not known:
        return set()
    largest, rate = min(1.0, most / len(known)), sampling.remask_rate
    rates = dict.fromkeys(known, min(rate, largest) if sampling.remask == "cap" else rate * largest)
    if sampling.remask == "confidence":
        total = sum(math.exp(-drawn_with[i]) for i in known)
        rates = {i: rates[i] * math.exp(-drawn_with[i]) / total for i in known}
    chosen = [i for i in known if uniform[i] < rates[i]]
    return set(sorted(chosen, key=lambda i: uniform[i] / rates[i])[:most])


def halton_sequence(side: int) -> list[int]:
    """The cells of a square in the order in which Halton's points first fall into them."""
    cells, point = [], 1
    while len(cells) < side**2:
        row, column = (int(mirrored(point, base) * side) for base in (2, 3))
        if row * side + column not in cells:
            cells.append(row * side + column)
        point += 1
    return cells


def mirrored(number: int, base: int) -> float:
    digits = []
    while number:
        digits.append(number % base)
        number //= base
    return sum(digit / base ** (place + 1) for place, digit in enumerate(digits))
