"""The training loop of an image tokenizer: losses, moving average, checkpoints that resume exactly."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from common.config import resolve_path
from common.errors import UserError
from common.tracking import Tracker
from models.modeling_magvitv2 import MAGVITv2, MAGVITv2Config, MAGVITv2Output
from training.checkpointing import (
    TrainState,
    describe_last_checkpoint,
    find_resume,
    load_checkpoint,
    save_checkpoint,
    save_final_model,
)
from training.guards import StopSignals, check_writable, only_run_in
from training.optimization import WeightAverage, make_optimizer, make_schedule
from training.perceptual import PerceptualLoss
from training.processes import ProcessGroup
from training.tokenizer_data import (
    CachedImages,
    StreamedImages,
    augment,
    find_shards,
    generator_for,
    load_images,
)
from training.tokenizer_eval import evaluate, side_by_side, to_pixels, use_of
from training.tokenizer_losses import code_entropies, commitment_loss, edge_loss


def build_model(config: DictConfig) -> MAGVITv2:
    """A new tokenizer with the sizes of section `model`, or the one in `model.pretrained_model_path`."""
    sizes = OmegaConf.to_container(config)
    if path := sizes.pop("pretrained_model_path"):
        return MAGVITv2.from_pretrained(resolve_path(path), dtype=torch.float32)
    try:
        return MAGVITv2(MAGVITv2Config(**sizes))
    except ValueError as error:
        raise UserError(f"model: {error}") from None


class TokenizerTrainer:
    """A run: model, moving average, optimiser, data and the position in it.

    Args:
        config: a `TokenizerTrainingConfig`.

    Raises:
        UserError: shards are missing or hold no images, sizes do not fit each other, the checkpoint to go on from
            does not exist, or the output folder cannot be written to.
    """

    def __init__(self, config: DictConfig):
        self.config = config
        self.output_dir = Path(config.experiment.output_dir)
        check_writable(self.output_dir)
        self.start = find_resume(self.output_dir, config.experiment.resume_from_checkpoint)
        # The schedule is stepped by hand, once per optimiser step: a prepared one would step once per process.
        self.accelerator = Accelerator(
            mixed_precision=config.training.mixed_precision, step_scheduler_with_optimizer=False
        )
        torch.backends.cuda.matmul.allow_tf32 = config.training.enable_tf32
        torch.backends.cudnn.allow_tf32 = config.training.enable_tf32
        set_seed(config.training.seed)
        self.is_main = self.accelerator.is_main_process
        self.state, self.process_group = TrainState(), ProcessGroup(self.accelerator)
        self.stop_signals = StopSignals(lambda: describe_last_checkpoint(self.output_dir), quiet=not self.is_main)
        self._build_model_and_optimizer()
        self._open_data()

    def _build_model_and_optimizer(self):
        config, device = self.config, self.accelerator.device
        self.model = build_model(config.model).to(device)
        factor, resolution = self.model.downsampling_factor, config.dataset.params.resolution
        if resolution % factor:
            raise UserError(f"dataset.params.resolution is {resolution}; this tokenizer needs a multiple of {factor}")
        self.average = WeightAverage(self.model, config.training.ema_decay)
        optimizer = make_optimizer(self.model, config)
        self.wrapped, self.optimizer, self.schedule = self.accelerator.prepare(
            self.model, optimizer, make_schedule(optimizer, config)
        )
        self.perceptual = PerceptualLoss().to(device) if config.losses.perceptual else None
        self.code_counts = torch.zeros(self.model.config.codebook_size, dtype=torch.int64)  # since the last evaluation

    def _open_data(self):
        params, training = self.config.dataset.params, self.config.training
        quiet = not self.is_main
        place = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        train_shards = find_shards(params.train_shards, "dataset.params.train_shards")
        eval_shards = find_shards(params.eval_shards, "dataset.params.eval_shards")
        self.eval_images = load_images(eval_shards, params.resolution, self.config.experiment.max_eval_examples, quiet)
        if params.cache_in_memory:
            images = load_images(train_shards, params.resolution, quiet=quiet)
            self.data = CachedImages(images, training.batch_size, training.seed, **place)
        else:
            self.data = StreamedImages(
                train_shards,
                params.resolution,
                training.batch_size,
                training.seed,
                params.shuffle_buffer_size,
                params.num_workers,
                **place,
            )

    def train(self):
        """Resumes if there is a checkpoint, trains to the last step (or SIGTERM or SIGUSR1), and saves.

        Raises:
            UserError: another run writes to the same folder, or the checkpoint is damaged.
        """
        with ExitStack() as stack:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if self.is_main:
                stack.enter_context(only_run_in(self.output_dir))
            self.resume()
            self._begin_output()
            stack.callback(self.tracker.finish)
            stack.enter_context(self.stop_signals)
            total, hidden = self.config.training.max_train_steps, not self.is_main
            self._loop(stack.enter_context(tqdm(total=total, initial=self.step, disable=hidden, unit="step")))
        self.stop_signals.exit_if_interrupted()

    def _loop(self, progress: tqdm):
        every = self.config.experiment
        for images in self._batches():
            metrics = self.train_step(images)
            progress.update()
            if self.step % every.log_every == 0:
                self._log(metrics, progress)
            if self.step % every.eval_every == 0:
                self._evaluate(progress)
            stopping = self.process_group.any(self.stop_signals.requested)
            if stopping or self.step % every.save_every == 0:
                self.save()
            if stopping:
                break
        else:
            self._finish(progress)

    def train_step(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """One optimiser step on (B, 3, R, R) uint8 images; returns its losses."""
        params, training = self.config.dataset.params, self.config.training
        generator = generator_for(training.seed, self.accelerator.process_index, self.step)
        images = augment(images, params.random_flip, params.max_shift, generator)
        pixels = to_pixels(images).to(self.accelerator.device)
        output = self.wrapped(pixels)
        losses = self.losses(output, pixels)
        self.accelerator.backward(losses["loss"])
        if training.max_grad_norm:
            losses["grad_norm"] = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), training.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self.average.update(self.model)
        self.code_counts += torch.bincount(output.codes.flatten().cpu(), minlength=len(self.code_counts))
        return {name: value.detach() for name, value in losses.items()}

    def losses(self, output: MAGVITv2Output, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every loss by name, and their weighted sum as `loss`."""
        weights = self.config.losses
        reconstruction = output.reconstruction.float()
        sample_entropy, codebook_entropy = code_entropies(output.latents, weights.entropy_group_bits)
        losses = {
            "l1": F.l1_loss(reconstruction, pixels),
            "mse": F.mse_loss(reconstruction, pixels),
            "edge": edge_loss(reconstruction, pixels),
            "commit": commitment_loss(output.latents),
            "sample_entropy": sample_entropy,
            "codebook_entropy": codebook_entropy,
        }
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(reconstruction, pixels)
        signs = {"codebook_entropy": -1}  # diverse codes are wanted
        losses["loss"] = sum(signs.get(name, 1) * weights[name] * value for name, value in losses.items())
        return losses

    def _batches(self) -> Iterator[torch.Tensor]:
        steps_left = max(self.config.training.max_train_steps - self.step, 0)
        return islice(self.data.batches_from(self.step), steps_left)

    # metrics and images of a run

    def _begin_output(self):
        config = self.config
        self.last_log = (time.perf_counter(), self.step)
        self.tracker = Tracker(
            config.experiment.project,
            config.experiment.name,
            self.output_dir,
            config=config,
            wandb_config=config.wandb,
            last_step=self.step,
            enabled=self.is_main,
        )
        if self.is_main:
            OmegaConf.save(config, self.output_dir / "config.yaml")

    def _log(self, losses: dict[str, torch.Tensor], progress: tqdm):
        now, (then, step) = time.perf_counter(), self.last_log
        rate = (self.step - step) / (now - then)
        self.last_log = (now, self.step)
        metrics = {f"train/{name}": float(value) for name, value in losses.items()}
        metrics |= {"lr": self.schedule.get_last_lr()[0], "samples/sec/gpu": rate * self.config.training.batch_size}
        self.tracker.log(metrics, self.step)
        progress.set_postfix({name: f"{float(losses[name]):.3f}" for name in ("loss", "l1", "commit")})

    def _evaluate(self, progress: tqdm):
        """Held-out PSNR and code use of the averaged weights, and of the training codes since the last time."""
        if not self.is_main:
            return
        self.average.swap(self.model)
        metrics = evaluate(self.model, self.eval_images, self.config.training.batch_size)
        images, captions = side_by_side(self.model, self._sheet_images())
        self.average.swap(self.model)
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        metrics["train/codes_used"], metrics["train/code_perplexity"] = use_of(self.code_counts)
        self.code_counts.zero_()
        self.tracker.log(metrics, self.step)
        progress.write(
            f"step {self.step}: held-out PSNR {metrics['eval/psnr']:.2f} dB, codes used {metrics['eval/codes_used']} "
            f"(held-out), {metrics['train/codes_used']} (training) of {len(self.code_counts)}"
        )
        self.tracker.log_images("Original | reconstruction", images, captions, self.step)

    def _sheet_images(self) -> torch.Tensor:
        wanted = min(self.config.experiment.num_sheet_pictures, len(self.eval_images))
        return self.eval_images[torch.linspace(0, len(self.eval_images) - 1, wanted).long()]

    def _finish(self, progress: tqdm):
        if self.step % self.config.experiment.eval_every:
            self._evaluate(progress)
        save_final_model(self.accelerator, self.model, self.output_dir, average=self.average)

    # stopping and resuming

    @property
    def step(self) -> int:
        """Finished optimiser steps."""
        return self.state.global_step

    def save(self):
        """Writes `checkpoint-{step}` with everything that `resume` needs; removes the oldest beyond the limit."""
        limit = self.config.experiment.checkpoints_total_limit
        save_checkpoint(
            self.accelerator, self.output_dir, self.state, model=self.model, average=self.average, limit=limit
        )

    def resume(self):
        """Resumes from `experiment.resume_from_checkpoint`, with optimiser, schedule, random state and data."""
        if self.start is not None:
            self.state = load_checkpoint(self.accelerator, self.start, self.average)
            self.accelerator.print(f"resuming from {self.start} at step {self.step}")
