"""`inference_t2i.py` from published-format folders to images, lines, grid and wandb."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import inference_t2i
from common.errors import UserError
from models import MAGVITv2, ShowoPipeline
from tests.parity.goldens import PHI, facts, prompting, tensors, tiny_showo
from tests.tiny import RESOLUTION, tiny_vq


def run(places, output_dir: Path, *arguments: str) -> list[dict]:
    """The lines of the results of one run."""
    inference_t2i.main([f"config={places['demo']}", f"output_dir={output_dir}", "seed=42", *arguments])
    return [json.loads(line) for line in (output_dir / "results.jsonl").read_text().splitlines()]


def images_in(folder: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(folder.glob("[0-9]*.png"))]


def inpainting(places, *more: str) -> list[str]:
    given = ["mode=inpainting", "prompt=w1 w2", f"image_path={places['image']}"]
    return [*given, f"inpainting_mask_path={places['mask']}", *more]


def extrapolation(places, directions: str, prompt: str, *more: str) -> list[str]:
    given = ["mode=extrapolation", f"extra_direction={directions}", f"prompt={prompt}"]
    return [*given, f"image_path={places['image']}", *more]


def test_the_published_images_from_a_prompts_file(places, tmp_path):
    """Also an empty prompt between others, as the published script reads it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(facts()["t2i_texts"]))
    settings = facts()["generate"][1]
    given = [f"{key}={settings[key]}" for key in ("seed", "guidance_scale")]
    given += [f"generation_{key}={settings[key]}" for key in ("timesteps", "temperature")]
    lines = run(places, tmp_path / "out", "mode=t2i", "batch_size=3", f"validation_prompts_file={prompts}", *given)
    pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    expected = pipeline.decode(tensors()["generate.1.tokens"])
    assert images_in(tmp_path / "out") == [picture.tobytes() for picture in expected]
    assert lines == [
        {"file": f"{number:04d}.png", "mode": "t2i", "prompt": prompt, "seed": settings["seed"]}
        for number, prompt in enumerate(facts()["t2i_texts"])
    ]


@pytest.mark.slow
def test_a_seed_fixes_every_image_that_starts_from_another(places, tmp_path):
    for arguments in (inpainting(places), extrapolation(places, "left *** down", "w1 *** w2")):
        made = []
        for seed in (42, 42, 43):
            run(places, tmp_path, *arguments, f"seed={seed}", "overwrite=true")
            made.append(images_in(tmp_path))
        assert made[0] == made[1] != made[2]


def test_batches_and_repeats_are_generated_in_order_from_one_generator(places, tmp_path):
    repeated = ["mode=t2i", "prompt=w1 *** w2 *** w3", "batch_size=4", "num_images_per_prompt=2"]
    lines = run(places, tmp_path / "out", *repeated)
    assert [line["prompt"] for line in lines] == ["w1", "w1", "w2", "w2", "w3", "w3"]
    pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    settings = {"guidance_scale": 2.0, "timesteps": 3, "generator": pipeline.generator(42)}
    expected = [*pipeline.text_to_image(["w1", "w1", "w2", "w2"], **settings)]
    expected += pipeline.text_to_image(["w3", "w3"], **settings)
    assert images_in(tmp_path / "out") == [picture.tobytes() for picture in expected]


@pytest.mark.slow
def test_inpainting_repeats_its_prompt_batch_size_times(places, tmp_path):
    lines = run(places, tmp_path / "out", *inpainting(places, "batch_size=2"))
    assert [line["prompt"] for line in lines] == ["w1 w2"] * 2 and {line["mode"] for line in lines} == {"inpainting"}
    first, second = images_in(tmp_path / "out")
    assert first != second
    lines = run(places, tmp_path / "more", *inpainting(places, "batch_size=2", "num_images_per_prompt=3"))
    assert len(lines) == 3


@pytest.mark.parametrize("mode", [inpainting, lambda places, *more: extrapolation(places, "up", "w1", *more)])
def test_the_image_is_encoded_once_and_each_batch_is_on_the_disk_when_it_is_done(places, tmp_path, monkeypatch, mode):
    encoded, batches, get_code, generate = [], [], MAGVITv2.get_code, ShowoPipeline.generate_codes

    def counted(self, pixels):
        encoded.append(len(pixels))
        return get_code(self, pixels)

    def interrupted(self, prompts, *given, **settings):
        batches.append(len(prompts))
        assert len(images_in(tmp_path)) == 2 * (len(batches) - 1)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generate(self, prompts, *given, **settings)

    monkeypatch.setattr(MAGVITv2, "get_code", counted)
    monkeypatch.setattr(ShowoPipeline, "generate_codes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(places, tmp_path, *mode(places, "batch_size=2", "num_images_per_prompt=5"))
    assert encoded == [1] and batches == [2, 2, 1]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def test_extrapolation_with_a_prompt_for_each_direction(places, tmp_path):
    prompt, offset = "w0 *** w1 *** w2 *** w3 *** w4", ["offset=-1", "batch_size=1"]
    lines = run(places, tmp_path, *extrapolation(places, "down *** right *** up *** left *** left", prompt, *offset))
    assert [line["prompt"] for line in lines] == [prompt]
    assert Image.open(tmp_path / "0000.png").size == (
        7 * RESOLUTION // 4,
        6 * RESOLUTION // 4,
    )  # each step adds a row or column of tokens


def test_a_later_run_adds_its_images_or_replaces_the_earlier_ones(places, tmp_path, capsys):
    run(places, tmp_path, "mode=t2i", "prompt=w1 *** w2")
    earlier = images_in(tmp_path)
    assert "earlier" not in capsys.readouterr().out
    lines = run(places, tmp_path, "mode=t2i", "prompt=w4")
    assert [line["file"] for line in lines] == ["0000.png", "0001.png", "0002.png"]
    assert images_in(tmp_path)[:2] == earlier and (tmp_path / "grid-0002.png").is_file()
    said = capsys.readouterr().out
    assert f"{tmp_path} holds 2 images of earlier runs, which stay; overwrite=true replaces them" in said
    assert f"images written to {tmp_path}: 1; overview: {tmp_path}/grid-0002.png" in said
    lines = run(places, tmp_path, "mode=t2i", "prompt=w4", "overwrite=true")
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert names == ["0000.png", "grid.png", "results.jsonl"] and len(lines) == 1
    assert f"{tmp_path} holds 3 images of earlier runs, which are replaced" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_seed_of_its_own_makes_an_image_again(places, tmp_path, batch_size):
    """Alone or beside others, with or without the option."""
    each = ["mode=t2i", "seed_per_image=true", f"batch_size={batch_size}", "generation_timesteps=6"]
    lines = run(places, tmp_path / "many", *each, "prompt=w1 w2 w3 *** w2 *** w3", "num_images_per_prompt=2")
    assert [line["seed"] for line in lines] == list(range(42, 48))
    many = images_in(tmp_path / "many")
    assert len(set(many)) == 6
    again = ["mode=t2i", "prompt=w2", f"seed={lines[3]['seed']}", "generation_timesteps=6"]
    for number, more in enumerate((["batch_size=1"], ["batch_size=1", "seed_per_image=true"])):
        run(places, tmp_path / str(number), *again, *more)
        assert images_in(tmp_path / str(number)) == many[3:4]


@pytest.mark.slow
def test_seeds_of_their_own_in_the_other_modes(places, tmp_path):
    for name, arguments in {"inpaint": inpainting(places), "extend": extrapolation(places, "up", "w1")}.items():
        lines = run(places, tmp_path / name, *arguments, "batch_size=3", "seed_per_image=true")
        run(places, tmp_path / f"{name} again", *arguments, "batch_size=1", f"seed={lines[2]['seed']}")
        assert images_in(tmp_path / f"{name} again") == images_in(tmp_path / name)[2:]


def test_prompts_that_are_cut_are_counted(places, tmp_path, capsys):
    long = "w1 " * 40
    run(places, tmp_path, "mode=t2i", f"prompt={long} *** w2 *** {long}w3", "dataset.preprocessing.max_seq_length=12")
    said = capsys.readouterr().out
    assert "prompts cut to dataset.preprocessing.max_seq_length=12 tokens: 2; the first is 'w1 w1" in said


def test_rotations_are_told_or_applied(places, tmp_path, capsys):
    """An upright mask fits a phone's photo only once it is turned; the error says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(places["image"]).save(tmp_path / "photo.jpg", exif=exif)
    Image.open(places["mask"]).rotate(-90, expand=True).save(tmp_path / "mask.png")
    given = inpainting(places, f"image_path={tmp_path}/photo.jpg")
    upright = [*given, f"inpainting_mask_path={tmp_path}/mask.png"]
    with pytest.raises(UserError, match=r"image carries an EXIF rotation.*image\.exif=apply turns it"):
        run(places, tmp_path / "out", *upright)
    assert "1 image carries a rotation (EXIF), ignored; image.exif=apply turns it" in capsys.readouterr().out
    run(places, tmp_path / "out", *upright, "image.exif=apply")
    assert "EXIF" not in capsys.readouterr().out


def test_without_output_dir_each_mode_has_its_folder(places, tmp_path):
    arguments = [f"config={places['demo']}", f"experiment.output_dir={tmp_path}", "prompt=w1", "mode=t2i"]
    inference_t2i.main(arguments)
    assert (tmp_path / "t2i" / "0000.png").is_file()


@pytest.mark.slow
def test_settings_reach_the_model(places, tmp_path):
    weights = {key: value * 0.5 for key, value in tiny_vq().state_dict().items() if value.is_floating_point()}
    torch.save({"model": tiny_vq().state_dict() | weights}, tmp_path / "vq.ckpt")
    run(places, tmp_path / "base", "mode=t2i", "prompt=w1")
    for number, setting in enumerate(
        (
            "guidance_scale=0",
            "guidance_scale=7",
            "generation_timesteps=6",
            "generation_temperature=4",
            "mask_schedule.schedule=pow4",
            f"model.vq_model.pretrained_model_path={tmp_path}/vq.ckpt",
        )
    ):
        run(places, tmp_path / str(number), "mode=t2i", "prompt=w1", setting)
        assert images_in(tmp_path / str(number)) != images_in(tmp_path / "base"), setting
    run(places, tmp_path / "eager", "mode=t2i", "prompt=w1", "attn_implementation=eager", "dtype=fp32", "device=cpu")
    assert images_in(tmp_path / "eager") == images_in(tmp_path / "base")


@pytest.mark.slow
def test_wandb_holds_the_published_panel(places, tmp_path):
    run(places, tmp_path, *inpainting(places), "wandb.mode=offline")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    media = list((folder / "files/media/images").glob("generated_images_0_*.png"))
    assert len(media) == 4  # original image, inpainting mask, two new images
    (record,) = folder.glob("run-*.wandb")
    for text in ("generated_images", "original image", "inpainting mask", "w1 w2", "tiny_t2i_inpainting"):
        assert text.encode() in record.read_bytes()
    made = images_in(tmp_path)
    assert sum(Image.open(path).tobytes() in made for path in media) == 2


def test_wandb_can_be_disabled_by_its_older_word(places, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    run(places, tmp_path, "mode=t2i", "prompt=w1")
    assert not (tmp_path / "wandb").exists()


@pytest.mark.slow
def test_from_another_folder(places, tmp_path, repository):
    """As a command, with paths relative to where the user stands."""
    (tmp_path / "phi").symlink_to(PHI, target_is_directory=True)
    (tmp_path / "mine.txt").write_text("w1\n")
    config = os.path.relpath(places["demo"], tmp_path)
    command = [sys.executable, str(repository / "inference_t2i.py"), f"config={config}"]
    command += ["mode=t2i", "validation_prompts_file=mine.txt", "output_dir=out", "model.showo.llm_model_path=phi"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/0000.png").is_file() and (tmp_path / "out/grid.png").is_file()
    assert "0000.png  w1" in done.stdout and "Traceback" not in done.stderr
