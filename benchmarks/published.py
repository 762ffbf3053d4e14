"""The published algorithm, the one plain reference of benchmarks and tests: written from spec §5, §7 and §8.

It computes the same tokens and losses as `models`, at the published cost: each step runs the whole row under a dense
mask and takes the whole vocabulary at every position; no keys or values are kept. It shares only the network with what
it is compared to; the sampling and the order of the random draws are spelled out here once more.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers.activations import GELUTanh, NewGELUActivation

from models import OmniMask, Showo

# B prompts, L row length, N image positions, C codes, V vocabulary


@contextmanager
def published_activations(model: Showo) -> Iterator[None]:
    """The published GELU in its eight operations, where ours is the same formula as one (`models/backbones.py`)."""
    fused = use_published_activations(model)
    try:
        yield
    finally:
        for parent, name, module in fused:
            setattr(parent, name, module)


def use_published_activations(model: Showo) -> list[tuple]:
    """The same for good; returns (parent, name, module) of what was replaced.

    A language model whose own settings name the fused form keeps it.
    """
    if model.config.llm_config.get("hidden_act", "gelu_new") != "gelu_new":
        return []
    children = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    fused = [(parent, name, module) for parent, name, module in children if isinstance(module, GELUTanh)]
    for parent, name, _ in fused:
        setattr(parent, name, NewGELUActivation())
    return fused


def all_logits(model: Showo, input_ids: torch.Tensor, dense_mask: torch.Tensor, **features) -> torch.Tensor:
    """(B, L, V) logits of whole rows."""
    return model(input_ids, dense_mask, **features).logits.float()


@torch.no_grad()
def t2i_generate(
    model: Showo,
    input_ids: torch.Tensor,
    uncond_input_ids: torch.Tensor,
    *,
    guidance_scale: float | Sequence[float],
    timesteps: int,
    temperature: float,
    noise_schedule: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator | None = None,
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Image codes (B, N) by masked-token diffusion over `t2i_gen` rows (B, L); spec §7 step by step.

    Args:
        guidance_scale: one number, or one for each step (which is not published).
    """
    vocabulary = model.vocabulary
    mask_id, offset, num_codes = vocabulary.mask_token_id, vocabulary.image_offset, vocabulary.codebook_size
    soi_index = int((input_ids[0] == vocabulary.soi_id).nonzero()[0])
    image = slice(soi_index + 1, input_ids.shape[1] - 1)
    scales = [guidance_scale] * timesteps if isinstance(guidance_scale, int | float) else guidance_scale
    image_ids = input_ids[:, image]  # (B, N), with the vocabulary's offset
    codes = torch.where(image_ids == mask_id, mask_id, image_ids - offset)
    batch_size, num_positions = codes.shape
    for step, scale in enumerate(scales):
        image_ids = torch.where(codes == mask_id, mask_id, codes + offset)
        rows = torch.cat([input_ids, uncond_input_ids]) if scale > 0 else input_ids.clone()
        dense_mask = OmniMask.from_ids(rows, vocabulary).dense()
        rows[:, image] = image_ids.repeat(len(rows) // batch_size, 1)
        logits = all_logits(model, rows, dense_mask)  # (B or 2B, L, V)
        if scale > 0:
            cond, uncond = logits.chunk(2)
            logits = (1 + scale) * cond - scale * uncond
        probabilities = logits[:, image, offset : offset + num_codes].softmax(-1)  # (B, N, C)

        drawn = torch.multinomial(probabilities.reshape(-1, num_codes), 1, generator=generator)
        unknown = codes == mask_id
        sampled = torch.where(unknown, drawn.view(batch_size, num_positions), codes)
        chosen = probabilities.gather(-1, sampled[..., None])[..., 0]
        chosen = torch.where(unknown, chosen, torch.finfo(chosen.dtype).max)

        ratio = (step + 1) / timesteps
        temperature = temperature * (1.0 - ratio)
        num_masked = (num_positions * noise_schedule(torch.tensor(ratio))).floor().to(chosen.device)
        num_masked = torch.minimum(unknown.sum(-1, keepdim=True) - 1, num_masked).clamp(min=1).long()  # (B, 1)
        uniform = torch.zeros_like(chosen).uniform_(0, 1, generator=generator)
        gumbel = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        confidence = chosen.clamp(min=1e-20).log() + temperature * gumbel
        cut_off = confidence.sort(-1).values.gather(-1, num_masked)
        codes = torch.where(confidence < cut_off, mask_id, sampled)
        if callback is not None:
            callback(step, sampled)
    return sampled.clamp(0, num_codes - 1)


@torch.no_grad()
def mmu_generate(
    model: Showo, input_ids: torch.Tensor, *, max_new_tokens: int, eot_token: Collection[int] = (), **features
) -> torch.Tensor:
    """Greedy new ids (1, T) after one prompt (1, L), the end token included; every token recomputes everything."""
    length = input_ids.shape[1]
    dense_mask = OmniMask.from_ids(input_ids, model.vocabulary).extend(max_new_tokens).dense()
    row = input_ids
    for stop in range(length, length + max_new_tokens):
        logits = all_logits(model, row, dense_mask[:, :, :stop, :stop], **features)  # (1, stop, V)
        token = logits[:, -1].argmax(-1, keepdim=True)
        row = torch.cat([row, token], dim=1)
        if token.item() in eot_token:
            break
    return row[:, length:]


def losses(
    model: Showo,
    input_ids: torch.Tensor,
    attention_mask: OmniMask,
    labels: torch.Tensor,
    counts: tuple[int, int, int],
    max_seq_length: int,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The t2i, lm and mmu losses (spec §5) from the logits of every position; `counts` are the rows of each task."""

    def cross_entropy(logits, labels):
        settings = {"ignore_index": -100, "label_smoothing": label_smoothing}
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), **settings)

    logits = all_logits(model, input_ids, attention_mask.dense())  # (B, L, V)
    logits_t2i, logits_lm, logits_mmu = logits.split(counts)
    labels_t2i, labels_lm, labels_mmu = labels.split(counts)
    first = max_seq_length + 1
    return (
        cross_entropy(logits_t2i[:, first:], labels_t2i[:, first:]),
        cross_entropy(logits_lm[:, :-1], labels_lm[:, 1:]),
        cross_entropy(logits_mmu[:, :-1], labels_mmu[:, 1:]),
    )
