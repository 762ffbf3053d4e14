"""Names that others call stay as they are: importable, with these parameters, in this order, with these defaults."""

import inspect
import subprocess
import sys

import pytest
import transformers

import llava
import models
from models.vocabulary import Vocabulary

REQUIRED = inspect.Parameter.empty
NAMES = """Showo ShowoConfig MAGVITv2 MAGVITv2Config CLIPVisionTower UniversalPrompting OmniMask ShowoPipeline
SamplingParameters get_mask_schedule""".split()


@pytest.mark.parametrize("name", NAMES)
def test_models_exports(name):
    assert hasattr(models, name) and name in models.__all__


@pytest.mark.parametrize("name", ["encode_conversation", "encode_plain", "collate"])
def test_llava_exports(name):
    assert callable(getattr(llava, name))


POSITIONAL = {
    "UniversalPrompting": {"tokenizer": REQUIRED, "max_text_len": 128, "ignore_id": -100, "cond_dropout_prob": 0.1},
    "Showo.forward": {
        "input_ids": REQUIRED,
        "attention_mask": None,
        "labels": None,
        "batch_size_t2i": 0,
        "batch_size_lm": 0,
        "batch_size_mmu": 0,
        "max_seq_length": 128,
        "image_features": None,
    },
    "Showo.t2i_generate": {"input_ids": REQUIRED, "uncond_input_ids": None},
    "Showo.mmu_generate": {"input_ids": REQUIRED},
    "MAGVITv2.get_code": {"pixels": REQUIRED},
    "MAGVITv2.decode_code": {"codes": REQUIRED, "shape": None},
    "UniversalPrompting.__call__": {"inputs": REQUIRED, "task": REQUIRED},
}
KEYWORDS = {
    "Showo.t2i_generate": {
        "guidance_scale": 0.0,
        "timesteps": 18,
        "temperature": 1.0,
        "noise_schedule": "cosine",
        "generator": None,
    },
    "Showo.mmu_generate": {
        "image_features": None,
        "max_new_tokens": 100,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "eot_token": None,
        "generator": None,
    },
    "ShowoConfig": {
        "llm_model_path": "microsoft/phi-1_5",
        "vocab_size": 58498,
        "llm_vocab_size": 50295,
        "num_new_special_tokens": 10,
        "codebook_size": 8192,
        "num_vq_tokens": 256,
        "w_clip_vit": False,
    },
}


def parameters_of(path: str) -> dict:
    item = models
    for part in path.split("."):
        item = getattr(item, part)
    given = inspect.signature(item.__init__ if inspect.isclass(item) else item).parameters
    return {name: parameter for name, parameter in given.items() if name != "self"}


@pytest.mark.parametrize("path", POSITIONAL)
def test_positional_parameters(path):
    """The first ones, in order; more may follow."""
    given = [(name, p.default) for name, p in parameters_of(path).items() if p.kind != p.KEYWORD_ONLY]
    assert given[: len(POSITIONAL[path])] == list(POSITIONAL[path].items())


@pytest.mark.parametrize("path", KEYWORDS)
def test_keyword_parameters(path):
    given = {name: parameter.default for name, parameter in parameters_of(path).items()}
    assert {name: given.get(name, "absent") for name in KEYWORDS[path]} == KEYWORDS[path]


def test_pipeline_methods():
    for method in ("from_pretrained", "from_config", "text_to_image", "inpaint", "extrapolate", "answer"):
        assert callable(getattr(models.ShowoPipeline, method))


def test_mask_methods():
    for method in ("lm", "t2i", "mmu", "mmu_vit", "from_ids", "cat", "rows", "select", "dense", "block_mask"):
        assert callable(getattr(models.OmniMask, method))


def test_row_fields():
    rows = models.UniversalPrompting.__call__.__annotations__["return"]
    assert list(rows.__dataclass_fields__) == ["input_ids", "labels", "attention_mask"]


def test_models_are_of_the_library():
    for model, config, kind in (
        (models.Showo, models.ShowoConfig, "showo"),
        (models.MAGVITv2, models.MAGVITv2Config, None),
    ):
        assert issubclass(model, transformers.PreTrainedModel) and model.config_class is config
        assert isinstance(transformers.AutoConfig.for_model(kind or config.model_type), config)


def test_the_default_configuration_is_the_published_one():
    config = models.ShowoConfig()
    assert config.vocabulary == Vocabulary() and config.mask_token_id == 58497


def test_the_model_takes_no_settings_of_training():
    assert list(parameters_of("Showo.forward")) == list(POSITIONAL["Showo.forward"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "training"])
def test_importing_models_does_not_load(repository, name):
    """torchvision has no CPU build to match, and a broken one breaks transformers; training stands above the models."""
    code = f"import models, sys; sys.exit({name!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0
