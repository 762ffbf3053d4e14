"""Text to image, inpainting and extrapolation (spec §7, §13).

    python3 inference_t2i.py config=configs/showo_tiny_demo.yaml mode=t2i prompt='dog face in noto style'
    python3 inference_t2i.py config=configs/showo_demo.yaml batch_size=1 guidance_scale=1.75 generation_timesteps=16 \\
        mode=inpainting prompt='…' image_path=… inpainting_mask_path=…
    python3 inference_t2i.py config=configs/showo_demo.yaml batch_size=1 guidance_scale=1.75 generation_timesteps=16 \\
        mode=extrapolation extra_direction='left *** up' offset=0 prompt='… *** …' image_path=…

Writes `0000.png` …, `results.jsonl` and `grid.png` to `output_dir` (default: `{experiment.output_dir}/{mode}`); logs
the panel `generated_images` to wandb.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from common.config import InferenceConfig, load_config
from common.errors import UserError, run_cli
from common.inputs import SEPARATOR, read_prompts, required_path, split_pieces
from common.results import ResultFolder, check_output_dir
from common.tracking import Tracker

Batches = Iterator[tuple[list[str], list[Image.Image]]]  # of each batch the prompts and their images


class TextToImage:
    """One image for each prompt in `prompt`, or else in `validation_prompts_file`, `batch_size` at a time."""

    def __init__(self, config):
        from models.pipeline_showo import check_texts

        prompts = (
            split_pieces("prompt", config.prompt) if config.prompt else read_prompts(config.validation_prompts_file)
        )
        check_texts(prompts)
        self.prompts = [prompt for prompt in prompts for _ in range(config.num_images_per_prompt or 1)]
        self.batch_size = config.batch_size

    def inputs(self, pipeline) -> list[tuple[Image.Image, str]]:
        return []

    def generate(self, pipeline, **sampling) -> Batches:
        for start in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[start : start + self.batch_size]
            yield batch, pipeline.text_to_image(batch, **sampling)


class Inpainting:
    """The image with the white regions of the mask regenerated, `batch_size` times."""

    def __init__(self, config):
        from models.images import MASK, load_image
        from models.pipeline_showo import check_texts, mask_tokens

        if not config.prompt:
            raise UserError("prompt is not given; add prompt='what the white regions of the mask should show'")
        check_texts([config.prompt])
        self.prompt, self.batch_size = config.prompt, config.batch_size
        self.count = config.num_images_per_prompt or config.batch_size
        image = required_path("image_path", config.image_path)
        mask = required_path("inpainting_mask_path", config.inpainting_mask_path)
        self.image, self.mask = load_image(image), load_image(mask, MASK)
        side = math.isqrt(config.model.showo.num_vq_tokens)
        mask_tokens(self.mask, self.image, config.dataset.preprocessing.resolution, side)

    def inputs(self, pipeline) -> list[tuple[Image.Image, str]]:
        mask = self.mask.convert("L")
        return [(pipeline.view(self.image), "original image"), (pipeline.view(mask), "inpainting mask")]

    def generate(self, pipeline, **sampling) -> Batches:
        settings = {"num_images_per_prompt": self.count, "batch_size": self.batch_size}
        yield [self.prompt] * self.count, pipeline.inpaint(self.image, self.mask, self.prompt, **settings, **sampling)


class Extrapolation:
    """The image extended in each direction of `extra_direction` in turn, `batch_size` times."""

    def __init__(self, config):
        from models.images import load_image
        from models.pipeline_showo import check_extrapolation, check_texts

        self.prompts = split_pieces("prompt", config.prompt)
        check_texts(self.prompts)
        self.directions = split_pieces("extra_direction", config.extra_direction)
        self.offset, self.batch_size = config.offset, config.batch_size
        self.count = config.num_images_per_prompt or config.batch_size
        check_extrapolation(self.directions, self.prompts, self.offset, math.isqrt(config.model.showo.num_vq_tokens))
        self.image = load_image(required_path("image_path", config.image_path))

    def inputs(self, pipeline) -> list[tuple[Image.Image, str]]:
        return [(pipeline.view(self.image), "original image")]

    def generate(self, pipeline, **sampling) -> Batches:
        settings = {"num_images_per_prompt": self.count, "batch_size": self.batch_size, "offset": self.offset}
        images = pipeline.extrapolate(self.image, self.directions, self.prompts, **settings, **sampling)
        yield [SEPARATOR.join(self.prompts)] * self.count, images


MODES = {"t2i": TextToImage, "inpainting": Inpainting, "extrapolation": Extrapolation}


def main(argv: list[str]) -> None:
    config = load_config(argv, InferenceConfig)
    if config.mode is None:
        raise UserError(f"mode is not given; add mode={', mode='.join(MODES)}")
    from models.loading import check_sizes

    check_sizes(config.model.showo, config.dataset.preprocessing.resolution, config.model.vq_model.vq_model_name)
    output_dir = check_output_dir(config.output_dir or Path(config.experiment.output_dir) / config.mode)
    task = MODES[config.mode](config)

    from models import ShowoPipeline

    pipeline = ShowoPipeline.from_config(config)
    results = ResultFolder(output_dir)
    run = f"{config.experiment.name}_t2i_{config.mode}"
    with Tracker(config.experiment.project, run, output_dir, config=config, wandb_config=config.wandb) as tracker:
        generate_all(task, pipeline, config, results, tracker)
    print(f"images written to {output_dir}: {results.count}; overview: {results.write_grid()}")


def generate_all(task, pipeline, config, results: ResultFolder, tracker: Tracker) -> None:
    """Generates batch by batch with one random generator; writes and logs each batch as soon as it is done."""
    from models import SamplingParameters

    generator = pipeline.generator(config.seed)
    inputs = task.inputs(pipeline)
    for image, caption in inputs:
        results.show(image, caption)
    batches = task.generate(
        pipeline,
        guidance_scale=config.guidance_scale,
        timesteps=config.generation_timesteps,
        temperature=config.generation_temperature,
        generator=generator,
        progress=True,
        sampling=SamplingParameters(**config.sampling),
    )
    for prompts, generated in batches:
        step = results.count
        for prompt, image in zip(prompts, generated, strict=True):
            name = results.save(image)
            results.add(file=name, mode=config.mode, prompt=prompt, seed=generator.initial_seed())
            results.show(image, prompt)
            print(f"{name}  {prompt}", flush=True)
        if config.mode == "extrapolation":
            prompts = [prompt.replace(SEPARATOR, " ") for prompt in prompts]
        images, captions = zip(*inputs, *zip(generated, prompts, strict=True), strict=True)
        tracker.log_images("generated_images", list(images), list(captions), step, save=False)


if __name__ == "__main__":
    run_cli(main)
