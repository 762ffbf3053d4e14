"""What the tasks of docs/alignment.md gain on the scene world: trains each with several seeds, and scores it.

    python3 examples/scenes/alignment.py start=outputs/showo-tiny/checkpoint-3000/unwrapped_model tasks=policy

`start` is a checkpoint that still has something to learn. Reconstruction is compared with as many steps of plain
training, the others with the start; the student of the distillation generates in 4 steps without guidance. Each seed is
that of a training and of the scenes it is scored on. A training that was stopped goes on, and so does the scoring, when
the command is given again. Prints a table, which is also written to `{output_dir}/alignment.md`.
"""

import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import common  # noqa: F401  Ctrl-C is one word from here on

from omegaconf import OmegaConf

from common.config import read_settings
from common.errors import UserError, run_cli, shown
from common.files import make_folder, read_json, write_text
from common.inputs import required_folder
from common.settings import setting

ROOT = Path(__file__).resolve().parents[2]
PLAIN, START = "plain", "start"
SCORED = ("scenes_drawing", "scenes_answers")
FIGURE = "mean of kinds, held out"
FEW, MANY = 4, 16  # steps of an image
T_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # of Student's distribution, by the number of seeds
# Settings that plain training has as reconstruction has them.
SAME = (
    "training.max_train_steps",
    "training.batch_size_mmu",
    "training.mixed_precision",
    "training.max_grad_norm",
    "optimizer.params.learning_rate",
    "optimizer.params.beta2",
    "lr_scheduler.scheduler",
    "lr_scheduler.params.warmup_steps",
    "dataset.und_type",
    "dataset.params.train_mmu_shards_path_or_url",
    "dataset.params.train_mmu_image_root",
)


@dataclass(frozen=True)
class Comparison:
    """Of two models, `start`, `plain` or a task's, each with a number of steps of an image."""

    first: str
    second: str
    first_steps: int = MANY
    second_steps: int = MANY
    guided: bool = True  # the first one; a student never is


COMPARISONS = {
    "reconstruction": [Comparison(PLAIN, "reconstruction"), Comparison(START, "reconstruction")],
    "preference": [Comparison(START, "preference")],
    "policy": [Comparison(START, "policy")],
    "distillation": [
        Comparison(START, "distillation", MANY, FEW),
        Comparison(START, "distillation", FEW, FEW),
        Comparison(START, "distillation", FEW, FEW, guided=False),
    ],
}


@dataclass
class AlignmentConfig:
    start: str = setting("???", "folder of the model that all begin with")
    tasks: str = setting(",".join(COMPARISONS), "of docs/alignment.md, separated by commas")
    output_dir: str = setting("outputs/alignment", "for trainings, scores and the table")
    seeds: list[int] = setting([1, 2, 3], "of the trainings, and of the scenes", low=0)
    samples: int = setting(100, "scenes of each kind and split", low=1)
    config: str = setting("configs/showo_tiny_demo.yaml", "of the scoring")
    train: list[str] = field(default_factory=list)  # further key=value for the trainings
    score: list[str] = field(default_factory=list)  # and for the scoring


class Alignment:
    """All trainings and scores of one command."""

    def __init__(self, config):
        self.config = config
        self.start = required_folder("start", config.start)
        self.tasks = [name.strip() for name in config.tasks.split(",") if name.strip()]
        if unknown := [name for name in self.tasks if name not in COMPARISONS]:
            raise UserError(f"tasks holds {unknown[0]!r}; allowed: {', '.join(COMPARISONS)}")
        if not self.tasks or not config.seeds:
            raise UserError("tasks and seeds must name one at least")
        self.folder = make_folder(config.output_dir)

    def table(self) -> str:
        """Trains and scores what is missing. Returns the figures as Markdown."""
        lines = [
            f"Start: `{shown(self.start)}`; {FIGURE}, of {self.config.samples} scenes of each kind; "
            f"{len(self.config.seeds)} seeds. Intervals: 95 %, of the mean over seeds.",
            "",
            "| task | compared | figure | before | after | after − before, mean [interval] | by seed |",
            "|---|---|---|---|---|---|---|",
        ]
        for task in self.tasks:
            for one in COMPARISONS[task]:
                found = [self.compared(one, seed) for seed in self.config.seeds]
                first = f"{one.first}, {one.first_steps} steps" + ("" if one.guided else " without guidance")
                names = f"{first} → {one.second}, {one.second_steps} steps"
                for figure in SCORED:
                    lines.append(f"| {task} | {names} | {figure} | {row([each[figure] for each in found])} |")
        return "\n".join(lines) + "\n"

    def compared(self, one: Comparison, seed: int) -> dict[str, dict]:
        """The differences that `evaluate.py compare=` finds, by task of the evaluation."""
        first = self.scored(one.first, one.first_steps, seed, one.guided)
        second = self.scored(one.second, one.second_steps, seed, one.second != "distillation")
        folder = self.folder / "compared" / f"{first.name}-{second.name}"
        run("evaluate.py", *self.scoring(seed), f"compare={first},{second}", f"output_dir={folder}")
        tasks = read_json(folder / "compare.json")["tasks"]
        return {name: tasks[name][FIGURE] for name in SCORED}

    def scored(self, name: str, steps: int, seed: int, guided: bool) -> Path:
        """The folder with a model's scores."""
        folder = self.folder / "scores" / f"{name}-{steps}-steps{'' if guided else '-unguided'}-seed-{seed}"
        model = self.start if name == START else self.trained(name, seed)
        settings = [f"model.showo.pretrained_model_path={model}", f"generation_timesteps={steps}"]
        settings += [] if guided else ["guidance_scale=0"]
        run("evaluate.py", *self.scoring(seed), *settings, f"output_dir={folder}")
        return folder

    def scoring(self, seed: int) -> list[str]:
        sizes = [f"scenes_samples={self.config.samples}", f"seed={seed}"]
        return [f"config={self.config.config}", f"tasks={','.join(SCORED)}", *sizes, *self.config.score]

    def trained(self, name: str, seed: int) -> Path:
        """The folder of a task's model; a training that has ended takes no further step."""
        folder, settings = self.folder / "trained" / f"{name}-seed-{seed}", []
        config = f"configs/showo_tiny_{'train' if name == PLAIN else name}.yaml"
        if name == PLAIN:  # as the task that it is compared with, captions in the place of reconstructions
            task = OmegaConf.load(ROOT / "configs/showo_tiny_reconstruction.yaml")
            settings = [f"{key}={OmegaConf.select(task, key)}" for key in SAME]
            settings += [f"training.batch_size_t2i={task.training.batch_size_reconstruction}", "training.t2i_coeff=1"]
            settings += ["training.batch_size_lm=0", "training.ema_decay=null", "training.share_code_bits=false"]
        settings += [f"experiment.init_from={self.start}", f"training.seed={seed}", f"output_dir={folder}"]
        run("training/train.py", f"config={config}", *settings, *self.config.train)
        return folder


def row(differences: list[dict]) -> str:
    """Cells of one comparison over seeds: means before and after, of the difference with its interval, and each."""
    values = [one["difference"]["value"] for one in differences]
    errors = [(one["difference"]["high"] - one["difference"]["low"]) / (2 * 1.96) for one in differences]
    mean, count = statistics.mean(values), len(values)
    # of the scenes and, with several seeds, of the trainings, whichever is larger
    spread = 1.96 * sum(error**2 for error in errors) ** 0.5 / count
    if count > 1:
        spread = max(spread, T_QUANTILES.get(count, 1.96) * statistics.stdev(values) / count**0.5)
    before, after = (statistics.mean(one[key] for one in differences) for key in ("first", "second"))
    each = ", ".join(f"{value:+.1f}" for value in values)
    return f"{before:.1f} | {after:.1f} | {mean:+.1f} [{mean - spread:+.1f}, {mean + spread:+.1f}] | {each}"


def run(script: str, *arguments: str) -> None:
    """Runs a command of the project; `UserError` if it fails, after it has said why."""
    print(f"\n{script} {' '.join(arguments)}", flush=True)
    if code := subprocess.run([sys.executable, str(ROOT / script), *arguments]).returncode:
        raise UserError(f"{script} ended with exit code {code}; see its last lines above")


def main(argv: list[str]) -> None:
    config = read_settings(argv, AlignmentConfig, "start=outputs/showo-tiny/checkpoint-3000/unwrapped_model")
    alignment = Alignment(config)
    table = alignment.table()
    write_text(alignment.folder / "alignment.md", table)
    print(f"\n{table}")


if __name__ == "__main__":
    run_cli(main)
