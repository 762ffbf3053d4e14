"""Text to image, inpainting and extrapolation (spec §7, §13).

    python3 inference_t2i.py config=configs/showo_tiny_demo.yaml mode=t2i prompt='dog face in noto style'
    python3 inference_t2i.py config=configs/showo_demo.yaml batch_size=1 guidance_scale=1.75 generation_timesteps=16 \\
        mode=inpainting prompt='…' image_path=… inpainting_mask_path=…
    python3 inference_t2i.py config=configs/showo_demo.yaml batch_size=1 guidance_scale=1.75 generation_timesteps=16 \\
        mode=extrapolation extra_direction='left *** up' offset=0 prompt='… *** …' image_path=…

Adds `0000.png` …, `results.jsonl` and `grid.png` to `output_dir` (default: `{experiment.output_dir}/{mode}`), or with
`overwrite=true` replaces those of earlier runs; logs the panel `generated_images` to wandb.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from common.config import InferenceConfig, load_config
from common.errors import UserError, run_cli, shown
from common.inputs import SEPARATOR, read_prompts, required_path, rotation_note, split_pieces
from common.results import ResultFolder
from common.tracking import Tracker


class TextToImage:
    """One image for each prompt in `prompt`, or else in `validation_prompts_file`.

    Attributes of this and the other modes:
        prompts: the texts that the model sees.
        count: how many images there will be.
    """

    def __init__(self, config):
        self.prompts = (
            split_pieces("prompt", config.prompt) if config.prompt else read_prompts(config.validation_prompts_file)
        )
        self.repeats = config.num_images_per_prompt or 1
        self.count = len(self.prompts) * self.repeats

    def caption(self, number: int) -> str:
        """The prompt of this image."""
        return self.prompts[number // self.repeats]

    def inputs(self, pipeline) -> list[tuple[Image.Image, str]]:
        """The user's images as the model sees them, with captions."""
        return []

    def generate(self, pipeline, **settings) -> Iterator[Image.Image]:
        """All images in their order, each as soon as its batch is done."""
        return pipeline.iter_text_to_image(self.prompts, num_images_per_prompt=self.repeats, **settings)


class Inpainting:
    """The image with the white regions of the mask regenerated, `batch_size` times."""

    def __init__(self, config):
        from models.images import MASK, load_image
        from models.pipeline_inputs import mask_tokens

        if not config.prompt:
            raise UserError("prompt is not given; add prompt='what the white regions of the mask should show'")
        self.prompts = [config.prompt]
        self.count = config.num_images_per_prompt or config.batch_size
        self.keep_outside_mask = config.keep_outside_mask
        self.image = open_input(config)
        mask = required_path("inpainting_mask_path", config.inpainting_mask_path)
        self.mask = load_image(mask, replace(MASK, exif=config.image.exif))
        side = math.isqrt(config.model.showo.num_vq_tokens)
        mask_tokens(self.mask, self.image, config.dataset.preprocessing.resolution, side)

    def caption(self, number: int) -> str:
        return self.prompts[0]

    def inputs(self, pipeline) -> list[tuple[Image.Image, str]]:
        mask = self.mask.convert("L")
        return [(pipeline.view(self.image), "original image"), (pipeline.view(mask), "inpainting mask")]

    def generate(self, pipeline, **settings) -> Iterator[Image.Image]:
        settings |= {"num_images_per_prompt": self.count, "keep": self.keep_outside_mask}
        return pipeline.iter_inpaint(self.image, self.mask, self.prompts, **settings)


class Extrapolation:
    """The image extended in each direction of `extra_direction` in turn, `batch_size` times."""

    def __init__(self, config):
        from models.pipeline_inputs import check_extrapolation

        self.prompts = split_pieces("prompt", config.prompt)
        self.directions = split_pieces("extra_direction", config.extra_direction)
        self.offset = config.offset
        self.count = config.num_images_per_prompt or config.batch_size
        side = math.isqrt(config.model.showo.num_vq_tokens)
        try:
            check_extrapolation(self.directions, self.prompts, self.offset, side)
        except UserError as error:
            raise UserError(f"extra_direction={config.extra_direction!r:.100}: {error}") from None
        self.image = open_input(config)

    def caption(self, number: int) -> str:
        return SEPARATOR.join(self.prompts)

    def inputs(self, pipeline) -> list[tuple[Image.Image, str]]:
        return [(pipeline.view(self.image), "original image")]

    def generate(self, pipeline, **settings) -> Iterator[Image.Image]:
        settings |= {"num_images_per_prompt": self.count, "offset": self.offset}
        return pipeline.iter_extrapolate(self.image, self.directions, self.prompts, **settings)


MODES = {"t2i": TextToImage, "inpainting": Inpainting, "extrapolation": Extrapolation}


def open_input(config) -> Image.Image:
    """The image of `image_path`; says so if its rotation is ignored."""
    from models.images import ImageOptions, has_rotation, load_image

    image = load_image(required_path("image_path", config.image_path), ImageOptions(**config.image))
    tell(rotation_note(int(has_rotation(image))))
    return image


def tell(line: str) -> None:
    if line:
        print(line, flush=True)


def main(argv: list[str]) -> None:
    config = load_config(argv, InferenceConfig)
    if config.mode is None:
        raise UserError(f"mode is not given; add mode={', mode='.join(MODES)}")
    from models.loading import check_sizes
    from models.pipeline_inputs import check_texts

    check_sizes(config.model.showo, config.dataset.preprocessing.resolution, config.model.vq_model.vq_model_name)
    results = ResultFolder(config.output_dir or Path(config.experiment.output_dir) / config.mode, config.overwrite)
    task = MODES[config.mode](config)
    check_texts(task.prompts)

    from models import ShowoPipeline

    pipeline = ShowoPipeline.from_config(config)
    tell(results.note)
    if cut := pipeline.cut_prompts(task.prompts):
        limit = f"dataset.preprocessing.max_seq_length={config.dataset.preprocessing.max_seq_length}"
        print(f"prompts cut to {limit} tokens: {len(cut)}; the first is {cut[0][:200]!r}", flush=True)
    run, output_dir = f"{config.experiment.name}_t2i_{config.mode}", results.folder
    with Tracker(config.experiment.project, run, output_dir, config=config, wandb_config=config.wandb) as tracker:
        generate_all(task, pipeline, config, results, tracker)
    print(f"images written to {shown(output_dir)}: {results.count}; overview: {shown(results.write_grid())}")


def generate_all(task, pipeline, config, results: ResultFolder, tracker: Tracker) -> None:
    """Generates, writes and logs batch by batch, with one random generator or one for each image."""
    from models import SamplingParameters
    from models.pipeline_inputs import image_seed

    generator = pipeline.generator(config.seed)
    seeds = [generator.initial_seed()] * task.count
    if config.seed_per_image:
        generator = seeds = [image_seed(seed, number) for number, seed in enumerate(seeds)]
    inputs = task.inputs(pipeline)
    for image, caption in inputs:
        results.show(image, caption)
    generated = task.generate(
        pipeline,
        generator=generator,
        batch_size=config.batch_size,
        guidance_scale=config.guidance_scale,
        timesteps=config.generation_timesteps,
        temperature=config.generation_temperature,
        progress=True,
        sampling=SamplingParameters(**config.sampling),
    )
    panel, start = list(inputs), 0
    for number, (image, seed) in enumerate(zip(generated, seeds, strict=True)):
        prompt = task.caption(number)
        name = results.save(image)
        results.add(file=name, mode=config.mode, prompt=prompt, seed=seed)
        results.show(image, prompt)
        print(f"{name}  {prompt}", flush=True)
        panel.append((image, prompt.replace(SEPARATOR, " ") if config.mode == "extrapolation" else prompt))
        if len(panel) == len(inputs) + config.batch_size or number + 1 == task.count:
            images, captions = zip(*panel, strict=True)
            tracker.log_images("generated_images", list(images), list(captions), start, save=False)
            panel, start = list(inputs), number + 1


if __name__ == "__main__":
    run_cli(main)
