"""Rows of documents against the rules of docs/mixed.md, stated once more by brute force."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from models import OmniMask, UniversalPrompting
from tests.parity.goldens import PHI, prompting, tiny_showo
from tests.tiny_llms import llama_like

EOT, PAD, SOI, EOI, T2I = 117, 118, 119, 120, 123
OFFSET, MASK, N, IGNORED = 128, 192, 16, -100


def image(seed: int, loss: bool = True) -> dict:
    codes = torch.randint(64, (N,), generator=torch.Generator().manual_seed(seed))
    return {"image_ids": codes + OFFSET, "loss": loss}


def text(*numbers: int, loss: bool = True) -> dict:
    return {"text": " ".join(f"w{n}" for n in numbers), "loss": loss}


def every_other(image_ids: torch.Tensor) -> SimpleNamespace:
    """A masking rule: every second code of every image."""
    hidden = (torch.arange(N) % 2 == 0).expand_as(image_ids)
    return SimpleNamespace(
        input_ids=image_ids.masked_fill(hidden, MASK), labels=image_ids.masked_fill(~hidden, IGNORED)
    )


def build(**settings) -> UniversalPrompting:
    tokenizer = AutoTokenizer.from_pretrained(PHI, padding_side="left")
    return UniversalPrompting(tokenizer, **{"cond_dropout_prob": 0.0} | settings)


STORY = [text(1, 2), image(1), text(3), image(2), text(4, 5)]
EDIT = [image(3, loss=False), text(6, loss=False), image(4)]


def random_document(rng: random.Random) -> list[dict]:
    kinds = [rng.choice(("text", "image")) for _ in range(rng.randint(1, 5))]
    loss = lambda: rng.random() < 0.6  # noqa: E731
    return [
        text(rng.randrange(100), loss=loss()) if kind == "text" else image(rng.randrange(99), loss()) for kind in kinds
    ]


# ---- ids, labels and positions, written out ----


def test_a_story_written_out():
    rows = build()(([STORY], every_other), "mixed")
    first, second = STORY[1]["image_ids"].tolist(), STORY[3]["image_ids"].tolist()
    masked = [[MASK if i % 2 == 0 else code for i, code in enumerate(codes)] for codes in (first, second)]
    labels = [[code if i % 2 == 0 else IGNORED for i, code in enumerate(codes)] for codes in (first, second)]
    none = [IGNORED] * N
    expected = [  # ids and labels
        ([T2I], [IGNORED]),
        ([EOT, 1, 2, EOT], [IGNORED, 1, 2, EOT]),
        ([SOI, *masked[0], EOI], [SOI, *labels[0], IGNORED]),  # <soi> is a decision, <eoi> is not
        ([SOI, *first, EOI], [IGNORED, *none, IGNORED]),  # the clean copy
        ([EOT, 3, EOT], [EOT, 3, EOT]),  # bos is a decision
        ([SOI, *masked[1], EOI], [SOI, *labels[1], IGNORED]),
        ([SOI, *second, EOI], [IGNORED, *none, IGNORED]),
        ([EOT, 4, 5, EOT], [EOT, 4, 5, EOT]),
        ([EOT, EOT], [EOT, EOT]),  # the end
    ]
    assert rows.input_ids[0].tolist() == [token for ids, _ in expected for token in ids]
    assert rows.labels[0].tolist() == [label for _, labels in expected for label in labels]
    one, block = list(range(5)), list(range(5, 23))
    two, later = list(range(23, 26)), list(range(26, 44))
    assert rows.position_ids[0].tolist() == [*one, *block, *block, *two, *later, *later, *range(44, 50)]


def test_an_edit_learns_the_second_image_alone():
    rows = build()(([EDIT], every_other), "mixed")
    found = rows.labels[0]
    learned = EDIT[2]["image_ids"][::2].tolist()
    assert found[found != IGNORED].tolist() == [*learned, EOT, EOT], "its masked codes and the end"
    assert (rows.input_ids[0] == SOI).sum() == 2, "neither image needs a second copy"


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_a_text_and_an_image_are_todays_row(family):
    """Ids, mask and labels of the masked codes up to <eoi>, but for left padding."""
    prompt = build() if family == "phi" else UniversalPrompting(llama_like(), cond_dropout_prob=0.0)
    offset = prompt.vocabulary.image_offset
    ids = torch.arange(N)[None] + offset
    labels = ids.masked_fill(torch.arange(N) % 3 > 0, IGNORED)
    today = prompt((["w1 w2"], ids, labels), "t2i")
    noise = lambda image_ids: SimpleNamespace(input_ids=image_ids, labels=labels)  # noqa: E731
    rows = prompt(([[{"text": "w1 w2"}, {"image_ids": ids[0]}]], noise), "mixed")
    pads = int((today.input_ids[0] == prompt.vocabulary.pad_id).sum())
    length = today.input_ids.shape[1] - pads
    assert torch.equal(rows.input_ids[:, :length], today.input_ids[:, pads:])
    assert torch.equal(rows.labels[:, length - N - 1 : length - 1], today.labels[:, -N - 1 : -1])
    dense = rows.attention_mask.dense()[..., :length, :length]
    assert torch.equal(dense, today.attention_mask.dense()[..., pads:, pads:])
    assert rows.input_ids[0, length:].tolist() == [prompt.bos_id, prompt.eos_id]


def test_texts_in_a_row_are_one():
    parts = [image(1, loss=False), text(1, 2, loss=False), text(3), text(4, loss=False)]
    rows = build()(([parts], every_other), "mixed")
    assert rows.input_ids[0, 19:].tolist() == [EOT, 1, 2, 3, 4, EOT, EOT, EOT]
    assert rows.labels[0, 19:].tolist() == [IGNORED, IGNORED, IGNORED, 3, IGNORED, IGNORED, IGNORED, IGNORED]


@pytest.mark.parametrize("segment", [text(1, 2), image(5)])
def test_what_follows_the_last_segment_of_a_cut_document_is_not_learned(segment):
    whole, cut = (build()(([[text(3), segment | more]], every_other), "mixed") for more in ({}, {"is_cut": True}))
    own = whole.labels.shape[1] - (3 if "text" in segment else 2)  # eos or none, bos, eos
    assert torch.equal(whole.input_ids, cut.input_ids)
    assert torch.equal(whole.labels[:, :own], cut.labels[:, :own]) and (whole.labels[:, own:] != IGNORED).all()
    assert (cut.labels[:, own:] == IGNORED).all()


# ---- who sees whom ----


def rules(document: list[dict], history: str) -> list[list[bool]]:
    """The mask of a document's row, from the words of docs/mixed.md. A token is (segment, copy, kind)."""
    tokens, last = [(-1, "only", "task")], len(document) - 1
    for number, segment in enumerate(document):
        if "text" in segment:
            words = len(segment["text"].split())
            before, after = number and "text" in document[number - 1], number < last and "text" in document[number + 1]
            tokens += [(number, "only", "text")] * (words + (not before) + (not after))
        elif segment["loss"] and history == "clean" and number < last:
            tokens += [(number, "masked", "image")] * (N + 2) + [(number, "clean", "image")] * (N + 2)
        else:
            tokens += [(number, "only", "image")] * (N + 2)
    tokens += [(last + 1, "only", "text")] * 2

    def sees(query: int, key: int) -> bool:
        if tokens[key][2] == "image" and tokens[query] == tokens[key]:
            return True  # an image sees itself as a whole
        if tokens[key][1] == "masked":
            return False  # and nobody else sees its masked copy
        return key <= query

    return [[sees(query, key) for key in range(len(tokens))] for query in range(len(tokens))]


@pytest.mark.parametrize("history", ["clean", "masked"])
@pytest.mark.parametrize("seed", range(8))
def test_the_mask_is_the_rules(history, seed):
    rng = random.Random(seed)
    documents = [random_document(rng) for _ in range(3)]
    rows = build(history=history)((documents, every_other), "mixed")
    for number, document in enumerate(documents):
        expected = torch.tensor(rules(document, history))
        length = len(expected)
        assert torch.equal(rows.attention_mask.dense()[number, 0, :length, :length], expected)
        assert (rows.input_ids[number, length:] == PAD).all()


def test_prefix_learns_the_images_from_a_random_one_on():
    """Show-o2's rule: all of them in 30 % of the rows, else from a random one on; those before are clean."""
    document = [image(1), image(2), image(3)]
    starts = []
    torch.manual_seed(0)
    prompt = build(history="prefix")
    for _ in range(200):
        labels = prompt(([document], every_other), "mixed").labels[0]
        learned = [bool((labels[1 + 18 * k : 17 + 18 * k] >= OFFSET).any()) for k in range(3)]
        assert learned[2] and learned == sorted(learned)
        starts.append(learned.index(True))
    shares = [starts.count(k) / 200 for k in range(3)]
    assert shares == pytest.approx([0.3 + 0.7 / 3, 0.7 / 3, 0.7 / 3], abs=0.1)


# ---- dropout, for the two null rows of generation ----


def test_without_texts_only_images_are_learned():
    rows = build(cond_dropout_prob=1.0, history_dropout_prob=0.0)(([STORY], every_other), "mixed")
    ids, labels = rows.input_ids[0].tolist(), rows.labels[0]
    assert ids[:4] == [T2I, EOT, EOT, SOI] and ids.count(EOT) == 2 * 3 + 2
    assert (labels[labels != IGNORED] >= OFFSET).all() and (labels != IGNORED).sum() == N
    assert build(cond_dropout_prob=1.0)(([[text(1)]],), "mixed").input_ids.tolist() == [[T2I, EOT, 1, EOT, EOT, EOT]]


def test_without_history_each_image_is_todays_unconditional_row():
    rows = build(cond_dropout_prob=1.0, history_dropout_prob=1.0)(([STORY], every_other), "mixed")
    today = prompting(0.0)(([""], every_other(STORY[1]["image_ids"][None]).input_ids), "t2i_gen").input_ids[0]
    length = 3 + N + 2
    assert torch.equal(rows.input_ids[0, :length], today[-length:])
    assert rows.position_ids[0].tolist() == [*range(length)] * 2
    dense = rows.attention_mask.dense()[0, 0]
    assert not dense[:length, length:].any() and not dense[length:, :length].any()
    assert torch.equal(dense[:length, :length], dense[length:, length:])


# ---- what the model then knows ----


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


def logits_of(model, rows) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.hidden_states(rows.input_ids, rows.attention_mask, position_ids=rows.position_ids)
        return model.get_output_embeddings()(hidden)[0]


@pytest.mark.parametrize("changed", [1, 2, 3, 4])
def test_a_later_segment_changes_no_earlier_logits(model, changed):
    other = [dict(segment) for segment in STORY]
    other[changed] = (
        image(77) if "image_ids" in STORY[changed] else text(*range(20, 20 + len(STORY[changed]["text"].split())))
    )
    before, after = (logits_of(model, build()(([document], every_other), "mixed")) for document in (STORY, other))
    begin = [0, 5, 41, 44, 80][changed]
    torch.testing.assert_close(before[:begin], after[:begin], rtol=0, atol=1e-5)
    assert (before[begin:] - after[begin:]).abs().max() > 1e-3


def test_the_masked_copy_changes_no_logits_but_its_own(model):
    def others(image_ids):
        hidden = (torch.arange(N) < 12).expand_as(image_ids)
        return SimpleNamespace(input_ids=image_ids.masked_fill(hidden, MASK), labels=image_ids)

    before, after = (logits_of(model, build()(([STORY], noise), "mixed")) for noise in (every_other, others))
    own = torch.zeros(len(before), dtype=torch.bool)
    own[5:23] = own[44:62] = True
    torch.testing.assert_close(before[~own], after[~own], rtol=0, atol=1e-5)
    assert (before[own] - after[own]).abs().max() > 1e-3


def test_prompts_to_go_on_from():
    rows = build()(([STORY, EDIT[:2]],), "mixed_gen")
    assert rows.input_ids[0, -4:].tolist() == [EOT, 4, 5, EOT] and rows.input_ids[1, -1] == PAD
    assert rows.input_ids[1, :22].tolist() == [T2I, SOI, *EDIT[0]["image_ids"].tolist(), EOI, EOT, 6, EOT]
    opened = build()(([STORY, [image(1)]], True), "mixed_gen").input_ids
    assert opened[0, -1] == 5 and opened[1, 19:21].tolist() == [EOT, PAD]
    expected = OmniMask.from_ids(rows.input_ids, build().vocabulary).hide(rows.input_ids == PAD).dense()
    assert torch.equal(rows.attention_mask.dense(), expected)
