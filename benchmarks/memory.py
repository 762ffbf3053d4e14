"""GPU memory of the published stages, by calculation: what each term is, and where the sum fits.

    python3 benchmarks/memory.py

Parameters are counted from the real class without weights; the rest is a sum of tensors that must be alive at the
same time, in GB (10^9 bytes) per GPU. Not measured: expect the real peak 10 to 20 % higher (fragments, communication
buffers, the CUDA context).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch
from omegaconf import OmegaConf

from benchmarks.report import ROOT
from models import MAGVITv2, MAGVITv2Config, Showo, ShowoConfig

GPUS = 8
CLIP_PARAMETERS = 304e6  # ViT-L/14 at 336², the vision tower alone
MEAN_MASK = 2 / torch.pi  # of the cosine schedule


@dataclass
class Terms:
    """Bytes on one GPU."""

    states: dict[str, float]  # weights, gradients and AdamW's moments by way of training
    frozen: float  # image tokenizer and CLIP tower, fp32
    activations: float  # with gradient checkpointing
    loss: float  # head and cross-entropy at supervised positions


def parameters(model_class, config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(config).parameters())


def terms_of(config) -> Terms:
    """The terms of a training YAML of `configs/`."""
    showo, training = config.model.showo, config.training
    clip = bool(showo.w_clip_vit)
    model = ShowoConfig(num_vq_tokens=showo.num_vq_tokens, w_clip_vit=clip)
    phi, count = model.phi_config(), parameters(Showo, model)
    trained = count
    if clip and config.dataset.und_type == "llava_pretrain":  # the projector alone
        trained = parameters(Showo, model) - parameters(Showo, ShowoConfig(num_vq_tokens=showo.num_vq_tokens))
    frozen = 4 * (parameters(MAGVITv2, MAGVITv2Config()) + (CLIP_PARAMETERS if clip else 0))
    rows = training.batch_size_t2i + training.batch_size_lm + training.batch_size_mmu
    text = config.dataset.preprocessing.max_seq_length
    positions = rows * (text + showo.num_vq_tokens + 3)
    # Kept for every layer: its fp32 input. Recomputed for one: normed input, q, k, v, attention, the MLP's two widths
    # in several elementwise passes of the GELU, and their gradients.
    kept = 4 * phi.num_hidden_layers * positions * phi.hidden_size
    one_layer = positions * (4 * phi.hidden_size * 8 + 2 * phi.intermediate_size * 8)
    supervised = training.batch_size_t2i * (MEAN_MASK * showo.num_vq_tokens + 2)
    supervised += training.batch_size_lm * (text + showo.num_vq_tokens + 3) + training.batch_size_mmu * text
    loss = supervised * model.vocab_size * (2 + 4 + 4 + 4)  # bf16 and fp32 logits, log-softmax, gradient
    return Terms(
        states={
            "DDP": 4 * count + 12 * trained,  # fp32 weights; gradients and two moments
            "ZeRO-2": 2 * count + (2 + 4 + 8) * trained / GPUS,  # bf16 weights; the rest is dealt out
            "FSDP2": (4 * count + 12 * trained) / GPUS,
        },
        frozen=frozen,
        activations=kept + one_layer,
        loss=loss,
    )


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
        terms = terms_of(OmegaConf.load(file))
        rest = terms.frozen + terms.activations + terms.loss
        sums = [f"{(states + rest) / 1e9:.0f}" for states in terms.states.values()]
        parts = [f"{part / 1e9:.1f}" for part in (terms.frozen, terms.activations, terms.loss)]
        lines.append(f"| {file.stem.removeprefix('showo_')} | {' | '.join(parts)} | {' | '.join(sums)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
