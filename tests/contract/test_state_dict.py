"""Parameter names and shapes of the full-size models are the published ones (spec §4, §12), on the meta device."""

import json
from pathlib import Path

import pytest
import torch

from models import MAGVITv2, MAGVITv2Config, Showo, ShowoConfig

PUBLISHED = json.loads((Path(__file__).parents[1] / "parity/golden/state_dict_shapes.json").read_text())


@pytest.mark.parametrize(
    ("name", "model_class", "config"),
    [
        ("show_o", Showo, ShowoConfig()),
        ("show_o_w_clip_vit", Showo, ShowoConfig(w_clip_vit=True)),
        ("magvitv2", MAGVITv2, MAGVITv2Config()),
    ],
)
def test_names_and_shapes_and_every_parameter_of_showo_is_trainable(name, model_class, config):
    with torch.device("meta"):
        model = model_class(config)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == PUBLISHED[name]
    if model_class is Showo:
        assert {key for key, p in model.named_parameters() if p.requires_grad} == PUBLISHED[name].keys()
