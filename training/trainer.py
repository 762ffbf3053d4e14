"""The one training loop of Show-o; the understanding branch is handed in (SPEC §5, §6, §12, §15).

- `Trainer.train()`: resume → step → every(n): log / save / draw samples → final save
- `Trainer.step()`: build the batch → model → weighted loss → backward → clip → optimiser, schedule
"""

import signal
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from common.tracking import Tracker
from models.modeling_showo import ShowoOutput
from training.batches import TASKS, OmniBatch
from training.checkpointing import TrainState, find_resume, load_checkpoint, save_checkpoint, save_model
from training.data.flows import build_flows
from training.optimization import WeightAverage, gradient_norms, make_optimizer, make_schedule
from training.parts import (
    check_sizes,
    enable_gradient_checkpointing,
    make_accelerator,
    make_builder,
    make_model,
    make_vq_model,
    read_prompts,
)
from training.samples import GENERATED_PANEL, PREDICTED_PANEL, draw, predict_masked


@dataclass
class StepMetrics:
    """Sums since the last log line. They stay on the device: only a log line waits for it, not every step."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: int = 0
    steps: int = 0
    samples: int = 0
    data_time: float = 0.0
    batch_time: float = 0.0

    def add_batch(self, batch: OmniBatch, out: ShowoOutput) -> None:
        values = {f"step_loss_{task}": getattr(out, f"loss_{task}") for task in TASKS if batch.counts[task]}
        if batch.mask_prob is not None:
            values["avg_masking_rate"] = batch.mask_prob.mean()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.batches += 1
        self.samples += sum(batch.counts.values())

    def add_step(self, data_time: float, batch_time: float) -> None:
        self.steps += 1
        self.data_time += data_time
        self.batch_time += batch_time

    def means(self, over_processes: Callable[[torch.Tensor], torch.Tensor], device) -> dict[str, float]:
        """Means per batch over all processes, and this process's times in seconds per step."""
        means = torch.stack([total.to(device, torch.float32) for total in self.sums.values()]) / self.batches
        timing = {"data_time": self.data_time / self.steps, "batch_time": self.batch_time / self.steps}
        rate = {"samples/sec/gpu": self.samples / self.batch_time}
        return dict(zip(self.sums, over_processes(means).tolist(), strict=True)) | timing | rate


class Trainer:
    """A run: models, data, optimiser and loop of one configuration.

    Args:
        config: a `TrainingConfig`.
        understanding: the branch of the mmu rows, see `training/understanding.py`.

    Raises:
        UserError: anything the configuration promises is missing or does not fit.
    """

    def __init__(self, config: DictConfig, understanding):
        self.config, self.understanding = config, understanding
        training = config.training
        self.output_dir = Path(config.experiment.output_dir)
        self.accelerator = make_accelerator(config)
        device = self.accelerator.device
        self.flows = build_flows(config, process=self.accelerator.process_index)  # missing data is found first
        self.prompts = read_prompts(config.dataset.params.validation_prompts_file)
        vq_model = make_vq_model(config).to(device)
        check_sizes(config, vq_model)
        torch.backends.cuda.matmul.allow_tf32 = training.enable_tf32
        if training.seed is not None:
            # Each process draws masks of its own; their unlike initial weights are replaced by the first process's.
            set_seed(training.seed, device_specific=True)
        self.model = make_model(config)
        self.builder = make_builder(config, self.model, vq_model, understanding, device)
        if config.model.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(self.optimizer, config)
        # `model` has the methods and the plain names; `wrapped` runs training steps, `forward` perhaps compiled.
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model.to(device), self.optimizer)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.accelerator.register_for_checkpointing(self.schedule)
        self.average = WeightAverage(self.model, training.ema_decay) if training.ema_decay else None
        self.state, self.metrics, self.gradient_norms = TrainState(), StepMetrics(), {}
        self.stop_requested = False
        several = self.accelerator.num_processes > 1
        self.hosts = torch.distributed.new_group(backend="gloo") if several else None

    def train(self) -> None:
        """Runs from where the run stands to `max_train_steps`, then saves the final model in `output_dir`."""
        self.resume()
        self.start_tracking()
        every, total, stopping = self.config.experiment, self.config.training.max_train_steps, False
        with self.finishing_on_signals(), self.progress(total) as bar:
            while self.state.global_step < total and not stopping:
                batch = self.step()
                step, stopping = self.state.global_step, self.someone_asked_to_stop()
                bar.update()
                if step % every.log_every == 0:
                    self.log(bar)
                if step % every.log_grad_norm_every == 0:
                    self.log_gradient_norms()
                if step % every.generate_every == 0:
                    self.draw_samples(batch)
                if step % every.save_every == 0 or stopping:
                    self.save()
        if self.state.global_step >= total and self.accelerator.is_main_process:
            save_model(self.model, self.output_dir, self.average)
        for flow in self.flows.values():
            flow.close()
        self.tracker.finish()
        self.accelerator.wait_for_everyone()

    def step(self) -> OmniBatch:
        """One optimiser step over `gradient_accumulation_steps` batches of every flow; returns the last batch."""
        training, started, data_time = self.config.training, time.perf_counter(), 0.0
        for _ in range(training.gradient_accumulation_steps):
            waiting = time.perf_counter()
            items = {name: next(flow) for name, flow in self.flows.items()}
            data_time += time.perf_counter() - waiting
            batch = self.builder(items)
            with self.accelerator.accumulate(self.wrapped):
                out = self.forward(
                    **batch.forward_arguments(),
                    max_seq_length=self.config.dataset.preprocessing.max_seq_length,
                    label_smoothing=training.label_smoothing,
                )
                loss = training.t2i_coeff * out.loss_t2i + training.lm_coeff * out.loss_lm
                self.accelerator.backward(loss + training.mmu_coeff * out.loss_mmu)
                if self.accelerator.sync_gradients:
                    self.finish_gradients()
                self.optimizer.step()  # this and the next do nothing while gradients accumulate
                self.optimizer.zero_grad(set_to_none=True)
            self.metrics.add_batch(batch, out)
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        self.state.global_step += 1
        self.metrics.add_step(data_time, time.perf_counter() - started)
        return batch

    def finish_gradients(self) -> None:
        """Clips them, and measures them at the steps whose norms are logged."""
        limit, every = self.config.training.max_grad_norm, self.config.experiment.log_grad_norm_every
        if limit:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit)
        if (self.state.global_step + 1) % every == 0:
            if not limit:  # clipping has unscaled the fp16 gradients already
                self.accelerator.unscale_gradients()
            self.gradient_norms = gradient_norms(self.model)

    # ---- continuing ----

    def resume(self) -> None:
        """Continues from the checkpoint the configuration names, if there is one."""
        folder = find_resume(self.output_dir, self.config.experiment.resume_from_checkpoint)
        if folder is None:
            return
        self.state = load_checkpoint(self.accelerator, folder, self.average, self.model)
        for name, flow in self.flows.items():
            if name in self.state.streams:
                flow.load_state_dict(self.state.streams[name])
        self.accelerator.print(f"continuing from {folder}, step {self.state.global_step}")

    def save(self) -> None:
        self.state.streams = {name: flow.state_dict() for name, flow in self.flows.items()}
        kept = {"model": self.model, "average": self.average}
        limit = self.config.experiment.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, self.state, **kept, limit=limit)

    @contextmanager
    def finishing_on_signals(self):
        """SIGTERM and SIGUSR1 finish the step, save and end the run."""

        def request_stop(*_):
            self.stop_requested = True

        before = {s: signal.signal(s, request_stop) for s in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def someone_asked_to_stop(self) -> bool:
        """Whether any process got a signal: all must leave the loop at the same step, or the others wait forever."""
        if self.hosts is None:
            return self.stop_requested
        asked = torch.tensor(int(self.stop_requested))
        torch.distributed.all_reduce(asked, group=self.hosts)  # between the hosts; no GPU is waited for
        return bool(asked)

    # ---- showing ----

    def start_tracking(self) -> None:
        experiment = self.config.experiment
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            OmegaConf.save(self.config, self.output_dir / "config.yaml")
        self.tracker = Tracker(
            experiment.project,
            experiment.name,
            self.output_dir,
            config=OmegaConf.to_container(self.config, resolve=True),
            wandb_config=self.config.wandb,
            enabled=self.accelerator.is_main_process,
        )

    def progress(self, total: int) -> tqdm:
        hidden = not self.accelerator.is_main_process
        return tqdm(total=total, initial=self.state.global_step, disable=hidden, desc="training", dynamic_ncols=True)

    def log(self, bar: tqdm) -> None:
        average = partial(self.accelerator.reduce, reduction="mean")
        values = self.metrics.means(average, self.accelerator.device) | {"lr": self.schedule.get_last_lr()[0]}
        self.tracker.log(values, self.state.global_step)
        bar.set_postfix({k.removeprefix("step_loss_"): f"{v:.3f}" for k, v in values.items() if "loss" in k})
        self.metrics = StepMetrics()

    def log_gradient_norms(self) -> None:
        if self.accelerator.is_main_process:
            norms = torch.stack(list(self.gradient_norms.values())).tolist()
            self.tracker.log(dict(zip(self.gradient_norms, norms, strict=True)), self.state.global_step)
        self.gradient_norms = {}

    def draw_samples(self, batch) -> None:
        """Both published panels, drawn by the main process with the averaged weights where there are any."""
        if not self.accelerator.is_main_process:
            return
        training, step = self.config.training, self.state.global_step
        self.model.eval()
        try:
            with self.average.applied_to(self.model) if self.average is not None else nullcontext():
                images = draw(
                    self.model,
                    self.builder,
                    self.prompts,
                    guidance_scale=training.guidance_scale,
                    timesteps=training.generation_timesteps,
                    temperature=training.generation_temperature,
                    seed=training.seed or 0,
                )
                self.tracker.log_images(GENERATED_PANEL, images, self.prompts, step)
                if batch.counts["t2i"]:
                    self.tracker.log_images(PREDICTED_PANEL, *predict_masked(self.model, self.builder, batch), step)
        finally:
            self.model.train()
