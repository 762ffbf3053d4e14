"""Names that others call stay as they are: importable, with these parameters, in this order, with these defaults."""

import inspect
import re
import subprocess
import sys
from operator import attrgetter

import pytest
import transformers

import llava
import models
from models.vocabulary import Vocabulary

EXPORTS = {
    models: """Showo ShowoConfig MAGVITv2 MAGVITv2Config CLIPVisionTower UniversalPrompting OmniMask ShowoPipeline
        SamplingParameters get_mask_schedule get_mask_chedule""",
    llava: "encode_conversation encode_plain collate",
    models.ShowoPipeline: """from_pretrained from_config save_pretrained push_to_hub to __call__ text_to_image inpaint
        extrapolate answer caption""",
    models.OmniMask: "lm t2i mmu mmu_vit from_ids cat rows select dense block_mask",
}
# What comes before the star may be given by position; further parameters may follow.
SIGNATURES = """
UniversalPrompting(tokenizer, max_text_len=128, ignore_id=-100, cond_dropout_prob=0.1)
UniversalPrompting.__call__(inputs, task)
Showo.forward(input_ids, attention_mask=None, labels=None, batch_size_t2i=0, batch_size_lm=0, batch_size_mmu=0,
    max_seq_length=None, image_features=None)
Showo.t2i_generate(input_ids, uncond_input_ids=None, *, guidance_scale=0.0, timesteps=18, temperature=1.0,
    noise_schedule="cosine", generator=None)
Showo.mmu_generate(input_ids, *, image_features=None, max_new_tokens=100, temperature=1.0, top_k=None, top_p=None,
    eot_token=None, generator=None)
MAGVITv2.get_code(pixels)
MAGVITv2.decode_code(codes, shape=None)
ShowoConfig(*, llm_model_path="microsoft/phi-1_5", vocab_size=58498, llm_vocab_size=50295, num_new_special_tokens=10,
    codebook_size=8192, num_vq_tokens=256, w_clip_vit=False)
"""
SIGNATURES = dict(re.findall(r"^([\w.]+)\((.+?)\)$", SIGNATURES, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("place", EXPORTS)
def test_names(place):
    assert all(callable(getattr(place, name)) for name in EXPORTS[place].split())
    assert place is not models or set(EXPORTS[models].split()) <= set(models.__all__)


def defaults_of(function) -> tuple[list[tuple], dict]:
    """(name, default) of the positional parameters in order, and of all."""
    given = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return [(p.name, p.default) for p in given if p.kind != p.KEYWORD_ONLY], {p.name: p.default for p in given}


@pytest.mark.parametrize("path", SIGNATURES)
def test_parameters(path):
    item = attrgetter(path)(models)
    positional, everything = defaults_of(eval(f"(lambda {SIGNATURES[path]}: None)"))
    given, all_given = defaults_of(item.__init__ if inspect.isclass(item) else item)
    assert given[: len(positional)] == positional
    assert all_given | everything == all_given
    assert path != "Showo.forward" or list(all_given) == list(everything), "the model takes no settings of training"


def test_row_fields():
    rows = models.UniversalPrompting.__call__.__annotations__["return"]
    assert list(rows.__dataclass_fields__) == ["input_ids", "labels", "attention_mask", "position_ids"]


@pytest.mark.parametrize(
    ("model", "config"), [(models.Showo, models.ShowoConfig), (models.MAGVITv2, models.MAGVITv2Config)]
)
def test_models_are_of_the_library(model, config):
    assert issubclass(model, transformers.PreTrainedModel) and model.config_class is config
    assert isinstance(transformers.AutoConfig.for_model(config.model_type), config)
    assert models.ShowoConfig.model_type == "showo"


def test_the_default_configuration_is_the_published_one():
    config = models.ShowoConfig()
    assert config.vocabulary == Vocabulary() and config.mask_token_id == 58497


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "training"])
def test_importing_models_does_not_load(repository, name):
    """torchvision has no CPU build to match, and a broken one breaks transformers; training stands above the models."""
    code = f"import models, sys; sys.exit({name!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0
