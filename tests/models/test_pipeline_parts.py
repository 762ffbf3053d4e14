"""Where the parts of a pipeline come from and go to: loading, saving, sharing, devices and precision."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from models import CLIPVisionTower, ShowoPipeline
from models.images import ImageOptions
from tests.parity.goldens import PHI, prompting, tiny_showo
from tests.tiny import clip_showo, tiny_vq, write_checkpoints, write_clip

FAST = {"timesteps": 3, "guidance_scale": 2.0, "generator": 5}
GREY = Image.new("RGB", (32, 32), "grey")
PARTS = ["llm", "magvitv2", "model_index.json", "showo"]


def new_pipeline(**settings) -> ShowoPipeline:
    return ShowoPipeline(tiny_showo(), tiny_vq(), prompting(), **settings)


@pytest.fixture(scope="module")
def pipeline() -> ShowoPipeline:
    return new_pipeline(noise_schedule="pow2")


@pytest.fixture(scope="module")
def clip_pipeline(tmp_path_factory) -> ShowoPipeline:
    tower = CLIPVisionTower(write_clip(tmp_path_factory.mktemp("clip") / "clip"))
    return ShowoPipeline(clip_showo(), tiny_vq(), prompting(), clip=tower)


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "new" / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def made(pipeline: ShowoPipeline) -> tuple:
    """An image and an answer, which depend on every part."""
    image = pipeline.text_to_image("w1 w2", **FAST)[0]
    return image.tobytes(), pipeline.answer(image, "w3 w4", max_new_tokens=8)


# --- saving and loading


def test_a_saved_pipeline_is_loaded_with_its_settings(pipeline, saved):
    assert names(saved) == PARTS
    loaded = ShowoPipeline.from_pretrained(saved, device="cpu")
    assert made(loaded) == made(pipeline)
    assert loaded.prompting.max_text_len == pipeline.prompting.max_text_len and loaded.noise_schedule == "pow2"
    again = ShowoPipeline.from_pretrained(saved, device="cpu", max_seq_length=5, noise_schedule="cosine")
    assert again.prompting.max_text_len == 5 and made(again)[0] != made(pipeline)[0]


def test_a_saved_pipeline_with_clip(clip_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip_pipeline.save_pretrained(".")
    assert names(tmp_path) == ["clip", *PARTS]
    assert made(ShowoPipeline.from_pretrained(tmp_path, device="cpu")) == made(clip_pipeline)


def test_a_published_folder_is_saved_without_a_path_of_this_machine(tmp_path, capfd):
    places = write_checkpoints(tmp_path / "from")
    named = {"vq_model": places["magvitv2"], "llm": PHI, "device": "cpu", "max_seq_length": 12}
    loaded = ShowoPipeline.from_pretrained(places["showo"], **named)
    llm = loaded.model.config.llm_model_path
    capfd.readouterr()
    loaded.save_pretrained(tmp_path / "to")
    assert "shards" not in capfd.readouterr().err, "no bar over copies within memory"
    written = "".join(path.read_text() for path in (tmp_path / "to").rglob("*.json"))
    assert str(tmp_path) not in written and str(PHI) not in written
    assert loaded.model.config.llm_model_path == llm
    assert made(ShowoPipeline.from_pretrained(tmp_path / "to", device="cpu")) == made(loaded)


def test_saving_again_replaces_what_was_saved_and_nothing_else(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "mine")
    theirs = ("README.md", "showo/README.md", "showo/lora/adapter.bin", "samples/0.png")
    for name in theirs:
        (tmp_path / "mine" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text(name)
    (tmp_path / "mine/showo/model-00001-of-00002.safetensors").write_text("stale")
    other = new_pipeline(noise_schedule="cosine")
    other.save_pretrained(tmp_path / "mine")
    assert all((tmp_path / "mine" / name).read_text() == name for name in theirs)
    assert names(tmp_path / "mine/showo") == ["README.md", "config.json", "lora", "model.safetensors"]
    assert made(ShowoPipeline.from_pretrained(tmp_path / "mine", device="cpu")) == made(other)
    assert names(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ("full", "full exists and holds no pipeline"),
        ("full/thesis.tex", "thesis.tex exists and holds no pipeline"),
        ("other", "other exists and holds no pipeline that was saved by Show-o"),
        ("link", "link is a link"),
    ],
)
def test_folders_of_others_are_not_written_to(pipeline, saved, tmp_path, goal, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "link").symlink_to(saved)
    with pytest.raises(ValueError, match=message):
        pipeline.save_pretrained(tmp_path / goal)
    assert names(tmp_path) == ["full", "link", "other"] and names(tmp_path / "full") == ["thesis.tex"]


def test_a_save_that_fails_leaves_what_was_there(pipeline, saved, monkeypatch):
    before = made(ShowoPipeline.from_pretrained(saved, device="cpu"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipeline.vq_model), "save_pretrained", full)
    with pytest.raises(ValueError, match="cannot write .*pipeline .No space left on device"):
        new_pipeline().save_pretrained(saved)
    monkeypatch.undo()
    assert names(saved.parent) == ["pipeline"] and names(saved) == PARTS
    assert made(ShowoPipeline.from_pretrained(saved, device="cpu")) == before


def test_a_schedule_that_is_a_function_is_not_stored(tmp_path, caplog):
    new_pipeline(noise_schedule=lambda t: 1 - t).save_pretrained(tmp_path)
    assert "noise_schedule is a function" in caplog.text
    assert "noise_schedule" not in json.loads((tmp_path / "model_index.json").read_text())


def test_all_parts_are_pushed_to_the_hub_and_found_there(pipeline, saved, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, names(Path(folder_path)), commit_message))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("models.pipeline_parts.HfApi", Hub)
    where = pipeline.push_to_hub("tiny", private=True, token="secret", commit_message="first")
    assert where == "https://hub/me/tiny"
    assert calls == ["secret", ("tiny", {"private": True, "exist_ok": True}), ("me/tiny", PARTS, "first")]

    def download(name, allow_patterns, **options):
        assert name == "me/tiny" and {"*.json", "*.safetensors"} <= set(allow_patterns)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert made(ShowoPipeline.from_pretrained("me/tiny", device="cpu")) == made(pipeline)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name_or_path": "no/such/place"}, "'no/such/place' does not exist"),
        ({"vq_model": "{saved}/llm"}, "llm holds a 'phi' checkpoint, expected 'MAGVITv2'"),
        ({"llm": "{saved}/magvitv2"}, "^llm=.*magvitv2 holds no usable tokenizer"),
        ({"resolution": 64}, "^resolution=64 does not match num_vq_tokens=16"),
        ({"dtype": "int8"}, "^dtype is 'int8', expected fp32, bf16, fp16"),
        ({"torch_dtype": torch.int64}, "^dtype is torch.int64"),
        ({"conversation": "chat"}, "conversation=chat: the tokenizer has no chat template"),
        ({"device": "warp"}, "device=warp cannot be used"),
    ],
)
def test_mistakes_in_loading_name_the_arguments(saved, settings, message):
    given = {"name_or_path": saved, "device": "cpu"} | settings
    given = {key: value.format(saved=saved) if isinstance(value, str) else value for key, value in given.items()}
    with pytest.raises(ValueError, match=message) as caught:
        ShowoPipeline.from_pretrained(**given)
    assert "model.showo" not in str(caught.value) and "dataset." not in str(caught.value)


# --- device and precision


@pytest.mark.slow
@pytest.mark.parametrize(("branch", "dtype"), [("pipeline", torch.float16), ("clip_pipeline", torch.bfloat16)])
def test_all_parts_take_a_dtype_and_rotary_frequencies_stay_exact(branch, dtype, request, tmp_path):
    pipeline = request.getfixturevalue(branch)
    pipeline.save_pretrained(tmp_path)
    exact = {name: buffer.clone() for name, buffer in pipeline.model.named_buffers()}
    loaded = ShowoPipeline.from_pretrained(tmp_path, device="cpu", torch_dtype=dtype)
    moved = ShowoPipeline.from_pretrained(tmp_path, device="cpu").to(dtype)
    for one in (loaded, moved):
        parts = [part for part in (one.model, one.vq_model, one.clip) if part is not None]
        stored = {tensor.dtype for part in parts for tensor in part.state_dict().values() if tensor.is_floating_point()}
        assert stored == {dtype} and one.dtype == dtype
        assert exact and all(torch.equal(buffer, exact[name]) for name, buffer in one.model.named_buffers())
    assert made(loaded) == made(moved)
    shared = moved.model.get_input_embeddings().weight is moved.model.get_output_embeddings().weight
    assert shared == pipeline.model.showo.config.tie_word_embeddings


def test_to_moves_and_returns_the_pipeline(saved):
    pipeline = ShowoPipeline.from_pretrained(saved, device="cpu", compile=True)
    pipeline.model.step_caches["used"] = None
    assert pipeline.to("cpu", "fp16") is pipeline and pipeline.device.type == "cpu"
    assert pipeline.dtype == torch.float16 and pipeline.model.step_caches == {}, "caches of another dtype"
    with pytest.raises(ValueError, match="device=warp cannot be used"):
        pipeline.to("warp")
    with pytest.raises(ValueError, match="dtype is torch.int64, expected"):
        pipeline.to(torch.int64)


# --- what it says


def test_the_representation_says_what_is_loaded(pipeline, clip_pipeline):
    said = repr(pipeline)
    numbers = (sum(one.numel() for one in part.parameters()) for part in (pipeline.model, pipeline.vq_model))
    expected = ["PhiForCausalLM, 3 layers of width 64", "64 codes of 8 x 8 pixels", "float32 on cpu"]
    expected += ["32 x 32 pixels, 4 x 4 tokens", *(f"{number:,} parameters" for number in numbers)]
    assert all(words in said for words in expected), said
    assert "CLIP" not in said and re.search("CLIP: 9 features of an image", repr(clip_pipeline))


def test_image_options_are_those_of_the_program(saved):
    loaded = ShowoPipeline.from_pretrained(saved, device="cpu", image_options=ImageOptions(background="black"))
    assert loaded.open(Image.new("RGBA", (4, 4))).getpixel((0, 0)) == (0, 0, 0)
