"""Show-o: rows of several flows in one batch; for understanding, image codes or CLIP-ViT features (spec §2, §5, §6)."""

from itertools import chain
from pathlib import Path

import torch

from common.config import TrainingConfig
from common.errors import UserError
from common.inputs import read_prompts
from models import Showo
from models.loading import check_image_tokenizer, initial_showo, load_image_tokenizer, load_text_tokenizer
from training.batches import FLOWS, BatchBuilder, OmniBatch, flow_readers
from training.data.flows import FlowReader, Reading, check_data, check_tokenizer
from training.masking import schedule_of
from training.metrics import BUCKETS, Sums, by_mask_ratio
from training.optimization import enable_gradient_checkpointing, share_code_bits
from training.packing import PACKED_SDPA
from training.samples import GENERATED_PANEL, PREDICTED_PANEL, generate_images, predict_masked
from training.tasks import Outcome, Panel, Task
from training.trainable import choose_trainable
from training.understanding import ClipVitUnderstanding, VqUnderstanding


class ShowoTask(Task):
    """The published objective: weighted losses of the flows in the table `flows`.

    A task that trains a Show-o on something else is a subclass with other flows, settings or losses.
    """

    settings = TrainingConfig
    flows = FLOWS

    def __init__(self, config):
        super().__init__(config)
        schedule_of(config)  # before anything is read
        branch = ClipVitUnderstanding if config.model.showo.w_clip_vit else VqUnderstanding
        self.understanding = branch(config)
        self.flow_readers = {split: flow_readers(config, split, self.flows) for split in ("train", "eval")}
        check_data(chain(*self.flow_readers.values()))
        self.understanding.open()
        self.prompts = read_prompts(config.dataset.params.validation_prompts_file)
        showo, max_text_len = config.model.showo, config.dataset.preprocessing.max_seq_length
        text, dropout = (showo.llm_model_path, showo.llm_vocab_size), config.training.cond_dropout_prob
        mixed = {"history": config.mixed.history, "history_dropout_prob": config.mixed.history_dropout_prob}
        self.prompting = load_text_tokenizer(*text, max_text_len, cond_dropout_prob=dropout, **mixed)

    def readers(self, split: str) -> list[FlowReader]:
        return self.flow_readers[split]

    def reading(self, process: int, num_processes: int) -> Reading:
        understanding, prompting = self.understanding, self.prompting
        together = self.config.dataset.combined_loader_mode == "min_size"
        room = understanding.text_length(self.config, prompting)
        parts = prompting.tokenizer, understanding.image_processor, room
        return Reading(process, num_processes, *parts, end_together=together)

    def load(self) -> None:
        section, resolution = self.config.model.vq_model, self.config.dataset.preprocessing.resolution
        check_image_tokenizer(section.vq_model_name, self.config.model.showo, resolution)
        self.vq_model = load_image_tokenizer(section.vq_model_name, section.pretrained_model_path).to(self.device)
        if self.config.training.vq_compile:
            self.vq_model.encoder.compile()
        check_tokenizer(chain(*self.flow_readers.values()), self.vq_model)

    def make_model(self, start: Path | None) -> Showo:
        attention, clip = self.config.attn_implementation, self.config.model.clip_vit_name
        if self.config.dataset.packing and attention == "sdpa":
            attention = PACKED_SDPA  # sample by sample
        start = start or self.config.experiment.init_from
        model = initial_showo(self.config.model.showo, start, clip_vit_name=clip, attn_implementation=attention)
        model.train()
        if self.config.model.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        return model

    def choose_trainable(self, model: Showo) -> dict[str, int]:
        if (which := self.config.training.trainable) == "lora":  # which freezes what `attach` has chosen
            self.understanding.attach(model, self.device)
            return choose_trainable(model, which, self.config.lora)
        old_rows = choose_trainable(model, which)
        self.understanding.attach(model, self.device)
        return old_rows

    def extend_optimizer(self, optimizer: torch.optim.Optimizer, model: Showo) -> None:
        if self.config.training.share_code_bits:
            if not model.get_input_embeddings().weight.requires_grad:
                raise UserError(
                    "training.share_code_bits changes embeddings, which this run does not train; set it to false"
                )
            matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
            for weight in matrices.values():  # one, if they are tied
                share_code_bits(optimizer, weight, model.vocabulary)

    def prepare(self, model: Showo) -> None:
        self.model = model
        parts = self.prompting, self.vq_model, self.understanding, self.device
        self.builder = BatchBuilder.of(self.config, model.vocabulary, *parts, self.flows)

    def precision(self):
        """A context with the precision of the run's forward passes, for models that accelerate does not wrap."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.training.mixed_precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def make_batch(self, samples: dict[str, list]) -> OmniBatch:
        return self.builder(samples)

    def outcome(self, forward, batch: OmniBatch) -> Outcome:
        out = forward(**batch.forward_arguments())
        present = [loss for name, rows in batch.rows.items() if rows for loss in self.flows[name].losses]
        sums: dict[str, torch.Tensor | int] = {
            "samples": sum(batch.rows.values()),
            "tokens": batch.num_positions,
            "used": batch.num_used,
            "unpacked": batch.input_ids.numel(),
        }
        nothing = torch.zeros((), device=batch.input_ids.device)
        for name in present:  # the same names on every process, also if one has nothing to supervise
            sums[f"loss_{name}"] = out.losses[name]
            sums |= {key: out.statistics.get(key, nothing) for key in (f"correct_{name}", f"supervised_{name}")}
        if batch.mask_prob is not None:
            sums["mask_prob"] = batch.mask_prob.mean()
            sums["buckets"] = by_mask_ratio(batch.mask_prob, out.statistics["row_loss_t2i"])
        return Outcome(out.loss, {name: out.losses[name] for name in present}, sums)

    def summary(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        batches = sums["batches"].item()
        losses = chain.from_iterable(kind.losses for kind in self.flows.values())
        names = [name for name in losses if f"loss_{name}" in sums]
        values = {f"step_loss_{name}": sums[f"loss_{name}"].item() / batches for name in names}
        if "mask_prob" in sums:
            values["avg_masking_rate"] = sums["mask_prob"].item() / batches
        for name in names:
            values[f"accuracy/{name}"] = sums[f"correct_{name}"].item() / max(1.0, sums[f"supervised_{name}"].item())
        for index, (loss, rows) in enumerate(sums["buckets"].T.tolist() if "buckets" in sums else ()):
            if rows:
                values[f"loss_t2i_by_mask_ratio/{index / BUCKETS:.1f}-{(index + 1) / BUCKETS:.1f}"] = loss / rows
        if sums["tokens"] != sums["unpacked"]:
            values["padding_share_unpacked"] = 1 - sums["used"].item() / sums["unpacked"].item()
        return values | {"padding_share": 1 - sums["used"].item() / sums["tokens"].item()}

    def eval_sums(self, forward, flow: str, samples: list) -> Sums:
        """The plain loss of a flow; of t2i one for each of `training.eval_mask_ratios`."""
        sums = {}
        zero, one = torch.zeros((), device=self.device), torch.ones((), device=self.device)
        for ratio, suffix in self._evaluated(flow):
            out = forward(**self.builder.for_evaluation(ratio)({flow: samples}).forward_arguments())
            for loss in self.flows[flow].losses:
                counts = (out.statistics.get(f"{what}_{loss}", zero).float() for what in ("correct", "supervised"))
                sums[loss + suffix] = torch.stack([out.losses[loss].float(), one, *counts])
        return sums

    def eval_figures(self, flow: str, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        values = {}
        names = [loss + suffix for _, suffix in self._evaluated(flow) for loss in self.flows[flow].losses]
        for name in names:
            loss, batches, correct, supervised = sums[name].tolist()
            values[f"eval_loss_{name}"] = loss / batches
            values[f"eval_accuracy/{name.replace('/', '_')}"] = correct / max(1.0, supervised)
        return values

    def _evaluated(self, flow: str) -> list[tuple[float | None, str]]:
        """The mask ratios of a flow's evaluation, and what they add to the names of its figures."""
        ratios = self.config.training.eval_mask_ratios if flow == "t2i" else None
        return [(ratio, f"/mask_{ratio:.2f}") for ratio in ratios or ()] or [(None, "")]

    def panels(self, model: Showo, batch: OmniBatch) -> list[Panel]:
        """Both published panels."""
        training = self.config.training
        images = generate_images(
            model,
            self.builder,
            self.prompts,
            guidance_scale=training.guidance_scale,
            timesteps=training.generation_timesteps,
            temperature=training.generation_temperature,
            seed=training.seed or 0,
        )
        panels = [(GENERATED_PANEL, images, self.prompts)]
        if batch.rows.get("t2i"):
            panels.append((PREDICTED_PANEL, *predict_masked(model, self.builder, batch)))
        return panels


TASK = ShowoTask
