"""What a training starts from, where names are looked up, parts that do not fit (most: end_to_end/test_mistakes.py)."""

import json
import shutil

import pytest
import torch

from common.errors import UserError
from common.schema import TrainedShowoSection
from models import Showo
from models.loading import find_folder, find_parts, initial_showo, load_clip, load_parts, load_text_tokenizer
from tests.models.test_checkpoint_io import Malicious
from tests.parity.goldens import PHI, facts, tiny_showo
from tests.tiny import CLIP_WIDTH, write_checkpoints
from tests.tiny_llms import tiny_llm

SIZES = {key: facts()[key] for key in ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens")}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("tiny"))


def test_what_a_training_starts_from(places, tmp_path):
    """A checkpoint (perhaps in a training checkpoint's folder), a language model, or nothing."""
    section = TrainedShowoSection(**SIZES, llm_model_path=str(PHI), pretrained_model_path=str(places["showo"]))
    head = tiny_showo().showo.lm_head.weight
    assert torch.equal(initial_showo(section).showo.lm_head.weight, head)
    (tmp_path / "unwrapped_model").symlink_to(places["showo"], target_is_directory=True)
    section.pretrained_model_path, section.w_clip_vit = None, True
    model = initial_showo(section, tmp_path, clip_vit_name=str(places["clip"]))  # the projector may be missing
    assert torch.equal(model.showo.lm_head.weight, head) and model.mm_projector[0].in_features == CLIP_WIDTH
    section.w_clip_vit = False
    random = initial_showo(section)
    assert isinstance(random, Showo) and not torch.equal(random.showo.lm_head.weight, head)
    llm = tiny_llm("llama")
    llm.save_pretrained(tmp_path / "llm")
    section.llm_model_path, section.load_from_showo = str(tmp_path / "llm"), False
    model = initial_showo(section)
    assert torch.equal(model.get_input_embeddings().weight[:118], llm.get_input_embeddings().weight)
    section.vocab_size += 1
    with pytest.raises(UserError, match="model.showo: vocab_size is 194"):
        initial_showo(section)


def test_names_are_looked_up_in_the_current_folder_then_in_the_repository(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = find_parts("checkpoints/showo-tiny")
    assert parts.keys() == {"showo", "vq_model", "llm"} and find_folder(parts["showo"]).is_relative_to(repository)
    write_checkpoints(tmp_path / "checkpoints" / "showo-tiny")
    assert find_parts("checkpoints/showo-tiny")["showo"] == "checkpoints/showo-tiny/showo"
    assert find_parts("showlab/show-o") == {"showo": "showlab/show-o"}


@pytest.mark.parametrize("form", ["", "unwrapped_model", "showo"])
def test_a_model_is_found_in_what_a_run_or_a_pipeline_is_saved_as(places, tmp_path, form):
    shutil.copytree(places["showo"], tmp_path / "x" / form, dirs_exist_ok=True)
    assert find_folder(tmp_path / "x") == tmp_path / "x" / form
    section = TrainedShowoSection(**SIZES, llm_model_path=str(PHI), pretrained_model_path=None)
    assert torch.equal(initial_showo(section, tmp_path / "x").showo.lm_head.weight, tiny_showo().showo.lm_head.weight)


def test_a_run_that_has_not_ended_names_its_newest_checkpoint(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "unwrapped_model").mkdir(parents=True)
    with pytest.raises(UserError, match="is the folder of a run that has not ended; give its checkpoint .*-10$"):
        find_folder(tmp_path)


@pytest.mark.parametrize("value", ["x", [], {"a": 1}, 0])
def test_a_tokenizers_own_limit_is_a_number(tmp_path, value):
    llm = shutil.copytree(PHI, tmp_path / "llm")
    content = json.loads((llm / "tokenizer_config.json").read_text()) | {"model_max_length": value}
    (llm / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="llm_model_path=.* holds no usable tokenizer .model_max_length is"):
        load_text_tokenizer(str(llm), SIZES["llm_vocab_size"])


def test_parts_that_do_not_fit(places, tmp_path):
    with pytest.raises(UserError, match=f"features of size {CLIP_WIDTH}, but the checkpoint expects 1024"):
        load_clip(str(places["clip"]), 1024)
    with pytest.raises(UserError, match="conversation=chat: the tokenizer has no chat template"):
        load_parts(
            str(places["showo"]), vq_model=str(places["magvitv2"]), llm=str(PHI), device="cpu", conversation="chat"
        )
    clip = shutil.copytree(places["clip"], tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    torch.save({"x": Malicious(tmp_path / "executed")}, clip / "pytorch_model.bin")
    with pytest.raises(UserError, match="model.clip_vit_name=.*clip holds no usable CLIP vision model"):
        load_clip(str(clip), CLIP_WIDTH)
    assert not (tmp_path / "executed").exists()
