"""The pipeline's documents: texts and images in, texts and images out (docs/mixed.md)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from common.errors import UserError
from models.generation.document import IMAGE, TEXT
from models.pipeline_inputs import as_list, batches, check_texts, for_each
from models.pipeline_parts import PipelineParts

Segments = Sequence[Any]  # strings and images, in order
OnNew = Callable[[int, int, str | torch.Tensor], None]  # (document, new segment, words or codes (N,))


class DocumentPipeline(PipelineParts):
    """`generate`, `edit` and `tell` of `ShowoPipeline`.

    Settings of all of them:

    - max_new_tokens (of a text, default 200), text_temperature, top_k (default 1: greedy), top_p;
    - timesteps, temperature, sampling: of images, see `Showo.t2i_generate`;
    - guidance_scale with null ``text`` or ``all``, or text_guidance_scale and image_guidance_scale: see
      `Showo.document_generate`;
    - generator: as in the class `ShowoPipeline`, one for each document;
    - batch_size: documents at once; default: all;
    - on_new: called as ``on_new(document, segment, value)`` with the next words of a text, and with the codes (N,) of
      an image after each step.
    """

    def generate(
        self,
        segments: Segments | Sequence[Segments],
        *,
        plan: Sequence[str] | None = None,
        max_images: int = 4,
        **settings,
    ) -> list:
        """Goes on with a document.

        Args:
            segments: strings and images in order; or a list of such lists, for several documents.
            plan: the kinds of the segments to come, ``text`` or ``image``. A text planned after a text continues it.
                Default: the model decides, and when the document ends.
            max_images: without a plan, the most images of a document.

        Returns:
            The new segments, strings and images in order; of several documents a list of such lists.

        Raises:
            UserError: a text holds a special token; the model sees images through CLIP-ViT; a document is empty, or
                takes more positions, with the images of a plan, than the model knows.
        """
        several = bool(segments) and all(isinstance(one, list | tuple) for one in segments)
        documents = list(segments) if several else [segments]
        batch_size = settings.pop("batch_size", None)
        generators = self._generators(settings.pop("generator", None), len(documents))
        made = []
        for batch in batches(range(len(documents)), batch_size):
            part = slice(batch.start, batch.stop)
            generator = generators[part] if isinstance(generators, list) else generators
            made += self._generate(documents[part], plan, max_images=max_images, generator=generator, **settings)
        return made if several else made[0]

    def edit(self, image: Any, instruction: str | Sequence[str], **settings) -> list[Image.Image]:
        """The image after an instruction such as "make the car blue", for each pair of them.

        Args:
            image, instruction: one each, or lists; of what is given once, each has the same.
            settings: of the class; `guidance_scale` is against the image alone (``null="text"``) unless told otherwise.
        """
        images, instructions = as_list(image), as_list(instruction)
        count = max(len(images), len(instructions))
        pairs = zip(for_each("image", images, count), for_each("instruction", instructions, count), strict=True)
        made = self.generate([list(pair) for pair in pairs], plan=[IMAGE], **{"null": TEXT} | settings)
        return [image for (image,) in made]

    def tell(self, prompt: str | Sequence[str], num_images: int = 3, **settings) -> list:
        """A story: the image of a text, the next text, its image, and so on.

        Args:
            prompt: the text of the first image, or a list of them, for several stories.
            num_images: of a story.
            settings: of the class.

        Returns:
            ``[text, image, text, image, …]``, beginning with the prompt; of several prompts a list of such lists.
        """
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}, expected at least 1")
        prompts, plan = as_list(prompt), [IMAGE] + [TEXT, IMAGE] * (num_images - 1)
        made = self.generate([[text] for text in prompts], plan=plan, **settings)
        stories = [[text, *segments] for text, segments in zip(prompts, made, strict=True)]
        return stories[0] if isinstance(prompt, str) else stories

    @torch.inference_mode()
    def _generate(
        self,
        documents: list[Segments],
        plan: Sequence[str] | None,
        *,
        open_text: bool | None = None,
        on_new: OnNew | None = None,
        timesteps: int = 18,
        guidance_scale: float = 1.75,
        **settings,
    ) -> list[list]:
        """One batch; `open_text`: whether the last text goes on, by default where a text is planned after a text."""
        prepared = self._with_ids(documents)
        if open_text is None:
            open_text = bool(plan) and plan[0] == TEXT and all("text" in segments[-1] for segments in prepared)
        rows = self.prompting((prepared, open_text), "mixed_gen")
        used = rows.input_ids.shape[1]
        needed = used + sum(self.window**2 + 2 if kind == IMAGE else 2 for kind in plan or (TEXT,))
        if needed > self.num_positions:
            raise UserError(
                f"a document has {used} tokens, and at least {needed} with what is to come, but the model knows "
                f"{self.num_positions} positions; shorten it"
            )
        if settings.get("text_guidance_scale") is not None:
            guidance_scale = 0.0
        words = _Words(self, on_new) if on_new is not None else None
        made = self.model.document_generate(
            rows.input_ids.to(self.device),
            bos_id=self.prompting.bos_id,
            eos_id=self.prompting.eos_id,
            plan=plan,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            noise_schedule=self.noise_schedule,
            callback=words,
            **settings,
        )
        return [[self._shown(segment) for segment in segments] for segments in made]

    def _shown(self, segment) -> str | Image.Image:
        if segment.kind == IMAGE:
            return self.decode(segment.codes[None])[0]
        return self.prompting.tokenizer.decode(segment.ids, skip_special_tokens=True).strip()

    def _with_ids(self, documents: list[Segments]) -> list[list[dict]]:
        """Segments as `UniversalPrompting` takes them; all images are encoded at once."""
        if self.model.config.w_clip_vit:
            raise UserError(
                "documents need a model that sees images as codes; this one sees them through CLIP-ViT (w_clip_vit), "
                "and can only be asked about them"
            )
        for number, segments in enumerate(documents):
            if isinstance(segments, str) or not len(segments):
                raise UserError(f"document {number} is {segments!r:.60}; give a list of texts and images")
        flat = [segment for segments in documents for segment in segments]
        check_texts(segment for segment in flat if isinstance(segment, str))
        images = [segment for segment in flat if not isinstance(segment, str)]
        ids = iter(self.encode(images) + self.model.vocabulary.image_offset if images else ())
        return [
            [{"text": one} if isinstance(one, str) else {"image_ids": next(ids)} for one in segments]
            for segments in documents
        ]


@dataclass
class _Words:
    """Passes new tokens on as words: the text so far less what was passed on before."""

    pipeline: DocumentPipeline
    on_new: OnNew
    texts: dict[tuple[int, int], tuple[list[int], int]] = field(default_factory=dict)  # ids, characters passed on

    def __call__(self, document: int, segment: int, value: int | torch.Tensor) -> None:
        if isinstance(value, torch.Tensor):
            self.on_new(document, segment, value)
            return
        ids, length = self.texts.get((document, segment), ([], 0))
        ids.append(value)
        text = self.pipeline.prompting.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > length:  # a letter's last byte is missing
            self.on_new(document, segment, text[length:])
            length = len(text)
        self.texts[document, segment] = ids, length
