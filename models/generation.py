"""The two generation loops with their caches: `t2i_generate` draws (SPEC §7), `mmu_generate` answers (SPEC §8).

Both equal the published loops token for token while computing each thing once: the text never sees the image, so its
keys and values are cached; common left padding is dropped; the head runs on the positions and rows that are needed.
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps

import torch

from models.compiled_block import CompiledBlock
from models.decode_graph import DecodeGraph
from models.decoding import PromptLookup, Prompts
from models.drawing_options import DrawingOptions, halton_order
from models.greedy_head import greedy_head, is_plain_linear
from models.image_block import ImageBlock, common_soi
from models.incremental import PlainPhi, is_compiled, is_plain
from models.omni_attention import OmniMask
from models.sampling import Schedule, get_mask_schedule, is_greedy, maskgit_step, sample_next
from models.thin import product

# B images or prompts, N image positions, U unknown ones, C codes, L row length, T new tokens, H hidden size
MAX_DRAFT = 15  # tokens
GREEDY_HEAD_PAYS = 16  # new tokens that are worth the making of a `GreedyHead`


def _inference(method):
    """Runs without gradients and in evaluation mode: activation checkpointing in training mode drops a passed cache."""

    @wraps(method)
    def run(self, *args, **kwargs):
        was_training = self.training
        self.train(False)
        try:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        finally:
            self.train(was_training)

    return run


class ShowoGeneration:
    """Generation methods of `Showo`; expects `hidden_states`, `vocabulary`, `showo.lm_head` of the host class."""

    @_inference
    def t2i_generate(
        self,
        input_ids: torch.Tensor,
        uncond_input_ids: torch.Tensor | None = None,
        *,
        guidance_scale: float = 0.0,
        timesteps: int = 18,
        temperature: float = 1.0,
        noise_schedule: str | Schedule = "cosine",
        generator: torch.Generator | None = None,
        callback: Callable[[int, torch.Tensor], None] | None = None,
        options: DrawingOptions | None = None,
    ) -> torch.Tensor:
        """Image codes by masked-token diffusion. The same CPU seed gives the published tokens.

        Args:
            input_ids: (B, L) int64 `t2i_gen` rows; image part all mask token, or partly known for inpainting.
            uncond_input_ids: (B, L) rows without text for guidance; their image part is ignored.
            guidance_scale: w in ``(1 + w) cond - w uncond``; 0 turns guidance off.
            timesteps: number of steps.
            temperature: start of the Gumbel temperature.
            noise_schedule: name or function of a scalar tensor, see `get_mask_schedule`.
            callback: called as ``callback(step, codes)`` after each step, codes (B, N) as drawn.
            options: what is faster and not published, see `DrawingOptions`; default: nothing.

        Returns:
            (B, N) int64 codes in [0, codebook_size).

        Raises:
            ValueError: rows without an image block of such ids, guidance without unconditional rows, or no steps.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps is {timesteps}, expected at least 1")
        guided = guidance_scale > 0
        if guided and (uncond_input_ids is None or uncond_input_ids.shape != input_ids.shape):
            raise ValueError("guidance_scale > 0 needs uncond_input_ids of the shape of input_ids")
        schedule = get_mask_schedule(noise_schedule) if isinstance(noise_schedule, str) else noise_schedule
        options = options or DrawingOptions()
        vocabulary, mask_id = self.vocabulary, self.vocabulary.mask_token_id
        image_ids = input_ids[:, common_soi(input_ids, vocabulary) + 1 : -1]  # (B, N)
        codes = torch.where(image_ids == mask_id, mask_id, image_ids - vocabulary.image_offset)
        if ((codes < 0) | (codes >= vocabulary.codebook_size) & (codes != mask_id)).any():
            raise ValueError("between <soi> and <eoi> only image ids (code + offset) and the mask token may stand")
        order = halton_order(codes.shape[1]).to(codes.device) if options.order == "halton" else None

        @cache  # with guidance in a part of the steps there are two
        def block_of(scale: float) -> ImageBlock | CompiledBlock:
            rows = torch.cat([input_ids, uncond_input_ids]) if scale > 0 else input_ids
            if is_compiled(self.showo) and is_plain(self.showo) and options.refresh_every == 1:
                return CompiledBlock(self, rows, len(input_ids), scale)
            return ImageBlock(self, rows, len(input_ids), scale, options.refresh_every)

        for step in range(timesteps):
            block = block_of(guidance_scale if options.guides(step, timesteps) else 0.0)
            positions = block.positions(step, codes == mask_id)  # (B, U), all that the rest of the step looks at
            logits = block.code_logits(codes, positions)  # (B, U, C)
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
            )
            codes = torch.where(remaining, mask_id, sampled)
            if callback is not None:
                callback(step, sampled)
        return sampled.clamp(0, vocabulary.codebook_size - 1)

    @_inference
    def mmu_generate(
        self,
        input_ids: torch.Tensor,
        *,
        image_features: torch.Tensor | None = None,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eot_token: int | Sequence[int] | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        attention_mask: OmniMask | None = None,
        callback: Callable[[torch.Tensor], None] | None = None,
        max_draft: int | None = None,
        cuda_graph: bool = False,
    ) -> torch.Tensor:
        """Text after a prompt, one token at a time over a key/value cache.

        Args:
            input_ids: (B, L) int64 prompts of any kind; shorter ones padded on either side with the pad id.
            image_features: raw CLIP features for the −200 positions, in row order.
            top_k, top_p, temperature: see `sample_next`; ``top_k=1`` is greedy.
            eot_token: id or ids that end a row; each row stops by itself and is filled with the pad id.
            attention_mask: mask of the prompts; default: read off the ids.
            callback: called with the (B,) new ids after each token.
            max_draft: most tokens of a single row that are guessed from its earlier text and checked in one pass; the
                tokens stay the same. Default: `MAX_DRAFT` in fp32; 0 in half precision, whose rounding may differ.
            cuda_graph: on a GPU, replay one captured graph for every token; pays from a few dozen tokens on.

        Returns:
            (B, T) int64 new ids, T <= max_new_tokens, the end token included.
        """
        if attention_mask is None:
            prompts = Prompts.of(input_ids, self.vocabulary, max_new_tokens, image_features)
        else:
            lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
            mask = attention_mask.extend(max_new_tokens)
            prompts = Prompts(input_ids, lengths, mask, image_features=image_features)
        stops = torch.as_tensor([] if eot_token is None else eot_token, dtype=torch.long, device=input_ids.device)
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        new_ids = []
        for token in self._new_tokens(prompts, max_new_tokens, max_draft, cuda_graph, settings, generator):
            token = token.masked_fill(finished, self.vocabulary.pad_id)
            new_ids.append(token)
            if callback is not None:
                callback(token)
            finished = finished | torch.isin(token, stops)
            if finished.all():
                break
        return torch.stack(new_ids, dim=1) if new_ids else input_ids[:, :0]

    def _new_tokens(self, prompts: Prompts, count: int, max_draft: int | None, cuda_graph: bool, settings, generator):
        """Yields (B,) new ids, `count` times; each is computed when it is asked for, or with the guess it confirms."""
        transformer, hidden = prompts.read(self)  # (B, 1, H)
        choose = self._chooser(len(hidden), count, settings, generator)
        lookup, guess = self._lookup(prompts.input_ids, max_draft), []
        graphed = cuda_graph and hidden.is_cuda and isinstance(transformer, PlainPhi)
        extend_one = DecodeGraph(transformer).extend if graphed and count > 1 else transformer.extend
        while count:
            for right, token in enumerate(choose(hidden)):  # behind the ids that were known, then behind each guess
                yield token
                count -= 1
                if lookup is not None:
                    lookup.add(int(token))
                if right == len(guess) or int(token) != guess[right] or not count:
                    break
            if not count:
                return
            if lookup is not None:
                transformer.forget(len(guess) - right)
                lookup.learn(len(guess), right)
                guess = lookup.guess(count - 1)
            if guess:
                hidden = transformer.extend(torch.cat([token, token.new_tensor(guess)])[None])  # (1, 1 + guesses, H)
            else:
                hidden = extend_one(token[:, None])  # (B, 1, H)

    def _lookup(self, input_ids: torch.Tensor, max_draft: int | None) -> PromptLookup | None:
        if max_draft is None:  # in half precision the rounding of a pass depends on the number of its positions
            max_draft = MAX_DRAFT if self.showo.lm_head.weight.dtype == torch.float32 else 0
        return PromptLookup(input_ids[0].tolist(), max_draft) if max_draft and len(input_ids) == 1 else None

    def _chooser(self, num_rows: int, max_new_tokens: int, settings: dict, generator: torch.Generator | None):
        """The function from hidden states (B, n, H) to n new ids (B,), drawn one after the other as they are needed."""
        head, greedy = self.showo.lm_head, is_greedy(**settings)
        quick = greedy_head(head, num_rows) if greedy and max_new_tokens >= GREEDY_HEAD_PAYS else None

        def choose(hidden: torch.Tensor):
            if quick is not None:
                yield from quick.argmax(hidden.flatten(0, 1)).view(hidden.shape[:2]).unbind(1)
                return
            logits = _run_head(head, hidden).float()
            for position in logits.unbind(1):
                yield sample_next(position, **settings, generator=generator)

        return choose


def _run_head(head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (B, n, V)."""
    if not is_plain_linear(head):
        return head(hidden)
    return product(hidden.flatten(0, 1), head.weight, head.bias).unflatten(0, hidden.shape[:2])
