"""Sampling rules of both loops: mask schedules, one MaskGIT step and its options, top-k / top-p (spec §6, §7, §8)."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# B images or prompts, N image positions, U of them with logits, C codes, V vocabulary
Schedule = Callable[[torch.Tensor], torch.Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None  # one for the batch, or one for each row
ORDERS = ("confidence", "halton")


@dataclass(frozen=True)
class SamplingParameters:
    """Ways to sample an image that are not the published one; the defaults give the published tokens.

    What each costs in quality is in docs/performance.md.

    Args:
        refresh_every: every so many steps all positions run; in between only those that were unknown at the last such
            step do, the others keep their keys and values.
        guidance_start, guidance_stop: guidance is used in steps k of K with start <= k / K < stop; the others run
            without the unconditional rows.
        order: in which positions become known: ``confidence`` (the published one) or ``halton``, a fixed order that
            spreads each step's positions evenly over the image and needs no noise.

    Raises:
        ValueError: a value out of its range.
    """

    refresh_every: int = 1
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    order: str = "confidence"

    def __post_init__(self):
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every is {self.refresh_every}, expected at least 1")
        if not 0 <= self.guidance_start <= self.guidance_stop <= 1:
            span = f"{self.guidance_start} and {self.guidance_stop}"
            raise ValueError(f"guidance_start and guidance_stop are {span}, expected 0 <= start <= stop <= 1")
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}, expected {' or '.join(ORDERS)}")

    def guides(self, step: int, timesteps: int) -> bool:
        """Whether guidance, if there is any, is used in this step."""
        return self.guidance_start <= step / timesteps < self.guidance_stop


def _sigmoid_schedule(t: torch.Tensor, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> torch.Tensor:
    v_start, v_end = (torch.sigmoid(torch.tensor(x / tau)) for x in (start, end))
    return (v_end - torch.sigmoid((t * (end - start) + start) / tau)) / (v_end - v_start)


def get_mask_schedule(name: str, **params) -> Schedule:
    """Mask probability as a function of time t in [0, 1]: 1 at t = 0, 0 at t = 1.

    Args:
        name: ``cosine``, ``linear``, ``sigmoid`` (params start, end, tau) or ``pow<k>``, e.g. ``pow2`` or ``pow0.5``.

    Raises:
        ValueError: unknown name, or parameters that give no number.
    """
    if name == "cosine":
        return lambda t: torch.cos(t * math.pi * 0.5)
    # Faithful: all but cosine are clipped (pinned by tests/parity/test_goldens.py).
    if name == "sigmoid":
        try:
            values = _sigmoid_schedule(torch.linspace(0, 1, 9), **params)
        except (ArithmeticError, TypeError) as error:
            raise ValueError(f"params {params} of the schedule cannot be used ({error}); give numbers") from None
        if not values.isfinite().all():
            raise ValueError(f"params {params} of the schedule give no number; start and end must differ, tau not be 0")
        return lambda t: _sigmoid_schedule(t, **params).clamp(1e-6, 1.0)
    power = re.fullmatch(r"pow(\d*\.?\d+)", "pow1" if name == "linear" else name)
    if power is None:
        raise ValueError(f"unknown mask schedule {name!r}; known: cosine, linear, sigmoid, pow<k> such as pow2")
    return lambda t: (1.0 - t ** float(power[1])).clamp(1e-6, 1.0)


def gumbel_noise(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gumbel(0, 1) noise of the shape, dtype and device of `like`; logs are clamped at 1e-20."""
    uniform = torch.zeros_like(like).uniform_(0, 1, generator=generator)
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def multinomial_at(
    probabilities: torch.Tensor, positions: torch.Tensor, num_positions: int, generator: torch.Generator | None
) -> torch.Tensor:
    """(B, U) int64: samples at `positions` exactly as `torch.multinomial` over all B·N rows would with this generator.

    Args:
        probabilities: (B, U, C) at the positions.
        positions: (B, U) int64, ascending.
        num_positions: N.
    """
    batch_size, _, num_codes = probabilities.shape
    whole = probabilities.new_ones(batch_size, num_positions, num_codes)
    whole.scatter_(1, positions[..., None].expand_as(probabilities), probabilities)
    drawn = torch.multinomial(whole.flatten(0, 1), 1, generator=generator).view(batch_size, num_positions)
    return drawn.gather(1, positions)


def by_row(draw: Callable, generator: Generators, *tensors: torch.Tensor) -> torch.Tensor:
    """``draw(*tensors, generator)``; with a generator for each row, of each row by itself."""
    if not isinstance(generator, Sequence):
        return draw(*tensors, generator)
    return torch.cat([draw(*row, one) for *row, one in zip(*(t.split(1) for t in tensors), generator, strict=True)])


def maskgit_step(
    logits: torch.Tensor,
    image_ids: torch.Tensor,
    mask_token_id: int,
    *,
    mask_ratio: torch.Tensor,
    temperature: float,
    generator: Generators = None,
    positions: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    multinomial_at: Callable = multinomial_at,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples all unknown codes and keeps the most confident ones (spec §7, steps 2 to 5).

    Args:
        logits: (B, U, C) over the image codes.
        image_ids: (B, N) codes 0…C−1, or `mask_token_id` where unknown.
        mask_ratio: scalar fp32 tensor, share of positions to leave masked.
        temperature: weight of the Gumbel noise on the confidence.
        generator: with one for each row, a row's draws do not depend on the others.
        positions: (B, U) int64, ascending, that the logits belong to: every unknown position and perhaps some known
            ones; default: all N.
        order: (N,) ranks in which positions become known, instead of the most confident ones first (not published).
        multinomial_at: a function that returns what this module's `multinomial_at` does.

    Returns:
        sampled: (B, N) codes; known positions keep their value.
        remaining: (B, N) bool, True where the next step must sample again.

    Raises:
        RuntimeError: logits that are not finite.
    """
    batch_size, num_positions = image_ids.shape
    if positions is None:
        positions = torch.arange(num_positions, device=image_ids.device).expand(batch_size, -1)
    probabilities = logits.softmax(dim=-1)
    if not probabilities[..., :1].isfinite().all():  # one NaN or infinity makes a whole row NaN
        raise RuntimeError("the logits of image codes are not all finite")

    def draw(probabilities: torch.Tensor, positions: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return multinomial_at(probabilities, positions, num_positions, generator)

    drawn = by_row(draw, generator, probabilities, positions)  # (B, U)
    chosen = probabilities.gather(-1, drawn[..., None])[..., 0]
    unknown = image_ids == mask_token_id
    sampled = torch.where(unknown, image_ids.scatter(1, positions, drawn), image_ids)

    largest = torch.full(unknown.shape, torch.finfo(chosen.dtype).max, dtype=chosen.dtype, device=chosen.device)
    confidence = torch.where(unknown, largest.scatter(1, positions, chosen), largest)
    num_masked = (num_positions * mask_ratio).floor()  # in fp32: at a ratio of 2/3 the cosine gives N/2 − 1
    num_masked = torch.minimum(unknown.sum(-1, keepdim=True) - 1, num_masked).clamp(min=1).long()  # (B, 1)

    if order is None:
        confidence = confidence.clamp(min=1e-20).log() + temperature * by_row(gumbel_noise, generator, confidence)
    else:
        confidence = torch.where(unknown, -order.to(confidence.dtype), largest)
    cut_off = confidence.sort(dim=-1).values.gather(-1, num_masked)
    return sampled, confidence < cut_off


def halton_order(num_positions: int) -> torch.Tensor:
    """(N,) int64, the rank of each position of a square image in the two-dimensional Halton sequence.

    Points with the bases 2 and 3 fall on the W × W grid; a position's rank is that of the first point in it.

    Raises:
        ValueError: N is no square.
    """
    side = math.isqrt(num_positions)
    if side**2 != num_positions:
        raise ValueError(f"order='halton' samples square images, not {num_positions} positions")
    ranks: dict[int, int] = {}
    point = 0
    while len(ranks) < num_positions:
        point += 1
        row, column = (int(_radical_inverse(point, base) * side) for base in (2, 3))
        ranks.setdefault(row * side + column, len(ranks))
    return torch.tensor([ranks[position] for position in range(num_positions)])


def _radical_inverse(number: int, base: int) -> float:
    """The digits of the number mirrored at the point, in [0, 1)."""
    value, unit = 0.0, 1.0
    while number:
        unit /= base
        number, digit = divmod(number, base)
        value += unit * digit
    return value


def is_greedy(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> bool:
    """Whether these settings of `sample_next` take the likeliest token; a ValueError for one out of its range."""
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected a number in (0, 1], or None")
    return top_k == 1 or temperature < 1e-9  # the limit; logits divided by less overflow


def sample_next(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Next token of each row: greedy for ``top_k=1`` or ``temperature=0``, otherwise one multinomial draw.

    Args:
        logits: (B, V).
        top_k: keep the k most likely tokens.
        top_p: then keep the smallest set whose probability reaches p, in (0, 1].

    Returns:
        (B,) int64.

    Raises:
        ValueError: a setting out of its range.
    """
    if is_greedy(temperature, top_k, top_p):
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the first token that crosses p stays
        beyond[:, 0] = False  # also where p is too small for float32
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
