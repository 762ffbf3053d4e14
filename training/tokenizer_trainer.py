"""The loop that trains an image tokenizer: pictures, losses, moving average, checkpoints that resume exactly."""

import copy
import json
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from tqdm import tqdm

from common.config import resolve_path
from common.errors import UserError
from common.tracking import Tracker
from models.modeling_magvitv2 import MAGVITv2, MAGVITv2Config, MAGVITv2Output
from training.tokenizer_data import (
    CachedPictures,
    StreamedPictures,
    augment,
    find_shards,
    generator_for,
    load_pictures,
)
from training.tokenizer_eval import evaluate, side_by_side, to_pixels, use_of
from training.tokenizer_losses import PerceptualLoss, code_entropies, commitment_loss, edge_loss


def build_model(config: DictConfig) -> MAGVITv2:
    """A new tokenizer of the sizes in section `model`, or the one of `model.pretrained_model_path`."""
    sizes = OmegaConf.to_container(config)
    if path := sizes.pop("pretrained_model_path"):
        return MAGVITv2.from_pretrained(resolve_path(path), dtype=torch.float32)
    try:
        return MAGVITv2(MAGVITv2Config(**sizes))
    except ValueError as error:
        raise UserError(f"model: {error}") from None


class TokenizerTrainer:
    """Everything that a run holds. `step` counts finished optimiser steps."""

    def __init__(self, config: DictConfig):
        self.config = config
        self.output_dir = Path(config.experiment.output_dir)
        # The schedule is stepped by hand, once per optimiser step: a prepared one would step once per process.
        self.accelerator = Accelerator(
            mixed_precision=config.training.mixed_precision, step_scheduler_with_optimizer=False
        )
        torch.backends.cuda.matmul.allow_tf32 = config.training.enable_tf32
        torch.backends.cudnn.allow_tf32 = config.training.enable_tf32
        set_seed(config.training.seed)
        self.is_main = self.accelerator.is_main_process
        self.step = 0
        self.stop_requested = False
        self._build_model_and_optimizer()
        self._open_data()

    def _build_model_and_optimizer(self):
        config, params = self.config, self.config.optimizer.params
        model = build_model(config.model)
        if config.dataset.params.resolution % model.downsampling_factor:
            raise UserError(
                f"dataset.params.resolution={config.dataset.params.resolution} must be a multiple of the tokenizer's "
                f"downsampling factor, {model.downsampling_factor}"
            )
        self.averaged = copy.deepcopy(model).to(self.accelerator.device).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            weight_decay=params.weight_decay,
            eps=params.epsilon,
        )
        scheduler = get_scheduler(
            config.lr_scheduler.scheduler,
            optimizer,
            num_warmup_steps=config.lr_scheduler.params.warmup_steps,
            num_training_steps=config.training.max_train_steps,
        )
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.perceptual = PerceptualLoss().to(self.accelerator.device) if config.losses.perceptual else None

    def _open_data(self):
        params, training = self.config.dataset.params, self.config.training
        quiet = not self.is_main
        place = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        train_shards = find_shards(params.train_shards, "dataset.params.train_shards")
        eval_shards = find_shards(params.eval_shards, "dataset.params.eval_shards")
        self.eval_pictures = load_pictures(
            eval_shards, params.resolution, self.config.experiment.max_eval_examples, quiet
        )
        if params.cache_in_memory:
            pictures = load_pictures(train_shards, params.resolution, quiet=quiet)
            self.data = CachedPictures(pictures, training.batch_size, training.seed, **place)
        else:
            self.data = StreamedPictures(
                train_shards,
                params.resolution,
                training.batch_size,
                training.seed,
                params.shuffle_buffer_size,
                params.num_workers,
                **place,
            )

    def train(self):
        """Resume if there is something to resume, train to the last step (or SIGTERM), save."""
        every = self.config.experiment
        self.resume()
        self._begin_output()
        progress = tqdm(
            total=self.config.training.max_train_steps, initial=self.step, disable=not self.is_main, unit="step"
        )
        for pictures in self._batches():
            metrics = self.train_step(pictures)
            progress.update()
            if self.step % every.log_every == 0:
                self._log(metrics, progress)
            if self.step % every.eval_every == 0:
                self._evaluate(progress)
            stopping = self._someone_asked_to_stop()
            if stopping or self.step % every.save_every == 0:
                self.save()
            if stopping:
                break
        else:
            self._finish(progress)
        progress.close()
        self.tracker.finish()

    def train_step(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """One optimiser step on (B, 3, R, R) uint8 pictures; returns its losses."""
        params, training = self.config.dataset.params, self.config.training
        generator = generator_for(training.seed, self.accelerator.process_index, self.step)
        pictures = augment(pictures, params.random_flip, params.max_shift, generator)
        pixels = to_pixels(pictures).to(self.accelerator.device)
        self.model.train()
        output = self.model(pixels)
        losses = self.losses(output, pixels)
        self.accelerator.backward(losses["loss"])
        if training.max_grad_norm:
            losses["grad_norm"] = self.accelerator.clip_grad_norm_(self.model.parameters(), training.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._update_average()
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
        signs = {"codebook_entropy": -1}  # diversity is wanted
        losses["loss"] = sum(signs.get(name, 1) * weights[name] * value for name, value in losses.items())
        return losses

    @torch.no_grad()
    def _update_average(self):
        decay = min(self.config.training.ema_decay, (1 + self.step) / (10 + self.step))  # short memory at the start
        current = self.accelerator.unwrap_model(self.model).parameters()
        torch._foreach_lerp_(list(self.averaged.parameters()), list(current), 1 - decay)

    def _batches(self) -> Iterator[torch.Tensor]:
        steps_left = max(self.config.training.max_train_steps - self.step, 0)
        return islice(self.data.batches_from(self.step), steps_left)

    # what a run reports

    def _begin_output(self):
        config = self.config
        self.code_counts = torch.zeros(self.averaged.config.codebook_size, dtype=torch.int64)
        self.last_log = (time.perf_counter(), self.step)
        self.tracker = Tracker(
            config.experiment.project,
            config.experiment.name,
            self.output_dir,
            config=config,
            wandb_config=config.wandb,
            enabled=self.is_main,
        )
        if self.is_main:
            OmegaConf.save(config, self.output_dir / "config.yaml")

    def _log(self, losses: dict[str, torch.Tensor], progress: tqdm):
        now, (then, step) = time.perf_counter(), self.last_log
        rate = (self.step - step) / (now - then)
        self.last_log = (now, self.step)
        metrics = {f"train/{name}": float(value) for name, value in losses.items()}
        metrics |= {"lr": self.scheduler.get_last_lr()[0], "samples/sec/gpu": rate * self.config.training.batch_size}
        self.tracker.log(metrics, self.step)
        progress.set_postfix({name: f"{float(losses[name]):.3f}" for name in ("loss", "l1", "commit")})

    def _evaluate(self, progress: tqdm):
        """Held-out PSNR and code use of the averaged weights, and of the training codes since the last time."""
        if not self.is_main:
            return
        metrics = evaluate(self.averaged, self.eval_pictures, self.config.training.batch_size)
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        metrics["train/codes_used"], metrics["train/code_perplexity"] = use_of(self.code_counts)
        self.code_counts.zero_()
        self.tracker.log(metrics, self.step)
        progress.write(
            f"step {self.step}: held-out PSNR {metrics['eval/psnr']:.2f} dB, codes used {metrics['eval/codes_used']} "
            f"(held-out), {metrics['train/codes_used']} (training) of {len(self.code_counts)}"
        )
        images, captions = side_by_side(self.averaged, self._sheet_pictures())
        self.tracker.log_images("Original | reconstruction", images, captions, self.step)

    def _sheet_pictures(self) -> torch.Tensor:
        wanted = min(self.config.experiment.num_sheet_pictures, len(self.eval_pictures))
        return self.eval_pictures[torch.linspace(0, len(self.eval_pictures) - 1, wanted).long()]

    def _finish(self, progress: tqdm):
        if self.step % self.config.experiment.eval_every:
            self._evaluate(progress)
        if self.is_main:
            self.averaged.save_pretrained(self.output_dir)

    # stopping and going on

    def handle_sigterm(self, *_):
        """Signal handler: finish the step, save, end."""
        self.stop_requested = True

    def _someone_asked_to_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop_requested
        asked = torch.tensor([self.stop_requested], device=self.accelerator.device)
        return bool(self.accelerator.gather(asked).any())

    def save(self):
        """Write `checkpoint-{step}` under another name and rename it, so that a half-written one is never resumed."""
        folder = self.output_dir / f"checkpoint-{self.step}"
        unfinished = self.output_dir / f"unfinished-{folder.name}"
        if folder.exists():
            return
        self.accelerator.save_state(unfinished)
        if self.is_main:
            self.averaged.save_pretrained(unfinished / "unwrapped_model")
            (unfinished / "metadata.json").write_text(json.dumps({"global_step": self.step}))
            unfinished.rename(folder)
            self._drop_old_checkpoints()
        self.accelerator.wait_for_everyone()

    def _drop_old_checkpoints(self):
        limit = self.config.experiment.checkpoints_total_limit
        for folder in checkpoints_of(self.output_dir)[:-limit] if limit else []:
            shutil.rmtree(folder)

    def resume(self):
        """Go on from `experiment.resume_from_checkpoint`: weights, average, optimiser, schedule, random state, data."""
        wanted = self.config.experiment.resume_from_checkpoint
        folders = checkpoints_of(self.output_dir) if wanted in ("latest", True) else [wanted] if wanted else []
        if not folders:
            return
        folder = resolve_path(folders[-1])
        if not (folder / "metadata.json").is_file():
            raise UserError(f"experiment.resume_from_checkpoint: {folder} is no checkpoint of this script")
        self.accelerator.load_state(folder)
        self.averaged.load_state_dict(load_file(folder / "unwrapped_model" / "model.safetensors"))
        self.step = json.loads((folder / "metadata.json").read_text())["global_step"]
        self.accelerator.print(f"resuming from {folder} at step {self.step}")


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    numbered = [(path.name.removeprefix("checkpoint-"), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdigit())]
