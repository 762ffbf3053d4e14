"""A few rows through products that read the weights fast: the same numbers (models/thin.py)."""

import pytest
import torch
import torch.nn.functional as F

from models import OmniMask, thin
from models.incremental import PlainPhi
from tests.parity.goldens import tiny_showo


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rows", [0, 1, 2, 7, thin.FEW_ROWS, thin.FEW_ROWS + 1])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5 * thin.BLOCKS, 5 * thin.BLOCKS + 3])
def test_product(rows, biased, dtype, width):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 24, dtype=dtype), torch.randn(width, 24, dtype=dtype)
    bias = torch.randn(width, dtype=dtype) if biased else None
    ours = thin.product(x, weight, bias)
    assert ours.dtype == dtype and ours.is_contiguous()
    torch.testing.assert_close(ours, F.linear(x, weight, bias))
    torch.testing.assert_close(thin.product(x.T.contiguous().T, weight, bias), F.linear(x, weight, bias))


def test_autocast_is_left_to_torch():
    x, weight = torch.randn(2, 24), torch.randn(40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert thin.product(x, weight).dtype == torch.bfloat16


def steps(model, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states, the first 6 positions at once, then pieces of one and of two."""
    mask = OmniMask.lm(*ids.shape)
    transformer = PlainPhi(model, mask)
    sizes = [6, 1, 1, *[2] * ((ids.shape[1] - 8) // 2)]
    return torch.cat([transformer.extend(piece) for piece in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_layers_equal_whole_rows(monkeypatch, joined, rows):
    """With weights joined to two matrices a layer, and one by one as in large models."""
    monkeypatch.setattr(thin, "JOINED_SIZE", 2**28 if joined else 0)
    model = tiny_showo()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:  # else scale and shift of the norms would not be seen
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
    ids = torch.randint(0, 117, (rows, 20), generator=torch.Generator().manual_seed(0))
    expected = model.hidden_states(ids, OmniMask.lm(*ids.shape))
    torch.testing.assert_close(steps(model, ids), expected, atol=2e-5, rtol=1e-5)
    assert (model.showo.model in thin._copies) == joined


@pytest.mark.parametrize("name", ["q_proj.weight", "fc2.weight", "dense.bias", "k_layernorm.weight"])
def test_changed_weights_are_noticed(name):
    """Trained, loaded or averaged, also behind autograd's back."""
    model = tiny_showo()
    ids = torch.arange(20)[None]
    before = steps(model, ids)
    (parameter,) = [p for n, p in model.named_parameters() if n.endswith(f"layers.0.{_place(name)}")]
    parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    after = steps(model, ids)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model.hidden_states(ids, OmniMask.lm(1, 20)), atol=2e-5, rtol=1e-5)


def _place(name: str) -> str:
    return f"mlp.{name}" if name.startswith("fc") else f"self_attn.{name}"


def test_copies_are_kept_and_go_with_their_model():
    model = tiny_showo()
    ids = torch.arange(20)[None]
    steps(model, ids)
    kept = thin._copies[model.showo.model]
    steps(model, ids)
    assert thin._copies[model.showo.model] is kept
    number = len(thin._copies)
    del model, kept
    assert len(thin._copies) == number - 1
