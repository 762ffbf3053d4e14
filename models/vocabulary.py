"""Every id and offset of the vocabulary that text and images share (spec §1).

    text ids | [PAD] and nine task/boundary tokens | image codes | mask token

All offsets follow from three sizes, so another language model or a small tokenizer needs a configuration, no code.
"""

from dataclasses import dataclass

PAD_TOKEN = "[PAD]"
SPECIAL_TOKENS = (
    "<|soi|>",  # start / end of image
    "<|eoi|>",
    "<|sov|>",  # start / end of video; unused like the last three, but part of the published ids
    "<|eov|>",
    "<|t2i|>",  # task: text to image
    "<|mmu|>",  # task: multimodal understanding
    "<|t2v|>",
    "<|v2v|>",
    "<|lvg|>",
)
IMAGE_FEATURE_ID = -200  # placeholder id of a continuous image feature (LLaVA's IMAGE_TOKEN_INDEX)
IGNORE_ID = -100  # label of an unsupervised position


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the special tokens, the image codes and the mask token.

    Args:
        llm_vocab_size: number of text ids, the length of the tokenizer; 50295 as published.
        num_new_special_tokens: number of ids between text and image codes, the pad included; 10 as published.
        codebook_size: number of image codes.

    Raises:
        ValueError: fewer new special tokens than the format needs.
    """

    llm_vocab_size: int = 50295
    num_new_special_tokens: int = 10
    codebook_size: int = 8192

    def __post_init__(self):
        needed = 1 + len(SPECIAL_TOKENS)
        if self.num_new_special_tokens < needed:
            raise ValueError(f"num_new_special_tokens is {self.num_new_special_tokens}, the format needs {needed}")

    def special_token_id(self, token: str) -> int:
        """Id of one of `SPECIAL_TOKENS`, e.g. ``"<|soi|>"``."""
        return self.llm_vocab_size + 1 + SPECIAL_TOKENS.index(token)

    @property
    def pad_id(self) -> int:
        return self.llm_vocab_size

    @property
    def soi_id(self) -> int:
        return self.special_token_id("<|soi|>")

    @property
    def eoi_id(self) -> int:
        return self.special_token_id("<|eoi|>")

    @property
    def t2i_id(self) -> int:
        return self.special_token_id("<|t2i|>")

    @property
    def mmu_id(self) -> int:
        return self.special_token_id("<|mmu|>")

    @property
    def image_offset(self) -> int:
        """Id of image code 0."""
        return self.llm_vocab_size + self.num_new_special_tokens

    @property
    def mask_token_id(self) -> int:
        return self.image_offset + self.codebook_size

    @property
    def vocab_size(self) -> int:
        return self.mask_token_id + 1
