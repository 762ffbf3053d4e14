"""Doors for scripts written against the published code: its names and call forms over ours (docs/migrating.md).

Modules of the published names pass them on: training/prompting_utils.py, training/utils.py, llava/llava.py.
"""

import sys
from collections import defaultdict
from copy import copy
from functools import wraps
from secrets import token_hex
from types import SimpleNamespace
from typing import Any

import torch

from common.files import resolve_path
from models import prompting
from models.generation.document import DocumentGeneration
from models.generation.image import ImageGeneration
from models.generation.sampling import get_mask_schedule
from models.generation.text import TextGeneration
from models.images import preprocess
from models.omni_attention import OmniMask
from models.vocabulary import IMAGE_FEATURE_ID, SPECIAL_TOKENS

HIDDEN = float(torch.iinfo(torch.int64).min)  # what a published mask adds to the scores of hidden keys
IN_THE_IDS = ("noise_type", "seq_len", "uni_prompting", "config")  # of `t2i_generate`; the ids or the model say it

get_mask_chedule = get_mask_schedule  # the published spelling


class PublishedGeneration(ImageGeneration, TextGeneration, DocumentGeneration):
    """`t2i_generate` and `mmu_generate` that also take the published arguments and dense masks."""

    @wraps(ImageGeneration.t2i_generate)
    def t2i_generate(self, *args, attention_mask: OmniMask | torch.Tensor | None = None, **settings) -> torch.Tensor:
        settings = {name: value for name, value in settings.items() if name not in IN_THE_IDS}
        if isinstance(attention_mask, torch.Tensor):
            attention_mask = OmniMask.from_dense(attention_mask)
        return super().t2i_generate(*args, attention_mask=attention_mask, **settings)

    @wraps(TextGeneration.mmu_generate)
    def mmu_generate(self, input_ids=None, *, attention_mask=None, input_embeddings=None, idx=None, **settings):
        """With a dense mask, as published: a list of the new ids of one row, given as ids or embeddings (1, L, H)."""
        input_ids = idx if input_ids is None else input_ids
        if not isinstance(attention_mask, torch.Tensor):
            return super().mmu_generate(input_ids, attention_mask=attention_mask, **settings)
        model = copy(self)
        if input_embeddings is not None:
            model.embed = lambda input_ids, image_features: image_features
            settings["image_features"] = input_embeddings
            input_ids = torch.full_like(input_embeddings[..., 0], IMAGE_FEATURE_ID, dtype=torch.long)
        mask = OmniMask.from_dense(attention_mask)
        return list(TextGeneration.mmu_generate(model, input_ids, attention_mask=mask, **settings)[0])


class UniversalPrompting:
    """Rows as the published class gives them: (ids, pad mask), and for training labels as well; all (B, L) int64."""

    def __init__(self, text_tokenizer, special_tokens=SPECIAL_TOKENS, max_text_len=8000, max_seq_len=377, **settings):
        if tuple(special_tokens) != SPECIAL_TOKENS:
            raise ValueError(f"special_tokens are {tuple(special_tokens)}; checkpoints know {SPECIAL_TOKENS}")
        self.rows = prompting.UniversalPrompting(text_tokenizer, max_text_len, **settings)
        self.text_tokenizer, self.max_text_len = text_tokenizer, max_text_len + 1  # as published, with the task token
        self.ignore_id, self.cond_dropout_prob = self.rows.ignore_id, self.rows.cond_dropout_prob
        ids = {"<|sot|>": self.rows.bos_id, "<|eot|>": self.rows.eos_id}
        ids |= {token.replace("[PAD]", "<|pad|>"): number for token, number in self.rows.special_token_ids.items()}
        self.sptids_dict = {token: torch.tensor([number]) for token, number in ids.items()}
        self.pad_id = ids["<|pad|>"]

    def __call__(self, input: tuple, task: str, padding=True, config=None) -> tuple[torch.Tensor, ...]:
        rows = self.rows(input, task)
        result = rows.input_ids, (rows.input_ids != self.pad_id).long()
        return result if rows.labels is None else (*result, rows.labels)


def create_attention_mask_predict_next(
    sequence, pad_id=128256, soi_id=128257, eoi_id=128258, rm_pad_in_image=False, return_inverse_mask=True
) -> torch.Tensor:
    """(B, 1, L, L) of rows (B, L): causal, but the rows of an image see everything; no row but pads sees pads."""
    is_pad, is_eoi = sequence == pad_id, sequence == eoi_id
    in_image = (sequence == soi_id).int().cumsum(1) > is_eoi.int().cumsum(1) - is_eoi.int()
    allowed = _causal(sequence) | in_image[:, :, None]
    if rm_pad_in_image:
        allowed &= ~is_pad[:, None] | is_pad[:, :, None]
    return _published(allowed, return_inverse_mask)


def create_attention_mask_for_mmu(sequence, eoi_id=128258, return_inverse_mask=True) -> torch.Tensor:
    """(B, 1, L, L) of rows (B, L): causal; all see what lies before and at `<eoi>`, where the first row has it."""
    return _seeing(sequence, 0, int((sequence == eoi_id).nonzero()[0, 1]) + 1, return_inverse_mask)


def create_attention_mask_for_mmu_vit(sequence, return_inverse_mask=True, system_prompt_len=0) -> torch.Tensor:
    """(B, 1, L, L) of embeddings (B, L, H): causal; all see the 576 image features."""
    return _seeing(sequence, system_prompt_len + 2, system_prompt_len + 578, return_inverse_mask)


def _seeing(sequence: torch.Tensor, first: int, end: int, inverse: bool) -> torch.Tensor:
    allowed = _causal(sequence).repeat(len(sequence), 1, 1)
    allowed[:, :, first:end] = True
    return _published(allowed, inverse)


def _causal(sequence: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, sequence.shape[1], sequence.shape[1], dtype=torch.bool, device=sequence.device).tril()


def _published(allowed: torch.Tensor, inverse: bool) -> torch.Tensor:
    dense = allowed[:, None]
    return torch.zeros(dense.shape, device=dense.device).masked_fill(~dense, HIDDEN) if inverse else dense


def image_transform(image, resolution: int = 256, normalize: bool = True) -> torch.Tensor:
    return preprocess(image, resolution, normalize=normalize)


def get_config():
    """The YAML file of `config=` on the command line, then the command line; as published, no key is checked."""
    from omegaconf import OmegaConf  # which the networks do without

    given = OmegaConf.from_cli(sys.argv[1:])
    config = OmegaConf.merge(OmegaConf.load(resolve_path(given.config)), given)
    if config.get("wandb") is not None and config.wandb.get("run_id") is None:
        config.wandb.run_id = token_hex(4)  # scripts would ask wandb for one, by a name that it no longer has
    return config


def flatten_omega_conf(cfg, resolve: bool = False) -> list[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a config; items of a list are called by their numbers."""
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(cfg, resolve=resolve) if OmegaConf.is_config(cfg) else cfg
    leaves = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        inner = flatten_omega_conf(value) if isinstance(value, dict | list) else [("", value)]
        leaves += [(f"{key}.{name}".rstrip("."), leaf) for name, leaf in inner]
    return leaves


class Conversation:
    """Messages (role, text or None) as one text, without the system prompt; None is where the answer begins."""

    roles = ("USER", "ASSISTANT")

    def __init__(self, messages=()):
        self.messages = list(messages)
        self.append_message = lambda role, message: self.messages.append((role, message))
        self.copy = lambda: Conversation(self.messages)

    def get_prompt(self) -> str:
        ends = dict(zip(self.roles, (" ", "<|endoftext|>"), strict=True))
        return "".join(f"{role}: {text}{ends[role]}" if text else f"{role}:" for role, text in self.messages)


# Scripts choose a template by the name of their language model; there is one format.
conversation = SimpleNamespace(conv_templates=defaultdict(Conversation), default_conversation=Conversation())
