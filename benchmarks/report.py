"""What a benchmark reports beside its figures: the machine, the date, the commit, and the memory a process has held."""

import datetime
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def machine() -> dict:
    """Processor, cores, threads and, where there is one, GPU."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # a machine without git
        return "unknown"
    return found.stdout.strip() or "unknown"


def facts() -> dict:
    """The part of a JSON line that says where its figures come from."""
    today = datetime.date.today().isoformat()
    return {"machine": machine(), "torch": torch.__version__, "date": today, "commit": commit()}


def memory_in_use(device: str) -> float:
    """Memory of this process in MiB: allocated by torch on a GPU, else resident."""
    if device != "cpu":
        return torch.cuda.memory_allocated() / MIB
    return _status("VmRSS", default=0)


def peak_memory(device: str) -> float:
    """MiB that this process has held at most."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / MIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there
    return _status("VmHWM", default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB)


def _status(key: str, default: float) -> float:
    """A memory figure of Linux in MiB. Unlike `ru_maxrss`, it does not include the parent process's memory."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), default)
