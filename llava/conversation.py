"""From LLaVA's turns to token ids and labels (spec §9), and the prompts of a question (spec §8).

A conversation is what stands under `conversations` in LLaVA's json: a list of
`{"from": "human" | "gpt", "value": text}`. It becomes one text,

    USER: {question} ASSISTANT: {answer}<|endoftext|>USER: {question} ASSISTANT: {answer}<|endoftext|>

of which only the answers and the `<|endoftext|>` behind them are learnt. No image is read here: `<image>` tags are
dropped, and the image's ids or features are put before the text where the row is built.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # a label that no loss counts
IMAGE_TOKEN_INDEX = -200  # the id at which an image feature is spliced into a row
IMAGE_TAG = "<image>"
MAX_TEXT_TOKENS = 2048  # Phi-1.5's context
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_ROLES = {"human": "USER", "gpt": "ASSISTANT"}
_ANSWER_MARK = " ASSISTANT: "


def question_prompt_vq(question: str) -> str:
    """What a model that sees image codes is asked with (spec §8)."""
    return f"USER: \n{question} ASSISTANT:"


def question_prompt_vit(question: str) -> str:
    """What a model that sees CLIP features is asked with, after the system prompt (spec §8)."""
    return f"USER: {question} ASSISTANT:"


def encode_conversation(
    turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """A conversation as one tuning sample: the answers are supervised, the questions are not (spec §9).

    A leading `gpt` turn is dropped; after it the two must take turns, beginning with `human`, and either may end.
    Returns `input_ids` and `labels`, both (L,) int64 with L ≤ 2048 and without bos; a label is its own id (the loss
    shifts) or −100. A sample whose rounds do not add up to its text keeps its ids, has no label at all, and is logged
    as a warning.

    Raises:
        ValueError: the turns are malformed; names the turn, so that a loader can skip and count the sample.
    """
    messages = _read_turns(turns)
    if messages[0][0] == "gpt":
        messages = messages[1:]
    _check_alternation(messages)
    eos = _eos_token(tokenizer)
    text = _render(messages, eos)
    input_ids = _tokens(text, tokenizer)[:MAX_TEXT_TOKENS]
    return _sample(input_ids, _label_answers(text, input_ids, eos, tokenizer))


def encode_plain(turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """A question and its answer as one CLIP pre-training sample: the answer, a newline, eos (spec §9).

    Returns `input_ids` and `labels`, both (L,) int64, equal to each other: every token is supervised.

    Raises:
        ValueError: the turns are malformed, or not one of `human` and one of `gpt`.
    """
    messages = _read_turns(turns)
    speakers = [speaker for speaker, _ in messages]
    if speakers != ["human", "gpt"]:
        raise ValueError(f"plain sample: needs one 'human' turn and then one 'gpt' turn, got {speakers}")
    answer = messages[1][1]
    input_ids = _tokens(answer + "\n" + _eos_token(tokenizer), tokenizer)
    return _sample(input_ids, input_ids)


def collate(
    samples: Sequence[Mapping[str, torch.Tensor]], tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, torch.Tensor]:
    """Samples of `encode_conversation` or `encode_plain` as one batch of exactly `length` columns (spec §9).

    Shorter rows are filled on the right with pad (labels: −100), longer ones are cut. A tokenizer that has no pad token
    is taken to get one as its next id, as spec §1 has it.

    Returns `input_ids` and `labels`, both (B, length) int64.
    """
    if length < 1:
        raise ValueError(f"collate: length must be at least 1, got {length}")
    pad_id = len(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = {}
    for key, fill in (("input_ids", pad_id), ("labels", IGNORE_INDEX)):
        rows = torch.full((len(samples), length), fill, dtype=torch.long)  # (B, length)
        for row, sample in zip(rows, samples, strict=True):
            kept = sample[key][:length]
            row[: len(kept)] = kept
        batch[key] = rows
    return batch


def _read_turns(turns: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(speaker, message) of every turn, image tags removed; a malformed turn is refused by its place."""
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(f"conversation: needs a list of one or more turns, got {turns!r:.80}")
    return [_read_turn(index, turn) for index, turn in enumerate(turns)]


def _read_turn(index: int, turn: Mapping[str, str]) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"conversation turn {index}: needs a mapping with 'from' and 'value', got {turn!r:.80}")
    missing = [key for key in ("from", "value") if key not in turn]
    if missing:
        raise ValueError(f"conversation turn {index}: lacks {missing}, has {list(turn)}")
    speaker, message = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise ValueError(f"conversation turn {index}: 'from' must be one of {list(_ROLES)}, got {speaker!r:.80}")
    if not isinstance(message, str):
        raise ValueError(f"conversation turn {index}: 'value' must be text, got {message!r:.80}")
    if IMAGE_TAG in message:  # Faithful: only such turns are stripped (test_only_turns_with_an_image_tag_are_stripped)
        message = message.replace(IMAGE_TAG, "").strip()
    return speaker, message


def _check_alternation(messages: list[tuple[str, str]]) -> None:
    expected = ["human", "gpt"] * len(messages)
    speakers = [speaker for speaker, _ in messages]
    if not speakers or speakers != expected[: len(speakers)]:
        raise ValueError(
            f"conversation: 'human' and 'gpt' must take turns, 'human' first; after a leading 'gpt' turn is dropped, "
            f"got {speakers}"
        )


def _render(messages: list[tuple[str, str]], eos: str) -> str:
    text = ""
    for speaker, message in messages:
        end = " " if speaker == "human" else eos
        # Faithful: an empty message leaves the bare role, and nothing parts it from the next one
        # (test_empty_messages_leave_the_bare_role).
        text += f"{_ROLES[speaker]}: {message}{end}" if message else f"{_ROLES[speaker]}:"
    return text.strip()


def _label_answers(text: str, input_ids: list[int], eos: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all answers and their eos at their places, −100 elsewhere (as long as `input_ids`).

    Faithful: the places are counted from the rounds' own lengths, so a text that does not fall into rounds which add up
    to it (a last question without an answer, a second ` ASSISTANT: ` in a round) has no labels. A text longer than 2048
    tokens was cut and cannot add up: it keeps its labels if the rounds reach that far.
    """
    labels = [IGNORE_INDEX] * len(input_ids)
    start = 0
    for round_text in text.split(eos):
        parts = round_text.split(_ANSWER_MARK)
        if len(parts) != 2:  # also the empty piece behind the last eos
            break
        # The blank before an answer belongs to the answer's first token, hence − 1; the round's own eos, hence + 1.
        answer = start + len(_tokens(parts[0] + _ANSWER_MARK, tokenizer)) - 1
        end = start + len(_tokens(round_text, tokenizer)) + 1
        labels[answer:end] = input_ids[answer:end]
        start = end
    if start == len(input_ids) or start >= MAX_TEXT_TOKENS:
        return labels
    logger.warning(
        "conversation left without labels: its rounds hold %d tokens, its text %d: %.80r", start, len(input_ids), text
    )
    return [IGNORE_INDEX] * len(input_ids)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # LLaVA rows have no bos (spec §2), whichever tokenizer it is; `verbose` would complain about what we cut ourselves.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise ValueError("LLaVA conversations end their answers with eos, and this tokenizer has no eos_token")
    return tokenizer.eos_token


def _sample(input_ids: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor(input_ids, dtype=torch.long),
        "labels": torch.tensor(labels, dtype=torch.long),
    }
