"""Faster ways to draw that change the picture: all off by default, what each costs stands in docs/performance.md."""

import math
from dataclasses import dataclass

import torch

ORDERS = ("confidence", "halton")


@dataclass(frozen=True)
class DrawingOptions:
    """Options of `t2i_generate`; the defaults draw the published tokens.

    Args:
        refresh_every: every so many steps all positions run; in between only those that were unknown at the last such
            step do, the others keep their keys and values.
        guidance_start, guidance_stop: guidance is used in steps k of K with start <= k / K < stop; the others run
            without the unconditional rows.
        order: in which positions become known: ``confidence`` (the published one) or ``halton``, a fixed order that
            spreads each step's positions evenly over the picture and needs no noise.

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


def halton_order(num_positions: int) -> torch.Tensor:
    """(N,) int64, the place of each position of a square picture in the two-dimensional Halton sequence.

    Points with the bases 2 and 3 fall on the W * W grid; a position's place is that of the first point in it.

    Raises:
        ValueError: N is no square.
    """
    side = math.isqrt(num_positions)
    if side**2 != num_positions:
        raise ValueError(f"order='halton' draws square pictures, not {num_positions} positions")
    places: dict[int, int] = {}
    point = 0
    while len(places) < num_positions:
        point += 1
        row, column = (int(_radical_inverse(point, base) * side) for base in (2, 3))
        places.setdefault(row * side + column, len(places))
    return torch.tensor([places[position] for position in range(num_positions)])


def _radical_inverse(number: int, base: int) -> float:
    """The digits of the number mirrored at the point, in [0, 1)."""
    value, unit = 0.0, 1.0
    while number:
        unit /= base
        number, digit = divmod(number, base)
        value += unit * digit
    return value
