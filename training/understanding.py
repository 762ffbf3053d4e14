"""The two understanding branches: how mmu rows are built, and which parameters are trained (spec §2, §9)."""

from copy import copy

import torch

from common.errors import UserError
from common.files import resolve_path
from llava import SYSTEM_PROMPT, collate
from models import OmniMask
from models.clip_encoder import num_features
from models.devices import send
from models.loading import load_clip, read_clip
from models.prompting import Rows
from models.vocabulary import IGNORE_ID, IMAGE_FEATURE_ID
from training.data.streams import stack

# B rows, L row length, N image tokens, F features of one image


class VqUnderstanding:
    """Understanding from image codes.

    Attributes:
        max_mask_ratio: a random share, up to this, of each mmu image's tokens is masked, against overfitting on small
            data sets (`training.und_mask_ratio`). 0 as published.
        system_prompt: conversations begin with LLaVA's system prompt (`dataset.add_system_prompt`).
    """

    image_processor = None  # the flows prepare images for the image tokenizer

    def __init__(self, config):
        self.max_mask_ratio, self.system_prompt = config.training.und_mask_ratio, config.dataset.add_system_prompt
        self.has_conversations = reads_conversations(config)

    def text_length(self, config, prompting) -> int:
        """Number of text tokens that fit in a row after the image; `UserError` if none do."""
        system = system_ids(prompting) if self.system_prompt else []
        return room_for_text(config, config.model.showo.num_vq_tokens, len(system), self.has_conversations)

    def open(self) -> None:
        """Nothing is needed."""

    def attach(self, model, device) -> None:
        """All parameters are trained."""

    def for_evaluation(self) -> "VqUnderstanding":
        plain = copy(self)
        plain.max_mask_ratio = 0.0
        return plain

    def rows(self, samples: list[dict], builder) -> tuple[Rows, None]:
        """Rows ``<mmu> <soi>`` codes ``<eoi>`` text of one batch, and no image features."""
        image_ids = builder.image_ids(samples)  # (B, N)
        if self.max_mask_ratio:
            ratio = torch.rand(len(samples), 1) * self.max_mask_ratio
            hidden = torch.rand(image_ids.shape) < ratio
            image_ids = image_ids.masked_fill(hidden, builder.noise.mask_token_id)
        if "input_ids" not in samples[0]:
            return builder.prompting((image_ids, [sample["text"] for sample in samples]), "mmu"), None
        system = system_ids(builder.prompting) if self.system_prompt else []
        rows, text_start = conversation_rows(samples, image_ids, system, builder)
        rows.attention_mask = OmniMask.mmu(len(samples), text_start - 1, builder.row_length)
        return rows, None


class ClipVitUnderstanding:
    """Understanding from CLIP-ViT features (`training/train_w_clip_vit.py`).

    Pre-training (`llava_pretrain`) trains the projector alone and has no system prompt; tuning trains the whole model.
    """

    def __init__(self, config):
        dataset = config.dataset
        self.has_rows = config.training.batch_size_mmu > 0
        self.has_conversations = reads_conversations(config)
        if self.has_rows and not dataset.und_type.startswith("llava"):
            raise UserError(
                f"dataset.und_type is {dataset.und_type!r}; with CLIP-ViT it must be llava_pretrain or llava_tuning"
            )
        self.clip_vit_name = str(resolve_path(config.model.clip_vit_name))
        self.projector_only = dataset.und_type == "llava_pretrain"
        self.system_prompt = not self.projector_only and config.conversation == "vicuna"
        if self.projector_only and not self.has_rows:
            raise UserError("llava_pretrain trains mm_projector alone, but training.batch_size_mmu is 0; raise it")
        self.tower = None

    def open(self) -> None:
        """Reads the image processor and the settings of CLIP, perhaps from the hub."""
        clip, self.image_processor = read_clip(self.clip_vit_name)
        self.num_features = num_features(clip)

    def text_length(self, config, prompting) -> int:
        """As in the other branch."""
        system = system_ids(prompting) if self.system_prompt else []
        return room_for_text(config, self.num_features, len(system), self.has_conversations)

    def attach(self, model, device) -> None:
        """Loads the frozen tower and selects the trained parameters."""
        self.tower = load_clip(self.clip_vit_name, model.config.clip_feature_size).to(device)
        if self.projector_only:
            model.requires_grad_(False)
        # Without mmu rows it gets no gradient: DDP would wait for it, and weight decay wear it away.
        model.mm_projector.requires_grad_(self.has_rows)

    def for_evaluation(self) -> "ClipVitUnderstanding":
        return self

    def rows(self, samples: list[dict], builder) -> tuple[Rows, torch.Tensor]:
        """Rows ``<mmu>`` system ``<soi>`` −200 … ``<eoi>`` text, and the features (B, F, size) for the −200."""
        features = self.tower(send(stack(samples, "pixel_values"), builder.device))
        places = torch.full(features.shape[:2], IMAGE_FEATURE_ID)  # (B, F)
        system = system_ids(builder.prompting) if self.system_prompt else []
        rows, _ = conversation_rows(samples, places, system, builder)
        rows.attention_mask = OmniMask.mmu_vit(len(samples), len(system), places.shape[1], builder.row_length)
        return rows, features


def system_ids(prompting) -> list[int]:
    """LLaVA's system prompt, 28 ids with the published tokenizer."""
    return prompting.tokenizer(SYSTEM_PROMPT, add_special_tokens=False)["input_ids"]


def reads_conversations(config) -> bool:
    """Whether the mmu flow reads conversations."""
    return config.training.batch_size_mmu > 0 and config.dataset.und_type.startswith("llava")


def room_for_text(config, num_image: int, num_system: int, conversations: bool) -> int:
    """Number of text tokens that fit in a row with `num_image` image positions and a system prompt; `UserError` if none
    fit."""
    max_text_len = config.dataset.preprocessing.max_seq_length
    if not conversations:  # captions are cut by other rules
        return max_text_len
    room = max_text_len + config.model.showo.num_vq_tokens - num_image - num_system
    if room < 1:
        raise UserError(
            f"dataset.preprocessing.max_seq_length is {max_text_len}: {num_image} image positions and "
            f"{num_system} of the system prompt leave no room for text; raise it by more than {-room}"
        )
    return room


def conversation_rows(samples: list[dict], image: torch.Tensor, system: list[int], builder) -> tuple[Rows, int]:
    """Rows of LLaVA samples, without a mask, and the index at which the text starts.

    Args:
        samples: with `input_ids` and `labels` of `llava.encode_conversation` or `encode_plain`.
        image: (B, ·) int64, ids between ``<soi>`` and ``<eoi>``.
        system: ids of the system prompt, after ``<mmu>``.
    """
    prompting, vocabulary = builder.prompting, builder.prompting.vocabulary
    text_start = 1 + len(system) + 1 + image.shape[1] + 1
    text = collate(samples, prompting.tokenizer, builder.row_length - text_start)

    def column(ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.long).expand(len(samples), len(ids))

    head = column([vocabulary.mmu_id, *system, vocabulary.soi_id])
    input_ids = torch.cat([head, image, column([vocabulary.eoi_id]), text["input_ids"]], dim=1)
    labels = torch.full_like(input_ids, IGNORE_ID)
    labels[:, text_start:] = text["labels"]
    return Rows(input_ids, labels, None), text_start
