"""Every tab of the page, as a visitor uses it; its images are compared with those of the pipeline."""

import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from common.files import visible_in
from common.inputs import read_prompts, required_folder
from models import SamplingParameters

pytestmark = pytest.mark.app

# Records every caption that a gallery shows, and every text of the answer.
RECORD = """() => {
    window.seen = [];
    const look = () => document.querySelectorAll('.caption-label, label:has-text textarea').forEach(() => 0);
    new MutationObserver(() => document.querySelectorAll('[role=tabpanel] img[alt^="step"]')
        .forEach(image => window.seen.includes(image.alt) || window.seen.push(image.alt)))
        .observe(document.body, {subtree: true, childList: true, attributes: true});
}"""


def open_tab(page, name: str):
    page.get_by_role("tab", name=name).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_role("button", name="Run").wait_for()
    return panel


def run(panel) -> None:
    panel.get_by_role("button", name="Run").click()


def images_of(page, panel, seed: int = 10086, count: int = 4) -> list[Image.Image]:
    """What the gallery holds when all is done."""
    shown = [panel.get_by_role("img", name=f"seed {seed + number}", exact=True) for number in range(count)]
    for one in shown:
        one.wait_for()
    files = [page.request.get(one.get_attribute("src")).body() for one in shown]
    return [Image.open(io.BytesIO(file)) for file in files]


def expected(pipeline, config, seed: int = 10086, count: int = 4) -> dict:
    return {
        "num_images_per_prompt": count,
        "guidance_scale": config.guidance_scale,
        "timesteps": config.generation_timesteps,
        "temperature": config.generation_temperature,
        "generator": [pipeline.generator(seed + number) for number in range(count)],
        "sampling": SamplingParameters(),
    }


def same(images: list[Image.Image], others: list[Image.Image]) -> bool:
    return [np.asarray(one).tolist() for one in images] == [np.asarray(one).tolist() for one in others]


def examples(folder: str):
    return [
        file for file in visible_in(required_folder("examples", folder)) if not file.name.endswith(("mask.png", ".md"))
    ]


def message(page):
    """The text of an error."""
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    return toast.inner_text()


def test_text_to_image_shows_its_steps_and_is_the_pipelines(visit, pipeline, config, screenshot):
    page = visit()
    panel = open_tab(page, "Text to image")
    page.evaluate(RECORD)
    prompt = read_prompts(config.validation_prompts_file)[1]
    panel.get_by_role("button", name=prompt).click()
    run(panel)
    images = images_of(page, panel)
    assert same(images, pipeline.text_to_image([prompt], **expected(pipeline, config)))
    assert images[1].text["Description"] == "seed 10087"
    assert len(page.evaluate("window.seen")) > 2  # steps
    screenshot(page, "text-to-image")


def test_inpainting_changes_what_is_painted_over_and_nothing_else(visit, pipeline, config, screenshot):
    page = visit()
    panel = open_tab(page, "Inpainting")
    panel.locator("button.gallery-item").first.click()
    panel.get_by_text("Upload an image").wait_for(state="hidden")
    panel.get_by_role("button", name="Brush").click()
    box = panel.locator("canvas").last.bounding_box()
    left, top = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for row in range(6):
        page.mouse.move(left - 40, top + 10 * row)
        page.mouse.down()
        page.mouse.move(left + 40, top + 10 * row, steps=8)
        page.mouse.up()
    run(panel)
    original = np.asarray(pipeline.view(examples(config.example_images)[0])).astype(int)
    for image in images_of(page, panel):
        changed = np.abs(np.asarray(image).astype(int) - original).max(-1) > 16
        assert 0.01 < changed.mean() < 0.6
        assert not changed[: len(changed) // 8].any()  # far above the brush
    screenshot(page, "inpainting")
