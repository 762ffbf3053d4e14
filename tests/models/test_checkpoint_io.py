"""Checkpoint folders of every published form, and every way in which one can be wrong (spec §12)."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from models import Showo
from models.checkpoint_io import (
    CHECKPOINT_FILES,
    INDEX_NAMES,
    WEIGHT_NAMES,
    load_weights_file,
    resize_rows,
    resolve_folder,
)
from tests.parity.goldens import PHI, fill_, tiny_config
from tests.tiny import showo_config

NUM_SHARDS = 3


@pytest.fixture(scope="module")
def state_dict():
    return fill_(Showo(tiny_config())).state_dict()


def write_config(folder: Path, **changes) -> Path:
    content = {
        key: value for key, value in (showo_config(llm_model_path=str(PHI)) | changes).items() if value is not None
    }
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def write_shards(folder: Path, state_dict: dict, index_name: str) -> dict:
    """Shards named as published; returns the index."""
    kind = "safetensors" if "safetensors" in index_name else "bin"
    names = [f"pytorch_model-{i:05d}-of-{NUM_SHARDS:05d}.{kind}" for i in range(1, NUM_SHARDS + 1)]
    weight_map = {key: names[i % NUM_SHARDS] for i, key in enumerate(state_dict)}
    for name in names:
        shard = {key: tensor.clone() for key, tensor in state_dict.items() if weight_map[key] == name}
        save_file(shard, folder / name) if kind == "safetensors" else torch.save(shard, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / index_name).write_text(json.dumps(index))
    return index


def write_bin(folder: Path, state_dict: dict, name: str = "pytorch_model.bin") -> Path:
    torch.save(state_dict, folder / name)
    return folder


def equal(model: torch.nn.Module, state_dict: dict) -> bool:
    ours = model.state_dict()
    return ours.keys() == state_dict.keys() and all(torch.equal(ours[key], state_dict[key]) for key in ours)


def refused(folder: Path, message: str, **settings) -> None:
    with pytest.raises(UserError, match=message):
        Showo.from_pretrained(folder, **settings)


# ---- published forms ----


@pytest.mark.parametrize("name", [*WEIGHT_NAMES, *INDEX_NAMES])
def test_every_published_name(name, state_dict, tmp_path):
    write_config(tmp_path)
    if name in INDEX_NAMES:
        write_shards(tmp_path, state_dict, name)
    else:
        (save_file if name.endswith("safetensors") else torch.save)(state_dict, tmp_path / name)
    model = Showo.from_pretrained(str(tmp_path))
    assert equal(model, state_dict) and not model.training
    assert (model.config.llm_model_path, model.config.mask_token_id) == (str(PHI), 192)


@pytest.mark.slow
def test_own_shards(state_dict, tmp_path):
    model = Showo.from_pretrained(write_bin(write_config(tmp_path), state_dict))
    model.save_pretrained(tmp_path / "own", max_shard_size="100KB")
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    assert equal(Showo.from_pretrained(tmp_path / "own"), state_dict)


def test_the_key_model_is_unwrapped_and_rotary_buffers_are_passed_over(state_dict, tmp_path):
    old = {f"showo.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    write_bin(write_config(tmp_path), {"model": state_dict | old, "epoch": 3})
    assert equal(Showo.from_pretrained(tmp_path), state_dict)


# ---- keys that do not fit ----


def test_wrong_keys_are_listed_by_name(state_dict, tmp_path):
    broken = {key: tensor for key, tensor in state_dict.items() if "layers.1" not in key}
    broken["showo.model.extra"] = torch.zeros(2)
    broken["showo.model.final_layernorm.weight"] = torch.zeros(63)
    broken["showo.lm_head.weight"] = state_dict["showo.lm_head.weight"][:150]  # not taken for another vocabulary
    write_bin(write_config(tmp_path), broken)
    with pytest.raises(UserError) as error:
        Showo.from_pretrained(tmp_path)
    missing, unexpected, misshaped = str(error.value).split("; ")
    assert re.search(r"missing \d+ \(showo.model.layers.1.input_layernorm.bias, .*weight and \d+ more\)", missing)
    assert unexpected == "unexpected 1 (showo.model.extra)"
    assert misshaped == (
        "mis-shaped 2 (showo.lm_head.weight [150, 64] instead of [193, 64], "
        "showo.model.final_layernorm.weight [63] instead of [64])"
    )


def test_only_the_projector_may_be_missing(state_dict, tmp_path, transformers_log):
    write_bin(write_config(tmp_path, w_clip_vit=True), state_dict)
    refused(tmp_path, r"missing 4 \(mm_projector.0.bias")
    model = Showo.from_pretrained(tmp_path, allow_missing=("mm_projector.",))
    assert "MISSING" not in transformers_log.text  # no table for what was asked for
    ours = model.state_dict()
    assert all(torch.equal(ours[key], state_dict[key]) for key in state_dict)
    projector = model.mm_projector[0].weight
    assert projector.isfinite().all() and projector.std() > 0 and projector.device.type == "cpu"
    write_bin(tmp_path, {key: tensor for key, tensor in state_dict.items() if "layers.2" not in key})
    refused(tmp_path, r"missing \d+ \(showo.model.layers.2", allow_missing=("mm_projector.",))


# ---- files that are damaged or dangerous ----


class Malicious:
    """A pickle that makes a file when it is executed."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_malicious_pickle_is_never_executed(form, protocol, state_dict, tmp_path):
    trace, file = tmp_path / "executed", write_config(tmp_path) / "pytorch_model.bin"
    content = {"showo.lm_head.bias": Malicious(trace)}
    if form == "plain":
        file.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        zipped = {"_use_new_zipfile_serialization": form == "zip"}
        torch.save(state_dict | content, file, pickle_protocol=max(2, protocol), **zipped)
    refused(tmp_path, "pytorch_model.bin")
    assert not trace.exists()
    with open(file, "rb") as handle:  # the file is a real attack: unsafe loading runs it
        torch.load(handle, weights_only=False) if form != "plain" else pickle.load(handle)
    assert trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"a": "text"}}])
def test_only_a_dictionary_of_tensors_is_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "weights.bin")
    with pytest.raises(UserError, match="weights.bin is not a state dict"):
        load_weights_file(tmp_path / "weights.bin")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_wherever_a_file_is_cut_the_error_is_one_line(kind, tmp_path):
    tensors, file = {f"k{i}": torch.randn(3, 4) for i in range(3)}, tmp_path / f"w.{kind}"
    if kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "zip")
    content = file.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 150)):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"^.*{file}.*$"):
            load_weights_file(file)
    file.write_text("<!DOCTYPE html><p>not found</p>" * 100)
    with pytest.raises(UserError, match=str(file)):
        load_weights_file(file)


# ---- indexes ----


@pytest.mark.parametrize("target", ["../outside.bin", "/etc/passwd", "sub/shard.bin", 7])
def test_an_index_may_not_leave_its_folder(target, state_dict, tmp_path):
    name = "pytorch_model.bin.index.json"
    index = write_shards(write_config(tmp_path), state_dict, name)
    index["weight_map"]["showo.lm_head.bias"] = target
    (tmp_path / name).write_text(json.dumps(index))
    refused(tmp_path, "outside its folder")


def test_shards_that_are_missing_or_lack_what_the_index_promises(state_dict, tmp_path):
    write_shards(write_config(tmp_path), state_dict, "pytorch_model.bin.index.json")
    torch.save({}, tmp_path / "pytorch_model-00003-of-00003.bin")
    refused(tmp_path, r"promises \d+ \(showo.*absent from the shards")
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    refused(tmp_path, "weight file .*pytorch_model-00002-of-00003.bin does not exist")


@pytest.mark.parametrize("content", ["", "{", "[1]", '"Showo"', "\ud800", '{"weight_map": {}}', '{"weight_map": []}'])
@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin.index.json"])
def test_unreadable_json(name, content, state_dict, tmp_path):
    write_bin(write_config(tmp_path), state_dict)
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(tmp_path, f"{name}|holds a None checkpoint")


# ---- configurations ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "MAGVITv2"}, "holds a 'MAGVITv2' checkpoint, expected 'Showo'"),
        ({"_class_name": None, "model_type": "llama"}, "holds a 'llama' checkpoint"),
        ({"_class_name": None}, "holds a None checkpoint"),
        ({"vocab_size": 200}, "config.json: vocab_size is 200"),
        ({"llm_vocab_size": "118"}, "config.json"),
        ({"llm_model_path": "someone/phi-9"}, "config.json.*couldn't connect"),
    ],
)
def test_configurations_that_do_not_fit(changes, message, state_dict, tmp_path):
    write_bin(write_config(tmp_path, **changes), state_dict)
    refused(tmp_path, message)


# ---- folders and hub names ----


def test_folder_without_config_or_weights(state_dict, tmp_path):
    refused(write_bin(tmp_path, state_dict), "config.json does not exist")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(write_config(tmp_path), "holds no weights; expected one of model.safetensors")


MISSING = "does not exist; give an existing folder or a hub name"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, MISSING) for name in ("no", "./a/b", "~/no", "/no", "a/b/c")),
        ("checkpoints/typo", "'checkpoints/typo' does not exist"),  # beside existing ones it is no hub name
        ("checkpoints/file", "is a file; give the checkpoint's folder"),
        ("showlab/none-such", "'showlab/none-such' is not a local folder .* give the path of its folder instead"),
    ],
)
def test_names_of_nothing(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    Path("checkpoints/file").touch()
    with pytest.raises(UserError, match=message):
        resolve_folder(name)


def test_a_hub_name_is_fetched_as_asked(state_dict, tmp_path, monkeypatch):
    folder, asked = write_bin(write_config(tmp_path), state_dict), []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *name, **how: asked.append((name, how)) or folder)
    Showo.from_pretrained("showlab/show-o", revision="v1", cache_dir="cache")
    options = {"allow_patterns": list(CHECKPOINT_FILES), "revision": "v1", "cache_dir": "cache"}
    assert asked == [(("showlab/show-o",), options)]


# ---- rows ----


@pytest.mark.parametrize("shape", [(100, 50), (100,)])
def test_resize_rows(shape):
    tensor = torch.randn(shape).half()
    shorter, longer = resize_rows(tensor, 60, 0.02), resize_rows(tensor, 900, 0.02)
    assert torch.equal(shorter, tensor[:60]) and torch.equal(longer[:100], tensor)
    assert longer.shape == (900, *shape[1:]) and longer.dtype == torch.float16
    assert abs(longer[100:].float().std().item() - 0.02) < 0.003
    assert not resize_rows(tensor, 900, 0.0)[100:].any()
    shorter[:] = 0
    assert tensor[:60].any()  # a copy
