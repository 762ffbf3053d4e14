"""Parameter names and shapes of the full-size models are the published ones (spec §4, §12), on the meta device."""

import json
from pathlib import Path

import pytest
import torch

from models import MAGVITv2, MAGVITv2Config, Showo, ShowoConfig

PUBLISHED = json.loads((Path(__file__).parents[1] / "parity/golden/state_dict_shapes.json").read_text())


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("show_o", lambda: Showo(ShowoConfig())),
        ("show_o_w_clip_vit", lambda: Showo(ShowoConfig(w_clip_vit=True))),
        ("magvitv2", lambda: MAGVITv2(MAGVITv2Config())),
    ],
)
def test_names_and_shapes(name, build):
    with torch.device("meta"):
        model = build()
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == PUBLISHED[name]


def test_every_published_parameter_is_trainable():
    with torch.device("meta"):
        model = Showo(ShowoConfig(w_clip_vit=True))
    parameters = dict(model.named_parameters())
    assert parameters.keys() == PUBLISHED["show_o_w_clip_vit"].keys()
    assert all(parameter.requires_grad for parameter in parameters.values())
