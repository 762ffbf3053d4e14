"""Both generation loops against the published algorithm (`benchmarks/published.py`), in one run, on random weights.

    python3 benchmarks/generation.py                                    # 4 layers of the published width
    python3 benchmarks/generation.py --hidden 512 --layers 8 --heads 8 --timesteps 8 --new-tokens 40
    python3 benchmarks/generation.py --llm FAMILY --kv-heads 8      # of models/backbones.py
    python3 benchmarks/generation.py --loops answer --questions 20 --new-tokens 100
    python3 benchmarks/generation.py --device cuda --layers 24 --resolution 512 --batch 8 --timesteps 18 --repeats 2

Prints a table and last one JSON line: machine, date, commit, seconds, ratios. `generate` is transformers' own loop over
the same weights and prompt under a causal mask, so its tokens are others. `limit` is the time of the counted work at
the machine's measured matmul rate and copy bandwidth (`benchmarks/limits.py`). `--dtype bf16` and `--compile` also time
ours in that precision and compiled, against the published loops in fp32; on a GPU (`--device cuda`) both are on.
`--questions` asks so many about one image, one by one and in one batch. The exit code is 1 if the tokens in fp32 are
not the published ones.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch

from benchmarks import limits, published, report
from models import Showo, ShowoConfig, get_mask_schedule
from models.backbones import BACKBONES
from models.generation import cpu
from models.loading import DTYPES

MAX_TEXT = 128  # M
LOOPS = ("image", "answer")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", choices=BACKBONES, default=next(iter(BACKBONES)), help="family of the language model")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="of keys and values; default: as many")
    parser.add_argument("--tokens", type=int, default=256, help="image tokens, a square")
    parser.add_argument("--resolution", type=int, choices=(256, 512), help="of the published models, instead of tokens")
    parser.add_argument("--batch", type=int, default=1, help="images generated at once")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=LOOPS)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--timesteps", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--questions", type=int, default=0, help="about one image, one by one against all at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of further rows; default: bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="further rows; default: on a GPU")
    parser.add_argument("--cpu-kernels", action=argparse.BooleanOptionalAction, default=True, help="on a CPU")
    parser.add_argument("--repeats", type=int, default=1, help="the fastest of so many runs counts")
    args = parser.parse_args(argv)
    args.tokens = (args.resolution // 16) ** 2 if args.resolution else args.tokens
    on_gpu = args.device != "cpu"
    args.dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    args.compile = on_gpu if args.compile is None else args.compile
    return args


def make_model(args) -> Showo:
    """Random weights of the given size over the full published vocabulary."""
    torch.manual_seed(0)
    llm = {"model_type": args.llm, "hidden_size": args.hidden, "num_hidden_layers": args.layers}
    llm |= {"num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads or args.heads}
    llm |= {"intermediate_size": 4 * args.hidden, "max_position_embeddings": 2048}
    llm |= {"head_dim": args.hidden // args.heads, "sliding_window": None}
    return Showo(ShowoConfig(llm_config=llm, num_vq_tokens=args.tokens)).eval().to(args.device)


def make_prompts(model: Showo, args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text-to-image rows with 20 words, their unconditional rows, and a 10-word question about one image."""
    v = model.vocabulary
    words = torch.randint(0, 50000, (30,)).tolist()
    block = [v.soi_id, *[v.mask_token_id] * args.tokens, v.eoi_id]

    def t2i(text: list[int]) -> list[int]:
        ids = [v.t2i_id, 50256, *text, 50256]
        return [v.pad_id] * (MAX_TEXT + 1 - len(ids)) + ids + block

    codes = (v.image_offset + torch.randint(0, v.codebook_size, (args.tokens,))).tolist()
    question = [v.mmu_id, v.soi_id, *codes, v.eoi_id, 50256, *words[20:]]
    rows = (torch.tensor([row], device=args.device) for row in (t2i(words[:20]), t2i([])))
    return *(row.repeat(args.batch, 1) for row in rows), torch.tensor([question], device=args.device)


def timed(run: Callable[[], torch.Tensor], args) -> tuple[float, torch.Tensor]:
    """(seconds of the fastest run, its result), after one run that pays for set-up."""
    results = [run()]
    best = min(limits.timed(run, args.device, results) for _ in range(args.repeats))
    return best, results[0]


def ours(model: Showo, args, prompts) -> dict[str, Callable]:
    """Our loops as functions without arguments."""
    row, uncond, question = prompts

    def image() -> torch.Tensor:
        settings = {"guidance_scale": args.guidance, "timesteps": args.timesteps}
        return model.t2i_generate(row, uncond, **settings, generator=torch.Generator(args.device).manual_seed(0))

    return {
        "image": image,
        "answer": partial(model.mmu_generate, question, max_new_tokens=args.new_tokens, top_k=1),
    }


def baseline(model: Showo, args, prompts) -> dict[str, Callable]:
    """The published ones, and transformers' own loop for text."""
    row, uncond, question = prompts

    def image() -> torch.Tensor:
        return published.t2i_generate(
            model,
            row,
            uncond,
            guidance_scale=args.guidance,
            timesteps=args.timesteps,
            temperature=1.0,
            noise_schedule=get_mask_schedule("cosine"),
            generator=torch.Generator(args.device).manual_seed(0),
        )

    length = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}
    return {
        "image": image,
        "answer": partial(published.mmu_generate, model, question, max_new_tokens=args.new_tokens),
        "generate": partial(model.showo.generate, question, attention_mask=torch.ones_like(question), **length),
    }


def limit(model: Showo, args, prompts, dtype: torch.dtype) -> dict[str, float]:
    """Seconds that the counted work of each loop takes at least, at the machine's measured rates.

    Image: text once, then all layers at the image block and the head at N positions and all codes, every step; with
    guidance twice the rows, but the head once. Ours skips a part of that where codes are known. Answer: the prompt,
    then all weights read once for every new token.
    """
    config, rates = model.config, limits.measure(args.device, dtype)
    length, rows = args.tokens + 2, args.batch * (2 if args.guidance > 0 else 1)
    text = int((prompts[0][0] != model.vocabulary.pad_id).sum()) - length
    step = limits.layers(config, rows * length, rows * length * (text + length))
    step += limits.head(config, args.batch * args.tokens, model.vocabulary.codebook_size)
    image = limits.layers(config, rows * text, rows * text * text / 2) + step * args.timesteps
    questions, prompt = prompts[2].shape
    answer = rates.floor(limits.layers(config, questions * prompt, questions * prompt * prompt))
    answer += args.new_tokens * rates.floor(limits.weights(config, dtype.itemsize))
    return {"image": rates.floor(image), "answer": answer}


def compare(model: Showo, args, prompts, floors) -> dict:
    """The loops in fp32: the published ones and `generate` with transformers' modules as they are, then ours."""
    loops = [*args.loops, *["generate"] * ("answer" in args.loops)]
    with published.published_activations(model):
        theirs = {name: timed(run, args) for name, run in baseline(model, args, prompts).items() if name in loops}
    if args.device == "cpu" and args.cpu_kernels:
        cpu.enable(model)
    results = {}
    for name in args.loops:
        (slow, expected), floor = theirs[name], floors[name]
        fast, found = timed(ours(model, args, prompts)[name], args)
        result = {
            "published_s": slow,
            "ours_s": fast,
            "ratio": slow / fast,
            "same_tokens": torch.equal(found, expected),
        }
        result |= {"limit_s": floor, "share_of_limit": floor / fast}
        cells = f"{slow:12.2f}{fast:10.2f}{slow / fast:8.1f}{floor:10.2f}{floor / fast:8.0%}  {result['same_tokens']}"
        if name == "answer":
            own = theirs["generate"][0]
            result |= {"generate_s": own, "generate_ratio": own / fast}
            cells += f"{own:16.2f}{own / fast:8.1f}"
        results[name] = result
        print(f"{name + ' fp32':28}{cells}")
    return results


def compare_questions(model: Showo, args, prompts) -> dict:
    """Questions of 8 to 16 ids about one image: each by itself, and all in one batch that encodes the image once."""
    prefix = prompts[2][0, : args.tokens + 3]
    texts = [torch.randint(0, 50000, (8 + number % 9,), device=args.device) for number in range(args.questions)]
    rows = [torch.cat([prefix, text]) for text in texts]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.vocabulary.pad_id)
    settings = {"max_new_tokens": args.new_tokens, "top_k": 1}

    def one_by_one() -> torch.Tensor:
        return torch.cat([model.mmu_generate(row[None], **settings) for row in rows])

    (slow, slow_ids), (fast, fast_ids) = (
        timed(run, args) for run in (one_by_one, partial(model.mmu_generate, batch, **settings))
    )
    same = torch.equal(slow_ids, fast_ids)
    print(f"{args.questions} questions, one by one {slow:.2f} s, at once {fast:.2f} s: {slow / fast:.1f} times  {same}")
    return {"one_by_one_s": slow, "ours_s": fast, "ratio": slow / fast, "same_tokens": same}


def time_further(model: Showo, args, prompts, published_seconds: dict[str, float]) -> dict:
    """Ours in `args.dtype`, eager (unless that is fp32) and compiled (if asked for)."""
    results = {}
    model.to(DTYPES[args.dtype])
    floors = limit(model, args, prompts, DTYPES[args.dtype])
    for compiled in [False] * (args.dtype != "fp32") + [True] * args.compile:
        if compiled:
            model.compile_steps()
        for name in args.loops:
            seconds, _ = timed(ours(model, args, prompts)[name], args)
            ratio, floor = published_seconds[name] / seconds, floors[name]
            label = f"{name} {args.dtype}{' compiled' * compiled}"
            results[label] = {"ours_s": seconds, "ratio": ratio, "limit_s": floor, "share_of_limit": floor / seconds}
            print(f"{label:28}{'':12}{seconds:10.2f}{ratio:8.1f}{floor:10.2f}{floor / seconds:8.0%}")
    return results


def exit_code(results: dict) -> int:
    """1 if any tokens differ from the published ones."""
    differing = [name for name, result in results.items() if not result.get("same_tokens", True)]
    for name in differing:
        print(f"{name}: the tokens differ from the published ones", file=sys.stderr)
    return int(bool(differing))


def main(argv: list[str]) -> int:
    args = parse(argv)
    model = make_model(args)
    prompts = make_prompts(model, args)
    floors = limit(model, args, prompts, torch.float32)
    columns = f"{'published s':>12}{'ours s':>10}{'ratio':>8}{'limit s':>10}{'share':>8}  same tokens"
    print(f"{'':28}{columns}  generate s   ratio")
    results = compare(model, args, prompts, floors)
    seconds = {name: result["published_s"] for name, result in results.items()}
    if args.questions:
        results["questions"] = compare_questions(model, args, prompts)
    if args.compile or args.dtype != "fp32":
        results |= time_further(model, args, prompts, seconds)
    print(json.dumps(report.facts() | {"settings": vars(args), "results": results}), flush=True)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
