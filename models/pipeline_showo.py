"""Strings and PIL images in, strings and PIL images out: drawing, inpainting, extrapolation, answers (spec §7, §8).

pipeline = ShowoPipeline.from_pretrained("checkpoints/showo-tiny")
pipeline.text_to_image(["red apple in noto style"], generator=pipeline.generator(7))[0].save("apple.png")
pipeline.answer(["apple.png"], ["What is this?"])[0][0]
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm
from transformers import TextStreamer

from common.errors import UserError
from llava import QuestionFormat
from models.clip_encoder import CLIPVisionTower
from models.generation.sampling import SamplingParameters, Schedule, get_mask_schedule
from models.images import load_image, preprocess, to_pil
from models.modeling_magvitv2 import MAGVITv2
from models.modeling_showo import Showo
from models.pipeline_loading import Source, check_config, load
from models.prompting import UniversalPrompting
from models.vocabulary import PAD_TOKEN, SPECIAL_TOKENS

# B pictures, W tokens along a window's side (N = W * W), h x w tokens of a canvas
UNKNOWN = -1  # stands for a code that is to be drawn
DIRECTIONS = ("left", "right", "up", "down")
Picture = Image.Image | str | Path


class ShowoPipeline:
    """A Show-o with its two tokenizers and, if it answers from CLIP features, the CLIP tower.

    Drawing methods pass further keyword arguments on to `draw_codes`: guidance_scale, timesteps, temperature,
    generator, callback, progress, sampling. One `generator` (of the model's device) may serve any number of calls; the
    draws then come in the published order.

    Args:
        model: on its device, in its dtype. `vq_model` and `clip` stay fp32.
        prompting: the text tokenizer with Show-o's tokens; its `max_text_len` is M, the room for a prompt.
        resolution: side of a picture in pixels; default: the one that makes the model's `num_vq_tokens`.
        noise_schedule: of drawing, see `get_mask_schedule`.
        conversation: how questions are asked: ``vicuna``, as published, or ``chat``, the language model's template.

    Raises:
        ValueError: the resolution is no multiple of the tokenizer's factor, or a `w_clip_vit` model lacks its `clip`.
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
    ):
        factor = vq_model.downsampling_factor
        self.resolution = resolution or factor * math.isqrt(model.config.num_vq_tokens)
        self.window = self.resolution // factor  # W
        if self.resolution % factor:
            raise ValueError(f"resolution is {resolution}, expected a multiple of {factor}")
        if model.config.w_clip_vit and clip is None:
            raise ValueError("a model with w_clip_vit=True answers from CLIP features; give clip=CLIPVisionTower(…)")
        self.model, self.vq_model, self.clip = model.eval(), vq_model.eval(), clip
        self.prompting, self.noise_schedule = prompting, noise_schedule
        self.question_format = QuestionFormat.of(conversation, prompting.tokenizer, model.config.w_clip_vit)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **settings) -> "ShowoPipeline":
        """Loads a hub name (`showlab/show-o`) or a folder.

        Args:
            name_or_path: a Showo checkpoint, or a folder of folders `showo/`, `magvitv2/`, `llm/` (tokenizer and
                config.json of the language model) and, with CLIP-ViT, `clip/`.
            settings: `vq_model`, `llm`, `clip` (folder or hub name; default: the sub-folder, else the published one),
                `max_seq_length` (128), `resolution`, `device` (default: a GPU if there is one), `dtype` (`fp32`,
                `bf16`, `fp16`; default: bf16 on a GPU, else fp32), `attn_implementation`, `compile`, `cpu_kernels`,
                `conversation`.

        Raises:
            UserError: a part is missing, broken, or does not fit the others.
        """
        return cls(**load(Source.of_folder(name_or_path, **settings)))

    @classmethod
    def from_config(cls, config) -> "ShowoPipeline":
        """Loads what a script's config (`InferenceConfig`) names; its sizes must be the checkpoints'.

        Raises:
            UserError: as `from_pretrained`; cheap checks come before any weights are read.
        """
        from common.config import mask_schedule_of

        check_config(config)
        name, parameters = mask_schedule_of(config)
        try:
            noise_schedule = get_mask_schedule(name, **parameters)
        except (ValueError, TypeError) as error:
            raise UserError(f"mask_schedule: {error}") from None
        return cls(**load(Source.of_config(config)), noise_schedule=noise_schedule)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generator(self, seed: int | None = None) -> torch.Generator:
        """A generator on the model's device; without a seed it takes one from the system (see `initial_seed()`)."""
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
            return generator
        return generator.manual_seed(seed)

    # ---- pictures and codes ----

    def view(self, image: Picture) -> Image.Image:
        """The picture as the model sees it: resized and cropped to its resolution."""
        return to_pil(preprocess(_open(image), self.resolution)[None])[0]

    def encode(self, images: Sequence[Picture]) -> torch.Tensor:
        """Pictures of any size → codes (B, N) int64.

        Raises:
            UserError: the image tokenizer has more codes than the model, and one of those came up.
        """
        pixels = (preprocess(_open(image), self.resolution)[None].to(self.device) for image in images)
        # one at a time, as published: a batch is no faster, and 20 pictures of 512 x 512 need tens of GB
        codes = torch.cat([self.vq_model.get_code(picture) for picture in pixels])
        if codes.max() >= (limit := self.model.config.codebook_size):
            raise UserError(
                f"the image tokenizer gives code {codes.max()}, the model knows {limit}; they do not belong together"
            )
        return codes

    def decode(self, codes: torch.Tensor, shape: tuple[int, int] | None = None) -> list[Image.Image]:
        """Codes (B, h * w) → pictures; `shape` = (h, w), a square by default."""
        return to_pil(self.vq_model.decode_code(codes, shape))

    def draw_codes(
        self,
        prompts: Sequence[str],
        codes: torch.Tensor,
        *,
        guidance_scale: float = 1.75,
        timesteps: int = 18,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        callback: Callable[[int, torch.Tensor], None] | None = None,
        progress: bool = False,
        sampling: SamplingParameters | None = None,
    ) -> torch.Tensor:
        """Draws the unknown codes of one batch.

        Args:
            prompts: B texts.
            codes: (B, N) int64, −1 where unknown; the others stay.
            guidance_scale, timesteps, temperature, generator, sampling: see `Showo.t2i_generate`.
            callback: called as ``callback(step, codes)`` after each step; `decode(codes)` makes pictures of them.
            progress: shows a bar on a terminal.

        Returns:
            (B, N) int64 codes.
        """
        vocabulary = self.model.vocabulary
        image_ids = torch.where(codes == UNKNOWN, vocabulary.mask_token_id, codes + vocabulary.image_offset)
        check_texts(prompts)
        texts = [*prompts, *[""] * len(prompts)] if guidance_scale > 0 else list(prompts)
        rows = self.prompting((texts, image_ids.repeat(len(texts) // len(codes), 1)), "t2i_gen")
        cond, uncond = rows.input_ids[: len(codes)], rows.input_ids[len(codes) :]
        with tqdm(total=timesteps, desc="drawing", leave=False, disable=None if progress else True) as bar:

            def after_step(step: int, drawn: torch.Tensor) -> None:
                bar.update()
                if callback is not None:
                    callback(step, drawn)

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

    # ---- drawing ----

    def text_to_image(
        self, prompts: Sequence[str] | str, *, num_images_per_prompt: int = 1, batch_size: int | None = None, **drawing
    ) -> list[Image.Image]:
        """One picture per prompt; with `num_images_per_prompt` several in a row, prompt after prompt.

        Args:
            batch_size: pictures drawn at once, consecutive prompts; default: all.
        """
        prompts = [prompt for prompt in _listed(prompts) for _ in range(num_images_per_prompt)]
        pictures = []
        for batch in _batches(prompts, batch_size):
            blank = torch.full((len(batch), self.window**2), UNKNOWN, device=self.device)
            pictures += self.decode(self.draw_codes(batch, blank, **drawing))
        return pictures

    def inpaint(
        self,
        image: Picture,
        mask: Picture,
        prompt: str,
        *,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        **drawing,
    ) -> list[Image.Image]:
        """Paints the white part of the mask anew.

        Args:
            mask: of the picture's shape, white where to paint; grey counts from the middle on, per token.

        Raises:
            UserError: the mask does not serve, see `mask_tokens`.
        """
        image = _open(image)
        unknown = mask_tokens(mask, image, self.resolution, self.window).to(self.device)  # (1, N)
        codes = self.encode([image]).masked_fill(unknown, UNKNOWN)
        pictures = []
        for batch in _batches([prompt] * num_images_per_prompt, batch_size):
            pictures += self.decode(self.draw_codes(batch, codes.repeat(len(batch), 1), **drawing))
        return pictures

    def extrapolate(
        self,
        image: Picture,
        directions: Sequence[str] | str,
        prompts: Sequence[str] | str,
        *,
        offset: int = 0,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        **drawing,
    ) -> list[Image.Image]:
        """Grows the picture by W/2 + `offset` tokens in each direction in turn, in any order.

        Args:
            directions: `left`, `right`, `up`, `down`, one for each prompt.
            offset: how many tokens less than half a window the model sees of what is there, |offset| < W/2.

        Raises:
            UserError: directions, prompts or offset do not fit, see `check_extrapolation`.
        """
        directions, prompts = _listed(directions), _listed(prompts)
        check_extrapolation(directions, prompts, offset, self.window)
        square = self.encode([image]).view(1, self.window, self.window)
        pictures = []
        for batch in _batches(range(num_images_per_prompt), batch_size):
            canvas = square.repeat(len(batch), 1, 1)
            for direction, prompt in zip(directions, prompts, strict=True):
                canvas = self._grow(canvas, direction, [prompt] * len(batch), offset, drawing)
            pictures += self.decode(canvas.flatten(1), tuple(canvas.shape[1:]))
        return pictures

    def _grow(
        self, canvas: torch.Tensor, direction: str, prompts: list[str], offset: int, drawing: dict
    ) -> torch.Tensor:
        """One step of extrapolation: (B, h, w) codes, longer by the new tokens in one direction.

        The window lies over the edge: W/2 − offset known tokens, the rest new. Along a side longer than W it slides by
        as many tokens as it draws anew, so it always sees the W/2 − offset it drew last; every side is W plus a
        multiple of that.
        """
        axis, across = (1, 2) if direction in ("up", "down") else (2, 1)
        at_start = direction in ("left", "up")
        num_new = self.window - (self.window // 2 - offset)
        size = list(canvas.shape)
        size[axis] = num_new
        strip = canvas.new_full(size, UNKNOWN)
        canvas = torch.cat([strip, canvas] if at_start else [canvas, strip], dim=axis)
        band = canvas.narrow(axis, 0 if at_start else canvas.shape[axis] - self.window, self.window)
        for start in range(0, canvas.shape[across] - self.window + 1, num_new):
            window = band.narrow(across, start, self.window)  # (B, W, W), a view
            window.copy_(self.draw_codes(prompts, window.flatten(1), **drawing).view_as(window))
        assert (canvas != UNKNOWN).all()
        return canvas

    # ---- answering ----

    def answer(
        self, images: Sequence[Picture] | Picture, questions: Sequence[str] | str, **settings
    ) -> list[list[str]]:
        """The answers to every question about every picture, `answers[picture][question]`; see `iter_answers`."""
        images, questions = _listed(images), _listed(questions)
        answers = [[""] * len(questions) for _ in images]
        for image_index, question_index, text in self.iter_answers(images, questions, **settings):
            answers[image_index][question_index] = text
        return answers

    def iter_answers(
        self,
        images: Sequence[Picture],
        questions: Sequence[str],
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = 1,
        top_p: float | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[int, int, str], None] | None = None,
    ) -> Iterator[tuple[int, int, str]]:
        """Answers as their batches are done: (index of the picture, index of the question, text without outer blanks).

        Args:
            images: PIL images or paths, opened when their turn comes.
            temperature, top_k, top_p: see `sample_next`; greedy by default, as published.
            batch_size: (picture, question) pairs answered at once; default: all.
            callback: called with both indices and the next words of that answer as soon as they are there; "" when it
                is complete.
        """
        pairs = [(image, question) for image in range(len(images)) for question in range(len(questions))]
        for batch in _batches(pairs, batch_size):
            streams = [_Words(self, callback, pair) for pair in batch] if callback else []

            def put(ids: torch.Tensor, streams=streams) -> None:
                for stream, one in zip(streams, ids.cpu().split(1), strict=True):
                    stream.put(one)

            texts = self.answer_each(
                [images[image] for image, _ in batch],
                [questions[question] for _, question in batch],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=generator,
                callback=put if streams else None,
            )
            for stream in streams:
                stream.end()
            yield from ((*pair, text) for pair, text in zip(batch, texts, strict=True))

    def answer_each(
        self,
        images: Sequence[Picture],
        questions: Sequence[str],
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = 1,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[torch.Tensor], None] | None = None,
    ) -> list[str]:
        """One batch of answers without outer blanks, to one question about each picture.

        Args:
            images: a picture for each question; one and the same object is encoded once.
            callback: called with the (B,) new ids after each token.
        """
        assert len(images) == len(questions), f"{len(images)} pictures, {len(questions)} questions"
        shown = list({id(image): image for image in images}.values())
        place = {id(image): index for index, image in enumerate(shown)}
        new_ids = self.model.mmu_generate(
            **self._question_rows(shown, [place[id(image)] for image in images], list(questions)),
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
    def answer_loss(self, image: Picture, question: str, answer: str) -> tuple[float, bool]:
        """Mean negative log-likelihood of an answer's tokens (no end token), and whether they are the greedy ones."""
        rows = self._question_rows([image], [0], [question])
        text = self.question_format.answer_gap + answer.strip()
        ids = self.prompting.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = ids.to(self.device)
        input_ids = torch.cat([rows.pop("input_ids"), ids], dim=1)
        mask = rows.pop("attention_mask").extend(ids.shape[1])
        logits = self.model(input_ids, mask, **rows).logits[0, -ids.shape[1] - 1 : -1].float()  # (answer, vocabulary)
        return float(F.cross_entropy(logits, ids[0])), bool((logits.argmax(dim=-1) == ids[0]).all())

    def _question_rows(self, images: list[Picture], index: list[int], questions: list[str]) -> dict:
        """Inputs of `mmu_generate`: questions, each about `images[index]`, seen as codes or as CLIP features."""
        check_texts(questions)
        texts = [self.question_format.prompt(question) for question in questions]
        if not self.model.config.w_clip_vit:
            image_ids = self.encode(images)[index] + self.model.vocabulary.image_offset
            rows = self.prompting((image_ids, texts), "mmu_gen")
            return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
        features = self.clip(self.clip.preprocess([_open(image) for image in images]))  # (n, F, C)
        rows = self.prompting((texts, features.shape[1], self.question_format.system_prompt), "mmu_vit")
        return {
            "input_ids": rows.input_ids.to(self.device),
            "attention_mask": rows.attention_mask.to(self.device),
            "image_features": features[index],
        }


class _Words(TextStreamer):
    """The words of one answer, handed on as soon as they are whole."""

    def __init__(self, pipeline: ShowoPipeline, callback: Callable[[int, int, str], None], pair: tuple[int, int]):
        super().__init__(pipeline.prompting.tokenizer, skip_special_tokens=True)
        self.stop_ids = pipeline.question_format.stop_ids
        self.callback, self.pair, self.begun, self.ended = callback, pair, False, False

    def put(self, value: torch.Tensor) -> None:
        """One more id; behind the end of an answer come pads."""
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
            self.callback(*self.pair, text)
        if stream_end:
            self.callback(*self.pair, "")


# ---- what users may give ----


def check_texts(texts: Sequence[str]) -> None:
    """`UserError` for a prompt or question that holds a token which rows are built of, such as ``<|soi|>``."""
    for text in texts:
        if held := [token for token in (PAD_TOKEN, *SPECIAL_TOKENS) if token in text]:
            raise UserError(f"the text {text!r} holds {held[0]}, of which Show-o's rows are made; leave it out")


def mask_tokens(mask: Picture, image: Image.Image, resolution: int, window: int) -> torch.Tensor:
    """A mask picture → (1, N) bool, True = paint anew (spec §7).

    Raises:
        UserError: the mask has colours or another shape than the picture, or nothing on it is white.
    """
    mask = _open(mask, mode=None)
    if mask.mode == "F":
        raise UserError("the inpainting mask has fractional pixels; save it as an 8-bit picture, black and white")
    colours = np.asarray(mask.convert("RGB").resize((64, 64)), dtype=np.int16)
    if (np.ptp(colours, axis=-1) > 48).mean() > 0.02:
        raise UserError("the inpainting mask is a colour picture; it must be black (keep) and white (paint anew)")
    if abs(mask.width * image.height / (mask.height * image.width) - 1) > 0.02:
        raise UserError(
            f"the inpainting mask has {mask.width} x {mask.height} pixels, the picture {image.width} x {image.height}; "
            "they must have the same shape"
        )
    pixels = preprocess(mask.convert("L"), resolution, normalize=False)[None]  # (1, 1, P, P)
    # Faithful: bicubic without antialiasing, though it looks at few pixels only (test_pipeline_showo.py pins it).
    unknown = F.interpolate(pixels, size=(window, window), mode="bicubic").flatten(1) >= 0.5
    if not unknown.any():
        raise UserError(
            "the inpainting mask has no white part, so nothing would be painted anew; paint that part white"
        )
    return unknown


def check_extrapolation(directions: Sequence[str], prompts: Sequence[str], offset: int, window: int) -> None:
    """Refuses directions that are none, that differ from the prompts in number, and an offset out of range."""
    if unknown := [direction for direction in directions if direction not in DIRECTIONS]:
        raise UserError(f"extra_direction holds {unknown[0]!r}; allowed: {', '.join(DIRECTIONS)}")
    if not directions or len(directions) != len(prompts):
        raise UserError(
            f"extra_direction has {len(directions)} directions and prompt {len(prompts)} prompts; give one prompt for "
            "each direction, separated by ' *** '"
        )
    limit = window // 2 - 1
    if abs(offset) > limit:
        raise UserError(f"offset is {offset}; with {window} tokens along a side it must be from {-limit} to {limit}")


def _open(image: Picture, mode: str | None = "RGB") -> Image.Image:
    return image if isinstance(image, Image.Image) else load_image(image, mode)


def _listed(items) -> list:
    return [items] if isinstance(items, (str, Path, Image.Image)) else list(items)


def _batches(items: Sequence, size: int | None) -> Iterator[Sequence]:
    size = size or max(len(items), 1)
    return (items[start : start + size] for start in range(0, len(items), size))
