"""A page on which to try a model: text to image, inpainting, extrapolation, questions, edits and stories (docs/app.md).

    python3 app.py
    python3 app.py config=configs/showo_demo_512x512.yaml
    python3 app.py checkpoint='outputs/my-model *** showlab/show-o' host=0.0.0.0 port=8000

Without `config` it is that of the small default, configs/showo_tiny_demo.yaml. The page sends and fetches nothing
outside this machine, except for weights that a hub name asks for.
"""

import os
import random
import socket
import threading
from abc import ABCMeta
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from queue import SimpleQueue
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing.name} is not installed; pip install -r requirements-app.txt") from None

import torch
from PIL import Image

from common.config import load_config, mask_schedule_of
from common.errors import UserError, run_cli
from common.files import visible_in
from common.inputs import read_prompts, required_folder, split_pieces
from common.launch import use_physical_cores
from common.schema import AppConfig
from models import SamplingParameters, ShowoPipeline
from models.generation.sampling import ORDERS
from models.images import MASK, ImageOptions, open_image
from models.loading import DTYPES, choose_device
from models.pipeline_inputs import DIRECTIONS, image_seed
from training.masking import schedule_of

DEFAULT_CONFIG = "config=configs/showo_tiny_demo.yaml"
MAX_FILE, MAX_TEXT = "20mb", 2000  # of an upload; characters of a prompt or question
MAX_WAITING = 32  # people in the queue
MAX_IMAGES, MAX_SEED = 8, 2**53 - 1  # whole numbers that a browser keeps exactly
EXAMPLES = 6  # of each kind
DAY = 24 * 60 * 60  # seconds until uploads and results are removed
CSS = ".pixels img { image-rendering: pixelated } .pixels .grid-wrap { max-height: none }"

Component = gr.components.Component
Given = dict[Component, Any]  # the values of the page's inputs
Show = Callable[[Any], None]  # puts a value into the output of a tab
Work = Callable[[ShowoPipeline, Given, Show], None]
Tab = tuple[set[Component], Component, Work]  # its own inputs, its output, and how this comes about


# ---- running ----


class Models:
    """The pipelines to choose from, of which one at a time is in memory."""

    def __init__(self, config):
        self.config, self.held, self.pipeline = config, None, None
        self.names = split_pieces("checkpoint", config.checkpoint) if config.checkpoint else [config.experiment.name]
        self.dtype = config.dtype or ("bf16" if choose_device(config.device).type == "cuda" else "fp32")
        self.get(self.names[0], self.dtype)

    def get(self, name: str, dtype: str) -> ShowoPipeline:
        if self.held != (name, dtype):
            self.held = self.pipeline = None  # makes room first
            self.config.dtype = dtype
            self.pipeline, self.held = self._load(name), (name, dtype)
        return self.pipeline

    def _load(self, name: str) -> ShowoPipeline:
        if not self.config.checkpoint:
            return ShowoPipeline.from_config(self.config)
        keys = ("device", "dtype", "attn_implementation", "compile", "cpu_kernels", "adapter", "quantization")
        settings = {key: self.config[key] for key in keys} | {"image_options": ImageOptions(**self.config.image)}
        if mask_schedule_of(self.config)[0] != "cosine":  # else that of the model
            settings["noise_schedule"] = schedule_of(self.config)
        pipeline = ShowoPipeline.from_pretrained(name, **settings)
        if pipeline.device.type == "cpu":
            use_physical_cores()
        return pipeline


@contextmanager
def messages() -> Iterator[None]:
    """Tells the visitor what went wrong, if there is something to do about it."""
    try:
        yield
    except ValueError as error:  # UserError is one
        raise gr.Error(str(error), print_exception=False) from None
    except (MemoryError, torch.OutOfMemoryError):
        raise gr.Error("There is not enough memory; ask for fewer images, or for a smaller one.") from None


def live(work: Callable[[Show], None]) -> Iterator[Any]:
    """Yields what `work(show)` shows as soon as it does; when nobody listens any more, its next `show` ends it."""
    waiting, closed = SimpleQueue(), threading.Event()

    def show(value: Any) -> None:
        if closed.is_set():
            raise InterruptedError
        waiting.put((value, None))

    def run() -> None:
        try:
            work(show)
            waiting.put((None, StopIteration()))
        except Exception as error:
            waiting.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (item := waiting.get())[1] is None:
            yield item[0]
        if not isinstance(item[1], StopIteration):
            raise item[1]
    finally:
        closed.set()
        thread.join()  # then the model is free for the next in the queue


# ---- what tabs are made of ----


def slider(label: str, low: float, high: float, value: float, step: float = 1) -> gr.Slider:
    return gr.Slider(low, max(high, value), value, step=step, label=label)


def variant(component: type, **methods: Callable) -> type:
    """A class that is its base to the browser. The metaclass is passed by: it writes a file beside the source."""
    return ABCMeta.__new__(type(component), f"Own{component.__name__}", (component,), {"is_template": True, **methods})


def needed(value: Any, what: str) -> Any:
    if not value:
        raise UserError(f"there is no {what}; give one")
    return value


def captioned(image: Image.Image, caption: str) -> tuple[Image.Image, str]:
    """For a gallery, whose files must differ even where images do not: it writes equal ones over each other."""
    image.info |= {"Description": caption, "Creation Time": datetime.now().isoformat()}
    return image, caption


class Page:
    """What all tabs share: the controls at the side, and how work becomes a live output."""

    def __init__(self, config, models: Models):
        self.config, self.models = config, models
        self.prompts = read_prompts(config.validation_prompts_file)[:EXAMPLES]
        names, sampling, small = models.names, config.sampling, 0.05
        self.checkpoint = gr.Dropdown(names, value=names[0], label="Checkpoint", interactive=len(names) > 1)
        self.dtype = gr.Dropdown(list(DTYPES), value=models.dtype, label="Precision")
        self.seed = gr.Number(config.seed, label="Seed (empty: random)", precision=0, minimum=0, maximum=MAX_SEED)
        self.count = slider("Images", 1, MAX_IMAGES, 4)
        self.steps = slider("Steps", 1, 64, config.generation_timesteps)
        self.guidance = slider("Guidance", 0, 10, config.guidance_scale, small)
        with gr.Accordion("Sampling of images", open=False):
            self.negative = gr.Textbox(label="Negative prompt", max_length=MAX_TEXT)
            self.live = gr.Checkbox(True, label="Show every step")
            self.temperature = slider("Temperature", 0, 5, config.generation_temperature, small)
            self.order = gr.Radio(list(ORDERS), value=sampling.order, label="Order")
            self.refresh = slider("Refresh every", 1, 8, sampling.refresh_every)
            self.start = slider("Guidance from", 0, 1, sampling.guidance_start, small)
            self.stop = slider("Guidance to", 0, 1, sampling.guidance_stop, small)
        with gr.Accordion("Answers", open=False):
            self.words = slider("Longest answer, in tokens", 1, 1024, config.max_new_tokens)
            self.randomness = slider("Temperature", 0, 2, config.temperature, small)
            self.top_k = gr.Number(config.top_k, label="Top k (1: greedy, empty: all)", precision=0, minimum=1)
            self.top_p = gr.Number(config.top_p, label="Top p (empty: all)", minimum=0, maximum=1)
        self.controls = {value for value in vars(self).values() if isinstance(value, Component)}

    def sampling(self, given: Given) -> dict[str, Any]:
        """Settings of whatever makes images."""
        changed = {"order": given[self.order], "refresh_every": int(given[self.refresh])}
        changed |= {"guidance_start": given[self.start], "guidance_stop": given[self.stop]}
        return {
            "guidance_scale": given[self.guidance],
            "timesteps": int(given[self.steps]),
            "temperature": given[self.temperature],
            "sampling": SamplingParameters(**{**self.config.sampling, **changed}),
        }

    def writing(self, given: Given) -> dict[str, Any]:
        """Settings of whatever makes texts, but for the temperature."""
        return {"max_new_tokens": int(given[self.words]), "top_k": given[self.top_k], "top_p": given[self.top_p]}

    @staticmethod
    def gallery(label: str, columns: int = 2) -> gr.Gallery:
        looks = {"columns": columns, "object_fit": "contain", "elem_classes": "pixels"}
        return gr.Gallery(label=label, format="png", render=False, **looks)

    def prompt(self, label: str = "Prompt") -> gr.Textbox:
        return gr.Textbox(self.prompts[0], label=label, lines=2, max_length=MAX_TEXT)

    def open(self, source: str | bytes, name: str | None, **options) -> Image.Image:
        """Uploads are read as all images: in the known formats only, with messages that say what is wrong."""
        with messages():
            return open_image(source, name or "upload", ImageOptions(**{**self.config.image, **options}))

    def upload(self, **settings) -> gr.Image:
        def read(_: gr.Image, file: Any) -> Image.Image | None:
            return self.open(file.path, file.orig_name) if file and file.path else None

        return variant(gr.Image, preprocess=read)(label="Image", sources=("upload", "clipboard"), **settings)

    def painted(self) -> gr.ImageEditor:
        """An image and what is painted over it, which lies on black."""

        def read(_: gr.ImageEditor, file: Any, flatten_on_white: bool = False) -> Image.Image | None:
            source, options = getattr(file, "path", file), {} if flatten_on_white else {"background": MASK.background}
            if source is None:
                return None
            return self.open(source if isinstance(source, str) else bytes(source), None, **options)

        brush = gr.Brush(colors=["#ff00ff"], color_mode="fixed", default_size=self.models.pipeline.resolution // 8)
        settings = {"sources": ("upload", "clipboard"), "layers": False, "transforms": (), "format": "png"}
        editor = variant(gr.ImageEditor, convert_and_format_image=read)
        return editor(label="Paint over what is to be made again", type="pil", brush=brush, **settings)

    def examples(self, folder: str, component: Component) -> None:
        """Images of a folder to choose from, but for masks."""
        files = visible_in(required_folder("example images", folder))
        rows = [[str(file)] for file in files if not file.name.endswith((".md", "mask.png"))][:EXAMPLES]
        if isinstance(component, gr.ImageEditor):  # has no thumbnails of its own
            gr.Examples(rows, self.upload(visible=False), component, lambda image: image, run_on_click=True)
        else:
            gr.Examples(rows, component)

    def images(self, generate: Callable[..., list[Image.Image]]) -> tuple[gr.Gallery, Work]:
        """A gallery of what `generate(pipeline, given, **settings)` returns, in which the steps are seen."""

        def work(pipeline: ShowoPipeline, given: Given, show: Show) -> None:
            steps, count, seed = int(given[self.steps]), int(given[self.count]), given[self.seed]
            first = random.SystemRandom().randrange(2**31) if seed is None else seed
            seeds = [image_seed(first, number) for number in range(count)]

            def after_step(step: int, left: int, codes: torch.Tensor) -> None:
                images = pipeline.decode(codes) if given[self.live] and left else []
                show([captioned(image, f"step {step + 1} of {steps}") for image in images] or gr.skip())

            images = generate(
                pipeline,
                given,
                num_images_per_prompt=count,
                negative_prompt=given[self.negative],
                generator=seeds,
                callback_on_step_end=after_step,
                **self.sampling(given),
            )
            show([captioned(image, f"seed {seed}") for image, seed in zip(images, seeds, strict=True)])

        return self.gallery("Images"), work

    def add(self, name: str, make: Callable[["Page"], Tab]) -> None:
        """A tab: inputs at the left, and at the right the output, which a button brings about."""
        with gr.Tab(name), gr.Row():
            left, right = gr.Column(), gr.Column()
            with left:
                own, output, work = make(self)
            with right:
                with gr.Row():
                    button, stop = gr.Button("Run", variant="primary"), gr.Button("Stop")
                output.render()

        def run(given: Given) -> Iterator[Any]:
            with messages():
                get = self.models.get
                yield from live(lambda show: work(get(given[self.checkpoint], given[self.dtype]), given, show))

        event = button.click(run, self.controls | own, output, concurrency_id="model", concurrency_limit=1)
        stop.click(None, cancels=event)


# ---- tabs ----


def text_to_image(page: Page) -> Tab:
    prompt = page.prompt()
    gr.Examples([[one] for one in page.prompts], prompt)
    return {prompt}, *page.images(lambda pipeline, given, **settings: pipeline.text_to_image(given[prompt], **settings))


def inpainting(page: Page) -> Tab:
    image = page.painted()
    page.examples(page.config.example_images, image)
    prompt, keep = page.prompt(), gr.Checkbox(True, label="Keep the other pixels as they are")

    def inpaint(pipeline: ShowoPipeline, given: Given, **settings) -> list[Image.Image]:
        background, mask = needed((given[image] or {}).get("background"), "image"), None
        for layer in given[image]["layers"]:
            mask = layer.convert("L").point(lambda value: 255 * (value > 0))
        return pipeline.inpaint(background, needed(mask, "paint on it"), given[prompt], keep=given[keep], **settings)

    return {image, prompt, keep}, *page.images(inpaint)


def extrapolation(page: Page) -> Tab:
    image = page.upload()
    page.examples(page.config.example_images, image)
    prompt = page.prompt("Prompt (one for all directions, or one for each: a *** b)")
    directions = gr.Dropdown(list(DIRECTIONS), value=["left", "right"], multiselect=True, label="Directions, in turn")
    limit = page.models.pipeline.window // 2 - 1
    offset = slider("Offset, in tokens", -limit, limit, 0)

    def extrapolate(pipeline: ShowoPipeline, given: Given, **settings) -> list[Image.Image]:
        turns, prompts = needed(given[directions], "direction"), split_pieces("prompt", given[prompt])
        prompts = prompts * len(turns) if len(prompts) == 1 else prompts
        return pipeline.extrapolate(
            needed(given[image], "image"), turns, prompts, offset=int(given[offset]), **settings
        )

    return {image, prompt, directions, offset}, *page.images(extrapolate)


def questions(page: Page) -> Tab:
    image = page.upload()
    page.examples(page.config.example_images_of_questions, image)
    asked = page.config.example_questions
    question = gr.Textbox(asked[0], label="Question (empty: the bare caption)", max_length=MAX_TEXT)
    gr.Examples([[one] for one in asked], question)

    def work(pipeline: ShowoPipeline, given: Given, show: Show) -> None:
        words: list[str] = []

        def stream(_: int, __: int, text: str) -> None:
            words.append(text)
            show("".join(words))

        [(_, _, answer)] = pipeline.iter_answers(
            [needed(given[image], "image")],
            [given[question] or None],
            stream=stream,
            temperature=given[page.randomness],
            generator=pipeline.generator(given[page.seed]),
            **page.writing(given),
        )
        show(answer)

    return {image, question}, gr.Textbox(label="Answer", lines=6, render=False), work


def editing(page: Page) -> Tab:
    image = page.upload()
    page.examples(page.config.example_images, image)
    asked = page.config.example_instructions
    instruction = gr.Textbox(asked[0], label="Instruction", max_length=MAX_TEXT)
    gr.Examples([[one] for one in asked], instruction)

    def edit(
        pipeline: ShowoPipeline,
        given: Given,
        *,
        num_images_per_prompt,
        negative_prompt,
        callback_on_step_end,
        **settings,
    ) -> list[Image.Image]:
        codes: list[torch.Tensor] = []  # of the images that have taken this step

        def after_image(_: int, __: int, sampled: torch.Tensor) -> None:
            codes.append(sampled)
            step, rest = divmod(len(codes), num_images_per_prompt)
            if not rest:
                latest = torch.stack(codes[-num_images_per_prompt:])
                callback_on_step_end(step - 1, settings["timesteps"] - step, latest)

        if negative_prompt:
            raise UserError("an edit has no negative prompt; leave it empty")
        images = [needed(given[image], "image")] * num_images_per_prompt
        return pipeline.edit(images, needed(given[instruction], "instruction"), on_new=after_image, **settings)

    return {image, instruction}, *page.images(edit)


def story(page: Page) -> Tab:
    prompt = page.prompt("How it begins")
    gr.Examples([[one] for one in page.prompts], prompt)
    length = slider("Images of the story", 1, 4, 3)

    def work(pipeline: ShowoPipeline, given: Given, show: Show) -> None:
        texts, images = {-1: given[prompt]}, {}  # by the number of their segment; the prompt comes before all

        def told(segment: int, value: str | torch.Tensor) -> None:
            if isinstance(value, str):
                texts[segment] = texts.get(segment, "") + value
                return
            images[segment] = pipeline.decode(value[None])[0]
            if given[page.live]:
                show([captioned(images[number].copy(), texts[number - 1]) for number in sorted(images)])

        made = pipeline.tell(
            given[prompt],
            int(given[length]),
            on_new=lambda _, segment, value: told(segment, value),
            text_temperature=given[page.randomness],
            generator=pipeline.generator(given[page.seed]),
            **page.sampling(given),
            **page.writing(given),
        )
        show([captioned(image, text) for text, image in zip(made[::2], made[1::2], strict=True)])

    return {prompt, length}, page.gallery("Story", columns=4), work


TABS = {
    "Text to image": text_to_image,
    "Inpainting": inpainting,
    "Extrapolation": extrapolation,
    "Questions": questions,
    "Editing": editing,
    "Story": story,
}


def main(argv: list[str]) -> None:
    if not any(argument.startswith("config=") for argument in argv):
        argv = [DEFAULT_CONFIG, *argv]
    config = load_config(argv, AppConfig)
    models, listening = Models(config), socket.create_server((config.host, config.port))
    with gr.Blocks(title="Show-o", analytics_enabled=False, delete_cache=(DAY, DAY)) as blocks:
        gr.Markdown("# Show-o\nOne transformer that reads and makes images.")
        with gr.Sidebar():
            page = Page(config, models)
        for name, make in TABS.items():
            page.add(name, make)
    settings = {"max_file_size": MAX_FILE, "css": CSS, "footer_links": [], "ssr_mode": False}
    app = gr.mount_gradio_app(
        FastAPI(), blocks.queue(max_size=MAX_WAITING), "/", root_path=config.root_path, **settings
    )
    print(f"open http://{config.host}:{listening.getsockname()[1]} in a browser; Ctrl-C ends it", flush=True)
    server = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(server).run(sockets=[listening])


if __name__ == "__main__":
    run_cli(main)
