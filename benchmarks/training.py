"""Peak memory and time of one training step: the published algorithm against ours, on random weights.

    python3 benchmarks/training.py --size tiny
    python3 benchmarks/training.py --size 100m --rows 12

Rows are those of pre-training stage 2: 10 t2i, 4 lm, 10 mmu of every 24, captions of 10 to 30 words. Three ways of
taking the step, each in a process of its own so that no peak hides in another's:

- published: whole rows through the vocabulary head at every position (`published.losses`). The published code reads no
  `model.gradient_checkpointing`, so it keeps all activations.
- ours: the head at supervised positions only; with the counts a training run logs.
- ours, checkpointing: the same as our YAMLs have it, with gradient checkpointing.

AdamW with its fp32 moments, fp32 weights, bf16 autocast on a GPU. "Activations" is all but weights, gradients and
moments. Prints a table and last one JSON line: machine, date, commit, ratios.
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

from benchmarks import published, report
from models import OmniMask, Showo, ShowoConfig, get_mask_schedule
from models.modeling_showo import read_llm_config
from models.vocabulary import IGNORE_ID, Vocabulary
from training.masking import MaskingNoise
from training.optimization import parameter_groups
from training.parts import enable_gradient_checkpointing

KINDS = ("published", "ours", "ours, checkpointing")
COEFFICIENTS = (1.0, 0.1, 1.0)  # t2i, lm, mmu
TINY = str(report.ROOT / "checkpoints" / "showo-tiny" / "llm")
# glibc keeps freed blocks of up to 32 MiB, which made half of the peaks; with this, larger ones go back at once. It
# costs time, so that is measured without it.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
PHI_100M = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}


@dataclass
class Size:
    """A model and the room for text in its rows."""

    config: ShowoConfig
    max_text: int  # M


def sizes(name: str) -> Size:
    """``tiny``: `checkpoints/showo-tiny`; ``100m``: 12 layers of 512 under the whole published vocabulary."""
    if name == "100m":
        return Size(ShowoConfig(llm_config=PHI_100M, num_vq_tokens=256), 128)
    vocabulary = {"llm_vocab_size": 800, "codebook_size": 4096, "vocab_size": 4907}
    return Size(ShowoConfig(llm_config=read_llm_config(TINY), num_vq_tokens=64, **vocabulary), 24)


def counts_of(rows: int) -> tuple[int, int, int]:
    """Rows of t2i, lm and mmu in the proportions 10 : 4 : 10, at least one of each."""
    t2i = max(1, round(rows * 10 / 24))
    return t2i, max(1, rows - 2 * t2i), t2i


@dataclass
class Batch:
    """ids and labels (B, L) int64, labels where a loss supervises and nowhere else, mask, rows of each task, and M."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: OmniMask
    counts: tuple[int, int, int]
    max_text: int


def make_batch(size: Size, rows: int, device: str = "cpu") -> Batch:
    """Random words and codes in rows of SPEC §2, t2i images masked as in training; text longer than M is cut."""
    torch.manual_seed(0)
    v, num_tokens, counts = size.config.vocabulary, size.config.num_vq_tokens, counts_of(rows)
    t2i, lm, mmu = counts
    captions = [_caption(v, size.max_text) for _ in range(t2i + mmu)]
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


def _caption(v: Vocabulary, room: int) -> list[int]:
    """10 to 30 words between bos and eos, which Phi-1.5 spells with one id."""
    num_words = min(int(torch.randint(10, 31, ())), room - 2)
    end = 50256 if v.llm_vocab_size > 50256 else 0
    return [end, *torch.randint(1, min(v.llm_vocab_size, 50256), (num_words,)).tolist(), end]


def losses_of(kind: str, model: Showo, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """t2i, lm and mmu loss, with their graph."""
    if kind == "published":
        return published.losses(model, batch.ids, batch.mask, batch.labels, batch.counts, batch.max_text)
    names = ("batch_size_t2i", "batch_size_lm", "batch_size_mmu")
    rows = dict(zip(names, batch.counts, strict=True))
    out = model(
        batch.ids, batch.mask, labels=batch.labels, max_seq_length=batch.max_text, return_statistics=True, **rows
    )
    return out.loss_t2i, out.loss_lm, out.loss_mmu


def make_model(kind: str, size: Size, device: str = "cpu") -> Showo:
    torch.manual_seed(0)
    model = Showo(size.config).to(device).train()
    if kind == "ours, checkpointing":
        enable_gradient_checkpointing(model)
    return model


def measure(kind: str, args: argparse.Namespace) -> dict:
    """Peak memory of `args.steps` + 1 training steps in MiB, seconds of the fastest but the first, and its losses."""
    size = sizes(args.size)
    before = report.memory_in_use(args.device)
    model = make_model(kind, size, args.device)
    batch = make_batch(size, args.rows, args.device)
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), 0.01), lr=1e-4)
    autocast = torch.autocast(args.device, torch.bfloat16) if args.dtype == "bf16" else nullcontext()
    seconds, first = [], None
    for _ in range(args.steps + 1):  # the first step makes the moments
        started = time.perf_counter()
        with autocast:
            losses = losses_of(kind, model, batch)
        sum(factor * loss for factor, loss in zip(COEFFICIENTS, losses, strict=True)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first = first or [loss.item() for loss in losses]  # waits for a GPU
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "peak_mib": report.peak_memory(args.device) - before,
        "fixed_mib": 16 * parameters / report.MIB,  # fp32 weights, gradients and two moments
        "seconds": min(seconds[1:]),
        "losses": first,
        "parameters": parameters,
        "supervised": int((batch.labels != IGNORE_ID).sum()),
        "positions": batch.labels.numel(),
    }


def in_own_process(kind: str, argv: list[str], environment: dict[str, str] | None = None) -> dict:
    """What `measure` finds in a new process."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--kind", kind]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | (environment or {}))
    return json.loads(run.stdout.splitlines()[-1])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "100m"), default="tiny")
    parser.add_argument("--rows", type=int, default=24, help="in all, split 10 : 4 : 10")
    parser.add_argument("--steps", type=int, default=2, help="timed ones; one more comes before")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of autocast; default: bf16 on a GPU, fp32 on a CPU")
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
    print(f"{'':22}{'peak MiB':>10}{'activations':>13}{'seconds':>9}  losses t2i, lm, mmu")
    for kind in KINDS:
        one = found[kind] = in_own_process(kind, argv)
        if args.device == "cpu":
            one["peak_mib"] = in_own_process(kind, [*argv, "--steps", "1"], RETURN_MEMORY)["peak_mib"]
        losses = ", ".join(f"{loss:.5f}" for loss in one["losses"])
        activations = one["peak_mib"] - one["fixed_mib"]
        print(f"{kind:22}{one['peak_mib']:10.0f}{activations:13.0f}{one['seconds']:9.2f}  {losses}")
    base, counts = found["published"], counts_of(args.rows)
    print(
        f"{base['parameters']:,} parameters; {counts[0]} t2i, {counts[1]} lm, {counts[2]} mmu rows; "
        f"{base['supervised']:,} of {base['positions']:,} positions supervised"
    )
    ratios = {
        kind: {name: one[name] / base[name] for name in ("peak_mib", "seconds")}
        for kind, one in found.items()
        if kind != "published"
    }
    print(json.dumps(report.facts() | {"settings": vars(args), "results": found, "ratios": ratios}))


if __name__ == "__main__":
    main(sys.argv[1:])
