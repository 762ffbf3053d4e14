"""`torch.multinomial` over the codes of all positions, at the positions that matter (SPEC §7, step 2)."""

from functools import cache

import torch

# B pictures, N positions, U of them wanted, C codes
CHUNK = 32  # rows that stay in the processor's cache


def multinomial_at(
    probabilities: torch.Tensor, positions: torch.Tensor, num_positions: int, generator: torch.Generator | None
) -> torch.Tensor:
    """(B, U) what one `torch.multinomial` over all B * N rows draws at some; it takes the same random numbers.

    Args:
        probabilities: (B, U, C) at the positions.
        positions: (B, U) int64, ascending.
    """
    batch_size, _, num_codes = probabilities.shape
    start = num_positions * torch.arange(batch_size, device=positions.device)[:, None]
    wanted, num_rows = (start + positions).flatten(), batch_size * num_positions  # ascending rows of the whole draw
    probabilities = probabilities.flatten(0, 1)
    if probabilities.device.type == "cpu" and probabilities.dtype == torch.float32 and exponential_is_plain():
        draw = _race(probabilities, wanted, num_rows, generator)
    elif len(wanted) == num_rows:
        draw = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    else:
        whole = probabilities.new_ones(num_rows, num_codes).index_copy(0, wanted, probabilities)
        draw = torch.multinomial(whole, 1, generator=generator)[wanted, 0]
    return draw.view(positions.shape)


def _race(
    probabilities: torch.Tensor, wanted: torch.Tensor, num_rows: int, generator: torch.Generator | None
) -> torch.Tensor:
    """`torch.multinomial` is the argmax of p / q with exponential q. Here all rows take their random numbers, but only
    the wanted ones become exponentials, with vectorised logarithms instead of torch's one at a time."""
    uniform = probabilities.new_empty(CHUNK, probabilities.shape[1], dtype=torch.float64)
    draw = torch.empty_like(wanted)
    firsts = range(0, num_rows, CHUNK)
    bounds = torch.searchsorted(wanted, torch.tensor([*firsts, num_rows])).tolist()
    for first, start, stop in zip(firsts, bounds, bounds[1:], strict=False):
        numbers = uniform[: num_rows - first].uniform_(generator=generator)
        if stop - start < len(numbers):
            numbers = numbers[wanted[start:stop] - first]
        minus_exponential = numbers.neg_().add_(1).log_().float()
        torch.argmin(probabilities[start:stop] / minus_exponential, -1, out=draw[start:stop])
    return draw


@cache
def exponential_is_plain() -> bool:
    """Whether this build of torch makes its exponential numbers as −log(1 − u), u uniform in fp64."""
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    uniform = torch.empty(4096, dtype=torch.float64).uniform_(generator=ours)
    same = torch.equal(-(1 - uniform).log().float(), torch.empty(4096).exponential_(generator=theirs))
    return same and torch.equal(ours.get_state(), theirs.get_state())
