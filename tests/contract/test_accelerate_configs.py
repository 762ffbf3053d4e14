"""Every file of `accelerate_configs/`: accelerate reads it, and starts what spec §14 and the file's header say."""

import itertools
from pathlib import Path

import pytest
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "accelerate_configs"
NAMES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))
NODES = [f"multi_nodes/8_gpus_node_{rank}" for rank in range(6)]
DEEPSPEED = ["8_gpus_deepspeed_zero2", "8_gpus_deepspeed_zero3", "2_cpu_deepspeed_zero2", *NODES]


def read(name: str):
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))


def launch_arguments(name: str, *options: str):
    """What `accelerate launch --config_file NAME.yaml OPTIONS training/train.py` makes of the file."""
    config = ["--config_file", str(FOLDER / f"{name}.yaml")]
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args([*config, *options, "training/train.py", "config=x.yaml"])
    )
    arguments.deepspeed_fields_from_accelerate_config = ""
    return arguments


def plugin(name: str, monkeypatch, *options: str):
    """The plugin that a launched process builds from the environment its launcher gives it."""
    arguments = launch_arguments(name, "--main_process_port=0", *options)
    environment = prepare_deepspeed_cmd_env(arguments)[1] if name in DEEPSPEED else prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return DeepSpeedPlugin() if name in DEEPSPEED else FullyShardedDataParallelPlugin()


@pytest.mark.parametrize("name", NAMES)
def test_each_opens_with_its_launch_line(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    assert any(f"accelerate launch --config_file accelerate_configs/{name}.yaml" in line for line in head)


KINDS = {
    "1_cpu": (DistributedType.NO, 1),
    "1_gpu": (DistributedType.NO, 1),
    "2_cpu_ddp": (DistributedType.MULTI_GPU, 2),
    "8_gpus_fsdp2": (DistributedType.FSDP, 8),
    "2_cpu_deepspeed_zero2": (DistributedType.DEEPSPEED, 2),
    "8_gpus_deepspeed_zero2": (DistributedType.DEEPSPEED, 8),
    "8_gpus_deepspeed_zero3": (DistributedType.DEEPSPEED, 8),
} | dict.fromkeys(NODES, (DistributedType.DEEPSPEED, 48))


def test_the_files_are_the_published_ones_and_ours():
    assert set(NAMES) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_kind_and_number_of_processes(name):
    config = read(name)
    assert (config.distributed_type, config.num_processes) == KINDS[name]
    assert config.use_cpu == (name == "1_cpu")  # STACK: `use_cpu` keeps DeepSpeed from starting
    assert config.mixed_precision == "no"  # training.mixed_precision decides
    assert config.num_machines == (6 if name in NODES else 1)


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed(name, monkeypatch):
    """The training YAML decides on accumulation and, on one machine, on clipping; six machines offload to CPUs."""
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
    several = name in NODES
    made = plugin(name, monkeypatch, *(["--main_process_ip=10.0.0.1"] if several else []))
    # A number would go into the environment, where it wins over `Accelerator(gradient_accumulation_steps=…)`.
    assert made.deepspeed_config["gradient_accumulation_steps"] == "auto"
    zero, stage = made.deepspeed_config["zero_optimization"], 3 if "zero3" in name else 2
    assert made.zero_stage == zero["stage"] == stage and not made.zero3_init_flag
    assert zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert made.gradient_clipping == (1.0 if several else "auto")  # auto: training.max_grad_norm
    offload = "cpu" if several else "none"
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == offload


def test_machines_are_started_one_by_one_and_told_the_address_of_the_first():
    arguments = launch_arguments(NODES[3], "--main_process_ip=10.0.0.1", "--main_process_port=0")
    command, _ = prepare_deepspeed_cmd_env(arguments)
    assert command is None  # no ssh or hostfile: each machine runs its own launcher
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("6", "8", 3)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint.partition(":")[0]) == ("static", "10.0.0.1")
    assert "command-line" in read(NODES[3]).main_process_ip  # a name that cannot be found, and says why


def test_the_machines_differ_in_nothing_but_their_rank():
    trees = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in NODES]
    assert [tree.pop("machine_rank") for tree in trees] == list(range(6))
    assert all(tree == trees[0] for tree in trees) and trees[0]["main_process_port"] == 9999


def test_fsdp_is_version_2_over_the_layers_of_whichever_language_model(monkeypatch):
    made = plugin("8_gpus_fsdp2", monkeypatch)
    assert (made.fsdp_version, made.reshard_after_forward) == (2, True)
    assert made.transformer_cls_names_to_wrap is None  # accelerate then asks the model, see models/backbones.py
    assert made.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not made.activation_checkpointing  # model.gradient_checkpointing does it
