"""The rows of `t2i_generate` from step to step: their text is computed once, the picture as far as it changes."""

import torch

from models.incremental import PlainPhi, incremental
from models.omni_attention import OmniMask
from models.plain_layer import Buffers
from models.vocabulary import Vocabulary

# B pictures, N positions, U of them that are looked at, C codes, T text positions, H hidden size


class ImageBlock:
    """Code logits of ``<soi>`` + N + ``<eoi>``; the first step runs the text before it, too.

    Args:
        rows: (B or 2B, L) ids, conditional and unconditional.
        batch_size: B.
        guidance_scale: w in ``(1 + w) cond − w uncond``; 0 with B rows.
        refresh_every: see `DrawingOptions`.
    """

    def __init__(self, model, rows: torch.Tensor, batch_size: int, guidance_scale: float, refresh_every: int = 1):
        vocabulary = model.vocabulary
        start = common_soi(rows, vocabulary)
        first = int((rows == vocabulary.pad_id).sum(1).min())  # common left padding changes nothing: rotary positions
        self.vocabulary, self.guidance_scale, self.refresh_every = vocabulary, guidance_scale, refresh_every
        self.transformer = incremental(model, OmniMask.from_ids(rows[:, first:], vocabulary), ids_recur=True)
        if refresh_every > 1 and not isinstance(self.transformer, PlainPhi):
            raise ValueError("refresh_every > 1 needs attn_implementation='sdpa', not compiled, and plain weights")
        self.text_ids = rows[:, first:start]  # (B or 2B, T)
        self.ids = rows[:batch_size, start:].clone()  # (B, N+2), the same with and without text
        self.refreshed = -refresh_every  # the last step in which all positions ran
        self.changing: torch.Tensor | None = None  # (B, N) bool, unknown in that step
        head, offset = model.showo.lm_head, vocabulary.image_offset
        codes = slice(offset, offset + vocabulary.codebook_size)
        self.head_weight, self.buffers = head.weight[codes], Buffers()
        self.head_bias = self.head_weight.new_zeros(len(self.head_weight)) if head.bias is None else head.bias[codes]

    def positions(self, step: int, unknown: torch.Tensor) -> torch.Tensor:
        """(B, N) bool -> (B, U) int64, ascending: every unknown position, and others where a row has fewer."""
        if step - self.refreshed >= self.refresh_every:
            self.refreshed, self.changing, self.is_whole = step, unknown, True
        else:
            self.is_whole = False
        return _first(unknown.int() + self.changing, int(unknown.sum(1).max()))

    def code_logits(self, codes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (B, U, C) in fp32 at the step's `positions`, until the next call; of codes (B, N) or mask tokens."""
        self.ids[:, 1:-1] = torch.where(
            codes == self.vocabulary.mask_token_id, codes, codes + self.vocabulary.image_offset
        )
        hidden = self._all(positions) if self.is_whole else self._changing(positions)  # (B or 2B, U, H)
        if self.guidance_scale > 0:  # the head is linear, so guidance may come before it
            cond, uncond = hidden.float().chunk(2)
            hidden = ((1 + self.guidance_scale) * cond - self.guidance_scale * uncond).to(hidden.dtype)
        self.buffers.look_at(hidden)
        logits = self.buffers.linear("logits", hidden.flatten(0, 1), self.head_weight, self.head_bias)
        return logits.float().view(*positions.shape, len(self.head_weight))

    def _all(self, positions: torch.Tensor) -> torch.Tensor:
        if self.transformer.length:
            self.transformer.forget(self.ids.shape[1])
            return self.transformer.extend(self.ids, needed=positions + 1)
        num_rows, num_texts = self.text_ids.shape
        repeats = num_rows // len(self.ids)
        ids = torch.cat([self.text_ids, self.ids.repeat(repeats, 1)], dim=1)
        return self.transformer.extend(ids, needed=positions.repeat(repeats, 1) + num_texts + 1)

    def _changing(self, positions: torch.Tensor) -> torch.Tensor:
        inner = _first(self.changing.int(), int(self.changing.sum(1).max())) + 1  # of the block
        ends = inner.new_tensor([0, self.ids.shape[1] - 1]).expand(len(inner), 2)
        at = torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)  # <soi> and <eoi> run, too
        needed = torch.searchsorted(at, positions + 1)
        return self.transformer.rewrite(self.ids.gather(1, at), at + self.text_ids.shape[1], needed)


def _first(score: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N) int -> (B, count) int64: the positions of the highest scores, the earlier of equals, ascending."""
    return score.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


def common_soi(rows: torch.Tensor, vocabulary: Vocabulary) -> int:
    """Index of ``<soi>``, the same in all rows of a t2i batch."""
    is_soi = rows == vocabulary.soi_id
    index = is_soi.int().argmax(1)
    if not is_soi.any(1).all() or (index != index[0]).any() or (rows[:, -1] != vocabulary.eoi_id).any():
        raise ValueError(
            "t2i rows must hold <soi> at one common position and end in <eoi>; "
            "build them with UniversalPrompting 't2i_gen'"
        )
    return int(index[0])
