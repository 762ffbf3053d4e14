"""The training loop of Show-o; the understanding branch is a parameter (spec §5, §6, §12, §15).

- `Trainer.train()`: resume → step → every(n): log / evaluate / generate samples / save → final save
- `Trainer.step()`: build the batch → model → weighted loss → backward → clip → optimiser, schedule
"""

import time
from contextlib import ExitStack, nullcontext
from itertools import repeat
from pathlib import Path

import torch
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from common.errors import UserError
from common.inputs import read_prompts
from common.tracking import Tracker
from models import Showo
from models.modeling_showo import ShowoOutput
from training.batches import OmniBatch
from training.checkpointing import (
    TrainState,
    begin_course,
    check_same_config,
    describe_decay,
    describe_last_checkpoint,
    find_start,
    load_checkpoint,
    save_checkpoint,
    save_final_model,
)
from training.data.flows import build_flows, check_data, check_tokenizer
from training.data.skipping import KINDS
from training.data.streams import StreamState
from training.evaluation import HeldOut, own_random_numbers
from training.guards import LOCK, FiniteLosses, StopSignals, check_writable, full_disk_as_user_error, only_run_in
from training.loss import TASKS
from training.metrics import StepMetrics
from training.optimization import (
    WeightAverage,
    enable_gradient_checkpointing,
    gradient_norms,
    make_optimizer,
    make_schedule,
    set_rate,
)
from training.parts import (
    check_sizes,
    make_builder,
    make_model,
    make_prompting,
    make_vq_model,
)
from training.processes import (
    ProcessGroup,
    call_before_deepspeed_steps,
    full_state_dict,
    full_tensor,
    is_sharded,
    make_accelerator,
)
from training.samples import GENERATED_PANEL, PREDICTED_PANEL, generate_images, predict_masked
from training.trainable import choose_trainable, keep_old_rows


class Trainer:
    """A run: models, data, optimiser and loop of one configuration.

    Args:
        config: a `TrainingConfig`.
        understanding: the branch of the mmu rows, see `training/understanding.py`.

    Raises:
        UserError: something that the configuration names is missing or does not match.
    """

    def __init__(self, config: DictConfig, understanding):
        self.config, self.understanding = config, understanding
        training = config.training
        self.output_dir = Path(config.experiment.output_dir)
        check_writable(self.output_dir)
        self.start = find_start(self.output_dir, config.experiment.resume_from_checkpoint)
        self.accelerator = make_accelerator(config, self.start.written_by if self.start else None)
        self.process_group = ProcessGroup(self.accelerator)
        self.process_group.check_same(
            str(self.start and self.start.folder.name),
            f"the processes see other checkpoints in experiment.output_dir {self.output_dir}; give a folder that all "
            "machines share",
        )
        device = self.accelerator.device
        check_data(config)  # before anything is loaded
        if self.start and not self.start.weights and not config.experiment.accept_config_changes:
            check_same_config(self.start.folder, config)
        self.prompts = read_prompts(config.dataset.params.validation_prompts_file)
        prompting = make_prompting(config)
        flow_arguments = {
            "process": self.accelerator.process_index,
            "num_processes": self.accelerator.num_processes,
            "image_processor": understanding.image_processor,
            "tokenizer": prompting.tokenizer,
            "text_length": understanding.text_length(config, prompting),
        }
        self.flows = build_flows(config, **flow_arguments)
        if training.overfit_one_batch:
            self.flows = {name: OneBatch(flow) for name, flow in self.flows.items()}
        vq_model = make_vq_model(config).to(device)
        check_sizes(config, vq_model)
        check_tokenizer(config, vq_model)
        torch.backends.cuda.matmul.allow_tf32 = training.enable_tf32
        if training.seed is not None:
            set_seed(training.seed)  # the same initial weights everywhere, as FSDP keeps each process's own shard
        self.model = make_model(config, self.start.weights if self.start else None)
        old_rows = choose_trainable(self.model, training.trainable)
        understanding.attach(self.model, device)
        if training.seed is not None:
            set_seed(training.seed, device_specific=True)  # but different masks on each process
        self.builder = make_builder(config, self.model, vq_model, prompting, understanding, device)
        if config.model.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        rows = sum(training[f"batch_size_{task}"] for task in TASKS)
        rows *= training.gradient_accumulation_steps * self.accelerator.num_processes
        scale = rows if config.optimizer.params.scale_lr else 1
        self.optimizer = make_optimizer(self.model, config, scale, undecayed=old_rows)
        deepspeed = self.accelerator.state.deepspeed_plugin is not None
        if deepspeed:
            keep_old_rows(self.model, old_rows)
        # `model` has Show-o's methods and parameter names, `wrapped` is trained, `forward` may be compiled.
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model.to(device), self.optimizer)
        if deepspeed:
            call_before_deepspeed_steps(self.wrapped, self.before_deepspeed_step)
        else:
            keep_old_rows(self.model, old_rows)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.schedule = make_schedule(self.optimizer, config)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.average = WeightAverage(self.model, training.ema_decay) if training.ema_decay else None
        self.held_out = HeldOut(config, self.builder, **flow_arguments)
        self.finite = FiniteLosses(self.process_group.any, training.max_nonfinite_batches, tqdm.write)
        self.state, self.metrics, self.gradient_norms = TrainState(), self.new_metrics(), {}
        self.stop_signals = StopSignals(
            lambda: describe_last_checkpoint(self.output_dir), quiet=not self.accelerator.is_main_process
        )

    def train(self) -> None:
        """Trains from the current step to `max_train_steps`, then saves the final model in `output_dir`."""
        with ExitStack() as stack:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(full_disk_as_user_error(lambda: describe_last_checkpoint(self.output_dir)))
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

    def after_step(self, batch: OmniBatch, bar: tqdm, stopping: bool) -> None:
        step, every = self.state.global_step, self.config.experiment
        if step % every.log_every == 0:
            self.log(bar)
        if step % every.log_grad_norm_every == 0:
            self.log_gradient_norms()
        if step % every.eval_every == 0:
            self.evaluate()
        if step % every.generate_every == 0:
            self.generate_samples(batch)
        if step % every.save_every == 0 or stopping or step == self.config.training.max_train_steps:
            self.save()

    def step(self) -> OmniBatch:
        """One optimiser step over `gradient_accumulation_steps` batches of every flow; returns the last batch."""
        training, started = self.config.training, time.perf_counter()
        self.data_time, keys = 0.0, []
        for _ in range(training.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.wrapped):
                batch, out = self.finite_batch()
                keys += batch.keys
                self.accelerator.backward(out.loss)
                if self.accelerator.sync_gradients and self.accelerator.state.deepspeed_plugin is None:
                    self.finish_gradients(keys)  # DeepSpeed has already taken its step
                self.optimizer.step()  # this and the next line do nothing while gradients accumulate
                self.optimizer.zero_grad(set_to_none=True)
            self.metrics.add_batch(batch, out)
        if not self.accelerator.optimizer_step_was_skipped:  # as in fp16, while the loss scale is adjusted
            self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        self.state.global_step += 1
        self.metrics.add_step(self.data_time, time.perf_counter() - started)
        return batch

    def finite_batch(self) -> tuple[OmniBatch, ShowoOutput]:
        """The next batch whose losses are finite on all processes, and the model's output."""
        while True:
            waiting = time.perf_counter()
            samples = {name: next(flow) for name, flow in self.flows.items()}
            self.data_time += time.perf_counter() - waiting
            batch = self.builder(samples)
            out = self.forward(**batch.forward_arguments())
            losses = {task: getattr(out, f"loss_{task}") for task in TASKS if batch.counts[task]}
            if self.finite.accept(losses, batch.keys, self.state.global_step + 1):
                return batch, out

    def finish_gradients(self, keys: list[str]) -> None:
        """Clips gradients, drops non-finite ones, and computes their norms at steps that log them.

        Args:
            keys: of the samples of this step.
        """
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
            if counts := self.state.counts:
                self.metrics.load_state_dict(counts["metrics"], self.accelerator.device)
                self.finite.dropped = counts["nonfinite_batches"]
            for name, flow in self.flows.items():
                if name in self.state.streams:
                    self.resume_flow(name, flow)
            set_rate(self.schedule)
            if line := describe_decay(self.start.folder, self.config):
                self.accelerator.print(line)
            how = ""
        else:
            self.state.global_step = self.start.step
            for _ in range(self.start.step):  # resume the learning rate
                self.schedule.step()
            how = " with its weights only: optimiser, random numbers and data start again"
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
        for flow in self.flows.values():
            flow.close()
        self.tracker.finish()

    # ---- logging ----

    def start_tracking(self) -> None:
        experiment = self.config.experiment
        if self.accelerator.is_main_process:
            OmegaConf.save(self.config, self.output_dir / "config.yaml")
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
        total, hidden = self.config.training.max_train_steps, not self.accelerator.is_main_process
        return tqdm(total=total, initial=self.state.global_step, disable=hidden, desc="training", dynamic_ncols=True)

    def new_metrics(self) -> StepMetrics:
        return StepMetrics()

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def log(self, bar: tqdm) -> None:
        values = self.metrics.means(self.sum_over_processes, self.accelerator.device)
        values |= {"lr": self.schedule.get_last_lr()[0]} | self.skipped_data()
        if self.finite.dropped:
            values["nonfinite_batches"] = self.finite.dropped
        self.tracker.log(values, self.state.global_step)
        losses = {k.removeprefix("step_loss_"): f"{v:.3f}" for k, v in values.items() if "step_loss" in k}
        bar.set_postfix(losses, refresh=False)
        self.metrics = self.new_metrics()

    def skipped_data(self) -> dict[str, int]:
        """``data/skipped/{flow}/{kind}``: samples that all processes have skipped since the run began."""
        names = [(name, kind) for name in self.flows for kind in KINDS]
        counts = torch.tensor([self.flows[name].skipped[kind] for name, kind in names], device=self.accelerator.device)
        summed = zip(names, self.sum_over_processes(counts).tolist(), strict=True)
        return {f"data/skipped/{name}/{kind}": count for (name, kind), count in summed if count}

    def log_gradient_norms(self) -> None:
        if self.accelerator.is_main_process and self.gradient_norms:
            norms = torch.stack(list(self.gradient_norms.values())).tolist()
            self.tracker.log(dict(zip(self.gradient_norms, norms, strict=True)), self.state.global_step)
        self.gradient_norms = {}

    def averaged(self):
        """A context in which the model has the averaged weights, if there are any."""
        return self.average.applied_to(self.model) if self.average is not None else nullcontext()

    def evaluate(self) -> None:
        """Held-out losses of every flow that has held-out data; all processes must call this."""
        if not self.held_out.flows:
            return
        self.wrapped.eval()
        try:
            with self.averaged():
                values = self.held_out(self.wrapped, self.sum_over_processes)
        finally:
            self.wrapped.train()
        self.tracker.log(values, self.state.global_step)

    def generate_samples(self, batch: OmniBatch) -> None:
        """Both published panels, made by the main process, with the averaged weights if there are any.

        Sharded weights are first gathered by all processes: running sharded layers on the main process alone would
        wait for the others forever.
        """
        if is_sharded(self.accelerator):
            with self.averaged():
                weights = full_state_dict(self.accelerator, self.model, self.wrapped)
            if self.accelerator.is_main_process:
                device = self.accelerator.device
                with own_random_numbers(0, device):  # the new model's random initialisation, replaced at once
                    model = Showo(self.model.config).to(device)
                model.load_state_dict(weights)
                self.show(model, batch)
        elif self.accelerator.is_main_process:
            self.model.eval()
            try:
                with self.averaged():
                    self.show(self.model, batch)
            finally:
                self.model.train()

    def show(self, model: Showo, batch: OmniBatch) -> None:
        training, step = self.config.training, self.state.global_step
        images = generate_images(
            model,
            self.builder,
            self.prompts,
            guidance_scale=training.guidance_scale,
            timesteps=training.generation_timesteps,
            temperature=training.generation_temperature,
            seed=training.seed or 0,
        )
        self.tracker.log_images(GENERATED_PANEL, images, self.prompts, step)
        if batch.counts["t2i"]:
            self.tracker.log_images(PREDICTED_PANEL, *predict_masked(model, self.builder, batch), step)


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
