"""Documents: texts and images in turn, each after all that came before, over one cache (docs/mixed.md).

    prefill → write a text until its end → decide → generate an image → run it once more, clean → decide → …

A batch holds different documents: first all of them write until each wants an image or has ended, then the images are
generated together. With guidance each document runs once more without its texts, and once without anything before the
image, in the same batch: the ids are the same, and what is left out is hidden.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from itertools import pairwise

import torch

from models.generation.image import Denoiser, denoise, guidance_weights
from models.generation.runner import Model, Runner, inference
from models.generation.sampling import (
    Generators,
    SamplingParameters,
    Schedule,
    by_row,
    get_mask_schedule,
    sample_next,
)
from models.omni_attention import OmniMask, image_block_start
from models.vocabulary import Vocabulary

# B documents, G groups of rows of guidance, L columns, N image tokens, D documents that want an image, H hidden size

logger = logging.getLogger(__name__)
TEXT, IMAGE = "text", "image"  # kinds of segments, which a plan may hold
WORD, DECISION, END = "word", "decision", "end"  # what else may come next: a token of a text, soi or bos, nothing


class Role(IntEnum):
    """What a token is in its document."""

    PAD = 0
    TASK = 1
    BOS = 2
    WORD = 3
    EOS = 4
    IMAGE = 5


@dataclass
class Segment:
    """A generated part of a document: token ids of a text, without bos and eos, or codes (N,) int64 of an image."""

    kind: str
    ids: list[int] = field(default_factory=list)
    codes: torch.Tensor | None = None


class DocumentGeneration:
    """`document_generate` of `Showo`."""

    @inference
    def document_generate(
        self,
        input_ids: torch.Tensor,
        *,
        bos_id: int,
        eos_id: int,
        plan: Sequence[str] | None = None,
        max_images: int = 4,
        max_new_tokens: int = 200,
        guidance_scale: float = 0.0,
        null: str = "all",
        text_guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        timesteps: int = 18,
        temperature: float = 1.0,
        noise_schedule: str | Schedule = "cosine",
        text_temperature: float = 1.0,
        top_k: int | None = 1,
        top_p: float | None = None,
        generator: Generators = None,
        sampling: SamplingParameters | None = None,
        callback: Callable[[int, int, int | torch.Tensor], None] | None = None,
    ) -> list[list[Segment]]:
        """Continues documents: writes, generates images and decides which comes next, until each has ended.

        Args:
            input_ids: (B, L) int64 `mixed_gen` rows, right-padded. The last text may be without its eos; it goes on.
            bos_id, eos_id: of the text tokenizer.
            plan: the kinds of the segments to come, ``text`` or ``image``; default: the model decides.
            max_images: without a plan, a document that wants another image ends.
            max_new_tokens: of a text; a longer one is ended.
            guidance_scale: w in ``(1 + w) cond − w null`` of images; 0: none.
            null: what the unconditional rows see: ``text``: no texts, but the images before; ``all``: neither.
            text_guidance_scale, image_guidance_scale: both or none, instead of `guidance_scale`: s_t and s_i in
                ``l(∅,∅) + s_i·(l(images,∅) − l(∅,∅)) + s_t·(l(images,texts) − l(images,∅))``.
            timesteps, temperature, noise_schedule, sampling: of images, see `t2i_generate`.
            text_temperature, top_k, top_p: of texts and decisions, see `sample_next`; greedy by default.
            generator: of all documents, or a sequence with one for each, which then does not depend on the others.
            callback: called as ``callback(document, segment, value)`` with each new token of a text and, after each
                step of an image, its codes (N,) as sampled; segments are counted from 0.

        Returns:
            For each document its new segments. What is in the middle of the text at the end of the prompt is the first.

        Raises:
            ValueError: rows that are no documents, a plan that does not fit them, or scales that do not fit each other.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps is {timesteps}, expected at least 1")
        groups, weights = guidance_groups(guidance_scale, null, text_guidance_scale, image_guidance_scale)
        for kind in plan or ():
            if kind not in (TEXT, IMAGE):
                raise ValueError(f"plan holds {kind!r}, expected {TEXT} or {IMAGE}")
        if (TEXT, TEXT) in pairwise(plan or ()):
            raise ValueError("plan holds a text after a text; texts that follow each other are one")
        schedule = get_mask_schedule(noise_schedule) if isinstance(noise_schedule, str) else noise_schedule
        num_tokens, sampling = self.config.num_vq_tokens, sampling or SamplingParameters()
        num_images = max_images if plan is None else plan.count(IMAGE)
        num_texts = num_images + 1 if plan is None else plan.count(TEXT)
        room = num_texts * (max_new_tokens + 2) + num_images * (num_tokens + 2)
        rows = DocumentRows(self, input_ids, groups, room, bos_id, eos_id)
        shows = [None if callback is None else partial(callback, row) for row in range(len(input_ids))]
        writers = [Writer(*pair, plan, max_images) for pair in zip(shows, rows.last_roles, strict=True)]
        words = {"temperature": text_temperature, "top_k": top_k, "top_p": top_p}
        try:
            while True:
                write(self, rows, writers, max_new_tokens, words, generator)
                chosen = [row for row, writer in enumerate(writers) if writer.next == IMAGE]
                chosen = [row for row in chosen if writers[row].fits(rows, row, num_tokens + 2)]
                if not chosen:
                    break
                denoiser = rows.image_denoiser(chosen, num_tokens, weights, timesteps, sampling)

                def show(step: int, codes: torch.Tensor, chosen=chosen) -> None:
                    for row, image in zip(chosen, codes, strict=True):
                        writers[row].show(image)

                unknown = torch.full((len(chosen), num_tokens), self.vocabulary.mask_token_id, device=input_ids.device)
                codes = denoise(
                    self,
                    unknown,
                    lambda step, denoiser=denoiser: denoiser,
                    timesteps=timesteps,
                    temperature=temperature,
                    schedule=schedule,
                    generator=generators_of(generator, chosen),
                    sampling=sampling,
                    callback=show,
                )
                rows.keep_image(denoiser, codes)
                for row, image in zip(chosen, codes, strict=True):
                    writers[row].add_image(image)
        finally:
            rows.runner.release()
        if full := sum(writer.is_full for writer in writers):
            logger.warning(
                "%d of %d documents ended early: the model knows %d positions", full, len(writers), rows.num_positions
            )
        return [writer.segments for writer in writers]


def write(
    model: Model, rows: "DocumentRows", writers: list["Writer"], max_new_tokens: int, words: dict, generator: Generators
) -> None:
    """Lets every document write until it wants an image or has ended.

    Args:
        words: keyword arguments of `sample_next`.
    """
    ids = torch.arange(model.vocabulary.vocab_size, device=rows.ids.device)
    is_decision = (ids == model.vocabulary.soi_id) | (ids == rows.bos_id)
    is_word = (ids < model.vocabulary.llm_vocab_size) & ((ids != rows.bos_id) | (ids == rows.eos_id))
    while True:
        writing = [row for row, writer in enumerate(writers) if writer.next not in (IMAGE, END)]
        writing = [row for row in writing if writers[row].fits(rows, row, 2)]  # a token, and eos
        if not writing:
            return
        tokens = {row: forced for row in writing if (forced := writers[row].forced(rows, max_new_tokens)) is not None}
        if choosing := [row for row in writing if row not in tokens]:
            logits = model.showo.get_output_embeddings()(rows.hidden[choosing]).float()  # (rows, V)
            allowed = torch.stack([is_word if writers[row].next == WORD else is_decision for row in choosing])
            drawn = by_row(
                lambda logits, generator: sample_next(logits, generator=generator, **words),
                generators_of(generator, choosing),
                logits.masked_fill(~allowed, -torch.inf),
            )
            tokens |= dict(zip(choosing, drawn.tolist(), strict=True))
        added = {row: (token, role) for row, token in tokens.items() if (role := writers[row].take(token, rows))}
        if added:
            rows.add_tokens(added)


def generators_of(generator: Generators, rows: list[int]) -> Generators:
    """Those of some rows, where each has one of its own."""
    return [generator[row] for row in rows] if isinstance(generator, Sequence) else generator


def guidance_groups(
    scale: float, null: str, text_scale: float | None, image_scale: float | None
) -> tuple[list[str], tuple[float, ...]]:
    """What the groups of rows hide, ``nothing``, ``text`` or ``all``, and the weights of their logits."""
    if null not in ("text", "all"):
        raise ValueError(f"null is {null!r}, expected text or all")
    if (text_scale is None) != (image_scale is None):
        raise ValueError("text_guidance_scale and image_guidance_scale go together; give both or none")
    if text_scale is None:
        return ["nothing", null][: 1 + (scale > 0)], guidance_weights(max(scale, 0.0))
    if scale > 0:
        raise ValueError("guidance_scale is one scale, text_guidance_scale and image_guidance_scale are two; drop one")
    return ["nothing", "text", "all"], (text_scale, image_scale - text_scale, 1 - image_scale)


class Writer:
    """Where a document is: its new segments, and what comes next.

    Args:
        show: called with the number of a segment and what is new of it.
        last: role of the last token of the prompt.
        plan, max_images: see `document_generate`.
    """

    def __init__(self, show: Callable | None, last: Role, plan: Sequence[str] | None, max_images: int):
        self.plan, self.max_images, self.on_new = None if plan is None else list(plan), max_images, show
        self.segments: list[Segment] = []
        self.is_full = False  # whether the context ended it
        self.next = self._next_kind()
        self.after_text = last == Role.EOS
        self.continues = last in (Role.BOS, Role.WORD)  # the first text began in the prompt, and may add nothing
        if self.continues:
            if self.next not in (TEXT, DECISION):
                raise ValueError("a prompt that ends within a text needs a plan that begins with text")
            self._begin_text()

    def fits(self, rows: "DocumentRows", row: int, count: int) -> bool:
        """Whether the row has room for so many tokens; else the document ends."""
        if not rows.has_room(row, count):
            self.next, self.is_full = END, True
        return self.next != END

    def forced(self, rows: "DocumentRows", max_new_tokens: int) -> int | None:
        """The next token where the model has no choice."""
        if self.next == TEXT:
            return rows.bos_id
        return rows.eos_id if self.next == WORD and len(self.segments[-1].ids) >= max_new_tokens else None

    def take(self, token: int, rows: "DocumentRows") -> Role | None:
        """Goes on by one token. Returns its role; None if it is not written."""
        if self.next != WORD:  # a decision, or a text that begins
            if token == rows.bos_id and (self.next == TEXT or not self.after_text):
                self._begin_text()
                return Role.BOS
            if token == rows.bos_id:  # a text after a text: the empty one that ends a document
                self.next = END
                return None
            num_images = sum(segment.kind == IMAGE for segment in self.segments)
            self.next = IMAGE if num_images < self.max_images else END
            return None
        if token != rows.eos_id:
            self.segments[-1].ids.append(token)
            self.show(token)
            return Role.WORD
        self.next = self._next_kind()
        if self.next == DECISION and not self.segments[-1].ids and not self.continues:
            self.segments.pop()  # the empty text that ends a document
            self.next = END
        self.continues, self.after_text = False, True
        return Role.EOS

    def add_image(self, codes: torch.Tensor) -> None:
        self.segments.append(Segment(IMAGE, codes=codes))
        self.next, self.after_text = self._next_kind(), False

    def show(self, value: int | torch.Tensor) -> None:
        """Passes a token of the last segment on, or the codes of the image that comes after it."""
        if self.on_new is not None:
            self.on_new(len(self.segments) - (not isinstance(value, torch.Tensor)), value)

    def _begin_text(self) -> None:
        self.segments.append(Segment(TEXT))
        self.next = WORD

    def _next_kind(self) -> str:
        if self.plan is None:
            return DECISION
        return self.plan.pop(0) if self.plan else END


class DocumentRows:
    """The documents as far as they are known, run through the decoder.

    Args:
        prompts: (B, L) int64, right-padded.
        groups: what each group of rows hides, of `guidance_groups`.
        room: positions for what is generated.

    Attributes:
        ids, roles: (B, columns) int64; a column holds a token of some documents, and padding of the others.
        hidden: (B, H), final hidden state of each document's last token.
        last_roles: of the last token of each prompt.
    """

    def __init__(self, model: Model, prompts: torch.Tensor, groups: list[str], room: int, bos_id: int, eos_id: int):
        self.model, self.vocabulary, self.groups = model, model.vocabulary, groups
        self.bos_id, self.eos_id = bos_id, eos_id
        self.num_positions = model.showo.config.max_position_embeddings
        roles = [roles_of(row, self.vocabulary, bos_id, eos_id) for row in prompts.tolist()]
        self.last_roles = [[role for role in row if role != Role.PAD][-1] for row in roles]
        length = prompts.shape[1]
        self.ids = torch.nn.functional.pad(prompts, (0, room), value=self.vocabulary.pad_id)
        self.roles = torch.zeros_like(self.ids)
        self.roles[:, :length] = torch.tensor(roles, device=prompts.device)
        batch_size, columns = self.ids.shape
        everything = OmniMask.lm(len(groups) * batch_size, columns, prompts.device)
        self.runner = Runner(model, everything)
        self._attend()
        hidden = self.runner.prefill(prompts)[:batch_size]  # (B, L, H)
        self.lengths = [sum(role != Role.PAD for role in row) for row in roles]  # tokens of each document
        self.hidden = hidden[list(range(batch_size)), [length - 1 for length in self.lengths]]

    def has_room(self, row: int, count: int) -> bool:
        """Whether the language model knows so many more positions."""
        return self.lengths[row] + count <= self.num_positions

    def add_tokens(self, tokens: dict[int, tuple[int, Role]]) -> None:
        """Runs a column with a token and its role for some documents."""
        column, rows = self.runner.length, list(tokens)
        for row, (token, role) in tokens.items():
            self.ids[row, column], self.roles[row, column] = token, role
            self.lengths[row] += 1
        self._attend()
        hidden = self.runner.step(self.ids[:, column : column + 1])
        self.hidden[rows] = hidden[rows, -1]

    def image_denoiser(
        self,
        chosen: list[int],
        num_tokens: int,
        weights: Sequence[float],
        timesteps: int,
        sampling: SamplingParameters,
    ) -> Denoiser:
        """Places an image in the next columns of the chosen documents."""
        block = slice(self.runner.length, self.runner.length + num_tokens + 2)
        index = torch.tensor(chosen, device=self.ids.device)
        self.ids[index, block.start], self.ids[index, block.stop - 1] = self.vocabulary.soi_id, self.vocabulary.eoi_id
        self.roles[index, block] = int(Role.IMAGE)
        for row in chosen:
            self.lengths[row] += num_tokens + 2
        self._attend()
        ids = self.ids[:, block].clone()
        return Denoiser(self.model, self.runner, block, ids, weights, timesteps, sampling, chosen=index)

    def keep_image(self, denoiser: Denoiser, codes: torch.Tensor) -> None:
        """Runs the images once more with all their codes (D, N), as what comes later sees them."""
        block, chosen = denoiser.block, denoiser.chosen
        self.ids[chosen, block.start + 1 : block.stop - 1] = codes + self.vocabulary.image_offset
        hidden = self.runner.step(self.ids[:, block], block)
        self.hidden[chosen] = hidden[chosen, -1]

    def _attend(self) -> None:
        """Tells the runner who sees whom."""
        views = [view_of(self.ids, self.roles, hides, self.vocabulary) for hides in self.groups]
        visible_from, visible_until, position_ids = (torch.cat(parts) for parts in zip(*views, strict=True))
        self.runner.attend(OmniMask(visible_from, visible_until), position_ids)


def roles_of(ids: list[int], vocabulary: Vocabulary, bos_id: int, eos_id: int) -> list[Role]:
    """The role of each token of a right-padded document. In a text that has another token behind it, eos is a word, as
    between the turns of a conversation: no text follows another.

    Raises:
        ValueError: it is no document.
    """
    roles: list[Role] = []
    after_text = (vocabulary.soi_id, vocabulary.pad_id)
    for index, (token, following) in enumerate(zip(ids, [*ids[1:], vocabulary.pad_id], strict=True)):
        last = roles[-1] if roles else None
        if token == vocabulary.pad_id and index:
            role = Role.PAD
        elif last is None and token == vocabulary.t2i_id:
            role = Role.TASK
        elif last in (Role.BOS, Role.WORD):
            role = Role.EOS if token == eos_id and following in after_text else Role.WORD
        elif last == Role.IMAGE and ids[index - 1] != vocabulary.eoi_id or token == vocabulary.soi_id:
            role = Role.IMAGE
        elif last in (Role.TASK, Role.IMAGE) and token == bos_id:
            role = Role.BOS
        else:
            raise ValueError(f"token {token} at position {index} has no place in a document; build it with mixed_gen")
        roles.append(role)
    return roles


def view_of(
    ids: torch.Tensor, roles: torch.Tensor, hides: str, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(first row that sees a token, one past the last, its position), (B, L) int64 each, of documents without a part.

    Args:
        ids, roles: (B, L) int64.
        hides: ``nothing``; ``text``: all texts are empty; ``all``: each image has nothing before it but an empty text,
            if the document has any text before it.
    """
    column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    length = ids.shape[1]
    is_image, is_bos, is_end = roles == Role.IMAGE, roles == Role.BOS, (roles == Role.BOS) | (roles == Role.EOS)
    start = image_block_start(ids, vocabulary)
    is_hidden = (roles == Role.PAD) | ((roles == Role.WORD) & (hides != "nothing"))
    until = torch.full_like(ids, length)
    if hides == "all":
        # an empty text lasts until the next one, an image until its own end
        later_bos = torch.where(is_bos, column, length).flip(1).cummin(1).values.flip(1)
        later_bos = torch.nn.functional.pad(later_bos[:, 1:], (0, 1), value=length)
        later_eoi = torch.where(ids == vocabulary.eoi_id, column + 1, length).flip(1).cummin(1).values.flip(1)
        until = torch.where(is_end, later_bos, torch.where(is_image, later_eoi, until))
        has_text = is_bos.int().cumsum(1) > 0
        place = torch.where(is_image, column - start + 1 + 2 * has_text, 0)
        position_ids = torch.where(is_bos, 1, torch.where(roles == Role.EOS, 2, place))
    else:
        position_ids = ((~is_hidden).int().cumsum(1) - 1).clamp(min=0)
    return start, until.masked_fill(is_hidden, 0), position_ids
