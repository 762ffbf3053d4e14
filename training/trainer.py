"""The one training loop of Show-o; the understanding branch is handed in (SPEC §5, §6, §12, §15).

    Trainer.train():  resume → step → every(n): log / save / draw samples → final save
    Trainer.step():   build the batch → model → weighted loss → backward → clip → optimiser, schedule
"""

import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import AutoTokenizer

from common.config import mask_schedule_of, resolve_path
from common.errors import UserError
from common.tracking import Tracker
from models import MAGVITv2, Showo, ShowoConfig, UniversalPrompting, get_mask_schedule
from training.batches import TASKS, BatchBuilder
from training.checkpointing import TrainState, find_resume, load_checkpoint, save_checkpoint, save_model
from training.data.flows import build_flows
from training.masking import MaskingNoise
from training.optimization import WeightAverage, make_optimizer, make_schedule
from training.samples import GENERATED_PANEL, PREDICTED_PANEL, draw, predict_masked


@dataclass
class StepMetrics:
    """Sums over the steps since the last log line; one host synchronisation per line, not per step."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    data_time: float = 0.0
    batch_time: float = 0.0

    def add(self, values: dict[str, torch.Tensor], samples: int, data_time: float, batch_time: float) -> None:
        for name, value in values.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach()
        self.steps += 1
        self.samples += samples
        self.data_time += data_time
        self.batch_time += batch_time

    def means(self) -> dict[str, float]:
        values = {name: float(total) / self.steps for name, total in self.losses.items()}
        timing = {"data_time": self.data_time / self.steps, "batch_time": self.batch_time / self.steps}
        return values | timing | {"samples/sec/gpu": self.samples / self.batch_time}


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
        self.accelerator = Accelerator(
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            mixed_precision=None if training.mixed_precision == "no" else training.mixed_precision,
            cpu=config.device == "cpu",
        )
        self.flows = build_flows(config, process=self.accelerator.process_index)  # missing data is found first
        torch.backends.cuda.matmul.allow_tf32 = training.enable_tf32
        if training.seed is not None:
            set_seed(training.seed, device_specific=True)
        self.model = make_model(config)
        vq_model = make_vq_model(config).to(self.accelerator.device)
        check_sizes(config, self.model, vq_model)
        self.builder = make_builder(config, self.model, vq_model, understanding, self.accelerator.device)
        if config.model.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(self.optimizer, config)
        self.model.to(self.accelerator.device)
        self.average = WeightAverage(self.model, training.ema_decay) if training.ema_decay else None
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.accelerator.register_for_checkpointing(self.schedule)
        self.state, self.metrics, self.stop_requested = TrainState(), StepMetrics(), False
        self.prompts = read_prompts(config.dataset.params.validation_prompts_file)

    def train(self) -> None:
        """Runs from where the run stands to `max_train_steps`, then saves the final model in `output_dir`."""
        self.resume()
        self.start_tracking()
        every, total = self.config.experiment, self.config.training.max_train_steps
        with self.finishing_on_signals(), self.progress(total) as bar:
            while self.state.global_step < total and not self.stop_requested:
                batch = self.step()
                step = self.state.global_step
                bar.update()
                if step % every.log_every == 0:
                    self.log(bar)
                if step % every.generate_every == 0:
                    self.draw_samples(batch)
                if step % every.save_every == 0 or self.stop_requested:
                    self.save()
        if self.state.global_step >= total and self.accelerator.is_main_process:
            save_model(self.model, self.output_dir, self.average)
        self.tracker.finish()

    def step(self):
        """One optimiser step over `gradient_accumulation_steps` batches of every flow; returns the last batch."""
        training = self.config.training
        started = time.perf_counter()
        for _ in range(training.gradient_accumulation_steps):
            items = {name: next(flow) for name, flow in self.flows.items()}
            data_time = time.perf_counter() - started
            batch = self.builder(items)
            with self.accelerator.accumulate(self.wrapped):
                out = self.forward(
                    **batch.forward_arguments(),
                    max_seq_length=self.config.dataset.preprocessing.max_seq_length,
                    label_smoothing=training.label_smoothing,
                )
                loss = training.t2i_coeff * out.loss_t2i + training.lm_coeff * out.loss_lm
                self.accelerator.backward(loss + training.mmu_coeff * out.loss_mmu)
                if training.max_grad_norm and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.wrapped.parameters(), training.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        self.state.global_step += 1
        values = {f"step_loss_{task}": getattr(out, f"loss_{task}") for task in TASKS if batch.counts[task]}
        if batch.mask_prob is not None:
            values["avg_masking_rate"] = batch.mask_prob.mean()
        samples = sum(batch.counts.values()) * training.gradient_accumulation_steps
        self.metrics.add(values, samples, data_time, time.perf_counter() - started)
        return batch

    # ---- continuing ----

    def resume(self) -> None:
        """Continues from the checkpoint the configuration names, if there is one."""
        folder = find_resume(self.output_dir, self.config.experiment.resume_from_checkpoint)
        if folder is None:
            return
        self.state = load_checkpoint(self.accelerator, folder, self.average)
        for name, flow in self.flows.items():
            if name in self.state.streams:
                flow.load_state_dict(self.state.streams[name])
        self.accelerator.print(f"continuing from {folder}, step {self.state.global_step}")

    def save(self) -> None:
        self.state.streams = {name: flow.state_dict() for name, flow in self.flows.items()}
        limit = self.config.experiment.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, self.state, model=self.model, average=self.average, limit=limit)

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
        values = self.metrics.means() | {"lr": self.schedule.get_last_lr()[0]}
        self.tracker.log(values, self.state.global_step)
        bar.set_postfix({k.removeprefix("step_loss_"): f"{v:.3f}" for k, v in values.items() if "loss" in k})
        self.metrics = StepMetrics()

    def draw_samples(self, batch) -> None:
        """Both published panels, drawn by the main process with the averaged weights where there are any."""
        if not self.accelerator.is_main_process:
            return
        training, step = self.config.training, self.state.global_step
        self.model.eval()
        if self.average is not None:
            self.average.swap(self.model)
        try:
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
            if self.average is not None:
                self.average.swap(self.model)
            self.model.train()


# ---- parts of a run ----


def make_model(config) -> Showo:
    """The model a run starts from: a checkpoint, a language model's weights, or (no path) random weights."""
    settings = config.model.showo
    keys = ("llm_vocab_size", "vocab_size", "codebook_size", "num_vq_tokens", "num_new_special_tokens", "w_clip_vit")
    path = settings.llm_model_path
    try:
        showo_config = ShowoConfig(
            llm_model_path=str(resolve_path(path)) if resolve_path(path).exists() else path,
            attn_implementation=config.attn_implementation,
            **{key: settings[key] for key in keys},
        )
    except ValueError as error:
        raise UserError(f"model.showo: {error}") from error
    if not settings.load_from_showo:
        return Showo.from_llm(showo_config).train()
    if settings.pretrained_model_path is None:
        return Showo(showo_config).train()
    folder = str(resolve_path(settings.pretrained_model_path))
    return Showo.from_pretrained(folder, config=showo_config).train()


def make_vq_model(config) -> MAGVITv2:
    """The frozen image tokenizer, fp32 and outside autocast."""
    name = config.model.vq_model.vq_model_name
    return MAGVITv2.from_pretrained(str(resolve_path(name))).requires_grad_(False).eval()


def check_sizes(config, model: Showo, vq_model: MAGVITv2) -> None:
    """Tokenizer, resolution and model must agree before a step is taken."""
    showo, resolution = config.model.showo, config.dataset.preprocessing.resolution
    codes = 2**vq_model.config.code_bits
    if codes != showo.codebook_size:
        raise UserError(f"model.showo.codebook_size is {showo.codebook_size}, but the image tokenizer has {codes} codes")
    num_tokens = (resolution // vq_model.config.downsampling_factor) ** 2
    if num_tokens != showo.num_vq_tokens:
        raise UserError(
            f"dataset.preprocessing.resolution {resolution} makes {num_tokens} image tokens, but "
            f"model.showo.num_vq_tokens is {showo.num_vq_tokens}; change one of them"
        )


def make_builder(config, model: Showo, vq_model: MAGVITv2, understanding, device) -> BatchBuilder:
    training, vocabulary = config.training, model.vocabulary
    path = config.model.showo.llm_model_path
    tokenizer = AutoTokenizer.from_pretrained(str(resolve_path(path)), padding_side="left")
    max_text_len = config.dataset.preprocessing.max_seq_length
    prompting = UniversalPrompting(tokenizer, max_text_len, cond_dropout_prob=training.cond_dropout_prob)
    if prompting.vocabulary.llm_vocab_size != vocabulary.llm_vocab_size:
        raise UserError(
            f"the tokenizer of {path} has {prompting.vocabulary.llm_vocab_size} entries, but model.showo.llm_vocab_size "
            f"is {vocabulary.llm_vocab_size}"
        )
    schedule, params = mask_schedule_of(config)
    noise = MaskingNoise(
        get_mask_schedule(schedule, **params),
        vocabulary.mask_token_id,
        vocabulary.image_offset,
        vocabulary.codebook_size,
        min_masking_rate=training.min_masking_rate,
        contiguous_region_prob=training.mask_contiguous_region_prob,
        noise_type=training.noise_type,
        predict_all_tokens=training.predict_all_tokens,
    )
    row_length = model.config.num_vq_tokens + 3 + max_text_len
    return BatchBuilder(prompting, vq_model, noise, understanding, row_length, device)


def enable_gradient_checkpointing(model: Showo) -> None:
    """Under whichever name this version of transformers calls it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def read_prompts(file: str) -> list[str]:
    """Lines of a prompts file.

    Raises:
        UserError: the file is missing or has no prompt.
    """
    path = resolve_path(file)
    if not path.is_file():
        raise UserError(f"validation_prompts_file {file!r} does not exist; give a text file with one prompt per line")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"validation_prompts_file {file!r} is empty; write one prompt per line")
    return prompts
