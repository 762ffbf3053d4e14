"""Defaults, then the YAML, then the command line; what is refused; what `--help` prints."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name

import pytest
from omegaconf import OmegaConf

from common.config import InferenceConfig, TrainingConfig, load_config, mask_schedule_of, read_settings
from common.errors import UserError
from common.files import resolve_path
from common.schema import SAMPLERS, RunConfig, SamplingSection
from common.settings import free_keys, setting, settings_of
from evaluation.schema import EvaluationConfig
from examples.emoji_world.make import EmojiWorldConfig
from models import SamplingParameters, get_mask_schedule
from tools.export import ExportConfig
from tools.make_shards import MakeShardsConfig
from tools.small_clip import SmallClipConfig
from training.tokenizer_settings import TokenizerTrainingConfig

WITH_FILES = """common.schema.InferenceConfig common.schema.TrainingConfig evaluation.schema.EvaluationConfig
training.tokenizer_settings.TokenizerTrainingConfig benchmarks.sampling_options.WaysConfig""".split()
WITHOUT = """tests.end_to_end.kill_and_resume.KillSettings tools.make_shards.MakeShardsConfig tools.export.ExportConfig
tools.encode_images.EncodeImagesConfig tools.llava_shards.LlavaShardsConfig tools.small_llm.SmallLlmConfig
tools.small_clip.SmallClipConfig tools.plot.PlotConfig examples.emoji_world.make.EmojiWorldConfig""".split()


@dataclass
class ExtraSection:
    weight: float = setting(1.0, "weight of the extra loss", low=0)
    files: list[int] = setting([1, 2], "some numbers")

    @staticmethod
    def problems(config) -> list[str]:
        return ["extra.weight=7 is odd"] if config.extra.weight == 7 else []


@dataclass
class TaskConfig(RunConfig):
    """As the configuration of another task is declared."""

    task: str = "extra"
    compile: bool = True
    extra: ExtraSection = field(default_factory=ExtraSection)


@pytest.fixture
def load(tmp_path):
    """Writes `text` as a YAML and loads it with further arguments."""

    def load_text(text: str, *arguments: str, schema: type = InferenceConfig):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config([f"config={path}", *arguments], schema)

    return load_text


def test_defaults_then_yaml_then_command_line(load):
    text = "training: {batch_size_t2i: 7, batch_size_mmu: 8}"
    training = load(text, "training.batch_size_mmu=9", schema=TrainingConfig).training
    assert (training.batch_size_t2i, training.batch_size_mmu) == (7, 9)
    assert training.batch_size_lm == TrainingConfig().training.batch_size_lm


def test_a_named_sampler_sets_keys_that_nearer_ones_prevail_over(load):
    def found(text: str, *arguments: str) -> tuple:
        config = load(text, *arguments)
        return config.sampling.order, config.sampling.logit_scale, config.mask_schedule.schedule

    section = "mask_schedule: {schedule: cosine}\nsampling: {order: margin}"
    assert found("") == found("", "sampler=published") == ("confidence", 1.0, None)
    assert found("", "sampler=halton") == found("sampler: halton") == ("halton_roll", 1.2, "arccos")
    assert found(section, "sampler=halton") == ("halton_roll", 1.2, "arccos")
    assert found(f"sampler: halton\n{section}") == ("margin", 1.2, "cosine")
    assert found("sampler: halton", "sampler=published") == ("confidence", 1.0, None)
    assert found(f"sampler: halton\n{section}", "sampler=ml_cache") == ("margin", 1.0, "cosine")
    assert found("sampler: halton", "sampling.order=halton") == ("halton", 1.2, "arccos")


def test_sampling_settings_are_the_options_of_generation():
    assert vars(SamplingSection()) == vars(SamplingParameters())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_named_sampler_is_made_of_values_that_are_allowed(load, name):
    config = load("", f"sampler={name}")
    given = {key: OmegaConf.select(config, key) for key in SAMPLERS[name]}
    assert given == SAMPLERS[name] and get_mask_schedule(mask_schedule_of(config)[0])
    SamplingParameters(**config.sampling)


def test_an_empty_file_and_an_empty_section_give_the_defaults(load):
    assert load("") == load("wandb:\n") == load("training: {}") == load("mask_schedule: {params: }")


GUIDANCE = "training: {guidance_scale: 5}"


@pytest.mark.parametrize(
    ("text", "argument", "short", "key", "value"),
    [
        ("", "guidance_scale=5", "guidance_scale", "training.guidance_scale", 5),
        ("guidance_scale: 5", "training.guidance_scale=3", "guidance_scale", "training.guidance_scale", 3),
        (GUIDANCE, "guidance_scale=3", "guidance_scale", "training.guidance_scale", 3),
        (GUIDANCE, "guidance_scale=null", "guidance_scale", "training.guidance_scale", 5),  # null is not allowed there
        ("seed: 42", "mode=t2i", "seed", "training.seed", 42),
        ("training: {seed: 7}", "seed=null", "seed", "training.seed", None),  # every run is another
        ("training: {seed: 7}", "training.seed=null", "seed", "training.seed", None),
        ("", "validation_prompts_file=p", "validation_prompts_file", "dataset.params.validation_prompts_file", "p"),
    ],
)
def test_a_short_name_and_its_section_are_one_setting(load, text, argument, short, key, value):
    """The command line wins, whichever name it uses."""
    config = load(text, argument)
    assert OmegaConf.select(config, short) == OmegaConf.select(config, key) == value


def test_another_task_declares_one_section_more(load):
    config = load("extra: {weight: 2}", "seed=4294967295", "extra.files=[4]", schema=TaskConfig)
    assert (config.task, config.extra.weight, config.extra.files, config.training.seed) == ("extra", 2, [4], 2**32 - 1)
    assert settings_of(TaskConfig)["compile"].rule == settings_of(RunConfig)["compile"].rule and config.compile


TEXTS = ["a = b", "left *** right", "*** starts with stars", '"quoted" start', "'quoted'", "is this: a cat? # yes"]
TEXTS += ["[a, b", "{x}", "1e3", "no", "  spaces  ", "- dash", "été 雪"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_as_it_is(load, text):
    assert load("", f"prompt={text}").prompt == text


AS_PUBLISHED = """
wandb: {resume: 'auto', run_id: 12345678}
experiment: {max_train_examples_t2i: 4e7, init_from: x}
model: {vq_model: {pretrained_model_path: }}
dataset: {params: {external_caption_path: "", train_t2i_shards_path_or_url: [a.tar, "b/{000..010}.tar"]}}
optimizer: {params: {learning_rate: 1e-4}} # default adamw params
lr_scheduler: {params: {learning_rate: "${optimizer.params.learning_rate}", warmup_steps: 5e3}}
training: {max_grad_norm: , eval_mask_ratios: [0, 0.5, 1]}
mask_schedule: {params: {end: 3}}
"""


def test_values_are_read_by_type(load):
    """Also as published files spell them: whole numbers with exponents, a number for a text, keys without a value."""
    arguments = ["training.max_train_steps=4e3", "compile=true", "experiment.init_from=null"]
    arguments += ["mask_schedule.schedule=sigmoid", "mask_schedule.params.start=-2"]
    arguments += ["dataset.params.train_lm_shards_path_or_url=a/{000..010}.txt"]
    arguments += ["dataset.params.train_mmu_shards_path_or_url=[a.tar, b.tar]"]
    config = load(AS_PUBLISHED, *arguments, schema=TrainingConfig)
    assert (config.wandb.resume, config.wandb.run_id) == ("auto", "12345678")
    whole = (config.experiment.max_train_examples_t2i, config.training.max_train_steps)
    assert whole == (40_000_000, 4000) and all(isinstance(number, int) for number in whole)
    schedule = config.lr_scheduler.params
    assert config.optimizer.params.learning_rate == 1e-4 == schedule.learning_rate and schedule.warmup_steps == 5000
    assert config.training.eval_mask_ratios == [0, 0.5, 1]
    empty = (config.training.max_grad_norm, config.model.vq_model.pretrained_model_path, config.experiment.init_from)
    assert empty == (None, None, None) and config.compile and config.dataset.params.external_caption_path == ""
    assert mask_schedule_of(config) == ("sigmoid", {"start": -2, "end": 3})
    shards = [config.dataset.params[f"train_{flow}_shards_path_or_url"] for flow in ("t2i", "mmu", "lm")]
    assert shards == [["a.tar", "b/{000..010}.tar"], ["a.tar", "b.tar"], "a/{000..010}.txt"]


@pytest.mark.parametrize("value", ["latest", "some/checkpoint-3", False, None])
def test_resume_takes_text_false_and_null(load, value):
    text = f"experiment: {{resume_from_checkpoint: {'null' if value is None else value}}}"
    assert load(text, schema=TrainingConfig).experiment.resume_from_checkpoint == value


def test_the_mask_schedule_section_wins_over_the_name(load):
    assert mask_schedule_of(load("training: {mask_schedule: linear}")) == ("linear", {})
    text = "training: {mask_schedule: linear}\nmask_schedule: {schedule: sigmoid, params: {start: -3, end: 3}}"
    assert mask_schedule_of(load(text)) == ("sigmoid", {"start": -3, "end": 3})


def test_settings_of_a_tool():
    config = read_settings(["from=a", "to=b = c"], ExportConfig, "from=…")
    assert (config.from_, config.to, config.dtype) == ("a", "b = c", "bf16")


def test_environment_variables(load, monkeypatch):
    monkeypatch.setenv("SHOWO_TEST_DATA", "/somewhere")
    text = "dataset: {params: {train_t2i_shards_path_or_url: ['${oc.env:SHOWO_TEST_DATA}/{0..3}.tar']}}"
    assert load(text, schema=TrainingConfig).dataset.params.train_t2i_shards_path_or_url == ["/somewhere/{0..3}.tar"]
    assert load("experiment: {name: '${oc.env:SHOWO_UNSET,fallback}'}").experiment.name == "fallback"
    assert load("experiment: {name: '${oc.env:SHOWO_UNSET}'}", "experiment.name=x").experiment.name == "x"


def test_a_reference_follows_what_it_refers_to(load):
    text = "dataset: {params: {batch_size: '${training.batch_size}'}}"
    assert load(text, "training.batch_size=4", schema=TrainingConfig).dataset.params.batch_size == 4
    text = "experiment: {name: '${optimizer.name}-${training.lm_coeff}-${training.batch_size_lm}'}"
    assert load(f"{text}\ntraining: {{lm_coeff: 3}}").experiment.name == "adamw-3-4"  # keys of training only


def test_in_a_file_the_keys_of_other_scripts_are_skipped(load):
    text = "training: {lm_coeff: 3, batch_size_t2i: x, guidance_scale: 2}\nquestion: why\ntasks: pope\ntop_k: 3"
    inference, evaluation = (load(text, schema=schema) for schema in (InferenceConfig, EvaluationConfig))
    assert (inference.question, inference.training.guidance_scale, evaluation.tasks) == ("why", 2, "pope")
    assert "lm_coeff" not in inference.training and "tasks" not in inference and "question" not in evaluation
    assert "top_k" not in load(text.replace("x", "5"), schema=TrainingConfig)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("mode=t2i", "config=FILE"),
        ("config=/", "is a folder"),
        ("config=/no/such.yaml", "does not exist"),
        ("=3", "key=value"),
        ("prompt", "key=value"),
    ],
)
def test_no_config_and_missing_config(argument, message):
    with pytest.raises(UserError, match=message):
        load_config([argument], InferenceConfig)


@pytest.mark.parametrize("content", [b"a: [1", b"- a", b"a: 1\na: 2", b"just text", b"\tx: 1", b"\xe9t\xe9: 1"])
def test_a_file_that_is_no_mapping(content, tmp_path):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as YAML|must contain keys|unknown key just text|no UTF-8"):
        load_config([f"config={tmp_path}/x.yaml"], InferenceConfig)


A_NAME = "experiment: {name: '${oc.env:SHOWO_UNSET_A}'}\n"
SHARDS = A_NAME + "dataset: {params: {train_mmu_shards_path_or_url: ['${oc.env:SHOWO_UNSET_B}/1.tar', x]}}"
REFUSALS = {
    InferenceConfig: {
        "guidence_scale=1": "unknown key guidence_scale; the nearest known key is guidance_scale",
        "training.guidence_scale=1": "unknown key training.guidence_scale; the nearest known key is training.guid",
        "max_seq_length=1": "nearest known key is dataset.preprocessing.max_seq_length",
        "sampling.refresh=2": "nearest known key is sampling.refresh_every",
        "batch_size=many": "training.batch_size is 'many'; it must be a whole number",
        "batch_size=1.5": "it must be a whole number",
        "batch_size=true": "it must be a whole number",
        "guidance_scale=[1]": "it must be a number",
        "compile=perhaps": "it must be true or false",
        "top_k=x": "it must be a whole number or null",
        "model=3": "model is 3; it must be a group of keys",
        "training.seed=[": "cannot be read as YAML",
        "mode=draw": "mode is 'draw'; allowed: t2i, inpainting, extrapolation",
        "wandb.mode=loud": "allowed: online, offline, disabled",
        "output_dir=": "output_dir is empty; give a folder",
        "experiment.output_dir=": "experiment.output_dir is empty; give a folder",
        "batch_size=0": "training.batch_size is 0; it must be from 1 to 65536",
        "guidance_scale=-1": "training.guidance_scale is -1.0; it must be from 0 to 1000000",
        "guidance_scale=nan": "is nan; it must be from 0 to 1000000",
        "top_p=1.5": "top_p is 1.5; it must be more than 0, up to 1",
        "top_p=0": "top_p is 0.0; it must be more than 0, up to 1",
        "sampling.guidance_stop=-1": "sampling.guidance_stop is -1.0; it must be from 0 to 1",
        "seed=-1": "training.seed is -1; it must be from 0",
        "sampling.guidance_start=0.8 sampling.guidance_stop=0.2": "0.8 and 0.2; the first must not be larger",
        "sampling.remask_start=0.8 sampling.remask_stop=0.2": "0.8 and 0.2; the first must not be larger",
        "sampling.remask=rescale": "has no effect without sampling.remask_rate",
        "sampler=best": "sampler is 'best'; allowed: published, halton, ml_cache",
        "sampler=[halton]": r"sampler is '\[halton\]'; allowed: published",
        "sampling.order=random": "allowed: confidence, entropy, margin, halton, halton_roll",
        "optimizer.name=adamw": "optimizer.name has no effect on inference; leave it out",
        "training.mixed_precision=bf16": "training.mixed_precision has no effect on inference; give dtype",
        A_NAME: "SHOWO_UNSET_A; set them or give experiment.name=…",
        "experiment: {name: '${experiment.nothing}'}": "refers to a key that does not exist",
        "model: {showo: {vocabsize: 3}}\noptimzer: {}": "model.showo.vocabsize.*nearest known key is optimizer",
    },
    TrainingConfig: {
        "conversation=???": r"conversation is .\?\?\?., a placeholder",
        "training.eval_mask_ratios=0.5": "it must be a list or null",
        "experiment.resume_from_checkpoint=3": "it must be true or false or text or null",
        "training.pre_encode=true": "training.pre_encode is True; allowed: False",
        "lora.rank=4": "lora.rank has no effect without training.trainable=lora",
        "training.trainable=lora lora.rank=0": "lora.rank is 0; it must be from 1 to 4096",
        "training.trainable=lora lora.alhpa=1": "unknown key lora.alhpa; the nearest known key is lora.alpha",
        "training.trainable=lora lora.dora=true lora.base=nf4": "needs the lengths of weights, which lora.base=nf4",
        "training.trainable=lora lora.new=true lora.base=bf16": "in fp32, but lora.base is bf16; give fp32",
        "training.trainable=lora model.showo.w_clip_vit=true dataset.und_type=llava_pretrain": "would train nothing",
        "device=cuda:1": "device is 'cuda:1', but the launcher",
        "dtype=bf16": "dtype has no effect on training; give training.mixed_precision",
        "mode=t2i": "mode has no effect on training; leave it out",
        "dataset: {params: {resolution: 512}}": "is 512 and dataset.preprocessing.resolution is 256; they must agree",
        "lr_scheduler.params.learning_rate=1 optimizer.params.learning_rate=2": "they must agree",
        "training.generation_timesteps=300": "is 300; an image has 256 tokens, so it must be at most that",
        "dataset.params.train_lm_shards_path_or_url=[1, 2]": "it must be one path or a list of paths",
        "conversation=chat dataset.add_system_prompt=true": "whose template has its own",
        "dataset.packing=true compile=true": "recompiles at every step",
        "dataset.packing_length=9": "has no effect without dataset.packing",
        "training: {batch_size_t2i: x, top: 1}\nmodle: {}\nseed: -1": "modle.*batch_size_t2i is 'x'.*seed is -1",
        SHARDS: "SHOWO_UNSET_A, SHOWO_UNSET_B; set them or give experiment.name=… dataset.params.train_mmu_sha",
    },
    EvaluationConfig: {
        "prompt=x": "prompt has no effect on evaluation",
        "fid_size=7": "fid_size is 7; it must be from 8",
    },
    TokenizerTrainingConfig: {
        "dtype=bf16": "unknown key dtype",
        "seed=4294967296": "it must be from 0 to 4294967295",
        "training.ema_decay=1": "it must be from 0, less than 1",
    },
    TaskConfig: {
        "extra.weight=-1": "extra.weight is -1.0; it must be 0",
        "extra.weight=7": "extra.weight=7 is odd",
        "device=tpu extra.files=4": "extra.files is 4; it must be a list; device is 'tpu'",
    },
}


@pytest.mark.parametrize(
    ("schema", "given", "message"),
    [(schema, given, message) for schema, table in REFUSALS.items() for given, message in table.items()],
)
def test_refusals(load, monkeypatch, schema, given, message):
    monkeypatch.setenv("SHOWO_UNSET_A", "")  # empty is unset
    text, arguments = (given, []) if ": " in given else ("", given.split(" ") if "[" not in given else [given])
    with pytest.raises(UserError, match=message):
        load(text, *arguments, schema=schema)


@pytest.mark.parametrize(
    ("schema", "argv", "message"),
    [
        (ExportConfig, "form=x dtype=int4", "key form; .* is from; from and to not given; for example this; dtype is"),
        (ExportConfig, "from", "'from' is not of the form key=value, as in this"),
        (MakeShardsConfig, "source=x output=y quality=0", "quality is 0; it must be from 1 to 100"),
        (SmallClipConfig, "output_dir=x layers=0 heads=5", "layers is 0; .*hidden_size is 192; it must be a multiple"),
        (EmojiWorldConfig, "names=0 background=blurple", "names=0 is not allowed.*background=blurple is no colour"),
    ],
)
def test_refusals_of_tools(schema, argv, message):
    with pytest.raises(UserError, match=message):
        read_settings(argv.split(), schema, "this")


@pytest.mark.parametrize("name", [*WITH_FILES, *WITHOUT])
def test_every_setting_has_help_and_an_allowed_default(name, capsys):
    schema = resolve_name(name)
    with pytest.raises(SystemExit) as end:
        load_config(["--help"], schema) if name in WITH_FILES else read_settings(["--help"], schema, "")
    printed = capsys.readouterr().out
    words = printed.replace("\n", " ").split()
    for key, one in settings_of(schema).items():
        assert one.rule.help and "\n" not in one.rule.help, key
        assert any(word.split("=")[0] == key for word in words), key
    assert end.value.code == 0 and max(map(len, printed.splitlines())) <= 120


def test_help_of_a_script_needs_no_torch(tmp_path, repository):
    code = "import runpy, sys; sys.argv = ['x', '-h']; sys.path.insert(0, '.')\n"
    code += "try: runpy.run_path('training/train.py', run_name='__main__')\nexcept SystemExit as end: code = end.code\n"
    code += "print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Trains Show-o") and lines[-1] == "0 False"
    assert any(
        line.startswith("  training.lm_coeff=0.1 ") and "[a number, from 0 to 1000000]" in line for line in lines
    )


def test_the_keys_that_may_change_when_a_run_is_resumed():
    free = free_keys(TrainingConfig)
    bound = {key for key in settings_of(TrainingConfig) if key.startswith(("wandb.", "experiment."))} - free
    assert bound == {f"experiment.max_train_examples_{flow}" for flow in ("t2i", "mmu", "mixed")}
    assert {key for key in free if not key.startswith(("wandb.", "experiment."))} == {
        *("seed", "output_dir", "validation_prompts_file", "device", "compile", "attn_implementation"),
        *(f"dataset.params.eval_{flow}_shards_path_or_url" for flow in ("t2i", "mmu", "lm", "mixed")),
        *(f"dataset.params.eval_{flow}_image_root" for flow in ("t2i", "mmu", "mixed")),
        *(f"dataset.params.{key}" for key in ("validation_prompts_file", "pin_memory", "persistent_workers")),
        *(
            "dataset.params.resolution",
            "dataset.params.batch_size",
            "dataset.params.max_skipped_fraction",
            "lr_scheduler.params.learning_rate",
        ),
        *(f"training.{key}" for key in ("guidance_scale", "generation_timesteps", "generation_temperature")),
        *("training.batch_size", "training.eval_mask_ratios", "training.enable_tf32", "training.max_nonfinite_batches"),
        *("training.max_train_steps", "lr_scheduler.params.num_training_steps"),
    }


def test_relative_paths_are_looked_up_here_and_in_the_repository(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    assert load_config(["config=configs/showo_demo.yaml"], InferenceConfig).experiment.name == "show-o-demo"
    assert resolve_path("configs/showo_demo.yaml") == repository / "configs/showo_demo.yaml"
    assert resolve_path("no/such/file") == Path("no/such/file")
    assert resolve_path(tmp_path / "x") == tmp_path / "x"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/showo_demo.yaml").write_text("")
    assert resolve_path("configs/showo_demo.yaml") == Path("configs/showo_demo.yaml")


def test_home_in_every_setting_but_prose(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("output_dir", "experiment.init_from", "model.vq_model.vq_model_name", "experiment.resume_from_checkpoint")
    arguments = [f"{key}=~/x" for key in keys] + ["dataset.params.train_lm_shards_path_or_url=[~/a.txt,b~.txt]"]
    config = load_config(["config=configs/showo_tiny_train.yaml", *arguments], TrainingConfig)
    assert [OmegaConf.select(config, key) for key in keys] == [f"{tmp_path}/x"] * len(keys)
    assert config.experiment.output_dir == f"{tmp_path}/x"
    assert config.dataset.params.train_lm_shards_path_or_url == [f"{tmp_path}/a.txt", "b~.txt"]
    prompts = ["config=configs/showo_tiny_demo.yaml", "prompt=~/x", "question=~", "image_path=~/y"]
    config = load_config(prompts, InferenceConfig)
    assert (config.prompt, config.question, config.image_path) == ("~/x", "~", f"{tmp_path}/y")
    with pytest.raises(UserError, match="output_dir=~no-such-user/x: there is no such home folder"):
        load_config(["config=configs/showo_tiny_demo.yaml", "output_dir=~no-such-user/x"], InferenceConfig)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &a [1, 1]\n" + "".join(f"b{n}: [*a, *a, *a]\n" for n in range(20)), "more than 20 aliases"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ('experiment: {output_dir: "a\\0b"}', "output_dir holds a NUL"),
        ("training: {seed: .nan}", "seed is nan; it must be"),
        ("training: {cond_dropout_prob: .inf}", "cond_dropout_prob is inf; it must be"),
        ("training: {eval_mask_ratios: [0.5, .nan]}", "eval_mask_ratios is nan; it must be"),
    ],
)
def test_values_that_no_run_can_have(content, message, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        load_config([f"config={tmp_path}/x.yaml"], TrainingConfig)
