"""Every id follows from three sizes (spec §1)."""

from dataclasses import FrozenInstanceError

import pytest

from models.vocabulary import IGNORE_ID, IMAGE_FEATURE_ID, PAD_TOKEN, SPECIAL_TOKENS, Vocabulary


def test_published_ids():
    vocabulary = Vocabulary()
    ids = [vocabulary.special_token_id(token) for token in SPECIAL_TOKENS]
    assert vocabulary.pad_id == 50295
    assert dict(zip(SPECIAL_TOKENS, ids, strict=True)) == {
        "<|soi|>": 50296,
        "<|eoi|>": 50297,
        "<|sov|>": 50298,
        "<|eov|>": 50299,
        "<|t2i|>": 50300,
        "<|mmu|>": 50301,
        "<|t2v|>": 50302,
        "<|v2v|>": 50303,
        "<|lvg|>": 50304,
    }
    assert (vocabulary.image_offset, vocabulary.mask_token_id, vocabulary.vocab_size) == (50305, 58497, 58498)


def test_named_ids_are_those_of_the_tokens():
    vocabulary = Vocabulary(llm_vocab_size=7)
    named = (vocabulary.soi_id, vocabulary.eoi_id, vocabulary.t2i_id, vocabulary.mmu_id)
    tokens = ("<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>")
    assert named == tuple(vocabulary.special_token_id(token) for token in tokens)
    assert PAD_TOKEN == "[PAD]"


@pytest.mark.parametrize("sizes", [(118, 10, 64), (1000, 10, 4096), (5, 13, 2)])
def test_parts_lie_side_by_side_without_gap_or_overlap(sizes):
    llm_vocab_size, num_new_special_tokens, codebook_size = sizes
    vocabulary = Vocabulary(*sizes)
    special = [vocabulary.pad_id, *map(vocabulary.special_token_id, SPECIAL_TOKENS)]
    assert special == list(range(llm_vocab_size, llm_vocab_size + 10))
    assert vocabulary.image_offset == llm_vocab_size + num_new_special_tokens > special[-1]
    assert vocabulary.mask_token_id == vocabulary.image_offset + codebook_size
    assert vocabulary.vocab_size == sum(sizes) + 1


def test_room_for_all_special_tokens_is_needed():
    with pytest.raises(ValueError, match="num_new_special_tokens is 9, the format needs 10"):
        Vocabulary(num_new_special_tokens=9)


def test_unknown_token_and_changes_are_refused():
    with pytest.raises(ValueError):
        Vocabulary().special_token_id("<|sot|>")  # bos, a text id
    with pytest.raises(FrozenInstanceError):
        Vocabulary().codebook_size = 3


def test_placeholders_are_no_ids():
    assert IMAGE_FEATURE_ID == -200 and IGNORE_ID == -100
