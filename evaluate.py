"""Benchmarks of understanding and generation, from official files to the paper's table (spec §16; docs/evaluation.md).

    python3 evaluate.py config=configs/showo_demo_512x512.yaml tasks=pope,mme data_root=/data/benchmarks \\
        output_dir=outputs/evaluation
    accelerate launch --num_processes 8 evaluate.py config=… tasks=vqav2 data_root=…
    python3 evaluate.py config=… tasks=pope compare=outputs/evaluation-a,outputs/evaluation-b
    python3 evaluate.py config=configs/showo_tiny_demo.yaml tasks=emoji data_root=data
    python3 evaluate.py config=… tasks=scenes seed=1

Tasks: pope, mme, flickr30k, vqav2, gqa, mmmu; geneval, coco, reconstruction, editing; emoji, which is four, and
scenes, which is five. A run that was killed asks only what is missing when it is started again. `compare` takes
finished output folders or checkpoints; a checkpoint is evaluated first.
"""

from pathlib import Path

from common.config import load_config
from common.errors import UserError, run_cli, shown
from common.files import resolve_path
from common.inputs import required_folder
from common.results import check_output_dir
from common.tracking import Tracker
from evaluation.schema import EvaluationConfig


def choose_tasks(config) -> list[type]:
    """The tasks that are named, by themselves or by their group."""
    from evaluation.tasks import GROUPS, TASKS, task_class

    names = [name.strip() for name in (config.tasks or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in TASKS and name not in GROUPS]
    if unknown or not names:
        given = f"tasks holds {unknown[0]!r}" if unknown else "tasks is not given"
        raise UserError(f"{given}; name one or more of {','.join([*TASKS, *GROUPS])}, separated by commas")
    listed = [one for name in names for one in GROUPS.get(name, (name,))]
    return [task_class(name) for name in dict.fromkeys(listed)]


def evaluate(config, output_dir: Path, processes) -> None:
    """Asks, scores and reports one checkpoint."""
    from evaluation.output import METRICS, RESULTS, TABLE, Output
    from evaluation.report import report, score
    from evaluation.runner import ask_all
    from models.loading import check_sizes

    check_sizes(config.model.showo, config.dataset.preprocessing.resolution, config.model.vq_model.vq_model_name)
    tasks, root, output = choose_tasks(config), Path(config.data_root), Output(output_dir)
    if any(task.reads_root for task in tasks):
        root = required_folder("data_root", config.data_root)
    output.check([RESULTS, TABLE, METRICS])
    runs = ask_all(config, [task(config, root, output_dir / task.name) for task in tasks], processes)
    if not processes.is_main:
        return
    scored = [score(run, config.bootstrap_samples, config.seed or 0) for run in runs]
    output.note(METRICS)
    name = f"{config.experiment.name}_evaluation"
    with Tracker(config.experiment.project, name, output_dir, config=config, wandb_config=config.wandb) as tracker:
        print(report(scored, output, tracker))
    print(f"all results: {shown(output_dir)}")


def evaluate_two(config, output_dir: Path, processes) -> None:
    """Compares two folders of results; a checkpoint among them is evaluated first."""
    from evaluation.bootstrap import compare
    from evaluation.output import COMPARED, RESULTS, Output

    names = [name.strip() for name in config.compare.split(",") if name.strip()]
    if len(names) != 2:
        raise UserError(f"compare is {config.compare!r}; give two output folders or checkpoints, separated by a comma")
    folders, output = [], Output(output_dir)
    output.check(COMPARED)
    for name in names:
        if not (resolve_path(name) / RESULTS).is_file():
            check_checkpoint(name)
    for number, name in enumerate(names, 1):
        folder = resolve_path(name)
        if not (folder / RESULTS).is_file():
            folder = output_dir / f"{number}-{Path(name).name}"
            config.model.showo.pretrained_model_path = name
            evaluate(config, folder, processes)
        folders.append(folder)
    if processes.is_main:
        tasks = [task(config, Path(config.data_root), output_dir / task.name) for task in choose_tasks(config)]
        print(compare(*folders, tasks, output, config.bootstrap_samples, config.seed or 0))


def check_checkpoint(name: str) -> None:
    """`UserError` if what `compare` names is neither a finished evaluation nor a checkpoint."""
    from evaluation.output import RESULTS
    from models.loading import find_folder

    try:
        folder = find_folder(name)
    except UserError as error:
        raise UserError(f"compare: {name} holds no {RESULTS} of an evaluation, and as a checkpoint: {error}") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"compare: {name} holds neither an evaluation's {RESULTS} nor a checkpoint's config.json")


def main(argv: list[str]) -> None:
    config = load_config(argv, EvaluationConfig)
    output_dir = check_output_dir(config.output_dir or Path(config.experiment.output_dir) / "evaluation")

    from evaluation.runner import joined_processes

    with joined_processes(config) as processes:
        (evaluate_two if config.compare else evaluate)(config, output_dir, processes)


if __name__ == "__main__":
    run_cli(main)
