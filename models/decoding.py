"""What is behind `mmu_generate`: prompts of any lengths, read once, guesses, and the loop over new tokens (SPEC §8).

`Prompts` lays the rows of a batch out so that what they begin with in common (one picture, many questions) is computed
once. `PromptLookup` guesses the next tokens from what the row has said before; the transformer checks all of them in
one pass, which costs hardly more than one token, so an answer that repeats itself comes faster and stays the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from models.decode_graph import DecodeGraph
from models.greedy_head import MOST_ROWS, greedy_head, is_plain_linear
from models.incremental import PlainPhi, incremental, is_compiled
from models.omni_attention import OmniMask
from models.sampling import is_greedy, sample_next
from models.thin import product
from models.vocabulary import IMAGE_FEATURE_ID, Vocabulary

# B rows, L longest prompt, T most new tokens, P common first positions, H hidden size

NGRAMS = (3, 2)  # lengths of what must have been said before, the surer one first
MAX_DRAFT = 15  # tokens
GREEDY_HEAD_PAYS = GRAPH_PAYS = 16  # new tokens that are worth the making of a `GreedyHead`, of a `DecodeGraph`


@dataclass
class Prompts:
    """Prompts with all their ids at the front and room for new ones behind the longest.

    Args:
        input_ids: (B, L) int64, right-padded.
        lengths: (B,) int64.
        mask: over L + T positions; pads are hidden from everything.
        shared: P, how many first positions are computed once for all rows.
        image_features: raw CLIP features for the −200 positions, in row order; with P > 0 all lie before P.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    mask: OmniMask
    shared: int = 0
    image_features: torch.Tensor | None = None

    @classmethod
    def of(
        cls, input_ids: torch.Tensor, vocabulary: Vocabulary, room: int, image_features: torch.Tensor | None = None
    ) -> "Prompts":
        """Reads the mask off ids (B, ·) that are padded on either side."""
        is_text = input_ids != vocabulary.pad_id
        lengths = is_text.sum(1)
        order = is_text.int().sort(dim=1, descending=True, stable=True).indices  # text in its order, then pads
        ids = input_ids.gather(1, order)[:, : int(lengths.max())]
        is_pad = ids == vocabulary.pad_id
        mask = OmniMask.from_ids(ids, vocabulary).hide(is_pad)
        shared = _common_start(ids, mask, lengths)
        if image_features is not None:
            shared, image_features = _shared_features(ids, shared, image_features)
        return cls(ids, lengths, mask.extend(room), shared, image_features)

    @property
    def positions(self) -> torch.Tensor | None:
        """(B, L + T) rotary positions: new tokens follow their own prompt, not the longest. None: 0 … L + T − 1."""
        longest, total = self.input_ids.shape[1], self.mask.shape[3]
        if (self.lengths == longest).all():
            return None
        position = torch.arange(total, device=self.input_ids.device).expand(len(self.input_ids), -1)
        return torch.where(position < longest, position, position - longest + self.lengths[:, None])

    def read(self, model):
        """(runner that has read the prompts, hidden states (B, 1, H) of the last id of each)."""
        last = (self.lengths - 1)[:, None]
        if not self.shared:
            transformer = incremental(model, self.mask, self.positions)
            return transformer, transformer.extend(self.input_ids, image_features=self.image_features, needed=last)
        start = self.input_ids[:1, : self.shared]
        transformer = incremental(model, self.mask.select(slice(1)).keys(self.shared))
        transformer.extend(start, image_features=self.image_features, needed=start.new_empty(1, 0))
        transformer.spread(self.mask, self.positions)
        return transformer, transformer.extend(self.input_ids[:, self.shared :], needed=last - self.shared)


def _common_start(ids: torch.Tensor, mask: OmniMask, lengths: torch.Tensor) -> int:
    """P: how many first positions are the same in all rows and see nothing behind themselves; 0 for a single row."""
    if len(ids) == 1:
        return 0
    same = ((ids == ids[0]) & (mask.visible_from == mask.visible_from[0])).all(0).int().cumprod(0)
    longest = min(int(same.sum()), int(lengths.min()) - 1)  # every row has an id of its own left, for its hidden state
    first_row = torch.where(mask.visible_until > 0, mask.visible_from, ids.shape[1])  # that sees a key
    first_row = first_row.amin(0).flip(0).cummin(0).values.flip(0)  # (L,) that sees any key from here on
    allowed = first_row >= torch.arange(len(first_row), device=ids.device)
    return max((cut for cut in allowed.nonzero()[:, 0].tolist() if cut <= longest), default=0)


def _shared_features(ids: torch.Tensor, shared: int, features: torch.Tensor) -> tuple[int, torch.Tensor]:
    """(P, features): those of one row where all rows show the same pictures and nothing else before P; else P = 0."""
    is_feature = ids == IMAGE_FEATURE_ID
    each = len(features) // len(ids)  # pictures of a row, if all have as many
    by_row = features.unflatten(0, (-1, each)) if each and len(features) == each * len(ids) else features[:0]
    if not shared or is_feature[:, shared:].any() or not len(by_row) or (by_row != by_row[:1]).any():
        return 0, features
    return shared, by_row[0]


class PromptLookup:
    """Guesses how a row goes on: as it did the last time its latest ids stood there (prompt lookup decoding).

    Args:
        ids: of the prompt.
        most: longest guess. It begins short, grows while guesses come true, and shrinks when they do not.
    """

    def __init__(self, ids: list[int], most: int):
        self.ids, self.most, self.length = [], most, min(most, 3)
        self.behind: dict[tuple[int, ...], int] = {}  # ids in a row → where the last text behind them begins
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """One more id of the row."""
        for size in NGRAMS:
            if len(self.ids) >= size:
                self.behind[tuple(self.ids[-size:])] = len(self.ids)
        self.ids.append(token)

    def guess(self, room: int) -> list[int]:
        """At most `room` next ids; none where the latest ids are new."""
        for size in NGRAMS:
            start = self.behind.get(tuple(self.ids[-size:]))
            if start is not None:
                return self.ids[start : start + min(room, self.length)]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Sets the length of the next guess by how many ids of this one came true."""
        if guessed and right == guessed:
            self.length = min(self.most, 2 * self.length)
        elif right < guessed:
            self.length = max(1, right)


def new_tokens(
    model, prompts: Prompts, count: int, sampling: dict, max_draft: int | None = None
) -> Iterator[torch.Tensor]:
    """Yields (B,) new ids, `count` times, each computed when it is asked for or with the guess that it confirms.

    Args:
        sampling: keyword arguments of `sample_next`.
        max_draft: see `mmu_generate`.
    """
    transformer, hidden = prompts.read(model)  # (B, 1, H)
    choose = _chooser(model.showo.lm_head, len(hidden), count, sampling)
    lookup, guess = _lookup(model, prompts.input_ids, max_draft), []
    graphed = hidden.is_cuda and is_compiled(model.showo) and isinstance(transformer, PlainPhi) and count >= GRAPH_PAYS
    extend_one = DecodeGraph(transformer).extend if graphed else transformer.extend
    while count:
        for right, token in enumerate(choose(hidden)):  # behind the ids that were known, then behind each guess
            yield token
            count -= 1
            if lookup is not None:
                lookup.add(int(token))
            if not count:
                return
            if right == len(guess) or int(token) != guess[right]:
                break
        if lookup is not None:
            transformer.forget(len(guess) - right)  # what was run behind a wrong guess
            lookup.learn(len(guess), right)
            guess = lookup.guess(count - 1)
        if guess:
            hidden = transformer.extend(torch.cat([token, token.new_tensor(guess)])[None])  # (1, 1 + guesses, H)
        else:
            hidden = extend_one(token[:, None])  # (B, 1, H)


def _lookup(model, input_ids: torch.Tensor, max_draft: int | None) -> PromptLookup | None:
    if max_draft is None:  # in half precision the rounding of a pass depends on the number of its positions
        max_draft = MAX_DRAFT if model.showo.lm_head.weight.dtype == torch.float32 else 0
    return PromptLookup(input_ids[0].tolist(), max_draft) if max_draft and len(input_ids) == 1 else None


def _chooser(head: torch.nn.Module, num_rows: int, count: int, sampling: dict):
    """The function from hidden states (B, n, H) to n new ids (B,), drawn one after the other as they are needed."""
    settings = {name: value for name, value in sampling.items() if name != "generator"}
    quick = greedy_head(head, num_rows) if is_greedy(**settings) and count >= GREEDY_HEAD_PAYS else None

    def choose(hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        if quick is not None:
            for part in hidden.split(MOST_ROWS, dim=1):  # behind a wrong guess nothing is looked at
                yield from quick.argmax(part.flatten(0, 1)).view(part.shape[:2]).unbind(1)
            return
        for logits in _run_head(head, hidden).float().unbind(1):
            yield sample_next(logits, **sampling)

    return choose


def _run_head(head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (B, n, V)."""
    if not is_plain_linear(head):
        return head(hidden)
    return product(hidden.flatten(0, 1), head.weight, head.bias).unflatten(0, hidden.shape[:2])
