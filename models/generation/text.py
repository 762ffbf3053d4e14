"""Text after a prompt, token by token over cached keys and values (spec §8).

    prefill the prompts → choose a token → step → choose a token → …

What rows of a batch have in common at the front (one image, many questions) is encoded once and broadcast. A single row
speculates with prompt lookup: where its last tokens were seen before, the tokens that followed then are drafted, and
one step checks all of them, which costs hardly more than one token. The tokens are the same with and without.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch

from models.generation.runner import Model, Runner, inference
from models.generation.sampling import is_greedy, sample_next
from models.omni_attention import OmniMask
from models.vocabulary import IMAGE_FEATURE_ID, Vocabulary

# B rows, L longest prompt, T most new tokens, P common first positions, n positions of a step, H hidden size

NGRAMS = (3, 2)  # lengths of the last tokens that are looked up, the more reliable one first
MAX_DRAFT = 15  # tokens


class TextGeneration:
    """`mmu_generate` of `Showo`."""

    @inference
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
    ) -> torch.Tensor:
        """Continues prompts of any kind: questions about images, or plain text.

        Args:
            input_ids: (B, L) int64, padded on either side with the pad id.
            image_features: raw CLIP features for the −200 positions, in row order.
            max_new_tokens: T.
            temperature, top_k, top_p: see `sample_next`; ``top_k=1`` is greedy.
            eot_token: id or ids that end a row; each row stops by itself and is filled with the pad id.
            attention_mask: of right-padded prompts, whose pads it hides; default: read off the ids.
            callback: called with the (B,) new ids after each token.
            max_draft: most tokens of a single row that are drafted by prompt lookup and checked in one step; 0 turns
                it off. Default: `MAX_DRAFT` in float32; 0 in half precision, where rounding depends on the number of
                positions of a step and might change a token.

        Returns:
            (B, ≤ T) int64 new ids, the end token included.
        """
        prompts = Prompts.of(input_ids, attention_mask, self.vocabulary, image_features)
        stops = torch.as_tensor([] if eot_token is None else eot_token, dtype=torch.long, device=input_ids.device)
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if max_draft is None:
            max_draft = MAX_DRAFT if self.get_input_embeddings().weight.dtype == torch.float32 else 0
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        new_ids = []
        tokens = new_tokens(self, prompts, max_new_tokens, settings, max_draft if len(input_ids) == 1 else 0)
        with closing(tokens):  # so that its cache is released, however the answer ends
            for token in tokens:
                token = token.masked_fill(finished, self.vocabulary.pad_id)
                new_ids.append(token)
                if callback is not None:
                    callback(token)
                finished = finished | torch.isin(token, stops)
                if finished.all():
                    break
        return torch.stack(new_ids, dim=1) if new_ids else input_ids[:, :0]

    def greedy_chooser(self, count: int) -> Callable[[torch.Tensor], Iterator[torch.Tensor]]:
        """The function that picks the likeliest tokens in `count` steps; `cpu.enable` replaces it with a faster one."""
        return partial(greedy_ids, self.showo.get_output_embeddings())


def greedy_ids(head: torch.nn.Module, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """The likeliest tokens (B,) at each of the n positions of hidden states (B, n, H), one position after another."""
    yield from head(hidden).argmax(-1).unbind(1)


def new_tokens(model: Model, prompts: "Prompts", count: int, settings: dict, max_draft: int) -> Iterator[torch.Tensor]:
    """Yields (B,) new ids, `count` times, each computed when it is asked for or with the draft that it confirms.

    Args:
        settings: keyword arguments of `sample_next`.
        max_draft: see `mmu_generate`; not 0 for a single row only.
    """
    choose = _chooser(model, count, settings)
    runner, hidden = prompts.prefill(model, count + max_draft)  # (B, 1, H)
    lookup = PromptLookup(prompts.input_ids[0].tolist() if max_draft else [], max_draft)
    draft, start = [], runner.length - 1
    try:
        while count:
            for accepted, token in enumerate(choose(hidden)):
                yield token
                count -= 1
                if max_draft:
                    lookup.add(int(token))
                if count == 0:
                    return
                if accepted == len(draft) or int(token) != draft[accepted]:
                    break
            runner.crop(start + 1 + accepted)  # without the rejected tokens of the draft
            lookup.adapt(len(draft), accepted)
            draft, start = lookup.draft(count - 1), runner.length
            ids = torch.cat([token, token.new_tensor(draft)])[None] if draft else token[:, None]
            if draft and runner.cache.static:  # one compiled shape for drafts of any length
                ids = torch.nn.functional.pad(ids, (0, max_draft - len(draft)))
            hidden = runner.step(ids)[:, : 1 + len(draft)]  # (B, 1 + draft, H)
    finally:
        runner.release()


def _chooser(model: Model, count: int, settings: dict) -> Callable[[torch.Tensor], Iterator[torch.Tensor]]:
    """The function from hidden states (B, n, H) to the next ids (B,) at each position, chosen as they are asked for."""
    if is_greedy(**{name: value for name, value in settings.items() if name != "generator"}):
        return model.greedy_chooser(count)
    head = model.showo.get_output_embeddings()
    return lambda hidden: (sample_next(logits, **settings) for logits in head(hidden).float().unbind(1))


@dataclass
class Prompts:
    """Prompts with all their ids at the front, so that new ones follow the longest; pads are hidden.

    Args:
        input_ids: (B, L) int64, right-padded.
        lengths: (B,) int64.
        mask: over L positions.
        shared: P, how many first positions are encoded once for all rows.
        image_features: raw CLIP features for the −200 positions, in row order; with P > 0 all lie before P.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    mask: OmniMask
    shared: int = 0
    image_features: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        mask: OmniMask | None,
        vocabulary: Vocabulary,
        image_features: torch.Tensor | None = None,
    ) -> "Prompts":
        """Prompts of ids (B, ·) that are padded on either side, with the mask read off them if none is given."""
        is_token = input_ids != vocabulary.pad_id
        lengths = is_token.sum(1)
        if not lengths.all():
            raise ValueError(f"prompt {int(lengths.argmin())} holds no token, only padding")
        if mask is None:
            order = is_token.int().sort(dim=1, descending=True, stable=True).indices  # tokens in their order, then pads
            input_ids = input_ids.gather(1, order)[:, : int(lengths.max())]
            mask = OmniMask.from_ids(input_ids, vocabulary).hide(input_ids == vocabulary.pad_id)
        elif not is_token[:, 0].all():
            raise ValueError("prompts that bring their attention_mask must be padded on the right")
        shared = common_prefix(input_ids, mask, lengths)
        if image_features is not None:
            shared, image_features = _shared_features(input_ids, shared, image_features)
        return cls(input_ids, lengths, mask, shared, image_features)

    def prefill(self, model: Model, count: int) -> tuple[Runner, torch.Tensor]:
        """(runner with room for `count` new tokens, hidden states (B, 1, H) of the last token of each prompt)."""
        mask = self.mask.extend(count)
        # new tokens follow their own prompt, not the longest one
        column = torch.arange(mask.shape[3], device=mask.device).expand(len(self.lengths), -1)
        longest, lengths = self.input_ids.shape[1], self.lengths[:, None]
        position_ids = torch.where(column < longest, column, column - longest + lengths)
        if self.shared:
            runner = Runner(model, self.mask.select(slice(1)).window(0, self.shared))
            runner.prefill(self.input_ids[:1, : self.shared], self.image_features)
            runner.expand(mask, position_ids)
            hidden = runner.prefill(self.input_ids[:, self.shared :])
        else:
            runner = Runner(model, mask, position_ids)
            hidden = runner.prefill(self.input_ids, self.image_features)
        last = (lengths - 1 - self.shared)[..., None].expand(-1, -1, hidden.shape[-1])
        return runner, hidden.gather(1, last)


def common_prefix(ids: torch.Tensor, mask: OmniMask, lengths: torch.Tensor) -> int:
    """P: how many first positions are the same in all rows and see nothing after themselves; 0 for a single row."""
    if len(ids) == 1:
        return 0
    same = ((ids == ids[0]) & (mask.visible_from == mask.visible_from[0])).all(0).int().cumprod(0)
    longest = min(int(same.sum()), int(lengths.min()) - 1)  # each row keeps a token of its own, for its hidden state
    first_row = torch.where(mask.visible_until > 0, mask.visible_from, ids.shape[1])  # that sees a key
    first_row = first_row.amin(0).flip(0).cummin(0).values.flip(0)  # (L,) that sees any key from here on
    allowed = first_row >= torch.arange(len(first_row), device=ids.device)
    return max((cut for cut in allowed.nonzero()[:, 0].tolist() if cut <= longest), default=0)


def _shared_features(ids: torch.Tensor, shared: int, features: torch.Tensor) -> tuple[int, torch.Tensor]:
    """(P, features): those of one row if all rows show the same images, and only before P; else P = 0."""
    is_feature = ids == IMAGE_FEATURE_ID
    each = len(features) // len(ids)  # images of a row, if all have as many
    by_row = features.unflatten(0, (-1, each)) if each and len(features) == each * len(ids) else features[:0]
    if not shared or is_feature[:, shared:].any() or not len(by_row) or (by_row != by_row[:1]).any():
        return 0, features
    return shared, by_row[0]


class PromptLookup:
    """Drafts how a row continues: as it did the last time its latest tokens occurred (prompt lookup decoding).

    Args:
        ids: of the prompt.
        max_draft: longest draft. It begins short, grows while drafts are accepted, and shrinks when they are not.
    """

    def __init__(self, ids: list[int], max_draft: int):
        self.ids, self.max_draft, self.length = [], max_draft, min(max_draft, 3)
        self.next_index: dict[tuple[int, ...], int] = {}  # n-gram → index of the token after its last occurrence
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Appends a token to the row."""
        for size in NGRAMS:
            if len(self.ids) >= size:
                self.next_index[tuple(self.ids[-size:])] = len(self.ids)
        self.ids.append(token)

    def draft(self, limit: int) -> list[int]:
        """At most `limit` next tokens; none where the latest ones are new."""
        for size in NGRAMS:
            start = self.next_index.get(tuple(self.ids[-size:]))
            if start is not None:
                found = self.ids[start : start + min(limit, self.length)]
                return list(takewhile(lambda token: token >= 0, found))  # image features have no id to check
        return []

    def adapt(self, drafted: int, accepted: int) -> None:
        """Sets the length of the next draft by how many tokens of this one were accepted."""
        if drafted and accepted == drafted:
            self.length = min(self.max_draft, 2 * self.length)
        elif accepted < drafted:
            self.length = min(self.max_draft, max(1, accepted))
