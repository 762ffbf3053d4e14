"""Rows, masks, logits, losses, gradients, drawings and answers equal the published system's."""

import pytest
import torch

from models import OmniMask, get_mask_schedule
from tests.parity.goldens import facts, mixed_batch, prompting, task_rows, tensors, tiny_showo


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


def test_sizes_and_special_tokens():
    """Every number of golden.json follows from the three sizes of the vocabulary and the rows' lengths."""
    vocabulary, build, f = tiny_showo().vocabulary, prompting(), facts()
    assert (vocabulary.vocab_size, vocabulary.mask_token_id) == (f["vocab_size"], f["mask_token_id"])
    assert vocabulary.image_offset == f["text_token_offset"]
    ours = build.special_token_ids | {"<|sot|>": build.bos_id, "<|eot|>": build.eos_id}
    ours["<|pad|>"] = ours.pop("[PAD]")
    assert ours == f["special_token_ids"]


@pytest.mark.parametrize("task", ["t2i", "lm", "mmu"])
def test_rows_labels_and_masks(task):
    rows = task_rows()[task]
    assert torch.equal(rows.input_ids, tensors()[f"prompt.{task}_input_ids"])
    assert torch.equal(rows.labels, tensors()[f"prompt.{task}_labels"])
    assert torch.equal(rows.attention_mask.dense()[:, 0], tensors()[f"mask.{task}"])
    from_ids = OmniMask.from_ids(rows.input_ids, tiny_showo().vocabulary)
    assert torch.equal(from_ids.dense(), rows.attention_mask.dense())


def generation_ids(texts, image_ids=None):
    image_ids = torch.full((3, 16), facts()["mask_token_id"]) if image_ids is None else image_ids
    return prompting()((texts, image_ids), "t2i_gen").input_ids


def test_generation_rows():
    assert torch.equal(generation_ids(facts()["t2i_texts"]), tensors()["prompt.t2i_gen_input_ids"])
    assert torch.equal(generation_ids([""] * 3), tensors()["prompt.t2i_uncond_input_ids"])


@torch.no_grad()
def test_clip_mask(model):
    """Also on rows of drawn embeddings: 28 system ids, 576 features, text."""
    mask, case = OmniMask.mmu_vit(1, 28, 576, 640), facts()["vit"]
    assert torch.equal(mask.visible_from[0], tensors()["mask.mmu_vit_visible_from"])
    embeds = torch.randn(case["shape"], generator=torch.Generator().manual_seed(case["seed"]))  # (B, L, H)
    mask = OmniMask.mmu_vit(len(embeds), case["system_prompt_len"], 576, embeds.shape[1])
    logits = model.showo(inputs_embeds=embeds, attention_mask=mask.dense()).logits[:, -8:]
    torch.testing.assert_close(logits, tensors()["vit.logits_last8"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_logits(attn_implementation):
    ids, labels, mask = mixed_batch()
    assert torch.equal(ids, tensors()["forward.input_ids"])
    assert torch.equal(labels, tensors()["forward.labels"])
    logits = tiny_showo(attn_implementation=attn_implementation)(ids, mask).logits
    visible = ids != facts()["special_token_ids"]["<|pad|>"]
    torch.testing.assert_close(logits[visible], tensors()["forward.logits"][visible], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients(checkpointing):
    model = tiny_showo()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # renamed in 5.23
        model.train()
    ids, labels, mask = mixed_batch()
    out = model(ids, mask, labels=labels, batch_size_t2i=3, batch_size_lm=2, batch_size_mmu=2, max_seq_length=12)
    losses = torch.stack([out.loss_t2i, out.loss_lm, out.loss_mmu])
    torch.testing.assert_close(losses, tensors()["forward.losses"], atol=1e-5, rtol=1e-5)
    assert out.logits is None
    (out.loss_t2i + 0.1 * out.loss_lm + out.loss_mmu).backward()
    parameters = dict(model.named_parameters())
    norms = torch.stack([parameters[key].grad.norm() for key in facts()["grad_norm_keys"]])
    torch.testing.assert_close(norms, tensors()["forward.grad_norms"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", range(4))
def test_drawing(model, case):
    settings = dict(facts()["generate"][case])
    image_ids = tensors()[f"generate.{case}.image_ids"] if settings.pop("partial") else None
    codes = model.t2i_generate(
        generation_ids(facts()["t2i_texts"], image_ids),
        generation_ids([""] * 3),
        noise_schedule=settings.pop("schedule"),
        generator=torch.Generator().manual_seed(settings.pop("seed")),
        **settings,
    )
    assert torch.equal(codes, tensors()[f"generate.{case}.tokens"])


@pytest.mark.parametrize("case", range(2))
def test_answering(model, case):
    ids = tensors()[f"mmu.{case}.input_ids"]
    assert torch.equal(prompting()((ids[:, 2:18], [facts()["mmu_question"]]), "mmu_gen").input_ids, ids)
    new_ids = model.mmu_generate(ids, max_new_tokens=24, top_k=1, eot_token=117)
    assert torch.equal(new_ids[0], tensors()[f"mmu.{case}.new_ids"])


def test_answering_batched(model):
    """Prompts of different lengths, one batch: every row as if alone."""
    a, b = tensors()["mmu.0.input_ids"], tensors()["mmu.1.input_ids"][:, :-2]
    alone = model.mmu_generate(b, max_new_tokens=24, top_k=1, eot_token=117)
    pads = torch.full((1, 2), 118)
    for padded in (torch.cat([pads, b], 1), torch.cat([b, pads], 1)):
        both = model.mmu_generate(torch.cat([a, padded]), max_new_tokens=24, top_k=1, eot_token=117)
        assert torch.equal(both[0], tensors()["mmu.0.new_ids"])
        assert torch.equal(both[1, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("name", ["cosine", "linear", "sigmoid", "pow0.5", "pow2"])
def test_schedules(name):
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(get_mask_schedule(name)(t), tensors()[f"schedule.{name}"], atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def clip_model():
    llm = {"model_type": "phi", "hidden_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 32}
    return tiny_showo(llm_config=llm | {"intermediate_size": 64}, w_clip_vit=True)


@pytest.mark.parametrize("case", ["tuning", "pretrain"])
def test_clip_branch(clip_model, case):
    golden = tensors("clip")
    generator = torch.Generator().manual_seed(12)  # serves both cases in order: features, system ids, text ids
    for name, batch, system_length in (("tuning", 2, 28), ("pretrain", 1, 0)):
        features = torch.randn(batch, 576, 1024, generator=generator)
        system = torch.randint(0, 117, (batch, system_length), generator=generator)
        text = torch.randint(0, 117, (batch, 7), generator=generator)
        if name == case:
            break
    assert features.shape == tuple(golden[f"{case}.features_seed_order"])
    assert torch.equal(features[:, :2], golden[f"{case}.features_head"])
    assert torch.equal(system, golden[f"{case}.system_ids"]) and torch.equal(text, golden[f"{case}.text_ids"])

    def column(token, width=1):
        return torch.full((batch, width), token)

    ids = torch.cat([column(124), system, column(119), column(-200, 576), column(120), text], dim=1)
    logits = clip_model(ids, image_features=features).logits[:, -9:]
    torch.testing.assert_close(logits, golden[f"{case}.logits_tail"], atol=1e-4, rtol=1e-4)
    new_ids = clip_model.mmu_generate(ids[:1], image_features=features[:1], max_new_tokens=12, top_k=1, eot_token=117)
    assert torch.equal(new_ids[0], golden[f"{case}.new_ids"])
