"""Every corner of spec §9, by hand: which text a conversation becomes, and which of its tokens are learnt."""

import logging

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llava import IGNORE_INDEX, collate, encode_conversation, encode_plain, question_prompt_vit, question_prompt_vq
from tests.parity.phi15 import phi15_tokenizer

EOS = "<|endoftext|>"
GONE = [IGNORE_INDEX]


@pytest.fixture(scope="module")
def tokenizer():
    return phi15_tokenizer()


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def check(turns, tokenizer, *pieces):
    """`pieces` are (text, learnt) in order; they are tokenised apart, so give answers their leading blank."""
    got = encode_conversation(turns, tokenizer)
    ids = [tokenizer(text).input_ids for text, _ in pieces]
    labels = [piece if learnt else GONE * len(piece) for piece, (_, learnt) in zip(ids, pieces, strict=True)]
    assert got["input_ids"].tolist() == sum(ids, [])
    assert got["labels"].tolist() == sum(labels, [])


def test_answers_and_their_eos_are_learnt(tokenizer):
    check(
        [human("Who?"), gpt("A cat."), human("Where?"), gpt("There.")],
        tokenizer,
        ("USER: Who? ASSISTANT:", False),
        (" A cat." + EOS, True),
        ("USER: Where? ASSISTANT:", False),
        (" There." + EOS, True),
    )


def test_the_input_is_left_as_it_was(tokenizer):
    turns = [gpt("Hello."), human("<image>\nWho?"), gpt("A cat.")]
    encode_conversation(turns, tokenizer)
    assert turns == [gpt("Hello."), human("<image>\nWho?"), gpt("A cat.")]


@pytest.mark.parametrize("question", ["<image>\nWho?", "Who?\n<image>", "<image> <image>\n Who? ", "  Who?<image>"])
def test_image_tags_are_removed(question, tokenizer):
    check([human(question), gpt("A cat.")], tokenizer, ("USER: Who? ASSISTANT:", False), (" A cat." + EOS, True))


def test_only_turns_with_an_image_tag_are_stripped(tokenizer):
    check(
        [human(" <image>\nWho? "), gpt("\tA cat. "), human(" Where?\n"), gpt("<image> There. ")],
        tokenizer,
        ("USER: Who? ASSISTANT:", False),
        (" \tA cat. " + EOS, True),
        ("USER:  Where?\n ASSISTANT:", False),
        (" There." + EOS, True),
    )


def test_one_leading_gpt_turn_is_dropped(tokenizer):
    turns = [human("Who?"), gpt("A cat.")]
    expected = encode_conversation(turns, tokenizer)
    got = encode_conversation([gpt("Hello."), *turns], tokenizer)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="take turns"):
        encode_conversation([gpt("Hello."), gpt("Hello?"), *turns], tokenizer)


def test_empty_messages_leave_the_bare_role(tokenizer, caplog):
    # An empty answer swallows the next question into its round, which still has one ` ASSISTANT: `.
    check(
        [human("Who?"), gpt(""), human("Where?"), gpt("There.")],
        tokenizer,
        ("USER: Who? ASSISTANT:USER: Where? ASSISTANT:", False),
        (" There." + EOS, True),
    )
    assert not caplog.records
    # A round that lacks the blank before ASSISTANT, and one that lacks the blank behind it, have no answer.
    check([human("<image>"), gpt("A cat.")], tokenizer, ("USER:ASSISTANT: A cat." + EOS, False))
    check([human("Who?"), gpt("")], tokenizer, ("USER: Who? ASSISTANT:", False))
    assert len(caplog.records) == 2


def test_a_blank_message_is_not_empty(tokenizer):
    check([human("Who?"), gpt(" ")], tokenizer, ("USER: Who? ASSISTANT:", False), ("  " + EOS, True))


def test_a_last_question_without_answer_unlabels_the_sample(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="llava"):
        check(
            [human("Who?"), gpt("A cat."), human("Where? ")],
            tokenizer,
            (f"USER: Who? ASSISTANT: A cat.{EOS}USER: Where?", False),  # the end is stripped
        )
    assert len(caplog.records) == 1 and "without labels" in caplog.text
    check([human("Who?")], tokenizer, ("USER: Who?", False))


@pytest.mark.parametrize("answer", ["Say ASSISTANT: hello.", f"Say {EOS} hello."])
def test_a_round_that_does_not_split_in_two_unlabels_the_sample(answer, tokenizer, caplog):
    text = f"USER: Who? ASSISTANT: A cat.{EOS}USER: Where? ASSISTANT: {answer}{EOS}"
    check([human("Who?"), gpt("A cat."), human("Where?"), gpt(answer)], tokenizer, (text, False))
    assert len(caplog.records) == 1


def test_a_mark_without_its_blanks_does_not_split(tokenizer):
    check(
        [human("What is ASSISTANT:?"), gpt("Me.")],
        tokenizer,
        ("USER: What is ASSISTANT:? ASSISTANT:", False),
        (" Me." + EOS, True),
    )


def test_nothing_is_warned_of_when_all_is_well(tokenizer, caplog):
    got = encode_conversation([human("Who?"), gpt("A cat."), human("a  b"), gpt("  c\n\n\td ")], tokenizer)
    assert not caplog.records
    assert (got["labels"] != IGNORE_INDEX).sum() == len(tokenizer(f" A cat.{EOS}   c\n\n\td {EOS}").input_ids)


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


@pytest.mark.parametrize("turns", [[gpt("Hello.")], [human("Who?"), human("Where?")], [human("a"), gpt("b"), gpt("c")]])
def test_speakers_must_take_turns(turns, tokenizer):
    with pytest.raises(ValueError, match="take turns"):
        encode_conversation(turns, tokenizer)


def test_plain_is_the_answer_a_newline_and_eos(tokenizer):
    got = encode_plain([human("Say <image>"), gpt(" A cat. ")], tokenizer)  # not stripped: no tag in the answer
    assert got["input_ids"].tolist() == tokenizer(f" A cat. \n{EOS}").input_ids
    assert torch.equal(got["labels"], got["input_ids"])
    got = encode_plain([human("Say."), gpt("<image>\nA cat. ")], tokenizer)
    assert got["input_ids"].tolist() == tokenizer(f"A cat.\n{EOS}").input_ids
    assert encode_plain([human("Say."), gpt("")], tokenizer)["input_ids"].tolist() == [198, 50256]


@pytest.mark.parametrize("turns", [[human("a")], [gpt("a"), human("b")], [human("a"), gpt("b"), human("c")]])
def test_plain_needs_exactly_a_question_and_an_answer(turns, tokenizer):
    with pytest.raises(ValueError, match="plain"):
        encode_plain(turns, tokenizer)


def test_collate_pads_on_the_right_and_cuts():
    tokenizer = phi15_tokenizer()
    tokenizer.pad_token = "!"  # id 0: an existing pad token is used as it is
    samples = [
        {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7])},
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([8]), "image": "ignored"},
    ]
    got = collate(samples, tokenizer, 2)
    assert got["input_ids"].tolist() == [[5, 6], [8, 0]]
    assert got["labels"].tolist() == [[-100, 6], [8, -100]]
    assert got["input_ids"].dtype == got["labels"].dtype == torch.int64
    assert set(got) == {"input_ids", "labels"}
    assert collate(samples, tokenizer, 5)["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="length"):
        collate(samples, tokenizer, 0)


def test_another_tokenizer_brings_its_own_eos_and_no_bos():
    bpe = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens([AddedToken("</s>", special=True)])  # id 256
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="</s>", eos_token="</s>")
    assert tokenizer("Hi").input_ids[0] == 256  # it would put bos first
    got = encode_conversation([human("Hi"), gpt("Ho"), human("Hi"), gpt("Ho")], tokenizer)
    prompt, answer = GONE * len("USER: Hi ASSISTANT:"), tokenizer(" Ho", add_special_tokens=False).input_ids + [256]
    assert got["labels"].tolist() == (prompt + answer) * 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        encode_plain([human("Hi"), gpt("Ho")], tokenizer)


def test_question_prompts():
    assert question_prompt_vq("Who?") == "USER: \nWho? ASSISTANT:"
    assert question_prompt_vit("Who?") == "USER: Who? ASSISTANT:"
