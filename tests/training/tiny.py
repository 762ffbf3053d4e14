"""A world small enough to train in a test: coloured squares in two shards, a text parquet, both tokenizers."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
import webdataset
import yaml
from accelerate.state import AcceleratorState
from omegaconf import DictConfig
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from common.config import TrainingConfig, load_config
from common.files import REPOSITORY
from models import MAGVITv2, MAGVITv2Config, Showo, ShowoConfig, UniversalPrompting
from models.images import preprocess
from tools import small_llm
from training.batches import BatchBuilder, flow_readers
from training.data import flows
from training.data.flows import Reading, open_flows
from training.data.streams import Flow
from training.tasks.showo import ShowoTask
from training.train import make_task
from training.trainer import Trainer
from training.understanding import VqUnderstanding

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "yellow": (230, 210, 40)}
PLACES = ("left", "middle", "right")
CAPTIONS = [f"a {colour} square on the {place}" for colour in COLOURS for place in PLACES]
RESOLUTION, NUM_TOKENS, CODEBOOK_SIZE, LLM_VOCAB_SIZE, MAX_TEXT = 32, 16, 64, 290, 16
VOCAB_SIZE = LLM_VOCAB_SIZE + 10 + CODEBOOK_SIZE + 1


def picture(caption: str) -> Image.Image:
    """What a caption of `CAPTIONS` says, 32 × 32 on white."""
    _, colour, _, _, _, place = caption.split()
    image = Image.new("RGB", (RESOLUTION, RESOLUTION), "white")
    left = 2 + 8 * PLACES.index(place)
    ImageDraw.Draw(image).rectangle((left, 10, left + 11, 21), fill=COLOURS[colour])
    return image


def image_bytes(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def items(captions: Iterable[str]) -> list[dict]:
    """Samples of the t2i and mmu flows."""
    return [{"image": preprocess(picture(caption), RESOLUTION), "text": caption} for caption in captions]


def sample(caption: str) -> dict[str, bytes]:
    return {"png": image_bytes(picture(caption)), "txt": caption.encode()}


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for index, content in enumerate(samples):
            writer.write({"__key__": f"{path.stem}-{index:03d}", **content})
    return path


def write_texts(path: Path, texts: list[str], column: str = "content", row_group_size: int = 5) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path, row_group_size=row_group_size)
    return path


def make_vq_model(code_bits: int = 6) -> MAGVITv2:
    """8 × down, so 16 codes for 32 × 32 pixels; random but always the same."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(7)
    sizes = {"encoder_ch_mult": (1, 1), "decoder_ch_mult": (1, 1), "num_groups": 4, "stem_patch_size": 4}
    blocks = {"encoder_num_res_blocks": (1, 1), "decoder_num_res_blocks": (1, 1)}
    model = MAGVITv2(MAGVITv2Config(ch=8, code_bits=code_bits, **sizes, **blocks)).eval()
    torch.set_rng_state(generator_state)
    return model


def write_llm(folder: Path, corpus: Path, vocab_size: int = LLM_VOCAB_SIZE, **more) -> Path:
    """Tokenizer and settings by the project's own command."""
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"corpus": corpus, "output_dir": folder, "intermediate_size": 64, **sizes, **more}
    small_llm.main([f"{key}={value}" for key, value in settings.items()])
    return folder


def write_world(folder: Path) -> Path:
    """Everything a run reads, and the configurations that name it: `train.yaml` and `tokenizer.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(2):
        write_shard(folder / f"train-{index:06d}.tar", [sample(text) for text in CAPTIONS[index::2]])
    write_texts(folder / "texts.parquet", [f"Here is {text}.\nIt is number {i}." for i, text in enumerate(CAPTIONS)])
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS[:4]))
    (folder / "corpus.txt").write_text("\n".join(CAPTIONS * 3))
    write_llm(folder / "llm", folder / "corpus.txt")
    make_vq_model().save_pretrained(folder / "magvitv2")
    (folder / "train.yaml").write_text(yaml.safe_dump(settings(folder)))
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump(tokenizer_settings(folder)))
    return folder


def settings(folder: Path) -> dict:
    shards = str(folder / "train-{000000..000001}.tar")
    showo = {
        "load_from_showo": True,
        "pretrained_model_path": None,
        "llm_model_path": str(folder / "llm"),
        "llm_vocab_size": LLM_VOCAB_SIZE,
        "codebook_size": CODEBOOK_SIZE,
        "vocab_size": VOCAB_SIZE,
        "num_vq_tokens": NUM_TOKENS,
    }
    params = {
        "train_t2i_shards_path_or_url": shards,
        "train_mmu_shards_path_or_url": shards,
        "train_lm_shards_path_or_url": str(folder / "texts.parquet"),
        "validation_prompts_file": str(folder / "prompts.txt"),
        "num_workers": 0,
        "shuffle_buffer_size": 4,
    }
    sizes = {"batch_size_t2i": 4, "batch_size_lm": 1, "batch_size_mmu": 2, "max_train_steps": 6}
    training = {"mixed_precision": "no", "guidance_scale": 1.5, "generation_timesteps": 3, "ema_decay": 0.99}
    every = {"save_every": 3, "generate_every": 99, "log_every": 1, "log_grad_norm_every": 3}
    return {
        "experiment": {"name": "tiny", "output_dir": str(folder / "out"), **every},
        "model": {
            "vq_model": {"vq_model_name": str(folder / "magvitv2")},
            "showo": showo,
            "gradient_checkpointing": False,
        },
        "dataset": {"params": params, "preprocessing": {"max_seq_length": MAX_TEXT, "resolution": RESOLUTION}},
        "optimizer": {"params": {"learning_rate": 2e-3}},
        "lr_scheduler": {"params": {"warmup_steps": 2}},
        "training": {**training, **sizes},
        "device": "cpu",
    }


def tokenizer_settings(folder: Path) -> dict:
    blocks = {"encoder_num_res_blocks": [1, 1], "decoder_num_res_blocks": [1, 1], "encoder_mid": False}
    sizes = {"ch": 8, "encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2], "code_bits": 4, "num_groups": 4}
    params = {"resolution": 16, "max_shift": 1, "num_workers": 0, "shuffle_buffer_size": 4}
    params |= {"train_shards": str(folder / "train-000000.tar"), "eval_shards": str(folder / "train-000001.tar")}
    every = {"log_every": 1, "eval_every": 3, "generate_every": 3, "save_every": 3}
    return {
        "task": "tokenizer",
        "experiment": {"output_dir": str(folder / "out"), "eval_batches": 2, "num_sheet_pictures": 2, **every},
        "model": {**sizes, **blocks, "stem_patch_size": 2},
        "dataset": {"params": params},
        "training": {"batch_size": 4, "max_train_steps": 6, "mixed_precision": "no"},
        "lr_scheduler": {"params": {"warmup_steps": 2}},
        "device": "cpu",
    }


def arguments(
    world: Path, output_dir: Path | None = None, overrides: dict | None = None, name: str = "train"
) -> list[str]:
    """Command line of `training/train.py`.

    Args:
        name: of a configuration of `write_world`.
    """
    changed = ({"experiment.output_dir": output_dir} if output_dir else {}) | (overrides or {})
    values = {key: "null" if value is None else value for key, value in changed.items()}
    return [f"config={world / name}.yaml", *(f"{key}={value}" for key, value in values.items())]


def config_of(world: Path, output_dir: Path | None = None, overrides: dict | None = None) -> DictConfig:
    return load_config(arguments(world, output_dir, overrides), TrainingConfig)


def check_data(config: DictConfig) -> None:
    flows.check_data([reader for split in ("train", "eval") for reader in flow_readers(config, split)])


def build_flows(config: DictConfig, split: str = "train", **reading) -> dict[str, Flow]:
    """The flows of a configuration, after a check of their paths."""
    readers, together = flow_readers(config, split), config.dataset.combined_loader_mode == "min_size"
    flows.check_data(readers)
    return open_flows(readers, Reading(**reading, end_together=together and split == "train"))


def make_model(config: DictConfig) -> Showo:
    return ShowoTask(config).make_model(None)


def make_builder(config: DictConfig, model: Showo, understanding=None) -> BatchBuilder:
    """With the tiny tokenizers; by default, understanding is that from image codes."""
    parts = make_prompting(config), make_vq_model(), understanding or VqUnderstanding(config), torch.device("cpu")
    return BatchBuilder.of(config, model.vocabulary, *parts)


def smallest_showo(**settings) -> Showo:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    llm = {"model_type": "phi", "vocab_size": 20, "tie_word_embeddings": True, **sizes}
    vocabulary = {"vocab_size": 20 + 10 + 8 + 1, "llm_vocab_size": 20, "codebook_size": 8}
    return Showo(ShowoConfig(llm_config=llm, num_vq_tokens=4, **vocabulary, **settings))


def make_prompting(config: DictConfig) -> UniversalPrompting:
    return ShowoTask(config).prompting


def make_trainer(
    world: Path, output_dir: Path | None = None, overrides: dict | None = None, name: str = "train"
) -> Trainer:
    AcceleratorState._reset_state(True)
    return Trainer(make_task(arguments(world, output_dir, overrides, name)))


def train(*args, **rest) -> Trainer:
    """A finished run; takes what `make_trainer` takes."""
    trainer = make_trainer(*args, **rest)
    trainer.train()
    return trainer


def stop_in_step(trainer: Trainer, number: int) -> None:
    """As if the cluster took the machine back during that step of `train`."""
    step = trainer.step

    def stopped():
        if trainer.state.global_step == number - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step()

    trainer.step = stopped


def poison(trainer: Trainer, at: set[int]) -> list[str]:
    """Makes the model's mmu loss NaN at some calls; returns a list that gets what is reported."""
    forward, calls, told = trainer.forward, count(1), []

    def poisoned(**arguments):
        out = forward(**arguments)
        if next(calls) in at:
            out.losses["mmu"] = out.losses["mmu"] * float("nan")
        return out

    trainer.forward, trainer.finite.report = poisoned, told.append
    return told


def start_script(script: str, given: list[str], folder: Path, launcher: Sequence[str] = ()) -> subprocess.Popen:
    """A script of the repository as users start it, without help from the environment."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
    command = [*(launcher or [sys.executable]), str(REPOSITORY / script), *map(str, given)]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """The output of a process that must end well."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))


def accelerate_launch(name: str) -> list[str]:
    """With a file of `accelerate_configs/`."""
    return [ACCELERATE, "launch", "--config_file", str(REPOSITORY / f"accelerate_configs/{name}.yaml")]


def metrics_of(output_dir: Path, *, timing: bool = False) -> list[dict]:
    """Lines of `metrics.jsonl`, by default without what a clock measured."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    measured = ("data_time", "batch_time", "samples/sec/gpu", "tokens/sec/gpu", "memory_gib")
    clock = () if timing else measured
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def steps_of(output_dir: Path) -> list[dict]:
    """The log lines of training steps."""
    return [line for line in metrics_of(output_dir) if "lr" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of a saved model."""
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the tensors of `one` are in `other`, to the last bit."""
    return bool(one) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
