"""GPU memory of the published stages, by calculation: each term, and the GPUs on which the sum fits.

    python3 benchmarks/memory.py
    python3 benchmarks/memory.py --finetuning    # of the 1.3 B model on one GPU, and rows that fit cards of three sizes
    python3 benchmarks/memory.py --check    # against the measured peak of `benchmarks/training.py --size 100m`

Parameters are counted from the real classes without weights; the rest is a sum of tensors that must be alive at the
same time, in GB (10^9 bytes) per GPU. The real peak of a GPU is higher by fragments, the CUDA context and what its
libraries keep: leave 10 %.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch
from omegaconf import OmegaConf
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks import training
from benchmarks.report import MIB, ROOT
from models import MAGVITv2, MAGVITv2Config, Showo, ShowoConfig
from training.loss import MAX_LOGITS

GPUS = 8
MEAN_MASK = 2 / torch.pi  # of the cosine schedule
# ViT-L/14 at 336², the published tower
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP |= {"image_size": 336, "patch_size": 14}


@dataclass
class Terms:
    """Bytes on one GPU; those by way of training are dicts.

    A step has three moments that can be its highest: the losses, before gradients have come (`at_loss`); the last layer
    of the backward pass, when all of them are there (`at_end`); the optimiser, whose square roots of second moments
    are one more copy of the trained weights (`at_step`).
    """

    weights: dict[str, float]
    gradients: dict[str, float]
    moments: dict[str, float]  # AdamW's two, and the fp32 weights that DeepSpeed keeps beside bf16 ones
    roots: dict[str, float]
    buffers: dict[str, float]  # gathered for computation or communication
    frozen: float  # image tokenizer and CLIP tower, fp32
    kept: float  # every layer's input, with gradient checkpointing
    one_layer: float  # recomputed, and its gradients
    loss: float  # head and cross-entropy at supervised positions
    head_gradient: float

    @property
    def states(self) -> dict[str, float]:
        """Weights, gradients and moments."""
        return {way: self.weights[way] + self.gradients[way] + self.moments[way] for way in self.weights}

    @property
    def activations(self) -> float:
        return self.kept + self.one_layer

    def peak(self, way: str) -> float:
        at_loss = self.weights[way] + self.moments[way] + self.kept + self.loss + self.head_gradient + self.buffers[way]
        at_end = self.states[way] + self.one_layer + self.buffers[way]
        at_step = self.states[way] + self.roots[way]
        return self.frozen + max(at_loss, at_end, at_step)


def parameters(model_class, config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(config).parameters())


def terms(
    model: ShowoConfig,
    rows: int,
    length: int,
    supervised: list[float],
    *,
    count: int | None = None,
    trained: int | None = None,
    frozen: float = 0,
) -> Terms:
    """The terms of one training step.

    Args:
        rows, length: of the batch, all tasks together.
        supervised: positions of each task that its loss looks at.
        count, trained: parameters of the model, and those that are trained; default: all.
        frozen: parameters of other models on the GPU.
    """
    llm, count = model.backbone_config(), count or parameters(Showo, model)
    trained = count if trained is None else trained
    head = model.vocab_size * llm.hidden_size
    layer = (count - 2 * head) / llm.num_hidden_layers
    positions = rows * length
    return Terms(
        weights={"1 GPU": 4 * count, "ZeRO-2": 2 * count, "FSDP2": 4 * count / GPUS},
        gradients={"1 GPU": 4 * trained, "ZeRO-2": 2 * trained / GPUS, "FSDP2": 4 * trained / GPUS},
        moments={"1 GPU": 8 * trained, "ZeRO-2": 12 * trained / GPUS, "FSDP2": 8 * trained / GPUS},
        # DeepSpeed steps on fp32 copies of its bf16 gradients as well.
        roots={"1 GPU": 4 * trained, "ZeRO-2": 8 * trained / GPUS, "FSDP2": 4 * trained / GPUS},
        # DeepSpeed reduces 5e8 bf16 gradients at once; FSDP2 puts the head, the embedding and two layers together in
        # bf16; autocast keeps bf16 copies of matmul inputs.
        buffers={"1 GPU": 2 * (count - head), "ZeRO-2": 2 * 5e8, "FSDP2": 2 * (2 * head + 2 * layer)},
        frozen=4 * frozen,
        kept=4 * llm.num_hidden_layers * positions * llm.hidden_size,
        # Normed input, q, k, v, attention in fp32 and bf16, the MLP's inner width before and after the fused GELU.
        one_layer=positions * (4 * llm.hidden_size * 8 + 2 * llm.intermediate_size * 4),
        # One chunk of logits, whatever is supervised, and the hidden states there with their gradient.
        loss=4 * min(MAX_LOGITS, model.vocab_size * sum(supervised)) + 8 * llm.hidden_size * sum(supervised),
        head_gradient=4 * head,
    )


def terms_of(config) -> Terms:
    """The terms of a training YAML of `configs/`: mean masking, and every text as long as its room."""
    showo, batch = config.model.showo, config.training
    clip, text = bool(showo.w_clip_vit), config.dataset.preprocessing.max_seq_length
    model = ShowoConfig(num_vq_tokens=showo.num_vq_tokens, w_clip_vit=clip)
    trained = None
    if clip and config.dataset.und_type == "llava_pretrain":  # the projector alone
        trained = parameters(Showo, model) - parameters(Showo, ShowoConfig(num_vq_tokens=showo.num_vq_tokens))
    frozen = parameters(MAGVITv2, MAGVITv2Config())
    frozen += parameters(CLIPVisionModel, CLIPVisionConfig(**CLIP)) if clip else 0
    rows, length = batch.batch_size_t2i + batch.batch_size_lm + batch.batch_size_mmu, text + showo.num_vq_tokens + 3
    drawn = batch.batch_size_t2i * (MEAN_MASK * showo.num_vq_tokens + 2)
    supervised = [drawn, batch.batch_size_lm * length, batch.batch_size_mmu * text]
    return terms(model, rows, length, supervised, trained=trained, frozen=frozen)


# ---- fine-tuning on one GPU ----

CARDS, SPARE = (24, 48, 80), 0.9  # GB, and the share of it that the calculation may fill
TUNING = {  # way: bytes of a linear layer's weight, of another one's, of a moment; rank of the adapter, 0: all weights
    "all, adamw": (4, 4, 4, 0),
    "all, adamw8bit": (4, 4, 1 + 4 / 256, 0),  # a scale for each 256
    "lora, base fp32": (4, 4, 4, 16),
    "lora, base bf16": (2, 2, 4, 16),
    "lora, base nf4": (0.5 + 1 / 64 + 4 / (64 * 256), 2, 4, 16),  # a scale for each 64, and one for 256 of those
}


def tuning_terms(way: str, image_tokens: int, rows: int) -> Terms:
    """The terms of a step of half t2i, half mmu, each row with 128 text tokens; with gradient checkpointing."""
    linear, other, moment, rank = TUNING[way]
    model, length = ShowoConfig(num_vq_tokens=image_tokens), 128 + image_tokens + 3
    llm = model.backbone_config()
    supervised = [rows / 2 * (MEAN_MASK * image_tokens + 2), rows / 2 * 128]
    count, shapes, tokenizer = tuned_sizes()
    found = terms(model, rows, length, supervised, count=count, frozen=tokenizer)
    in_layers = sum(a * b for a, b in shapes)
    trained = rank * sum(a + b for a, b in shapes) if rank else count
    weights = linear * in_layers + other * (count - in_layers) + (4 * trained if rank else 0)
    copies = 2 * (
        trained if other == 2 else count - model.vocab_size * llm.hidden_size
    )  # of fp32 weights, for autocast
    if rank:  # inputs of two layers that come in bf16 are kept in fp32 for the adapter
        found.one_layer += 4 * rows * length * (llm.hidden_size + llm.intermediate_size)
        found.head_gradient = 0.0
    parts = {"weights": weights, "gradients": 4 * trained, "moments": 2 * moment * trained, "buffers": copies}
    return replace(found, roots={way: 0.0}, **{name: {way: value} for name, value in parts.items()})  # fused: no roots


@cache
def tuned_sizes() -> tuple[int, list[tuple[int, int]], int]:
    """Parameters of the model, rows and columns of its decoder's linear layers, parameters of the image tokenizer."""
    config = ShowoConfig()
    with torch.device("meta"):
        model = Showo(config)
    names = (*config.backbone.attention, *config.backbone.mlp)
    shapes = [tuple(one.weight.shape) for name, one in model.named_modules() if name.rpartition(".")[2] in names]
    return sum(p.numel() for p in model.parameters()), shapes, parameters(MAGVITv2, MAGVITv2Config())


def most_rows(way: str, image_tokens: int, card: float) -> int:
    """The largest batch whose peak fits a card; 0 if none does."""
    one, two = (tuning_terms(way, image_tokens, rows).peak(way) for rows in (1000, 2000))  # a line from there on
    slope = (two - one) / 1000
    rows = int((SPARE * card * 1e9 - one) / slope) + 1000
    while rows > 0 and tuning_terms(way, image_tokens, rows).peak(way) > SPARE * card * 1e9:
        rows -= 1
    return max(rows, 0)


def tuning_table() -> str:
    lines = [
        "| `training.trainable`, form | weights, gradients, moments | "
        + " | ".join(f"rows on {card} GB: 256², 512²" for card in CARDS)
        + " |",
        "|---|---|" + "---|" * len(CARDS),
    ]
    for way in TUNING:
        states = tuning_terms(way, 256, 1).states[way] / 1e9
        fits = (", ".join(str(most_rows(way, tokens, card) or "—") for tokens in (256, 1024)) for card in CARDS)
        lines.append(f"| {way} | {states:.1f} GB | {' | '.join(fits)} |")
    return "\n".join(lines)


def stages() -> list[Path]:
    """The training YAMLs of the published stages."""
    found = [*ROOT.glob("configs/showo_pretraining_*.yaml"), *ROOT.glob("configs/showo_instruction_*.yaml")]
    return sorted(found, key=lambda file: ("instruction" in file.name, file.name))


def table() -> str:
    lines = [
        "| stage | frozen | activations | head and loss | 1 GPU | 8, ZeRO-2 | 8, FSDP2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for file in stages():
        found = terms_of(OmegaConf.load(file))
        parts = [f"{part / 1e9:.1f}" for part in (found.frozen, found.activations, found.loss)]
        sums = [f"{found.peak(way) / 1e9:.0f}" for way in found.weights]
        lines.append(f"| {file.stem.removeprefix('showo_')} | {' | '.join(parts)} | {' | '.join(sums)} |")
    return "\n".join(lines)


def calculated_100m(rows: int) -> float:
    """MiB of the step that `benchmarks/training.py --size 100m --rows N` measures on a CPU: fp32, no copies in bf16."""
    size = training.sizes("100m")
    batch = training.make_batch(size, rows)
    objective = training.objective_of("ours, packed", batch, size.config)
    found = terms(size.config, 1, objective.packing.num_positions, list(objective.counts.values()))
    found.buffers["1 GPU"] = found.roots["1 GPU"] = 0.0  # AdamW takes one parameter after the other there
    return found.peak("1 GPU") / MIB


def check(rows: int = 12) -> str:
    """One line: the calculation, the measurement, and how far they lie apart."""
    arguments = ["--size", "100m", "--rows", str(rows), "--steps", "1"]
    measured = training.in_own_process("ours, packed, checkpointing", arguments, training.RETURN_MEMORY)["peak_mib"]
    calculated = calculated_100m(rows)
    return (
        f"100 M, {rows} rows, CPU: calculated {calculated:.0f} MiB, measured {measured:.0f} MiB "
        f"({100 * (calculated / measured - 1):+.1f} %)"
    )


if __name__ == "__main__":
    print(check() if "--check" in sys.argv[1:] else tuning_table() if "--finetuning" in sys.argv[1:] else table())
