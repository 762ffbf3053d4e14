"""Every corner of spec §9 by hand: what a conversation becomes, and which tokens are learned; chat templates."""

import logging

import pytest
import torch
from tokenizers import processors

from llava import (
    IGNORE_INDEX,
    SYSTEM_PROMPT,
    ChatFormat,
    QuestionFormat,
    collate,
    encode_conversation,
    encode_plain,
)
from models import UniversalPrompting
from tests.parity.phi15 import phi15_tokenizer
from tests.tiny_llms import byte_tokenizer, llama_like, qwen_like

EOS = "<|endoftext|>"
GONE = [IGNORE_INDEX]


@pytest.fixture(scope="module")
def tokenizer():
    return phi15_tokenizer()


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def assert_pieces(sample, tokenizer, pieces):
    """`pieces` are (text, learned) in order; they are tokenised apart, so give answers their leading blank."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text, _ in pieces]
    labels = [piece if learned else GONE * len(piece) for piece, (_, learned) in zip(ids, pieces, strict=True)]
    assert sample["input_ids"].tolist() == sum(ids, [])
    assert sample["labels"].tolist() == sum(labels, [])


ASKED, ANSWERED = ("USER: Who? ASSISTANT:", False), (" A cat." + EOS, True)


@pytest.mark.parametrize(
    ("turns", "pieces"),
    [
        (
            [human("Who?"), gpt("A cat."), human("Where?"), gpt("There.")],
            [ASKED, ANSWERED, ("USER: Where? ASSISTANT:", False), (" There." + EOS, True)],
        ),
        *(
            ([human(question), gpt("A cat.")], [ASKED, ANSWERED])  # image tags are removed
            for question in ("<image>\nWho?", "Who?\n<image>", "<image> <image>\n Who? ", "  Who?<image>")
        ),
        (  # turns without a tag are not stripped
            [human(" <image>\nWho? "), gpt("\tA cat. "), human(" Where?\n"), gpt("<image> There. ")],
            [ASKED, (" \tA cat. " + EOS, True), ("USER:  Where?\n ASSISTANT:", False), (" There." + EOS, True)],
        ),
        ([gpt("Hello."), human("Who?"), gpt("A cat.")], [ASKED, ANSWERED]),  # one leading answer is dropped
        (  # an empty answer swallows the next question into its round, which still has one ` ASSISTANT: `
            [human("Who?"), gpt(""), human("Where?"), gpt("There.")],
            [("USER: Who? ASSISTANT:USER: Where? ASSISTANT:", False), (" There." + EOS, True)],
        ),
        ([human("Who?"), gpt(" ")], [ASKED, ("  " + EOS, True)]),  # a blank is not empty
        (  # a mark without its blanks does not split
            [human("What is ASSISTANT:?"), gpt("Me.")],
            [("USER: What is ASSISTANT:? ASSISTANT:", False), (" Me." + EOS, True)],
        ),
        (
            [human("Who?"), gpt("A cat."), human("a  b"), gpt("  c\n\n\td ")],
            [ASKED, ANSWERED, ("USER: a  b ASSISTANT:", False), ("   c\n\n\td " + EOS, True)],
        ),
    ],
)
def test_answers_and_their_eos_are_learned(turns, pieces, tokenizer, caplog):
    assert_pieces(encode_conversation(turns, tokenizer), tokenizer, pieces)
    assert not caplog.records


def test_the_input_is_left_as_it_was(tokenizer):
    turns = [gpt("Hello."), human("<image>\nWho?"), gpt("A cat.")]
    encode_conversation(turns, tokenizer)
    assert turns == [gpt("Hello."), human("<image>\nWho?"), gpt("A cat.")]


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        # no blank before ASSISTANT, or none behind it: there is no answer
        ([human("<image>"), gpt("A cat.")], f"USER:ASSISTANT: A cat.{EOS}"),
        ([human("Who?"), gpt("")], "USER: Who? ASSISTANT:"),
        # a last question without answer; the end is stripped
        ([human("Who?"), gpt("A cat."), human("Where? ")], f"USER: Who? ASSISTANT: A cat.{EOS}USER: Where?"),
        ([human("Who?")], "USER: Who?"),
        # a round that does not split in two
        *(
            (
                [human("Who?"), gpt("A cat."), human("Where?"), gpt(answer)],
                f"USER: Who? ASSISTANT: A cat.{EOS}USER: Where? ASSISTANT: {answer}{EOS}",
            )
            for answer in ("Say ASSISTANT: hello.", f"Say {EOS} hello.")
        ),
    ],
)
def test_what_cannot_be_split_into_rounds_loses_its_labels_with_a_warning(turns, text, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="llava"):
        assert_pieces(encode_conversation(turns, tokenizer), tokenizer, [(text, False)])
    assert len(caplog.records) == 1 and "without labels" in caplog.text


def prompt_and_answer(tokenizer, total):
    """A round of exactly `total` tokens with its eos, and the number of tokens before its answer."""
    prompt = len(tokenizer("USER: Who? ASSISTANT:").input_ids)
    return [human("Who?"), gpt(" ".join(["cat"] * (total - prompt - 1)))], prompt


@pytest.mark.parametrize("total", [2047, 2048, 2049, 3000])
def test_truncation_keeps_the_labels_of_what_is_left(total, tokenizer, caplog):
    turns, prompt = prompt_and_answer(tokenizer, total)
    got = encode_conversation(turns, tokenizer)
    length = min(total, 2048)
    assert len(got["input_ids"]) == length
    assert got["labels"].tolist() == GONE * prompt + got["input_ids"].tolist()[prompt:]
    assert (got["input_ids"][-1] == tokenizer.eos_token_id) == (total <= 2048)
    assert not caplog.records


def test_a_cut_text_keeps_labels_only_if_its_rounds_reach_the_cut(tokenizer, caplog):
    unanswered = human("Where " * 3000)
    turns, prompt = prompt_and_answer(tokenizer, 2047)
    assert (encode_conversation([*turns, unanswered], tokenizer)["labels"] == IGNORE_INDEX).all()
    assert len(caplog.records) == 1
    turns, prompt = prompt_and_answer(tokenizer, 2048)
    got = encode_conversation([*turns, unanswered], tokenizer)
    assert got["labels"].tolist() == GONE * prompt + got["input_ids"].tolist()[prompt:]
    assert len(caplog.records) == 1


def test_a_question_that_fills_the_context_leaves_no_label_and_no_warning(tokenizer, caplog):
    got = encode_conversation([human("who " * 3000), gpt("A cat.")], tokenizer)
    assert len(got["labels"]) == 2048 and (got["labels"] == IGNORE_INDEX).all()
    assert not caplog.records


@pytest.mark.parametrize(
    ("turns", "named"),
    [
        (None, "None"),
        ([], "one or more turns"),
        ("text", "'text'"),
        ([human("Who?"), "text"], "turn 1"),
        ([human("Who?"), {"from": "gpt"}], r"turn 1: lacks \['value'\]"),
        ([{"value": "Who?"}, gpt("A cat.")], r"turn 0: lacks \['from'\]"),
        ([human("Who?"), {"from": "system", "value": "A cat."}], "turn 1.*'system'"),
        ([human("Who?"), {"from": ["gpt"], "value": "A cat."}], "turn 1"),
        ([human("Who?"), gpt(None)], "turn 1: 'value' must be text, got None"),
    ],
)
@pytest.mark.parametrize("encode", [encode_conversation, encode_plain])
def test_malformed_turns_are_named(encode, turns, named, tokenizer):
    with pytest.raises(ValueError, match=named):
        encode(turns, tokenizer)


@pytest.mark.parametrize(
    ("encode", "turns", "message"),
    [
        (encode_conversation, [gpt("Hello.")], "take turns"),
        (encode_conversation, [human("Who?"), human("Where?")], "take turns"),
        (encode_conversation, [human("a"), gpt("b"), gpt("c")], "take turns"),
        (encode_conversation, [gpt("Hello."), gpt("Hello?"), human("Who?"), gpt("A cat.")], "take turns"),
        (encode_plain, [human("a")], "plain"),
        (encode_plain, [gpt("a"), human("b")], "plain"),
        (encode_plain, [human("a"), gpt("b"), human("c")], "plain"),
    ],
)
def test_speakers_must_take_turns_and_plain_needs_exactly_a_question_and_an_answer(encode, turns, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode(turns, tokenizer)


def test_plain_is_the_answer_a_newline_and_eos(tokenizer):
    got = encode_plain([human("Say <image>"), gpt(" A cat. ")], tokenizer)  # not stripped: no tag in the answer
    assert got["input_ids"].tolist() == tokenizer(f" A cat. \n{EOS}").input_ids
    assert torch.equal(got["labels"], got["input_ids"])
    got = encode_plain([human("Say."), gpt("<image>\nA cat. ")], tokenizer)
    assert got["input_ids"].tolist() == tokenizer(f"A cat.\n{EOS}").input_ids
    assert encode_plain([human("Say."), gpt("")], tokenizer)["input_ids"].tolist() == [198, 50256]


def test_collate_pads_on_the_right_and_cuts():
    tokenizer = phi15_tokenizer()
    tokenizer.pad_token = "!"  # id 0: an existing pad token is used as it is
    samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6, 7], [8])]
    got = collate([samples[0] | {"image": "ignored"}, samples[1]], tokenizer, 2)
    assert set(got) == {"input_ids", "labels"}
    assert got["input_ids"].tolist() == [[5, 6], [8, 0]] and got["labels"].tolist() == [[5, 6], [8, -100]]
    assert got["input_ids"].dtype == got["labels"].dtype == torch.int64
    with pytest.raises(ValueError, match="length"):
        collate(samples, tokenizer, 0)


def test_another_tokenizer_brings_its_own_eos_and_no_bos():
    tokenizer = byte_tokenizer(("</s>",), bos_token="</s>", eos_token="</s>")  # id 256
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 256)]
    )
    assert tokenizer("Hi").input_ids[0] == 256  # it would put bos first
    got = encode_conversation([human("Hi"), gpt("Ho"), human("Hi"), gpt("Ho")], tokenizer)
    prompt, answer = GONE * len("USER: Hi ASSISTANT:"), tokenizer(" Ho", add_special_tokens=False).input_ids + [256]
    assert got["labels"].tolist() == (prompt + answer) * 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        encode_plain([human("Hi"), gpt("Ho")], tokenizer)


# ---- conversation=chat: questions and tuning rows in the format of a chat template ----

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# writes the thought of the last turn alone, and a system prompt where none is given, as Qwen's do
THINKING = (
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def completed(tokenizer):
    return UniversalPrompting(tokenizer).tokenizer


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LLAMA3 = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
KIND = "<|im_start|>system\nBe kind.<|im_end|>\n"


@pytest.mark.parametrize(
    ("make_tokenizer", "template", "start", "question", "end", "between"),
    [
        (qwen_like, None, "", CHATML, "<|im_end|>", "\n"),
        (qwen_like, THINKING, KIND, CHATML + "<think>\n\n</think>\n\n", "<|im_end|>", "\n"),
        (llama_like, None, "<|begin_of_text|>", LLAMA3, "<|eot_id|>", ""),
        (llama_like, MISTRAL, "<|begin_of_text|>", "[INST] {}[/INST]", "<|end_of_text|>", ""),
    ],
)
def test_answers_and_the_end_of_their_turn_are_learned(make_tokenizer, template, start, question, end, between):
    """The rest is the prompt, piece by piece as it is tokenised when a question is asked."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer = completed(tokenizer)
    turns = [human("<image>\nWho?"), gpt("A cat."), human("Old?"), gpt("No.")]
    sample = ChatFormat.of(tokenizer).encode(turns, tokenizer)
    asked, asked_again = start + question.format("Who?"), between + question.format("Old?")
    pieces = [(asked, False), ("A cat." + end, True), (asked_again, False), ("No." + end, True)]
    assert_pieces(sample, tokenizer, pieces)
    prompt = QuestionFormat.of("chat", tokenizer, False).prompt("Who?")
    assert tokenizer(prompt, add_special_tokens=False).input_ids == tokenizer(asked, add_special_tokens=False).input_ids


def test_the_published_format_is_the_default_one_and_a_chat_stops_at_the_end_of_its_turn():
    tokenizer = completed(qwen_like())
    seen, coded = (QuestionFormat.of("vicuna", tokenizer, features) for features in (True, False))
    assert (seen.prompt("Who?"), seen.system_prompt) == ("USER: Who? ASSISTANT:", SYSTEM_PROMPT)
    assert (coded.prompt("Who?"), coded.system_prompt) == ("USER: \nWho? ASSISTANT:", None)
    assert coded.stop_ids == (tokenizer.eos_token_id,) and coded.answer_gap == " "
    chat = QuestionFormat.of("chat", tokenizer, True)
    assert list(chat.stop_ids) == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (chat.system_prompt, chat.answer_gap) == (None, "")


def test_bos_comes_first_where_the_template_writes_none():
    tokenizer = byte_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), bos_token="<|endoftext|>")
    tokenizer.eos_token = "<|endoftext|>"
    assert ChatFormat.of(completed(tokenizer)).opening == "<|endoftext|><|im_start|>user\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ ''.__class__.__mro__ }}", "template fails"),
        ("{% for n in range(1000000000) %}{% endfor %}", "template fails"),
        ("{% for m in messages %}{{ m.content + ' END ' }}{% endfor %}", "ends an answer with"),
    ],
)
def test_a_tokenizer_without_a_template_that_serves_is_refused(template, message):
    tokenizer = byte_tokenizer(("<|endoftext|>",), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"{message}.*give conversation=vicuna"):
        QuestionFormat.of("chat", completed(tokenizer), False)
