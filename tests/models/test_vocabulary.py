"""Every id follows from three sizes (spec §1)."""

from dataclasses import FrozenInstanceError

import pytest

from models.vocabulary import IGNORE_ID, IMAGE_FEATURE_ID, PAD_TOKEN, SPECIAL_TOKENS, Vocabulary


def test_published_ids():
    v = Vocabulary()
    special = {token: v.special_token_id(token) for token in SPECIAL_TOKENS}
    names = ("<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
    assert special == {name: number for number, name in enumerate(names, 50296)}
    assert (v.soi_id, v.eoi_id, v.t2i_id, v.mmu_id) == (50296, 50297, 50300, 50301)
    assert (v.pad_id, v.image_offset, v.mask_token_id, v.vocab_size) == (50295, 50305, 58497, 58498)
    assert (PAD_TOKEN, IMAGE_FEATURE_ID, IGNORE_ID) == ("[PAD]", -200, -100)


@pytest.mark.parametrize("sizes", [(118, 10, 64), (1000, 10, 4096), (5, 13, 2)])
def test_parts_lie_side_by_side_without_gap_or_overlap(sizes):
    llm_vocab_size, num_new_special_tokens, codebook_size = sizes
    vocabulary = Vocabulary(*sizes)
    special = [vocabulary.pad_id, *map(vocabulary.special_token_id, SPECIAL_TOKENS)]
    assert special == list(range(llm_vocab_size, llm_vocab_size + 10))
    assert vocabulary.image_offset == llm_vocab_size + num_new_special_tokens > special[-1]
    assert vocabulary.mask_token_id == vocabulary.image_offset + codebook_size
    assert vocabulary.vocab_size == sum(sizes) + 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="num_new_special_tokens is 9, the format needs 10"):
        Vocabulary(num_new_special_tokens=9)
    with pytest.raises(ValueError):
        Vocabulary().special_token_id("<|sot|>")  # bos, a text id
    with pytest.raises(FrozenInstanceError):
        Vocabulary().codebook_size = 3
