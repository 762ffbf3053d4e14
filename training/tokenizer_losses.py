"""Losses for training an image tokenizer: pixels, edges, features of a frozen network, and how codes are used.

The published quantiser losses (spec §10) treat every bit alone. Here the entropy of the codebook is computed over
groups of bits: within a group all combinations are told apart, so bits cannot copy each other, and a group of 7 bits
needs 128 probabilities per token where a whole 13-bit code would need 8192.
"""

import torch
import torch.nn.functional as F

from models.modeling_magvitv2 import bit_entropy, distribution_entropy


def edge_loss(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical gradients of two (B, C, H, W) images."""
    error = reconstruction - pixels  # gradients are linear: the gradient of the error is the error of the gradients
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def bit_groups(code_bits: int, max_group_bits: int) -> list[range]:
    """Split `code_bits` bits into the fewest groups of at most `max_group_bits`, as even as possible."""
    num_groups = -(-code_bits // max_group_bits)
    bounds = [-(-code_bits * i // num_groups) for i in range(num_groups + 1)]
    return [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def joint_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """(T, G) logits of independent bits -> (T, 2^G) probabilities of all their combinations, first bit highest."""
    joint = torch.ones_like(logits[:, :1])
    for bit in logits.unbind(1):
        zero_one = torch.sigmoid(torch.stack([-bit, bit], dim=1))  # (T, 2)
        joint = (joint[:, :, None] * zero_one[:, None]).flatten(1)
    return joint


def code_entropies(latents: torch.Tensor, max_group_bits: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """How sure each token is of its code, and how evenly codes are used.

    Args:
        latents: (B, K, h, w) before quantisation.
        max_group_bits: size of the groups over which code use is counted; K or more counts whole codes.

    Returns:
        Two scalars in nats, float32: the mean entropy of one token's code (to be made small), and the entropy of the
        mean distribution over tokens, summed over groups (to be made large; at most K ln 2).
    """
    logits = 4 * latents.float().permute(0, 2, 3, 1).flatten(0, 2)  # (T, K) from -(z-1)^2 and -(z+1)^2
    per_token = bit_entropy(logits).sum(1).mean()
    of_the_mean = sum(
        distribution_entropy(joint_probabilities(logits[:, group.start : group.stop]).mean(0)).sum()
        for group in bit_groups(logits.shape[1], max_group_bits)
    )
    return per_token, of_the_mean


def commitment_loss(latents: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of (B, K, h, w) latents from the cube's corner that is their code."""
    latents = latents.float()
    return F.mse_loss(latents, torch.where(latents > 0, 1.0, -1.0))
