"""Strings and pictures in and out; rows, draws and windows of the published rules (spec §7, §8)."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from common.errors import UserError
from llava import encode_plain
from models import CLIPVisionTower, Showo, ShowoConfig, ShowoPipeline, UniversalPrompting
from models.generation.cpu import SkinnyLinear
from models.images import from_pixels
from models.pipeline_inputs import image_seed, mask_tokens
from models.pipeline_showo import _AnswerStreamer
from tests.parity.goldens import PHI, facts, prompting, tensors, tiny_showo
from tests.tiny import NUM_FEATURES, RESOLUTION, WINDOW, clip_showo, tiny_vq, write_checkpoints, write_clip
from tests.tiny_llms import qwen_like, showo_config
from training.data.image_text import Captions
from training.understanding import VqUnderstanding, conversation_rows

FAST = {"timesteps": 3, "guidance_scale": 2.0}
HALF = WINDOW // 2


@pytest.fixture(scope="module")
def pipeline() -> ShowoPipeline:
    return ShowoPipeline(tiny_showo(), tiny_vq(), prompting())


@pytest.fixture(scope="module")
def clip_pipeline(tmp_path_factory) -> ShowoPipeline:
    tower = CLIPVisionTower(write_clip(tmp_path_factory.mktemp("clip") / "clip"))
    return ShowoPipeline(clip_showo(), tiny_vq(), prompting(), clip=tower)


def noise(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A picture of coarse random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def same(first: list[Image.Image], second: list[Image.Image]) -> bool:
    return [image.tobytes() for image in first] == [image.tobytes() for image in second]


# --- text to image


@pytest.mark.parametrize("case", range(4))
def test_the_published_codes(case):
    """The last two around known codes."""
    settings, golden = facts()["generate"][case], tensors()
    pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting(), noise_schedule=settings["schedule"])
    codes = torch.full((len(facts()["t2i_texts"]), WINDOW**2), -1)
    if settings["partial"]:
        image_ids = golden[f"generate.{case}.image_ids"]
        codes = torch.where(image_ids != facts()["mask_token_id"], image_ids - facts()["text_token_offset"], -1)
    given = {key: settings[key] for key in ("guidance_scale", "timesteps", "temperature")}
    given["generator"] = pipeline.generator(settings["seed"])
    assert torch.equal(pipeline.generate_codes(facts()["t2i_texts"], codes, **given), golden[f"generate.{case}.tokens"])


def test_one_generator_serves_consecutive_batches_and_repeats_prompts_in_a_row(pipeline):
    generator = pipeline.generator(3)
    first = pipeline.text_to_image(["w1", "w1"], generator=generator, **FAST)
    second = pipeline.text_to_image(["w2", "w2"], generator=generator, **FAST)
    repeated = {"num_images_per_prompt": 2, "batch_size": 2, "generator": pipeline.generator(3)}
    at_once = pipeline.text_to_image(["w1", "w2"], **repeated, **FAST)
    assert same(first + second, at_once)
    assert not same(first[:1], first[1:])  # the same prompt, other draws


def test_an_image_with_a_generator_of_its_own_is_the_same_in_any_batch(pipeline):
    prompts, known = ["w1 w2 w3", "w2", "w3 w4"], {"timesteps": 6, "guidance_scale": 2.0}

    def generators() -> list[torch.Generator]:
        return [pipeline.generator(seed) for seed in (5, 6, 7)]

    alone = [
        pipeline.text_to_image(prompt, generator=generator, **known)[0]
        for prompt, generator in zip(prompts, generators(), strict=True)
    ]
    for size in (1, 2, 3):
        assert same(pipeline.text_to_image(prompts, generator=generators(), batch_size=size, **known), alone)
    with pytest.raises(ValueError):
        pipeline.text_to_image(prompts, generator=generators()[:2], **known)


def test_prompts_that_do_not_fit_are_found(pipeline):
    longest = pipeline.prompting.max_text_len - 1  # with bos; eos has a place of its own
    texts = [" ".join(["w1"] * count) for count in (longest, longest - 1)]
    assert pipeline.cut_prompts([*texts, texts[0]]) == texts[:1]
    pipeline.prompting.max_text_len, before = 5000, pipeline.prompting.max_text_len
    try:
        with pytest.raises(UserError, match="positions, but the model knows 1024"):
            pipeline.text_to_image("w1 " * 2000, **FAST)
    finally:
        pipeline.prompting.max_text_len = before


def test_texts_that_are_no_utf_8_are_refused(pipeline):
    with pytest.raises(UserError, match=r"'caf\\xe9' is no UTF-8"):
        pipeline.text_to_image("caf\udce9")


def test_a_callback_sees_every_step_and_can_look(pipeline):
    seen = []
    last = pipeline.text_to_image("w1", callback_on_step_end=lambda *step: seen.append(step), **FAST)
    assert [step[:2] for step in seen] == [(0, 2), (1, 1), (2, 0)]
    assert same(pipeline.decode(seen[-1][2]), last)


def test_a_call_is_a_door_to_text_to_image(pipeline):
    settings = {"guidance_scale": 2.0, "num_images_per_prompt": 2}
    images = pipeline.text_to_image(["w1", "w2"], timesteps=3, generator=pipeline.generator(5), **settings)
    settings |= {"num_inference_steps": 3, "generator": pipeline.generator(5)}
    arrays = pipeline(["w1", "w2"], output_type="np", **settings).images
    assert arrays.shape == (4, RESOLUTION, RESOLUTION, 3) and arrays.dtype == np.float32
    assert same([from_pixels(one) for one in arrays], images)
    (tensors,) = pipeline(["w1", "w2"], output_type="pt", return_dict=False, **settings | {"generator": [5, 6, 7, 8]})
    assert tensors.shape == (4, 3, RESOLUTION, RESOLUTION) and 0 <= tensors.min() < tensors.max() <= 1
    (image,) = pipeline("w1", num_inference_steps=3, guidance_scale=2.0, generator=5).images
    assert same([image], [from_pixels(tensors[0])])


def test_a_seed_is_that_of_the_first_image_and_each_one_can_be_made_again_alone(pipeline):
    images = pipeline.text_to_image(["w1", "w2"], num_images_per_prompt=2, generator=7, **FAST)
    for given in ([7, 8, 9, 10], [pipeline.generator(7), 8, np.int64(9), 10]):
        again = pipeline.text_to_image(["w1", "w2"], num_images_per_prompt=2, batch_size=3, generator=given, **FAST)
        assert same(again, images)
    for number, prompt in enumerate(("w1", "w1", "w2", "w2")):
        for seed in (7 + number, pipeline.generator(7 + number)):
            assert same(pipeline.text_to_image(prompt, generator=seed, **FAST), images[number : number + 1])
    assert image_seed(2**63 - 1, 1) == 0


def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipeline, monkeypatch):
    seen, generate = [], pipeline.model.t2i_generate

    def watched(input_ids, uncond_input_ids, **settings):
        seen.append(uncond_input_ids)
        return generate(input_ids, uncond_input_ids, **settings)

    monkeypatch.setattr(pipeline.model, "t2i_generate", watched)
    plain, empty, other = (
        pipeline.text_to_image(["w1", "w2"], negative_prompt=negative, generator=3, **FAST)
        for negative in (None, "", "w7 w8")
    )
    assert same(plain, empty) and not same(plain, other)
    ids = torch.full((3, WINDOW**2), facts()["mask_token_id"])
    each = {"negative_prompt": ["w7", ""], "num_images_per_prompt": 2, "batch_size": 3}
    pipeline.text_to_image(["w1", "w2"], **each, **FAST)
    expected = pipeline.prompting((["w7", "w7", ""], ids), "t2i_gen").input_ids
    assert torch.equal(seen[3], expected) and torch.equal(seen[4], expected[2:])
    pipeline.inpaint(noise(0), mask((24, 0, 48, 40)), ["w1", "w2"], negative_prompt=["w7", ""], **FAST)
    assert torch.equal(seen[5][:, : -(WINDOW**2) - 1], expected[1:, : -(WINDOW**2) - 1])
    pipeline.extrapolate([noise(0), noise(1)], ["up", "left"], ["w1", "w2"], negative_prompt=["w7", ""], **FAST)
    assert [torch.equal(rows[0, : -(WINDOW**2) - 1], expected[0, : -(WINDOW**2) - 1]) for rows in seen[6:]] == [1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"negative_prompt": "w1", "guidance_scale": 0}, ValueError, "negative_prompt has no effect with guidance_sc"),
        ({"negative_prompt": ["w1"] * 3}, ValueError, "negative_prompt holds 3, expected one for all, or 2: one for"),
        ({"negative_prompt": 5}, TypeError, "got 5 of type int, expected texts"),
        ({"negative_prompt": "<|soi|>"}, ValueError, "contains the special token"),
        ({"prompt": ["w1", None]}, TypeError, "is None of type NoneType, expected text"),
        ({"prompt": None}, TypeError, "got None of type NoneType"),
        ({"generator": [1, 2, 3]}, ValueError, "generator holds 3 for 2 images"),
        ({"generator": "7"}, TypeError, "generator is of type str|expected an int"),
        ({"generator": [1.5, 2]}, TypeError, "generator is of type float, expected an int"),
        ({"output_type": "jpg"}, ValueError, "output_type is 'jpg', expected one of pil, np, pt"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps is 0"),
        ({"steps": 3}, TypeError, "steps"),
    ],
)
def test_mistakes_in_a_call_are_told_in_pythons_words(pipeline, settings, error, message, monkeypatch):
    monkeypatch.setattr(pipeline.model, "t2i_generate", None)
    with pytest.raises(error, match=message):
        pipeline(**{"prompt": ["w1", "w2"]} | settings)


def test_generators_without_a_seed_differ(pipeline):
    assert pipeline.generator().initial_seed() != pipeline.generator().initial_seed()
    assert pipeline.generator(7).initial_seed() == 7


# --- inpainting


def mask(box: tuple[int, int, int, int], size=(48, 40)) -> Image.Image:
    image = Image.new("L", size)
    image.paste(255, box)
    return image


def test_inpainting_keeps_the_black_part_and_generates_the_white_one(pipeline):
    seen = []
    settings = {"num_images_per_prompt": 3, "batch_size": 2, "generator": pipeline.generator(1)}
    settings["callback_on_step_end"] = lambda step, timestep, codes: seen.append(codes.view(-1, WINDOW, WINDOW))
    images = pipeline.inpaint(noise(0), mask((24, 0, 48, 40)), "w5", **settings, **FAST)
    before = pipeline.encode([noise(0)]).view(WINDOW, WINDOW)
    assert [len(codes) for codes in seen] == [2, 2, 2, 1, 1, 1] and len(images) == 3
    assert all((codes[:, :, :HALF] == before[:, :HALF]).all() for codes in seen)
    assert any((codes[:, :, HALF:] != before[:, HALF:]).any() for codes in seen)


def test_lists_of_images_and_arrays_are_inpainted_and_extended(pipeline, monkeypatch):
    """Each as alone; what is given once serves all. The images are encoded once, however many batches there are."""
    seen, get_code = [], pipeline.vq_model.get_code
    monkeypatch.setattr(pipeline.vq_model, "get_code", lambda pixels: seen.append(len(pixels)) or get_code(pixels))
    images, masks = [noise(0), noise(1)], [mask((24, 0, 48, 40)), mask((0, 0, 48, 20))]
    settings = {"num_images_per_prompt": 2, "batch_size": 1, "generator": 4, **FAST}
    made = pipeline.inpaint(images, masks, "w5", keep=True, **settings)
    assert len(made) == 4 and seen == [1, 1]
    second = pipeline.inpaint(images[1], masks[1], "w5", keep=True, **settings | {"generator": 6})
    assert same(made[2:], second)
    arrays = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    painted = [np.asarray(one) > 0 for one in masks]
    assert same(pipeline.inpaint(arrays, painted, ["w5", "w5"], keep=True, **settings), made)
    assert len(pipeline.inpaint(images[0], masks[0], ["w5", "w6"], **FAST)) == 2
    seen.clear()
    wide = pipeline.extrapolate(arrays / 255, "right", "w5", **settings)
    assert seen == [1, 1]
    assert same(wide[2:], pipeline.extrapolate(images[1], "right", "w5", **settings | {"generator": 6}))
    with pytest.raises(ValueError, match="mask holds 2, expected one for all, or 3"):
        pipeline.inpaint([noise(0)] * 3, masks, "w5")
    for nothing in (lambda: pipeline.inpaint([], masks[0], "w5"), lambda: pipeline.extrapolate([], "up", "w5")):
        with pytest.raises(ValueError, match="image holds 0"):
            nothing()


def test_the_mask_follows_the_published_rule():
    size = (96, 64)  # cropped to the middle 64 x 64, as the image is
    tokens = mask_tokens(mask((16, 0, 48, 32), size), Image.new("RGB", size), RESOLUTION, WINDOW)
    expected = torch.zeros(WINDOW, WINDOW, dtype=torch.bool)
    expected[:HALF, :HALF] = True
    assert torch.equal(tokens, expected.view(1, -1))
    # bicubic without antialiasing reads the four pixels around a token's centre: a line elsewhere does not count
    square = Image.new("RGB", (RESOLUTION, RESOLUTION))
    thin, beside = (mask((left, 0, left + 2, RESOLUTION), square.size) for left in (3, 0))
    beside.paste(255, (10, 10, 14, 14))
    assert mask_tokens(thin, square, RESOLUTION, WINDOW).view(WINDOW, WINDOW)[:, 0].all()
    assert mask_tokens(beside, square, RESOLUTION, WINDOW).nonzero().tolist() == [[0, WINDOW + 1]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (48, 40)), "no white region"),
        (Image.new("L", (48, 40), 127), "no white region"),  # 0.498
        (Image.new("L", (48, 40), 128), None),  # 0.502
        (Image.new("RGB", (96, 80), "white"), None),
        (Image.new("L", (48, 48), 255), "48 x 48 pixels, the image 48 x 40"),
        (Image.new("F", (48, 40), 255), None),
        (Image.new("RGBA", (48, 40), (255, 255, 255, 0)), "no white region"),  # what is transparent is kept
        (noise(4), "colour image"),
    ],
)
def test_masks_of_all_kinds(mask, message):
    """Grey counts from the middle on; another size is fine if the shape is the image's."""
    if message is None:
        assert mask_tokens(mask, noise(0), RESOLUTION, WINDOW).all()
    else:
        with pytest.raises(UserError, match=message):
            mask_tokens(mask, noise(0), RESOLUTION, WINDOW)


def test_transparent_regions_of_a_mask_are_kept_whatever_they_hide():
    """Also in a palette; the strokes are white."""
    size, box = (48, 40), (0, 0, 24, 20)
    layers = [Image.new(mode, size, hidden) for mode, hidden in (("RGBA", (255,) * 3 + (0,)), ("LA", (255, 0)))]
    layers += [Image.new("RGBA", size, (0, 0, 0, 0)), Image.new("P", size, 1)]
    for layer in layers[:3]:
        layer.paste((255,) * len(layer.getbands()), box)
    layers[3].putpalette([255, 255, 255] * 2)
    layers[3].paste(0, box)
    layers[3].info["transparency"] = 1
    expected = mask_tokens(mask(box), noise(0), RESOLUTION, WINDOW)
    for layer in layers:
        assert torch.equal(mask_tokens(layer, noise(0), RESOLUTION, WINDOW), expected), layer


@pytest.mark.parametrize("pixels", [np.uint16(65535), np.int32(70000), np.float32(1)])
def test_masks_of_more_than_8_bits_are_scaled(pixels):
    deep = np.zeros((40, 48), pixels.dtype)
    deep[:, 24:], deep[:, :24] = pixels, pixels / 4
    tokens = mask_tokens(Image.fromarray(deep), noise(0), RESOLUTION, WINDOW).view(WINDOW, WINDOW)
    assert tokens[:, HALF:].all() and not tokens[:, :HALF].any()


def test_pixels_outside_the_mask_can_be_kept(pipeline):
    settings, box = FAST | {"num_images_per_prompt": 2}, (24, 0, 48, 10)
    given = (noise(0), mask(box), "w5")
    plain = pipeline.inpaint(*given, generator=pipeline.generator(1), **settings)
    kept = pipeline.inpaint(*given, keep=True, generator=pipeline.generator(1), **settings)
    original = np.asarray(pipeline.view(noise(0))).astype(int)
    white = np.asarray(pipeline.view(mask(box)))[..., 0] >= 128
    assert 0 < white.mean() < 0.2
    near = np.asarray(Image.fromarray(white).filter(ImageFilter.MaxFilter(2 * 4 + 1)))  # half a token of 8 pixels
    edge = near & ~white
    for before, after in zip(map(np.asarray, plain), map(np.asarray, kept), strict=True):
        assert (after[~near] == original[~near]).all() and (before[~near] != original[~near]).any()
        assert (after[white] == before[white]).all()
        share = np.abs(after[edge] - original[edge]).sum() / np.abs(before[edge] - original[edge]).sum()
        assert 0.3 < share < 0.7, "between both"


# --- extrapolation


def published(pipeline, image, directions, prompts, offset, generator) -> torch.Tensor:
    """The published loop: the kept half beside new tokens is generated, then put in the place of that half."""
    keep, new = HALF - offset, HALF + offset
    codes = pipeline.encode([image]).view(WINDOW, WINDOW).repeat(2, 1, 1)
    for direction, prompt in zip(directions, prompts, strict=True):
        turns = {"right": 0, "up": 3, "left": 2, "down": 1}[direction]  # so that the new tokens are on the right
        codes = codes.rot90(turns, (1, 2))
        window = torch.cat([codes[..., -keep:], codes.new_full((2, WINDOW, new), -1)], 2).rot90(-turns, (1, 2))
        drawn = pipeline.generate_codes([prompt] * 2, window.flatten(1), generator=generator, **FAST)
        drawn = drawn.view(2, WINDOW, WINDOW).rot90(turns, (1, 2))
        codes = torch.cat([codes[..., :-keep], drawn], 2).rot90(-turns, (1, 2))
    return codes


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("steps", ["left left right", "right", "up up", "down up"])
def test_steps_along_one_axis_are_the_published_ones(pipeline, steps, offset):
    directions, prompts = steps.split(), ["w1", "w2 w3", "w4"][: len(steps.split())]
    expected = published(pipeline, noise(2), directions, prompts, offset, pipeline.generator(9))
    settings = FAST | {"offset": offset, "num_images_per_prompt": 2, "generator": pipeline.generator(9)}
    images = pipeline.extrapolate(noise(2), directions, prompts, **settings)
    assert same(images, pipeline.decode(expected))
    grown = WINDOW + len(directions) * (HALF + offset)
    assert expected.shape[1:] == ((WINDOW, grown) if directions[0] in ("left", "right") else (grown, WINDOW))


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("steps", ["right down", "up left", "left up right down", "down down left left up right"])
def test_any_order_of_directions(pipeline, steps, offset, monkeypatch):
    """Windows slide along sides that have outgrown them; each token is generated once, beside known ones."""
    directions, windows, canvases = steps.split(), [], []
    generate, decode, seen = pipeline.generate_codes, pipeline.decode, []

    def watched(prompts, codes, **settings):
        windows.append((codes == -1).view(-1, WINDOW, WINDOW)[0])
        return generate(prompts, codes, **settings)

    monkeypatch.setattr(pipeline, "generate_codes", watched)
    monkeypatch.setattr(pipeline, "decode", lambda codes: canvases.append(codes) or [])
    prompts = [f"w{number}" for number in range(len(directions))]
    given = {"offset": offset, "timesteps": 2, "callback_on_step_end": lambda *step: seen.append(step)}
    pipeline.extrapolate(noise(3), directions, prompts, **given)

    (canvas,) = canvases
    new = HALF + offset
    grown = {name: directions.count(name) * new for name in ("left", "right", "up", "down")}
    height, width = WINDOW + grown["up"] + grown["down"], WINDOW + grown["left"] + grown["right"]
    assert canvas.shape == (1, height, width)
    original = canvas[0, grown["up"] :, grown["left"] :][:WINDOW, :WINDOW]
    assert torch.equal(original.flatten(), pipeline.encode([noise(3)])[0])
    assert sum(int(unknown.sum()) for unknown in windows) == height * width - WINDOW**2
    assert all(0 < unknown.sum() <= WINDOW * new for unknown in windows)
    assert decode(canvas)[0].size == (width * 8, height * 8)
    assert [step[:2] for step in seen] == [(0, 1), (1, 0)] * len(windows)
    assert torch.equal(seen[-1][2], canvas)
    partly = next(codes for *_, codes in seen if (codes == -1).any())  # the first window of a strip that has several
    grey = np.asarray(decode(partly)[0])[(partly[0] == -1).numpy().repeat(8, 0).repeat(8, 1)]
    assert 0 < len(grey) < partly.numel() * 64 and (grey == 127).all()


@pytest.mark.parametrize(
    ("directions", "prompts", "offset", "message"),
    [
        (["left"], ["a", "b"], 0, "1 directions and 2 prompts"),
        (["left", "north"], ["a", "b"], 0, "'north' is no direction; allowed: left, right, up, down"),
        (["left"], ["a"], 2, "offset is 2; .* from -1 to 1"),
        (["left"], ["a"], -2, "offset is -2"),
        (["left", "up"] * 20, ["a"] * 40, 0, "40 directions make the image 121 times as large"),
        ([], [], 0, "0 directions"),
    ],
)
def test_extrapolation_that_cannot_be(pipeline, directions, prompts, offset, message):
    with pytest.raises(UserError, match=message):
        pipeline.extrapolate(noise(0), directions, prompts, offset=offset)


# --- answers


def test_answers_from_codes_are_those_of_the_published_row(pipeline):
    ids = facts()["special_token_ids"]
    question = "USER: \nw3 w4 w5 w6 ASSISTANT:"
    text = [ids["<|sot|>"], *pipeline.prompting.tokenizer(question, add_special_tokens=False)["input_ids"]]
    codes = (pipeline.encode([noise(1)])[0] + facts()["text_token_offset"]).tolist()
    row = torch.tensor([[ids["<|mmu|>"], ids["<|soi|>"], *codes, ids["<|eoi|>"], *text]])
    new_ids = pipeline.model.mmu_generate(row, max_new_tokens=12, top_k=1, eot_token=ids["<|eot|>"])
    expected = pipeline.prompting.tokenizer.decode(new_ids[0], skip_special_tokens=True)
    assert pipeline.answer(noise(1), "w3 w4 w5 w6", max_new_tokens=12) == [[expected]]
    assert expected


def test_a_bare_caption_is_asked_with_what_precedes_it_in_training(pipeline, monkeypatch):
    """Rows of the captioning flow with `add_caption_prompt=false`: the image, bos, and then the caption."""
    asked, generate = [], pipeline.model.mmu_generate
    monkeypatch.setattr(
        pipeline.model, "mmu_generate", lambda input_ids, **more: asked.append(input_ids) or generate(input_ids, **more)
    )
    captions = pipeline.caption([noise(0), noise(1)], max_new_tokens=4)
    builder = SimpleNamespace(
        prompting=pipeline.prompting,
        image_ids=lambda samples: pipeline.encode([noise(0), noise(1)]) + facts()["text_token_offset"],
    )
    branch = VqUnderstanding.__new__(VqUnderstanding)
    branch.max_mask_ratio = 0
    texts = [{"text": Captions()({"txt": text}, random.Random(0))} for text in (b"w1", b"w2 w3")]
    trained = branch.rows(texts, builder)[0]
    (rows,) = asked
    assert torch.equal(rows, trained.input_ids[:, : rows.shape[1]])
    first = trained.input_ids[0, rows.shape[1]]
    assert pipeline.prompting.tokenizer.decode(first) == "w1" and first == trained.labels[0, rows.shape[1]]
    assert captions == [answers[0] for answers in pipeline.answer([noise(0), noise(1)], [None], max_new_tokens=4)]


def test_a_bare_caption_of_a_clip_model_is_asked_as_its_projector_is_trained(clip_pipeline):
    """Without bos and system prompt, as rows of `llava_pretrain` are."""
    rows = clip_pipeline._question_rows([noise(0)], [None])["input_ids"]
    tokenizer = clip_pipeline.prompting.tokenizer
    sample = encode_plain([{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w1"}], tokenizer)
    builder = SimpleNamespace(prompting=clip_pipeline.prompting, row_length=NUM_FEATURES + 10)
    trained, start = conversation_rows([sample], torch.full((1, NUM_FEATURES), -200), [], builder)
    assert torch.equal(rows, trained.input_ids[:, :start])
    assert len(clip_pipeline.caption([noise(0), noise(1)], max_new_tokens=2)) == 2
    with pytest.raises(ValueError, match="not both"):
        clip_pipeline.answer(noise(0), ["w1", None])


@pytest.mark.parametrize("branch", ["pipeline", "clip_pipeline"])
def test_words_are_streamed_as_they_come(branch, request):
    pipeline = request.getfixturevalue(branch)
    heard: dict[tuple[int, int], list[str]] = {}

    def listen(image, question, words):
        heard.setdefault((image, question), []).append(words)

    answers = pipeline.answer([noise(0), noise(1)], ["w3 w4 w5 w6", "w10"], max_new_tokens=8, stream=listen)
    assert len(heard) == 4
    assert all("".join(words).strip() == answers[image][question] for (image, question), words in heard.items())
    assert max(len(words) for words in heard.values()) > 2
    assert all(words.index("") == len(words) - 1 for words in heard.values()), "the end is told once, last"


def test_the_blank_before_a_first_word_is_not_streamed(pipeline):
    """Byte-level tokenizers begin an answer with one; the answer itself is given without."""
    heard = []
    words = _AnswerStreamer(pipeline, lambda image, question, text: heard.append(text), (0, 1))
    for text in (" ", " a ", " b"):
        words.on_finalized_text(text)
    words.end()
    words.end()
    assert heard == ["a ", " b", ""]


def test_a_chat_asks_by_the_template_and_stops_at_the_end_of_the_turn(monkeypatch):
    prompting = UniversalPrompting(qwen_like(), max_text_len=16)
    words = prompting.vocabulary.llm_vocab_size
    sizes = {"llm_vocab_size": words, "codebook_size": 64, "num_vq_tokens": 16, "vocab_size": words + 75}
    llm = showo_config("qwen2").llm_config
    pipeline = ShowoPipeline(Showo(ShowoConfig(llm_config=llm, **sizes)), tiny_vq(), prompting, conversation="chat")
    end = prompting.tokenizer.convert_tokens_to_ids("<|im_end|>")
    given, heard = {}, []

    def generate(input_ids, *, eot_token, callback, **settings):
        given.update(text=prompting.tokenizer.decode(input_ids[0, 3 + 16 :]), eot_token=eot_token)
        ids = torch.tensor([[*prompting.tokenizer("A cat.").input_ids, end, prompting.vocabulary.pad_id]])
        for token in ids.T:
            callback(token)
        return ids

    monkeypatch.setattr(pipeline.model, "mmu_generate", generate)
    answers = pipeline.answer(noise(0), "Who?", stream=lambda image, question, text: heard.append(text))
    assert given["text"] == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "bos once"
    assert end in given["eot_token"] and prompting.eos_id in given["eot_token"]
    assert answers == [["A cat."]] and "".join(heard) == "A cat." and heard.index("") == len(heard) - 1


def test_arrays_and_tensors_are_asked_about(pipeline):
    image, asked = noise(1), {"questions": "w3 w4", "max_new_tokens": 6}
    (expected,) = pipeline.answer(image, **asked)
    values = np.asarray(image)
    tensor = torch.from_numpy(values.copy()).permute(2, 0, 1)
    for images in (values, tensor, tensor / 255, [values, image], np.stack([values, values / 255 * 255]).astype("u1")):
        assert set(map(tuple, pipeline.answer(images, **asked))) == {tuple(expected)}
    assert pipeline.caption(tensor[None].bfloat16() / 255)[0]
    drawn = {"generator": 3, "top_k": None, **asked}
    assert pipeline.answer([image, noise(0)], batch_size=1, **drawn) == pipeline.answer(
        [image, noise(0)], batch_size=1, **drawn | {"generator": pipeline.generator(3)}
    )


def test_images_are_encoded_one_at_a_time_and_may_be_paths(pipeline, monkeypatch, tmp_path):
    """However many a batch of questions shows, memory stays that of one."""
    seen, get_code = [], pipeline.vq_model.get_code
    monkeypatch.setattr(pipeline.vq_model, "get_code", lambda pixels: seen.append(len(pixels)) or get_code(pixels))
    noise(0).save(tmp_path / "a.png")
    codes = pipeline.encode([noise(0), tmp_path / "a.png", str(tmp_path / "a.png"), noise(1)])
    assert seen == [1] * 4 and codes.shape == (4, WINDOW**2)
    assert (codes[:3] == codes[0]).all() and not torch.equal(codes[3], codes[0])


# --- where it comes from


@pytest.mark.parametrize("settings", [{}, {"cpu_kernels": False}, {"compile": True}])
def test_a_folder_of_folders(tmp_path, pipeline, settings):
    """CPU kernels are on by default, off by their key and where steps are compiled."""
    write_checkpoints(tmp_path, "safetensors")
    (tmp_path / "llm").symlink_to(PHI, target_is_directory=True)
    loaded = ShowoPipeline.from_pretrained(tmp_path, max_seq_length=12, device="cpu", vq_model=None, **settings)
    assert loaded.model.dtype == loaded.vq_model.dtype == torch.float32
    assert isinstance(loaded.model.showo.get_output_embeddings(), SkinnyLinear) == (not settings)
    assert (loaded.model.step_caches is not None) == settings.get("compile", False)
    if not settings:
        images = (one.text_to_image(["w1"], generator=one.generator(1), **FAST) for one in (loaded, pipeline))
        assert same(*images)


@pytest.mark.slow
def test_a_showo_folder_with_its_parts_named_and_in_bf16(tmp_path):
    places = write_checkpoints(tmp_path)
    named = {"vq_model": places["magvitv2"], "clip": str(places["clip"]), "llm": PHI}
    how = {"dtype": "bf16", "attn_implementation": "eager"}
    loaded = ShowoPipeline.from_pretrained(places["showo_clip"], **named, **how)
    assert {loaded.dtype, loaded.vq_model.dtype, next(loaded.clip.parameters()).dtype} == {torch.bfloat16}
    assert loaded.answer(noise(0), "w1", max_new_tokens=4)[0][0]
    assert loaded.text_to_image("w1", **FAST)[0].size == (RESOLUTION, RESOLUTION)


def test_a_clip_model_needs_its_tower():
    with pytest.raises(ValueError, match="CLIPVisionTower"):
        ShowoPipeline(clip_showo(), tiny_vq(), prompting())
    with pytest.raises(ValueError, match="multiple of 8"):
        ShowoPipeline(tiny_showo(), tiny_vq(), prompting(), resolution=36)


def test_a_log_file_gets_a_line_a_minute_of_a_long_batch(pipeline, monkeypatch, capsys):
    given = {"timesteps": 2, "progress": True}
    pipeline.text_to_image("a", **given)
    assert not capsys.readouterr().err, "none in the first minute"
    monkeypatch.setattr("common.progress.LOG_INTERVAL", 0)
    pipeline.text_to_image("a", **given)
    assert "generating" in capsys.readouterr().err
    pipeline.text_to_image("a", timesteps=2)
    assert not capsys.readouterr().err
