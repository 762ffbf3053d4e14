"""Whole checkpoints of a few kilobytes in the published layout (spec §12), for tests that start from files."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from models import MAGVITv2, MAGVITv2Config, Showo
from models.clip_encoder import image_processor_class
from tests.parity.goldens import PHI, facts, fill_, tiny_showo

RESOLUTION = 32  # 4 x 4 tokens of 8 x 8 pixels
WINDOW = 4
VQ_SIZES = {
    "ch": 8,
    "encoder_ch_mult": [1, 2],
    "decoder_ch_mult": [1, 2],
    "encoder_num_res_blocks": [1, 1],
    "decoder_num_res_blocks": [1, 1],
    "code_bits": 6,
    "num_groups": 4,
    "stem_patch_size": 4,
}
CLIP_WIDTH = 32
NUM_FEATURES = 9  # of the tiny CLIP tower


@contextmanager
def largest_file(size: int):
    """Files that grow beyond this cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tiny_vq() -> MAGVITv2:
    return fill_(MAGVITv2(MAGVITv2Config(**VQ_SIZES))).eval()


def clip_showo() -> Showo:
    return tiny_showo(w_clip_vit=True, clip_feature_size=CLIP_WIDTH)


def showo_config(**overrides) -> dict:
    """The keys of a published `config.json`."""
    sizes = {key: facts()[key] for key in ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens")}
    published = {"_class_name": "Showo", "_diffusers_version": "0.30.1", "llm_model_path": "microsoft/phi-1_5"}
    return (
        published
        | sizes
        | {"load_from_showo": False, "w_clip_vit": False, "mask_token_id": facts()["mask_token_id"]}
        | overrides
    )


def write_published(folder: Path, config: dict, state_dict: dict, form: str = "bin") -> Path:
    """A published folder; `form` is bin, safetensors or sharded."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if form == "bin":
        torch.save(state_dict, folder / "pytorch_model.bin")
    elif form == "safetensors":
        save_file({key: value.contiguous() for key, value in state_dict.items()}, folder / "pytorch_model.safetensors")
    else:
        names, weight_map = sorted(state_dict), {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"pytorch_model-{number:05d}-of-00002.bin"
            torch.save({key: state_dict[key] for key in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_clip(folder: Path, image_size: int = 24, patch_size: int = 8) -> Path:
    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
    )
    fill_(CLIPVisionModel(config)).save_pretrained(folder)
    side = {"height": image_size, "width": image_size}
    image_processor_class()(size={"shortest_edge": image_size}, crop_size=side).save_pretrained(folder)
    return folder


def write_checkpoints(root: Path, form: str = "bin", **clip_sizes) -> dict[str, Path]:
    """Folders `showo`, `magvitv2`, `showo_clip`, `clip` below `root`; the YAMLs `demo` and `demo_clip` name them."""
    vq_config = {"_class_name": "MAGVITv2"} | VQ_SIZES
    places = {
        "showo": write_published(root / "showo", showo_config(), tiny_showo().state_dict(), form),
        "magvitv2": write_published(root / "magvitv2", vq_config, tiny_vq().state_dict(), form),
        "showo_clip": write_published(
            root / "showo_clip",
            showo_config(w_clip_vit=True, clip_feature_size=CLIP_WIDTH),
            clip_showo().state_dict(),
            form,
        ),
        "clip": write_clip(root / "clip", **clip_sizes),
    }
    places["demo"] = write_yaml(root / "demo.yaml", places["showo"], places)
    places["demo_clip"] = write_yaml(root / "demo_clip.yaml", places["showo_clip"], places)
    return places


def write_yaml(file: Path, showo: Path, places: dict[str, Path]) -> Path:
    """A demo configuration as the published ones, for the tiny sizes."""
    sizes = {key: facts()[key] for key in ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens")}
    section = {
        "pretrained_model_path": str(showo),
        "llm_model_path": str(PHI),
        "w_clip_vit": showo.name == "showo_clip",
    }
    tree = {
        "experiment": {"project": "demo", "name": "tiny", "output_dir": str(file.parent / "out")},
        "model": {
            "vq_model": {"type": "magvitv2", "vq_model_name": str(places["magvitv2"])},
            "showo": section | sizes | {"num_new_special_tokens": 10},
            "clip_vit_name": str(places["clip"]),
        },
        "dataset": {"preprocessing": {"max_seq_length": facts()["max_text_len"], "resolution": RESOLUTION}},
        "training": {"batch_size": 2, "guidance_scale": 2.0, "generation_timesteps": 3},
    }
    file.write_text(yaml.safe_dump(tree))
    return file
