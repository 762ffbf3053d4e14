"""One training step, compared with the published implementation and with the machine's limit; random weights.

    python3 benchmarks/training.py --size tiny                                  # make bench-training: this and more
    python3 benchmarks/training.py --size 8x512 --rows 24
    python3 benchmarks/training.py --size 8x512 --stage tuning2 --rows 12
    python3 benchmarks/training.py --size 1.3b --rows 24 --device cuda --attention flex_attention

Rows are in the proportions of a stage (`STAGES`), texts as long as its. The ways of taking the step, each in a process
of its own so that no peak hides in another's:

- published: whole rows with their padding through the layers under a dense mask and, at every position, through the
  vocabulary head (`published.losses`), AdamW by default. The published code keeps all activations, since it does not
  read `model.gradient_checkpointing`.
- ours: head and loss in chunks at supervised positions, fused activation and AdamW; with the counts a run logs.
- ours, packed: the same with `dataset.packing`.
- ours, packed, checkpointing: with gradient checkpointing too, as our YAMLs have it.

`limit` is the work of the packed step, counted (forward and twice that backward; weights, gradients and moments once
through the optimiser) over the machine's measured rates. AdamW with its fp32 moments, fp32 weights, bf16 autocast on a
GPU. "Activations" is all but weights, gradients and moments. Prints a table and last one JSON line: machine, date,
commit, ratios, share of the limit.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch

from benchmarks import limits, published, report
from models import OmniMask, Showo, ShowoConfig, get_mask_schedule
from models.backbones import read_llm_config
from models.vocabulary import IGNORE_ID, Vocabulary
from training.loss import Objective
from training.masking import MaskingNoise
from training.optimization import adamw, enable_gradient_checkpointing
from training.packing import PACKED_SDPA, Packing

KINDS = ("published", "ours", "ours, packed", "ours, packed, checkpointing")
COEFFICIENTS = {"t2i": 1.0, "lm": 0.1, "mmu": 1.0}
TINY = str(report.ROOT / "checkpoints" / "showo-tiny" / "llm")
# glibc keeps freed blocks of up to 32 MiB, which made half of the peaks; with this, larger ones go back at once. It
# costs time, so that is measured without it.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
LLM_512 = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
LAYERS = {"100m": 12, "8x512": 8}


@dataclass(frozen=True)
class Stage:
    """Rows of t2i, lm and mmu in its YAML, fewest and most words of a text to draw and of one to answer with."""

    rows: tuple[int, int, int]
    drawn: tuple[int, int]
    answered: tuple[int, int]
    max_text: int = 128  # M


STAGES = {
    "stage1": Stage((15, 4, 10), (1, 4), (10, 30)),
    "stage2": Stage((10, 4, 10), (10, 30), (10, 30)),  # and 3
    "tuning1": Stage((4, 2, 7), (10, 30), (20, 45), 381),
    "tuning2": Stage((4, 2, 6), (10, 30), (60, 340), 381),
}


@dataclass
class Size:
    """A model and the room for text in its rows."""

    config: ShowoConfig
    max_text: int  # M


def sizes(name: str) -> Size:
    """``tiny``: `checkpoints/showo-tiny`; under the whole published vocabulary ``100m``: 12 layers of 512, ``8x512``,
    and ``1.3b``: the published model."""
    if name in LAYERS:
        return Size(ShowoConfig(llm_config=LLM_512 | {"num_hidden_layers": LAYERS[name]}, num_vq_tokens=256), 128)
    if name == "1.3b":
        return Size(ShowoConfig(num_vq_tokens=256), 128)
    vocabulary = {"llm_vocab_size": 800, "codebook_size": 4096, "vocab_size": 4907}
    return Size(ShowoConfig(llm_config=read_llm_config(TINY), num_vq_tokens=64, **vocabulary), 24)


def counts_of(rows: int, stage: Stage = STAGES["stage2"]) -> tuple[int, int, int]:
    """Rows of t2i, lm and mmu in the stage's proportions, at least one of each."""
    t2i, _, mmu = (max(1, round(rows * part / sum(stage.rows))) for part in stage.rows)
    return t2i, max(1, rows - t2i - mmu), mmu


@dataclass
class Batch:
    """ids and labels (B, L) int64, labels where a loss supervises and nowhere else, mask, rows of each task, and M."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: OmniMask
    counts: tuple[int, int, int]
    max_text: int


def make_batch(size: Size, rows: int, device: str = "cpu", stage: Stage = STAGES["stage2"]) -> Batch:
    """Random words and codes in rows of spec §2, t2i images masked as in training; text longer than M is cut."""
    torch.manual_seed(0)
    v, num_tokens, counts = size.config.vocabulary, size.config.num_vq_tokens, counts_of(rows, stage)
    t2i, lm, mmu = counts
    captions = [_caption(v, size.max_text, stage.drawn if n < t2i else stage.answered) for n in range(t2i + mmu)]
    codes = v.image_offset + torch.randint(0, v.codebook_size, (t2i + mmu, num_tokens))
    masked = MaskingNoise(get_mask_schedule("cosine"), v.mask_token_id, v.image_offset, v.codebook_size)(codes[:t2i])
    length = size.max_text + num_tokens + 3
    drawing, drawing_labels = [], []
    for text, image, wanted in zip(captions, masked.input_ids.tolist(), masked.labels.tolist(), strict=False):
        text = [v.pad_id] * (size.max_text - len(text)) + [v.t2i_id, *text]
        drawing.append([*text, v.soi_id, *image, v.eoi_id])
        drawing_labels.append([*text, v.soi_id, *wanted, v.eoi_id])
    reading = torch.randint(0, v.llm_vocab_size, (lm, length))
    answering = [
        [v.mmu_id, v.soi_id, *image, v.eoi_id, *text, *[v.pad_id] * (size.max_text - len(text))]
        for text, image in zip(captions[t2i:], codes[t2i:].tolist(), strict=True)
    ]
    ids = torch.cat([torch.tensor(drawing), reading, torch.tensor(answering)])
    labels = torch.cat([torch.tensor(drawing_labels), reading, torch.tensor(answering)])
    labels[:t2i, : size.max_text + 1] = labels[t2i:, 0] = labels[t2i + lm :, : num_tokens + 3] = IGNORE_ID
    labels = labels.masked_fill(ids == v.pad_id, IGNORE_ID)
    return Batch(ids.to(device), labels.to(device), OmniMask.from_ids(ids, v).to(device), counts, size.max_text)


def _caption(v: Vocabulary, room: int, words: tuple[int, int]) -> list[int]:
    """A number of words between bos and eos, which the published tokenizer spells with one id."""
    fewest, most = words
    num_words = min(int(torch.randint(fewest, most + 1, ())), room - 2)
    end = 50256 if v.llm_vocab_size > 50256 else 0
    return [end, *torch.randint(1, min(v.llm_vocab_size, 50256), (num_words,)).tolist(), end]


def objective_of(kind: str, batch: Batch, config: ShowoConfig) -> Objective | None:
    """What a run's batches bring along, made on the CPU; rows of four samples' length where they are packed."""
    if kind == "published":
        return None
    ids, packing = batch.ids.cpu(), None
    if "packed" in kind:
        packing = Packing.from_mask(ids != config.vocabulary.pad_id, batch.mask.to("cpu"), 4 * ids.shape[1])
    settings = {"packing": packing, "coefficients": COEFFICIENTS, "statistics": True}
    objective = Objective.from_labels(batch.labels.cpu(), batch.counts, batch.max_text, **settings)
    return objective.to(batch.ids.device)


def losses_of(
    kind: str, model: Showo, batch: Batch, objective: Objective | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The weighted loss with its graph; t2i, lm and mmu loss."""
    if kind == "published":
        parts = published.losses(model, batch.ids, batch.mask, batch.labels, batch.counts, batch.max_text)
        return sum(c * part for c, part in zip(COEFFICIENTS.values(), parts, strict=True)), list(parts)
    out = model(batch.ids, batch.mask, objective)
    return out.loss, [out.loss_t2i, out.loss_lm, out.loss_mmu]


def make_model(kind: str, size: Size, device: str = "cpu", attention: str = "sdpa") -> Showo:
    torch.manual_seed(0)
    attention = PACKED_SDPA if "packed" in kind and attention == "sdpa" else attention
    with torch.device(device):  # a GPU makes random weights in no time
        model = Showo._from_config(size.config, attn_implementation="sdpa" if kind == "published" else attention)
    model.train()
    if kind == "published":
        published.use_published_activations(model)
    if "checkpointing" in kind:
        enable_gradient_checkpointing(model)
    return model


def measure(kind: str, args: argparse.Namespace) -> dict:
    """Peak memory of `args.steps` + 1 training steps in MiB, seconds of the fastest but the first, and its losses."""
    size, stage = size_of(args), STAGES[args.stage]
    before = report.memory_in_use(args.device)
    model = make_model(kind, size, args.device, args.attention)
    if args.compile and kind != "published":
        model.compile()
    batch = make_batch(size, args.rows, args.device, stage)
    optimizer = adamw(model.named_parameters(), 0.01, lr=1e-4, fused=kind != "published")
    autocast = torch.autocast(args.device, torch.bfloat16) if args.dtype == "bf16" else nullcontext()
    seconds, first = [], None
    for _ in range(args.steps + 1):  # the first step makes the moments
        started = time.perf_counter()
        objective = objective_of(kind, batch, size.config)
        with autocast:
            loss, losses = losses_of(kind, model, batch, objective)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first = first or [loss.item() for loss in losses]  # waits for a GPU
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        del loss, losses
    parameters = sum(p.numel() for p in model.parameters())
    packing = objective.packing if objective else None
    return {
        "peak_mib": report.peak_memory(args.device) - before,
        "fixed_mib": 16 * parameters / report.MIB,  # fp32 weights, gradients and two moments
        "seconds": min(seconds[1:]),
        "losses": first,
        "parameters": parameters,
        "supervised": len(objective.index) if objective else int((batch.labels != IGNORE_ID).sum()),
        "positions": packing.num_positions if packing else batch.labels.numel(),
    }


def size_of(args: argparse.Namespace) -> Size:
    """The named size, with the stage's room for text where it has the published vocabulary."""
    size = sizes(args.size)
    return size if args.size == "tiny" else Size(size.config, STAGES[args.stage].max_text)


def limit(args: argparse.Namespace) -> dict:
    """Seconds that the packed step's counted work takes at this machine's best, by part."""
    size = size_of(args)
    batch = make_batch(size, args.rows, stage=STAGES[args.stage])
    objective = objective_of("ours, packed", batch, size.config)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    rates = limits.measure(args.device, dtype)
    used = (batch.ids != size.config.vocabulary.pad_id).sum().item()
    filler = objective.packing.num_positions - used
    pairs = objective.packing.mask.dense().sum().item() - filler  # filler sees itself
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Showo(size.config).parameters())
    work = {
        "layers": limits.layers(size.config, used, pairs) * 3,
        "head": limits.head(size.config, len(objective.index)) * 3,
        "optimiser": limits.Work(0.0, 28 * parameters),  # reads 4 numbers of each, writes 3
    }
    parts = {name: rates.floor(one) for name, one in work.items()}
    return {"seconds": sum(parts.values()), "parts": parts, "rates": vars(rates)}


def in_own_process(kind: str, argv: list[str], environment: dict[str, str] | None = None) -> dict:
    """What `measure` finds in a new process."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--kind", kind]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | (environment or {}))
    return json.loads(run.stdout.splitlines()[-1])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", *LAYERS, "1.3b"), default="tiny")
    parser.add_argument("--stage", choices=STAGES, default="stage2")
    parser.add_argument("--rows", type=int, default=24, help="in all, split as in the stage")
    parser.add_argument("--steps", type=int, default=2, help="timed ones; one more comes before")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of autocast; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--attention", choices=("sdpa", "flex_attention"), default="sdpa", help="of ours")
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="without the second run that a CPU needs for the peak")
    parser.add_argument("--kind", choices=KINDS, help="measure one alone, in this process, and print its JSON")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.kind:
        print(json.dumps(measure(args.kind, args)))
        return
    found = {}
    print(f"{'':28}{'peak MiB':>10}{'activations':>13}{'positions':>11}{'seconds':>9}  losses t2i, lm, mmu")
    for kind in KINDS:
        one = found[kind] = in_own_process(kind, argv)
        if args.device == "cpu" and not args.no_memory:
            one["peak_mib"] = in_own_process(kind, [*argv, "--steps", "1"], RETURN_MEMORY)["peak_mib"]
        losses = ", ".join(f"{loss:.5f}" for loss in one["losses"])
        sizes = f"{one['peak_mib']:10.0f}{one['peak_mib'] - one['fixed_mib']:13.0f}{one['positions']:11,}"
        print(f"{kind:28}{sizes}{one['seconds']:9.2f}  {losses}")
    floor = limit(args)
    print(f"{'limit':28}{'':34}{floor['seconds']:9.2f}")
    base, counts = found["published"], counts_of(args.rows, STAGES[args.stage])
    print(
        f"{base['parameters']:,} parameters; {counts[0]} t2i, {counts[1]} lm, {counts[2]} mmu rows; "
        f"{base['supervised']:,} of {base['positions']:,} positions supervised"
    )
    ratios = {
        kind: {
            "peak_mib": one["peak_mib"] / base["peak_mib"],
            "seconds": one["seconds"] / base["seconds"],
            "times_faster": base["seconds"] / one["seconds"],
            "share_of_limit": floor["seconds"] / one["seconds"],
        }
        for kind, one in found.items()
    }
    for kind in KINDS[1:]:
        print(f"{kind}: {ratios[kind]['times_faster']:.2f} times, {ratios[kind]['share_of_limit']:.0%} of the limit")
    settings = {"settings": vars(args), "results": found, "limit": floor, "ratios": ratios}
    print(json.dumps(report.facts() | settings))


if __name__ == "__main__":
    main(sys.argv[1:])
