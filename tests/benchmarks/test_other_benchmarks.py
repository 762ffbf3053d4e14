"""The benchmarks of loading, tokenizer and loss, and the counting behind all limits; never their seconds."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import data, limits, loss_memory, tokenizer
from models import OmniMask, Showo, ShowoConfig
from models.images import open_image

pytestmark = pytest.mark.slow  # they measure the machine
LLM = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 80}
CONFIG = {"num_vq_tokens": 16, "llm_vocab_size": 90, "codebook_size": 64, "vocab_size": 165}


def test_counted_work_is_what_torch_counts():
    config = ShowoConfig(llm_config=LLM, **CONFIG)
    model, ids = Showo._from_config(config, attn_implementation="eager"), torch.zeros(2, 21, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, OmniMask.lm(2, 21))
    counted = limits.layers(config, ids.numel(), 2 * 21 * 21) + limits.head(config, ids.numel())
    assert counted.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)  # which counts rotary angles, too
    layers = sum(
        p.numel() for n, p in model.showo.model.layers.named_parameters() if n.endswith("weight") and p.ndim > 1
    )
    assert limits.weights(config, 2, with_head=False).bytes == 2 * layers


def test_rates_are_measured_and_the_slower_of_both_is_the_floor(monkeypatch):
    monkeypatch.setattr(limits, "COPIED", 2**20)
    assert limits.matmul_rate() > 0 and limits.copy_bandwidth() > 0
    rates = limits.Rates(flops=10.0, bytes=2.0)
    assert rates.floor(limits.Work(30, 4)) == 3 and rates.floor(limits.Work(30, 8)) == 4
    assert limits.Work(1, 2) * 3 + limits.Work(1, 1) == limits.Work(4, 7)


def test_loading_is_measured_in_every_way():
    pictures = data.encoded_images(12, 48)
    assert {open_image(picture, "").size for picture in pictures} == {(48, 48)} and len(set(pictures)) == 12
    found = data.measure(pictures, samples=20, rounds=1)
    assert tuple(found) == data.WAYS and min(found.values()) > 0
    for ways in data.measure_parts(pictures, samples=20, records=300, rounds=1).values():
        assert next(iter(ways)) == "ours" and len(ways) > 1 and min(ways.values()) > 0


def test_the_tokenizer_is_measured(capsys):
    tokenizer.main(["--size", "tiny", "--pictures", "1", "--repeats", "1", "--no-compile", "--bf16"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert set(found) == {"published", "bf16", "limit"} and found["published"]["same_codes"] == 1
    assert found["limit"]["flops"] > 1e8 and 0 < found["published"]["share_of_limit"]


@pytest.mark.slow
def test_head_and_loss_take_at_most_15_percent_of_the_published_memory(capsys):
    loss_memory.main([])
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["ours_mib"] < 0.15 * found["published_mib"] and found["share"] <= 0.15
