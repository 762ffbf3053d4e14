"""`Showo`: masks, losses, image features, configurations, new starts (spec §4, §5). Goldens: tests/parity."""

from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoModel, PhiConfig, PhiForCausalLM

from benchmarks import published
from common.errors import UserError
from models import OmniMask, Showo, ShowoConfig
from models.vocabulary import Vocabulary
from tests.parity.goldens import fill_, tiny_showo
from training import loss as training_loss
from training.loss import Objective

COUNTS = {"batch_size_t2i": 3, "batch_size_lm": 2, "batch_size_mmu": 2}
LOSSES = {**COUNTS, "max_seq_length": 12}
TINY_LLM = {"model_type": "phi", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_LLM |= {"intermediate_size": 48, "max_position_embeddings": 256}
CLIP_SIZE = 24


@contextmanager
def calls_of(module: torch.nn.Module):
    """Shapes that go into a module while the block runs."""
    shapes = []
    handle = module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        handle.remove()


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---- attention back ends and masks ----


@torch.no_grad()
def test_a_back_end_may_be_changed(model, batch):
    ids, _, mask = batch
    changed = tiny_showo()
    changed.set_attn_implementation("eager")
    assert changed.showo.config._attn_implementation == "eager"
    same(changed(ids, mask).logits, model(ids, mask).logits)


@pytest.mark.slow  # compiles the kernel with g++
@torch.no_grad()
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # its CPU code for sizes that change does not compile
def test_flex_attention_turns_a_tensor_mask_into_blocks(model, batch):
    ids, _, mask = batch
    torch._dynamo.reset()  # so that no earlier test's sizes make ours dynamic
    same(tiny_showo(attn_implementation="flex_attention")(ids, mask.dense()).logits, model(ids, mask).logits)


@pytest.mark.gpu  # FlexAttention has no backward on a CPU
def test_flex_attention_gradients_equal_sdpa(batch):
    ids, labels, mask = (part.to("cuda") for part in batch)
    gradients = []
    for implementation in ("sdpa", "flex_attention"):
        model = tiny_showo(attn_implementation=implementation).to("cuda")
        out = model(ids, mask, labels=labels, **LOSSES)
        (out.loss_t2i + out.loss_lm + out.loss_mmu).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    same(gradients[0], gradients[1], 1e-3)


@torch.no_grad()
def test_mask_spellings_agree(model, batch):
    ids, _, mask = batch
    expected = model(ids, mask).logits
    assert torch.equal(model(ids, mask.dense()).logits, expected)
    assert torch.equal(model(ids).logits, expected)  # read off the ids
    assert not torch.allclose(model(ids, OmniMask.lm(*ids.shape)).logits, expected, atol=1e-2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda mask: mask.dense().long(),
        lambda mask: mask.dense()[:, 0],
        lambda mask: mask.dense()[:, 0, 0],  # the 2-D padding mask of other models
        lambda mask: mask.dense()[:1],
        lambda mask: mask.dense()[:, :, :-1],
        lambda mask: mask.dense()[..., :-1],
        lambda mask: mask.dense().expand(-1, 4, -1, -1),
        lambda mask: mask.select(slice(2)),
        lambda mask: mask.window(1),
        lambda mask: mask.extend(2),
    ],
)
def test_masks_that_do_not_fit_are_refused(model, spoil, batch):
    ids, _, mask = batch
    with calls_of(model.showo.model.layers[0]) as calls, pytest.raises(ValueError, match="attention_mask"):
        model(ids, spoil(mask))
    assert not calls


@pytest.mark.filterwarnings("error::FutureWarning")
@torch.no_grad()
def test_nothing_is_called_by_a_name_that_transformers_will_drop(model, batch):
    model(batch[0], batch[2])
    model.mmu_generate(batch[0][:1], max_new_tokens=2)


def test_train_mode_has_no_dropout(batch):
    ids, _, mask = batch
    model = tiny_showo()
    with torch.no_grad():
        assert torch.equal(model(ids, mask).logits, model.train()(ids, mask).logits)


# ---- losses ----


def objective_of(labels, **settings) -> Objective:
    return Objective.from_labels(labels, tuple(COUNTS.values()), LOSSES["max_seq_length"], **settings)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_equal_those_of_the_whole_head(batch, label_smoothing):
    ids, labels, mask = batch
    models = tiny_showo(), tiny_showo()
    out = models[0](ids, mask, objective_of(labels, label_smoothing=label_smoothing))
    ours = (out.loss_t2i, out.loss_lm, out.loss_mmu)
    theirs = published.losses(models[1], ids, mask, labels, tuple(COUNTS.values()), 12, label_smoothing)
    for parts in (ours, theirs):
        (parts[0] + 0.1 * parts[1] + parts[2]).backward()
    same(torch.stack(ours), torch.stack(theirs))
    same(*(torch.cat([p.grad.flatten() for p in model.parameters()]) for model in models), 1e-4)


def test_the_head_runs_at_supervised_positions_only(model, batch, monkeypatch):
    ids, labels, mask = batch
    supervised = [int((part != -100).sum()) for part in (labels[:3, 13:], labels[3:5, 1:], labels[5:, 1:])]
    shapes, linear = [], training_loss.F.linear
    monkeypatch.setattr(training_loss.F, "linear", lambda x, w, b: (shapes.append(x.shape), linear(x, w, b))[1])
    hidden = torch.randn(*ids.shape, 64)  # of layers that are not what is counted
    monkeypatch.setattr(model, "hidden_states", lambda *args, **settings: hidden)
    with torch.no_grad():
        assert model(ids, mask, labels=labels, **LOSSES).logits is None
        assert shapes == [(count, 64) for count in supervised] and sum(supervised) < ids.numel() / 2
        model(ids, mask, objective_of(labels, coefficients={"t2i": 1, "lm": 0.1, "mmu": 1}))
    assert shapes[3:] == [(sum(supervised), 64)], "all tasks at once where they make one loss"


@torch.no_grad()
def test_any_function_of_the_model_can_be_an_objective(model, batch):
    """So that other losses run inside `forward`, where distributed training needs them."""
    ids, _, mask = batch
    out = model(ids, mask, lambda model, ids, mask, _: model.hidden_states(ids, mask).mean())
    assert torch.equal(out, model.hidden_states(ids, mask).mean())


@torch.no_grad()
def test_embeddings_in_place_of_ids(model, batch):
    ids, _, mask = batch
    expected = model.hidden_states(ids, mask)
    assert torch.equal(model.hidden_states(inputs_embeds=model.embed(ids), attention_mask=mask), expected)
    with pytest.raises(ValueError, match="attention_mask is missing"):
        model.hidden_states(ids)


def test_t2i_loss_counts_soi_and_eoi_unshifted(model, batch):
    """Faithful (spec §5): with no image label at all, `<soi>` and `<eoi>` are still predicted from themselves."""
    ids, labels, mask = batch
    ids, labels, mask = ids[:1], labels[:1].clone(), mask.select([0])
    labels[:, 14:-1] = -100
    with torch.no_grad():
        loss = model(ids, mask, labels=labels, batch_size_t2i=1, max_seq_length=12).loss_t2i
        log_probabilities = model(ids, mask).logits[0].log_softmax(-1)
    same(loss, -(log_probabilities[13, 119] + log_probabilities[30, 120]) / 2)


TASKS = ("t2i", "lm", "mmu")
SLICES = {"t2i": slice(0, 3), "lm": slice(3, 5), "mmu": slice(5, 7)}


@pytest.mark.parametrize("task", TASKS)
def test_absent_tasks_give_exactly_zero(batch, task):
    ids, labels = (part[SLICES[task]] for part in batch[:2])
    mask = batch[2].select(SLICES[task])
    model = tiny_showo()
    out = model(ids, mask, labels=labels, **{f"batch_size_{task}": len(ids)}, max_seq_length=12)
    for other in TASKS:
        loss = getattr(out, f"loss_{other}")
        assert loss.shape == () and (loss.item() == 0.0) == (other != task)
    (out.loss_t2i + out.loss_lm + out.loss_mmu).backward()
    together = tiny_showo()
    getattr(together(*batch[::2], labels=batch[1], **LOSSES), f"loss_{task}").backward()
    for ours, alone in zip(model.parameters(), together.parameters(), strict=True):
        assert ours.grad.isfinite().all()
        same(ours.grad, alone.grad, 1e-4)


def test_rows_without_any_label_give_zero(batch):
    ids, labels, mask = batch
    model = tiny_showo()
    out = model(ids, mask, labels=torch.full_like(labels, -100), **LOSSES)
    losses = torch.stack([out.loss_t2i, out.loss_lm, out.loss_mmu])
    assert losses.tolist() == [0.0] * 3
    losses.sum().backward()
    assert not model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("counts", [(3, 2, 1), (7, 1, 0), (0, 0, 0)])
def test_row_counts_must_add_up(model, batch, counts):
    ids, labels, mask = batch
    given = dict(zip(COUNTS, counts, strict=True))
    with pytest.raises(ValueError, match=r"but there are 7 rows"):
        model(ids, mask, labels=labels, **given)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16(batch, implementation, autocast):
    """Under autocast, with fp32 weights and gradients, or with weights in bf16."""
    ids, labels, mask = batch
    model = tiny_showo(attn_implementation=implementation, w_clip_vit=True, clip_feature_size=CLIP_SIZE)
    reference = model(ids, mask, labels=labels, **LOSSES)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(ids, mask, labels=labels, **LOSSES)
        features = torch.randn(1, 5, CLIP_SIZE).bfloat16()
        assert model(clip_row(5), image_features=features).logits.isfinite().all()
    (out.loss_t2i + out.loss_lm + out.loss_mmu).backward()
    for task in TASKS:
        loss = getattr(out, f"loss_{task}")
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, getattr(reference, f"loss_{task}"), atol=0.1, rtol=0.03)
    dtype = torch.float32 if autocast else torch.bfloat16
    assert all(p.dtype == p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.showo.parameters())


# ---- image features ----


def clip_row(num_features: int, text: int = 4) -> torch.Tensor:
    """`<mmu>` and an image of `num_features` placeholders, then text."""
    return torch.tensor([[124, 119, *[-200] * num_features, 120, *range(5, 5 + text)]])


def test_features_are_projected_and_spliced_in_order(clip_model):
    ids = torch.cat([clip_row(3, text=5), clip_row(3, text=5).roll(1)])  # not the same places in both rows
    features = torch.randn(2, 3, CLIP_SIZE)
    embeds, is_feature = clip_model.embed(ids, features), ids == -200
    same(embeds[is_feature], clip_model.mm_projector(features.flatten(0, 1)))
    same(embeds[~is_feature], clip_model.get_input_embeddings()(ids[~is_feature]))


def test_gradients_reach_the_projector(clip_model):
    ids = clip_row(5)
    clip_model.zero_grad()
    labels = ids.where((ids >= 0) & (ids < 118), -100)
    clip_model(ids, labels=labels, batch_size_mmu=1, image_features=torch.randn(1, 5, CLIP_SIZE)).loss_mmu.backward()
    assert all(layer.weight.grad.any() for layer in (clip_model.mm_projector[0], clip_model.mm_projector[2]))


def test_features_beside_rows_without_any(clip_model, batch):
    """One batch: t2i and lm rows without features, mmu rows with them; each row as if alone."""
    ids, _, _ = batch
    clip_ids = clip_row(9, text=ids.shape[1] - 12).repeat(2, 1)
    features = torch.randn(2, 9, CLIP_SIZE)
    with torch.no_grad():
        together = clip_model(torch.cat([ids[:5], clip_ids]), image_features=features).logits
        same(together[:5], clip_model(ids[:5]).logits)
        alone = [clip_model(clip_ids[:1], image_features=one[None]).logits for one in features]
    same(together[5:], torch.cat(alone))
    assert not torch.allclose(alone[0][:, -1], alone[1][:, -1])  # the text sees them


TORN = torch.cat([clip_row(4, text=4), clip_row(6, text=2)])  # the right total, but one image over two rows


@pytest.mark.parametrize(
    ("ids", "features", "message"),
    [
        (clip_row(5), torch.randn(1, 4, CLIP_SIZE), "room for 5 image features"),
        (clip_row(5), torch.randn(2, 5, CLIP_SIZE), "room for 5 image features .* got 10"),
        (clip_row(5), None, "room for 5 image features .* got 0"),
        (clip_row(0), torch.randn(1, 5, CLIP_SIZE), "room for 0 image features .* got 5"),
        (TORN, torch.randn(2, 5, CLIP_SIZE), "row 0 does not hold whole images: each has 5 features"),
    ],
)
def test_number_of_features_is_checked_before_anything_runs(model, clip_model, ids, features, message):
    with pytest.raises(ValueError, match="w_clip_vit=True"):
        model(clip_row(5), image_features=torch.randn(1, 5, 1024))
    with calls_of(clip_model.mm_projector) as projected, calls_of(clip_model.showo.model.layers[0]) as computed:
        with pytest.raises(ValueError, match=message):
            clip_model(ids, image_features=features)
    assert not projected and not computed


# ---- configuration ----


def test_the_default_is_phi_1_5_without_network():
    phi = ShowoConfig().backbone_config()
    expected = {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 8192}
    expected |= {"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "vocab_size": 58498}
    expected |= {"qk_layernorm": True, "tie_word_embeddings": False}
    expected["hidden_act"] = "gelu_pytorch_tanh"  # the same formula in one operation
    assert {key: getattr(phi, key) for key in expected} == expected
    assert (phi.rope_parameters["rope_theta"], phi.rope_parameters["partial_rotary_factor"]) == (10000.0, 0.5)
    assert ShowoConfig().vocabulary == Vocabulary()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 58499}, "vocab_size is 58499, .* = 58498"),
        ({"llm_vocab_size": 50257}, "vocab_size is 58498, .* = 58460"),
        ({"mask_token_id": 58496}, "mask_token_id is 58496; the mask token is vocab_size - 1 = 58497"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ShowoConfig(**settings)


# ---- saving, loading, resizing ----


def assert_equal_states(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def small_config(**overrides) -> ShowoConfig:
    sizes = {"vocab_size": 193, "llm_vocab_size": 118, "codebook_size": 64, "num_vq_tokens": 16}
    return ShowoConfig(llm_config=TINY_LLM | overrides.pop("llm", {}), **sizes | overrides)


@pytest.mark.parametrize("settings", [{}, {"w_clip_vit": True}, {"llm": {"tie_word_embeddings": True}}])
def test_save_and_load(settings, tmp_path):
    model = fill_(Showo(small_config(**settings)))
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ShowoConfig
    assert config.backbone_config().to_dict() == model.config.backbone_config().to_dict()
    for loaded in (Showo.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is Showo and not loaded.training
        assert_equal_states(loaded.state_dict(), model.state_dict())
        weights = loaded.showo.model.embed_tokens.weight, loaded.showo.lm_head.weight
        assert (weights[0] is weights[1]) == bool(settings.get("llm"))


def test_loading_chooses_dtype_and_back_end(tmp_path):
    Showo(small_config()).bfloat16().save_pretrained(tmp_path)
    assert Showo.from_pretrained(tmp_path).dtype == torch.float32
    assert Showo.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert Showo.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16
    eager = Showo.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.showo.config._attn_implementation == "eager"


def test_resize_on_load_keeps_old_rows_and_draws_new_ones(tmp_path):
    old = fill_(Showo(small_config()))
    old.save_pretrained(tmp_path)
    larger = {"vocab_size": 641, "codebook_size": 512}
    for settings in ({"config": small_config(**larger)}, larger):
        model = Showo.from_pretrained(tmp_path, **settings)
        assert model.config.mask_token_id == 640
        for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
            before, after = old.showo.get_parameter(name), model.showo.get_parameter(name)
            assert torch.equal(after[:193], before) and len(after) == 641
            assert abs(after[193:].std().item() - (0.0 if "bias" in name else 0.02)) < 0.002
    smaller = Showo.from_pretrained(tmp_path, vocab_size=161, codebook_size=32)
    assert torch.equal(smaller.showo.lm_head.weight, old.showo.lm_head.weight[:161])


# ---- a new start from a language model ----


@pytest.fixture
def llm_folder(tmp_path):
    """A Phi that stores 130 rows, 12 more than its 118 words, in fp16, without QK norms, as Phi-1.5 does."""
    llm = fill_(PhiForCausalLM(PhiConfig(**TINY_LLM, vocab_size=130))).half()
    llm.save_pretrained(tmp_path / "llm")
    return llm, tmp_path / "llm"


@pytest.mark.parametrize("w_clip_vit", [False, True])
def test_new_start(llm_folder, w_clip_vit):
    llm, folder = llm_folder
    sizes = {"vocab_size": 641, "llm_vocab_size": 118, "codebook_size": 512, "num_vq_tokens": 16}
    config = ShowoConfig(llm_model_path=str(folder), w_clip_vit=w_clip_vit, **sizes)
    model = Showo.from_llm(config)
    ours = model.state_dict()
    for name, tensor in llm.state_dict().items():
        new = ours.pop(f"showo.{name}")
        assert torch.equal(new[: len(tensor)], tensor.float()), name  # in fp32; spare rows 118…129 kept
        if "embed_tokens" in name or "lm_head" in name:
            assert len(new) == 641 and abs(float(new[130:].std()) - (0.0 if "bias" in name else 0.02)) < 0.002
            assert "bias" in name or not torch.equal(new[130:].half().float(), new[130:])  # sampled in fp32
    norms = {name: tensor for name, tensor in ours.items() if "_layernorm" in name}
    assert len(norms) == 2 * 2 * 2  # weight and bias of q and k in two layers
    assert all((tensor == (1.0 if name.endswith("weight") else 0.0)).all() for name, tensor in norms.items())
    assert all("mm_projector" in name for name in ours.keys() - norms.keys())
    assert bool(ours.keys() - norms.keys()) == w_clip_vit


def test_new_starts_that_are_refused(llm_folder):
    _, folder = llm_folder
    for llm, path, message in (
        ({"intermediate_size": 64}, str(folder), "mis-shaped .*fc1.bias"),
        ({"num_hidden_layers": 3}, str(folder), "missing .*layers.2"),
        ({}, "no/such/folder", "no/such/folder.*folder"),
    ):
        with pytest.raises(UserError, match=message):
            Showo.from_llm(small_config(llm=llm), path)


def test_where_the_t2i_loss_starts_is_read_off_the_rows(model, batch):
    ids, labels, mask = batch
    given = model(ids, mask, labels=labels, **LOSSES)
    found = model(ids, mask, labels=labels, **COUNTS)
    assert torch.equal(given.loss_t2i, found.loss_t2i) and given.loss_t2i > 1, "not 0, as behind the last position"
    for wrong in (128, ids.shape[1] - 1, -1):
        with pytest.raises(ValueError, match=f"max_seq_length is {wrong}, but the rows have {ids.shape[1]} positions"):
            model(ids, mask, labels=labels, **COUNTS, max_seq_length=wrong)
    with pytest.raises(ValueError, match="each t2i row needs one <soi>, all at one position"):
        model(ids, mask, labels=labels, batch_size_t2i=len(ids))
