"""What a user can get wrong: one clear line, exit code 2, and what was there stays as it was.

Single refusals are tested where they are decided; here are those of the scripts, and that every part is checked.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import inference_mmu
import inference_t2i
from common.errors import UserError
from models import ShowoPipeline
from tests.parity.goldens import PHI, tiny_showo
from tests.tiny import VQ_SIZES, showo_config, tiny_vq, write_published

DOG = ["mode=t2i", "prompt=w1"]


@pytest.fixture
def refused(places, tmp_path, monkeypatch):
    """Runs a script that must refuse; returns its one line. An earlier run's results must survive."""
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    for name in ("0000.png", "grid.png", "results.jsonl"):
        (output_dir / name).write_text(name)
    before = {path: path.read_bytes() for path in output_dir.iterdir()}
    built = []
    monkeypatch.setattr(ShowoPipeline, "__init__", lambda self, *args, **kwargs: built.append(self))

    def run(*arguments: object, script=inference_t2i, config=True) -> str:
        given = [f"config={places['demo']}"] if config else []
        with pytest.raises(UserError) as error:
            script.main([*given, f"output_dir={output_dir}", *map(str, arguments)])
        assert {path: path.read_bytes() for path in output_dir.iterdir()} == before
        assert not built
        message = str(error.value)
        assert message and "\n" not in message and len(message) < 700
        return message

    return run


@pytest.fixture
def loads_nothing(monkeypatch):
    """What is cheap to see is seen before any weights are read."""

    def load(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("models.checkpoint_io.load_state_dict_folder", load)


# --- settings, prompts, directions, questions


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["prompt=w1"], ["mode is not given; add mode=t2i, mode=inpainting, mode=extrapolation"]),
        ([*DOG, "offset=0.5"], ["offset", "a whole number"]),
        ([*DOG, "device=tpu9"], ["device=tpu9", "give cpu"]),
        ([*DOG, "mask_schedule.schedule=sine"], ["mask_schedule", "'sine'", "cosine"]),
        ([*DOG, "dataset.preprocessing.resolution=40"], ["resolution=40", "num_vq_tokens=16", "32 pixels"]),
        ([*DOG, "model.showo.num_vq_tokens=15"], ["num_vq_tokens is 15", "square"]),
        ([*DOG, "model.showo.vocab_size=200"], ["model.showo: vocab_size is 200", "193"]),
        ([*DOG, "model.showo.num_new_special_tokens=3"], ["num_new_special_tokens is 3"]),
        ([*DOG, "model.showo.pretrained_model_path=null"], ["pretrained_model_path is not given"]),
        (
            [*DOG, "config=configs/showo_demo.yaml", "dataset.preprocessing.resolution=512"],
            ["resolution=512 does not match model.showo.num_vq_tokens=256", "256 x 256 pixels"],  # without the hub
        ),
    ],
)
def test_settings(refused, loads_nothing, arguments, parts):
    message = refused(*arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("text", ["a <|soi|> cat", "[PAD] a cat"])
def test_tokens_that_rows_are_made_of(refused, loads_nothing, places, tmp_path, text):
    token = next(word for word in text.split() if not word.isalpha())
    (tmp_path / "prompts.txt").write_text(f"a dog\n{text}\n")
    image = f"image_path={places['image']}"
    for script, given in (
        (inference_t2i, ("mode=t2i", f"validation_prompts_file={tmp_path}/prompts.txt")),
        (inference_t2i, ("mode=inpainting", f"prompt={text}", image, f"inpainting_mask_path={places['mask']}")),
        (inference_t2i, ("mode=extrapolation", "extra_direction=left", f"prompt={text}", image)),
        (inference_mmu, (f"mmu_image_root={places['pictures']}", f"question={text}")),
    ):
        assert f"contains the special token {token}" in refused(*given, script=script)


@pytest.mark.parametrize(
    ("directions", "prompt", "offset", "parts"),
    [
        ("left *** right", "w1", 0, ["2 directions", "1 prompts"]),
        ("left *** north", "w1 *** w2", 0, ["'north'", "left, right, up, down"]),
        ("left", "w1", 2, ["offset is 2", "from -1 to 1"]),
        ("", "w1", 0, ["extra_direction is not given"]),
        ("left", "", 0, ["prompt is not given"]),
    ],
)
def test_extrapolation(refused, loads_nothing, places, directions, prompt, offset, parts):
    given = [f"extra_direction={directions}", f"prompt={prompt}", f"offset={offset}", f"image_path={places['image']}"]
    message = refused("mode=extrapolation", *given)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["mmu_image_root={pictures}"], "question is not given"),
        (["mmu_image_root={pictures}", "question= *** "], "question is not given"),
        (["question=w1"], "mmu_image_root is not given"),
        (["question=w1", "mmu_image_root=no-folder"], "no-folder does not exist"),
        (["question=w1", "mmu_image_root={empty}"], "no readable image"),
    ],
)
def test_questions(refused, loads_nothing, places, tmp_path, arguments, part):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no image")
    given = [argument.format(empty=tmp_path / "empty", **places) for argument in arguments]
    assert part in refused(*given, script=inference_mmu)


@pytest.mark.slow
def test_an_output_dir_that_is_a_file(places, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is not a folder"):
            inference_t2i.main([f"config={places['demo']}", *DOG, f"output_dir={output_dir}"])
    assert (tmp_path / "file").read_text() == "mine"


# --- images


@pytest.mark.parametrize("role", ["image_path", "inpainting_mask_path", "extrapolation", "question"])
def test_images_that_are_missing_or_damaged(refused, loads_nothing, places, tmp_path, role):
    path = tmp_path / "broken.png"
    images = {"image_path": places["image"], "inpainting_mask_path": places["mask"]}
    arguments = {
        "extrapolation": ["mode=extrapolation", "extra_direction=left", "prompt=w1", f"image_path={path}"],
        "question": ["question=w1", f"mmu_image_root={path}"],
    }.get(role, ["mode=inpainting", "prompt=w1", *(f"{key}={value}" for key, value in (images | {role: path}).items())])
    script = inference_mmu if role == "question" else inference_t2i
    assert "broken.png does not exist" in refused(*arguments, script=script)
    path.write_bytes(places["image"].read_bytes()[:100])
    message = refused(*arguments, script=script)
    assert "cannot be read" in message and "broken.png" in message


@pytest.mark.parametrize("key", ["image_path", "inpainting_mask_path", "prompt"])
def test_inpainting_needs_all_of(refused, loads_nothing, places, key):
    given = {"prompt": "w1", "image_path": places["image"], "inpainting_mask_path": places["mask"]}
    assert f"{key} is not given" in refused("mode=inpainting", *(f"{k}={v}" for k, v in given.items() if k != key))


def test_a_mask_without_white_is_seen_before_the_model_is_loaded(refused, loads_nothing, places, tmp_path):
    Image.new("L", (48, 40)).save(tmp_path / "mask.png")
    given = ["prompt=w1", f"image_path={places['image']}", f"inpainting_mask_path={tmp_path}/mask.png"]
    assert "no white region" in refused("mode=inpainting", *given)


# --- checkpoints; what can be wrong with their files is in tests/models/test_checkpoint_io.py


PARTS = {
    "showo": ("model.showo.pretrained_model_path", showo_config, tiny_showo),
    "magvitv2": ("model.vq_model.vq_model_name", lambda: {"_class_name": "MAGVITv2"} | VQ_SIZES, tiny_vq),
}


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_checked_before_it_is_used(refused, tmp_path, part):
    key, config, model = PARTS[part]
    assert f"checkpoint folder '{tmp_path}/none' does not exist" in refused(*DOG, f"{key}={tmp_path}/none")
    folder = write_published(tmp_path / part, config(), model().state_dict())
    weights, whole = folder / "pytorch_model.bin", (folder / "pytorch_model.bin").read_bytes()
    weights.write_bytes(whole[:5000])
    assert "truncated" in (message := refused(*DOG, f"{key}={folder}")) or "damaged" in message
    torch.save({"x": Malicious(tmp_path / "was-run")}, weights)
    assert "was not executed" in refused(*DOG, f"{key}={folder}")
    weights.unlink()
    assert "holds no weights" in refused(*DOG, f"{key}={folder}")
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(*DOG, f"{key}={folder}")
    assert not (tmp_path / "was-run").exists()


def test_malicious_weights_of_the_image_tokenizer_and_of_clip(refused, places, tmp_path):
    marker = tmp_path / "was-run"
    pickle.loads(pickle.dumps(Malicious(tmp_path / "proof"))).close()
    assert (tmp_path / "proof").exists(), "it would have worked"
    torch.save({"model": {"x": Malicious(marker)}}, tmp_path / "vq.ckpt")
    assert "not executed" in refused(*DOG, f"model.vq_model.pretrained_model_path={tmp_path}/vq.ckpt")
    clip = shutil.copytree(places["clip"], tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    torch.save({"x": Malicious(marker)}, clip / "pytorch_model.bin")
    message = refused(*DOG, f"config={places['demo_clip']}", f"model.clip_vit_name={clip}")
    assert "model.clip_vit_name" in message and not marker.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{showo_key}={magvitv2}"], ["holds a 'MAGVITv2' checkpoint, expected 'Showo'"]),
        (["{showo_key}={phi}"], ["holds a 'phi' checkpoint, expected 'Showo'"]),
        (["{vq_key}={showo}"], ["holds a 'Showo' checkpoint, expected 'MAGVITv2'"]),
        (["config={demo_clip}", "model.clip_vit_name={phi}"], ["holds a 'phi' model, expected a CLIP"]),
        (["{showo_key}={showo_clip}"], ["model.showo.w_clip_vit is False, but the checkpoint"]),
        (
            ["model.showo.codebook_size=128", "model.showo.vocab_size=257"],
            ["model.showo.vocab_size is 257, but the checkpoint"],
        ),
        (["{vq_key}={few}"], ["has 16 codes, but model.showo.codebook_size is 64"]),
        (["{vq_key}={fine}"], ["resolution=32 does not match", "16 x 16 pixels"]),
    ],
)
def test_checkpoints_of_another_kind_or_size(refused, loads_nothing, places, tmp_path, arguments, parts):
    sizes = {"few": {"code_bits": 4}, "fine": {"stem_patch_size": 2}}
    found = places | {"showo_key": PARTS["showo"][0], "vq_key": PARTS["magvitv2"][0], "phi": PHI}
    for name, changed in sizes.items():
        found[name] = write_published(tmp_path / name, {"_class_name": "MAGVITv2"} | VQ_SIZES | changed, {})
    message = refused(*DOG, *(argument.format(**found) for argument in arguments))
    assert all(part in message for part in parts), message


def test_a_tokenizer_with_another_vocabulary(refused, loads_nothing, tmp_path):
    folder = shutil.copytree(PHI, tmp_path / "llm")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["w-new"] = max(content["model"]["vocab"].values()) + 1
    for token in content["added_tokens"]:
        token["id"] += token["id"] >= content["model"]["vocab"]["w-new"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    message = refused(*DOG, f"model.showo.llm_model_path={folder}")
    assert "has 119 tokens, but model.showo.llm_vocab_size is 118" in message
    (folder / "tokenizer.json").write_text("{")
    assert "copy its tokenizer files again" in refused(*DOG, f"model.showo.llm_model_path={folder}")


@pytest.mark.slow
def test_more_codes_than_the_model_knows(places, tmp_path):
    """Such a tokenizer can decode, but the codes that it makes of images would lie outside the vocabulary."""
    from models import MAGVITv2, MAGVITv2Config
    from tests.parity.goldens import fill_

    sizes = VQ_SIZES | {"code_bits": 13}
    weights = fill_(MAGVITv2(MAGVITv2Config(**sizes))).state_dict()
    many = write_published(tmp_path / "many", {"_class_name": "MAGVITv2"} | sizes, weights)
    given = [f"config={places['demo']}", f"output_dir={tmp_path}/out", f"model.vq_model.vq_model_name={many}"]
    inference_t2i.main([*given, *DOG])
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    with pytest.raises(UserError, match="the model has only 64 codes"):
        inference_mmu.main([*given, "question=w1", f"mmu_image_root={places['pictures']}"])
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


# --- as commands


@pytest.mark.parametrize("script", ["inference_t2i.py", "inference_mmu.py"])
def test_exit_code_and_one_line_from_another_folder(tmp_path, repository, script):
    command = [sys.executable, str(repository / script), "config=configs/showo_demo.yaml", "generation_timestep=4"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert "nearest known key is generation_timesteps" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_hub_name_without_network(tmp_path, repository, places):
    """Says how to use folders instead, for each of the parts."""
    nobody_there = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    script = (
        "import sys, os; sys.path.insert(0, os.environ['REPOSITORY'])\n"
        "from common.errors import UserError\n"
        "import inference_t2i\n"
        "for key in ('model.showo.pretrained_model_path=showlab/show-o', 'model.vq_model.vq_model_name=a/vq',\n"
        "            'model.showo.llm_model_path=microsoft/phi-1_5', 'model.clip_vit_name=openai/clip'):\n"
        "    try: inference_t2i.main([*sys.argv[1:], key])\n"
        "    except UserError as error: print('error:', error)\n"
    )
    environment = os.environ | nobody_there | {"REPOSITORY": str(repository)}
    arguments = [f"config={places['demo_clip']}", *DOG, f"output_dir={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and done.stderr == "", done.stdout + done.stderr
    for line, name in zip(lines, ("showlab/show-o", "a/vq", "microsoft/phi-1_5", "openai/clip"), strict=True):
        assert name in line and "folder" in line and "could not be fetched from the hub" in line
    assert not (tmp_path / "out").exists()
