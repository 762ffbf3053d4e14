"""Rows, labels and masks of every task (spec §2). The published rows themselves are in tests/parity."""

import pytest
import torch
from transformers import AutoTokenizer

from models import OmniMask, UniversalPrompting
from models.vocabulary import PAD_TOKEN, SPECIAL_TOKENS
from tests.parity.goldens import PHI

# The golden word tokenizer: word w<n> has id n, <|endoftext|> is 117.
EOT, PAD, SOI, EOI, T2I, MMU = 117, 118, 119, 120, 123, 124
M, N, OFFSET, MASK = 6, 4, 128, 192


def fresh_tokenizer():
    return AutoTokenizer.from_pretrained(PHI, padding_side="left")


def prompting(**settings) -> UniversalPrompting:
    return UniversalPrompting(fresh_tokenizer(), max_text_len=M, **{"cond_dropout_prob": 0.0} | settings)


def image(batch_size: int) -> torch.Tensor:
    return OFFSET + torch.arange(batch_size * N).view(batch_size, N)


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def check_mask(rows, build):
    assert torch.equal(rows.attention_mask.dense(), OmniMask.from_ids(rows.input_ids, build.vocabulary).dense())


# ---- the tokenizer and its new tokens ----


def test_a_tokenizer_can_be_wrapped_twice():
    tokenizer = fresh_tokenizer()
    for build in (UniversalPrompting(tokenizer), UniversalPrompting(tokenizer)):
        assert build.special_token_ids == {PAD_TOKEN: PAD} | {token: SOI + i for i, token in enumerate(SPECIAL_TOKENS)}
        assert len(tokenizer) == 128 and (build.bos_id, build.eos_id) == (EOT, EOT)
    assert tokenizer.decode([SOI, 3, PAD], skip_special_tokens=True).strip() == "w3"


def test_tokenizer_with_the_tokens_elsewhere_is_refused():
    tokenizer = fresh_tokenizer()
    tokenizer.add_tokens(["<|mmu|>"], special_tokens=True)
    with pytest.raises(ValueError, match=r"<\|mmu\|> has id 118 here, expected 125"):
        UniversalPrompting(tokenizer)


# ---- text to image ----


def test_t2i():
    build = prompting()
    labels = torch.full((4, N), -100)
    labels[:, 1] = 150
    rows = build(([words(1, 2), "", words(1, 2, 3, 4), words(1, 2, 3, 4, 5)], image(4), labels), "t2i")
    text = [
        [PAD, PAD, T2I, EOT, 1, 2, EOT],
        [PAD, PAD, PAD, PAD, T2I, EOT, EOT],
        [T2I, EOT, 1, 2, 3, 4, EOT],  # fills the M + 1 ids
        [T2I, EOT, 1, 2, 3, 4, EOT],  # cut, eos put last
    ]
    assert rows.input_ids.tolist() == [t + [SOI, *ids, EOI] for t, ids in zip(text, image(4).tolist(), strict=True)]
    supervised = [[-100 if i == PAD else i for i in t] + [SOI, -100, 150, -100, -100, EOI] for t in text]
    assert rows.labels.tolist() == supervised
    check_mask(rows, build)


def test_t2i_gen_is_the_same_row_without_labels():
    build, texts = prompting(cond_dropout_prob=1.0), [words(5), ""]  # no dropout when generating
    masked = torch.full((2, N), MASK)
    rows = build((texts, masked), "t2i_gen")
    assert rows.labels is None
    assert torch.equal(rows.input_ids, prompting()((texts, masked, masked), "t2i").input_ids)
    check_mask(rows, build)


def test_text_dropout_is_one_draw_per_sample():
    probability, texts = 0.4, [words(i) for i in range(64)]
    build = prompting(cond_dropout_prob=probability)
    generator, twin = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    rows = build((texts, image(64), image(64)), "t2i", generator)
    dropped = torch.rand(64, generator=twin) < probability
    assert 5 < int(dropped.sum()) < 59
    assert torch.equal(generator.get_state(), twin.get_state())
    for row, number, drop in zip(rows.input_ids.tolist(), range(64), dropped.tolist(), strict=True):
        assert [i for i in row[: M + 1] if i != PAD] == [T2I, EOT, EOT] if drop else [T2I, EOT, number, EOT]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_text_dropout_limits_take_a_random_number_all_the_same(probability):
    """The stream of random numbers does not depend on the setting."""
    generator, twin = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    rows = prompting(cond_dropout_prob=probability)(([words(3)], image(1), image(1)), "t2i", generator)
    assert (3 in rows.input_ids) == (probability == 0)
    torch.rand(1, generator=twin)
    assert torch.equal(generator.get_state(), twin.get_state())


def test_a_leading_bos_is_not_doubled():
    build = prompting()
    plain, with_bos = (build(([text], image(1)), "t2i_gen") for text in ("w1 w2", "<|endoftext|>w1 w2"))
    assert torch.equal(plain.input_ids, with_bos.input_ids)
    assert build.text_ids("") == [EOT]


# ---- language modelling ----


def test_lm():
    build = prompting()
    rows = build(([words(1, 2, 3), words(*range(10)), words(*range(6))], 8), "lm")
    expected = [
        [EOT, 1, 2, 3, EOT, PAD, PAD, PAD],
        [EOT, 0, 1, 2, 3, 4, 5, 6],  # cut without eos
        [EOT, 0, 1, 2, 3, 4, 5, EOT],
    ]
    assert rows.input_ids.tolist() == expected
    assert rows.labels.tolist() == [[-100 if i == PAD else i for i in row] for row in expected]
    check_mask(rows, build)
    build.tokenizer.model_max_length = 5  # truncates
    assert build(([words(*range(20))], 9), "lm").input_ids.tolist() == [[EOT, 0, 1, 2, 3, 4, EOT, PAD, PAD]]


# ---- understanding ----


def test_mmu():
    build = prompting()
    texts = [words(1, 2), words(1, 2, 3, 4, 5, 6, 7), "", words(1, 2, 3, 4)]
    rows = build((image(4), texts), "mmu")
    text = [
        [EOT, 1, 2, EOT, PAD, PAD],
        [EOT, 1, 2, 3, 4, EOT],  # cut to M − 1, eos put last
        [EOT, EOT, PAD, PAD, PAD, PAD],
        [EOT, 1, 2, 3, 4, EOT],
    ]
    for row, label, ids, t in zip(rows.input_ids, rows.labels, image(4).tolist(), text, strict=True):
        assert row.tolist() == [MMU, SOI, *ids, EOI, *t]
        assert label.tolist() == [-100] * (N + 3) + [-100 if i == PAD else i for i in t]
    assert torch.equal(rows.attention_mask.dense(), OmniMask.mmu(4, N + 2, N + 3 + M).dense())


def test_mmu_gen_is_open_ended_and_padded_on_the_right():
    build = prompting()
    rows = build((image(2), [words(1, 2, 3), words(9)]), "mmu_gen")
    prefixes = ([MMU, SOI, *ids, EOI, EOT] for ids in image(2).tolist())
    assert rows.input_ids.tolist() == [[*next(prefixes), 1, 2, 3], [*next(prefixes), 9, PAD, PAD]]
    assert rows.labels is None
    hidden = OmniMask.from_ids(rows.input_ids, build.vocabulary).hide(rows.input_ids == PAD)
    assert torch.equal(rows.attention_mask.dense(), hidden.dense())
    assert not rows.attention_mask.dense()[1, 0, :, -2:].any()  # nor does what is generated behind the pads


@pytest.mark.parametrize("system_prompt", [None, words(50, 51, 52)])
def test_mmu_vit(system_prompt):
    build = prompting()
    rows = build(([words(1, 2, 3), words(9)], 5, system_prompt), "mmu_vit")
    system = [50, 51, 52] if system_prompt else []
    prefix = [MMU, *system, SOI, *[-200] * 5, EOI]
    assert rows.input_ids.tolist() == [[*prefix, 1, 2, 3], [*prefix, 9, PAD, PAD]]  # no bos
    nothing = [-100] * len(prefix)
    assert rows.labels.tolist() == [[*nothing, 1, 2, 3], [*nothing, 9, -100, -100]]
    assert not rows.attention_mask.dense()[1, 0, :, -2:].any()
    published = OmniMask.mmu_vit(1, len(system), 5, rows.input_ids.shape[1])
    assert torch.equal(rows.attention_mask.dense()[:1], published.dense())


# ---- mistakes ----


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 't2v'; known: t2i, t2i_gen, lm, mmu, mmu_gen, mmu_vit"):
        prompting()(([""], image(1)), "t2v")


@pytest.mark.parametrize("task", ["t2i", "t2i_gen", "mmu", "mmu_gen"])
@pytest.mark.parametrize("images", [image(3), image(2)[0], image(2)[None]])
def test_texts_and_images_must_pair_up(task, images):
    texts = ["w1", "w2"]
    inputs = {"t2i": (texts, images, images), "t2i_gen": (texts, images)}.get(task, (images, texts))
    with pytest.raises(ValueError, match=r"2 texts need image ids of shape \(2, N\)"):
        prompting()(inputs, task)
