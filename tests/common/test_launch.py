"""How many threads a process on CPUs gets: on made-up machines, and by whose setting."""

import os
from types import SimpleNamespace

import pytest

from common import launch

ONE, TWO = {0: "0", 1: "1"}, {0: "0-1", 1: "0-1"}  # logical CPU → siblings: two cores; two hyper-threads of one core
EIGHT = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}  # four cores with two hyper-threads each
CPU = "cpu,cpuacct"  # the controllers of version 1
V2, V1 = "0::/pod/run\n", f"4:memory:/x\n3:{CPU}:/pod/run\n0::/\n"


def machine(root, siblings, groups="", limits=()):
    """A file system with the topology of CPUs, this process's control groups, and files of these."""
    for cpu, text in siblings.items():
        file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(text + "\n")
    for name, text in [("proc/self/cgroup", groups), *((f"sys/fs/cgroup/{name}", text) for name, text in limits)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("siblings", "cpus", "groups", "limits", "cores"),
    [
        (ONE, [0, 1], "", [], 2),
        (TWO, [0, 1], "", [], 1),
        (EIGHT, range(8), "", [], 4),
        (EIGHT, [0, 4, 5], "", [], 2),  # the process may not run on the others
        ({}, [0, 1, 2], "", [], 3),  # nothing is known
        (EIGHT, range(8), V2, [("pod/run/cpu.max", "250000 100000\n")], 2),
        (EIGHT, range(8), V2, [("pod/run/cpu.max", "max 100000\n"), ("pod/cpu.max", "100000 100000\n")], 1),
        (EIGHT, range(8), V2, [("cpu.max", "50000 100000\n")], 1),  # in a container the group seems to be the top
        (EIGHT, range(8), V2, [("pod/run/cpu.max", "max 100000\n")], 4),
        (EIGHT, range(8), V1, [(f"{CPU}/pod/cpu.cfs_quota_us", "3000"), (f"{CPU}/pod/cpu.cfs_period_us", "1000")], 3),
        (EIGHT, range(8), V1, [(f"{CPU}/cpu.cfs_quota_us", "-1"), (f"{CPU}/cpu.cfs_period_us", "9")], 4),
    ],
)
def test_physical_cores_within_the_quota(tmp_path, siblings, cpus, groups, limits, cores):
    assert launch.available_cores(cpus, machine(tmp_path, siblings, groups, limits)) == cores


def launcher(environment=(), options=()):
    words = ["python", "/bin/accelerate", "launch", *options]
    return SimpleNamespace(environ=lambda: dict(environment), cmdline=lambda: words)


@pytest.mark.parametrize(
    ("environment", "started_by", "threads"),
    [
        ({}, None, 6),
        ({"LOCAL_WORLD_SIZE": "9", "LOCAL_RANK": "0"}, None, 1),
        ({"OMP_NUM_THREADS": "3"}, None, None),
        ({"MKL_NUM_THREADS": "3"}, None, None),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, launcher(), 3),  # the launcher's own
        ({"OMP_NUM_THREADS": "1"}, launcher({"OMP_NUM_THREADS": "1"}), None),
        ({"OMP_NUM_THREADS": "2"}, launcher(options=["--num_cpu_threads_per_process", "2"]), None),
        ({"OMP_NUM_THREADS": "2"}, launcher(options=["--num_cpu_threads_per_process=2"]), None),
    ],
)
def test_what_the_user_has_set_is_kept(monkeypatch, capsys, environment, started_by, threads):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = []
    monkeypatch.setattr(launch.torch, "set_num_threads", given.append)
    monkeypatch.setattr(launch, "find_launcher", lambda: started_by)
    monkeypatch.setattr(launch, "available_cores", lambda cpus: 6)
    launch.use_physical_cores()
    assert given == ([threads] if threads else [])
    told = capsys.readouterr().out
    assert told.count("\n") == bool(threads) and (not threads or f"CPU: {threads} threads (6 physical cores" in told)
    assert os.environ.get("OMP_NUM_THREADS") == environment.get("OMP_NUM_THREADS")
