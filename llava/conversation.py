"""LLaVA conversations as token ids and labels for training (spec §9), and question prompts for inference (spec §8).

A conversation is the value of `conversations` in LLaVA's json, a list of `{"from": "human" | "gpt", "value": text}`.
It is rendered as one text,

    USER: {question} ASSISTANT: {answer}<|endoftext|>USER: {question} ASSISTANT: {answer}<|endoftext|>

in which only the answers and the `<|endoftext|>` after each are supervised; or, with `conversation: chat`, by the
language model's chat template, in which the answers and the end-of-turn token are supervised. Images are not handled
here: `<image>` tags are removed, and `UniversalPrompting` puts the image ids or features before the text.
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

IGNORE_INDEX = -100  # label of unsupervised positions
IMAGE_TOKEN_INDEX = -200  # placeholder id, replaced by an image feature
IMAGE_TAG = "<image>"
MAX_TEXT_TOKENS = 2048  # longer conversations are truncated, as published
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_ROLES = {"human": "USER", "gpt": "ASSISTANT"}
_ANSWER_MARK = " ASSISTANT: "


def question_prompt_vq(question: str) -> str:
    """The prompt of a question to a model that sees image codes (spec §8)."""
    return f"USER: \n{question} ASSISTANT:"


def question_prompt_vit(question: str) -> str:
    """The prompt of a question to a model that sees CLIP features; follows the system prompt (spec §8)."""
    return f"USER: {question} ASSISTANT:"


@dataclass(frozen=True)
class QuestionFormat:
    """The prompt format of questions and the stop tokens of answers (`conversation: vicuna | chat`).

    Args:
        before, after: text before and after the question.
        answer_gap: text between the prompt and an answer.
        system_prompt: text before the CLIP features of a row; None if there is none.
        stop_ids: ids that end an answer.
    """

    before: str
    after: str
    answer_gap: str
    system_prompt: str | None
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, conversation: str, tokenizer: PreTrainedTokenizerBase, with_features: bool) -> QuestionFormat:
        """The format of this name.

        Args:
            conversation: ``vicuna``, as published, or ``chat``, the tokenizer's chat template.
            with_features: whether the model sees CLIP features instead of image codes.

        Raises:
            ValueError: the tokenizer has no usable chat template.
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
    """The text that a chat template puts around the messages of a conversation.

    Args:
        opening: before the first question; starts with bos, as all other rows do.
        to_answer: between a question and its answer.
        end_of_turn: the token after an answer, which the model learns to generate.
        to_question: between `end_of_turn` and the next question.
    """

    opening: str
    to_answer: str
    end_of_turn: str
    to_question: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Renders three placeholder messages with the template and cuts out the text between them.

        Training then uses exactly the pieces that inference uses. Rendering whole conversations would not: some
        templates change earlier turns once others follow, for example by dropping an empty "thinking" block.

        Raises:
            ValueError: there is no template, or it does not end an answer with a special token.
        """
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; give conversation=vicuna")
        marks = ("QUESTION-ONE", "ANSWER-ONE", "QUESTION-TWO")
        turns = [
            {"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)
        ]

        def render(turns: list[dict]) -> str:
            options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            try:
                return tokenizer.apply_chat_template(turns, **options)
            except Exception as error:  # a template is a program, in a sandbox, that may fail in any way
                raise ValueError(f"the chat template fails ({error}); give conversation=vicuna") from None

        opening, _, to_answer = render(turns[:1]).partition(marks[0])
        between = render(turns).partition(marks[1])[2].partition(marks[2])[0]
        first = _tokens(between, tokenizer)[:1]
        end_of_turn = tokenizer.convert_ids_to_tokens(first)[0] if first else ""
        if end_of_turn not in tokenizer.get_added_vocab() or not between.startswith(end_of_turn):
            raise ValueError(
                f"the chat template ends an answer with {between!r:.40}, which is no special token; give "
                "conversation=vicuna"
            )
        if tokenizer.bos_token and not opening.startswith(tokenizer.bos_token):
            opening = tokenizer.bos_token + opening
        return cls(opening, to_answer, end_of_turn, between.removeprefix(end_of_turn))

    def encode(self, turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """A conversation as one instruction-tuning sample; like `encode_conversation`, but in this format.

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
    """A conversation as one instruction-tuning sample: the answers are supervised, the questions are not (spec §9).

    A leading `gpt` turn is dropped. The rest must alternate, starting with `human`; the last turn may be either's.

    Returns:
        `input_ids` and `labels`, both (L,) int64 with L ≤ 2048, without bos. A label is the id at its own position (the
        loss shifts) or −100. If the question-answer pairs do not add up to the text, no position is labelled and a
        warning is logged.

    Raises:
        ValueError: the turns are malformed; the message names the turn, so that a loader can skip and count the sample.
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
    """A question-answer pair as one sample of projector pre-training: the answer, a newline, eos (spec §9).

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

    Rows are padded on the right with the pad id (labels: −100) or truncated. For a tokenizer without a pad token its
    length is taken as the pad id, since Show-o adds the pad there (spec §1).

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
    """(speaker, message) of every turn, without image tags; `ValueError` names the index of a malformed turn."""
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
    if IMAGE_TAG in message:  # Faithful: only such turns are stripped (test_answers_and_their_eos_are_learned)
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
        # Faithful: an empty message leaves the bare role, with no space or eos before the next one
        # (test_answers_and_their_eos_are_learned, test_what_cannot_be_split…).
        text += f"{_ROLES[speaker]}: {message}{end}" if message else f"{_ROLES[speaker]}:"
    return text.strip()


def _label_answers(text: str, input_ids: list[int], eos: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Labels, as long as `input_ids`: the ids of all answers and of the eos after each, −100 elsewhere.

    Faithful: the text is split at eos into question-answer pairs, and positions are the summed lengths of the pairs
    tokenised separately. A text whose pairs do not sum to its length (a last question without an answer, a second
    ` ASSISTANT: ` in a pair) gets no labels. A text truncated at 2048 tokens keeps them if the pairs reach that far.
    """
    labels = [IGNORE_INDEX] * len(input_ids)
    start = 0
    for pair in text.split(eos):
        parts = pair.split(_ANSWER_MARK)
        if len(parts) != 2:  # also the empty string after the last eos
            break
        # − 1: the space before an answer is part of the answer's first token; + 1: the eos after it.
        answer = start + len(_tokens(parts[0] + _ANSWER_MARK, tokenizer)) - 1
        end = start + len(_tokens(pair, tokenizer)) + 1
        labels[answer:end] = input_ids[answer:end]
        start = end
    if start == len(input_ids) or start >= MAX_TEXT_TOKENS:
        return labels
    logger.warning(
        "conversation left without labels: its question-answer pairs have %d tokens, its text %d: %.80r",
        start,
        len(input_ids),
        text,
    )
    return [IGNORE_INDEX] * len(input_ids)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # LLaVA rows have no bos (spec §2). `verbose=False`: long texts are truncated here, no need to warn.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise ValueError("answers of LLaVA conversations end with eos, but this tokenizer has no eos_token")
    return tokenizer.eos_token


def _sample(input_ids: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor(input_ids, dtype=torch.long),
        "labels": torch.tensor(labels, dtype=torch.long),
    }
