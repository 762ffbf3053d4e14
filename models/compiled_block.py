"""A drawing step as one compiled graph of fixed shapes, for `torch.compile` and, on a GPU, CUDA graphs.

Every step runs ``<soi>`` + all N positions + ``<eoi>``, so one graph serves all steps; the text before them is padded
on the left up to a multiple of `BUCKET` positions in all, so prompts of other lengths mostly find their graph made.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.image_block import common_soi
from models.incremental import PlainPhi
from models.omni_attention import OmniMask
from models.vocabulary import Vocabulary

# R rows, B pictures (R = B, or 2 B with guidance), N positions, P of padding and text, C codes, H hidden, d head size
BUCKET = 64


class CompiledBlock:
    """As `ImageBlock`, for a model whose weights alone say what it computes."""

    def __init__(self, model, rows: torch.Tensor, batch_size: int, guidance_scale: float):
        vocabulary = model.vocabulary
        text, block = _bucketed(rows, vocabulary)
        num_texts, length = text.shape[1], text.shape[1] + block.shape[1]
        self.vocabulary, self.phi = vocabulary, model.showo.model
        self.ids = block[:batch_size].clone()  # (B, N+2)
        transformer = PlainPhi(model, OmniMask.from_ids(torch.cat([text, block], dim=1), vocabulary))
        transformer.extend(text, needed=text.new_empty(len(text), 0))
        pairs = [torch.stack([layer.keys, layer.values]) for layer in transformer.layers]
        self.past = torch.stack(pairs)[:, :, :, :num_texts].transpose(3, 4).contiguous()  # (layers, 2, R, heads, P, d)
        self.cos, self.sin = (x[:, num_texts:length].transpose(1, 2) for x in (transformer.cos, transformer.sin))
        visible = transformer.mask.rows(num_texts, length).dense()[:, :, :1]  # the whole block sees the same
        self.bias = torch.zeros_like(visible, dtype=self.cos.dtype).masked_fill(~visible, -torch.inf)
        self.scale = torch.tensor(guidance_scale, device=rows.device)  # as a number it would be compiled in
        codes = slice(vocabulary.image_offset, vocabulary.image_offset + vocabulary.codebook_size)
        self.head = model.showo.lm_head.weight[codes], model.showo.lm_head.bias[codes]

    def positions(self, step: int, unknown: torch.Tensor) -> torch.Tensor:
        """All (B, N)."""
        return torch.arange(unknown.shape[1], device=unknown.device).expand_as(unknown)

    def code_logits(self, codes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (B, N, C) in fp32, until the next call; of codes (B, N) or mask tokens."""
        self.ids[:, 1:-1] = torch.where(
            codes == self.vocabulary.mask_token_id, codes, codes + self.vocabulary.image_offset
        )
        torch.compiler.cudagraph_mark_step_begin()
        run = _on_gpu if self.ids.is_cuda else _on_cpu
        return run(self.phi, *self.head, self.ids, self.past, self.cos, self.sin, self.bias, self.scale)


def _bucketed(rows: torch.Tensor, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, L) ids -> (R, P) padding and text, (R, N+2) block."""
    start = common_soi(rows, vocabulary)
    num_texts = start - int((rows == vocabulary.pad_id).sum(1).min())
    length = rows.shape[1] - start
    room = -(num_texts + length) % BUCKET + num_texts
    return F.pad(rows[:, :start], (room, 0), value=vocabulary.pad_id)[:, -room:], rows[:, start:]


def _step(phi, head_weight, head_bias, ids, past, cos, sin, bias, scale) -> torch.Tensor:
    """(B, N+2) ids -> (B, N, C) logits."""
    hidden = phi.embed_tokens(ids)
    for layer, kept in zip(phi.layers, past, strict=True):
        hidden = _layer(layer, hidden, kept, cos, sin, bias)
    hidden = phi.final_layernorm(hidden)[:, 1:-1]
    if len(hidden) > len(ids):
        cond, uncond = hidden.float().chunk(2)
        hidden = ((1 + scale) * cond - scale * uncond).to(hidden.dtype)
    return F.linear(hidden, head_weight, head_bias).float()


def _layer(layer: nn.Module, hidden, past, cos, sin, bias) -> torch.Tensor:
    """(R or B, n, H) -> (R, n, H); past (2, R, heads, P, d)."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)

    def heads(linear: nn.Linear) -> torch.Tensor:  # (rows, heads, n, d)
        return linear(normed).view(*normed.shape[:2], -1, attention.head_dim).transpose(1, 2)

    query = _rotated(attention.q_layernorm(heads(attention.q_proj)), cos, sin)
    key = _rotated(attention.k_layernorm(heads(attention.k_proj)), cos, sin)
    value, own, groups = heads(attention.v_proj), hidden + layer.mlp(normed), past.shape[1] // len(hidden)
    if groups > 1:  # the first layer: the same picture with and without text
        query, key, value = (x.repeat(groups, 1, 1, 1) for x in (query, key, value))
        own = own.repeat(groups, 1, 1)
    keys, values = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
    return own + attention.dense(mixed.transpose(1, 2).flatten(2))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of (rows, heads, n, d)."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


_on_cpu = torch.compile(_step, fullgraph=True, dynamic=False)
_on_gpu = torch.compile(_step, fullgraph=True, dynamic=False, mode="reduce-overhead")
