"""Trained models as folders to share: precision, no machine paths, nothing lost on the way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from models import MAGVITv2, Showo
from models.adapters import merge_adapter, save_adapter
from models.loading import DTYPES
from tests.models.test_adapters import adapted
from tests.training.tiny import config_of, make_model, make_vq_model, write_world
from tools.export import main as export


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world") / "tiny")


def save(world, folder, **settings):
    """A saved Show-o, as `unwrapped_model/` of a checkpoint is."""
    make_model(config_of(world, overrides=settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(world):
    return save(world, world / "unwrapped_model")


WEIGHTS = "model.safetensors"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_an_exported_model_is_the_saved_one_in_the_given_precision(trained, tmp_path, capsys, dtype, stored):
    target = tmp_path / "new" / "showo"
    export([f"from={trained}", f"to={target}", f"dtype={dtype}"])
    assert names(target) == ["config.json", "model.safetensors"] and names(target.parent) == ["showo"]
    saved, exported = (load_file(folder / "model.safetensors") for folder in (trained, target))
    assert saved.keys() == exported.keys()
    assert all(torch.equal(exported[name], tensor.to(stored)) for name, tensor in saved.items())
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644, "others can read it"
    loaded = Showo.from_pretrained(str(target))
    assert loaded.dtype == torch.float32
    assert f"Showo, {loaded.num_parameters():,} parameters, {dtype}, 0." in capsys.readouterr().out


def test_an_exported_model_needs_nothing_of_this_machine(world, tmp_path):
    llm = shutil.copytree(world / "llm", tmp_path / "llm")
    saved = save(world, tmp_path / "saved", **{"model.showo.llm_model_path": llm})
    export([f"from={saved}", f"to={tmp_path / 'showo'}"])
    content = (tmp_path / "showo" / "config.json").read_text()
    assert str(tmp_path) not in content and json.loads(content)["llm_model_path"] == "llm"
    shutil.rmtree(llm)
    loaded = Showo.from_pretrained(str(tmp_path / "showo"))
    assert loaded.config.backbone_config().hidden_size == 32
    assert torch.isfinite(loaded(torch.arange(20)[None]).logits).all()


def test_a_path_inside_the_repository_is_written_from_there(trained, tmp_path, repository):
    saved = shutil.copytree(trained, tmp_path / "saved")
    content = json.loads((saved / "config.json").read_text()) | {"llm_model_path": str(repository / "mine" / "llm")}
    (saved / "config.json").write_text(json.dumps(content))
    export([f"from={saved}", f"to={tmp_path / 'showo'}"])
    assert json.loads((tmp_path / "showo" / "config.json").read_text())["llm_model_path"] == "mine/llm"


def test_exporting_an_image_tokenizer_over_another_replaces_weights_and_keeps_notes(world, tmp_path, capsys):
    target = shutil.copytree(world / "magvitv2", tmp_path / "vq")
    (target / "samples").mkdir()
    stale = ("pytorch_model.bin", "model.safetensors.index.json", "pytorch_model-00001-of-00002.bin")
    theirs = ("README.md", "lora.safetensors", "optimizer.bin")
    for name in (*stale, *theirs):
        (target / name).write_text("{}")
    export([f"from={world / 'magvitv2'}", f"to={target}", "dtype=bf16"])
    assert names(target) == sorted([*theirs, "config.json", "model.safetensors", "samples"])
    assert names(tmp_path) == ["vq"]
    weights = load_file(target / "model.safetensors")
    assert weights["decoder.conv_in.bias"].dtype == torch.bfloat16
    assert weights.keys() == make_vq_model().state_dict().keys()
    assert MAGVITv2.from_pretrained(str(target)).get_code(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    assert "MAGVITv2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "from and to not given"),
        (["from={vq}", "to={new}/x", "dtype=int3"], "dtype is 'int3'; allowed: fp32, bf16, fp16"),
        (["from={vq}", "to={new}/x", "typo=1"], "unknown key typo"),
        (["from={vq}", "to={new}/full"], "full exists and is no checkpoint folder"),
        (["from={vq}", "to={new}/full/thesis.tex"], "thesis.tex exists and is no checkpoint folder"),
        (["from={vq}", "to={new}/other"], "other exists and is no checkpoint folder of the same kind"),
        (["from={vq}", "to={new}/link"], "link is a link, which would be replaced"),
        (["from={vq}", "to={vq}"], "are one folder"),
        (["from={vq}", "to={vq}/.."], "exists and is no checkpoint folder"),
        (["from={vq}", "to=/proc/x/showo"], "/proc/x: No such file"),
        (["from={vq}", "adapter={vq}", "to={new}/x"], "is for a Showo, but .* holds a magvitv2"),
        (["from={new}/gone", "to={new}/x"], "gone.*does not exist"),
        (["from={new}/full", "to={new}/x"], "config.json does not exist"),
        (["from={new}/other", "to={new}/x"], "holds a 'phi' checkpoint; only Showo and MAGVITv2"),
    ],
)
def test_mistakes_are_named_and_harm_nothing(world, tmp_path, arguments, message):
    for name, content in (("full/thesis.tex", "years of work"), ("other/config.json", '{"model_type": "phi"}')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    (tmp_path / "link").symlink_to(world / "magvitv2")
    with pytest.raises(UserError, match=message):
        export([argument.format(vq=world / "magvitv2", new=tmp_path) for argument in arguments])
    assert names(tmp_path) == ["full", "link", "other"] and names(world / "magvitv2") == ["config.json", WEIGHTS]
    assert names(tmp_path / "full") == ["thesis.tex"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_is_merged_before_the_weights_are_rounded(trained, tmp_path, dtype):
    model = Showo.from_pretrained(str(trained)).eval()
    save_adapter(adapted(model), tmp_path / "run")
    with torch.no_grad():
        expected = model(torch.arange(20)[None]).logits
    export([f"from={trained}", f"adapter={tmp_path / 'run'}", f"to={tmp_path / 'new'}", f"dtype={dtype}"])
    assert names(tmp_path / "new") == ["config.json", WEIGHTS]
    exported = Showo.from_pretrained(str(tmp_path / "new")).eval()
    merge_adapter(model)
    rounded = model.to(DTYPES[dtype]).state_dict()
    assert all(torch.equal(tensor, rounded[name].float()) for name, tensor in exported.state_dict().items())
    with torch.no_grad():
        assert (exported(torch.arange(20)[None]).logits - expected).abs().max() < {"fp32": 1e-4, "bf16": 0.1}[dtype]


def test_an_adapter_without_its_model_is_refused(trained, tmp_path):
    save_adapter(adapted(Showo.from_pretrained(str(trained))), tmp_path / "run")
    with pytest.raises(UserError, match="holds an adapter, not a model; give the model that it was trained on .'unwr"):
        export([f"from={tmp_path / 'run'}", f"to={tmp_path / 'new'}"])
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("form", ["showo/", "a run", "a checkpoint"])
def test_a_model_is_found_wherever_it_is_saved(trained, tmp_path, form):
    places = {"showo/": "showo", "a run": ".", "a checkpoint": "unwrapped_model"}
    source = tmp_path / "source"
    shutil.copytree(trained, source / places[form], dirs_exist_ok=True)
    export([f"from={source}", f"to={tmp_path / 'new'}"])
    assert names(tmp_path / "new") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("stage", ["weights", "copy", "rename"])
def test_a_disk_that_fills_leaves_what_was_there(world, tmp_path, monkeypatch, stage):
    target = shutil.copytree(world / "magvitv2", tmp_path / "vq")
    (target / "README.md").write_text("a card")
    rename = Path.rename

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(target))

    if stage == "rename":
        monkeypatch.setattr(Path, "rename", lambda path, to: full() if path.suffix == ".partial" else rename(path, to))
    else:
        monkeypatch.setattr(*{"weights": (MAGVITv2, "save_pretrained"), "copy": (shutil, "copy2")}[stage], full)
    with pytest.raises(UserError, match="cannot write .*vq .No space left on device.; make room"):
        export([f"from={world / 'magvitv2'}", f"to={target}"])
    assert names(tmp_path) == ["vq"] and names(target) == ["README.md", "config.json", "model.safetensors"]
    assert (target / WEIGHTS).read_bytes() == (world / "magvitv2" / WEIGHTS).read_bytes()


def test_an_export_that_was_killed_between_its_renames_is_put_right(world, tmp_path):
    shutil.copytree(world / "magvitv2", tmp_path / ".vq.old")
    (tmp_path / ".vq.old" / "README.md").write_text("a card")
    export([f"from={world / 'magvitv2'}", f"to={tmp_path / 'vq'}"])
    assert names(tmp_path) == ["vq"] and (tmp_path / "vq" / "README.md").read_text() == "a card"
