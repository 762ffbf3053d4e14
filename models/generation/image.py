"""Text to image: the MaskGIT loop over cached text (spec §7).

    codes = all masked
    for each step:  logits at the unknown positions → sample every unknown code → keep the most confident ones

The same CPU seed gives the published tokens. Only work that cannot change them is left out: the text never sees the
image, so it is encoded once; padding in front of all rows is dropped; guidance is applied before the head, which is
linear; the head and the sampling run at unknown positions, over the image codes alone.
"""

from collections.abc import Callable

import torch
from torch.func import functional_call

from models.generation.runner import BUCKET, Model, Runner, inference, is_plain_linear
from models.generation.sampling import (
    Generators,
    SamplingParameters,
    Schedule,
    get_mask_schedule,
    halton_order,
    maskgit_step,
    multinomial_at,
)
from models.omni_attention import OmniMask
from models.vocabulary import Vocabulary

# B images, R rows (B, or 2B with guidance), L row length, T text positions, N image positions, U of them that are
# sampled, C codes, H hidden size


class ImageGeneration:
    """`t2i_generate` of `Showo`."""

    multinomial_at = staticmethod(multinomial_at)  # of maskgit_step; `cpu.enable` puts a faster one in its place

    @inference
    def t2i_generate(
        self,
        input_ids: torch.Tensor,
        uncond_input_ids: torch.Tensor | None = None,
        *,
        guidance_scale: float = 0.0,
        timesteps: int = 18,
        temperature: float = 1.0,
        noise_schedule: str | Schedule = "cosine",
        generator: Generators = None,
        attention_mask: OmniMask | None = None,
        callback: Callable[[int, torch.Tensor], None] | None = None,
        sampling: SamplingParameters | None = None,
    ) -> torch.Tensor:
        """Image codes by masked-token diffusion.

        Args:
            input_ids: (B, L) int64 `t2i_gen` rows; image part all mask token, or partly known for inpainting.
            uncond_input_ids: (B, L) rows without text for guidance; their image part is ignored.
            guidance_scale: w in ``(1 + w) cond - w uncond``; 0 turns guidance off.
            timesteps: number of steps, at least 1.
            temperature: weight of the Gumbel noise on the confidence; decays from step to step.
            noise_schedule: name or function of a scalar tensor, see `get_mask_schedule`.
            generator: of all rows, as published, or a sequence with one for each row, whose codes then do not depend on
                the other rows.
            attention_mask: of the rows, those with text before those without; default: read off the ids.
            callback: called as ``callback(step, codes)`` after each step, codes (B, N) as sampled.
            sampling: options that deviate from the published sampling; default: none.

        Returns:
            (B, N) int64 codes in [0, codebook_size).

        Raises:
            ValueError: rows without an image block of such ids, guidance without unconditional rows, or no steps.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps is {timesteps}, expected at least 1")
        if guidance_scale > 0 and (uncond_input_ids is None or uncond_input_ids.shape != input_ids.shape):
            raise ValueError("guidance_scale > 0 needs uncond_input_ids of the shape of input_ids")
        schedule = get_mask_schedule(noise_schedule) if isinstance(noise_schedule, str) else noise_schedule
        sampling = sampling or SamplingParameters()
        rows = input_ids if uncond_input_ids is None else torch.cat([input_ids, uncond_input_ids])  # (R, L)
        mask = OmniMask.from_ids(rows, self.vocabulary) if attention_mask is None else attention_mask
        if mask.shape[0] != len(rows):
            raise ValueError(
                f"attention_mask has {mask.shape[0]} rows, but there are {len(rows)} with and without text"
            )
        codes = known_codes(input_ids, self.vocabulary)  # (B, N)
        batch_size, mask_id = len(codes), self.vocabulary.mask_token_id
        order = halton_order(codes.shape[1]).to(codes.device) if sampling.order == "halton" else None

        denoisers: dict[float, Denoiser] = {}  # by guidance scale: two, if guidance is on in a part of the steps only
        try:
            for step in range(timesteps):
                scale = guidance_scale if guidance_scale > 0 and sampling.guides(step, timesteps) else 0.0
                if scale not in denoisers:
                    used = slice(None) if scale > 0 else slice(batch_size)
                    denoisers[scale] = Denoiser(
                        self, rows[used], mask.select(used), batch_size, scale, sampling.refresh_every
                    )
                logits, positions = denoisers[scale](step, codes)  # (B, U, C), (B, U)
                ratio = (step + 1) / timesteps
                temperature = temperature * (1.0 - ratio)  # Faithful: compounds, before use (pinned by tests/parity)
                sampled, remaining = maskgit_step(
                    logits,
                    codes,
                    mask_id,
                    mask_ratio=schedule(torch.tensor(ratio, device=logits.device)),
                    temperature=temperature,
                    generator=generator,
                    positions=positions,
                    order=order,
                    multinomial_at=self.multinomial_at,
                )
                codes = torch.where(remaining, mask_id, sampled)
                if callback is not None:
                    callback(step, sampled)
        finally:
            for denoiser in denoisers.values():
                denoiser.runner.release()
        return sampled.clamp(0, self.vocabulary.codebook_size - 1)


class Denoiser:
    """Logits of the image codes from step to step; the text before them is encoded once, in the first step.

    Args:
        rows: (B or 2B, L) ids, conditional and unconditional.
        mask: of these rows.
        batch_size: B.
        guidance_scale: w in ``(1 + w) cond − w uncond``; 0 with B rows.
        refresh_every: see `SamplingParameters`.
    """

    def __init__(
        self,
        model: Model,
        rows: torch.Tensor,
        mask: OmniMask,
        batch_size: int,
        guidance_scale: float,
        refresh_every: int = 1,
    ):
        self.vocabulary, self.guidance_scale, self.refresh_every = model.vocabulary, guidance_scale, refresh_every
        soi = common_soi(rows, model.vocabulary)
        # Padding in front of all rows can go: nothing sees it, and rotary positions are relative.
        first = int((rows == model.vocabulary.pad_id).sum(1).min())
        self.runner = Runner(model, mask.window(first))
        self.text_ids = rows[:, first:soi]  # (R, T)
        self.block = slice(soi - first, rows.shape[1] - first)  # <soi>, N image positions, <eoi>
        self.block_ids = rows[:batch_size, soi:].clone()  # (B, N+2), the same with and without text
        self.head = code_head(model)
        self.last_refresh = -refresh_every
        self.stale: torch.Tensor | None = None  # (B, N) bool, unknown at the last refresh

    def __call__(self, step: int, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, positions) of codes (B, N), mask token where unknown.

        Returns:
            (B, U, C) float32 and (B, U) int64, ascending: every unknown position, and others where a row has fewer.
        """
        unknown = codes == self.vocabulary.mask_token_id  # (B, N)
        self.block_ids[:, 1:-1] = torch.where(unknown, codes, codes + self.vocabulary.image_offset)
        if step - self.last_refresh >= self.refresh_every:
            self.last_refresh, self.stale = step, unknown
            positions = first_positions(unknown.int(), int(unknown.sum(1).max()))
            hidden, indices = self._refresh(), positions + 1  # (R, N+2, H), (B, U)
        else:
            positions = first_positions(unknown.int() + self.stale, int(unknown.sum(1).max()))
            hidden, indices = self._partial_refresh(positions)
        indices = indices.repeat(len(hidden) // len(indices), 1)[..., None].expand(-1, -1, hidden.shape[-1])
        return self.head(hidden.gather(1, indices), self.guidance_scale), positions

    def _refresh(self) -> torch.Tensor:
        """Hidden states (R, N+2, H) of the whole block; the first time, the text before it runs in the same pass."""
        if self.runner.length:
            return self.runner.step(self.block_ids, self.block)
        block_ids = self.block_ids.repeat(len(self.text_ids) // len(self.block_ids), 1)
        return self.runner.prefill(torch.cat([self.text_ids, block_ids], dim=1))[:, self.block]

    def _partial_refresh(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs <soi>, <eoi> and what was unknown at the last refresh; all others keep their keys and values."""
        num_positions = self.block_ids.shape[1] - 2
        count = int(self.stale.sum(1).max())
        if self.runner.cache.static:  # few shapes to compile
            count = min(-(-count // BUCKET) * BUCKET, num_positions)
        inner = first_positions(self.stale.int(), count) + 1
        ends = inner.new_tensor([0, num_positions + 1]).expand(len(inner), 2)
        refreshed = torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)  # positions of the block, ascending
        hidden = self.runner.step(self.block_ids.gather(1, refreshed), refreshed + self.block.start)
        return hidden, torch.searchsorted(refreshed, positions + 1)


def code_head(model: Model) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """The function from hidden states (R, U, H) and a guidance scale to logits (B, U, C) of the image codes.

    A plain linear head runs with the codes' rows of its weight alone, and after guidance, which halves its rows. Any
    other head (adapted, quantised, hooked) runs whole, and guidance follows.
    """
    head, vocabulary = model.showo.get_output_embeddings(), model.vocabulary
    codes = slice(vocabulary.image_offset, vocabulary.image_offset + vocabulary.codebook_size)
    is_linear = is_plain_linear(head)
    rows = {name: parameter[codes] for name, parameter in head.named_parameters()} if is_linear else {}

    def logits_of(hidden: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        if is_linear:
            return functional_call(head, rows, (guided(hidden, guidance_scale),)).float()
        return guided(head(hidden)[..., codes], guidance_scale).float()

    return logits_of


def guided(x: torch.Tensor, scale: float) -> torch.Tensor:
    """``(1 + w) cond − w uncond`` of (2B, …), computed in float32; unchanged with w = 0."""
    if scale == 0:
        return x
    cond, uncond = x.float().chunk(2)
    return ((1 + scale) * cond - scale * uncond).to(x.dtype)


def known_codes(input_ids: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """(B, N) image codes of t2i rows, the mask token where unknown; `ValueError` for any other id among them."""
    mask_id = vocabulary.mask_token_id
    image_ids = input_ids[:, common_soi(input_ids, vocabulary) + 1 : -1]
    codes = torch.where(image_ids == mask_id, mask_id, image_ids - vocabulary.image_offset)
    if ((codes < 0) | (codes >= vocabulary.codebook_size) & (codes != mask_id)).any():
        raise ValueError("expected only image ids (code + offset) and the mask token between <soi> and <eoi>")
    return codes


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


def first_positions(score: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N) int -> (B, count) int64: the positions of the highest scores, the earlier of equals, ascending."""
    return score.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
