"""Fréchet distance of two sets of features, of any number of images, and how much it moves from sample to sample.

It is the squared distance of the two normal distributions that have the sets' means and covariances:
|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½). Few images make it large whatever they show, so two distances compare only
between sets of the same size.
"""

import numpy as np
import torch

RESAMPLES = 100  # each takes a decomposition of a square matrix with a row for each image


def frechet_distance(first: torch.Tensor, second: torch.Tensor, times: torch.Tensor | None = None) -> float:
    """The distance between (N, F) and (N, F) features, row i of both about the same thing.

    The trace of the root is the nuclear norm of A Bᵀ, with A and B the centred and scaled features: an N x N matrix
    and no root of an ill-conditioned F x F one.

    Args:
        times: (N,) how often each row counts; default: once.
    """
    first, second = first.double(), second.double()
    times = torch.ones(len(first)).double() if times is None else times.double()
    kept, total = times > 0, times.sum()
    first, second, times = first[kept], second[kept], times[kept, None]
    means = [(times * rows).sum(0) / total for rows in (first, second)]
    scale = (times / (total - 1)).sqrt()
    one, two = (scale * (rows - mean) for rows, mean in zip((first, second), means, strict=True))
    root = torch.linalg.svdvals(one @ two.T).sum()
    return float((means[0] - means[1]).square().sum() + one.square().sum() + two.square().sum() - 2 * root)


def frechet_figures(first: torch.Tensor, second: torch.Tensor, samples: int, seed: int) -> np.ndarray:
    """(1 + R,): the distance, and that of R resamples of the rows; R is 100 at most."""
    rng, size = np.random.default_rng(seed), len(first)
    drawn = rng.multinomial(size, np.full(size, 1 / size), min(samples, RESAMPLES))
    resampled = [frechet_distance(first, second, torch.from_numpy(times)) for times in drawn]
    return np.array([frechet_distance(first, second), *resampled])
