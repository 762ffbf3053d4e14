"""Users' mistakes, all found before a step is taken: one line, exit code 2, nothing written."""

import io
import json
import shutil

import numpy as np
import pytest

from common.errors import UserError
from tests.training.tiny import MAX_TEXT, NUM_TOKENS, arguments, start_script, write_shard
from tests.training.tiny_sources import clip_settings
from training import train, train_magvitv2, train_w_clip_vit

ROW = MAX_TEXT + NUM_TOKENS + 3
SHARDS = "dataset.params.train_{}_shards_path_or_url"
MMU, ROOT = SHARDS.format("mmu"), "dataset.params.train_mmu_image_root"
UND_TYPE, LENGTH = "dataset.und_type", "dataset.preprocessing.max_seq_length"
FEW_TOKENS = {"model.showo.num_vq_tokens": 4, "dataset.preprocessing.resolution": 16}
SYSTEM = {MMU: "{world}/llava_2.json", ROOT: "{world}", UND_TYPE: "llava_tuning", "dataset.add_system_prompt": True}


@pytest.fixture
def refused(world, tmp_path):
    """Starts a run that must be refused; returns its one line."""

    def run(settings: dict, script=train, name: str = "train") -> str:
        with pytest.raises(UserError) as error:
            script.main(arguments(world, tmp_path / "out", settings, name))
        assert not (tmp_path / "out").exists()
        return str(error.value)

    return run


def filled(settings: dict, world) -> dict:
    return {key: str(value).format(world=world) for key, value in settings.items()}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"model.showo.codebook_size": 128, "model.showo.vocab_size": 429}, "model.showo.codebook_size is 128"),
        ({"model.showo.llm_vocab_size": 291, "model.showo.vocab_size": 366}, "model.showo.llm_vocab_size is 291"),
        ({"model.showo.llm_model_path": "/nowhere/llm"}, "/nowhere/llm"),
        ({"model.showo.load_from_showo": False}, "/tiny/llm"),
        ({"model.showo.pretrained_model_path": "/nowhere/showo"}, "/nowhere/showo"),
        ({"model.showo.pretrained_model_path": "{world}/magvitv2"}, "does not fit"),
        ({"model.vq_model.vq_model_name": "/nowhere/vq"}, "/nowhere/vq"),
        ({"validation_prompts_file": "/nowhere.txt"}, "/nowhere.txt does not exist"),
        ({f"training.batch_size_{flow}": 0 for flow in ("t2i", "lm", "mmu")}, "all 0; nothing to train on"),
        ({"experiment.init_from": "/nowhere/stage"}, "/nowhere/stage"),
        ({"training.mask_schedule": "pow"}, "training.mask_schedule: unknown mask schedule 'pow'; known: cosine"),
        ({"mask_schedule.schedule": "sigmoid", "mask_schedule.params.x": 1}, "mask_schedule.schedule or"),
        ({"experiment.resume_from_checkpoint": "checkpoint-77"}, "'checkpoint-77': no such folder"),
        ({"dataset.packing": True, "dataset.packing_length": ROW - 1}, f"but a sample may have {ROW} positions"),
        (SYSTEM, f"max_seq_length is {MAX_TEXT}: {NUM_TOKENS} image positions and"),
    ],
)
def test_settings(refused, world, settings, part):
    assert part in refused(filled(settings, world))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"model.showo.w_clip_vit": False}, "w_clip_vit is false; set it to true, or train with training/train.py"),
        ({UND_TYPE: "captioning"}, "und_type is 'captioning'; with CLIP-ViT it must be llava_pretrain or"),
        ({"training.batch_size_mmu": 0}, "trains mm_projector alone, but training.batch_size_mmu is 0"),
        ({"model.clip_vit_name": "/nowhere/clip"}, "/nowhere/clip"),
        ({"model.clip_vit_name": "{world}/llm"}, "/llm holds no usable CLIP vision model (it is a 'phi' model"),
        ({ROOT: "/nowhere/images"}, "/nowhere/images"),
        # Missing data are named before CLIP is looked for.
        ({"model.clip_vit_name": "/nowhere/clip", MMU: "/nowhere/a.json"}, "do not exist: /nowhere/a.json"),
        (FEW_TOKENS | {LENGTH: 3}, "is 3: 9 image positions and 0 of the system prompt leave no room for text"),
        (FEW_TOKENS | {LENGTH: 30, UND_TYPE: "llava_tuning"}, "is 30: 9 image positions and"),
    ],
)
def test_settings_of_the_clip_branch(refused, world, settings, part):
    assert part in refused(clip_settings(world) | filled(settings, world), train_w_clip_vit)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("dataset.params.train_shards", "no/train-{0..3}.tar", "train_shards: 4 of 4 files do not exist: no/train-0"),
        ("dataset.params.eval_shards", None, "dataset.params.eval_shards is not given"),
        ("dataset.params.resolution", 18, "dataset.params.resolution is 18; this tokenizer needs a multiple of 4"),
        ("model.num_groups", 3, "model: num_groups=3 must divide every width"),
    ],
)
def test_settings_of_the_tokenizer(refused, key, value, part):
    assert part in refused({key: value}, train_magvitv2, "tokenizer")


def test_shards_of_codes_train_no_tokenizer(world, tmp_path):
    codes = io.BytesIO()
    np.save(codes, np.zeros(16, np.int64))
    file = write_shard(tmp_path / "codes.tar", [{"codes.npy": codes.getvalue(), "txt": b"a"}] * 4)
    settings = {"dataset.params.train_shards": file}
    with pytest.raises(UserError, match="an image tokenizer is trained on pixels; give it the shards with the images"):
        train_magvitv2.main(arguments(world, tmp_path / "out", settings, "tokenizer"))


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("hidden_act", "gelo", "hidden_act is 'gelo'; it must be one of "),
        ("hidden_size", 0, "hidden_size is 0; it must be a whole number from 1"),
        ("num_attention_heads", 5, "hidden_size is 32; it must be a multiple of num_attention_heads (5)"),
        ("num_hidden_layers", 10**7, "num_hidden_layers is 10000000; it must be "),
        ("auto_map", {"AutoConfig": "evil.Config"}, "llm_vocab_size is 291"),  # without effect, so the next one is told
    ],
)
def test_sizes_of_a_language_models_folder(refused, world, tmp_path, key, value, part):
    llm = shutil.copytree(world / "llm", tmp_path / "llm")
    (llm / "config.json").write_text(json.dumps(json.loads((llm / "config.json").read_text()) | {key: value}))
    settings = {"model.showo.llm_model_path": llm}
    if key == "auto_map":
        (llm / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Config: pass\n")
        settings |= {"model.showo.llm_vocab_size": 291, "model.showo.vocab_size": 366}
    assert part in refused(settings) and not (tmp_path / "executed").exists()


def test_code_beside_a_tokenizer_is_not_run(refused, world, tmp_path):
    llm = shutil.copytree(world / "llm", tmp_path / "llm")
    content = json.loads((llm / "tokenizer_config.json").read_text())
    content |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (llm / "tokenizer_config.json").write_text(json.dumps(content))
    (llm / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    settings = {"model.showo.llm_model_path": llm, "model.showo.llm_vocab_size": 291, "model.showo.vocab_size": 366}
    assert "llm_model_path" in refused(settings) and not (tmp_path / "executed").exists()


def test_a_launch_that_fell_apart(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("training.processes.Accelerator", lambda **_: type("Single", (), {"num_processes": 1}))
    assert "2 processes were launched, but this one trains with 1" in refused({})


def test_a_launch_with_deepspeed_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("training.processes.importlib.util.find_spec", lambda name: None)
    assert "asks for DeepSpeed, which is not installed: pip install" in refused({})


def test_a_launch_with_deepspeed_that_accelerate_leaves_out(refused, monkeypatch):
    """It would run without DeepSpeed, and count the batches of an optimiser step otherwise."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "true")
    assert "asks for DeepSpeed, but accelerate leaves it out on CPUs (ACCELERATE_USE_CPU" in refused({})


@pytest.mark.slow
def test_all_that_is_missing_is_listed_in_the_last_line_and_the_script_ends_with_2(world, tmp_path):
    gone = {SHARDS.format(flow): f"/gone/{flow}.tar" for flow in ("t2i", "mmu")}
    gone |= {SHARDS.format("lm"): None, "model.vq_model.vq_model_name": "/not/looked/at"}
    process = start_script("training/train.py", arguments(world, tmp_path / "out", gone), tmp_path)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in printed and printed.count("error: ") == 1
    last = printed.strip().splitlines()[-1]
    assert all(part in last for part in ("/gone/t2i.tar", "/gone/mmu.tar", "train_lm_shards_path_or_url is not set"))
    assert not (tmp_path / "out").exists()
