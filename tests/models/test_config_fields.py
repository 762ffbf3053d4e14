"""Sizes of a `config.json` that cannot be, or are beyond reason, are one line before anything is built."""

import json

import pytest
import torch
from transformers import CLIPVisionConfig

from common.errors import UserError
from models import MAGVITv2, MAGVITv2Config, Showo, ShowoConfig
from models.backbones import BACKBONES, make_llm_config
from models.clip_encoder import read_clip_config
from models.config_fields import MAGVIT_FIELDS, SHOWO_FIELDS

LLM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CLIP = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7} | LLM
NAN, INFINITE = float("nan"), float("inf")


def refused(sizes: dict, family: str = "llama") -> str:
    with pytest.raises(ValueError) as error:
        make_llm_config(LLM | sizes, family)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "32"),
        ("hidden_size", 2**40),
        ("num_hidden_layers", 10**7),
        ("num_hidden_layers", True),
        ("num_attention_heads", -2),
        ("num_attention_heads", 3.5),
        ("num_key_value_heads", 0),
        ("intermediate_size", None),
        ("hidden_act", "gelo"),
        ("hidden_act", 3),
        ("vocab_size", 10**12),
        ("max_position_embeddings", 10**15),
        ("initializer_range", NAN),
        ("attention_dropout", 2),
        ("rope_theta", INFINITE),
        ("tie_word_embeddings", "yes"),
        ("num_labels", 10**9),
    ],
)
def test_a_language_models_settings_are_compared_before_it_is_built(family, key, value):
    assert f"{key} is {value!r}; it must be " in refused({key: value}, family)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size is 32; it must be a multiple of num_attention_heads (3)"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "must be a multiple of num_key_value_heads (3)"),
        ({"num_attention_heads": 32}, "gives heads of 1 numbers, of which 1 are rotated"),
        ({"hidden_size": 6}, "gives heads of 3 numbers"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}}, "factor of the rotary"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"layer_types": "x"}, "layer_types"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes, message):
    family = "qwen2" if "layer_types" in sizes else "llama"
    assert message in refused(sizes, family)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": 0},
        {"patch_size": 0},
        {"patch_size": 10**6},
        {"patch_size": 29},
        {"num_hidden_layers": 10**8},
        {"num_attention_heads": 5},
        {"hidden_act": "gelo"},
        {"image_size": 10**6},
        {"layer_norm_eps": "small"},
        {"num_channels": 4},
    ],
)
def test_a_vision_towers_settings_are_compared_alone_and_inside_of_a_clip(tmp_path, settings):
    (key,) = settings
    whole = {"model_type": "clip", "vision_config": CLIP | settings}
    for content in (CLIP | settings, whole):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{key}.*must be|must be.*{key}"):
            read_clip_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CLIP))
    assert isinstance(read_clip_config(tmp_path), CLIPVisionConfig)


WRONG = {int: (0.5, "7", -1, 10**12, True), bool: (1, "no"), str: (7,)}


@pytest.mark.parametrize("model", [Showo, MAGVITv2])
def test_every_field_of_our_own_configurations_is_compared(tmp_path, model):
    fields = SHOWO_FIELDS if model is Showo else MAGVIT_FIELDS
    for key, one in fields.items():
        for value in WRONG[one.kind] if one.most is None else (7, [], [1, "2"], [10**9] * 3, [1] * 99):
            content = {"_class_name": model.published_class_name, key: value}
            (tmp_path / "config.json").write_text(json.dumps(content))
            with pytest.raises(UserError, match=rf"config.json: {key} is .*; it must be "):
                model.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [[], "phi", 7, {"hidden_size": 0}, {"num_hidden_layers": 10**7}, {"model_type": []}])
def test_the_language_models_part_of_a_configuration_is_compared(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Showo", "llm_config": value}))
    with pytest.raises(UserError, match=r"config.json: .*(llm_config|must be|not supported)"):
        Showo.from_pretrained(tmp_path)


def test_sizes_that_take_more_memory_than_there_is_are_refused_before_it_is_taken():
    config = ShowoConfig(llm_config=LLM | {"model_type": "llama", "intermediate_size": 2**19, "num_hidden_layers": 512})
    config.llm_config |= {"hidden_size": 2**16, "num_attention_heads": 512}
    with pytest.raises(ValueError, match=r"a Showo of these sizes would take \d+ GiB, this machine has"):
        Showo.from_config(config)
    with pytest.raises(ValueError, match="a MAGVITv2 of these sizes"):
        MAGVITv2.from_config(MAGVITv2Config(ch=2**14, encoder_ch_mult=[64] * 5, decoder_ch_mult=[64] * 5))


def test_weights_that_are_not_numbers_are_named(tmp_path):
    levels = dict.fromkeys([key for key, one in MAGVIT_FIELDS.items() if one.most], (1,))
    model = MAGVITv2(MAGVITv2Config(ch=4, num_groups=2, code_bits=2, encoder_mid=False, decoder_mid=False, **levels))
    with torch.no_grad():
        model.encoder.conv_in.bias[1] = NAN
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.safetensors holds weights that are NaN or infinite: 1 \(encoder.conv_"):
        MAGVITv2.from_pretrained(tmp_path)
