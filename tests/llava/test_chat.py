"""`conversation: chat`: questions and tuning rows in the format of a language model's chat template."""

import pytest
import torch

from llava import SYSTEM_PROMPT, ChatFormat, QuestionFormat
from models import UniversalPrompting
from tests.tiny_llms import byte_tokenizer, llama_like, qwen_like

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


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


def completed(tokenizer):
    return UniversalPrompting(tokenizer).tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "template", "text"),
    [
        (
            qwen_like,
            None,
            "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n[A cat.<|im_end|>]\n<|im_start|>user\nOld?"
            "<|im_end|>\n<|im_start|>assistant\n[No.<|im_end|>]",
        ),
        (
            qwen_like,
            THINKING,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>"
            "\n\n</think>\n\n[A cat.<|im_end|>]\n<|im_start|>user\nOld?<|im_end|>\n<|im_start|>assistant\n<think>\n\n"
            "</think>\n\n[No.<|im_end|>]",
        ),
        (
            llama_like,
            None,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant"
            "<|end_header_id|>\n\n[A cat.<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nOld?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[No.<|eot_id|>]",
        ),
        (
            llama_like,
            MISTRAL,
            "<|begin_of_text|>[INST] Who?[/INST][A cat.<|end_of_text|>][INST] Old?[/INST][No.<|end_of_text|>]",
        ),
    ],
)
def test_answers_and_the_end_of_their_turn_are_learned(tokenizer, template, text):
    """In brackets what is; the rest is the prompt, piece by piece as it is tokenised when a question is asked."""
    tokenizer = tokenizer()
    tokenizer.chat_template = template
    tokenizer = completed(tokenizer)
    sample = ChatFormat.of(tokenizer).encode(
        [human("<image>\nWho?"), gpt("A cat."), human("Old?"), gpt("No.")], tokenizer
    )
    ids, learned = sample["input_ids"].tolist(), sample["labels"] != -100
    pieces = text.replace("INST]", "INST}").replace("[INST", "{INST").replace("[/INST", "{/INST").split("[")
    pieces = [part.replace("{", "[").replace("}", "]") for piece in pieces for part in piece.split("]")]
    assert tokenizer.decode(ids) == "".join(pieces)
    spans = [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    expected = [number % 2 == 1 for number, span in enumerate(spans) for _ in span]
    assert learned.tolist() == expected and torch.equal(sample["labels"][learned], sample["input_ids"][learned])
    prompt = QuestionFormat.of("chat", tokenizer, False).prompt("Who?")
    assert ids[: len(spans[0])] == tokenizer(prompt, add_special_tokens=False).input_ids


def test_a_question_stops_at_the_end_of_its_turn_and_at_eos():
    tokenizer = completed(qwen_like())
    asked = QuestionFormat.of("chat", tokenizer, True)
    assert list(asked.stop_ids) == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (asked.system_prompt, asked.answer_gap) == (None, "")


def test_the_published_format_is_the_default_one():
    tokenizer = completed(qwen_like())
    seen, coded = (QuestionFormat.of("vicuna", tokenizer, features) for features in (True, False))
    assert (seen.prompt("Who?"), seen.system_prompt) == ("USER: Who? ASSISTANT:", SYSTEM_PROMPT)
    assert (coded.prompt("Who?"), coded.system_prompt) == ("USER: \nWho? ASSISTANT:", None)
    assert coded.stop_ids == (tokenizer.eos_token_id,) and coded.answer_gap == " "


def test_bos_comes_first_where_the_template_writes_none():
    tokenizer = byte_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), bos_token="<|endoftext|>")
    tokenizer.eos_token = "<|endoftext|>"
    assert ChatFormat.of(completed(tokenizer)).opening == "<|endoftext|><|im_start|>user\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.content + ' END ' }}{% endfor %}", "ends an answer with"),
    ],
)
def test_a_tokenizer_without_a_template_that_serves_is_refused(template, message):
    tokenizer = byte_tokenizer(("<|endoftext|>",), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"{message}.*give conversation=vicuna"):
        QuestionFormat.of("chat", completed(tokenizer), False)
