"""Peak memory of head and loss at the full vocabulary: published, and ours.

    python3 benchmarks/loss_memory.py

Stage-2 proportions (5 t2i, 2 lm, 5 mmu rows of 387), hidden states of 512; forward and backward, with the gradients of
head and hidden states. Each variant runs in its own process; memory used before is subtracted.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch

from benchmarks import published, report
from models import OmniMask, Showo, ShowoConfig
from training.loss import Objective

MAX_TEXT, TOKENS, COUNTS = 128, 256, (5, 2, 5)
TEXT = 24  # words of a caption


def rows(model: Showo) -> tuple[torch.Tensor, torch.Tensor, OmniMask]:
    """ids and labels (B, L) of random rows with captions of `TEXT` words, 64 % of the t2i image tokens masked."""
    v = model.vocabulary
    t2i, lm, mmu = COUNTS
    pads = torch.full((t2i, MAX_TEXT - TEXT), v.pad_id)
    codes = v.image_offset + torch.randint(0, v.codebook_size, (t2i + mmu, TOKENS))
    words = torch.randint(0, 50000, (t2i + mmu, TEXT))

    def block(part):
        edge = torch.full((len(part), 1), v.soi_id)
        return torch.cat([edge, part, edge + v.eoi_id - v.soi_id], 1)

    first = torch.cat([pads, torch.full((t2i, 1), v.t2i_id), words[:t2i], block(codes[:t2i])], 1)
    hidden = torch.rand(t2i, TOKENS) < 0.64
    labels = torch.full_like(first, -100)
    labels[:, -TOKENS - 1 : -1] = torch.where(hidden, codes[:t2i], -100)
    first[:, -TOKENS - 1 : -1] = torch.where(hidden, v.mask_token_id, codes[:t2i])
    length = first.shape[1]
    second = torch.randint(0, 50000, (lm, length))
    task = torch.full((mmu, 1), v.mmu_id)
    rest = torch.full((mmu, MAX_TEXT - TEXT), v.pad_id)
    third = torch.cat([task, block(codes[t2i:]), words[t2i:], rest], 1)
    third_labels = third.masked_fill(third == v.pad_id, -100)
    third_labels[:, : TOKENS + 3] = -100
    ids = torch.cat([first, second, third])
    return ids, torch.cat([labels, second, third_labels]), OmniMask.from_ids(ids, v)


def peak(kind: str) -> float:
    """MiB that one forward and backward added to this process."""
    torch.manual_seed(0)
    llm = {"hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = Showo(ShowoConfig(llm_config=llm | {"intermediate_size": 2048}))
    ids, labels, mask = rows(model)
    hidden = torch.randn(*ids.shape, 512, requires_grad=True)
    model.embed = model.hidden_states = lambda *args, **settings: hidden  # so that no layer is measured
    before = report.memory_in_use("cpu")
    if kind == "published":
        loss = sum(published.losses(model, ids, mask, labels, COUNTS, MAX_TEXT))
    else:
        equal = dict.fromkeys(("t2i", "lm", "mmu"), 1.0)
        objective = Objective.from_labels(labels, COUNTS, MAX_TEXT, coefficients=equal)
        loss = model(ids, mask, objective).loss
    loss.backward()
    assert hidden.grad is not None and model.showo.lm_head.weight.grad is not None
    return report.peak_memory("cpu") - before


def main(argv: list[str]) -> None:
    if argv:
        print(peak(argv[0]))
        return
    found = {}
    for kind in ("published", "ours"):
        run = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, check=True)
        found[f"{kind}_mib"] = round(float(run.stdout.split()[-1]), 1)
    found["share"] = round(found["ours_mib"] / found["published_mib"], 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
