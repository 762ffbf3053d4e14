"""Every YAML of the project loads; every published key is known; published spellings work unchanged."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from common.config import InferenceConfig, TrainingConfig, load_config, mask_schedule_of
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DEMOS = ["showo_demo", "showo_demo_512x512", "showo_demo_w_clip_vit", "showo_demo_w_clip_vit_512x512"]

PUBLISHED = """
wandb.{entity,resume,run_id}
experiment.{project,name,output_dir,max_train_examples_t2i,max_train_examples_mmu,save_every,eval_every,generate_every}
experiment.{log_every,log_grad_norm_every,resume_from_checkpoint,checkpoints_total_limit}
model.vq_model.{type,vq_model_name,pretrained_model_path}
model.showo.{load_from_showo,pretrained_model_path,w_clip_vit,vocab_size,llm_vocab_size,llm_model_path,codebook_size}
model.showo.{num_vq_tokens,num_new_special_tokens}
model.{gradient_checkpointing}
dataset.{gen_type,und_type,combined_loader_mode,add_system_prompt}
dataset.params.{train_t2i_shards_path_or_url,train_mmu_shards_path_or_url,train_lm_shards_path_or_url}
dataset.params.{add_caption_prompt,external_caption_path,external_journeydb_caption_path}
dataset.params.{external_laion12m_caption_path,external_cc12m_caption_path,validation_prompts_file}
dataset.params.{shuffle_buffer_size,num_workers,resolution,pin_memory,persistent_workers,batch_size}
dataset.preprocessing.{max_seq_length,resolution,center_crop,random_flip}
optimizer.{name}
optimizer.params.{learning_rate,scale_lr,beta1,beta2,weight_decay,epsilon}
lr_scheduler.{scheduler}
lr_scheduler.params.{learning_rate,warmup_steps}
training.{gradient_accumulation_steps,noise_type,predict_all_tokens,eval_mask_ratios,mask_contiguous_region_prob}
training.{pre_encode,batch_size_t2i,batch_size_lm,batch_size_mmu,batch_size,mixed_precision,enable_tf32,seed}
training.{max_train_steps,overfit_one_batch,cond_dropout_prob,min_masking_rate,label_smoothing,max_grad_norm}
training.{guidance_scale,generation_timesteps,generation_temperature,t2i_coeff,lm_coeff,mmu_coeff,mask_schedule}
mask_schedule.{schedule,params}
"""
COMMAND_LINE = """mode prompt question batch_size validation_prompts_file guidance_scale generation_timesteps image_path
inpainting_mask_path extra_direction offset mmu_image_root max_new_tokens seed output_dir dtype device top_k top_p
temperature attn_implementation compile num_images_per_prompt wandb.mode"""


def published_keys() -> list[str]:
    keys = []
    for line in PUBLISHED.split():
        section, _, names = line.partition("{")
        keys += [section + name for name in names.rstrip("}").split(",")]
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("schema", [InferenceConfig, TrainingConfig])
def test_a_file_with_every_published_key_at_its_default_is_accepted(schema, tmp_path):
    tree = {}
    for key in published_keys():
        default = OmegaConf.select(OmegaConf.structured(schema), key)
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = OmegaConf.to_container(default) if OmegaConf.is_config(default) else default
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    (tmp_path / "empty.yaml").write_text("")
    assert load_config([f"config={path}"], schema) == load_config([f"config={tmp_path}/empty.yaml"], schema)


# Spellings that published files use: quoted text, exponents for whole numbers, empty paths, lists over several lines.
PUBLISHED_SPELLINGS = """
wandb:
  entity: null
  resume: 'auto'
  run_id: 12345678
experiment:
  project: "training"
  name: "show-o-training-stage2"
  max_train_examples_t2i: 4e7
  max_train_examples_mmu: 40000000 #
  resume_from_checkpoint: "latest"
  checkpoints_total_limit: 3
model:
  vq_model:
    type: "magvitv2"
    pretrained_model_path:
  showo:
    load_from_showo: false
    pretrained_model_path: "showlab/show-o"
    llm_model_path: 'microsoft/phi-1_5'
dataset:
  params:
    train_t2i_shards_path_or_url:
      - "/data/sa1b/{00000..00010}.tgz"
      - "/data/laion/{00000..00999}.tar"
    train_mmu_shards_path_or_url: [
      "/data/cc12m/{0000..0999}.tar",
      "/data/laion/{00000..00999}.tar",
    ]
    train_lm_shards_path_or_url: "/data/falcon-refinedweb/data/*.parquet"
    external_caption_path: ""
    external_journeydb_caption_path: ""
    external_laion12m_caption_path: ""
    external_cc12m_caption_path: ""
    resolution: ${dataset.preprocessing.resolution}
    batch_size: ${training.batch_size}
    pin_memory: true
  preprocessing:
    resolution: 256
    center_crop: False
optimizer:
  params: # default adamw params
    learning_rate: 1e-4
    epsilon: 1e-8
lr_scheduler:
  params:
    learning_rate: ${optimizer.params.learning_rate}
    warmup_steps: 5e3
training:
  eval_mask_ratios: [0, 0.5, 1]
  mask_contiguous_region_prob: 0
  mixed_precision: 'bf16'
  max_train_steps: 1e6
  guidance_scale: 0
  max_grad_norm:
  t2i_coeff: 1
mask_schedule:
  schedule: "cosine"
  params:
"""


@pytest.mark.parametrize("schema", [InferenceConfig, TrainingConfig])
def test_published_spellings_are_read(schema, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(PUBLISHED_SPELLINGS)
    config = load_config([f"config={path}"], schema)
    assert config.wandb.run_id == "12345678" and config.wandb.resume == "auto"
    assert config.experiment.max_train_examples_t2i == config.experiment.max_train_examples_mmu == 40_000_000
    assert isinstance(config.experiment.max_train_examples_t2i, int)
    assert (config.training.max_train_steps, config.lr_scheduler.params.warmup_steps) == (1_000_000, 5000)
    assert config.optimizer.params.learning_rate == config.lr_scheduler.params.learning_rate == 1e-4
    assert len(config.dataset.params.train_t2i_shards_path_or_url) == 2
    assert not config.dataset.params.external_caption_path
    assert config.training.eval_mask_ratios == [0, 0.5, 1]
    assert mask_schedule_of(config) == ("cosine", {})


def test_command_line_keys_are_known():
    config = OmegaConf.structured(InferenceConfig)
    assert [key for key in COMMAND_LINE.split() if key not in config and key != "wandb.mode"] == []
    assert "mode" in config.wandb


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_opens_with_what_it_is_and_how_to_launch_it(path):
    lines = path.read_text().splitlines()
    head = [line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    assert any(f"config=configs/{path.name}" in line for line in head), "no launch line in the opening comment"


@pytest.mark.parametrize("path", [path for path in CONFIGS if "magvitv2" not in path.stem], ids=lambda path: path.stem)
def test_every_yaml_loads_and_is_consistent(path):
    config = load_config([f"config={path}"], InferenceConfig)
    showo = config.model.showo
    assert showo.vocab_size == showo.llm_vocab_size + showo.num_new_special_tokens + showo.codebook_size + 1


@pytest.mark.parametrize("name", DEMOS)
def test_the_published_demos(name):
    config = load_config([f"config={ROOT}/configs/{name}.yaml"], InferenceConfig)
    suffix = name.removeprefix("showo_demo").replace("_512x512", "-512x512").replace("_w_clip_vit", "-w-clip-vit")
    side = 512 if "512" in name else 256
    assert config.model.showo.pretrained_model_path == "showlab/show-o" + suffix
    assert config.model.showo.w_clip_vit == ("clip" in name)
    assert config.model.showo.num_vq_tokens == (side // 16) ** 2
    assert config.dataset.preprocessing.resolution == config.dataset.params.resolution == side
    assert config.dataset.preprocessing.max_seq_length == 128
    assert (config.batch_size, config.training.cond_dropout_prob) == (20, 0.1)
    assert (config.experiment.project, config.experiment.name) == ("demo", "show-o-demo")


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "config=configs/showo_demo_512x512.yaml",
            "batch_size=1",
            "validation_prompts_file=validation_prompts/showoprompts.txt",
            "guidance_scale=5",
            "generation_timesteps=50",
            "mode=t2i",
        ],
        [
            "config=configs/showo_demo.yaml",
            "batch_size=1",
            "guidance_scale=1.75",
            "generation_timesteps=16",
            "mode=extrapolation",
            "extra_direction=left *** left *** right",
            "offset=0",
            "prompt=a *** b *** c",
            "image_path=inpainting_validation/alps_wide.jpg",
        ],
        [
            "config=configs/showo_demo_w_clip_vit_512x512.yaml",
            "max_new_tokens=100",
            "mmu_image_root=./mmu_validation",
            "question=What is it? *** Where?",
        ],
    ],
    ids=["t2i", "extrapolation", "mmu"],
)
def test_published_commands_are_read(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(arguments, InferenceConfig)
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        assert str(config[key]) == value or config[key] == float(value)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(
        UserError, match="unknown key generation_timestep; the nearest known key is generation_timesteps"
    ):
        load_config([f"config={ROOT}/configs/showo_demo.yaml", "generation_timestep=3"], InferenceConfig)


# --- what the commands name


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("showoprompts", 20),
        ("text2image_prompts", 20),
        ("imagenet_prompts", 10),
        ("emoji_prompts", 16),
        ("emoji_class_prompts", 16),
    ],
)
def test_prompt_files_hold_one_prompt_a_line(name, count):
    lines = (ROOT / "validation_prompts" / f"{name}.txt").read_text().splitlines()
    assert all(line.strip() for line in lines) and len(set(lines)) == len(lines) == count
