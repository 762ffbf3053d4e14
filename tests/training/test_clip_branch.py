"""LLaVA rows of both branches, and the training of the CLIP-ViT branch (spec §2, §3, §9, §12)."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from llava import SYSTEM_PROMPT, encode_conversation, encode_plain
from models import OmniMask, Showo, UniversalPrompting
from models.images import preprocess
from tests.parity.phi15 import phi15_tokenizer
from tests.training.tiny import (
    CAPTIONS,
    MAX_TEXT,
    NUM_TOKENS,
    config_of,
    make_builder,
    make_model,
    make_prompting,
    make_trainer,
    make_vq_model,
    metrics_of,
    picture,
    write_world,
)
from tests.training.tiny import train as run
from tests.training.tiny_sources import CLIP_WIDTH, NUM_FEATURES, turns, write_clip, write_llava
from training import train_w_clip_vit
from training.batches import BatchBuilder
from training.masking import MaskingNoise
from training.understanding import ClipVitUnderstanding, VqUnderstanding

SYSTEM_LENGTH = 28  # of the system prompt with Phi-1.5's tokenizer
ROOM = 24  # M of the rows looked at


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("world") / "tiny")
    write_llava(folder)
    write_llava(folder, rounds=2)
    write_clip(folder / "clip")
    return folder


def settings(world, und_type="llava_pretrain", **changes) -> dict:
    """What the CLIP-ViT branch needs beyond the tiny world's own settings."""
    rounds = 1 if und_type == "llava_pretrain" else 2
    # The system prompt has some 150 ids in the tiny tokenizer.
    room = MAX_TEXT if und_type == "llava_pretrain" else 256
    return {
        "model.showo.w_clip_vit": True,
        "model.clip_vit_name": world / "clip",
        "dataset.und_type": und_type,
        "dataset.params.train_mmu_shards_path_or_url": world / f"llava_{rounds}.json",
        "dataset.params.train_mmu_image_root": world / "images",
        "dataset.preprocessing.max_seq_length": room,
        "training.max_train_steps": 2,
        "experiment.save_every": 1,
        "experiment.generate_every": 99,
        "training.ema_decay": None,
    } | changes


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---- rows, with Phi-1.5's tokenizer ----


@pytest.fixture(scope="module")
def prompting():
    return UniversalPrompting(phi15_tokenizer(), max_text_len=ROOM)


@pytest.fixture(scope="module")
def clip_understanding(world):
    """und_type → the branch with its tower."""
    made = {}
    for und_type in ("llava_pretrain", "llava_tuning"):
        config = config_of(world, overrides=settings(world, und_type))
        made[und_type] = ClipVitUnderstanding(config)
        made[und_type].open()
        made[und_type].attach(make_model(config), torch.device("cpu"))
    return made


def row_builder(prompting, understanding) -> BatchBuilder:
    vocabulary = prompting.vocabulary
    noise = MaskingNoise(lambda t: t, vocabulary.image_offset + 64, vocabulary.image_offset, 64)
    length = NUM_TOKENS + 3 + prompting.max_text_len
    return BatchBuilder(prompting, make_vq_model(), noise, understanding, length, torch.device("cpu"))


def items(encode, rounds: int, tokenizer, understanding=None) -> list[dict]:
    """Two samples as the flow gives them."""
    made = []
    for caption in (CAPTIONS[0], CAPTIONS[7]):
        encoded = encode(turns(caption, rounds), tokenizer)
        if understanding is None:
            made.append({"image": preprocess(picture(caption), 32)} | encoded)
        else:
            made.append({"pixel_values": understanding.tower.preprocess([picture(caption)])[0]} | encoded)
    return made


def text_part(item: dict, key: str, room: int, fill: int) -> list[int]:
    """Right-padded and cut."""
    ids = item[key].tolist()[:room]
    return ids + [fill] * (room - len(ids))


@pytest.mark.parametrize(
    ("und_type", "encode", "rounds"), [("llava_pretrain", encode_plain, 1), ("llava_tuning", encode_conversation, 2)]
)
def test_clip_rows_are_those_of_the_specification(clip_understanding, und_type, encode, rounds):
    """M is chosen so that the text of one of the two rows is cut."""
    system_length = SYSTEM_LENGTH if und_type == "llava_tuning" else 0
    prompting = UniversalPrompting(phi15_tokenizer(), max_text_len=NUM_FEATURES - NUM_TOKENS + system_length + 18)
    understanding, vocabulary = clip_understanding[und_type], prompting.vocabulary
    builder = row_builder(prompting, understanding)
    samples = items(encode, rounds, prompting.tokenizer, understanding)
    rows, features = understanding.rows(samples, builder)

    length = NUM_TOKENS + 3 + prompting.max_text_len
    assert rows.input_ids.shape == rows.labels.shape == (2, length)
    assert features.shape == (2, NUM_FEATURES, CLIP_WIDTH)
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    assert torch.equal(features, understanding.tower(pixels)) and not torch.equal(features[0], features[1])
    system = prompting.tokenizer(SYSTEM_PROMPT)["input_ids"] if system_length else []
    assert len(system) == system_length
    head = [vocabulary.mmu_id, *system, vocabulary.soi_id, *[-200] * NUM_FEATURES, vocabulary.eoi_id]
    room = length - len(head)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert room == 18 and (und_type == "llava_pretrain" or min(lengths) > room), "tuning rows are cut here"
    for row, sample in enumerate(samples):
        pad = vocabulary.pad_id
        assert rows.input_ids[row].tolist() == head + text_part(sample, "input_ids", room, pad)
        assert rows.labels[row].tolist() == [-100] * len(head) + text_part(sample, "labels", room, -100)
        assert (rows.labels[row] != -100).any()
    expected = OmniMask.mmu_vit(2, system_length, NUM_FEATURES, length).dense()
    assert torch.equal(rows.attention_mask.dense(), expected)
    assert torch.equal(expected, OmniMask.from_ids(rows.input_ids, vocabulary).dense()), "the ids ask for the same"


@pytest.mark.parametrize(("conversation", "expected"), [("vicuna", True), ("chat", False)])
def test_a_chat_template_brings_its_own_system_prompt(world, conversation, expected):
    config = config_of(world, overrides=settings(world, "llava_tuning", conversation=conversation))
    understanding, prompting = ClipVitUnderstanding(config), make_prompting(config)
    understanding.open()
    room = config.dataset.preprocessing.max_seq_length + NUM_TOKENS - NUM_FEATURES
    assert (understanding.text_length(config, prompting) < room) == expected


def test_the_model_splices_the_features_and_learns_from_the_text_alone(world, clip_understanding):
    """The loss of a CLIP row is the shifted mean over its text, by hand."""
    config = config_of(world, overrides=settings(world))
    model, understanding = make_model(config), clip_understanding["llava_pretrain"]
    builder = make_builder(config, model, make_vq_model(), make_prompting(config), understanding, torch.device("cpu"))
    batch = builder({"mmu": items(encode_plain, 1, builder.prompting.tokenizer, understanding)})
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


@pytest.mark.parametrize("system_prompt", [False, True])
def test_vq_rows_take_the_system_prompt_after_the_task_token(world, prompting, system_prompt):
    """With it the row keeps its length: 28 tokens less of text."""
    config = config_of(world, overrides={"dataset.add_system_prompt": system_prompt})
    understanding, vocabulary = VqUnderstanding(config), prompting.vocabulary
    longer = UniversalPrompting(phi15_tokenizer(), max_text_len=ROOM + SYSTEM_LENGTH)
    builder = row_builder(longer, understanding)
    samples = items(encode_conversation, 2, prompting.tokenizer)
    rows, features = understanding.rows(samples, builder)
    assert features is None and rows.input_ids.shape == (2, NUM_TOKENS + 3 + ROOM + SYSTEM_LENGTH)
    system = prompting.tokenizer(SYSTEM_PROMPT)["input_ids"] if system_prompt else []
    codes = make_vq_model().get_code(torch.stack([sample["image"] for sample in samples])) + vocabulary.image_offset
    room = ROOM if system_prompt else ROOM + SYSTEM_LENGTH
    for row, sample in enumerate(samples):
        head = [vocabulary.mmu_id, *system, vocabulary.soi_id, *codes[row].tolist(), vocabulary.eoi_id]
        text = text_part(sample, "input_ids", room, vocabulary.pad_id)
        assert rows.input_ids[row].tolist() == head + text
        assert rows.labels[row].tolist() == [-100] * len(head) + text_part(sample, "labels", room, -100)
        assert (rows.labels[row] != -100).any()
    wanted = OmniMask.from_ids(rows.input_ids, vocabulary).dense()
    assert torch.equal(rows.attention_mask.dense(), wanted)


def test_vq_rows_read_codes_in_place_of_images(world, prompting):
    """Both in one batch, as shards of both sorts give them."""
    understanding = VqUnderstanding(config_of(world))
    builder = row_builder(prompting, understanding)
    seen, encoded = items(encode_conversation, 1, prompting.tokenizer)
    both = understanding.rows([seen, encoded], builder)[0].input_ids
    codes = make_vq_model().get_code(encoded.pop("image")[None])[0]
    assert torch.equal(understanding.rows([seen, encoded | {"codes": codes}], builder)[0].input_ids, both)


# ---- training ----


@pytest.fixture(scope="module")
def vq_run(world, tmp_path_factory):
    """The stage before: a model that has read image codes only."""
    output_dir = tmp_path_factory.mktemp("vq") / "out"
    changes = {"training.max_train_steps": 1, "training.ema_decay": None, "experiment.generate_every": 99}
    run(world, output_dir, changes | {"experiment.save_every": 1})
    return output_dir


@pytest.fixture(scope="module")
def pretrained(world, vq_run, tmp_path_factory):
    """Three steps of LLaVA pre-training, from a checkpoint without projector."""
    output_dir = tmp_path_factory.mktemp("pretrain") / "out"
    changes = {"experiment.init_from": vq_run, "training.max_train_steps": 3, "experiment.generate_every": 3}
    trainer = run(world, output_dir, settings(world, **changes))
    return trainer, output_dir


@pytest.mark.slow
def test_pre_training_changes_the_projector_alone(pretrained, vq_run):
    trainer, output_dir = pretrained
    before, after = weights(vq_run), weights(output_dir)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    projector = set(after) - set(before)
    assert projector == {f"mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    first, last = (weights(output_dir / f"checkpoint-{step}" / "unwrapped_model") for step in (1, 3))
    assert not any(torch.equal(first[name], last[name]) for name in projector)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == projector
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 4


def test_pre_training_keeps_the_other_flows_in_the_batch(pretrained):
    _, output_dir = pretrained
    lines = [line for line in metrics_of(output_dir) if "lr" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert all(4 < line[f"step_loss_{task}"] < 8 for task in ("t2i", "lm", "mmu"))
    norms = [line for line in metrics_of(output_dir) if any(key.startswith("grad_norm/") for key in line)]
    assert {key for line in norms for key in line if key.startswith("grad_norm/")} == {
        f"grad_norm/mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert len(list((output_dir / "images").iterdir())) == 2, "both panels are drawn in this branch, too"


def test_the_losses_of_other_flows_are_those_without_the_clip_rows(world, pretrained):
    trainer, _ = pretrained
    batch = {name: next(flow) for name, flow in trainer.flows.items()}
    torch.manual_seed(4)
    whole = trainer.task.builder(batch)
    torch.manual_seed(4)
    others = trainer.task.builder({name: batch[name] for name in ("t2i", "lm")})
    with torch.no_grad():
        out, alone = (trainer.model(**b.forward_arguments()) for b in (whole, others))
    torch.testing.assert_close(out.loss_t2i, alone.loss_t2i)
    torch.testing.assert_close(out.loss_lm, alone.loss_lm)
    assert alone.loss_mmu == 0 < out.loss_mmu


@pytest.mark.slow
def test_tuning_goes_on_from_pre_training_and_trains_all_but_the_tower(world, tmp_path, pretrained):
    _, start = pretrained
    tuning = settings(world, "llava_tuning", **{"experiment.init_from": start, "lr_scheduler.params.warmup_steps": 0})
    trainer = make_trainer(world, tmp_path, tuning)
    assert all(torch.equal(p, weights(start)[name]) for name, p in trainer.model.named_parameters())
    tower = trainer.task.understanding.tower
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    assert all(p.requires_grad for p in trainer.model.parameters())
    before, after = weights(start), weights(tmp_path)
    assert before.keys() == after.keys(), "the tower is not saved with the model"
    unchanged = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert not unchanged
    assert Showo.from_pretrained(str(tmp_path)).config.clip_feature_size == CLIP_WIDTH


def test_without_mmu_rows_the_projector_is_left_alone(world, tmp_path):
    """All that is trained gets a gradient; DDP waits for the others forever, as it did when the projector was one."""
    changes = {
        "training.batch_size_mmu": 0,
        "lr_scheduler.params.warmup_steps": 0,
        "optimizer.params.weight_decay": 0.1,
    }
    changes |= {"experiment.log_grad_norm_every": 1}
    trainer = make_trainer(world, tmp_path, settings(world, "llava_tuning", **changes))
    before = {name: p.clone() for name, p in trainer.model.mm_projector.named_parameters()}
    trainer.step()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {f"grad_norm/{name}" for name in trained} == trainer.gradient_norms.keys()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.mm_projector.named_parameters())
    assert len(trained) + len(before) == len(list(trainer.model.parameters()))


@pytest.mark.slow
def test_the_published_way_starts_from_a_checkpoint_of_the_vq_branch(world, tmp_path, vq_run, caplog, capfd):
    shutil.copytree(vq_run / "checkpoint-1", tmp_path / "checkpoint-0")
    trainer = run(world, tmp_path, settings(world))
    (told,) = [record.getMessage() for record in caplog.records if "does not hold" in record.getMessage()]
    names = ", ".join(f"mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
    assert told.endswith(f"does not hold {names}; initialised at random")
    assert "LOAD REPORT" not in "".join(capfd.readouterr()) + caplog.text
    assert trainer.state.global_step == 2
    assert all(torch.equal(tensor, weights(tmp_path)[name]) for name, tensor in weights(vq_run).items())


def test_only_keys_of_the_projector_may_be_missing(world, tmp_path, vq_run):
    shutil.copytree(vq_run, tmp_path / "damaged", ignore=shutil.ignore_patterns("checkpoint-*"))
    damaged = weights(vq_run)
    damaged.pop("showo.model.final_layernorm.weight")
    save_file(damaged, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    start = {"experiment.init_from": tmp_path / "damaged"}
    with pytest.raises(UserError, match=r"missing 1 \(showo.model.final_layernorm.weight\)") as error:
        make_trainer(world, tmp_path / "out", settings(world, **start))
    assert "mm_projector" not in str(error.value) and not (tmp_path / "out").exists()


def test_half_a_projector_is_refused_by_the_vq_branch(world, tmp_path, pretrained):
    """A model with a projector is no start for the branch without one."""
    with pytest.raises(UserError, match="unexpected 4 .mm_projector"):
        make_trainer(world, tmp_path / "out", {"experiment.init_from": pretrained[1]})


@pytest.mark.slow
def test_gradient_checkpointing_reaches_the_projector(world, tmp_path, vq_run):
    """With frozen embeddings no input of a block asks for gradients but through the features."""
    changes = {"experiment.init_from": vq_run, "lr_scheduler.params.warmup_steps": 0, "training.max_train_steps": 1}
    folders = []
    for checkpointing in (False, True):
        folders.append(tmp_path / str(checkpointing))
        run(world, folders[-1], settings(world, **changes, **{"model.gradient_checkpointing": checkpointing}))
    one, other = map(weights, folders)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_continuing_equals_an_uninterrupted_run(world, tmp_path, vq_run):
    """With what pre-training needs: the frozen part comes back, too."""
    changes = settings(world, **{"experiment.init_from": vq_run, "training.max_train_steps": 3})
    run(world, tmp_path / "whole", changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(tmp_path / "parts" / name)
    run(world, tmp_path / "parts", changes)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.showo.w_clip_vit": False}, "w_clip_vit is false; set it to true, or train with training/train.py"),
        ({"dataset.und_type": "captioning"}, "und_type is 'captioning'; with CLIP-ViT it must be llava_pretrain or"),
        ({"training.batch_size_mmu": 0}, "llava_pretrain trains mm_projector alone, but training.batch_size_mmu is 0"),
        ({"model.clip_vit_name": "/nowhere/clip"}, "/nowhere/clip"),
        ({"dataset.params.train_mmu_image_root": "/nowhere/images"}, "train_mmu_image_root.*/nowhere/images"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(world, tmp_path, changes, message):
    given = [f"{k}={v}".replace("=None", "=null") for k, v in (settings(world) | changes).items()]
    with pytest.raises(UserError, match=message) as error:
        train_w_clip_vit.main([f"config={world / 'train.yaml'}", f"output_dir={tmp_path / 'out'}", *given])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_missing_data_is_named_before_clip_is_looked_for(world, tmp_path):
    gone = {"model.clip_vit_name": "/nowhere/clip", "dataset.params.train_mmu_shards_path_or_url": "/nowhere/a.json"}
    with pytest.raises(UserError, match="do not exist: /nowhere/a.json"):
        make_trainer(world, tmp_path / "out", settings(world, **gone))


def test_a_folder_without_an_image_processor_is_refused(world, tmp_path):
    shutil.copytree(world / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="no image processor"):
        make_trainer(world, tmp_path / "out", settings(world, **{"model.clip_vit_name": tmp_path / "clip"}))


@pytest.mark.parametrize(("und_type", "room"), [("llava_pretrain", 3), ("llava_tuning", 30)])
def test_a_row_without_room_for_text_is_refused_before_a_step_is_taken(world, tmp_path, und_type, room):
    changes = settings(world, und_type, **{"dataset.preprocessing.max_seq_length": room})
    changes |= {"model.showo.num_vq_tokens": 4, "dataset.preprocessing.resolution": 16}
    with pytest.raises(UserError, match=f"max_seq_length is {room}: 9 image positions and .* leave no room for text"):
        run(world, tmp_path / "out", changes)
    assert not (tmp_path / "out").exists()


def test_a_system_prompt_that_leaves_no_room_is_refused_in_the_vq_branch(world, tmp_path):
    llava = {
        "dataset.und_type": "llava_tuning",
        "dataset.add_system_prompt": True,
        "dataset.params.train_mmu_shards_path_or_url": world / "llava_2.json",
        "dataset.params.train_mmu_image_root": world / "images",
    }
    with pytest.raises(UserError, match=f"max_seq_length is {MAX_TEXT}: .* leave no room for text; raise it by"):
        make_trainer(world, tmp_path / "out", llava)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_conversations_whose_answers_lie_behind_the_end_of_the_row_are_skipped(world, tmp_path):
    """The row has room for M + N - features - system prompt tokens, not for M."""
    tuning = settings(world, "llava_tuning")
    ids = make_trainer(world, tmp_path / "out", tuning).task.builder.prompting.tokenizer(SYSTEM_PROMPT)["input_ids"]
    tuning["dataset.preprocessing.max_seq_length"] = len(ids) + NUM_FEATURES - NUM_TOKENS + 2
    with pytest.raises(UserError, match="bad_conversation.*no answer within 2 tokens to learn from"):
        run(world, tmp_path / "out", tuning)
