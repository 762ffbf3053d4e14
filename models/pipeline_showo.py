"""The user-facing pipeline: text to image, inpainting, extrapolation and visual question answering (spec §7, §8).

Takes and returns strings and PIL images; tokenizers, prompt formats and devices are handled inside.

pipeline = ShowoPipeline.from_pretrained("checkpoints/showo-tiny")
pipeline.text_to_image(["red apple in noto style"], generator=pipeline.generator(7))[0].save("apple.png")
pipeline.answer(["apple.png"], ["What is this?"])[0][0]
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import TextStreamer

from common.errors import UserError, shown
from common.launch import use_physical_cores
from common.progress import progress as progress_bar
from llava import QuestionFormat
from models.clip_encoder import CLIPVisionTower
from models.generation.sampling import Generators, SamplingParameters, Schedule, get_mask_schedule
from models.images import DEFAULT, MASK, ImageOptions, has_rotation, load_image, preprocess, to_pil, to_rgb
from models.loading import check_sizes, find_parts, load_parts
from models.modeling_magvitv2 import MAGVITv2
from models.modeling_showo import Showo
from models.prompting import Rows, UniversalPrompting
from models.vocabulary import PAD_TOKEN, SPECIAL_TOKENS

# B images, W tokens along the side of the model's square window (N = W * W), h x w tokens of a larger canvas
UNKNOWN = -1  # in a tensor of codes: to be generated
DIRECTIONS = ("left", "right", "up", "down")
MAX_NEW_TOKENS = 100  # of an answer, by default
MAX_WINDOWS = 64  # of a canvas, whose pixels are decoded at once
ImageInput = Image.Image | str | Path  # an image, or the path of one


class ShowoPipeline:
    """A Show-o model, its text and image tokenizers and, for `w_clip_vit` models, the CLIP vision tower.

    The generating methods pass extra keyword arguments to `generate_codes`: guidance_scale, timesteps, temperature,
    generator, callback_on_step_end, progress, sampling. A `generator` (on the model's device) may be reused for any
    number of calls; its random numbers are then consumed in the order of the published scripts. A sequence of
    generators, one for each image, makes every image depend on its own alone: it is the same whatever else is generated
    with it.

    Args:
        model: on its device, in its dtype. `vq_model` and `clip` stay in fp32.
        prompting: the text tokenizer with Show-o's special tokens; `max_text_len` limits a prompt, in tokens.
        resolution: side of an image in pixels; default: the one that gives the model's `num_vq_tokens` tokens.
        noise_schedule: mask schedule of image generation, see `get_mask_schedule`.
        conversation: prompt format of questions: ``vicuna``, as published, or ``chat``, the tokenizer's chat template.
        image_options: how images and masks are read, see `ImageOptions`.

    Raises:
        ValueError: the resolution is not a multiple of the image tokenizer's downsampling factor, or a `w_clip_vit`
            model comes without `clip`.
    """

    def __init__(
        self,
        model: Showo,
        vq_model: MAGVITv2,
        prompting: UniversalPrompting,
        resolution: int | None = None,
        clip: CLIPVisionTower | None = None,
        noise_schedule: str | Schedule = "cosine",
        conversation: str = "vicuna",
        image_options: ImageOptions = DEFAULT,
    ):
        factor = vq_model.downsampling_factor
        self.resolution = resolution or factor * math.isqrt(model.config.num_vq_tokens)
        self.window = self.resolution // factor  # W
        if self.resolution % factor:
            raise ValueError(f"resolution is {resolution}, expected a multiple of {factor}")
        if model.config.w_clip_vit and clip is None:
            raise ValueError("a model with w_clip_vit=True sees images through CLIP; pass clip=CLIPVisionTower(…)")
        self.model, self.vq_model, self.clip = model.eval(), vq_model.eval(), clip
        self.prompting, self.noise_schedule, self.image_options = prompting, noise_schedule, image_options
        self.question_format = QuestionFormat.of(conversation, prompting.tokenizer, model.config.w_clip_vit)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **settings) -> "ShowoPipeline":
        """Loads a pipeline from the hub (`showlab/show-o`) or a folder.

        Args:
            name_or_path: a Showo checkpoint, or a folder with sub-folders `showo/`, `magvitv2/`, `llm/` (tokenizer and
                config.json of the language model) and, with CLIP-ViT, `clip/`.
            settings: `vq_model`, `llm`, `clip` (folder or hub name; default: the sub-folder, or the published one),
                `max_seq_length` (128), `resolution`, `device` (default: a GPU if there is one), `dtype` (`fp32`,
                `bf16`, `fp16`; default: bf16 on a GPU, else fp32), `attn_implementation`, `compile`, `cpu_kernels`,
                `conversation`, `image_options`; None: the default.

        Raises:
            UserError: a component is missing, broken, or does not match the others.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        image_options = given.pop("image_options", DEFAULT)
        return cls(**load_parts(**find_parts(name_or_path) | given), image_options=image_options)

    @classmethod
    def from_config(cls, config) -> "ShowoPipeline":
        """Loads the components that a script's config (`InferenceConfig`) names; its sizes must match the checkpoint.

        Raises:
            UserError: as `from_pretrained`. Cheap checks run before any weights are read.
        """
        from common.schema import mask_schedule_of  # needs OmegaConf, which the networks do without (`make gpu-check`)

        showo, vq_model, images = config.model.showo, config.model.vq_model, config.dataset.preprocessing
        check_sizes(showo, images.resolution, vq_model.vq_model_name)
        name, parameters = mask_schedule_of(config)
        try:
            noise_schedule = get_mask_schedule(name, **parameters)
        except (ValueError, TypeError) as error:
            raise UserError(f"mask_schedule: {error}") from None
        how = ("device", "dtype", "attn_implementation", "compile", "cpu_kernels", "conversation")
        parts = load_parts(
            showo.pretrained_model_path,
            vq_model=vq_model.vq_model_name,
            llm=showo.llm_model_path,
            clip=config.model.clip_vit_name,
            vq_weights=vq_model.pretrained_model_path,
            max_seq_length=images.max_seq_length,
            resolution=images.resolution,
            section=showo,
            **{key: config[key] for key in how},
        )
        pipeline = cls(**parts, noise_schedule=noise_schedule, image_options=ImageOptions(**config.image))
        if pipeline.device.type == "cpu":  # scripts alone: other programs decide about their threads themselves
            use_physical_cores()
        return pipeline

    @property
    def device(self) -> torch.device:
        return self.model.device

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
        return _open(image, self.image_options)

    def view(self, image: ImageInput) -> Image.Image:
        """The image as the model sees it: resized and centre-cropped to its resolution."""
        return to_pil(preprocess(self.open(image), self.resolution)[None])[0]

    def encode(self, images: Sequence[ImageInput]) -> torch.Tensor:
        """Images of any size → codes (B, N) int64.

        Raises:
            UserError: the image tokenizer produced a code that the model does not have.
        """
        pixels = (preprocess(self.open(image), self.resolution)[None].to(self.device) for image in images)
        # one at a time, as published: a batch is no faster, and 20 images of 512 x 512 would need tens of GB
        codes = torch.cat([self.vq_model.get_code(one) for one in pixels])
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
            callback_on_step_end: called as ``callback_on_step_end(step, timestep, codes)`` after each step: its number
                from 0 on, how many are left, and the codes (B, N) as sampled so far, of which `decode` makes images.
                `extrapolate` calls it so in each window, with the codes (B, h, w) of the whole canvas.
            progress: whether to show a progress bar; in a log file, a line a minute.

        Returns:
            (B, N) int64 codes.

        Raises:
            UserError: a prompt holds a special token, or makes a row with more positions than the model has.
        """
        vocabulary = self.model.vocabulary
        image_ids = torch.where(codes == UNKNOWN, vocabulary.mask_token_id, codes + vocabulary.image_offset)
        check_texts(prompts)
        texts = [*prompts, *[""] * len(prompts)] if guidance_scale > 0 else list(prompts)
        rows = self.prompting((texts, image_ids.repeat(len(texts) // len(codes), 1)), "t2i_gen")
        if (used := int((rows.input_ids != vocabulary.pad_id).sum(1).max())) > self.num_positions:
            raise UserError(
                f"a prompt and its image take {used} positions, but the model knows {self.num_positions}; shorten it, "
                "or lower dataset.preprocessing.max_seq_length, to which prompts are cut"
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

    def text_to_image(
        self, prompts: Sequence[str] | str, *, num_images_per_prompt: int = 1, batch_size: int | None = None, **settings
    ) -> list[Image.Image]:
        """Generates `num_images_per_prompt` images per prompt, in the order of the prompts.

        Args:
            prompts: longer ones than `prompting.max_text_len` are cut, see `cut_prompts`.
            batch_size: images generated at once; default: all.
            settings: see `generate_codes`.
        """
        prompts = [prompt for prompt in _as_list(prompts) for _ in range(num_images_per_prompt)]
        blank = torch.full((1, self.window**2), UNKNOWN, device=self.device)
        return self._complete(prompts, blank, batch_size, settings)

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that have no room in a row, so that their ends are not seen."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self.prompting.fits(prompt)]

    def _complete(
        self, prompts: Sequence[str], codes: torch.Tensor, batch_size: int | None, settings: dict
    ) -> list[Image.Image]:
        """An image for each prompt, in which the known ones of the codes (1, N) are kept."""
        images = []
        for part, given in _parts(len(prompts), batch_size, settings):
            batch = prompts[part]
            images += self._decode(self.generate_codes(batch, codes.repeat(len(batch), 1), **given), given)
        return images

    def _decode(self, codes: torch.Tensor, settings: dict) -> list[Image.Image]:
        """Decodes images with generators of their own alone, since the rounding of a pixel depends on the batch."""
        alone = isinstance(settings.get("generator"), Sequence)
        return [image for part in codes.split(1 if alone else len(codes)) for image in self.decode(part)]

    def inpaint(
        self,
        image: ImageInput,
        mask: ImageInput,
        prompt: str,
        *,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        keep_outside_mask: bool = False,
        **settings,
    ) -> list[Image.Image]:
        """Regenerates the white region of the mask.

        Args:
            mask: same aspect ratio as the image; white is regenerated, black and transparent regions are kept. Decided
                per token, at mid-grey.
            keep_outside_mask: put the pixels of `view(image)` back where the mask is darker than mid-grey. Without it
                the whole image is decoded from its tokens, as published, so that it differs a little everywhere.
            settings: see `generate_codes`.

        Raises:
            UserError: the mask is unusable, see `mask_tokens`.
        """
        image, mask = self.open(image), _open(mask, replace(MASK, exif=self.image_options.exif))
        unknown = mask_tokens(mask, image, self.resolution, self.window).to(self.device)  # (1, N)
        codes = self.encode([image]).masked_fill(unknown, UNKNOWN)
        images = self._complete([prompt] * num_images_per_prompt, codes, batch_size, settings)
        if not keep_outside_mask:
            return images
        white = mask_pixels(mask, self.resolution)[0, 0].numpy() >= 0.5
        original, white = self.view(image), Image.fromarray(white.astype(np.uint8) * 255)
        return [Image.composite(generated, original, white) for generated in images]

    def extrapolate(
        self,
        image: ImageInput,
        directions: Sequence[str] | str,
        prompts: Sequence[str] | str,
        *,
        offset: int = 0,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        **settings,
    ) -> list[Image.Image]:
        """Extends the image by W/2 + `offset` tokens in each of the given directions, one after another.

        Args:
            directions: `left`, `right`, `up`, `down`, one for each prompt.
            offset: W/2 − `offset` known tokens are the context of each extension; |offset| < W/2.
            settings: see `generate_codes`.

        Raises:
            UserError: invalid directions, prompts or offset, see `check_extrapolation`.
        """
        directions, prompts = _as_list(directions), _as_list(prompts)
        check_extrapolation(directions, prompts, offset, self.window)
        square = self.encode([image]).view(1, self.window, self.window)
        images = []
        for part, given in _parts(num_images_per_prompt, batch_size, settings):
            count = len(range(num_images_per_prompt)[part])
            canvas = square.repeat(count, 1, 1)
            for direction, prompt in zip(directions, prompts, strict=True):
                canvas = self._grow(canvas, direction, [prompt] * count, offset, given)
            images += self._decode(canvas, given)
        return images

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
        """The answer to every question about every image, as `answers[image][question]`; see `iter_answers`."""
        images, questions = _as_list(images), _as_list(questions)
        answers = self.iter_answers(images, questions, **settings)
        return [[next(answers)[2] for _ in questions] for _ in images]

    def caption(self, images: Sequence[ImageInput] | ImageInput, **settings) -> list[str]:
        """The caption of every image, without a question; see `iter_answers` for the settings.

        It is what a model says that was trained on captions without an instruction (`add_caption_prompt=false`, or the
        projector's pre-training with CLIP-ViT): its rows are the image alone, and bos for models that see codes.
        """
        return [text for _, _, text in self.iter_answers(_as_list(images), [None], **settings)]

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
            images: PIL images or paths; paths are opened when their batch begins.
            questions: None asks for the bare caption, see `caption`.
            batch_size: (image, question) pairs answered at once; default: all.
            stream: called as ``stream(image index, question index, text)`` with the next words of an answer as soon
                as they are generated, and with "" when it is complete.
            settings: max_new_tokens, temperature, top_k, top_p, generator; see `answer_each`.

        Raises:
            UserError: a question is unusable, see `check_questions`.
        """
        self.check_questions(questions, **{key: settings[key] for key in ("max_new_tokens",) if key in settings})
        pairs = [(image, question) for image in range(len(images)) for question in range(len(questions))]
        for batch in _batches(pairs, batch_size):
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
            images: one for each question; an object that occurs several times is encoded once.
            temperature, top_k, top_p: see `sample_next`; greedy by default, as published.
            callback: called with the (B,) new ids after each token.
        """
        assert len(images) == len(questions), f"{len(images)} images, {len(questions)} questions"
        distinct = list({id(image): image for image in images}.values())
        place = {id(image): index for index, image in enumerate(distinct)}
        new_ids = self.model.mmu_generate(
            **self._question_rows(distinct, [place[id(image)] for image in images], list(questions)),
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
    def answer_loss(self, image: ImageInput, question: str, answer: str) -> tuple[float, bool]:
        """Scores a given answer.

        Returns:
            mean cross-entropy of its tokens, without the end token; whether each of them is the likeliest one.
        """
        rows = self._question_rows([image], [0], [question])
        text = self.question_format.answer_gap + answer.strip()
        ids = self.prompting.tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"]
        ids = ids.to(self.device)
        input_ids = torch.cat([rows.pop("input_ids"), ids], dim=1)
        mask = rows.pop("attention_mask").extend(ids.shape[1])
        logits = self.model(input_ids, mask, **rows).logits[0, -ids.shape[1] - 1 : -1].float()  # (answer, vocabulary)
        return float(F.cross_entropy(logits, ids[0])), bool((logits.argmax(dim=-1) == ids[0]).all())

    def check_questions(self, questions: Sequence[str | None], max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        """Raises `UserError` for a question with a special token, or with more positions than the model has."""
        image_ids = torch.zeros(1, self.window**2, dtype=torch.long)
        for question in questions:
            used = self._rows([question], image_ids).input_ids.shape[1]
            if used + max_new_tokens > (limit := self.num_positions):
                remedy = f"give at most max_new_tokens={limit - used}" if used < limit else "shorten the question"
                raise UserError(
                    f"the image and the question {question!r:.60} take {used} positions, which with max_new_tokens="
                    f"{max_new_tokens} is more than the {limit} that the model knows; {remedy}"
                )

    def _question_rows(self, images: list[ImageInput], index: list[int], questions: list[str | None]) -> dict:
        """Inputs of `mmu_generate` for questions i about `images[index[i]]`, given as image codes or CLIP features."""
        if not self.model.config.w_clip_vit:
            rows = self._rows(questions, self.encode(images)[index] + self.model.vocabulary.image_offset)
            return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
        features = self.clip(self.clip.preprocess([self.open(image) for image in images]))  # (n, F, C)
        rows = self._rows(questions)
        return {
            "input_ids": rows.input_ids.to(self.device),
            "attention_mask": rows.attention_mask.to(self.device),
            "image_features": features[index],
        }

    def _rows(self, questions: Sequence[str | None], image_ids: torch.Tensor | None = None) -> Rows:
        """The rows of questions, with image ids (B, N) or, for CLIP-ViT, places for features."""
        check_texts(questions)
        texts = ["" if question is None else self.question_format.prompt(question) for question in questions]
        if not self.model.config.w_clip_vit:
            return self.prompting((image_ids, texts), "mmu_gen")
        if len(bare := {question is None for question in questions}) > 1:
            raise ValueError("with CLIP-ViT a batch holds questions, or None for bare captions, but not both")
        system_prompt = None if bare == {True} else self.question_format.system_prompt
        return self.prompting((texts, self.clip.num_features, system_prompt), "mmu_vit")


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


# ---- checks of user input ----


def check_texts(texts: Sequence[str | None]) -> None:
    """Raises `UserError` for a prompt or question that is no text, or contains a special token such as ``<|soi|>``."""
    for text in filter(None, texts):
        if shown(text) != text:
            raise UserError(f"the text '{shown(text)[:200]}' is no UTF-8; give it in this encoding")
        if held := [token for token in (PAD_TOKEN, *SPECIAL_TOKENS) if token in text]:
            raise UserError(f"the text {text[:200]!r} contains the special token {held[0]}; remove it")


def mask_tokens(mask: ImageInput, image: Image.Image, resolution: int, window: int) -> torch.Tensor:
    """An inpainting mask → (1, N) bool, True = regenerate (spec §7).

    Raises:
        UserError: the mask is coloured, has another aspect ratio than the image, or has no white region.
    """
    mask = _open(mask, MASK)
    colours = np.asarray(mask.resize((64, 64)), dtype=np.int16)
    if (np.ptp(colours, axis=-1) > 48).mean() > 0.02:
        raise UserError("the inpainting mask is a colour image; it must be black (keep) and white (regenerate)")
    if abs(mask.width * image.height / (mask.height * image.width) - 1) > 0.02:
        turned = next((name for name, one in {"image": image, "mask": mask}.items() if has_rotation(one)), None)
        raise UserError(
            f"the inpainting mask has {mask.width} x {mask.height} pixels, the image {image.width} x {image.height}; "
            "they must have the same aspect ratio"
            + (f" (the {turned} carries an EXIF rotation, which is ignored; image.exif=apply turns it)" * bool(turned))
        )
    # Faithful: bicubic without antialiasing, although it skips most pixels (pinned by test_pipeline_showo.py).
    tokens = F.interpolate(mask_pixels(mask, resolution), size=(window, window), mode="bicubic")
    unknown = tokens.flatten(1) >= 0.5
    if not unknown.any():
        raise UserError(
            "the inpainting mask has no white region, so nothing would be regenerated; paint that part white"
        )
    return unknown


def mask_pixels(mask: Image.Image, resolution: int) -> torch.Tensor:
    """(1, 1, P, P) float32 in [0, 1], 1 = white."""
    return preprocess(mask.convert("L"), resolution, normalize=False)[None]


def check_extrapolation(directions: Sequence[str], prompts: Sequence[str], offset: int, window: int) -> None:
    """Raises `UserError` for unknown directions, a number of prompts other than that of directions, or a bad offset."""
    if unknown := [direction for direction in directions if direction not in DIRECTIONS]:
        raise UserError(f"extra_direction contains {unknown[0]!r}; allowed: {', '.join(DIRECTIONS)}")
    if not directions or len(directions) != len(prompts):
        raise UserError(
            f"extra_direction has {len(directions)} directions and prompt {len(prompts)} prompts; give one prompt for "
            "each direction, separated by ' *** '"
        )
    limit = window // 2 - 1
    if abs(offset) > limit:
        raise UserError(
            f"offset is {offset}; with a window of {window} x {window} tokens it must be from {-limit} to {limit}"
        )
    across, down = (
        1 + sum(direction in axis for direction in directions) * (window // 2 + offset) / window
        for axis in (DIRECTIONS[:2], DIRECTIONS[2:])
    )
    if across * down > MAX_WINDOWS:
        raise UserError(
            f"extra_direction has {len(directions)} directions, which make the image {across * down:.0f} times as "
            f"large; at most {MAX_WINDOWS} times are possible; leave some out"
        )


def _open(image: ImageInput, options: ImageOptions) -> Image.Image:
    return to_rgb(image, options) if isinstance(image, Image.Image) else load_image(image, options)


def _as_list(items) -> list:
    return [items] if isinstance(items, (str, Path, Image.Image)) else list(items)


def _batches(items: Sequence, size: int | None) -> Iterator[Sequence]:
    size = size or max(len(items), 1)
    return (items[start : start + size] for start in range(0, len(items), size))


def _parts(count: int, size: int | None, settings: dict) -> Iterator[tuple[slice, dict]]:
    """The images of each batch, with its settings: if every image has a generator of its own, with theirs alone."""
    for batch in _batches(range(count), size):
        part, generator = slice(batch.start, batch.stop), settings.get("generator")
        yield part, settings | ({"generator": generator[part]} if isinstance(generator, Sequence) else {})
