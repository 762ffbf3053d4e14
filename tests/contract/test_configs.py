"""Every YAML loads; every published key is known; the published files hold the published values (spec §14)."""

import re
from math import isqrt
from pathlib import Path
from pkgutil import resolve_name
from typing import get_args

import pytest
import yaml
from omegaconf import OmegaConf

from common.config import InferenceConfig, MixedInferenceConfig, TrainingConfig, leaves, load_config, mask_schedule_of
from common.errors import UserError
from common.settings import settings_of
from evaluation.schema import EvaluationConfig
from tests.training.tiny import check_data
from training.data.documents import document_length
from training.train import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
DEMOS = ["showo_demo", "showo_demo_512x512", "showo_demo_w_clip_vit", "showo_demo_w_clip_vit_512x512"]
FLOWS = ("t2i", "lm", "mmu")
README = (ROOT / "configs/README.md").read_text()

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


PARTS = [line.rstrip("}").partition("{") for line in PUBLISHED.split()]
KEYS = [section + name for section, _, names in PARTS for name in names.split(",")]


def variables(name: str) -> list[str]:
    """The environment variables that a file cannot do without."""
    return sorted(set(re.findall(r"\$\{oc\.env:(\w+)\}", FILES[name].read_text())))


@pytest.fixture
def load_bare(monkeypatch):
    """Loads a file with none of its environment variables set."""

    def load_without_variables(name: str, *arguments: str, schema: type = TrainingConfig):
        for variable in variables(name):
            monkeypatch.delenv(variable, raising=False)
        return load_config([f"config={FILES[name]}", *arguments], schema)

    return load_without_variables


@pytest.fixture
def load(monkeypatch):
    """Loads a file for training with nothing but its environment variables set, each to /NAME."""

    def load_with_variables(name: str, *arguments: str):
        for variable in variables(name):
            monkeypatch.setenv(variable, f"/{variable}")
        return load_config([f"config={FILES[name]}", *arguments], TrainingConfig)

    return load_with_variables


@pytest.mark.parametrize("schema", [InferenceConfig, TrainingConfig])
def test_a_file_with_every_published_key_at_its_default_is_accepted(schema, tmp_path):
    defaults, tree = OmegaConf.structured(TrainingConfig), OmegaConf.create()
    for key in KEYS:
        OmegaConf.update(tree, key, OmegaConf.select(defaults, key))
    OmegaConf.save(tree, tmp_path / "config.yaml")
    (tmp_path / "empty.yaml").write_text("")
    full, empty = (load_config([f"config={tmp_path}/{name}.yaml"], schema) for name in ("config", "empty"))
    assert full == empty


def test_published_settings_of_the_command_line_are_known():
    assert set(COMMAND_LINE.split()) <= set(settings_of(InferenceConfig))


PROMPTS = {"showoprompts": 20, "text2image_prompts": 20, "imagenet_prompts": 10}
PROMPTS |= {"emoji_prompts": 16, "emoji_class_prompts": 16, "scenes_prompts": 16}


def test_prompt_files_hold_one_prompt_a_line():
    files = {path.stem: path.read_text().splitlines() for path in (ROOT / "validation_prompts").glob("*.txt")}
    assert {name: len(lines) for name, lines in files.items()} == PROMPTS
    assert all(len(set(lines)) == len(lines) for lines in files.values())
    assert all(line.strip() for lines in files.values() for line in lines)


# file: gen, und, M, N, lr, warm-up, steps, t2i/lm/mmu per GPU, guidance, loader
TABLE = """
pretraining_stage1                       imagenet1k captioning     128  256 1e-4 5000  500000 15/4/10 1.5 max_size_cycle
pretraining_stage2                       t2i        captioning     128  256 1e-4 5000 1000000 10/4/10 0   max_size_cycle
pretraining_stage3                       t2i        captioning     128  256 2e-5 5000   50000 10/4/10 0   max_size_cycle
instruction_tuning_1                     t2i        llava_pretrain 381  256 2e-5 1000   10000 4/2/7   0   min_size
instruction_tuning_1_512x512             t2i        llava_pretrain 381 1024 2e-5 1000   14000 5/2/5   0   min_size
instruction_tuning_2                     t2i        llava_tuning   381  256 5e-5 1000   14000 4/2/6   0   min_size
instruction_tuning_2_512x512             t2i        llava_tuning   381 1024 5e-5 1000   16000 5/2/5   0   min_size
instruction_tuning_1_w_clip_vit          t2i        llava_pretrain 512  256 2e-3 1000   10000 2/2/10  0   min_size
instruction_tuning_1_w_clip_vit_512x512  t2i        llava_pretrain 512 1024 2e-3 1000    7000 2/2/10  0   min_size
instruction_tuning_2_w_clip_vit          t2i        llava_tuning   576  256 1e-4 1000   19600 3/1/4   0   min_size
instruction_tuning_2_w_clip_vit_512x512  t2i        llava_tuning   576 1024 1e-4 1000   19600 3/1/4   0   min_size
"""
ROWS = {f"showo_{line.split()[0]}": line.split()[1:] for line in TABLE.strip().splitlines()}
STAGES = sorted(ROWS)
# of other language models: hub name, entries of the tokenizer
OTHER_LLMS = {
    f"showo_{llm}_stage{stage}": where
    for llm, where in (("llama3", ("meta-llama/Llama-3.2-1B", 128256)), ("qwen2_5", ("Qwen/Qwen2.5-1.5B", 151665)))
    for stage in (1, 2)
}
# the small ones that follow each other: gen, und, the stage before
SMALL = {
    "showo_tiny_stage1": ("imagenet1k", "captioning", None),
    "showo_tiny_stage2": ("t2i", "captioning", "showo_tiny_stage1"),
    "showo_tiny_stage3": ("t2i", "captioning", "showo_tiny_stage2"),
    "showo_tiny_instruction_tuning_1": ("t2i", "llava_pretrain", "showo_tiny_stage3"),
    "showo_tiny_instruction_tuning_2": ("t2i", "llava_tuning", "showo_tiny_instruction_tuning_1"),
    "showo_tiny_instruction_tuning_1_w_clip_vit": ("t2i", "llava_pretrain", "showo_tiny_stage3"),
    "showo_tiny_instruction_tuning_2_w_clip_vit": ("t2i", "llava_tuning", "showo_tiny_instruction_tuning_1_w_clip_vit"),
}

ALIGNMENT = {  # each with a file of the published size and one of the small default
    "reconstruction": "showo_reconstruction_w_clip_vit_512x512",
    "preference": "showo_preference_512x512",
    "policy": "showo_policy_512x512",
    "distillation": "showo_distillation_512x512",
}


def test_the_files_are_these_and_the_readme_has_a_row_for_each():
    others = {"showo_mixed", "showo_tiny_mixed", "showo_tiny_train", "showo_tiny_demo", "showo_tiny_magvitv2"}
    others |= {*ALIGNMENT.values(), *(f"showo_tiny_{task}" for task in ALIGNMENT)}
    others |= {"showo_tiny_lora"}
    assert set(FILES) == {*DEMOS, *STAGES, *OTHER_LLMS, *SMALL, *others} and len(DEMOS) + len(STAGES) == 15
    rows = dict(re.findall(r"^\| \[`(\w+)`\](.*)$", README, re.MULTILINE))
    assert set(rows) == set(FILES)
    assert all(sorted(re.findall(r"SHOWO_\w+", rows[name])) == variables(name) for name in FILES)
    used = {name for path in FILES.values() for name in re.findall(r"SHOWO_\w+", path.read_text())}
    assert set(re.findall(r"^\| `(SHOWO_\w+)`", README, re.MULTILINE)) == used


@pytest.mark.parametrize("name", [name for name in FILES if "magvitv2" not in name])
def test_every_yaml_loads_and_is_consistent(name, load, load_bare):
    """For training with its variables, for inference and evaluation without."""
    schemas = (InferenceConfig, MixedInferenceConfig, EvaluationConfig)
    configs = [load(name), *(load_bare(name, schema=schema) for schema in schemas)]
    for showo in (config.model.showo for config in configs):
        assert showo.vocab_size == showo.llm_vocab_size + showo.num_new_special_tokens + showo.codebook_size + 1


@pytest.mark.parametrize("name", DEMOS)
def test_the_published_demos(name):
    config = load_config([f"config={FILES[name]}"], InferenceConfig)
    suffix = name.removeprefix("showo_demo").replace("_512x512", "-512x512").replace("_w_clip_vit", "-w-clip-vit")
    side = 512 if "512" in name else 256
    assert config.model.showo.pretrained_model_path == "showlab/show-o" + suffix
    assert config.model.showo.w_clip_vit == ("clip" in name)
    assert config.model.showo.num_vq_tokens == (side // 16) ** 2
    assert (config.dataset.preprocessing.resolution, config.dataset.preprocessing.max_seq_length) == (side, 128)
    assert (config.batch_size, config.experiment.project, config.experiment.name) == (20, "demo", "show-o-demo")


@pytest.mark.parametrize("name", STAGES)
def test_a_published_training_file(name, load):
    """Its own values; every other published key is at its default, and written down."""
    gen, und, length, codes, rate, warmup, steps, rows, guidance, loader = ROWS[name]
    kind, clip, side = "training" if "pretraining" in name else "tuning", "clip" in name, 16 * isqrt(int(codes))
    stage = name.removeprefix("showo_pretraining_stage").removeprefix("showo_instruction_tuning_").replace("_", "-")
    prompts = "imagenet_prompts" if name.endswith("stage1") else "text2image_prompts"
    own = {
        "experiment.project": kind,
        "experiment.name": f"show-o-{kind}-stage{stage}",
        "experiment.output_dir": f"show-o-{kind}-stage{stage}",
        "experiment.max_train_examples_t2i": 40_000_000 if name.endswith(("stage1", "stage2")) else 20_000_000,
        "experiment.max_train_examples_mmu": 40_000_000,
        "model.showo.load_from_showo": False,
        "model.showo.llm_model_path": "microsoft/phi-1_5",
        "model.showo.pretrained_model_path": "showlab/show-o" + ("-w-clip-vit" if clip else ""),
        "model.showo.w_clip_vit": clip,
        "model.showo.num_vq_tokens": int(codes),
        **{"dataset.gen_type": gen, "dataset.und_type": und, "dataset.combined_loader_mode": loader},
        "dataset.params.validation_prompts_file": f"validation_prompts/{prompts}.txt",
        "dataset.preprocessing.max_seq_length": int(length),
        **{f"dataset.{section}.resolution": side for section in ("params", "preprocessing")},
        **{f"{section}.params.learning_rate": float(rate) for section in ("optimizer", "lr_scheduler")},
        "lr_scheduler.params.warmup_steps": int(warmup),
        **{"training.max_train_steps": int(steps), "training.guidance_scale": float(guidance)},
        **{f"training.batch_size_{flow}": int(size) for flow, size in zip(FLOWS, rows.split("/"), strict=True)},
    }
    config, defaults = load(name), OmegaConf.structured(TrainingConfig)
    keys = [key for key in KEYS if not key.endswith("shards_path_or_url") and not key.startswith("mask_schedule.")]
    expected = {key: OmegaConf.select(defaults, key) for key in keys} | own
    assert {key: OmegaConf.select(config, key) for key in expected} == expected
    assert mask_schedule_of(config) == ("cosine", {})
    written = dict(leaves(yaml.safe_load(FILES[name].read_text()))).keys() | {"mask_schedule.params"}
    assert set(KEYS) - written == {"training.batch_size", "dataset.params.batch_size"}  # of inference


@pytest.mark.parametrize("name", OTHER_LLMS)
def test_another_language_model_changes_only_what_it_must(name, load):
    before, now = (dict(leaves(OmegaConf.to_container(load(n)))) for n in (f"showo_pretraining_stage{name[-1]}", name))
    hub_name, words = OTHER_LLMS[name]
    changed = {key: value for key, value in now.items() if before[key] != value}
    folders = {changed.pop(key) for key in ("experiment.name", "experiment.output_dir", "output_dir")}
    assert len(folders) == 1
    assert changed == {
        "model.showo.llm_model_path": hub_name,
        "model.showo.llm_vocab_size": words,
        "model.showo.vocab_size": words + 10 + 8192 + 1,
        "model.showo.pretrained_model_path": None,
    } | ({"training.trainable": "new"} if name.endswith("1") else {})


@pytest.mark.parametrize("name", SMALL)
def test_the_small_stages_follow_each_other_and_fit_the_small_tokenizers(name, load):
    config, trained, (gen, und, before) = load(name), load("showo_tiny_train"), SMALL[name]
    assert (config.dataset.gen_type, config.dataset.und_type) == (gen, und)
    assert config.experiment.init_from == (load(before).experiment.output_dir if before else None)
    assert config.model.showo.w_clip_vit == ("clip" in name)
    sizes = ("llm_model_path", "llm_vocab_size", "codebook_size", "vocab_size", "num_vq_tokens")
    assert [config.model.showo[key] for key in sizes] == [trained.model.showo[key] for key in sizes]
    assert config.model.vq_model == trained.model.vq_model
    assert config.dataset.preprocessing.resolution == trained.dataset.preprocessing.resolution


def test_documents_of_the_published_size_fit_the_positions_of_the_language_model(load):
    """Four learned images, three of them twice, with captions; and the flows beside them are those of tuning 2."""
    config, tuning = load("showo_mixed"), load("showo_instruction_tuning_2")
    assert config.mixed.max_length <= 2048
    story = [{"text": "", "loss": True}, {"loss": True}] * 4
    lengths = [50, config.model.showo.num_vq_tokens] * 4
    assert document_length(story, lengths, is_clean=True) <= config.mixed.max_length
    assert config.model == tuning.model and config.dataset.preprocessing == tuning.dataset.preprocessing
    assert (config.mixed.text_weight, config.optimizer.params.learning_rate) == (0.2, 1e-4)


@pytest.mark.parametrize("name", [*STAGES, "showo_mixed"])
def test_missing_variables_come_at_once_or_from_the_command_line(name, load_bare):
    with pytest.raises(UserError) as error:
        check_data(load_bare(name))
    assert all(f"{variable}; set" in str(error.value) for variable in variables(name))
    assert "dataset.params.train_lm_shards_path_or_url=" in str(error.value)
    params = yaml.safe_load(FILES[name].read_text())["dataset"]["params"]
    keys = [key for key, value in params.items() if re.fullmatch(r"\$\{oc\.env:\w+\}", str(value))]
    config = load_bare(name, *(f"dataset.params.{key}=/{key}" for key in keys))
    assert [config.dataset.params[key] for key in keys] == [f"/{key}" for key in keys]


@pytest.mark.parametrize("task", ALIGNMENT)
def test_files_of_alignment_name_their_task_and_fit_the_models_that_they_start_from(task, load, monkeypatch):
    schema, reward = resolve_name(SETTINGS[task]), ["policy.reward=a:b"] if task == "policy" else []
    for name, like in (
        (ALIGNMENT[task], "showo_instruction_tuning_2_512x512"),
        (f"showo_tiny_{task}", "showo_tiny_mixed"),
    ):
        sizes = load(like).model.showo
        for variable in variables(name):
            monkeypatch.setenv(variable, f"/{variable}")
        config = load_config([f"config={FILES[name]}", *reward], schema)
        assert config.task == task and config.optimizer.params.learning_rate > 0
        keys = ("llm_vocab_size", "codebook_size", "vocab_size", "num_vq_tokens")
        assert [config.model.showo[key] for key in keys] == [sizes[key] for key in keys]


def test_captions_from_elsewhere_are_optional(load, monkeypatch):
    keys = [f"external_{which}caption_path" for which in ("", "journeydb_", "laion12m_", "cc12m_")]
    assert [load("showo_pretraining_stage3").dataset.params[key] for key in keys] == [None] * 4
    for variable in ("EXTERNAL", "JOURNEYDB", "LAION12M", "CC12M"):
        monkeypatch.setenv(f"SHOWO_{variable}_CAPTIONS", variable)
    params = load("showo_pretraining_stage3").dataset.params
    assert [params[key] for key in keys] == ["EXTERNAL", "JOURNEYDB", "LAION12M", "CC12M"]


@pytest.mark.parametrize(("flow", "variable"), [("t2i", "T2I_SHARDS"), ("mmu", "MMU_SHARDS"), ("lm", "LM_PARQUET")])
def test_a_flow_that_is_off_asks_for_no_data(flow, variable, load_bare):
    config = load_bare("showo_pretraining_stage2", f"training.batch_size_{flow}=0")
    assert config.dataset.params[f"train_{flow}_shards_path_or_url"] is None
    with pytest.raises(UserError, match=f"SHOWO_{variable};"):
        check_data(load_bare("showo_pretraining_stage2"))


DOUBLE = {  # published keys that repeat another one
    "dataset.params.resolution": "dataset.preprocessing.resolution",
    "dataset.params.batch_size": "training.batch_size",
    "lr_scheduler.params.learning_rate": "optimizer.params.learning_rate",
}


@pytest.mark.parametrize(("double", "key"), DOUBLE.items())
def test_one_of_two_keys_that_say_the_same_is_enough_on_the_command_line(load, double, key):
    name = STAGES[-1]
    for given in (double, key):
        config = load(name, f"{given}=64")
        assert OmegaConf.select(config, double) == OmegaConf.select(config, key) == 64
    with pytest.raises(UserError, match=f"{double} is 64.* and {key} is 32.*; they must agree"):
        load(name, f"{double}=64", f"{key}=32")


@pytest.mark.parametrize("schema", [InferenceConfig, MixedInferenceConfig, *map(resolve_name, SETTINGS.values())])
def test_every_number_has_an_upper_end(schema):
    numbers = {int, float, list[int], list[float]}
    for key, one in settings_of(schema).items():
        kinds = {one.hint, *get_args(one.hint)} & numbers
        repeated = one.rule.alias or one.rule.repeats
        assert not kinds or repeated or (one.rule.high or one.rule.below) is not None, key
