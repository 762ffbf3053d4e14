"""The user-facing pipeline: text to image, inpainting, extrapolation and visual question answering (spec §7, §8).

Takes and returns strings and images; tokenizers, prompt formats and devices are handled inside.

pipeline = ShowoPipeline.from_pretrained("checkpoints/showo-tiny")
pipeline("red apple in noto style", generator=7).images[0].save("apple.png")
pipeline.answer("apple.png", "What is this?")[0][0]
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import TextStreamer
from transformers.utils import ModelOutput

from common.errors import UserError
from common.progress import progress as progress_bar
from models.generation.sampling import Generators, SamplingParameters
from models.images import (
    MASK,
    OUTPUT_TYPES,
    ImageInput,
    converted,
    preprocess,
    read_image,
    to_pil,
)
from models.pipeline_documents import DocumentPipeline
from models.pipeline_inputs import (
    as_list,
    batches,
    check_extrapolation,
    check_texts,
    distinct,
    for_each,
    image_seed,
    mask_tokens,
    soft_mask,
)
from models.prompting import Rows

# B images, W tokens along the side of the model's square window (N = W * W), h x w tokens of a larger canvas
UNKNOWN = -1  # in a tensor of codes: to be generated
MAX_NEW_TOKENS = 100  # of an answer, by default
Seeds = Generators | int | Sequence[int]  # see ShowoPipeline


@dataclass
class ImageOutput(ModelOutput):
    """What a call of the pipeline returns: `images`, of the type `output_type`."""

    images: list[Image.Image] | np.ndarray | torch.Tensor | None = None


class ShowoPipeline(DocumentPipeline):
    """Generates and extends images, answers questions and goes on with documents, see `PipelineParts` for its parts.

    Images and masks are PIL images, paths, arrays or tensors, see `models.images.read_image`, or lists of them. The
    generating methods pass extra keyword arguments to `generate_codes`: guidance_scale, negative_prompt, timesteps,
    temperature, generator, callback_on_step_end, progress, sampling. Of these `generator` is one of:

    - a `torch.Generator` on the model's device. It may be reused for any number of calls; its random numbers are then
      consumed in the order of the published scripts;
    - a list of generators or seeds, one for each image, which then depends on its own alone: it is the same whatever
      else is generated with it;
    - an int, the seed of the first image; those of the next ones are the next numbers (`image_seed`).

    What is wrong with an argument is raised as a ValueError or TypeError.
    """

    def generator(self, seed: int | None = None) -> torch.Generator:
        """A generator on the model's device; without a seed, seeded by the system (`initial_seed()` tells the seed)."""
        generator = torch.Generator(self.device)
        generator.manual_seed(generator.seed() if seed is None else seed)
        return generator

    @property
    def num_positions(self) -> int:
        """Positions of a row that the language model knows."""
        return self.model.showo.config.max_position_embeddings

    # ---- images and codes ----

    def open(self, image: ImageInput) -> Image.Image:
        """The image, or the one in this file, in RGB as `image_options` say."""
        return read_image(image, self.image_options)

    def view(self, image: ImageInput) -> Image.Image:
        """The image as the model sees it: resized and centre-cropped to its resolution."""
        return to_pil(preprocess(self.open(image), self.resolution)[None])[0]

    def encode(self, images: Sequence[ImageInput]) -> torch.Tensor:
        """Images of any size → codes (B, N) int64; an object that occurs several times is encoded once.

        Raises:
            UserError: the image tokenizer produced a code that the model does not have.
        """
        different, index = distinct(images)
        pixels = (preprocess(self.open(image), self.resolution)[None].to(self.device) for image in different)
        # one at a time, as published: a batch is no faster, and 20 images of 512 x 512 would need tens of GB
        codes = torch.cat([self.vq_model.get_code(one) for one in pixels])[index]
        if codes.max() >= (limit := self.model.config.codebook_size):
            raise UserError(
                f"the image tokenizer produced code {codes.max()}, but the model has only {limit} codes; give the "
                "image tokenizer that the model was trained with"
            )
        return codes

    def decode(self, codes: torch.Tensor) -> list[Image.Image]:
        """Codes (B, h, w), or (B, N) of a square → images, grey where a code is −1 (not generated yet)."""
        codes = codes.unflatten(1, (math.isqrt(codes.shape[1]), -1)) if codes.ndim == 2 else codes
        pixels = self.vq_model.decode_code(codes.clamp(min=0).flatten(1), tuple(codes.shape[1:]))
        unknown = F.interpolate((codes == UNKNOWN)[:, None].float(), pixels.shape[2:]).bool()  # nearest
        return to_pil(pixels.masked_fill(unknown, 0))

    def generate_codes(
        self,
        prompts: Sequence[str],
        codes: torch.Tensor,
        *,
        guidance_scale: float = 1.75,
        negative_prompt: str | Sequence[str] | None = None,
        timesteps: int = 18,
        temperature: float = 1.0,
        generator: Generators = None,
        callback_on_step_end: Callable[[int, int, torch.Tensor], None] | None = None,
        progress: bool = False,
        sampling: SamplingParameters | None = None,
    ) -> torch.Tensor:
        """Generates the unknown codes of one batch, with classifier-free guidance if `guidance_scale` > 0.

        Args:
            prompts: B texts.
            codes: (B, N) int64, −1 where unknown; known codes are kept.
            guidance_scale, timesteps, temperature, generator, sampling: see `Showo.t2i_generate`.
            negative_prompt: what guidance leads away from, in place of the empty prompt; a text for all, or for each.
            callback_on_step_end: called as ``callback_on_step_end(step, timestep, codes)`` after each step: its number
                from 0 on, how many are left, and the codes (B, N) as sampled so far, of which `decode` makes images.
                `extrapolate` calls it so in each window, with the codes (B, h, w) of the whole canvas.
            progress: whether to show a progress bar; in a log file, a line a minute.

        Returns:
            (B, N) int64 codes.

        Raises:
            UserError: a prompt holds a special token, or makes a row with more positions than the model has;
                `negative_prompt` without guidance, or not as many as prompts.
        """
        vocabulary = self.model.vocabulary
        image_ids = torch.where(codes == UNKNOWN, vocabulary.mask_token_id, codes + vocabulary.image_offset)
        texts = list(prompts)
        if guidance_scale > 0:
            texts += for_each("negative_prompt", negative_prompt or "", len(texts), "prompt")
        elif any(as_list(negative_prompt or "")):
            raise UserError(
                f"negative_prompt has no effect with guidance_scale={guidance_scale}; give a guidance_scale above 0, "
                "or no negative_prompt"
            )
        check_texts(texts)
        rows = self.prompting((texts, image_ids.repeat(len(texts) // len(codes), 1)), "t2i_gen")
        if (used := int((rows.input_ids != vocabulary.pad_id).sum(1).max())) > self.num_positions:
            raise UserError(
                f"a prompt and its image take {used} positions, but the model knows {self.num_positions}; shorten it, "
                "or lower max_seq_length, to which prompts are cut"
            )
        cond, uncond = rows.input_ids[: len(codes)], rows.input_ids[len(codes) :]
        with progress_bar(total=timesteps, desc="generating", leave=False, disable=not progress) as bar:

            def after_step(step: int, sampled: torch.Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(step, timesteps - 1 - step, sampled)

            return self.model.t2i_generate(
                cond,
                uncond if guidance_scale > 0 else None,
                attention_mask=rows.attention_mask,
                guidance_scale=guidance_scale,
                timesteps=timesteps,
                temperature=temperature,
                noise_schedule=self.noise_schedule,
                generator=generator,
                callback=after_step,
                sampling=sampling,
            )

    # ---- image generation ----

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 18,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings,
    ) -> ImageOutput | tuple:
        """`text_to_image` as pipelines of diffusers are called.

        Args:
            num_inference_steps: `timesteps`.
            output_type: of `images`, see `models.images.converted`.
            return_dict: whether the result has names; else it is a tuple.
            settings: see `text_to_image`. `guidance_scale` is w of the paper: diffusers would call it w + 1.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, expected at least 1")
        images = self.text_to_image(prompt, timesteps=num_inference_steps, **settings)
        output = ImageOutput(images=converted(images, output_type))
        return output if return_dict else output.to_tuple()

    def text_to_image(self, prompts: Sequence[str] | str, **settings) -> list[Image.Image]:
        """Generates `num_images_per_prompt` images per prompt, in the order of the prompts.

        Args:
            prompts: longer ones than `prompting.max_text_len` are cut, see `cut_prompts`.
            settings: `num_images_per_prompt` (default 1), `batch_size` (images generated at once; default: all), and
                those of `generate_codes`.
        """
        return list(self.iter_text_to_image(prompts, **settings))

    def iter_text_to_image(
        self, prompts: Sequence[str] | str, *, num_images_per_prompt: int = 1, batch_size: int | None = None, **settings
    ) -> Iterator[Image.Image]:
        """As `text_to_image`, but yields the images of a batch as soon as it is done."""
        prompts = as_list(prompts)
        blank = torch.full((1, self.window**2), UNKNOWN, device=self.device).expand(len(prompts), -1)
        return self._complete(prompts, blank, num_images_per_prompt, batch_size, settings)

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that have no room in a row, so that their ends are not seen."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self.prompting.fits(prompt)]

    def _complete(
        self, prompts: list[str], codes: torch.Tensor, num_images: int, batch_size: int | None, settings: dict
    ) -> Iterator[Image.Image]:
        """Images for each prompt, in which the known ones of its codes (B, N) are kept."""
        negative = for_each("negative_prompt", settings.get("negative_prompt") or "", len(prompts), "prompt")
        index = [number for number in range(len(prompts)) for _ in range(num_images)]  # of an image's prompt

        def generate(part: slice, given: dict) -> torch.Tensor:
            texts = [prompts[number] for number in index[part]]
            given |= {"negative_prompt": [negative[number] for number in index[part]]}
            return self.generate_codes(texts, codes[index[part]], **given)

        return self._in_batches(len(index), batch_size, settings, generate)

    def _in_batches(
        self, count: int, batch_size: int | None, settings: dict, generate: Callable[[slice, dict], torch.Tensor]
    ) -> Iterator[Image.Image]:
        """Images of the codes that `generate` makes of a part of them with the settings of this part."""
        generators = self._generators(settings.get("generator"), count)
        alone = isinstance(generators, list)
        for batch in batches(range(count), batch_size):
            part = slice(batch.start, batch.stop)
            codes = generate(part, settings | {"generator": generators[part] if alone else generators})
            # the rounding of a pixel depends on the batch, and an image with a generator of its own must not
            for some in codes.split(1 if alone else len(codes)):
                yield from self.decode(some)

    def _generators(self, generator: Seeds, count: int) -> torch.Generator | list[torch.Generator] | None:
        """One generator of all images, or one for each, see the class."""
        if isinstance(generator, Integral):
            generator = [image_seed(int(generator), number) for number in range(count)]
        given = generator if isinstance(generator, Sequence) else [generator]
        for one in given:
            if not isinstance(one, Integral | torch.Generator | None):
                kind = type(one).__name__
                raise TypeError(f"generator is of type {kind}, expected an int, a torch.Generator, or a list of them")
            if isinstance(one, torch.Generator) and one.device.type != self.device.type:
                raise UserError(f"generator is on {one.device}, the model on {self.device}; give the seed as an int")
        if given is not generator:
            return generator
        if len(given) != count:
            raise UserError(f"generator holds {len(given)} for {count} images; give one for each, or one for all")
        return [self.generator(int(one)) if isinstance(one, Integral) else one for one in given]

    def inpaint(self, image: ImageInput, mask: ImageInput, prompt: str, **settings) -> list[Image.Image]:
        """Regenerates the white region of the mask.

        Args:
            image, mask, prompt: one each, or lists; of what is given once, each has the same.
            mask: same aspect ratio as the image; white is regenerated, black and transparent regions are kept. Decided
                per token, at mid-grey.
            settings: `num_images_per_prompt` (default 1); `batch_size` (images generated at once; default: all);
                `keep`: put the pixels of `view(image)` back where the mask is darker than mid-grey, with an edge as
                soft as half a token around white. Without it the whole image is decoded from its tokens, as published,
                so that it differs a little everywhere; and those of `generate_codes`.

        Raises:
            UserError: the mask is unusable, see `mask_tokens`.
        """
        return list(self.iter_inpaint(image, mask, prompt, **settings))

    def iter_inpaint(
        self,
        image: ImageInput,
        mask: ImageInput,
        prompt: str,
        *,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        keep: bool = False,
        **settings,
    ) -> Iterator[Image.Image]:
        """As `inpaint`, but yields the images of a batch as soon as it is done."""
        options = replace(MASK, exif=self.image_options.exif)
        images, prompts = [self.open(one) for one in as_list(image)], as_list(prompt)
        masks = [read_image(one, options) for one in as_list(mask)]
        count = max(len(images), len(masks), len(prompts))
        images, masks = for_each("image", images, count), for_each("mask", masks, count)
        prompts, pairs = for_each("prompt", prompts, count), list(zip(images, masks, strict=True))
        unknown = torch.cat([mask_tokens(mask, image, self.resolution, self.window) for image, mask in pairs])
        codes = self.encode(images).masked_fill(unknown.to(self.device), UNKNOWN)
        generated = self._complete(prompts, codes, num_images_per_prompt, batch_size, settings)
        for image, mask in pairs:
            made = islice(generated, num_images_per_prompt)
            if keep:
                original, white = self.view(image), soft_mask(mask, self.resolution, self.vq_model.downsampling_factor)
                made = [Image.composite(one, original, white) for one in made]
            yield from made

    def extrapolate(
        self, image: ImageInput, directions: Sequence[str] | str, prompts: Sequence[str] | str, **settings
    ) -> list[Image.Image]:
        """Extends images by W/2 + `offset` tokens in each of the given directions, one after another.

        Args:
            image: one, or a list of images that are all extended so.
            directions: `left`, `right`, `up`, `down`, one for each prompt.
            settings: `offset`: W/2 − `offset` known tokens are the context of each extension; |offset| < W/2;
                `num_images_per_prompt` (of each image; default 1); `batch_size` (images generated at once; default:
                all); and those of `generate_codes`, with a negative prompt for all directions, or for each.

        Raises:
            UserError: invalid directions, prompts or offset, see `check_extrapolation`.
        """
        return list(self.iter_extrapolate(image, directions, prompts, **settings))

    def iter_extrapolate(
        self,
        image: ImageInput,
        directions: Sequence[str] | str,
        prompts: Sequence[str] | str,
        *,
        offset: int = 0,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        **settings,
    ) -> Iterator[Image.Image]:
        """As `extrapolate`, but yields the images of a batch as soon as it is done."""
        directions, prompts = as_list(directions), as_list(prompts)
        check_extrapolation(directions, prompts, offset, self.window)
        negatives = for_each("negative_prompt", settings.get("negative_prompt") or "", len(prompts), "prompt")
        steps = list(zip(directions, prompts, negatives, strict=True))
        images = as_list(image)
        squares = self.encode(for_each("image", images, max(len(images), 1)))
        squares = squares.unflatten(1, (self.window, self.window)).repeat_interleave(num_images_per_prompt, 0)

        def extend(part: slice, given: dict) -> torch.Tensor:
            canvas = squares[part]
            for direction, prompt, negative in steps:
                given |= {"negative_prompt": negative}
                canvas = self._grow(canvas, direction, [prompt] * len(canvas), offset, given)
            return canvas

        return self._in_batches(len(squares), batch_size, settings, extend)

    def _grow(
        self, canvas: torch.Tensor, direction: str, prompts: list[str], offset: int, settings: dict
    ) -> torch.Tensor:
        """One extension: (B, h, w) codes → codes of a canvas that is W/2 + offset tokens longer in `direction`.

        The window covers the edge: W/2 − offset known tokens, the rest to be generated. Along an edge longer than W it
        slides by W/2 + offset tokens, so that it overlaps its previous position by W/2 − offset tokens. Every side of
        the canvas is W plus a multiple of that stride, so the last window ends at the corner.
        """
        axis, across = (1, 2) if direction in ("up", "down") else (2, 1)
        at_start = direction in ("left", "up")
        num_new = self.window - (self.window // 2 - offset)
        strip = (num_new, 0) if at_start else (0, num_new)
        canvas = F.pad(canvas, (0, 0, *strip) if axis == 1 else strip, value=UNKNOWN)
        band = canvas.narrow(axis, 0 if at_start else canvas.shape[axis] - self.window, self.window)
        show = settings.get("callback_on_step_end")

        def after_step(step: int, timestep: int, codes: torch.Tensor) -> None:
            known = window.clone()
            window.copy_(codes.view_as(window))
            show(step, timestep, canvas.clone())
            window.copy_(known)

        settings = settings | {"callback_on_step_end": after_step if show else None}
        for start in range(0, canvas.shape[across] - self.window + 1, num_new):
            window = band.narrow(across, start, self.window)  # (B, W, W), a view
            window.copy_(self.generate_codes(prompts, window.flatten(1), **settings).view_as(window))
        assert (canvas != UNKNOWN).all()
        return canvas

    # ---- visual question answering ----

    def answer(
        self, images: Sequence[ImageInput] | ImageInput, questions: Sequence[str] | str, **settings
    ) -> list[list[str]]:
        """The answer to every question about every image, as `answers[image][question]`; see `iter_answers`.

        A list in the list of images, as in ``answer([[a, b]], "what changed?")``, is asked about together.
        """
        images, questions = as_list(images), as_list(questions)
        answers = self.iter_answers(images, questions, **settings)
        return [[next(answers)[2] for _ in questions] for _ in images]

    def caption(self, images: Sequence[ImageInput] | ImageInput, **settings) -> list[str]:
        """The caption of every image, without a question; see `iter_answers` for the settings.

        It is what a model says that was trained on captions without an instruction (`add_caption_prompt=false`, or the
        projector's pre-training with CLIP-ViT): its rows are the image alone, and bos for models that see codes.
        """
        return [text for _, _, text in self.iter_answers(as_list(images), [None], **settings)]

    def iter_answers(
        self,
        images: Sequence[ImageInput],
        questions: Sequence[str | None],
        *,
        batch_size: int | None = None,
        stream: Callable[[int, int, str], None] | None = None,
        **settings,
    ) -> Iterator[tuple[int, int, str]]:
        """Yields (image index, question index, answer without surrounding whitespace), in this order, batch by batch.

        Args:
            images: in any form, see the class; paths are opened when their batch begins. Of a list of images the
                question is asked about all of them together.
            questions: None asks for the bare caption, see `caption`.
            batch_size: (image, question) pairs answered at once; default: all.
            stream: called as ``stream(image index, question index, text)`` with the next words of an answer as soon
                as they are generated, and with "" when it is complete.
            settings: max_new_tokens, temperature, top_k, top_p, generator (or its seed); see `answer_each`.

        Raises:
            UserError: a question is unusable, see `check_questions`.
        """
        if isinstance(settings.get("generator"), Integral):
            settings["generator"] = self.generator(int(settings["generator"]))
        most = max((len(image) for image in images if isinstance(image, list | tuple)), default=1)
        given = {key: settings[key] for key in ("max_new_tokens",) if key in settings}
        self.check_questions(questions, num_images=max(most, 1), **given)
        pairs = [(image, question) for image in range(len(images)) for question in range(len(questions))]
        for batch in batches(pairs, batch_size):
            streamers = [_AnswerStreamer(self, stream, pair) for pair in batch] if stream else []

            def put(ids: torch.Tensor, streamers=streamers) -> None:
                for streamer, one in zip(streamers, ids.cpu().split(1), strict=True):
                    streamer.put(one)

            texts = self.answer_each(
                [images[image] for image, _ in batch],
                [questions[question] for _, question in batch],
                callback=put if streamers else None,
                **settings,
            )
            for streamer in streamers:
                streamer.end()
            yield from ((*pair, text) for pair, text in zip(batch, texts, strict=True))

    def answer_each(
        self,
        images: Sequence[ImageInput],
        questions: Sequence[str | None],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 1.0,
        top_k: int | None = 1,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[torch.Tensor], None] | None = None,
    ) -> list[str]:
        """One batch: the answers, without surrounding whitespace, to one question about each image.

        Args:
            images: one for each question, or a list of several; an object that occurs several times is encoded once.
            temperature, top_k, top_p: see `sample_next`; greedy by default, as published.
            callback: called with the (B,) new ids after each token.
        """
        assert len(images) == len(questions), f"{len(images)} images, {len(questions)} questions"
        new_ids = self.model.mmu_generate(
            **self._question_rows(images, list(questions)),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eot_token=self.question_format.stop_ids,
            generator=generator,
            callback=callback,
        )
        return [text.strip() for text in self.prompting.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]

    @torch.inference_mode()
    def answer_loss(self, image: ImageInput | list[ImageInput], question: str, answer: str) -> tuple[float, bool]:
        """Scores a given answer to a question about an image, or a list of them.

        Returns:
            mean cross-entropy of its tokens, without the end token; whether each of them is the likeliest one.
        """
        rows = self._question_rows([image], [question])
        text = self.question_format.answer_gap + answer.strip()
        ids = self.prompting.tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"]
        ids = ids.to(self.device)
        input_ids = torch.cat([rows.pop("input_ids"), ids], dim=1)
        mask = rows.pop("attention_mask").extend(ids.shape[1])
        logits = self.model(input_ids, mask, **rows).logits[0, -ids.shape[1] - 1 : -1].float()  # (answer, vocabulary)
        return float(F.cross_entropy(logits, ids[0])), bool((logits.argmax(dim=-1) == ids[0]).all())

    def check_questions(
        self, questions: Sequence[str | None], max_new_tokens: int = MAX_NEW_TOKENS, num_images: int = 1
    ) -> None:
        """Raises `UserError` for a question with a special token, or with more positions than the model has.

        Args:
            num_images: that each of them is about.
        """
        image_ids = torch.zeros(num_images, self.window**2, dtype=torch.long)
        for question in questions:
            used = self._rows([question], image_ids, [num_images] if num_images > 1 else None).input_ids.shape[1]
            if used + max_new_tokens > (limit := self.num_positions):
                remedy = f"give at most max_new_tokens={limit - used}" if used < limit else "shorten the question"
                what = "the image" if num_images == 1 else f"the {num_images} images"
                remedy += " or ask about fewer images" * (num_images > 1)
                raise UserError(
                    f"{what} and the question {question!r:.60} take {used} positions, which with max_new_tokens="
                    f"{max_new_tokens} is more than the {limit} that the model knows; {remedy}"
                )

    def _question_rows(self, images: Sequence[ImageInput | list], questions: list[str | None]) -> dict:
        """Inputs of `mmu_generate` for one question about each image, or list of images, as codes or CLIP features."""
        together = [list(image) if isinstance(image, list | tuple) else [image] for image in images]
        flat, numbers = [image for row in together for image in row], [len(row) for row in together]
        if not all(numbers):
            raise UserError("a question is about an empty list of images; give one or more")
        if not self.model.config.w_clip_vit:
            image_ids = self.encode(flat) + self.model.vocabulary.image_offset
            rows = self._rows(questions, image_ids, numbers if len(numbers) < len(flat) else None)
            return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
        different, index = distinct(flat)
        features = self.clip(self.clip.preprocess([self.open(image) for image in different]))  # (n, F, C)
        rows = self._rows(questions, numbers=numbers)
        return {
            "input_ids": rows.input_ids.to(self.device),
            "attention_mask": rows.attention_mask.to(self.device),
            "image_features": features[index],
        }

    def _rows(
        self,
        questions: Sequence[str | None],
        image_ids: torch.Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Rows:
        """The rows of questions, with image ids (images, N) or, for CLIP-ViT, places for features.

        Args:
            numbers: of images of each question, where there are questions about several.
        """
        check_texts(question for question in questions if question is not None)
        texts = ["" if question is None else self.question_format.prompt(question) for question in questions]
        if not self.model.config.w_clip_vit and numbers is None:
            return self.prompting((image_ids, texts), "mmu_gen")
        if not self.model.config.w_clip_vit:
            images = image_ids.split(list(numbers))
            documents = [
                [*({"image_ids": ids} for ids in several), {"text": text}]
                for several, text in zip(images, texts, strict=True)
            ]
            return self.prompting((documents, True), "mixed_gen")
        if len(bare := {question is None for question in questions}) > 1:
            raise ValueError("with CLIP-ViT a batch holds questions, or None for bare captions, but not both")
        system_prompt = None if bare == {True} else self.question_format.system_prompt
        return self.prompting((texts, self.clip.num_features, system_prompt, numbers), "mmu_vit")


class _AnswerStreamer(TextStreamer):
    """Streams one answer to a function, word by word."""

    def __init__(self, pipeline: ShowoPipeline, stream: Callable[[int, int, str], None], pair: tuple[int, int]):
        super().__init__(pipeline.prompting.tokenizer, skip_special_tokens=True)
        self.stop_ids = pipeline.question_format.stop_ids
        self.stream, self.pair = stream, pair
        self.begun = self.ended = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the next id; pad ids after the end of the answer are ignored."""
        if not self.ended:
            super().put(value)
            if int(value) in self.stop_ids:
                self.end()

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        if text:
            self.stream(*self.pair, text)
        if stream_end:
            self.stream(*self.pair, "")
