"""Trained models as folders to share: precision, no machine paths, nothing lost on the way."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from models import MAGVITv2, Showo
from tests.training.tiny import config_of, make_model, make_vq_model
from training.export import main as export


@pytest.fixture(scope="module")
def trained(world):
    """A saved Show-o, as `unwrapped_model/` of a checkpoint is."""
    return save(world, world / "unwrapped_model")


def save(world, folder, **settings):
    make_model(config_of(world, overrides=settings)).save_pretrained(folder)
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_an_exported_model_is_the_saved_one_in_the_given_precision(trained, tmp_path, capsys, dtype, stored):
    target = tmp_path / "new" / "showo"
    export([f"from={trained}", f"to={target}", f"dtype={dtype}"])
    assert sorted(path.name for path in target.parent.rglob("*")) == ["config.json", "model.safetensors", "showo"]
    saved, exported = weights(trained), weights(target)
    assert saved.keys() == exported.keys()
    assert all(torch.equal(exported[name], tensor.to(stored)) for name, tensor in saved.items())
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644, "others can read it"
    loaded = Showo.from_pretrained(str(target))
    assert next(loaded.parameters()).dtype == torch.float32
    count = sum(parameter.numel() for parameter in loaded.parameters())
    assert f"Showo, {count:,} parameters, {dtype}, 0." in capsys.readouterr().out


def test_an_exported_model_needs_nothing_of_this_machine(world, tmp_path):
    shutil.copytree(world / "llm", tmp_path / "llm")
    saved = save(world, tmp_path / "saved", **{"model.showo.llm_model_path": tmp_path / "llm"})
    export([f"from={saved}", f"to={tmp_path / 'showo'}"])
    content = (tmp_path / "showo" / "config.json").read_text()
    assert str(tmp_path) not in content and json.loads(content)["llm_model_path"] == "llm"
    shutil.rmtree(tmp_path / "llm")
    loaded = Showo.from_pretrained(str(tmp_path / "showo"))
    assert loaded.config.backbone_config().hidden_size == 32
    with torch.no_grad():
        assert torch.isfinite(loaded(torch.arange(20)[None]).logits).all()


def test_a_path_inside_the_repository_is_written_from_there(world, tmp_path, repository):
    saved = save(world, tmp_path / "saved")
    content = json.loads((saved / "config.json").read_text())
    content["llm_model_path"] = str(repository / "checkpoints" / "mine" / "llm")
    (saved / "config.json").write_text(json.dumps(content))
    export([f"from={saved}", f"to={tmp_path / 'showo'}"])
    assert json.loads((tmp_path / "showo" / "config.json").read_text())["llm_model_path"] == "checkpoints/mine/llm"


def test_an_image_tokenizer_is_exported_likewise(world, tmp_path, capsys):
    export([f"from={world / 'magvitv2'}", f"to={tmp_path / 'vq'}", "dtype=fp16"])
    codes = MAGVITv2.from_pretrained(str(tmp_path / "vq")).get_code(torch.zeros(1, 3, 32, 32))
    assert codes.shape == (1, 16)
    assert weights(tmp_path / "vq").keys() == make_vq_model().state_dict().keys()
    assert "MAGVITv2" in capsys.readouterr().out


def test_exporting_over_a_checkpoint_replaces_weights_and_keeps_notes(world, tmp_path):
    target = tmp_path / "vq"
    shutil.copytree(world / "magvitv2", target)
    (target / "README.md").write_text("card")
    (target / "pytorch_model.bin").write_bytes(b"stale")
    (target / "model.safetensors.index.json").write_text("{}")
    export([f"from={world / 'magvitv2'}", f"to={target}", "dtype=bf16"])
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vq"]
    assert weights(target)["decoder.conv_in.bias"].dtype == torch.bfloat16


def test_mistakes_of_an_export_are_named_and_harm_nothing(world, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "phi"}')
    source = f"from={world / 'magvitv2'}"
    for argv, message in [
        ([], "from and to not given"),
        ([source, f"to={tmp_path / 'x'}", "dtype=int3"], "dtype is 'int3'; allowed: fp32, bf16, fp16"),
        ([source, f"to={tmp_path / 'x'}", "typo=1"], "unknown argument 'typo=1'"),
        ([source, f"to={full}"], "exists and is no checkpoint folder"),
        ([f"from={tmp_path / 'gone'}", f"to={tmp_path / 'x'}"], "gone.*does not exist"),
        ([f"from={full}", f"to={tmp_path / 'x'}"], "config.json is missing"),
        ([f"from={other}", f"to={tmp_path / 'x'}"], "holds a 'phi' checkpoint; only Showo and MAGVITv2"),
    ]:
        with pytest.raises(UserError, match=message):
            export(argv)
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "x").exists()
