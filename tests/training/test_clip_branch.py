"""LLaVA rows of both branches, and the training of the CLIP-ViT branch (spec §2, §3, §9, §12)."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from llava import SYSTEM_PROMPT, encode_conversation, encode_plain
from models import OmniMask, Showo, UniversalPrompting
from models.images import preprocess
from tests.parity.phi15 import phi15_tokenizer
from tests.training import tiny
from tests.training.tiny import CAPTIONS, NUM_TOKENS, make_trainer, same, weights
from tests.training.tiny import train as run
from tests.training.tiny_sources import CLIP_WIDTH, NUM_FEATURES, clip_settings, turns
from training.batches import BatchBuilder
from training.masking import MaskingNoise
from training.understanding import ClipVitUnderstanding, VqUnderstanding

SYSTEM_LENGTH = 28  # of the system prompt with Phi-1.5's tokenizer
PROJECTOR = [f"mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
ENCODE = {"llava_pretrain": (encode_plain, 1), "llava_tuning": (encode_conversation, 2)}  # and the number of rounds


def conversations(und_type: str, tokenizer, understanding, captions=(CAPTIONS[0], CAPTIONS[7])) -> list[dict]:
    """Samples as the flow gives them."""
    encode, rounds = ENCODE[und_type]
    made = []
    for caption in captions:
        seen = {"image": preprocess(tiny.picture(caption), 32)}
        if understanding.image_processor is not None:
            seen = {"pixel_values": understanding.tower.preprocess([tiny.picture(caption)])[0]}
        made.append(encode(turns(caption, rounds), tokenizer) | seen)
    return made


# ---- rows, with Phi-1.5's tokenizer ----


@pytest.fixture(scope="module")
def clip_understanding(world):
    """und_type → the branch with its tower."""
    made = {}
    for und_type in ENCODE:
        config = tiny.config_of(world, overrides=clip_settings(world, und_type))
        made[und_type] = ClipVitUnderstanding(config)
        made[und_type].open()
        made[und_type].attach(tiny.make_model(config), torch.device("cpu"))
    return made


def row_builder(understanding, max_text_len: int) -> BatchBuilder:
    prompting = UniversalPrompting(phi15_tokenizer(), max_text_len=max_text_len)
    offset = prompting.vocabulary.image_offset
    noise, length = MaskingNoise(lambda t: t, offset + 64, offset, 64), NUM_TOKENS + 3 + max_text_len
    return BatchBuilder(prompting, tiny.make_vq_model(), noise, understanding, length, torch.device("cpu"))


def text_part(item: dict, key: str, room: int, fill: int) -> list[int]:
    """Right-padded and cut."""
    ids = item[key].tolist()[:room]
    return ids + [fill] * (room - len(ids))


@pytest.mark.parametrize(
    ("branch", "und_type", "system_prompt"),
    [
        ("clip", "llava_pretrain", False),
        ("clip", "llava_tuning", True),
        ("codes", "llava_tuning", False),
        ("codes", "llava_tuning", True),
    ],
)
def test_rows_are_those_of_the_specification(world, clip_understanding, branch, und_type, system_prompt):
    """The text of a row is cut after 18 tokens in the CLIP-ViT branch, after 24 or 52 in the other."""
    if branch == "clip":
        understanding, room = clip_understanding[und_type], 18
        builder = row_builder(understanding, NUM_FEATURES - NUM_TOKENS + SYSTEM_LENGTH * system_prompt + room)
    else:
        config = tiny.config_of(world, overrides={"dataset.add_system_prompt": system_prompt})
        understanding, room = VqUnderstanding(config), 24 if system_prompt else 52
        builder = row_builder(understanding, 52)
    tokenizer, vocabulary = builder.prompting.tokenizer, builder.prompting.vocabulary
    samples = conversations(und_type, tokenizer, understanding)
    assert und_type == "llava_pretrain" or room == 52 or min(len(sample["input_ids"]) for sample in samples) > room
    rows, features = understanding.rows(samples, builder)

    system = tokenizer(SYSTEM_PROMPT)["input_ids"] if system_prompt else []
    assert len(system) == SYSTEM_LENGTH * system_prompt
    if branch == "clip":
        pixels, image = torch.stack([sample["pixel_values"] for sample in samples]), [[-200] * NUM_FEATURES] * 2
        assert features.shape == (2, NUM_FEATURES, CLIP_WIDTH) and not torch.equal(features[0], features[1])
        assert torch.equal(features, understanding.tower(pixels))
        expected = OmniMask.mmu_vit(2, len(system), NUM_FEATURES, builder.row_length).dense()
        assert torch.equal(rows.attention_mask.dense(), expected)
    else:
        pixels = torch.stack([sample["image"] for sample in samples])
        image = (builder.vq_model.get_code(pixels) + vocabulary.image_offset).tolist()
        assert features is None
    for row, sample in enumerate(samples):
        head = [vocabulary.mmu_id, *system, vocabulary.soi_id, *image[row], vocabulary.eoi_id]
        assert len(head) + room == builder.row_length == len(rows.input_ids[row])
        assert rows.input_ids[row].tolist() == head + text_part(sample, "input_ids", room, vocabulary.pad_id)
        assert rows.labels[row].tolist() == [-100] * len(head) + text_part(sample, "labels", room, -100)
        assert (rows.labels[row] != -100).any()
    wanted = OmniMask.from_ids(rows.input_ids, vocabulary).dense()
    assert torch.equal(rows.attention_mask.dense(), wanted), "the ids ask for the same"


@pytest.mark.parametrize(("conversation", "expected"), [("vicuna", True), ("chat", False)])
def test_a_chat_template_brings_its_own_system_prompt(world, conversation, expected):
    config = tiny.config_of(world, overrides=clip_settings(world, "llava_tuning", conversation=conversation))
    understanding, prompting = ClipVitUnderstanding(config), tiny.make_prompting(config)
    understanding.open()
    room = config.dataset.preprocessing.max_seq_length + NUM_TOKENS - NUM_FEATURES
    assert (understanding.text_length(config, prompting) < room) == expected


def test_the_model_splices_the_features_and_learns_from_the_text_alone(world, clip_understanding):
    """The loss of a CLIP row is the shifted mean over its text, by hand."""
    config = tiny.config_of(world, overrides=clip_settings(world))
    model, understanding = tiny.make_model(config), clip_understanding["llava_pretrain"]
    builder = tiny.make_builder(config, model, understanding)
    batch = builder({"mmu": conversations("llava_pretrain", builder.prompting.tokenizer, understanding)})
    with torch.no_grad():
        loss = model(**batch.forward_arguments()).loss_mmu
        logits = model(batch.input_ids, batch.attention_mask, image_features=batch.image_features).logits
        batch.image_features[:] = 0
        blind = model(**batch.forward_arguments()).loss_mmu
    eoi = 2 + NUM_FEATURES
    assert (batch.input_ids[:, eoi] == model.vocabulary.eoi_id).all()
    supervised = batch.labels[:, eoi + 1 :] != -100
    by_hand = torch.nn.functional.cross_entropy(logits[:, eoi:-1][supervised], batch.labels[:, eoi + 1 :][supervised])
    torch.testing.assert_close(loss, by_hand)
    assert loss != blind


def test_vq_rows_read_codes_in_place_of_images(world):
    """Both in one batch, as shards of both sorts give them."""
    understanding = VqUnderstanding(tiny.config_of(world))
    builder = row_builder(understanding, 24)
    seen, encoded = conversations("llava_tuning", builder.prompting.tokenizer, understanding)
    both = understanding.rows([seen, encoded], builder)[0].input_ids
    codes = builder.vq_model.get_code(encoded.pop("image")[None])[0]
    assert torch.equal(understanding.rows([seen, encoded | {"codes": codes}], builder)[0].input_ids, both)


# ---- training ----


@pytest.fixture(scope="module")
def vq_run(world, tmp_path_factory):
    """The stage before: a model that has read image codes only."""
    output_dir = tmp_path_factory.mktemp("vq") / "out"
    run(world, output_dir, {"training.max_train_steps": 1, "training.ema_decay": None, "experiment.save_every": 1})
    return output_dir


@pytest.fixture(scope="module")
def pretrained(world, vq_run, tmp_path_factory):
    """Three steps of LLaVA pre-training, from a checkpoint without projector."""
    output_dir = tmp_path_factory.mktemp("pretrain") / "out"
    changes = {"experiment.init_from": vq_run, "training.max_train_steps": 3, "experiment.generate_every": 3}
    return run(world, output_dir, clip_settings(world, **changes)), output_dir


@pytest.mark.slow
def test_pre_training_changes_the_projector_alone_and_keeps_the_other_flows_in_the_batch(pretrained, vq_run):
    trainer, output_dir = pretrained
    before, after = weights(vq_run), weights(output_dir)
    assert same(before, after) and set(after) - set(before) == set(PROJECTOR)
    first, last = (weights(output_dir / f"checkpoint-{step}" / "unwrapped_model") for step in (1, 3))
    assert not any(torch.equal(first[name], last[name]) for name in PROJECTOR)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 4
    lines = tiny.steps_of(output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(4 < line[f"step_loss_{task}"] < 8 for line in lines for task in ("t2i", "lm", "mmu"))
    norms = {key for line in lines for key in line if key.startswith("grad_norm/")}
    assert norms == {f"grad_norm/{name}" for name in PROJECTOR}
    assert len(list((output_dir / "images").iterdir())) == 2, "both panels are drawn in this branch, too"


@pytest.mark.slow
def test_tuning_goes_on_from_pre_training_and_trains_all_but_the_tower(world, tmp_path, pretrained):
    _, start = pretrained
    changes = {"experiment.init_from": start, "lr_scheduler.params.warmup_steps": 0}
    trainer = make_trainer(world, tmp_path, clip_settings(world, "llava_tuning", **changes))
    assert same(dict(trainer.model.named_parameters()), weights(start))
    tower = trainer.task.understanding.tower
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    trainer.train()
    assert same(before, tower.state_dict())
    assert all(p.requires_grad for p in trainer.model.parameters())
    before, after = weights(start), weights(tmp_path)
    assert before.keys() == after.keys(), "the tower is not saved with the model"
    assert not any(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert Showo.from_pretrained(str(tmp_path)).config.clip_feature_size == CLIP_WIDTH


def test_without_mmu_rows_the_projector_is_left_alone(world, tmp_path):
    """All that is trained gets a gradient; DDP waits for the others forever, as it did when the projector was one."""
    changes = {"training.batch_size_mmu": 0, "lr_scheduler.params.warmup_steps": 0}
    changes |= {"optimizer.params.weight_decay": 0.1, "experiment.log_grad_norm_every": 1}
    trainer = make_trainer(world, tmp_path, clip_settings(world, "llava_tuning", **changes))
    before = {name: p.clone() for name, p in trainer.model.mm_projector.named_parameters()}
    trainer.step()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {f"grad_norm/{name}" for name in trained} == trainer.gradient_norms.keys()
    assert same(before, dict(trainer.model.mm_projector.named_parameters()))
    assert len(trained) + len(before) == len(list(trainer.model.parameters()))


@pytest.mark.slow
def test_the_published_way_starts_from_a_checkpoint_of_the_vq_branch(world, tmp_path, vq_run, caplog, capfd):
    shutil.copytree(vq_run / "checkpoint-1", tmp_path / "checkpoint-0")
    trainer = run(world, tmp_path, clip_settings(world))
    (told,) = [record.getMessage() for record in caplog.records if "does not hold" in record.getMessage()]
    assert told.endswith(f"does not hold {', '.join(PROJECTOR)}; initialised at random")
    assert "LOAD REPORT" not in "".join(capfd.readouterr()) + caplog.text
    assert trainer.state.global_step == 2 and same(weights(vq_run), weights(tmp_path))


@pytest.mark.slow
def test_gradient_checkpointing_reaches_the_projector(world, tmp_path, vq_run):
    """With frozen embeddings no input of a block asks for gradients but through the features."""
    changes = {"experiment.init_from": vq_run, "lr_scheduler.params.warmup_steps": 0, "training.max_train_steps": 1}
    for checkpointing in ("false", "true"):
        changes["model.gradient_checkpointing"] = checkpointing
        run(world, tmp_path / checkpointing, clip_settings(world, **changes))
    torch.testing.assert_close(weights(tmp_path / "true"), weights(tmp_path / "false"), rtol=0, atol=1e-6)


# ---- mistakes; the others are in test_mistakes.py ----


def test_only_keys_of_the_projector_may_be_missing(world, tmp_path, vq_run):
    shutil.copytree(vq_run, tmp_path / "damaged", ignore=shutil.ignore_patterns("checkpoint-*"))
    damaged = weights(vq_run)
    damaged.pop("showo.model.final_layernorm.weight")
    save_file(damaged, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing 1 \(showo.model.final_layernorm.weight\)") as error:
        make_trainer(world, tmp_path / "out", clip_settings(world, **{"experiment.init_from": tmp_path / "damaged"}))
    assert "mm_projector" not in str(error.value)


def test_a_projector_is_refused_by_the_vq_branch(world, tmp_path, pretrained):
    """A model with a projector is no start for the branch without one."""
    with pytest.raises(UserError, match="unexpected 4 .mm_projector"):
        make_trainer(world, tmp_path / "out", {"experiment.init_from": pretrained[1]})


@pytest.mark.slow
def test_conversations_whose_answers_lie_behind_the_end_of_the_row_are_skipped(world, tmp_path):
    """The row has room for M + N - features - system prompt tokens, not for M."""
    tuning = clip_settings(world, "llava_tuning")
    ids = tiny.make_prompting(tiny.config_of(world, overrides=tuning)).tokenizer(SYSTEM_PROMPT)["input_ids"]
    tuning["dataset.preprocessing.max_seq_length"] = len(ids) + NUM_FEATURES - NUM_TOKENS + 2
    with pytest.raises(UserError, match="bad_conversation.*no answer within 2 tokens to learn from"):
        run(world, tmp_path / "out", tuning)
