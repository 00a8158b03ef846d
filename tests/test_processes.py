"""Nothing outlives the process that started it; no more processes than there are cores for them."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from processes import Numbers

from pretraining.data import loader
from pretraining.data.loader import MicroBatches, train_loader
from pretraining.processes import cgroup_quota

KILLED = {
    "loader processes that are just being started": """
        import numpy as np
        from pretraining.data.loader import MicroBatches, train_loader
        class Stream:
            stored = (1, 2, 2, 2), np.dtype(np.uint8)
        batches = train_loader(Stream(), MicroBatches(0, 1, 2), 2, False)
    """,
    "a pool that waits for work": """
        from pretraining.processes import process_pool
        pool = process_pool(2)
        print([pool.submit(os.getpid).result() for _ in range(4)])
    """,
}


@pytest.mark.parametrize("what", KILLED)
def test_nothing_outlives_a_killed_process(what: str) -> None:
    """What it started would keep the run's lock, its memory, and the pipe that is read here until nobody holds it."""
    code = "import os" + textwrap.dedent(KILLED[what]) + "os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("num_workers", "accumulate", "chunk"), [(2, 1, 1), (2, 2, 3), (1, 1, 8), (0, 2, 2)])
def test_batches_stay_until_others_are_asked_for(
    num_workers: int, accumulate: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the step at hand and of the one before it, however far loader processes are ahead."""
    monkeypatch.setattr(loader, "CHUNK_BYTES", chunk * 8**3)
    sampler = MicroBatches(0, 20, 8 * accumulate, accumulate)
    held: list[tuple[list[int], torch.Tensor]] = []
    for numbers, batch in zip(sampler, train_loader(Numbers(), sampler, num_workers, False), strict=True):
        held = [*held, ([number % 251 for number in numbers], batch["image"])][-2 * accumulate :]
        time.sleep(0.01)
        for crops, image in held:
            assert image.flatten(1).unique(dim=1)[:, 0].tolist() == crops and image.flatten(1).float().std(1).max() == 0


# Lines of /proc/self/cgroup, files below /sys/fs/cgroup, and the cores that they leave.
GROUPS: dict[str, tuple[str, dict[str, str], float]] = {
    "version 2, own group": ("0::/job/step", {"job/step/cpu.max": "250000 100000"}, 2.5),
    "version 2, a group around it": (
        "0::/job/step", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 1.5
    ),
    "version 2, the smaller of both": (
        "0::/job/step", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "50000 50000"}, 1.0
    ),
    "version 2, in a container": ("0::/", {"cpu.max": "300000 100000"}, 3.0),
    "version 2, another group's": ("0::/job/step", {"job/other/cpu.max": "100000 100000"}, math.inf),
    "version 1": (
        "4:memory:/job\n3:cpu,cpuacct:/job",
        {"cpu/job/cpu.cfs_quota_us": "200000", "cpu/job/cpu.cfs_period_us": "100000"}, 2.0,
    ),
    "version 1, in a container, whose groups are named from outside": (
        "3:cpu,cpuacct:/docker/3f2a", {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5,
    ),
    "version 1, no quota": (
        "3:cpuacct,cpu:/job", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, math.inf,
    ),
    "version 1, the group of another controller": (
        "4:memory:/big\n3:cpu,cpuacct:/job",
        {"cpu/big/cpu.cfs_quota_us": "100000", "cpu/big/cpu.cfs_period_us": "100000"}, math.inf,
    ),
    "damaged": ("0::/job", {"job/cpu.max": "many"}, math.inf),
}  # fmt: skip


@pytest.mark.parametrize("what", GROUPS)
def test_quota_of_control_groups(tmp_path: Path, what: str) -> None:
    lines, files, cores = GROUPS[what]
    own = tmp_path / "cgroup"
    own.write_text(lines + "\n", encoding="utf-8")
    for name, content in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n", encoding="utf-8")
    assert cgroup_quota(tmp_path / "fs", own) == cores
    assert cgroup_quota(tmp_path / "nowhere", tmp_path / "no file") == math.inf


ONE_CORE = """
import argparse
import torch
from pretraining.commands.arguments import make_runtime
from pretraining.commands.ingest import parser
from pretraining.device import pick_device
from pretraining.processes import usable_cores
pick_device("cpu", 1)
flags = argparse.Namespace(device="cpu", num_workers=None, accumulate=1, activation_checkpointing=False, compile=False)
print(usable_cores(), torch.get_num_threads(), make_runtime(flags, 1).num_workers, parser().get_default("np"))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or shutil.which("taskset") is None, reason="no taskset")
def test_a_process_bound_to_one_core_starts_no_more_than_one() -> None:
    """As under SLURM: usable cores, torch's threads, loader processes, and processes of ``hiendmae_ingest``."""
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, sys.executable, "-c", ONE_CORE]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    assert subprocess.check_output(command, encoding="utf-8", env=env).split() == ["1", "1", "0", "1"]


def test_a_variable_limits_the_threads() -> None:
    """Several runs side by side on the CPU share its cores so."""
    code = "import torch, pretraining.device as d; d.pick_device('cpu', 1); print(torch.get_num_threads())"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.check_output([sys.executable, "-c", code], encoding="utf-8", env=env).strip() == "1"
