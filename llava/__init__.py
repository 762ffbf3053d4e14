"""LLaVA conversations as training samples (spec §9) and the prompts that a trained model is asked with (spec §8)."""

from llava.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    SYSTEM_PROMPT,
    ChatFormat,
    QuestionFormat,
    collate,
    encode_conversation,
    encode_plain,
    question_prompt_vit,
    question_prompt_vq,
)

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_INDEX",
    "SYSTEM_PROMPT",
    "ChatFormat",
    "QuestionFormat",
    "collate",
    "encode_conversation",
    "encode_plain",
    "question_prompt_vit",
    "question_prompt_vq",
]
