"""What a user can get wrong: one clear line, exit code 2, and what was there stays as it was."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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
    for name, content in (
        ("0000.png", b"picture"),
        ("grid.png", b"grid"),
        ("results.jsonl", b'{"file": "0000.png"}\n'),
    ):
        (output_dir / name).write_bytes(content)
    before = {path: path.read_bytes() for path in output_dir.iterdir()}
    built = []
    monkeypatch.setattr(ShowoPipeline, "__init__", lambda self, *args, **kwargs: built.append(self))

    def run(*arguments: str, script=inference_t2i, config=True) -> str:
        given = [f"config={places['demo']}"] if config else []
        with pytest.raises(UserError) as error:
            script.main([*given, f"output_dir={output_dir}", *arguments])
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


# --- the configuration


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no config given", "config=configs/showo_demo.yaml"]),
        (["config=nowhere.yaml"], ["config=nowhere.yaml does not exist"]),
    ],
)
@pytest.mark.parametrize("script", [inference_t2i, inference_mmu])
def test_configs(refused, arguments, parts, script):
    message = refused(*arguments, *DOG, script=script, config=False)
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["guidence_scale=3"], ["unknown key guidence_scale", "guidance_scale"]),
        (["model.showo.codebook=3"], ["unknown key model.showo.codebook", "model.showo.codebook_size"]),
        (["generation_timesteps=many"], ["training.generation_timesteps", "'many'", "a whole number"]),
        (["offset=0.5"], ["offset", "a whole number"]),
        (["mode=paint"], ["mode is 'paint'", "t2i, inpainting, extrapolation"]),
        (["dtype=int8"], ["dtype is 'int8'", "fp32, bf16, fp16"]),
        (["device=tpu9"], ["device=tpu9", "give cpu"]),
        (["mask_schedule.schedule=sine"], ["mask_schedule", "'sine'", "cosine"]),
        (["dataset.preprocessing.resolution=40"], ["resolution=40", "num_vq_tokens=16", "32 pixels"]),
        (["model.showo.num_vq_tokens=15"], ["num_vq_tokens is 15", "square"]),
        (["model.showo.vocab_size=200"], ["model.showo: vocab_size is 200", "193"]),
        (["model.showo.num_new_special_tokens=3"], ["num_new_special_tokens is 3"]),
        (["model.showo.pretrained_model_path=null"], ["pretrained_model_path is not given"]),
    ],
)
def test_settings(refused, loads_nothing, arguments, parts):
    message = refused(*DOG, *arguments)
    assert all(part in message for part in parts), message


def test_no_mode(refused, loads_nothing):
    assert "mode is not given; add mode=t2i, mode=inpainting, mode=extrapolation" in refused("prompt=w1")


def test_a_published_resolution_is_checked_without_the_hub(refused, loads_nothing, repository):
    message = refused(f"config={repository}/configs/showo_demo.yaml", "dataset.preprocessing.resolution=512", *DOG)
    assert "resolution=512 does not match model.showo.num_vq_tokens=256" in message and "256 x 256 pixels" in message


# --- prompts, directions, questions


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


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_prompts_file(refused, loads_nothing, tmp_path, content):
    (tmp_path / "prompts.txt").write_text(content)
    message = refused("mode=t2i", f"validation_prompts_file={tmp_path}/prompts.txt")
    assert "prompts.txt is empty; write one prompt per line" in message


def test_prompts_files_that_cannot_be_read(refused, loads_nothing, places):
    assert "no.txt does not exist" in refused("mode=t2i", "validation_prompts_file=no.txt")
    assert "cannot be read as text" in refused("mode=t2i", f"validation_prompts_file={places['image']}")
    assert "cannot be read as text" in refused("mode=t2i", f"validation_prompts_file={places['pictures']}")


@pytest.mark.parametrize(
    ("directions", "prompt", "offset", "parts"),
    [
        ("left *** right", "w1", 0, ["2 directions", "1 prompts"]),
        ("left", "w1 *** w2", 0, ["1 directions", "2 prompts"]),
        ("left *** north", "w1 *** w2", 0, ["'north'", "left, right, up, down"]),
        ("left", "w1", 2, ["offset is 2", "from -1 to 1"]),
        ("left", "w1", -2, ["offset is -2", "from -1 to 1"]),
        ("", "w1", 0, ["extra_direction is not given"]),
        ("left", "", 0, ["prompt is not given"]),
    ],
)
def test_extrapolation(refused, loads_nothing, places, directions, prompt, offset, parts):
    given = [f"extra_direction={directions}", f"prompt={prompt}", f"offset={offset}", f"image_path={places['image']}"]
    message = refused("mode=extrapolation", *given)
    assert all(part in message for part in parts), message


def test_questions(refused, loads_nothing, places, tmp_path):
    root = f"mmu_image_root={places['pictures']}"
    assert "question is not given" in refused(root, script=inference_mmu)
    assert "question is not given" in refused(root, "question= *** ", script=inference_mmu)
    assert "mmu_image_root is not given" in refused("question=w1", script=inference_mmu)
    assert "no-folder does not exist" in refused("question=w1", "mmu_image_root=no-folder", script=inference_mmu)
    assert "top_p is 0" in refused("question=w1", root, "top_p=0", script=inference_mmu)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    message = refused("question=w1", f"mmu_image_root={tmp_path}/empty", script=inference_mmu)
    assert "no readable image" in message


@pytest.mark.slow
def test_an_output_dir_that_is_a_file(places, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is not a folder"):
            inference_t2i.main([f"config={places['demo']}", *DOG, f"output_dir={output_dir}"])
    assert (tmp_path / "file").read_text() == "mine"


# --- pictures


def enormous_png() -> bytes:
    """A few bytes that say they are 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(params=["missing", "folder", "text", "truncated", "enormous"])
def broken_picture(request, places, tmp_path) -> tuple[Path, str]:
    path = tmp_path / "broken.png"
    whole = places["image"].read_bytes()
    if request.param == "folder":
        path.mkdir()
    elif request.param != "missing":
        contents = {"text": b"no picture", "truncated": whole[: len(whole) // 2], "enormous": enormous_png()}
        path.write_bytes(contents[request.param])
    expected = {"missing": "does not exist", "folder": "is not a file", "enormous": "178,956,970 pixels"}
    return path, expected.get(request.param, "cannot be read")


@pytest.mark.parametrize("role", ["image_path", "inpainting_mask_path", "extrapolation"])
def test_pictures(refused, loads_nothing, places, broken_picture, role):
    path, expected = broken_picture
    good = {"image_path": places["image"], "inpainting_mask_path": places["mask"]}
    given = [f"{key}={value}" for key, value in (good | {role.replace("extrapolation", "image_path"): path}).items()]
    mode = ["mode=extrapolation", "extra_direction=left"] if role == "extrapolation" else ["mode=inpainting"]
    message = refused(*mode, "prompt=w1", *given)
    assert expected in message and "broken.png" in message


def test_the_one_picture_of_a_question(refused, loads_nothing, broken_picture):
    path, expected = broken_picture
    if not path.is_dir():  # a folder holds pictures here
        expected = expected if path.exists() else "broken.png does not exist"
        assert expected in refused("question=w1", f"mmu_image_root={path}", script=inference_mmu)


@pytest.mark.parametrize("role", ["image_path", "inpainting_mask_path"])
def test_pictures_not_given(refused, loads_nothing, places, role):
    good = {"image_path": places["image"], "inpainting_mask_path": places["mask"]}
    given = [f"{key}={value}" for key, value in good.items() if key != role]
    assert f"{role} is not given" in refused("mode=inpainting", "prompt=w1", *given)
    assert "prompt is not given" in refused("mode=inpainting", *given)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Image.new("L", (48, 40)), "no white region"),
        (Image.new("L", (40, 40), 255), "must have the same aspect ratio"),
        ("image", "colour image"),
    ],
    ids=["black", "shape", "photograph"],
)
def test_masks_of_a_wrong_kind(refused, loads_nothing, places, tmp_path, mask, expected):
    path = places["image"]
    if mask != "image":
        path = tmp_path / "mask.png"
        mask.save(path)
    given = ["prompt=w1", f"image_path={places['image']}", f"inpainting_mask_path={path}"]
    assert expected in refused("mode=inpainting", *given)


# --- checkpoints


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def pickle_to(content: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


PARTS = {
    "showo": ("model.showo.pretrained_model_path", showo_config, tiny_showo),
    "magvitv2": ("model.vq_model.vq_model_name", lambda: {"_class_name": "MAGVITv2"} | VQ_SIZES, tiny_vq),
}


@pytest.fixture(params=PARTS)
def part(request, tmp_path):
    """(setting, a fresh folder of that part, its state dict)."""
    key, config, model = PARTS[request.param]
    state_dict = model().state_dict()
    return key, write_published(tmp_path / request.param, config(), state_dict), state_dict


def test_checkpoint_folders_that_are_missing_or_empty(refused, part, tmp_path):
    key, folder, _ = part
    assert f"checkpoint folder '{tmp_path}/none' does not exist" in refused(*DOG, f"{key}={tmp_path}/none")
    (folder / "pytorch_model.bin").unlink()
    assert "holds no weights" in refused(*DOG, f"{key}={folder}")
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(*DOG, f"{key}={folder}")
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in refused(*DOG, f"{key}={folder}")


@pytest.mark.slow
def test_truncated_weights(refused, part):
    key, folder, state_dict = part
    weights = folder / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "truncated" in refused(*DOG, f"{key}={folder}") or "damaged" in refused(*DOG, f"{key}={folder}")
    weights.unlink()
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, folder / "pytorch_model.safetensors")
    whole = (folder / "pytorch_model.safetensors").read_bytes()
    (folder / "pytorch_model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(*DOG, f"{key}={folder}")


def test_a_shard_is_missing(refused, tmp_path):
    folder = write_published(tmp_path / "sharded", showo_config(), tiny_showo().state_dict(), "sharded")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    message = refused(*DOG, f"model.showo.pretrained_model_path={folder}")
    assert "pytorch_model-00002-of-00002.bin is missing" in message


def test_weights_that_lack_or_add_a_parameter(refused, part):
    key, folder, state_dict = part
    (folder / "pytorch_model.bin").unlink()
    first, *others = sorted(state_dict)
    tensors = {name: state_dict[name].contiguous() for name in others} | {"surplus.weight": state_dict[first].clone()}
    save_file(tensors, folder / "pytorch_model.safetensors")
    message = refused(*DOG, f"{key}={folder}")
    assert f"missing 1 ({first})" in message and "unexpected 1 (surplus.weight)" in message


@pytest.mark.parametrize("save", [torch.save, pickle_to], ids=["zip", "pickle"])
def test_a_malicious_pickle_is_never_run(refused, part, tmp_path, save):
    key, folder, state_dict = part
    marker = tmp_path / "was-run"
    save(dict(state_dict) | {"x": Malicious(marker)}, folder / "pytorch_model.bin")
    pickle.loads(pickle.dumps(Malicious(tmp_path / "proof"))).close()
    assert (tmp_path / "proof").exists()  # it would have worked
    assert "was not executed" in refused(*DOG, f"{key}={folder}")
    assert not marker.exists()


def test_malicious_weights_of_the_image_tokenizer_and_of_clip(refused, places, tmp_path):
    marker = tmp_path / "was-run"
    torch.save({"model": {"x": Malicious(marker)}}, tmp_path / "vq.ckpt")
    assert "not executed" in refused(*DOG, f"model.vq_model.pretrained_model_path={tmp_path}/vq.ckpt")
    clip = shutil.copytree(places["clip"], tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    torch.save({"x": Malicious(marker)}, clip / "pytorch_model.bin")
    message = refused(*DOG, f"config={places['demo_clip']}", f"model.clip_vit_name={clip}")
    assert "model.clip_vit_name" in message and not marker.exists()


def test_checkpoints_of_another_architecture(refused, loads_nothing, places):
    key = "model.showo.pretrained_model_path"
    assert "holds a 'MAGVITv2' checkpoint, expected 'Showo'" in refused(*DOG, f"{key}={places['magvitv2']}")
    assert "holds a 'phi' checkpoint, expected 'Showo'" in refused(*DOG, f"{key}={PHI}")
    message = refused(*DOG, f"model.vq_model.vq_model_name={places['showo']}")
    assert "holds a 'Showo' checkpoint, expected 'MAGVITv2'" in message
    message = refused(*DOG, f"config={places['demo_clip']}", f"model.clip_vit_name={PHI}")
    assert "holds a 'phi' model, expected a CLIP" in message
    message = refused(*DOG, f"{key}={places['showo_clip']}")
    assert "model.showo.w_clip_vit is False, but the checkpoint" in message


def test_checkpoints_of_other_sizes(refused, loads_nothing, places, tmp_path):
    sizes = ["model.showo.codebook_size=128", "model.showo.vocab_size=257"]
    assert "model.showo.vocab_size is 257, but the checkpoint" in refused(*DOG, *sizes)
    few = write_published(tmp_path / "few", {"_class_name": "MAGVITv2"} | VQ_SIZES | {"code_bits": 4}, {})
    assert "has 16 codes, but model.showo.codebook_size is 64" in refused(*DOG, f"model.vq_model.vq_model_name={few}")
    fine = {"_class_name": "MAGVITv2"} | VQ_SIZES | {"stem_patch_size": 2}
    write_published(tmp_path / "fine", fine, {})
    message = refused(*DOG, f"model.vq_model.vq_model_name={tmp_path}/fine")
    assert "resolution=32 does not match" in message and "16 x 16 pixels" in message


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
    """Such a tokenizer can paint, but what it reads would lie outside the vocabulary."""
    many = write_published(
        tmp_path / "many",
        {"_class_name": "MAGVITv2"} | VQ_SIZES | {"code_bits": 13},
        _wider(tiny_vq().state_dict()),
    )
    given = [f"config={places['demo']}", f"output_dir={tmp_path}/out", f"model.vq_model.vq_model_name={many}"]
    inference_t2i.main([*given, *DOG])
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    with pytest.raises(UserError, match="the model has only 64 codes"):
        inference_mmu.main([*given, "question=w1", f"mmu_image_root={places['pictures']}"])
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def _wider(state_dict: dict) -> dict:
    from models import MAGVITv2, MAGVITv2Config
    from tests.parity.goldens import fill_

    return fill_(MAGVITv2(MAGVITv2Config(**VQ_SIZES | {"code_bits": 13}))).state_dict()


# --- as commands


def command(arguments: list[str], folder: Path, repository: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("script", ["inference_t2i.py", "inference_mmu.py"])
def test_exit_code_and_one_line_from_another_folder(tmp_path, repository, script):
    arguments = ["config=configs/showo_demo.yaml", "generation_timestep=4"]
    done = command([str(repository / script), *arguments], tmp_path, repository)
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


def test_the_fixtures_are_not_mistakes_themselves(places):
    """The folders that the cases above damage load when they are whole."""
    assert load_file(places["clip"] / "model.safetensors")
    assert ShowoPipeline.from_pretrained(places["showo"], vq_model=places["magvitv2"], llm=PHI)
