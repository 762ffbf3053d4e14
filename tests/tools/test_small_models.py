"""The folders that take Phi-1.5's and CLIP ViT-L's places in a small Show-o."""

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from common.errors import UserError
from models import Showo, ShowoConfig, UniversalPrompting
from models.loading import load_clip
from tests.training.tiny import CAPTIONS, LLM_VOCAB_SIZE, write_llm
from tools import small_clip, small_llm

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("llm")
    (path / "corpus.txt").write_text("\n".join(CAPTIONS * 3))
    return write_llm(path / "llm", path / "corpus.txt")


def test_the_tokenizer_has_the_asked_size_and_loses_no_text(llm):
    tokenizer = AutoTokenizer.from_pretrained(llm, padding_side="left")
    assert len(tokenizer) == LLM_VOCAB_SIZE
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    for text in (CAPTIONS[0], "Ünïcödé 🦊 \n\ttabs", "  spaces  ", "USER: \nWhat? ASSISTANT: x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert len(tokenizer(CAPTIONS[0])["input_ids"]) < len(CAPTIONS[0]) / 2, "it has learned from the corpus"
    assert small_llm.train_tokenizer(CAPTIONS * 3, LLM_VOCAB_SIZE).get_vocab() == tokenizer.get_vocab()
    prompting = UniversalPrompting(tokenizer, max_text_len=8)
    assert prompting.vocabulary.llm_vocab_size == prompting.vocabulary.pad_id == LLM_VOCAB_SIZE
    assert prompting.bos_id == prompting.eos_id


def test_the_settings_make_a_show_o(llm):
    sizes = {"vocab_size": LLM_VOCAB_SIZE + 10 + 8 + 1, "llm_vocab_size": LLM_VOCAB_SIZE}
    phi = Showo(ShowoConfig(llm_model_path=str(llm), codebook_size=8, num_vq_tokens=4, **sizes)).showo.config
    assert phi.model_type == "phi" and phi.qk_layernorm and phi.tie_word_embeddings
    assert (phi.hidden_size, phi.num_hidden_layers, phi.num_attention_heads, phi.intermediate_size) == (32, 2, 2, 64)
    assert phi.bos_token_id == phi.eos_token_id == AutoTokenizer.from_pretrained(llm).eos_token_id


@pytest.mark.parametrize("family", ["phi", "llama", "qwen3"])
def test_the_base_of_the_rotary_frequencies(tmp_path, family):
    """It reaches the model, and nothing else of the family's settings changes."""
    (tmp_path / "corpus.txt").write_text("\n".join(CAPTIONS * 3))
    sizes = {"vocab_size": LLM_VOCAB_SIZE + 10 + 8 + 1, "llm_vocab_size": LLM_VOCAB_SIZE}
    found = []
    for name, more in (("own", {}), ("given", {"rope_theta": 50.0})):
        folder = write_llm(tmp_path / name, tmp_path / "corpus.txt", family=family, **more)
        config = ShowoConfig(llm_model_path=str(folder), codebook_size=8, num_vq_tokens=4, **sizes)
        found.append(Showo(config).showo.config.rope_parameters)
    assert found[1] == found[0] | {"rope_theta": 50.0} != found[0]


def make_clip(folder, **changes):
    small_clip.main([f"{key}={value}" for key, value in ({"output_dir": folder} | SIZES | changes).items()])
    return folder


def test_the_tower_loads_and_gives_one_feature_a_patch(tmp_path):
    tower = load_clip(str(make_clip(tmp_path / "clip")), feature_size=16)
    assert type(tower.vision_tower).__name__ == "CLIPVisionModel" and tower.num_features == 16
    image = Image.new("RGB", (80, 48), "white")
    image.paste((200, 30, 30), (24, 0, 80, 48))
    features = tower(tower.preprocess([image, Image.new("RGB", (40, 40), "blue")]))
    assert features.shape == (2, 16, 16) and features.isfinite().all()
    assert torch.cdist(features[0], features[1]).min() > 0.1, "a feature depends on the image"
    assert torch.cdist(features[0], features[0]).max() > 0.1, "and on the patch"


def test_the_seed_fixes_the_weights_and_disturbs_nothing_else(tmp_path):
    before = torch.get_rng_state()
    folders = [make_clip(tmp_path / str(number), seed=seed) for number, seed in enumerate((0, 0, 1))]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == again != other


@pytest.mark.slow
def test_the_defaults_make_what_the_small_stages_expect(tmp_path, capsys):
    """64 features, as many as an image of the emoji world has codes."""
    small_clip.main([f"output_dir={tmp_path}"])
    assert "64 features of 192 numbers" in capsys.readouterr().out
    assert load_clip(str(tmp_path), feature_size=192).num_features == 64


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_corpus_of_any_unicode_gives_the_same_tokenizer(tmp_path, encoding):
    for name, text in (("utf-8", "größer\n" * 9), (encoding, "\ufeff".join(["größer\n"] * 9))):
        (tmp_path / f"{name}.txt").write_bytes(text.encode(name))
        given = {"corpus": tmp_path / f"{name}.txt", "output_dir": tmp_path / name, "vocab_size": 260}
        small_llm.main([f"{key}={value}" for key, value in given.items()])
    plain, other = ((tmp_path / name / "tokenizer.json").read_text() for name in ("utf-8", encoding))
    assert plain == other


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_files_of_somebody_else_are_not_replaced(tmp_path, name):
    (tmp_path / "corpus.txt").write_text("a b a b\n")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_text("theirs")
    with pytest.raises(UserError, match=f"output_dir=.*{name} is there and was not written by this command"):
        if name == "model.safetensors":
            make_clip(tmp_path / "new")
        else:
            small_llm.main([f"corpus={tmp_path / 'corpus.txt'}", f"output_dir={tmp_path / 'new'}", "vocab_size=257"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    assert (tmp_path / "new" / name).read_text() == "theirs"


@pytest.mark.parametrize(
    ("main", "settings", "message"),
    [
        (small_llm.main, {"vocab_size": 5000}, r"gives 2\d\d tokens, vocab_size is 5000"),
        (small_llm.main, {"family": "bert"}, "family is 'bert'; allowed: phi"),
        (small_llm.main, {"corpus": "gone.txt"}, "corpus=gone.txt does not exist"),
        (small_llm.main, {"vocab_size": 200}, "vocab_size is 200; it must be at least 257"),
        (small_llm.main, {"hidden_act": "gelo"}, "hidden_act is 'gelo'; allowed: gelu"),
        (small_llm.main, {"hidden_size": 0}, "hidden_size is 0; it must be from 1"),
        (small_llm.main, {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; it must be from 1 to 512"),
        (small_llm.main, {"num_attention_heads": 5}, "hidden_size is 192; it must be a multiple of num_attention"),
        (small_llm.main, {"num_key_value_heads": 2}, "num_attention_heads is 3; it must be a multiple of num_key"),
        (small_llm.main, {"hidden_size": 6}, "that must be an even number"),
        (
            small_clip.main,
            {"image_size": 8192, "patch_size": 1, "hidden_size": 8190},
            "the tower would take 2\\d\\d\\d GiB",
        ),
        (small_clip.main, SIZES | {"patch_size": 7}, r"image_size is 32; it must be a multiple of patch_size \(7\)"),
        (small_clip.main, SIZES | {"heads": 3}, r"hidden_size is 16; it must be a multiple of heads \(3\)"),
        (small_clip.main, {"patch_size": 0, "layers": -1}, "patch_size is 0; it must be from 1 to 1024; layers is -1"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, main, settings, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("a b a b\n")
    given = {"corpus": tmp_path / "corpus.txt"} if main is small_llm.main else {}
    with pytest.raises(UserError, match=message):
        main([f"{key}={value}" for key, value in (given | {"output_dir": tmp_path / "new"} | settings).items()])
    assert not (tmp_path / "new").exists()
