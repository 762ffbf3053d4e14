"""What a training step of documents costs, against one of the three published flows with the same images and texts.

    python3 benchmarks/mixed_training.py
    python3 benchmarks/mixed_training.py --hidden 64 --layers 2 --heads 2 --tokens 16 --words 4 --steps 1

A document is a story: a text and its image, in turn. The three flows have of each image a row of text to image, and one
in which it is answered with the next text; of each text, one of language modelling. All rows are made by the classes of
a run, from codes. Each way of taking the step has a process of its own, so that no peak hides in another's; ratios are
to the three flows with one sample in a row. Prints a table and last one JSON line.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch

from benchmarks import report
from common.config import TrainingConfig, load_config
from models import Showo, ShowoConfig
from models.loading import load_text_tokenizer
from training.batches import BatchBuilder, OmniBatch
from training.optimization import adamw
from training.packing import PACKED_SDPA
from training.understanding import VqUnderstanding

CONFIG = "configs/showo_tiny_train.yaml"  # its text tokenizer and vocabulary
FLOWS, HISTORIES = "three flows", ("clean", "masked", "prefix")
KINDS = [f"{what}{packed}" for what in (FLOWS, *(f"mixed, {one}" for one in HISTORIES)) for packed in ("", ", packed")]


def make_config(kind: str, args: argparse.Namespace):
    history = next((one for one in HISTORIES if one in kind), HISTORIES[0])
    longest = 4 + args.images * (2 * (args.tokens + 2) + args.words + 2)
    settings = {
        "dataset.packing": "packed" in kind,
        "dataset.preprocessing.max_seq_length": args.words + 2,
        "model.showo.num_vq_tokens": args.tokens,
        "training.batch_size_mixed": args.documents,
        "mixed.history": history,
        "mixed.max_length": longest,
        "training.cond_dropout_prob": 0.0,
    }
    return load_config([f"config={CONFIG}", *(f"{key}={value}" for key, value in settings.items())], TrainingConfig)


def make_samples(kind: str, args: argparse.Namespace, tokenizer, codebook_size: int) -> dict[str, list]:
    """Flow → samples, of the same images and texts in all ways."""
    torch.manual_seed(0)
    stories = []
    for _ in range(args.documents):
        story = []
        for _ in range(args.images):
            ids = torch.randint(300, len(tokenizer), (args.words,))  # longer than one letter
            story.append((tokenizer.decode(ids), torch.randint(codebook_size, (args.tokens,))))
        stories.append(story)
    if FLOWS not in kind:
        segments = [
            [part | {"loss": True} for text, codes in story for part in ({"text": text}, {"codes": codes})]
            for story in stories
        ]
        return {"mixed": [{"segments": one, "key": ""} for one in segments]}
    pairs = [pair for story in stories for pair in story]
    nexts = [(codes, text) for (_, codes), (text, _) in zip(pairs, [*pairs[1:], pairs[0]], strict=True)]
    return {
        "t2i": [{"text": text, "codes": codes} for text, codes in pairs],
        "lm": [text for text, _ in pairs],
        "mmu": [{"text": text, "codes": codes} for codes, text in nexts],
    }


def make_builder(kind: str, args: argparse.Namespace) -> tuple[BatchBuilder, ShowoConfig]:
    config = make_config(kind, args)
    showo = config.model.showo
    sizes = {key: showo[key] for key in ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens")}
    llm = {"hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": args.heads}
    llm |= {"intermediate_size": 4 * args.hidden, "max_position_embeddings": 4096}
    model_config = ShowoConfig(llm_config=llm, **sizes)
    texts = load_text_tokenizer(
        showo.llm_model_path,
        showo.llm_vocab_size,
        args.words + 2,
        cond_dropout_prob=0.0,
        history=config.mixed.history,
    )
    parts = texts, None, VqUnderstanding(config), "cpu"
    return BatchBuilder.of(config, model_config.vocabulary, *parts), model_config


def measure(kind: str, args: argparse.Namespace) -> dict:
    """Seconds of the fastest of `args.steps` steps but the first, memory of activations in MiB, positions, losses."""
    builder, config = make_builder(kind, args)
    samples = make_samples(kind, args, builder.prompting.tokenizer, config.codebook_size)
    attention = PACKED_SDPA if "packed" in kind else "sdpa"
    model = Showo._from_config(config, attn_implementation=attention).train()
    optimizer = adamw(model.named_parameters(), 0.01, lr=1e-4)
    seconds, before = [], 0.0
    for step in range(args.steps + 1):  # the first step makes gradients and moments
        torch.manual_seed(step)
        started = time.perf_counter()
        batch: OmniBatch = builder(samples)
        out = model(**batch.forward_arguments())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds.append(time.perf_counter() - started)
        losses = {name: loss.item() for name, loss in out.losses.items()}
        del out
        before = before or report.memory_in_use("cpu")
    return {
        "seconds": min(seconds[1:]),
        "peak_mib": report.peak_memory("cpu"),
        "held_mib": before,
        "positions": batch.num_positions,
        "used": batch.num_used,
        "losses": losses,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="image tokens, a square")
    parser.add_argument("--words", type=int, default=20, help="tokens of a text")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--images", type=int, default=3, help="of a document")
    parser.add_argument("--steps", type=int, default=2, help="timed ones; one more comes before")
    parser.add_argument("--kind", choices=KINDS, help="measure one alone, in this process, and print its JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.kind:
        print(json.dumps(measure(args.kind, args)))
        return
    found = {}
    print(f"{'':24}{'positions':>10}{'padding':>9}{'seconds':>9}{'ratio':>7}{'peak MiB':>10}{'ratio':>7}")
    for kind in KINDS:
        command = [sys.executable, str(Path(__file__).resolve()), *argv, "--kind", kind]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        one = found[kind] = json.loads(run.stdout.splitlines()[-1])
        base = found[KINDS[0]]
        one["ratios"] = {key: one[key] / base[key] for key in ("seconds", "peak_mib", "positions")}
        times, memory = one["ratios"]["seconds"], one["ratios"]["peak_mib"]
        print(
            f"{kind:24}{one['positions']:10,}{1 - one['used'] / one['positions']:9.0%}{one['seconds']:9.2f}{times:7.2f}"
            f"{one['peak_mib']:10.0f}{memory:7.2f}"
        )
    print(json.dumps(report.facts() | {"settings": vars(args), "results": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
