"""The benchmark of quantised weights: which rows it has, and that bytes are counted as they are stored."""

import json

import pytest
import torch

from benchmarks import quantization
from models.quantization import BLOCK

pytest.importorskip("torchao")
SIZES = "--hidden 64 --heads 2 --layers 1 --tokens 16 --timesteps 1 --new-tokens 2"


def test_bytes_are_those_that_are_stored():
    from torchao.dtypes import to_nf4

    weight = torch.randn(64, 256)
    assert quantization.num_bytes(weight) == 4 * 64 * 256
    assert 64 * 256 / 2 < quantization.num_bytes(to_nf4(weight, BLOCK, 256)) < 0.55 * 64 * 256


@pytest.mark.slow
def test_every_form_is_measured_or_says_why_not(capsys):
    quantization.main([*SIZES.split(), "--dtype", "bf16"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [found[kind]["weights_mib"] for kind in found] == sorted(
        (f["weights_mib"] for f in found.values()), reverse=True
    )
    assert list(found) == ["bf16", "int8", "int4", "nf4"] and all(
        f["image_s"] > 0 < f["answer_s"] for f in found.values()
    )
    quantization.main([*SIZES.split(), "--dtype", "fp32"])
    assert "needs bf16" in json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["int4"]
