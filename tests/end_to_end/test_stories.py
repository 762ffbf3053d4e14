"""From a JSON of stories, as Show-o2 keeps VIST, through a training to the sheet of a new story (docs/mixed.md)."""

import json
from itertools import islice, product

import pytest
from PIL import Image

import inference_mixed
from tests.training import tiny
from tests.training.tiny import CAPTIONS, picture


@pytest.mark.slow
def test_stories_are_learned_and_told(tmp_path):
    world, out, told = tiny.write_world(tmp_path / "world"), tmp_path / "out", tmp_path / "told"
    images = tmp_path / "vist" / "images"
    images.mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(len(CAPTIONS))]
    for name, caption in zip(names, CAPTIONS, strict=True):
        picture(caption).save(images / name)
    pairs = islice(product(range(len(CAPTIONS)), range(len(CAPTIONS)), (1, 2)), 200)
    steps = [[first, (first + step) % len(CAPTIONS), last] for first, last, step in pairs]
    stories = [{"images": [names[n] for n in numbers], "captions": [CAPTIONS[n] for n in numbers]} for numbers in steps]
    (tmp_path / "vist" / "stories.json").write_text(json.dumps(stories))
    assert len(stories) == 200
    given = {
        "dataset.params.train_mixed_shards_path_or_url": tmp_path / "vist/stories.json",
        "dataset.params.train_mixed_image_root": images,
        "training.batch_size_mixed": 4,
        "training.max_train_steps": 6,
        "experiment.save_every": 6,
    }
    tiny.train(world, out, given)
    losses = [line["step_loss_mixed"] + line["step_loss_mixed_text"] for line in tiny.steps_of(out)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    arguments = [f"config={out / 'config.yaml'}", f"model.showo.pretrained_model_path={out}", f"output_dir={told}"]
    arguments += ["mode=story", "num_images=3", f"prompt={CAPTIONS[0]}", "max_new_tokens=8", "seed=1"]
    inference_mixed.main(arguments)
    (line,) = [json.loads(line) for line in (told / "results.jsonl").read_text().splitlines()]
    assert [*line["segments"][0].values()] == [CAPTIONS[0], False]
    assert ["text" in segment for segment in line["segments"]] == [True, False] * 3
    assert line["files"] == ["0000.png", "0001.png", "0002.png"]
    sheet = Image.open(told / "grid.png")
    assert sheet.width == 8 + 6 * (128 + 8) and sheet.height < 2 * 128
