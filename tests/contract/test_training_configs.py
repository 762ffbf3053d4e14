"""The eleven published training files, row by row (spec §14), and the small ones of the emoji world."""

import re
from functools import reduce
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from common.config import InferenceConfig, TrainingConfig, load_config, mask_schedule_of
from common.errors import UserError
from tests.contract.test_configs import published_keys
from tests.training.tiny import check_data

ROOT = Path(__file__).resolve().parents[2]

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
NAMES = sorted(ROWS)

COMMON = {
    "experiment.save_every": 10000,
    "experiment.eval_every": 2500,
    "experiment.generate_every": 1000,
    "experiment.log_every": 50,
    "experiment.log_grad_norm_every": 500,
    "experiment.max_train_examples_mmu": 40_000_000,
    "experiment.resume_from_checkpoint": "latest",
    "experiment.checkpoints_total_limit": None,
    "wandb.resume": "auto",
    "model.vq_model.type": "magvitv2",
    "model.vq_model.vq_model_name": "showlab/magvitv2",
    "model.vq_model.pretrained_model_path": None,
    "model.showo.load_from_showo": False,
    "model.showo.vocab_size": 58498,
    "model.showo.llm_vocab_size": 50295,
    "model.showo.llm_model_path": "microsoft/phi-1_5",
    "model.showo.codebook_size": 8192,
    "model.showo.num_new_special_tokens": 10,
    "model.gradient_checkpointing": True,
    "dataset.add_system_prompt": False,
    "dataset.params.add_caption_prompt": True,
    "dataset.params.shuffle_buffer_size": 1000,
    "dataset.params.num_workers": 32,
    "dataset.params.pin_memory": True,
    "dataset.params.persistent_workers": True,
    "dataset.preprocessing.center_crop": False,
    "dataset.preprocessing.random_flip": False,
    "optimizer.name": "adamw",
    "optimizer.params.scale_lr": False,
    "optimizer.params.beta1": 0.9,
    "optimizer.params.beta2": 0.999,
    "optimizer.params.weight_decay": 0.01,
    "optimizer.params.epsilon": 1e-8,
    "lr_scheduler.scheduler": "cosine",
    "training.gradient_accumulation_steps": 1,
    "training.noise_type": "mask",
    "training.predict_all_tokens": False,
    "training.eval_mask_ratios": None,
    "training.mask_contiguous_region_prob": None,
    "training.pre_encode": False,
    "training.mixed_precision": "bf16",
    "training.enable_tf32": True,
    "training.seed": 10086,
    "training.overfit_one_batch": False,
    "training.cond_dropout_prob": 0.1,
    "training.min_masking_rate": 0.0,
    "training.label_smoothing": 0.0,
    "training.max_grad_norm": None,
    "training.generation_timesteps": 12,
    "training.generation_temperature": 1.0,
    "training.t2i_coeff": 1.0,
    "training.lm_coeff": 0.1,
    "training.mmu_coeff": 1.0,
}
CAPTIONS = [f"external_{which}caption_path" for which in ("", "journeydb_", "laion12m_", "cc12m_")]


# of other language models: hub name, entries of the tokenizer
OTHER_LLMS = {
    f"showo_{llm}_stage{stage}": where
    for llm, where in (("llama3", ("meta-llama/Llama-3.2-1B", 128256)), ("qwen2_5", ("Qwen/Qwen2.5-1.5B", 151665)))
    for stage in (1, 2)
}


def file_of(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


def header(name: str) -> str:
    """The opening comment, its lines joined as a shell would join them."""
    lines = file_of(name).read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return re.sub(r"\\\n\s*", "", "\n".join(line.removeprefix("#").strip() for line in head))


def variables(name: str) -> list[str]:
    """The environment variables that a file cannot do without."""
    return sorted(set(re.findall(r"\$\{oc\.env:(\w+)\}", file_of(name).read_text())))


@pytest.fixture
def load(monkeypatch):
    """Load a file with nothing but its environment variables set, each to /NAME."""

    def load_with_variables(name: str, *arguments: str):
        for variable in variables(name):
            monkeypatch.setenv(variable, f"/{variable}")
        return load_config([f"config={file_of(name)}", *arguments], TrainingConfig)

    return load_with_variables


# --- published values


def test_there_are_fifteen_published_files():
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml") if "tiny" not in path.stem} - set(OTHER_LLMS)
    demos = {f"showo_demo{branch}{size}" for branch in ("", "_w_clip_vit") for size in ("", "_512x512")}
    assert files == demos | set(NAMES) and len(files) == 15


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_table(name, load):
    config = load(name)
    training, dataset = config.training, config.dataset
    sizes = "/".join(str(training[f"batch_size_{flow}"]) for flow in ("t2i", "lm", "mmu"))
    gen, und, length, codes, rate, warmup, steps, rows, guidance, loader = ROWS[name]
    assert (dataset.gen_type, dataset.und_type, sizes, dataset.combined_loader_mode) == (gen, und, rows, loader)
    assert dataset.preprocessing.max_seq_length == int(length)
    assert config.model.showo.num_vq_tokens == int(codes) == (dataset.preprocessing.resolution // 16) ** 2
    assert config.optimizer.params.learning_rate == config.lr_scheduler.params.learning_rate == float(rate)
    assert (config.lr_scheduler.params.warmup_steps, training.max_train_steps) == (int(warmup), int(steps))
    assert training.guidance_scale == float(guidance)


@pytest.mark.parametrize("name", NAMES)
def test_what_all_have_in_common(name, load):
    config = load(name)
    assert {key: OmegaConf.select(config, key) for key in COMMON} == COMMON
    assert mask_schedule_of(config) == ("cosine", {})
    first_two = name.endswith(("stage1", "stage2"))
    assert config.experiment.max_train_examples_t2i == (40_000_000 if first_two else 20_000_000)
    prompts = "imagenet_prompts" if name.endswith("stage1") else "text2image_prompts"
    assert config.validation_prompts_file == f"validation_prompts/{prompts}.txt"
    assert config.model.showo.w_clip_vit == ("clip" in name)
    assert config.model.showo.pretrained_model_path == "showlab/show-o" + ("-w-clip-vit" if "clip" in name else "")


@pytest.mark.parametrize("name", OTHER_LLMS)
def test_another_language_model_changes_only_what_it_must(name, load):
    stage = name[-1]
    before, now = (flat(OmegaConf.to_container(load(n))) for n in (f"showo_pretraining_stage{stage}", name))
    hub_name, words = OTHER_LLMS[name]
    changed = {key: value for key, value in now.items() if before[key] != value}
    folder = {key: changed.pop(key) for key in ("experiment.name", "experiment.output_dir", "output_dir")}
    assert len(set(folder.values())) == 1
    assert changed == {
        "model.showo.llm_model_path": hub_name,
        "model.showo.llm_vocab_size": words,
        "model.showo.vocab_size": words + 10 + 8192 + 1,
        "model.showo.pretrained_model_path": None,
    } | ({"training.trainable": "new"} if stage == "1" else {})
    assert f"config=configs/{name}.yaml" in header(name)
    if stage == "2":
        earlier = folder["output_dir"].replace("stage2", "stage1")
        assert f"experiment.init_from={earlier}\n" in header(name)
        assert f"cp -r {earlier}/checkpoint-500000 {folder['output_dir']}/checkpoint-0\n" in header(name)


def flat(tree: dict, before: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) and value else {before + key: value}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_project_and_run_names(name, load):
    experiment = load(name).experiment
    kind, stage = re.fullmatch(r"showo_(?:pre|instruction_)(training|tuning)_(?:stage)?(\d).*", name).groups()
    suffix = "".join(f"-{part.replace('_', '-')}" for part in ("w_clip_vit", "512x512") if part in name)
    assert experiment.project == kind
    assert experiment.name == experiment.output_dir == f"show-o-{kind}-stage{stage}{suffix}"


@pytest.mark.parametrize("name", NAMES)
def test_every_published_training_key_is_written_out(name):
    tree = yaml.safe_load(file_of(name).read_text())

    def is_written(key: str) -> bool:
        *sections, last = key.split(".")
        return last in reduce(lambda section, part: section.get(part, {}), sections, tree)

    absent = {key for key in published_keys() if not is_written(key)}
    assert absent == {"training.batch_size", "dataset.params.batch_size"}  # of the inference scripts


@pytest.mark.parametrize("key", ["mask_schedule.schedule", "training.mask_schedule"])
def test_the_mask_schedule_can_be_changed_by_either_name(key, load):
    assert mask_schedule_of(load(NAMES[0], f"{key}=linear"))[0] == "linear"


# --- opening comments


@pytest.mark.parametrize("name", NAMES)
def test_the_launch_line_is_complete(name):
    script = "train_w_clip_vit" if "clip" in name else "train"
    line = next(line for line in header(name).splitlines() if line.startswith("accelerate launch"))
    match = re.fullmatch(
        r"accelerate launch --config_file (\S+) --main_process_port=8888 (\S+) config=(\S+)(?: (\S+=\S+))?", line
    )
    accelerate, entry, config, start = match.groups()
    assert (ROOT / accelerate).is_file() and (entry, ROOT / config) == (f"training/{script}.py", file_of(name))
    assert (start is None) == name.endswith("pretraining_stage1")


BEFORE = {
    "showo_pretraining_stage2": "showo_pretraining_stage1",
    "showo_pretraining_stage3": "showo_pretraining_stage2",
    "showo_instruction_tuning_1": "showo_pretraining_stage3",
    "showo_instruction_tuning_1_w_clip_vit": "showo_pretraining_stage3",
    **{name: name.replace("tuning_2", "tuning_1") for name in NAMES if "tuning_2" in name},
}


@pytest.mark.parametrize(("name", "before"), BEFORE.items())
def test_each_stage_starts_from_the_one_before(name, before, load):
    experiment, earlier = load(name).experiment, load(before)
    last = f"{earlier.experiment.output_dir}/checkpoint-{earlier.training.max_train_steps}"
    assert f"experiment.init_from={earlier.experiment.output_dir}\n" in header(name)
    assert f"cp -r {last} {experiment.output_dir}/checkpoint-0\n" in header(name)


@pytest.mark.parametrize("name", [name for name in NAMES if "tuning_1" in name and "512" in name])
def test_the_512_stages_start_from_the_published_model(name, load):
    assert "experiment.init_from=showlab/show-o-512x512-wo-llava-tuning\n" in header(name)
    assert f"{load(name).experiment.output_dir}/checkpoint-0/unwrapped_model" in header(name)


@pytest.mark.parametrize("name", [*NAMES, *OTHER_LLMS])
def test_the_needed_variables_are_in_the_comment_and_the_readme(name):
    readme = (ROOT / "configs/README.md").read_text()
    assert variables(name) == sorted(set(re.findall(r"SHOWO_\w+", header(name))))
    row = next(line for line in readme.splitlines() if line.startswith(f"| [`{name}`]"))
    assert sorted(re.findall(r"SHOWO_\w+", row)) == variables(name)


def test_the_readme_has_a_row_for_every_file_and_every_variable():
    readme = (ROOT / "configs/README.md").read_text()
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert set(re.findall(r"^\| \[`(\w+)`\]", readme, re.MULTILINE)) == files
    used = {name for path in (ROOT / "configs").glob("*.yaml") for name in re.findall(r"SHOWO_\w+", path.read_text())}
    assert set(re.findall(r"^\| `(SHOWO_\w+)`", readme, re.MULTILINE)) == used


# --- data paths


@pytest.mark.parametrize("name", NAMES)
def test_all_missing_variables_come_at_once(name, monkeypatch):
    for variable in variables(name):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError) as error:
        check_data(load_config([f"config={file_of(name)}"], TrainingConfig))
    assert all(f"{variable}; set" in str(error.value) for variable in variables(name))
    assert "dataset.params.train_lm_shards_path_or_url=" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_takes_the_place_of_the_variables(name, monkeypatch):
    params = yaml.safe_load(file_of(name).read_text())["dataset"]["params"]
    keys = [key for key, value in params.items() if re.fullmatch(r"\$\{oc\.env:\w+\}", str(value))]
    for variable in variables(name):
        monkeypatch.delenv(variable, raising=False)
    given = [f"dataset.params.{key}=/{key}" for key in keys]
    config = load_config([f"config={file_of(name)}", *given], TrainingConfig)
    assert [config.dataset.params[key] for key in keys] == [f"/{key}" for key in keys]
    with pytest.raises(UserError, match=f"{variables(name)[0]}; set"):  # all but one
        key = next(key for key, value in params.items() if variables(name)[0] in str(value))
        arguments = [f"config={file_of(name)}", *(a for a in given if f".{key}=" not in a)]
        check_data(load_config(arguments, TrainingConfig))


@pytest.mark.parametrize("name", NAMES)
def test_captions_from_elsewhere_are_optional(name, load, monkeypatch):
    params = load(name).dataset.params
    assert [params[key] for key in CAPTIONS] == [None] * 4
    for variable in ("EXTERNAL", "JOURNEYDB", "LAION12M", "CC12M"):
        monkeypatch.setenv(f"SHOWO_{variable}_CAPTIONS", variable)
    params = load(name).dataset.params
    assert [params[key] for key in CAPTIONS] == ["EXTERNAL", "JOURNEYDB", "LAION12M", "CC12M"]


@pytest.mark.parametrize("name", NAMES)
def test_inference_asks_for_no_training_data(name, monkeypatch):
    for variable in variables(name):
        monkeypatch.delenv(variable, raising=False)
    assert load_config([f"config={file_of(name)}"], InferenceConfig).dataset.params.train_t2i_shards_path_or_url is None


@pytest.mark.parametrize(("flow", "variable"), [("t2i", "T2I_SHARDS"), ("mmu", "MMU_SHARDS"), ("lm", "LM_PARQUET")])
def test_a_flow_that_is_off_asks_for_no_data(flow, variable, load, monkeypatch):
    load("showo_pretraining_stage2")
    monkeypatch.delenv(f"SHOWO_{variable}")
    argv = [f"config={file_of('showo_pretraining_stage2')}"]
    config = load_config([*argv, f"training.batch_size_{flow}=0"], TrainingConfig)
    assert config.dataset.params[f"train_{flow}_shards_path_or_url"] is None
    with pytest.raises(UserError, match=f"SHOWO_{variable};"):
        check_data(load_config(argv, TrainingConfig))


# --- the emoji world

TINY = {
    "showo_tiny_stage1": ("imagenet1k", "captioning", None),
    "showo_tiny_stage2": ("t2i", "captioning", "showo_tiny_stage1"),
    "showo_tiny_stage3": ("t2i", "captioning", "showo_tiny_stage2"),
    "showo_tiny_instruction_tuning_1": ("t2i", "llava_pretrain", "showo_tiny_stage3"),
    "showo_tiny_instruction_tuning_2": ("t2i", "llava_tuning", "showo_tiny_instruction_tuning_1"),
    "showo_tiny_instruction_tuning_1_w_clip_vit": ("t2i", "llava_pretrain", "showo_tiny_stage3"),
    "showo_tiny_instruction_tuning_2_w_clip_vit": (
        "t2i",
        "llava_tuning",
        "showo_tiny_instruction_tuning_1_w_clip_vit",
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_the_small_stages_follow_each_other(name):
    config = load_config([f"config={file_of(name)}"], TrainingConfig)
    gen, und, before = TINY[name]
    assert (config.dataset.gen_type, config.dataset.und_type) == (gen, und)
    earlier = before and load_config([f"config={file_of(before)}"], TrainingConfig).experiment.output_dir
    assert config.experiment.init_from == earlier
    assert config.model.showo.w_clip_vit == ("clip" in name)
    script = "train_w_clip_vit" if "clip" in name else "train"
    assert f"training/{script}.py config=configs/{name}.yaml" in header(name)


@pytest.mark.parametrize("name", TINY)
def test_the_small_stages_fit_the_small_tokenizers(name):
    config = load_config([f"config={file_of(name)}"], TrainingConfig)
    trained = load_config([f"config={ROOT}/configs/showo_tiny_train.yaml"], TrainingConfig)
    sizes = ("llm_model_path", "llm_vocab_size", "codebook_size", "vocab_size", "num_vq_tokens")
    assert [config.model.showo[key] for key in sizes] == [trained.model.showo[key] for key in sizes]
    assert config.model.vq_model == trained.model.vq_model
    assert config.dataset.preprocessing.resolution == trained.dataset.preprocessing.resolution
