"""From LLaVA's turns to token ids and labels (spec §9), and the prompts of a question (spec §8).

A conversation is what stands under `conversations` in LLaVA's json: a list of
`{"from": "human" | "gpt", "value": text}`. It becomes one text,

    USER: {question} ASSISTANT: {answer}<|endoftext|>USER: {question} ASSISTANT: {answer}<|endoftext|>

of which only the answers and the `<|endoftext|>` behind them are learned; or, with `conversation: chat`, the text that
the language model's chat template makes of it, of which the answers and the token that ends a turn are learned. No
image is read here: `<image>` tags are dropped, and the image's ids or features are put before the text where the row is
built.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # a label that no loss counts
IMAGE_TOKEN_INDEX = -200  # the id at which an image feature is spliced into a row
IMAGE_TAG = "<image>"
MAX_TEXT_TOKENS = 2048  # of a conversation, as published
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


@dataclass(frozen=True)
class QuestionFormat:
    """How a question is asked: the text of a prompt, and what ends an answer (`conversation: vicuna | chat`).

    Args:
        before, after: text before and after the question.
        answer_gap: what an answer begins with behind that.
        system_prompt: text that a row with CLIP features holds before the features.
        stop_ids: ids that end an answer.
    """

    before: str
    after: str
    answer_gap: str
    system_prompt: str | None
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, conversation: str, tokenizer: PreTrainedTokenizerBase, with_features: bool) -> QuestionFormat:
        """
        Args:
            conversation: ``vicuna``, as published, or ``chat``, the tokenizer's chat template.
            with_features: whether the model sees CLIP features instead of image codes.

        Raises:
            ValueError: the tokenizer has no chat template that serves.
        """
        if conversation == "chat":
            chat = ChatFormat.of(tokenizer)
            stop_ids = (tokenizer.convert_tokens_to_ids(chat.end_of_turn), tokenizer.eos_token_id)
            return cls(chat.opening, chat.to_answer, "", None, tuple(dict.fromkeys(stop_ids)))
        prompt = question_prompt_vit if with_features else question_prompt_vq
        before, after = prompt("\0").split("\0")
        return cls(before, after, " ", SYSTEM_PROMPT if with_features else None, (tokenizer.eos_token_id,))

    def prompt(self, question: str) -> str:
        return f"{self.before}{question}{self.after}"


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around the messages of a conversation.

    Args:
        opening: before the first question; begins with bos, as every other row does.
        to_answer: between a question and its answer.
        end_of_turn: the token behind an answer, which the model learns to end with.
        to_question: behind that, before the next question.
    """

    opening: str
    to_answer: str
    end_of_turn: str
    to_question: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Read off the template by what it makes of three marks, so that each piece is tokenised as it is when a
        question is asked: templates write a turn otherwise once another follows (a date, an empty thought).

        Raises:
            ValueError: there is no template, or it ends an answer with no token of its own.
        """
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; give conversation=vicuna")
        marks = ("QUESTION-ONE", "ANSWER-ONE", "QUESTION-TWO")
        turns = [
            {"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)
        ]

        def written(turns: list[dict]) -> str:
            return tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )

        opening, _, to_answer = written(turns[:1]).partition(marks[0])
        between = written(turns).partition(marks[1])[2].partition(marks[2])[0]
        first = _tokens(between, tokenizer)[:1]
        end_of_turn = tokenizer.convert_ids_to_tokens(first)[0] if first else ""
        if end_of_turn not in tokenizer.get_added_vocab() or not between.startswith(end_of_turn):
            raise ValueError(
                f"the chat template ends an answer with {between!r:.40}, no token; give conversation=vicuna"
            )
        if tokenizer.bos_token and not opening.startswith(tokenizer.bos_token):
            opening = tokenizer.bos_token + opening
        return cls(opening, to_answer, end_of_turn, between.removeprefix(end_of_turn))

    def encode(self, turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """A conversation as one tuning sample; as `encode_conversation`, but in this format.

        Raises:
            ValueError: the turns are malformed.
        """
        messages = _read_turns(turns)
        if messages[0][0] == "gpt":
            messages = messages[1:]
        _check_alternation(messages)
        input_ids, labels = [], []
        for number, (speaker, message) in enumerate(messages):
            if speaker == "human":
                ids = _tokens((self.to_question if number else self.opening) + message + self.to_answer, tokenizer)
                labels += [IGNORE_INDEX] * len(ids)
            else:
                ids = _tokens(message + self.end_of_turn, tokenizer)
                labels += ids
            input_ids += ids
        return _sample(input_ids[:MAX_TEXT_TOKENS], labels[:MAX_TEXT_TOKENS])


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
