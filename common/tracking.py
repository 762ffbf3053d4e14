"""Logs metrics and images of a run, to wandb (online, offline or disabled) and always to disk."""

import json
import logging
import math
import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from common.contact_sheet import contact_sheet
from common.errors import UserError
from common.files import append_lines, check_file, disk_errors, expand, field, json_lines, write_bytes, writing
from common.schema import WANDB_MODES

INIT_TIMEOUT = 20  # seconds; an online run that has not started by then becomes an offline one


class Tracker:
    """The logger of a run.

    Args:
        project, name: project and name of the wandb run.
        output_dir: receives `metrics.jsonl` (one line per step), `images/` and wandb's own `wandb/`.
        config: the run's settings, shown in wandb.
        wandb_config: the section `wandb` of a config: `entity`, `resume`, `run_id`, `mode`.
        last_step: the step from which a training run resumes; lines of later steps are removed from `metrics.jsonl`,
            since these steps will be logged again.
        enabled: False on all processes but the main one; every method is then a no-op.

    Raises:
        UserError: the environment variable WANDB_MODE has an unknown value.
    """

    def __init__(
        self,
        project: str,
        name: str,
        output_dir: str | Path,
        *,
        config: DictConfig | dict | None = None,
        wandb_config: DictConfig | dict | None = None,
        last_step: int | None = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.output_dir = Path(output_dir)
        self.metrics = self.output_dir / "metrics.jsonl"
        self.line, self.line_start = {}, 0  # the last line, and where it begins in the file
        self.run = None
        if enabled:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if last_step is not None:
                lines = read_lines(self.metrics)  # a last one may be cut off
                kept = [line for step, line in lines if step <= last_step]
                if len(kept) < len(lines):
                    write_bytes(self.metrics, b"".join(kept), flush=True)
            self.run = _start_run(project, name, self.output_dir, _plain(config), _plain(wandb_config))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Logs numbers or strings of one step; tensors of one element become numbers.

        The line is in the file when this returns. Another call for the same step adds to the line. An `OSError` names
        the file.
        """
        if not self.enabled:
            return
        values = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        if step != self.line.get("step"):
            self.line, self.line_start = {"step": step}, self.metrics.stat().st_size if self.metrics.exists() else 0
        self.line |= values
        append_lines(self.metrics, json.dumps(self.line) + "\n", at=self.line_start)
        if self.run is not None:
            self.run.log(values, step=step)

    def log_images(
        self, panel: str, images: list[Image.Image], captions: list[str], step: int, *, save: bool = True
    ) -> None:
        """Logs captioned images to a wandb panel; `save` also writes them to disk as one sheet.

        The sheet is `images/{panel}-{step}.png`, with the panel's name in lower case, its words joined by hyphens, and
        the step in 8 digits.
        """
        if not self.enabled or not images:
            return
        assert len(images) == len(captions), f"{len(images)} images, {len(captions)} captions"
        if save:
            slug = re.sub(r"[^a-z0-9]+", "-", panel.lower()).strip("-")
            path = self.output_dir / "images" / f"{slug}-{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            with writing(path) as temporary:
                contact_sheet(images, captions, title=f"{panel}, step {step}").save(temporary, "PNG")
        if self.run is not None:
            import wandb

            with disk_errors(self.output_dir / "wandb"):
                entries = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
                self.run.log({panel: entries}, step=step)

    def log_table(self, panel: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Logs a table to a wandb panel; cells may be PIL images. Nothing is written to disk."""
        if self.run is None or not rows:
            return
        import wandb

        cells = [[wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
        self.run.log({panel: wandb.Table(columns=columns, data=cells)})

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Sends pending data; nothing can be logged to wandb afterwards."""
        if self.run is not None:
            with disk_errors(self.output_dir / "wandb"):
                self.run.finish()
            self.run = None


def read_lines(file: Path) -> list[tuple[float, bytes]]:
    """(step, line with its end) of a `metrics.jsonl`; the step of a line that a crash has cut off is infinite;
    `UserError` if it is no regular file."""
    lines = json_lines(file) if file.exists() else ()
    return [(_step_of(record), line.rstrip(b"\n") + b"\n") for _, line, record in lines]


def _step_of(record: dict | UserError) -> float:
    try:
        return field(record, "step", int, "metrics.jsonl")
    except UserError:
        return math.inf


def _plain(config: DictConfig | dict | None) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config or {})


def _start_run(project: str, name: str, folder: Path, config: dict, options: dict) -> Any:
    """A wandb run, or None if wandb is disabled or not installed. Never prompts; `UserError` if the environment
    variable WANDB_MODE has an unknown value."""
    mode = options.get("mode") or _mode_of_environment()
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        print(f"wandb is not installed: metrics and images go to {folder} only")
        return None
    if mode != "offline" and not _logged_in():
        print("wandb: not logged in, so this run is recorded offline (upload it later with `wandb sync`)")
        mode = "offline"
    run_id = options.get("run_id")
    arguments: dict[str, Any] = {
        "project": project,
        "name": name,
        "entity": options.get("entity"),
        "id": run_id,
        "dir": str(folder),
        "config": config,
    }
    settings = wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True)
    if mode != "offline":
        try:
            resume = options.get("resume") if run_id else None  # as published, only a run with an id is resumed
            return _quiet(wandb.init(**arguments, mode=mode or "online", resume=resume, settings=settings))
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())[:200]
            print(f"wandb: no connection ({reason}); this run is recorded offline")
    return _quiet(wandb.init(**arguments, mode="offline", settings=settings))


def _quiet(run: Any) -> Any:
    """The run; that its own log files cannot be written, as on a full disk, is nobody's trouble."""
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = lambda record: None
    return run


def _mode_of_environment() -> str | None:
    """`WANDB_MODE`, or what `WANDB_DISABLED` says, also in wandb's older words; None if neither is set."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "y", "on", "t"):
        return "disabled"
    given = os.environ.get("WANDB_MODE", "").lower()
    mode = {"dryrun": "offline", "run": "online", "": None}.get(given, given)
    if mode not in (None, *WANDB_MODES):
        raise UserError(f"WANDB_MODE is {given!r}; allowed: {', '.join(WANDB_MODES)}")
    return mode


def _logged_in() -> bool:
    """Whether wandb would find an API key without prompting."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        path = check_file(expand(os.environ.get("NETRC", "~/.netrc")))
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
