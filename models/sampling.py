"""What the sampler and the training noise share: mask schedules, one MaskGIT step, top-k / top-p (SPEC §6, §7)."""

import math
from collections.abc import Callable

import torch

from models.multinomial import multinomial_at

Schedule = Callable[[torch.Tensor], torch.Tensor]


def _sigmoid_schedule(t: torch.Tensor, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> torch.Tensor:
    v_start, v_end = (torch.sigmoid(torch.tensor(x / tau)) for x in (start, end))
    return (v_end - torch.sigmoid((t * (end - start) + start) / tau)) / (v_end - v_start)


def get_mask_schedule(name: str, **params) -> Schedule:
    """Mask probability as a function of time t in [0, 1]: 1 at t = 0, 0 at t = 1.

    Args:
        name: ``cosine``, ``linear``, ``sigmoid`` (params start, end, tau) or ``pow<k>``, e.g. ``pow2`` or ``pow0.5``.

    Raises:
        ValueError: unknown name.
    """
    if name == "cosine":
        return lambda t: torch.cos(t * math.pi * 0.5)
    if name == "linear":
        curve = _power_schedule(1.0)
    elif name == "sigmoid":
        curve = lambda t: _sigmoid_schedule(t, **params)  # noqa: E731
    elif name.startswith("pow") and _is_number(name[3:]):
        curve = _power_schedule(float(name[3:]))
    else:
        raise ValueError(f"unknown mask schedule {name!r}; known: cosine, linear, sigmoid, pow<k> such as pow2")
    # Faithful: all but cosine are clipped (pinned by tests/parity/test_goldens.py).
    return lambda t: curve(t).clamp(1e-6, 1.0)


def _power_schedule(exponent: float) -> Schedule:
    return lambda t: 1.0 - t**exponent


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def gumbel_noise(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gumbel(0, 1) noise of the shape, dtype and device of `like`; logs are clamped at 1e-20."""
    uniform = torch.zeros_like(like).uniform_(0, 1, generator=generator)
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def maskgit_step(
    logits: torch.Tensor,
    image_ids: torch.Tensor,
    mask_token_id: int,
    *,
    mask_ratio: torch.Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
    positions: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws all unknown codes, keeps the most confident ones (SPEC §7, steps 2 to 5).

    Args:
        logits: (B, U, C) over the image codes.
        image_ids: (B, N) codes 0…C−1, or `mask_token_id` where unknown.
        mask_ratio: scalar fp32 tensor, share of positions to leave masked.
        temperature: weight of the Gumbel noise on the confidence.
        positions: (B, U) int64, ascending, where the logits stand: every unknown position and perhaps some known ones;
            default: all N.
        order: (N,) places in which positions become known, instead of the most confident ones first (not published).

    Returns:
        sampled: (B, N) codes, the draw; known positions keep their value.
        remaining: (B, N) bool, True where the next step must draw again.

    Raises:
        RuntimeError: logits that are not finite.
    """
    batch_size, num_positions = image_ids.shape
    if positions is None:
        positions = torch.arange(num_positions, device=image_ids.device).expand(batch_size, -1)
    probabilities = logits.softmax(dim=-1)
    drawn = multinomial_at(probabilities, positions, num_positions, generator)  # (B, U)
    chosen = probabilities.gather(-1, drawn[..., None])[..., 0]
    if not chosen.isfinite().all():
        raise RuntimeError("the logits of image codes are not all finite")
    unknown = image_ids == mask_token_id
    sampled = torch.where(unknown, image_ids.scatter(1, positions, drawn), image_ids)

    largest = torch.full(unknown.shape, torch.finfo(chosen.dtype).max, dtype=chosen.dtype, device=chosen.device)
    confidence = torch.where(unknown, largest.scatter(1, positions, chosen), largest)
    num_masked = (num_positions * mask_ratio).floor()  # in fp32: at a ratio of 2/3 the cosine gives N/2 − 1
    num_masked = torch.minimum(unknown.sum(-1, keepdim=True) - 1, num_masked).clamp(min=1).long()  # (B, 1)

    if order is None:
        confidence = confidence.clamp(min=1e-20).log() + temperature * gumbel_noise(confidence, generator)
    else:
        confidence = torch.where(unknown, -order.to(confidence.dtype), largest)
    cut_off = confidence.sort(dim=-1).values.gather(-1, num_masked)
    return sampled, confidence < cut_off


def is_greedy(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> bool:
    """Whether these settings of `sample_next` take the likeliest token; a ValueError for one out of its range."""
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected a number in (0, 1], or None")
    return top_k == 1 or temperature == 0


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
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
