"""All that is to be checked and measured on a GPU, in one command of at most six minutes on one 80-GB card.

    python3 benchmarks/gpu_check.py                           # make gpu-check
    python3 benchmarks/gpu_check.py --parts images answers    # some of the parts
    python3 benchmarks/gpu_check.py --device cpu --tiny       # a try without a GPU

| part | what it finds |
|---|---|
| goldens | logits, losses, gradients, image codes and answers of the published system in float32; FlexAttention's too |
| tests | the tests marked `gpu` (needs pytest) |
| images | 512², batch 8, guidance 5, 18 steps, 1.3 B random weights: published, eager, compiled, limit |
| answers | 100 tokens after prompts of 1,027, batch 1 and 8: the same, and transformers' own `generate` |
| training | a step of stage 2, 10/4/10 rows: published, ours packed under sdpa and FlexAttention; MFU, peak memory |

Each part runs in a process of its own under a time limit, the slowest measurement last; one that fails or is stopped
does not touch the others. Every result is printed and written to `benchmarks/results/<card>-<date>.json` as soon as it
is known. The exit code is 1 if a check failed or a part did not come to its end. Of this project's requirements torch,
transformers, accelerate, einops, safetensors, tokenizers, numpy and pillow are enough.
"""

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch
import transformers

from benchmarks import generation, limits, published, report, training
from models.generation import image
from tests.parity.goldens import facts, prompting, tensors, tiny_showo

SECONDS = 350  # of all parts together, which leaves ten to start
FULL = "--hidden 2048 --layers 24 --heads 32 --resolution 512 --batch 8 --timesteps 18 --new-tokens 100".split()
TINY = "--hidden 32 --layers 2 --heads 2 --tokens 16 --batch 2 --timesteps 4 --new-tokens 8".split()
PUBLISHED_STEPS = 2  # that are timed of the published loop over images, all of whose steps cost the same
PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 FLOP/s by data sheet, dense
GOLDEN_ROWS = {"batch_size_t2i": 3, "batch_size_lm": 2, "batch_size_mmu": 2, "max_seq_length": 12}


class Record:
    """The results of one part in the file of all.

    Calling it measures: a result is a dict, and the error in place of one that could not be had.
    """

    def __init__(self, file: Path, part: str):
        self.file, self.part = file, part

    def __call__(self, name: str, measure: Callable[[], dict]) -> None:
        try:
            result = measure()
        except Exception as error:  # whatever it is, the other measurements are still wanted
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        self.save("results", {name: result})
        cells = (f"{key} {one:.4g}" if isinstance(one, float) else f"{key} {one}" for key, one in result.items())
        print(f"{self.part:10}{name:40} {', '.join(cells)}", flush=True)

    def save(self, key: str, value) -> None:
        """Writes the file whole or not at all; dicts are joined with what is there."""
        everything = json.loads(self.file.read_text())
        part = everything["parts"].setdefault(self.part, {"results": {}})
        part[key] = part[key] | value if isinstance(value, dict) else value
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(everything, indent=1) + "\n")
        unfinished.replace(self.file)


# ---- the parts ----


def goldens(args: argparse.Namespace, record: Record) -> None:
    device, golden, cases = args.device, tensors(), facts()
    ids, labels = golden["forward.input_ids"].to(device), golden["forward.labels"].to(device)
    visible = golden["forward.input_ids"] != cases["special_token_ids"]["<|pad|>"]
    gradients = {}

    def error(found: torch.Tensor, expected: torch.Tensor, bound: float) -> dict:
        largest = float((found.detach().cpu() - expected).abs().max())
        return {"error_at_most": largest, "ok": largest <= bound}

    def logits(model) -> dict:
        with torch.no_grad():
            return error(model(ids).logits[visible.to(device)], golden["forward.logits"][visible], 1e-4)

    def losses(model, name: str) -> dict:
        out = model(ids, labels=labels, **GOLDEN_ROWS)
        (out.loss_t2i + 0.1 * out.loss_lm + out.loss_mmu).backward()
        gradients[name] = {key: parameter.grad.cpu() for key, parameter in model.named_parameters()}
        return error(torch.stack([out.loss_t2i, out.loss_lm, out.loss_mmu]), golden["forward.losses"], 1e-4)

    def gradient_norms(name: str) -> dict:
        norms = torch.stack([gradients[name][key].norm() for key in cases["grad_norm_keys"]])
        return error(norms / golden["forward.grad_norms"], torch.ones_like(norms), 1e-3)

    def against_sdpa(name: str) -> dict:
        one, other = (torch.cat([g.flatten() for g in gradients[n].values()]) for n in (name, "sdpa"))
        return error(one, other, 1e-3)

    def codes(model, case: int) -> dict:
        settings = cases["generate"][case]
        rows = golden["prompt.t2i_gen_input_ids"].clone()
        if settings["partial"]:
            rows[:, -17:-1] = golden[f"generate.{case}.image_ids"]
        found = model.t2i_generate(
            rows.to(device),
            golden["prompt.t2i_uncond_input_ids"].to(device),
            noise_schedule=settings["schedule"],
            generator=torch.Generator().manual_seed(settings["seed"]),
            **{key: settings[key] for key in ("guidance_scale", "timesteps", "temperature")},
        )
        return {"ok": torch.equal(found.cpu(), golden[f"generate.{case}.tokens"])}

    def answer(model, case: int) -> dict:
        prompt = golden[f"mmu.{case}.input_ids"].to(device)
        found = model.mmu_generate(prompt, max_new_tokens=24, top_k=1, eot_token=prompting().eos_id)
        return {"ok": torch.equal(found[0].cpu(), golden[f"mmu.{case}.new_ids"])}

    for name in ("sdpa", "eager") + ("flex_attention",) * (device != "cpu"):  # which has no backward pass on a CPU
        model = tiny_showo(attn_implementation=name).to(device)
        record(f"logits, {name}", partial(logits, model))
        record(f"losses, {name}", partial(losses, model, name))
        record(f"gradient norms, {name}", partial(gradient_norms, name))
        if name != "sdpa":
            record(f"gradients, {name} against sdpa", partial(against_sdpa, name))
    model, image.maskgit_step = tiny_showo().to(device), on_the_cpu(image.maskgit_step)
    for case in range(len(cases["generate"])):
        record(f"image codes, case {case}", partial(codes, model, case))
    for case in range(2):
        record(f"answer, case {case}", partial(answer, model, case))


def on_the_cpu(step: Callable) -> Callable:
    """A sampling step whose random numbers are those of a CPU's generator, which a GPU's are not."""

    def run(logits: torch.Tensor, codes: torch.Tensor, mask_id: int, **settings):
        settings = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
        return tuple(result.to(logits.device) for result in step(logits.cpu(), codes.cpu(), mask_id, **settings))

    return run


def gpu_tests(args: argparse.Namespace, record: Record) -> None:
    import pytest  # here, since a machine without it can run all the rest

    class Reporter:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                record(report.nodeid.rpartition("/")[2], lambda: {"outcome": report.outcome, "ok": not report.failed})

    files = [str(file) for file in (report.ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in file.read_text()]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(report.ROOT)]
    code = pytest.main([*options, *files], plugins=[Reporter()])
    record("pytest", lambda: {"exit_code": int(code), "ok": code == 0})


def images(args: argparse.Namespace, record: Record) -> None:
    options, model, prompts = random_model(args)
    tokens = options.batch * options.tokens
    few = argparse.Namespace(**vars(options) | {"timesteps": PUBLISHED_STEPS})
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        run, steps = generation.baseline(model, few, prompts)["image"], options.timesteps / PUBLISHED_STEPS
        with published.published_activations(model):
            record(f"published, {dtype}", partial(speed, run, args.device, tokens, scale=steps))
    run = generation.ours(model, options, prompts)["image"]
    record("eager", partial(speed, run, args.device, tokens))
    record("limit", lambda: {"seconds": generation.limit(model, options, prompts, torch.bfloat16)["image"]})
    model.compile_steps()
    record("compiled", partial(speed, run, args.device, tokens))


def answers(args: argparse.Namespace, record: Record) -> None:
    options, model, prompts = random_model(args)
    model.to(torch.bfloat16)
    v, runs = model.vocabulary, {}
    for rows in (1, 8):
        question = prompts[2][:, : options.tokens + 3].repeat(rows, 1)  # <mmu> <soi> N codes <eoi>
        question[:, 2:-1] = v.image_offset + torch.randint_like(question[:, 2:-1], v.codebook_size)  # nothing to share
        asked, tokens, name = (*prompts[:2], question), rows * options.new_tokens, f", batch {rows}"
        theirs = generation.baseline(model, options, asked)
        with published.published_activations(model):
            if rows == 1:  # the published loop knows no other
                record(f"published{name}", partial(speed, theirs["answer"], args.device, tokens))
            record(f"generate{name}", partial(speed, theirs["generate"], args.device, tokens))
        runs[name] = partial(speed, generation.ours(model, options, asked)["answer"], args.device, tokens)
        record(f"eager{name}", runs[name])
        limit = partial(generation.limit, model, options, asked, torch.bfloat16)
        record(f"limit{name}", lambda limit=limit: {"seconds": limit()["answer"]})
    model.compile_steps()
    for name, run in runs.items():
        record(f"compiled{name}", run)


def random_model(args: argparse.Namespace):
    """(settings of `benchmarks/generation.py`, the model with random weights, its prompts)."""
    options = generation.parse([*(TINY if args.tiny else FULL), "--device", args.device])
    with torch.device(args.device):  # a GPU makes random weights in no time
        model = generation.make_model(options)
    return options, model, generation.make_prompts(model, options)


def speed(run: Callable, device: str, tokens: int, scale: float = 1.0) -> dict:
    """Seconds of a loop times `scale`, and tokens a second, after a run that chooses and compiles kernels."""
    first, seconds = limits.timed(run, device), limits.timed(run, device) * scale
    return {"seconds": seconds, "tokens_per_s": tokens / seconds, "first_run_s": first}


def train(args: argparse.Namespace, record: Record) -> None:
    for name, kind, attention in (
        ("published", "published", "sdpa"),
        ("packed, sdpa", "ours, packed", "sdpa"),
        ("packed, flex_attention", "ours, packed", "flex_attention"),
        ("packed, flex_attention, checkpointing", "ours, packed, checkpointing", "flex_attention"),
    ):
        if attention == "sdpa" or args.device != "cpu":
            record(name, partial(training_step, args, kind, attention))


def training_step(args: argparse.Namespace, kind: str, attention: str) -> dict:
    """A step of 24 rows; of 12 if those do not fit in memory."""
    for rows in (24, 12):
        size = ["--size", "tiny" if args.tiny else "1.3b", "--rows", str(rows)]
        options = training.parse([*size, "--device", args.device, "--attention", attention])
        if args.device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = training.measure(kind, options)
            break
        except torch.OutOfMemoryError:
            if rows == 12:
                raise
    limit = training.limit(options)
    measured = limit["rates"]["flops"]
    peak = next((flops for card, flops in PEAK.items() if card in str(report.machine()["gpu"])), measured)
    needed = (limit["parts"]["layers"] + limit["parts"]["head"]) * measured  # FLOP, of positions without padding
    speeds = {"limit_s": limit["seconds"], "mfu": needed / found["seconds"] / peak, "peak_flops": peak}
    return {"rows": rows, "seconds_per_row": found["seconds"] / rows} | found | speeds


# name: (function, its share of the time)
PARTS = {"goldens": (goldens, 40), "tests": (gpu_tests, 75), "images": (images, 80), "answers": (answers, 100)}
PARTS["training"] = (train, 55)


# ---- the command ----


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a try on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--output", type=Path, default=report.ROOT / "benchmarks" / "results", help="folder")
    parser.add_argument("--file", type=Path, help="run one part in this process and write into this file")
    return parser.parse_args(argv)


def in_own_process(argv: list[str], seconds: float) -> str:
    """How a part ended: done, failed or stopped at its time limit."""
    process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *argv], start_new_session=True)
    try:
        return "failed" if process.wait(seconds) else "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile for it
        process.wait()
        return "stopped at its time limit"


def main(argv: list[str]) -> int:
    args, started = parse(argv), time.monotonic()
    if args.file:
        [part] = args.parts
        PARTS[part][0](args, Record(args.file, part))
        return 0
    about = report.facts() | {"transformers": transformers.__version__, "settings": {"tiny": args.tiny}, "parts": {}}
    card = about["machine"]["gpu"] if args.device != "cpu" else "cpu"
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{re.sub(r'[^a-z0-9]+', '-', card.lower())}-{about['date']}.json"
    file.write_text(json.dumps(about))
    for number, part in enumerate(args.parts):
        left = args.seconds - (time.monotonic() - started)
        limit = left * PARTS[part][1] / sum(PARTS[later][1] for later in args.parts[number:])
        flags, begun = ["--file", str(file), "--parts", part, "--device", args.device], time.monotonic()
        ended = in_own_process(flags + ["--tiny"] * args.tiny, limit)
        record = Record(file, part)
        for key, value in (("seconds", time.monotonic() - begun), ("limit_s", limit), ("ended", ended)):
            record.save(key, value)
        print(f"{part:10}{ended} after {time.monotonic() - begun:.0f} s of {limit:.0f}", flush=True)
    print(file)
    return exit_code(json.loads(file.read_text())["parts"])


def exit_code(parts: dict) -> int:
    """1 if a part did not end, a result could not be had, or a check failed."""
    results = [result for part in parts.values() for result in part["results"].values()]
    good = all("error" not in result and result.get("ok", True) for result in results)
    return int(not good or any(part["ended"] != "done" for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
