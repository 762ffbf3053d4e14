"""Text to image: the MaskGIT loop over cached text (spec §7).

    codes = all masked
    for each step:  logits at the unknown positions → sample every unknown code → keep the most confident ones

The same CPU seed gives the published tokens. Only work that cannot change them is left out: the text never sees the
image, so it is encoded once; padding in front of all rows is dropped; guidance is applied before the head, which is
linear; the head and the sampling run at unknown positions, over the image codes alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch.func import functional_call

from models.generation.runner import BUCKET, Model, Runner, inference, is_plain_linear
from models.generation.sampling import (
    Generators,
    SamplingParameters,
    Schedule,
    count_masked,
    get_mask_schedule,
    maskgit_step,
    multinomial_at,
    position_order,
    remasked_positions,
)
from models.generation.trajectory import Trajectory
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
        trajectory: Trajectory | None = None,
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
            trajectory: records every step.

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
        batch_size = len(codes)
        denoisers: dict[bool, Denoiser] = {}  # with and without guidance, which may be on in a part of the steps only

        def denoiser_at(step: int) -> Denoiser:
            guides = guidance_scale > 0 and sampling.guidance_at(step, timesteps) > 0
            if guides not in denoisers:
                used, scale = (slice(None), guidance_scale) if guides else (slice(batch_size), 0.0)
                denoisers[guides] = Denoiser.of_rows(
                    self, rows[used], mask.select(used), batch_size, scale, timesteps, sampling
                )
            return denoisers[guides]

        try:
            return denoise(
                self,
                codes,
                denoiser_at,
                timesteps=timesteps,
                temperature=temperature,
                schedule=schedule,
                generator=generator,
                sampling=sampling,
                callback=callback,
                trajectory=trajectory,
            )
        finally:
            for denoiser in denoisers.values():
                denoiser.runner.release()


def denoise(
    model: Model,
    codes: torch.Tensor,
    denoiser_at: Callable[[int], "Denoiser"],
    *,
    timesteps: int,
    temperature: float,
    schedule: Schedule,
    generator: Generators,
    sampling: SamplingParameters,
    callback: Callable[[int, torch.Tensor], None] | None = None,
    trajectory: Trajectory | None = None,
) -> torch.Tensor:
    """The MaskGIT loop: codes (B, N), mask token where unknown → all codes (B, N).

    Args:
        denoiser_at: step → what gives its logits.
        timesteps, temperature, generator, sampling, callback, trajectory: of `t2i_generate`.
    """
    mask_id = model.vocabulary.mask_token_id
    order = position_order(sampling.order, codes, generator)
    is_free = codes == mask_id
    drawn_with = torch.ones_like(codes, dtype=torch.float32)  # the probability of each code when it was sampled
    for step in range(timesteps):
        logits, positions = denoiser_at(step)(step, codes)  # (B, U, C), (B, U)
        logits = sampling.shaped(logits, step, timesteps)
        ratio = (step + 1) / timesteps
        mask_ratio = schedule(torch.tensor(ratio, device=logits.device))
        temperature = temperature * (1.0 - ratio)  # Faithful: compounds, before use (pinned by tests/parity)
        unknown, remasked = codes == mask_id, None
        if sampling.remasks(step, timesteps):
            num_masked = count_masked(unknown, mask_ratio)
            remasked = remasked_positions(sampling, is_free, unknown, drawn_with, num_masked, generator)
        sampled, remaining, probability = maskgit_step(
            logits,
            codes,
            mask_id,
            mask_ratio=mask_ratio,
            temperature=temperature,
            generator=generator,
            positions=positions,
            order=order,
            remasked=remasked,
            multinomial_at=model.multinomial_at,
        )
        if trajectory is not None:
            left = remaining & (step + 1 < timesteps)  # the last step keeps all that it samples
            trajectory.record(codes, sampled, left, logits, positions, temperature, mask_id)
        drawn_with = torch.where(unknown, probability, drawn_with)
        codes = torch.where(remaining, mask_id, sampled)
        if callback is not None:
            callback(step, sampled)
    return sampled.clamp(0, model.vocabulary.codebook_size - 1)


class Denoiser:
    """Logits of the image codes from step to step, of a block whose past a runner holds.

    Args:
        runner: with G rows for each of the B blocks: the G·B rows come group by group.
        block: positions of ``<soi>``, N image tokens and ``<eoi>``.
        block_ids: (B, N+2), the same in all groups.
        weights: of the G groups' logits in their sum, at the full guidance scale.
        timesteps: number of steps.
        sampling: in which steps which positions run, and how much guidance they have.
        text_ids: (G·B, T) before the block; they run with it in the first step. None: the runner has them.
        chosen: (D,) int64, which of the blocks are generated; default: all.
    """

    def __init__(
        self,
        model: Model,
        runner: Runner,
        block: slice,
        block_ids: torch.Tensor,
        weights: Sequence[float],
        timesteps: int,
        sampling: SamplingParameters,
        *,
        text_ids: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
    ):
        self.vocabulary, self.weights = model.vocabulary, weights
        self.timesteps, self.sampling = timesteps, sampling
        self.runner, self.block, self.block_ids = runner, block, block_ids
        self.text_ids, self.chosen = text_ids, chosen
        self.head = code_head(model)
        self.hidden: torch.Tensor | None = None  # (G·B, N+2, H), of each position when it last ran
        self.ran_ids = block_ids.clone()  # (B, N+2), its token then
        self.sureness = torch.zeros(block_ids[:, 1:-1].shape, device=block_ids.device)  # (B, N), its largest logit then
        self.last_refresh = 0

    @classmethod
    def of_rows(
        cls,
        model: Model,
        rows: torch.Tensor,
        mask: OmniMask,
        batch_size: int,
        guidance_scale: float,
        timesteps: int,
        sampling: SamplingParameters,
    ) -> "Denoiser":
        """Of t2i rows (B or 2B, L), conditional and unconditional ones; B with a guidance scale of 0."""
        soi = common_soi(rows, model.vocabulary)
        # Padding in front of all rows can go: nothing sees it, and rotary positions are relative.
        first = int((rows == model.vocabulary.pad_id).sum(1).min())
        return cls(
            model,
            Runner(model, mask.window(first)),
            slice(soi - first, rows.shape[1] - first),
            rows[:batch_size, soi:].clone(),
            guidance_weights(guidance_scale),
            timesteps,
            sampling,
            text_ids=rows[:, first:soi],
        )

    def __call__(self, step: int, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, positions) of codes (B, N), or (D, N) of the chosen blocks, mask token where unknown.

        Returns:
            (B, U, C) float32 and (B, U) int64, ascending: every unknown position, and others where a row has fewer.
        """
        if self.chosen is not None:  # the other blocks are hidden; they have codes that need no logits
            codes = codes.new_zeros(len(self.block_ids), codes.shape[1]).index_copy_(0, self.chosen, codes)
        unknown = codes == self.vocabulary.mask_token_id  # (B, N)
        self.block_ids[:, 1:-1] = torch.where(unknown, codes, codes + self.vocabulary.image_offset)
        is_due = step - self.last_refresh >= self.sampling.refresh_every
        if self.hidden is None or is_due or step < self.sampling.refresh_warmup * self.timesteps:
            self._refresh()
            self.last_refresh = step
        else:
            self._partial_refresh(unknown)
        positions = first_positions(unknown.int(), int(unknown.sum(1).max()))
        indices = (positions + 1).repeat(len(self.hidden) // len(positions), 1)
        hidden = self.hidden.gather(1, indices[..., None].expand(-1, -1, self.hidden.shape[-1]))
        if self.chosen is not None:
            hidden = hidden.unflatten(0, (len(self.weights), -1))[:, self.chosen].flatten(0, 1)
            positions = positions[self.chosen]
        logits = self.head(hidden, scaled_weights(self.weights, self.sampling.guidance_at(step, self.timesteps)))
        if self.sampling.refresh_share < 1:
            rows = slice(None) if self.chosen is None else self.chosen
            self.sureness[rows] = self.sureness[rows].scatter(1, positions, logits.amax(-1))
        return logits, positions

    def _refresh(self) -> None:
        """Runs the whole block; the first time, the text before it runs in the same pass."""
        if self.runner.length or self.text_ids is None:
            hidden = self.runner.step(self.block_ids, self.block)
        else:
            block_ids = self.block_ids.repeat(len(self.text_ids) // len(self.block_ids), 1)
            hidden = self.runner.prefill(torch.cat([self.text_ids, block_ids], dim=1))[:, self.block]
        # what a compiled step returns is overwritten by the next one
        self.hidden = hidden.clone() if self.sampling.refresh_every > 1 else hidden
        self.ran_ids.copy_(self.block_ids)

    def _partial_refresh(self, unknown: torch.Tensor) -> None:
        """Runs <soi>, <eoi>, tokens that changed and the least sure unknown ones; all others keep what they have."""
        num_positions = unknown.shape[1]
        sureness = self.sureness.masked_fill(~unknown, torch.inf)
        count = (self.sampling.refresh_share * unknown.sum(1, keepdim=True)).ceil().long()
        cut_off = sureness.sort(dim=1).values.gather(1, (count - 1).clamp(min=0))
        runs = (self.block_ids != self.ran_ids)[:, 1:-1] | unknown & (sureness <= cut_off)
        count = int(runs.sum(1).max())
        if self.runner.cache.static:  # few shapes to compile
            count = min(-(-count // BUCKET) * BUCKET, num_positions)
        inner = first_positions(runs.int(), count) + 1
        ends = inner.new_tensor([0, num_positions + 1]).expand(len(inner), 2)
        refreshed = torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)  # positions of the block, ascending
        ids = self.block_ids.gather(1, refreshed)
        hidden = self.runner.step(ids, refreshed + self.block.start)
        indices = refreshed.repeat(len(hidden) // len(refreshed), 1)
        self.hidden.scatter_(1, indices[..., None].expand_as(hidden), hidden)
        self.ran_ids.scatter_(1, refreshed, ids)


def code_head(model: Model) -> Callable[[torch.Tensor, Sequence[float]], torch.Tensor]:
    """The function from hidden states (G·B, U, H) and G weights to logits (B, U, C) of the image codes.

    A plain linear head runs with the codes' rows of its weight alone, and after guidance, which divides its rows by G.
    Any other head (adapted, quantised, hooked) runs whole, and guidance follows.
    """
    head, vocabulary = model.showo.get_output_embeddings(), model.vocabulary
    codes = slice(vocabulary.image_offset, vocabulary.image_offset + vocabulary.codebook_size)
    is_linear = is_plain_linear(head)
    rows = {name: parameter[codes] for name, parameter in head.named_parameters()} if is_linear else {}

    def logits_of(hidden: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        if is_linear:
            return functional_call(head, rows, (guided(hidden, weights),)).float()
        return guided(head(hidden)[..., codes], weights).float()

    return logits_of


def guidance_weights(scale: float) -> tuple[float, ...]:
    """Weights of the rows with and without text: ``(1 + w) cond − w uncond``; with w = 0 there are none without."""
    return (1 + scale, -scale) if scale else (1.0,)


def scaled_weights(weights: Sequence[float], factor: float) -> tuple[float, ...]:
    """Weights of groups, of which the first is the conditional one, at a factor of their guidance scale; 0: none."""
    return tuple(factor * weight + (1 - factor) * (group == 0) for group, weight in enumerate(weights))


def guided(x: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The sum of the groups of (G·B, …) by weights, which add up to 1, computed in float32; of one group itself."""
    if len(weights) == 1:
        return x
    return sum(weight * part for weight, part in zip(weights, x.float().chunk(len(weights)), strict=True)).to(x.dtype)


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
