"""`training.trainable: new`: what the language model brought stays as it was, to the last bit."""

from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from models import Showo
from tests.tiny_llms import WORDS, config_of, tiny_llm, tiny_showo
from training.optimization import adamw
from training.trainable import choose_trainable, keep_old_rows
from training.trainer import Trainer

MATRICES = {"showo.model.embed_tokens.weight", "showo.lm_head.weight"}


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {"tie_word_embeddings": True}, {"showo.model.embed_tokens.weight"}),
        ("qwen3", {}, MATRICES),  # whose norms are its own
        ("phi", {}, MATRICES | {"showo.lm_head.bias"}),
    ],
)
def test_new_is_what_the_language_model_did_not_bring(family, settings, expected):
    model = tiny_showo(family, **settings)
    assert set(choose_trainable(model, "new")) == expected
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    added = {name for name in trained if "layernorm" in name}
    assert trained - added == expected
    assert len(added) == (8 if family == "phi" else 0), "weight and bias of q and k in two layers"


def test_everything_is_trained_by_default_and_what_another_rule_has_frozen_is_left_alone():
    model = tiny_showo("llama")
    assert choose_trainable(model, "all") == {} and all(p.requires_grad for p in model.parameters())
    old_rows = choose_trainable(model, "new")
    model.requires_grad_(False)
    keep_old_rows(model, old_rows)
    assert not any(p.requires_grad for p in model.parameters())


def test_zero_3_is_refused():
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    trainer = SimpleNamespace(config=None, accelerator=SimpleNamespace(state=state))
    with pytest.raises(UserError, match="training.trainable=new.* does not work with ZeRO-3"):
        Trainer.wrap(trainer, 1, {"lm_head.weight": 5})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["phi", "llama"])
def test_old_rows_stay_to_the_last_bit_under_weight_decay(family, tied, tmp_path):
    tiny_llm(family, WORDS + 20, tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = Showo.from_llm(config_of(tmp_path)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old_rows = choose_trainable(model, "new")
    keep_old_rows(model, old_rows)
    optimizer = adamw(model.named_parameters(), 0.5, old_rows, lr=1e-2)
    ids = torch.randint(0, model.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for _ in range(2):  # gradients accumulate
            model(ids, labels=ids, batch_size_lm=2).loss_lm.backward()
        optimizer.step()
        optimizer.zero_grad()
    shared = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    for name, tensor in model.state_dict().items():
        if name.endswith(shared):
            assert torch.equal(tensor[:WORDS], before[name][:WORDS])
            assert not torch.equal(tensor[WORDS:], before[name][WORDS:])  # also the spare rows
        else:
            assert torch.equal(tensor, before[name]) == ("q_layernorm" not in name and "k_layernorm" not in name)
