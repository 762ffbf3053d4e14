"""Every tab of the page, as a visitor uses it; what it shows is compared with what the pipeline returns."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from common.files import visible_in
from common.inputs import read_prompts, required_folder

pytestmark = pytest.mark.app

COUNT = 2  # images at once
RECORD = """panel => {
    window.seen = [];
    const look = () => {
        const images = [...panel.querySelectorAll('img[alt^="step"]')].map(image => image.alt);
        const texts = [...panel.querySelectorAll('textarea')].map(area => area.value);
        for (const one of images.concat(texts)) if (!window.seen.includes(one)) window.seen.push(one);
    };
    setInterval(look, 5);
}"""


def open_tab(page, name: str):
    page.get_by_role("tab", name=name).click()
    panel = page.locator("[role=tabpanel]:visible")
    panel.get_by_role("button", name="Run").wait_for()
    return panel


def set_control(page, label: str, value: str) -> None:
    control = page.get_by_label(label, exact=True).and_(page.locator("input[type=number]")).first
    control.fill(value)
    control.press("Tab")


def run(panel) -> None:
    panel.get_by_role("button", name="Run").click()


def images_of(page, panel, seed: int) -> list[Image.Image]:
    """What the gallery holds when all is done."""
    shown = [panel.get_by_role("img", name=f"seed {seed + number}", exact=True) for number in range(COUNT)]
    for one in shown:
        one.wait_for()
    files = [page.request.get(one.get_attribute("src")).body() for one in shown]
    return [Image.open(io.BytesIO(file)) for file in files]


def expected(config, seed: int) -> dict:
    """The settings that the page has at first."""
    return {
        "num_images_per_prompt": COUNT,
        "guidance_scale": config.guidance_scale,
        "timesteps": config.generation_timesteps,
        "temperature": config.generation_temperature,
        "generator": seed,
    }


def assert_same(images: list[Image.Image], others: list[Image.Image]) -> None:
    assert [image.size for image in images] == [other.size for other in others]
    for image, other in zip(images, others, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(other))


def first_example(folder: str):
    files = visible_in(required_folder("examples", folder))
    return next(file for file in files if not file.name.endswith((".md", "mask.png")))


def choose_example(panel) -> None:
    panel.locator("button.gallery-item").first.click()


def paint(page, panel) -> None:
    """A rectangle at the right of the centre, of a tenth of the editor."""
    panel.get_by_text("Upload an image").wait_for(state="hidden")
    panel.get_by_role("button", name="Brush").first.click()
    box = panel.locator("canvas").last.bounding_box()
    left, top = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for row in range(5):
        page.mouse.move(left, top + 15 * row)
        page.mouse.down()
        page.mouse.move(left + 70, top + 15 * row, steps=5)
        page.mouse.up()


def wait_for_value(panel, label: str, value: str) -> None:
    from playwright.sync_api import expect  # not there in runs that leave these tests out

    expect(panel.get_by_label(label, exact=True)).to_have_value(value)


def wait_for_message(page, text: str) -> None:
    page.get_by_test_id("toast-body").filter(has_text=re.compile(text)).first.wait_for()


def upload(panel, name: str, data: bytes) -> None:
    files = {"name": name, "mimeType": "image/png", "buffer": data}
    panel.locator("input[type=file]").first.set_input_files(files)


def test_text_to_image_shows_its_steps(visit, pipeline, config, screenshot):
    page = visit()
    panel = open_tab(page, "Text to image")
    prompt = read_prompts(config.validation_prompts_file)[1]
    panel.get_by_role("button", name=prompt, exact=True).click()
    wait_for_value(panel, "Prompt", prompt)
    set_control(page, "number input for Images", str(COUNT))
    panel.evaluate(RECORD)
    run(panel)
    images = images_of(page, panel, config.seed)
    assert len([one for one in page.evaluate("window.seen") if one.startswith("step ")]) > 1
    assert_same(images, pipeline.text_to_image([prompt], **expected(config, config.seed)))
    assert images[1].text["Description"] == f"seed {config.seed + 1}"
    screenshot(page, "text-to-image")


def test_inpainting_changes_what_is_painted_over(visit, pipeline, config, screenshot):
    page = visit()
    panel = open_tab(page, "Inpainting")
    set_control(page, "number input for Images", str(COUNT))
    run(panel)
    wait_for_message(page, "there is no image")
    choose_example(panel)
    paint(page, panel)
    run(panel)
    images = images_of(page, panel, config.seed)
    screenshot(page, "inpainting")
    original = np.asarray(pipeline.view(first_example(config.example_images))).astype(int)
    for image in images:
        changed = np.abs(np.asarray(image).astype(int) - original).max(-1) > 16
        assert 0.005 < changed.mean() < 0.5
        assert not changed[: len(changed) // 4].any() and not changed[:, : len(changed) // 4].any()


def test_extrapolation_makes_the_image_wider(visit, pipeline, config, screenshot):
    page = visit()
    panel = open_tab(page, "Extrapolation")
    set_control(page, "number input for Images", str(COUNT))
    choose_example(panel)
    panel.locator("[data-testid=image] img").first.wait_for()
    run(panel)
    images = images_of(page, panel, config.seed)
    prompt, image = read_prompts(config.validation_prompts_file)[0], first_example(config.example_images)
    settings = expected(config, config.seed)
    assert_same(images, pipeline.extrapolate(image, ["left", "right"], [prompt] * 2, **settings))
    screenshot(page, "extrapolation")


def test_answers_are_streamed(visit, pipeline, config, screenshot):
    page = visit()
    panel = open_tab(page, "Questions")
    choose_example(panel)
    question, image = config.example_questions[-1], first_example(config.example_images_of_questions)
    panel.get_by_role("button", name=question, exact=True).click()
    wait_for_value(panel, "Question (empty: the bare caption)", question)
    panel.locator("[data-testid=image] img").first.wait_for()
    panel.evaluate(RECORD)
    answer = pipeline.answer([image], [question])[0][0]
    for _ in range(8):  # the browser shows the words of so short an answer at once if it is slower than the model
        run(panel)
        wait_for_value(panel, "Answer", answer)
        page.wait_for_timeout(500)
        parts = {text for text in page.evaluate("window.seen") if text and answer.startswith(text)}
        if len(parts) > 1:
            break
    assert answer in parts and len(parts) > 1  # the first words, and all
    screenshot(page, "questions")


def test_edits_show_their_steps(visit, pipeline, config, screenshot):
    page = visit()
    panel = open_tab(page, "Editing")
    instruction, image = config.example_instructions[-1], first_example(config.example_images)
    choose_example(panel)
    panel.get_by_role("button", name=instruction, exact=True).click()
    wait_for_value(panel, "Instruction", instruction)
    panel.locator("[data-testid=image] img").first.wait_for()
    set_control(page, "number input for Images", str(COUNT))
    panel.evaluate(RECORD)
    run(panel)
    images = images_of(page, panel, config.seed)
    assert len([one for one in page.evaluate("window.seen") if one.startswith("step ")]) > 1
    settings = expected(config, config.seed)
    assert_same(images, pipeline.edit([image] * settings.pop("num_images_per_prompt"), instruction, **settings))
    screenshot(page, "editing")


def test_a_story_is_told(visit, pipeline, config, screenshot):
    page = visit()
    panel = open_tab(page, "Story")
    set_control(page, "number input for Images of the story", "2")
    run(panel)
    prompt, settings = read_prompts(config.validation_prompts_file)[0], expected(config, config.seed)
    del settings["num_images_per_prompt"]
    settings |= {"generator": pipeline.generator(config.seed), "max_new_tokens": config.max_new_tokens}
    settings |= {"text_temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    _, first, text, second = pipeline.tell(prompt, 2, **settings)
    captions = prompt, text or prompt
    for _ in range(60):  # until the last step is shown
        shown = [panel.get_by_role("img", name=caption, exact=True).last for caption in captions]
        files = [page.request.get(one.get_attribute("src")).body() for one in shown]
        images = [Image.open(io.BytesIO(file)) for file in files]
        if all(np.array_equal(*map(np.asarray, pair)) for pair in zip(images, (first, second), strict=True)):
            break
        page.wait_for_timeout(500)
    assert_same(images, [first, second])
    screenshot(page, "story")


def test_two_visitors_at_once(visit, pipeline, config):
    prompts, seeds = read_prompts(config.validation_prompts_file)[:2], (3, 4000)
    pages = [visit(), visit()]
    panels = [open_tab(page, "Text to image") for page in pages]
    for page, panel, prompt, seed in zip(pages, panels, prompts, seeds, strict=True):
        panel.get_by_label("Prompt").fill(prompt)
        set_control(page, "number input for Images", str(COUNT))
        set_control(page, "Seed (empty: random)", str(seed))
    for panel in panels:
        run(panel)
    for page, panel, prompt, seed in zip(pages, panels, prompts, seeds, strict=True):
        images = images_of(page, panel, seed)
        assert_same(images, pipeline.text_to_image([prompt], **expected(config, seed)))


def strip_of_pixels() -> bytes:
    """A small file of more pixels than are read."""
    data = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(data, "png")
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("notes.png", lambda: b"no image at all", "notes.png cannot be read; it is damaged or not an image"),
        ("huge.png", strip_of_pixels, r"huge.png has more than 178,956,970 pixels|would become .* pixels"),
        ("heavy.png", lambda: bytes(21 * 10**6), "exceed the maximum allowed size"),
    ],
    ids=["text", "pixels", "bytes"],
)
def test_bad_uploads_are_messages(visit, name, make, text):
    page = visit()
    panel = open_tab(page, "Questions")
    upload(panel, name, make())
    if name != "heavy.png":  # which is refused at once
        panel.locator("[data-testid=image] img").first.wait_for(state="attached")
        run(panel)
    wait_for_message(page, text)


def test_mistakes_are_messages_and_the_page_goes_on(visit, config):
    page = visit()
    panel = open_tab(page, "Text to image")
    panel.get_by_label("Prompt").fill("a <|soi|> in a prompt")
    set_control(page, "number input for Images", str(COUNT))
    run(panel)
    wait_for_message(page, "contains the special token")
    panel.get_by_label("Prompt").fill("a prompt")
    run(panel)
    images_of(page, panel, config.seed)
