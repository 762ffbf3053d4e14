"""Sampling rules of both loops: mask schedules, one MaskGIT step and its options, top-k / top-p (spec §6, §7, §8)."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# B images or prompts, N image positions, U of them with logits, C codes, V vocabulary
Schedule = Callable[[torch.Tensor], torch.Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None  # one for the batch, or one for each row
ORDERS = ("confidence", "entropy", "margin", "halton", "halton_roll")
REMASKING = ("cap", "rescale", "confidence")


@dataclass(frozen=True)
class SamplingParameters:
    """Ways to sample an image that are not the published one; the defaults give the published tokens.

    Step k of K counts from 0. What each costs in quality is in docs/performance.md.

    Args:
        order: in which positions become known. By what the model makes of them, with noise (`maskgit_step`):
            ``confidence``, the probability of the sampled code (the published one); ``entropy``, the least entropy
            first; ``margin``, the largest gap between the two likeliest codes first (arXiv 2502.06768). Or in a fixed
            order, without noise: ``halton`` spreads each step's positions evenly over the image (arXiv 2503.17076);
            ``halton_roll`` begins that sequence at a random place for each image, as its authors do, with the schedule
            ``arccos``. (Their code rounds the number of known tokens down, this loop up; and it samples known tokens
            again in every step, which here stay.)
        top_k, top_p: codes are sampled among the k likeliest, then among those whose probability reaches p, see
            `sample_next`; None: all. Show-o-Turbo takes k = 200 for 2 steps and 500 for 4 (arXiv 2502.05415).
        logit_scale: the logits of codes are multiplied by ``1 + (logit_scale − 1) k / (K − 1)``; Halton's authors, who
            call it a temperature, take 1.2.
        guidance_start, guidance_stop: guidance is used in steps with start <= k / K < stop. The others run without the
            unconditional rows (those of documents run, and are not used).
        guidance_ramp: its scale is multiplied by ``((k + 1) / K) ** guidance_ramp``; 1: rises linearly, as Muse's
            (arXiv 2301.00704).
        remask: how known tokens are masked again: ``cap``, ``rescale`` or ``confidence``, see `remasked_positions`.
        remask_rate: how often, from 0 (never) to 1.
        remask_start, remask_stop: in steps with start <= k / K < stop.
        refresh_every: every so many steps all positions run. In between a position runs if its token has changed since
            it last ran, or if it is among the least sure unknown ones; the others keep keys, values and logits.
        refresh_share: the share of the unknown positions that are the least sure ones: those with the smallest largest
            logit when they last ran. As ML-Cache (arXiv 2510.06308: 0.1, with `refresh_every` 5 and `refresh_warmup`
            0.3), whose tokens do not run when they become known and whose guidance chooses positions of its own.
        refresh_warmup: in steps with k / K < refresh_warmup all positions run.

    Raises:
        ValueError: a value out of its range.
    """

    order: str = "confidence"
    top_k: int | None = None
    top_p: float | None = None
    logit_scale: float = 1.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    guidance_ramp: float = 0.0
    remask: str = "cap"
    remask_rate: float = 0.0
    remask_start: float = 0.0
    remask_stop: float = 1.0
    refresh_every: int = 1
    refresh_share: float = 1.0
    refresh_warmup: float = 0.0

    def __post_init__(self):
        is_greedy(top_k=self.top_k, top_p=self.top_p)
        checks = {
            "order": (self.order in ORDERS, " or ".join(ORDERS)),
            "logit_scale": (self.logit_scale > 0, "more than 0"),
            "guidance_ramp": (self.guidance_ramp >= 0, "at least 0"),
            "remask": (self.remask in REMASKING, " or ".join(REMASKING)),
            "remask_rate": (0 <= self.remask_rate <= 1, "0 to 1"),
            "refresh_every": (self.refresh_every >= 1, "at least 1"),
            "refresh_share": (0 < self.refresh_share <= 1, "more than 0, up to 1"),
            "refresh_warmup": (0 <= self.refresh_warmup <= 1, "0 to 1"),
        }
        for name, (is_right, expected) in checks.items():
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        for name in ("guidance", "remask"):
            start, stop = getattr(self, f"{name}_start"), getattr(self, f"{name}_stop")
            if not 0 <= start <= stop <= 1:
                raise ValueError(
                    f"{name}_start and {name}_stop are {start} and {stop}, expected 0 <= start <= stop <= 1"
                )
        if self.remask_rate == 0 and self.remask != "cap":
            raise ValueError(f"remask is {self.remask!r}, but remask_rate is 0: nothing is masked again; give a rate")

    def guidance_at(self, step: int, timesteps: int) -> float:
        """The factor of the guidance scale in this step, from 0 to 1."""
        used = self.guidance_start <= step / timesteps < self.guidance_stop
        return ((step + 1) / timesteps) ** self.guidance_ramp if used else 0.0

    def remasks(self, step: int, timesteps: int) -> bool:
        """Whether known tokens may be masked again after this step."""
        return self.remask_rate > 0 and self.remask_start <= step / timesteps < self.remask_stop

    def shaped(self, logits: torch.Tensor, step: int, timesteps: int) -> torch.Tensor:
        """Logits (..., C) of the codes in this step after `logit_scale`, `top_k` and `top_p`."""
        scale = 1 + (self.logit_scale - 1) * step / max(timesteps - 1, 1)
        return truncated(logits if scale == 1 else logits * scale, self.top_k, self.top_p)


def _sigmoid_schedule(t: torch.Tensor, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> torch.Tensor:
    v_start, v_end = (torch.sigmoid(torch.tensor(x / tau)) for x in (start, end))
    return (v_end - torch.sigmoid((t * (end - start) + start) / tau)) / (v_end - v_start)


def get_mask_schedule(name: str, **params) -> Schedule:
    """Mask probability as a function of time t in [0, 1]: 1 at t = 0, 0 at t = 1.

    Args:
        name: ``cosine``, ``linear``, ``sigmoid`` (params start, end, tau), ``pow<k>``, e.g. ``pow2`` or ``pow0.5``, or
            ``arccos`` (not published), which Halton's authors use.

    Raises:
        ValueError: unknown name, or parameters that give no number.
    """
    if name == "cosine":
        return lambda t: torch.cos(t * math.pi * 0.5)
    if name == "arccos":
        return lambda t: torch.arccos(t) / (math.pi * 0.5)
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
        raise ValueError(f"unknown mask schedule {name!r}; known: cosine, linear, sigmoid, arccos, pow<k> such as pow2")
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
    order: str | torch.Tensor = "confidence",
    remasked: torch.Tensor | None = None,
    multinomial_at: Callable = multinomial_at,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples all unknown codes and keeps the most confident ones (spec §7, steps 2 to 5).

    Args:
        logits: (B, U, C) over the image codes.
        image_ids: (B, N) codes 0…C−1, or `mask_token_id` where unknown.
        mask_ratio: scalar fp32 tensor, share of positions to leave masked.
        temperature: weight of the Gumbel noise on the confidence.
        generator: with one for each row, a row's draws do not depend on the others.
        positions: (B, U) int64, ascending, that the logits belong to: every unknown position and perhaps some known
            ones; default: all N.
        order: what confidence is, see `confidence_of` (only ``confidence`` is published); or ranks (N,) or (B, N) in
            which positions become known, without noise.
        remasked: (B, N) bool, known positions to mask again, of `remasked_positions`; they count among those left
            masked, so that as many unknown ones more are kept.
        multinomial_at: a function that returns what this module's `multinomial_at` does.

    Returns:
        sampled: (B, N) codes; known positions keep their value.
        remaining: (B, N) bool, True where the next step must sample again.
        probability: (B, N) of the sampled codes, 1 where a code was known.

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

    def at_unknown(values: torch.Tensor, elsewhere: float) -> torch.Tensor:
        whole = values.new_full(unknown.shape, elsewhere)
        return torch.where(unknown, whole.scatter(1, positions, values), whole)

    largest = torch.finfo(chosen.dtype).max
    if isinstance(order, str):
        confidence = at_unknown(confidence_of(order, probabilities, chosen), largest)
        confidence = confidence.clamp(min=1e-20).log() + temperature * by_row(gumbel_noise, generator, confidence)
    else:
        confidence = torch.where(unknown, -order.to(chosen.dtype), largest)
    if remasked is not None:
        confidence = confidence.masked_fill(remasked, -largest)
    cut_off = confidence.sort(dim=-1).values.gather(-1, count_masked(unknown, mask_ratio))
    return sampled, confidence < cut_off, at_unknown(chosen, 1.0)


def count_masked(unknown: torch.Tensor, mask_ratio: torch.Tensor) -> torch.Tensor:
    """(B, 1) int64, how many positions a step with unknown ones (B, N) leaves masked: one fewer at least."""
    num_masked = (unknown.shape[1] * mask_ratio).floor()  # in fp32: at a ratio of 2/3 the cosine gives N/2 − 1
    return torch.minimum(unknown.sum(-1, keepdim=True) - 1, num_masked).clamp(min=1).long()


def confidence_of(order: str, probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(B, U) confidence in (0, 1], of which `maskgit_step` takes the logarithm, of codes that were sampled.

    Args:
        order: ``confidence``: the code's own probability; ``entropy``: exp(−H), the geometric mean of probabilities;
            ``margin``: the gap between the two largest probabilities.
        probabilities: (B, U, C).
        chosen: (B, U), those of the codes.
    """
    if order == "entropy":
        return torch.special.entr(probabilities).sum(-1).neg().exp()
    if order == "margin":
        return probabilities.topk(2).values.diff(dim=-1).neg()[..., 0]
    return chosen


def remasked_positions(
    sampling: SamplingParameters,
    is_free: torch.Tensor,
    unknown: torch.Tensor,
    probability: torch.Tensor,
    num_masked: torch.Tensor,
    generator: Generators = None,
) -> torch.Tensor:
    """(B, N) bool, known positions that a step masks again, at most `num_masked` in a row: ReMDM (arXiv 2503.00307).

    A share α_t of all tokens is known before a step, α_s after it. ReMDM masks each known token again with probability
    σ <= σ_max = min(1, (1 − α_s) / α_t), and makes so many more unknown ones known that the expected share of masked
    tokens stays 1 − α_s. It has three forms of σ, here with η for `remask_rate`:

        cap         min(η, σ_max)
        rescale     η σ_max
        confidence  η σ_max softmax(−ψ) over the known tokens, ψ the probability with which a token was sampled

    MaskGIT's loop does not draw the number of masked tokens: n are left after a step. So σ_max is min(1, n / f), where
    f tokens were known before; those that the caller gave do not count and are never masked. If r tokens are masked
    again, n − r of the unknown ones stay masked, the least confident ones. ReMDM's loop, which holds α for a while,
    is not offered.

    Args:
        is_free: (B, N) bool, positions that were unknown at the beginning.
        unknown: (B, N) bool, those unknown before the step.
        probability: (B, N), ψ of known positions.
        num_masked: (B, 1) int64, n.
    """
    known = is_free & ~unknown
    sigma = (num_masked / known.sum(1, keepdim=True)).clamp(max=1).expand_as(probability)
    if sampling.remask == "cap":
        sigma = sigma.clamp(max=sampling.remask_rate)
    else:
        sigma = sampling.remask_rate * sigma
    if sampling.remask == "confidence":
        sigma = sigma * (-probability).masked_fill(~known, -torch.inf).softmax(-1)
    drawn = by_row(lambda like, generator: torch.zeros_like(like).uniform_(generator=generator), generator, probability)
    drawn = torch.where(known, drawn / sigma, torch.inf)  # below 1 with probability σ
    return drawn < drawn.sort(dim=-1).values.gather(-1, num_masked).clamp(max=1)


def position_order(order: str, codes: torch.Tensor, generator: Generators = None) -> str | torch.Tensor:
    """The argument `order` of `maskgit_step` for images of codes (B, N): the name, or Halton ranks (N,) or (B, N)."""
    if not order.startswith("halton"):
        return order
    ranks = halton_order(codes.shape[1]).to(codes.device)
    if order == "halton":
        return ranks

    def draw(row: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return torch.randint(row.shape[1], (len(row), 1), generator=generator, device=row.device)

    return (ranks + by_row(draw, generator, codes)) % codes.shape[1]


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
    logits = truncated(logits / temperature, top_k, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def truncated(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Logits (..., V), minus infinity where `sample_next` says that an entry is not kept."""
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the first token that crosses p stays
        beyond[..., 0] = False  # also where p is too small for float32
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
    return logits
