"""Defaults, then the YAML, then the command line; and what is refused."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.config import InferenceConfig, TrainingConfig, load_config, mask_schedule_of, resolve_path
from common.errors import UserError


@pytest.fixture
def load(tmp_path):
    """Write `text` as a YAML and load it with further arguments."""

    def load_text(text: str, *arguments: str, schema: type = InferenceConfig):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config([f"config={path}", *arguments], schema)

    return load_text


def refused(load, text: str, *arguments: str, schema: type = InferenceConfig) -> str:
    with pytest.raises(UserError) as error:
        load(text, *arguments, schema=schema)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- precedence


def test_defaults_then_yaml_then_command_line(load):
    config = load("training: {batch_size_t2i: 7, batch_size_mmu: 8}", "training.batch_size_mmu=9")
    assert (config.training.batch_size_t2i, config.training.batch_size_mmu) == (7, 9)
    assert config.training.batch_size_lm == TrainingConfig().training.batch_size_lm


def test_an_empty_file_and_an_empty_section_give_the_defaults(load):
    assert load("") == load("wandb:\n") == load("training: {}")


@pytest.mark.parametrize(
    ("short", "value", "key"),
    [
        ("guidance_scale", 5.0, "training.guidance_scale"),
        ("generation_timesteps", 3, "training.generation_timesteps"),
        ("generation_temperature", 0.5, "training.generation_temperature"),
        ("batch_size", 2, "training.batch_size"),
        ("seed", 42, "training.seed"),
        ("validation_prompts_file", "p.txt", "dataset.params.validation_prompts_file"),
    ],
)
def test_a_short_name_and_its_section_are_one_setting(load, short, value, key):
    for text, argument in (("", f"{short}={value}"), ("", f"{key}={value}"), (f"{short}: {value}", "mode=t2i")):
        config = load(text, argument)
        assert OmegaConf.select(config, short) == OmegaConf.select(config, key) == value


def test_the_command_line_wins_whichever_name_it_uses(load):
    assert load("guidance_scale: 5", "training.guidance_scale=3").guidance_scale == 3
    assert load("training: {guidance_scale: 5}", "guidance_scale=3").training.guidance_scale == 3
    assert load("training: {guidance_scale: 5}", "guidance_scale=null").guidance_scale == 5


def test_without_a_seed_every_run_is_another(load):
    for argument in ("seed=null", "training.seed=null"):
        assert load("training: {seed: 7}", argument).seed is None


def test_what_interpolates_a_short_name_follows_it(load):
    config = load("dataset: {params: {batch_size: '${training.batch_size}'}}", "batch_size=4")
    assert config.dataset.params.batch_size == 4


def test_scripts_may_bring_their_own_schema(load):
    @dataclass
    class Model:
        widths: list[int] = field(default_factory=lambda: [1, 2])

    @dataclass
    class Own:
        model: Model = field(default_factory=Model)
        names: str = "all"

    config = load("model: {widths: [3]}", "names=some", schema=Own)
    assert (config.model.widths, config.names) == ([3], "some")
    assert "model.widths is 4; it must be a list" in refused(load, "model: {widths: 4}", schema=Own)


# --- how command-line values are read


@pytest.mark.parametrize(
    "text",
    [
        "a = b",
        "left *** right",
        "*** starts with stars",
        '"quoted" start',
        "'quoted'",
        "What is this: a cat? # yes",
        "[a, b",
        "{x}",
        "1e3",
        "no",
        "  spaces  ",
        "- dash",
        "été 雪",
    ],
)
def test_text_survives_as_it_is(load, text):
    assert load("", f"prompt={text}").prompt == text
    assert load("", f"question={text}").question == text


def test_values_are_read_by_type(load):
    config = load(
        "",
        "training.max_train_steps=4e3",
        "optimizer.params.learning_rate=1e-4",
        "training.eval_mask_ratios=[0.5, 1]",
        "compile=true",
        "top_k=null",
        "prompt=null",
        "mask_schedule.schedule=sigmoid",
        "mask_schedule.params.start=-2",
    )
    assert config.training.max_train_steps == 4000 and isinstance(config.training.max_train_steps, int)
    assert config.optimizer.params.learning_rate == 1e-4 == config.lr_scheduler.params.learning_rate
    assert config.training.eval_mask_ratios == [0.5, 1.0]
    assert (config.compile, config.top_k, config.prompt) == (True, None, None)
    assert mask_schedule_of(config) == ("sigmoid", {"start": -2})


@pytest.mark.parametrize(
    ("given", "expected"),
    [("a/{000..010}.tar", "a/{000..010}.tar"), ("{a,b}.tar", "{a,b}.tar"), ("[a.tar, b.tar]", ["a.tar", "b.tar"])],
)
def test_shards_are_one_path_or_several(load, given, expected):
    assert load("", f"dataset.params.train_t2i_shards_path_or_url={given}").dataset.params[
        "train_t2i_shards_path_or_url"
    ] == (expected)


@pytest.mark.parametrize("value", ["latest", "some/checkpoint-3", False, None])
def test_resume_takes_text_false_and_null(load, value):
    text = f"experiment: {{resume_from_checkpoint: {'null' if value is None else value}}}"
    assert load(text).experiment.resume_from_checkpoint == value


def test_the_mask_schedule_section_wins_over_the_name(load):
    assert mask_schedule_of(load("training: {mask_schedule: linear}")) == ("linear", {})
    text = "training: {mask_schedule: linear}\nmask_schedule: {schedule: sigmoid, params: {start: -3, end: 3}}"
    assert mask_schedule_of(load(text)) == ("sigmoid", {"start": -3, "end": 3})


# --- references


def test_environment_variables(load, monkeypatch):
    monkeypatch.setenv("SHOWO_TEST_DATA", "/somewhere")
    text = "dataset: {params: {train_t2i_shards_path_or_url: '${oc.env:SHOWO_TEST_DATA}/{0..3}.tar'}}"
    assert load(text).dataset.params.train_t2i_shards_path_or_url == "/somewhere/{0..3}.tar"
    assert load("experiment: {name: '${oc.env:SHOWO_UNSET,fallback}'}").experiment.name == "fallback"


def test_all_unset_environment_variables_are_named_at_once(load):
    message = refused(
        load,
        "experiment: {name: '${oc.env:SHOWO_UNSET_A}'}\n"
        "dataset: {params: {train_mmu_shards_path_or_url: ['${oc.env:SHOWO_UNSET_B}/1.tar', x]}}",
        schema=TrainingConfig,
    )
    assert "SHOWO_UNSET_A, SHOWO_UNSET_B; set them or give" in message
    assert "experiment.name=" in message and "dataset.params.train_mmu_shards_path_or_url=" in message


def test_an_empty_environment_variable_is_an_unset_one(load, monkeypatch):
    monkeypatch.setenv("SHOWO_UNSET_A", "")
    assert "SHOWO_UNSET_A" in refused(load, "experiment: {name: '${oc.env:SHOWO_UNSET_A}'}")


def test_no_environment_variable_is_needed_for_what_the_command_line_gives(load):
    assert load("experiment: {name: '${oc.env:SHOWO_UNSET_A}'}", "experiment.name=x").experiment.name == "x"


def test_a_reference_that_leads_nowhere(load):
    assert "refers to a key that does not exist" in refused(load, "experiment: {name: '${experiment.nothing}'}")
    assert "???" in refused(load, "", "question=???")


# --- mistakes


def test_no_config_and_missing_config(tmp_path):
    for argv, part in (
        ([], "config=FILE"),
        (["mode=t2i"], "config=FILE"),
        ([f"config={tmp_path}/none.yaml"], "does not exist"),
        ([f"config={tmp_path}"], "does not exist"),
        (["--help"], "key=value"),
        (["=3"], "key=value"),
    ):
        with pytest.raises(UserError, match=part):
            load_config(argv, InferenceConfig)


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b", "a: 1\na: 2", "just text", "\tx: 1"])
def test_a_file_that_is_no_mapping(load, text):
    refused(load, text)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="cannot be read"):
        load_config([f"config={path}"], InferenceConfig)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("guidence_scale", "guidance_scale"),
        ("training.guidence_scale", "training.guidance_scale"),
        ("trainig.batch_size", "training.batch_size"),
        ("max_seq_length", "dataset.preprocessing.max_seq_length"),
        ("optimzer.name", "optimizer.name"),
        ("direction", "extra_direction"),
        ("model.showo.vocabsize", "model.showo.vocab_size"),
        ("promt", "prompt"),
    ],
)
def test_an_unknown_key_names_the_nearest(load, wrong, nearest):
    assert f"unknown key {wrong}; the nearest known key is {nearest}" in refused(load, "", f"{wrong}=1")


def test_unknown_keys_of_a_file_are_named_with_their_path(load):
    message = refused(load, "model: {showo: {vocabsize: 3}}\noptimzer: {name: adamw}")
    assert "model.showo.vocabsize; the nearest known key is model.showo.vocab_size" in message
    assert "optimzer; the nearest known key is optimizer" in message


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("batch_size=many", "training.batch_size is 'many'; it must be a whole number"),
        ("batch_size=1.5", "it must be a whole number"),
        ("batch_size=true", "it must be a whole number"),
        ("guidance_scale=[1]", "it must be a number"),
        ("compile=perhaps", "it must be true or false"),
        ("top_k=x", "it must be a whole number or null"),
        ("training.eval_mask_ratios=0.5", "it must be a list or null"),
        ("experiment.resume_from_checkpoint=3", "it must be true or false or text or null"),
        ("model=3", "model is 3; it must be a group of keys"),
        ("training.seed=[", "cannot be read as YAML"),
    ],
)
def test_a_wrong_type_says_what_is_wanted(load, argument, wanted):
    assert wanted in refused(load, "", argument)


def test_all_mistakes_come_at_once(load):
    message = refused(load, "training: {batch_size_t2i: x}\nmodle: {}", "nonsense=1")
    assert all(part in message for part in ("training.batch_size_t2i", "modle", "nonsense"))


@pytest.mark.parametrize(
    "argument",
    [
        "mode=draw",
        "dtype=int8",
        "attn_implementation=magic",
        "wandb.mode=loud",
        "model.vq_model.type=vqgan",
        "training.pre_encode=true",
        "training.noise_type=salt",
        "training.trainable=some",
        "training.trainable=lora",
        "conversation=llava",
        "optimizer.name=sgd",
        "dataset.gen_type=video",
        "dataset.combined_loader_mode=max_size",
        "lr_scheduler.scheduler=steps",
        "batch_size=0",
        "guidance_scale=-1",
        "guidance_scale=nan",
        "guidance_scale=.inf",
        "generation_timesteps=0",
        "max_new_tokens=0",
        "top_p=1.5",
        "top_p=0",
        "top_k=0",
        "temperature=-1",
        "seed=-1",
        "num_images_per_prompt=0",
        "sampling.refresh_every=0",
        "sampling.guidance_start=2",
        "sampling.guidance_stop=-1",
        "sampling.order=spiral",
        "dataset.params.resolution=512",
        "lr_scheduler.params.learning_rate=1",
        "dataset.params.train_lm_shards_path_or_url=[1, 2]",
    ],
)
def test_senseless_and_unhonoured_values(load, argument):
    key = argument.partition("=")[0]
    assert key.rpartition(".")[2] in refused(load, "", argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampling.guidance_start=0.8", "sampling.guidance_stop=0.2"], "0.8 and 0.2; the first must not be larger"),
        (["sampling.refresh=2"], "sampling.refresh_every"),
        (["conversation=chat", "dataset.add_system_prompt=true"], "whose template has its own"),
    ],
)
def test_options_that_do_not_go_together(load, arguments, message):
    assert message in refused(load, "", *arguments)


# --- paths


def test_relative_paths_are_looked_up_here_and_in_the_repository(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("configs/showo_demo.yaml") == repository / "configs/showo_demo.yaml"
    assert resolve_path("no/such/file") == Path("no/such/file")
    assert resolve_path(tmp_path / "x") == tmp_path / "x"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/showo_demo.yaml").write_text("")
    assert resolve_path("configs/showo_demo.yaml") == Path("configs/showo_demo.yaml")


def test_a_config_of_the_repository_loads_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(["config=configs/showo_demo.yaml"], InferenceConfig).experiment.name == "show-o-demo"
