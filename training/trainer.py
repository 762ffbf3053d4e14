"""The training loop, for anything that is trained: what it is, is a task (`training/tasks/`).

- `Trainer.train()`: resume → step → every(n): log / evaluate / show samples / save → final save
- `Trainer.step()`: batch → losses → backward → clip → optimiser, schedule
"""

import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from omegaconf import OmegaConf
from torch import nn
from tqdm import tqdm

from common.errors import UserError
from common.files import Owned, write_text
from common.progress import progress
from common.tracking import Tracker
from models.checkpoint_io import has_adapter
from training.checkpointing import (
    TrainState,
    begin_course,
    check_restored,
    check_same_config,
    damage_as_user_error,
    describe_decay,
    describe_images,
    describe_last_checkpoint,
    disk_errors_as_user_errors,
    find_start,
    load_checkpoint,
    save_checkpoint,
    save_final_model,
    save_trained_only,
)
from training.data.flows import open_flows
from training.data.sources import KINDS
from training.data.streams import StreamState
from training.evaluation import evaluate, own_random_numbers
from training.guards import LOCK, FiniteLosses, StopSignals, check_output_dir, only_run_in
from training.metrics import StepMetrics, total
from training.optimization import WeightAverage, gradient_norms, make_optimizer, make_schedule, set_rate
from training.processes import (
    ProcessGroup,
    call_before_deepspeed_steps,
    full_state_dict,
    full_tensor,
    is_sharded,
    make_accelerator,
)
from training.tasks import Outcome, Task
from training.trainable import keep_old_rows


class Trainer:
    """A run: model, data, optimiser and loop of one task.

    Args:
        task: what is trained, with the configuration of the run.

    Raises:
        UserError: something that the configuration names is missing or does not match.
    """

    def __init__(self, task: Task):
        self.task, self.config = task, task.config
        config, training = self.config, self.config.training
        self.output_dir = Path(config.experiment.output_dir)
        check_output_dir(self.output_dir)
        self.start = find_start(self.output_dir, config.experiment.resume_from_checkpoint)
        readers = task.readers("train")
        rows = sum(reader.batch_size for reader in readers)  # of one batch
        self.accelerator = make_accelerator(config, rows, self.start.written_by if self.start else None)
        self.process_group = ProcessGroup(self.accelerator)
        self.process_group.check_same(
            str(self.start and self.start.folder.name),
            f"the processes see other checkpoints in experiment.output_dir {self.output_dir}; give a folder that all "
            "machines share",
        )
        if self.start and not self.start.weights and not config.experiment.accept_config_changes:
            check_same_config(self.start.folder, config)
        reading = task.reading(self.accelerator.process_index, self.accelerator.num_processes)
        self.flows = open_flows(readers, reading)
        if training.overfit_one_batch:
            self.flows = {name: OneBatch(flow) for name, flow in self.flows.items()}
        self.held_out = open_flows(task.readers("eval"), replace(reading, end_together=False))
        task.device = self.accelerator.device
        task.load()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.enable_tf32
        if training.seed is not None:
            set_seed(training.seed)  # the same initial weights everywhere, as FSDP keeps each process's own shard
        self.model = task.make_model(self.start.weights if self.start else None)
        old_rows = task.choose_trainable(self.model)
        if training.seed is not None:
            # But different masks on each process; numpy's seeds end at 2³².
            set_seed((training.seed + self.accelerator.process_index) % 2**32)
        self.model.to(task.device)
        task.prepare(self.model)
        self.wrap(rows * training.gradient_accumulation_steps * self.accelerator.num_processes, old_rows)
        self.finite = FiniteLosses(self.process_group.any, training.max_nonfinite_batches, tqdm.write)
        self.state, self.metrics, self.gradient_norms = TrainState(), StepMetrics(), {}
        self.stop_signals = StopSignals(
            lambda: describe_last_checkpoint(self.output_dir), quiet=not self.accelerator.is_main_process
        )

    def wrap(self, rows: int, old_rows: dict[str, int]) -> None:
        """Makes optimiser, schedule and moving average, and the model as it is trained.

        `model` has the plain parameter names, `wrapped` is trained, `forward` may be compiled.

        Args:
            rows: of an optimiser step, over all processes.
            old_rows: parameter → number of its first rows that must not change.
        """
        config, deepspeed = self.config, self.accelerator.state.deepspeed_plugin
        if old_rows and deepspeed is not None and deepspeed.zero_stage == 3:
            raise UserError(
                "training some rows of a matrix only (training.trainable=new) does not work with ZeRO-3 here (its "
                "first step never ends): use ZeRO-2 or FSDP2"
            )
        if has_adapter(self.model):
            save_trained_only(self.accelerator, self.model)
        scale = rows if config.optimizer.params.scale_lr else 1
        self.optimizer = make_optimizer(self.model, config, scale, undecayed=old_rows)
        self.task.extend_optimizer(self.optimizer, self.model)
        if deepspeed is not None:
            keep_old_rows(self.model, old_rows)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if deepspeed is not None:
            call_before_deepspeed_steps(self.wrapped, self.before_deepspeed_step)
        else:
            keep_old_rows(self.model, old_rows)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.schedule = make_schedule(self.optimizer, config)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.average = WeightAverage(self.model, config.training.ema_decay) if config.training.ema_decay else None

    def train(self) -> None:
        """Trains from the current step to `max_train_steps`, then saves the final model in `output_dir`."""
        with ExitStack() as stack:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(disk_errors_as_user_errors(self.output_dir))
            if self.accelerator.is_main_process:
                stack.enter_context(only_run_in(self.output_dir))
            self.check_shared_folder()
            begin_course(self.accelerator, self.output_dir, self.start)
            self.resume()
            self.start_tracking()
            stack.callback(self.finish)
            stack.enter_context(self.stop_signals)
            bar = stack.enter_context(self.progress())
            stopping = False
            while self.state.global_step < self.config.training.max_train_steps and not stopping:
                batch = self.step()
                stopping = self.process_group.any(self.stop_signals.requested)
                bar.update()
                self.after_step(batch, bar, stopping)
            if self.state.global_step >= self.config.training.max_train_steps:
                kept = {"wrapped": self.wrapped, "average": self.average}
                save_final_model(self.accelerator, self.model, self.output_dir, **kept)
        self.accelerator.wait_for_everyone()
        self.stop_signals.exit_if_interrupted()

    def after_step(self, batch: Any, bar: tqdm, stopping: bool) -> None:
        step, every = self.state.global_step, self.config.experiment
        values = {}
        if step % every.log_every == 0:
            values |= self.summary(bar)
        if step % every.log_grad_norm_every == 0:
            values |= self.take_gradient_norms()
        if step % every.eval_every == 0:
            values |= self.evaluate()
        if values:
            self.tracker.log(values, step)
        if step % every.generate_every == 0:
            self.show_samples(batch)
        if step % every.save_every == 0 or stopping or step == self.config.training.max_train_steps:
            self.save()

    def step(self) -> Any:
        """One optimiser step over `gradient_accumulation_steps` batches of every flow; returns the last batch."""
        training, started = self.config.training, time.perf_counter()
        self.data_time, keys = 0.0, []
        for _ in range(training.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.wrapped):
                batch, outcome = self.finite_batch()
                keys += batch.keys
                self.accelerator.backward(outcome.loss)
                if self.accelerator.sync_gradients and self.accelerator.state.deepspeed_plugin is None:
                    self.finish_gradients(keys)  # DeepSpeed has already taken its step
                self.optimizer.step()  # this and the next line do nothing while gradients accumulate
                self.optimizer.zero_grad(set_to_none=True)
            self.metrics.add({"batches": 1, **outcome.sums})
        if not self.accelerator.optimizer_step_was_skipped:  # as in fp16, while the loss scale is adjusted
            self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        self.state.global_step += 1
        self.metrics.add_step(self.data_time, time.perf_counter() - started)
        return batch

    def finite_batch(self) -> tuple[Any, Outcome]:
        """The next batch whose losses are finite on all processes, and its losses."""
        while True:
            waiting = time.perf_counter()
            samples = {name: next(flow) for name, flow in self.flows.items()}
            self.data_time += time.perf_counter() - waiting
            self.task.step = self.state.global_step
            batch = self.task.make_batch(samples)
            outcome = self.task.outcome(self.forward, batch)
            if self.finite.accept(outcome.losses, batch.keys, self.state.global_step + 1):
                return batch, outcome

    def finish_gradients(self, keys: list[str]) -> None:
        """Clips gradients, drops those of samples `keys` if non-finite, and computes norms at steps that log them."""
        limit, scaler = self.config.training.max_grad_norm, self.accelerator.scaler
        if limit:
            norm = full_tensor(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit))
            # fp16's scaler skips such steps by itself.
            if scaler is None and not self.finite.accept_gradients(norm, keys, self.state.global_step + 1):
                self.optimizer.zero_grad(set_to_none=True)  # without gradients the optimiser step changes nothing
        if self.measures_gradients():
            if not limit and scaler is not None:  # clipping has already unscaled the fp16 gradients
                self.accelerator.unscale_gradients()
            self.gradient_norms = gradient_norms(self.model)

    def measures_gradients(self) -> bool:
        return (self.state.global_step + 1) % self.config.experiment.log_grad_norm_every == 0

    def before_deepspeed_step(self, engine) -> None:
        if self.measures_gradients():
            loss_scale = getattr(engine.optimizer, "loss_scale", 1.0)  # ZeRO-1's optimiser with bf16 has none
            self.gradient_norms = gradient_norms(self.model, engine.gradient_clipping(), loss_scale)

    # ---- resuming ----

    def check_shared_folder(self) -> None:
        """Raises `UserError` if a process does not see the main process's files in the output folder."""
        self.accelerator.wait_for_everyone()
        if self.process_group.any(not (self.output_dir / LOCK).exists()):
            raise UserError(
                f"experiment.output_dir {self.output_dir} is not the same folder for all processes; give one that all "
                "machines share"
            )

    def resume(self) -> None:
        """Resumes from the checkpoint that the configuration names, if any."""
        if self.start is None:
            return
        if self.start.weights is None:
            self.state = load_checkpoint(self.accelerator, self.start.folder, self.average, self.model)
            with damage_as_user_error(self.start.folder):
                check_restored(self.start.folder, self.model, self.optimizer, self.schedule, self.average)
                if counts := self.state.counts:
                    self.metrics.load_state_dict(counts["metrics"], self.accelerator.device)
                    self.finite.dropped = counts["nonfinite_batches"]
                for name, flow in self.flows.items():
                    if name in self.state.streams:
                        self.resume_flow(name, flow)
                for describe in (describe_decay, describe_images):
                    if line := describe(self.start.folder, self.config):
                        self.accelerator.print(line)
            how = ""
        else:
            self.state.global_step = self.schedule.last_epoch = self.start.step
            how = " with its weights only: optimiser, random numbers and data start again"
        set_rate(self.schedule)
        self.accelerator.print(f"continuing from {self.start.folder}, step {self.state.global_step}{how}")

    def resume_flow(self, name: str, flow) -> None:
        try:
            flow.load_state_dict(self.state.streams[name])
        except UserError as error:  # another number of workers, if the change was accepted
            if not self.config.experiment.accept_config_changes:
                raise
            self.accelerator.print(f"{name}: {error}. Its data starts again")

    def save(self) -> None:
        self.state.streams = {name: flow.state_dict() for name, flow in self.flows.items()}
        self.state.counts = {"metrics": self.metrics.state_dict(), "nonfinite_batches": self.finite.dropped}
        save_checkpoint(
            self.accelerator,
            self.output_dir,
            self.state,
            model=self.model,
            wrapped=self.wrapped,
            average=self.average,
            limit=self.config.experiment.checkpoints_total_limit,
            config=self.config,
        )

    def finish(self) -> None:
        for name, flow in self.flows.items():
            flow.close()
            if self.accelerator.is_main_process:
                for line in flow.counters.noted_lines():
                    tqdm.write(f"{name}: {line}")
        self.tracker.finish()

    # ---- logging ----

    def start_tracking(self) -> None:
        experiment = self.config.experiment
        if self.accelerator.is_main_process:
            write_text(self.output_dir / "config.yaml", OmegaConf.to_yaml(self.config))
            Owned(self.output_dir).record("config.yaml", grows=True)  # a run has begun here, see `check_output_dir`
        self.tracker = Tracker(
            experiment.project,
            experiment.name,
            self.output_dir,
            config=OmegaConf.to_container(self.config, resolve=True),
            wandb_config=self.config.wandb,
            last_step=self.state.global_step,
            enabled=self.accelerator.is_main_process,
        )

    def progress(self) -> tqdm:
        steps, hidden = self.config.training.max_train_steps, not self.accelerator.is_main_process
        return progress(total=steps, initial=self.state.global_step, disable=hidden, desc="training")

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def summary(self, bar: tqdm) -> dict[str, float]:
        """The log line of the steps since the last one; the losses appear at the progress bar as well."""
        sums = total(self.metrics.sums, self.sum_over_processes, self.accelerator.device)
        values = self.task.summary(sums) | self.metrics.times(self.accelerator.device)
        values |= {"lr": self.schedule.get_last_lr()[0]} | self.skipped_data()
        if self.finite.dropped:
            values["nonfinite_batches"] = self.finite.dropped
        names = (name for name in values if "loss" in name and "/" not in name.removeprefix("train/"))
        bar.set_postfix({name.split("loss_")[-1]: f"{values[name]:.3f}" for name in names}, refresh=False)
        self.metrics = StepMetrics()
        return values

    def skipped_data(self) -> dict[str, int]:
        """``data/skipped/{flow}/{kind}``: samples that all processes have skipped since the run began."""
        names = [(name, kind) for name in self.flows for kind in KINDS]
        counts = torch.tensor([self.flows[name].skipped[kind] for name, kind in names], device=self.accelerator.device)
        summed = zip(names, self.sum_over_processes(counts).tolist(), strict=True)
        return {f"data/skipped/{name}/{kind}": count for (name, kind), count in summed if count}

    def take_gradient_norms(self) -> dict[str, float]:
        norms, self.gradient_norms = self.gradient_norms, {}
        return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}

    def averaged(self):
        """A context in which the model has the averaged weights, if there are any."""
        return self.average.applied_to(self.model) if self.average is not None else nullcontext()

    def evaluate(self) -> dict[str, float]:
        """Figures of every flow that has held-out data; all processes must call this."""
        if not self.held_out:
            return {}
        self.wrapped.eval()
        try:
            with self.averaged():
                seed, batches = self.config.training.seed or 0, self.config.experiment.eval_batches
                return evaluate(self.task, self.held_out, self.wrapped, self.sum_over_processes, batches, seed)
        finally:
            self.wrapped.train()

    def show_samples(self, batch: Any) -> None:
        """The task's sample images, made by the main process, with the averaged weights if there are any.

        Sharded weights are first gathered by all processes: running sharded layers on the main process alone would
        wait for the others forever.
        """
        if is_sharded(self.accelerator):
            with self.averaged():
                weights = full_state_dict(self.accelerator, self.model, self.wrapped)
            if self.accelerator.is_main_process:
                device = self.accelerator.device
                with own_random_numbers(0, device):  # the new model's random initialisation, replaced at once
                    model = type(self.model)(self.model.config).to(device)
                model.load_state_dict(weights)
                self.log_panels(model, batch)
        elif self.accelerator.is_main_process:
            self.model.eval()
            try:
                with self.averaged():
                    self.log_panels(self.model, batch)
            finally:
                self.model.train()

    def log_panels(self, model: nn.Module, batch: Any) -> None:
        with torch.no_grad():
            for panel, images, captions in self.task.panels(model, batch):
                self.tracker.log_images(panel, images, captions, self.state.global_step)


class OneBatch:
    """A flow that repeats its first batch (`training.overfit_one_batch`), also after a restart."""

    def __init__(self, flow):
        self.flow, self.start = flow, flow.state_dict()
        self.batches = None

    def state_dict(self) -> StreamState:
        """The position of the batch."""
        return self.start

    def load_state_dict(self, state: StreamState) -> None:
        self.flow.load_state_dict(state)
        self.start, self.batches = state, None

    def __next__(self) -> list:
        if self.batches is None:
            self.batches = repeat(next(self.flow))
        return next(self.batches)

    def __getattr__(self, name: str):
        return getattr(self.flow, name)
