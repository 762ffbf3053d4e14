"""Reconstruction alignment (RecA, arXiv 2509.07295): the model restores images from what it understands of them.

A row is that of a question about an image whose answer is the image itself, masked, with the ordinary loss of masked
codes; no captions are needed:

    <mmu> <soi> condition <eoi> bos USER: describe it ASSISTANT: eos <soi> codes, some masked <eoi>

The condition is what the model's understanding sees: CLIP-ViT features, or codes. Codes of the image itself would only
be copied, so they are those of a smaller or a blurred copy.
"""

from functools import partial

import torch
import torch.nn.functional as F

from common.errors import UserError
from llava import QuestionFormat
from models import OmniMask, Showo
from models.images import to_pil
from models.prompting import Rows
from models.vocabulary import IGNORE_ID, IMAGE_FEATURE_ID
from training.alignment_settings import ReconstructionConfig
from training.batches import FLOWS, BatchBuilder, FlowKind
from training.data.flows import FlowReader, ImageReader, Reading
from training.data.image_text import CAPTION_INSTRUCTIONS, PixelTransform, image_sample
from training.data.streams import Transform, stack
from training.packing import packing_length
from training.tasks.showo import ShowoTask

# B images of N codes, F positions of a condition, L row length


class ReconstructionReader(ImageReader):
    """Images of Show-o's resolution, without texts; its settings are named as those of any flow."""

    setting, batch_size, title = FlowReader.setting, FlowReader.batch_size, FlowReader.title

    def refuses_codes(self, reading: Reading) -> str:
        return "the condition is made of pixels; give it the shards with the images"

    def transform(self, reading: Reading) -> Transform:
        preprocessing = self.config.dataset.preprocessing
        flip = preprocessing.random_flip and self.training
        images = PixelTransform(preprocessing.resolution, 0, 0, flip=flip, options=self.image_options())
        return partial(image_sample, images=images, max_shift=0)


class ReconstructionTask(ShowoTask):
    """The flows of Show-o, and one of images to restore."""

    settings = ReconstructionConfig

    def __init__(self, config):
        kind = FlowKind(ReconstructionReader, self.rows, lambda labels, _: (labels,), ("reconstruction",))
        self.flows = FLOWS | {"reconstruction": kind}
        super().__init__(config)
        if with_features := config.reconstruction.condition == "clip":
            self.understanding.has_rows = True  # the projector is trained, whether or not there are questions
        try:
            form = QuestionFormat.of(config.conversation, self.prompting.tokenizer, with_features)
        except ValueError as error:
            raise UserError(f"conversation=chat: {error}") from None
        self.questions = [self.prompting.text_ids(form.prompt(text)) for text in CAPTION_INSTRUCTIONS]

    def prepare(self, model: Showo) -> None:
        super().prepare(model)
        if (ordinary := self.builder.packing_length) is not None:
            self.builder.packing_length = max(ordinary, packing_length(self.config.dataset, self.longest_row))

    @property
    def longest_row(self) -> int:
        """Positions of this flow's longest row."""
        num_codes, settings = self.config.model.showo.num_vq_tokens, self.config.reconstruction
        seen = {"small": num_codes // settings.factor**2, "blurred": num_codes}
        condition = self.understanding.num_features if settings.condition == "clip" else seen[settings.condition]
        return condition + max(map(len, self.questions)) + num_codes + 6  # with the special tokens

    def rows(self, samples: list[dict], builder: BatchBuilder) -> tuple[Rows, dict]:
        """The rows of images, padded on the right; labels are at masked codes only."""
        pixels, vocabulary = stack(samples, "image"), builder.prompting.vocabulary
        masked = builder.noise(builder.encode(pixels))
        condition, features = self.condition(pixels, builder)
        chosen = torch.randint(len(self.questions), (len(samples),)).tolist()
        questions = [[*self.questions[number], builder.prompting.eos_id, vocabulary.soi_id] for number in chosen]
        ids, labels, blocks = [], [], []
        parts = zip(condition.tolist(), questions, masked.input_ids.tolist(), masked.labels.tolist(), strict=True)
        for seen, question, codes, targets in parts:
            before = [vocabulary.mmu_id, vocabulary.soi_id, *seen, vocabulary.eoi_id, *question]
            ids.append([*before, *codes, vocabulary.eoi_id])
            labels.append([IGNORE_ID] * len(before) + [*targets, IGNORE_ID])
            blocks.append([(1, len(seen) + 3), (len(before) - 1, len(ids[-1]))])
        length = max(map(len, ids))
        padded = [row + [vocabulary.pad_id] * (length - len(row)) for row in ids]
        targets = [row + [IGNORE_ID] * (length - len(row)) for row in labels]
        mask = OmniMask.mixed(blocks, [[]] * len(ids), length)
        return Rows(torch.tensor(padded), torch.tensor(targets), mask), {"image_features": features}

    def condition(self, pixels: torch.Tensor, builder: BatchBuilder) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is seen of images (B, 3, R, R): ids (B, F) int64, and the features where these are −200, else None."""
        settings = self.config.reconstruction
        if settings.condition == "clip":
            tower = self.understanding.tower
            features = tower(tower.preprocess(to_pil(pixels)).to(builder.device))
            return torch.full(features.shape[:2], IMAGE_FEATURE_ID), features
        copy = F.interpolate(pixels, scale_factor=1 / settings.factor, mode="area")
        if settings.condition == "blurred":
            copy = F.interpolate(copy, size=pixels.shape[2:], mode="bicubic", align_corners=False).clamp(-1, 1)
        return builder.encode(copy), None


TASK = ReconstructionTask
