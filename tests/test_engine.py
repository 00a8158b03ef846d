"""Nothing lost, and the same numbers however a run is computed: real processes, real signals, real files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import DATASET, World
from processes import ENDLESS, RUNS, SMALL, STARTED, descendants, start, wait_for

from pretraining import distributed
from pretraining.data.stream import split_cases

PRETRAIN = Path(sys.executable).with_name("hiendmae_pretrain")


def weights(world: World, run: str) -> dict[str, torch.Tensor]:
    return torch.load(world.root / RUNS / run / "checkpoint_final.pth", weights_only=True)["network_weights"]


def losses(world: World, run: str) -> list[float]:
    lines = (world.root / RUNS / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture(scope="module")
def alone(world: World) -> Iterator[World]:
    """A run of 20 steps as one process, with the loss of every step."""
    world.run(f"hiendmae_pretrain -d 901 {SMALL} -steps 20 -batch_size 4 -log_every 1 -val_every 10 -run alone")
    yield world


@pytest.mark.parametrize("way", ["num_gpus", "torchrun"])
def test_two_ranks_equal_one(alone: World, way: str) -> None:
    """Half the batch each, over gloo: the same losses over 20 steps."""
    flags = f"-d 901 {SMALL} -steps 20 -batch_size 4 -log_every 1 -val_every 10 -run {way}"
    command = {
        "num_gpus": f"hiendmae_pretrain {flags} -num_gpus 2",
        "torchrun": f"torchrun --standalone --nproc_per_node 2 --no-python {PRETRAIN} {flags}",
    }[way]
    assert "FutureWarning" not in alone.run(command)
    expected, found = losses(alone, "alone"), losses(alone, way)
    assert len(found) == 20
    assert found == pytest.approx(expected, abs=1e-5)
    assert (alone.root / RUNS / way / "encoder_weights.pth").is_file()


IDLE_GLOO = """
import os
import torch.distributed as dist
from pretraining.commands.pretrain import main

join, threads = dist.init_process_group, lambda: set(os.listdir("/proc/self/task"))

def join_idly(*args, **kwargs):
    before = threads()
    join(*args, **kwargs)
    for thread in threads() - before:
        os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))

dist.init_process_group = join_idly
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are given no time by Linux' scheduler")
def test_ranks_that_are_done_end_well(world: World, tmp_path: Path) -> None:
    """Gloo's threads hold the last tensors until they get a core; a rank that ended meanwhile could abort."""
    (tmp_path / "idle.py").write_text(IDLE_GLOO, encoding="utf-8")
    torchrun = f"torchrun --standalone --nproc_per_node 2 {tmp_path / 'idle.py'}"
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for i in range(2):
            log = world.run(f"{torchrun} -d 901 {SMALL} -num_workers 0 -steps 2 -batch_size 4 -run idle_{i}")
            assert "Encoder weights: " in log and "terminate called" not in log
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-accumulate 2", "--activation_checkpointing", "-num_workers 0"])
def test_other_ways_to_compute_the_same(alone: World, flags: str) -> None:
    run = flags.split()[0].strip("-")
    alone.run(f"hiendmae_pretrain -d 901 {SMALL} -steps 20 -batch_size 4 -log_every 1 -val_every 10 -run {run} {flags}")
    assert losses(alone, run) == pytest.approx(losses(alone, "alone"), abs=1e-5)


@pytest.mark.slow
def test_five_kills(alone: World) -> None:
    """kill -9 at random moments, five times; the final weights are those of the uninterrupted run, bit for bit."""
    command = f"hiendmae_pretrain -d 901 {SMALL} -steps 20 -batch_size 4 -log_every 1 -val_every 2 -run killed"
    rng = random.Random(5)
    for kill in range(5):
        folder = alone.root / RUNS / "killed"
        resume = " --c" if any(folder.glob("checkpoint_*.pth")) else ""
        process = start(alone, command + resume)
        wait_for(process, "step ")
        time.sleep(rng.random())
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"kill {kill} came too late"
    log = alone.run(f"{command} --c")
    assert "Traceback" not in log
    expected, found = weights(alone, "alone"), weights(alone, "killed")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(alone, "killed") == losses(alone, "alone")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_signals_checkpoint_and_end(world: World, number: signal.Signals) -> None:
    run = number.name.lower()
    process = start(world, f"{ENDLESS} -run {run}")
    wait_for(process, "step 5/")
    os.killpg(process.pid, number)  # a scheduler, and a terminal's Ctrl-C, signal every process
    log, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 0), log
    assert "checkpoint written. The same command with --c continues." in log and "Traceback" not in log
    step = int(log.split("Stopped after step ")[1].split(";")[0])
    latest = torch.load(world.root / RUNS / run / "checkpoint_latest.pth", weights_only=True)
    assert latest["step"] == step >= 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_every_rank(world: World, number: signal.Signals) -> None:
    """Those that write nothing end quietly: a rank that fails has the others stopped, at work or not."""
    process = start(world, f"{ENDLESS} -num_gpus 2 -run two_{number.name.lower()}")
    wait_for(process, "step 5/")
    if number == signal.SIGTERM:
        process.send_signal(number)  # to the launcher alone
    else:
        os.killpg(process.pid, number)  # a terminal signals every process
    log, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 0), log
    assert "checkpoint written" in log and "Traceback" not in log
    assert log.count("hiendmae_pretrain: interrupted") == (number == signal.SIGINT)


def test_a_failed_rank_leaves_the_others_time_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """One deadline for all of them, and none is waited for longer than it works."""
    monkeypatch.setattr(distributed, "GRACE_S", 2)
    context = torch.multiprocessing.get_context("fork")
    writing, *hanging = (context.Process(target=time.sleep, args=(s,)) for s in (0.5, 60, 60))
    for process in (writing, *hanging):
        process.start()
    started = time.monotonic()
    distributed.end_all([*hanging, writing])
    for process in (writing, *hanging):
        process.join(5)
    assert writing.exitcode == 0 and [p.exitcode for p in hanging] == [-signal.SIGTERM] * 2
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_scheduler_signals_torchrun_and_its_ranks(world: World) -> None:
    """As in the SLURM script: torchrun ignores SIGUSR1, its ranks write a checkpoint and end."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = f"{torchrun} --standalone --nproc_per_node 2 --no-python {PRETRAIN} {ENDLESS.split(' ', 1)[1]} -run torch"
    process = subprocess.Popen(
        ["bash", "-c", f"trap '' USR1; exec {command}"], env=world.env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    STARTED.append(process)
    wait_for(process, "step 5/")
    for pid in [process.pid, *descendants(process.pid)]:  # a job step is signalled process by process
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    log, _ = process.communicate(timeout=90)
    assert process.returncode == 0, log
    assert log.count("checkpoint written. The same command with --c continues.") == 1 and "Traceback" not in log


@pytest.mark.slow
def test_a_killed_launcher_takes_its_ranks_along(world: World) -> None:
    process = start(world, f"{ENDLESS} -num_gpus 2 -run launcher")
    wait_for(process, "step 5/")
    process.kill()
    log, _ = process.communicate(timeout=60)  # returns when the ranks, which hold the pipe, have ended
    assert "checkpoint written" in log


@pytest.mark.slow
def test_a_killed_rank_ends_the_run(world: World) -> None:
    process = start(
        world, f"hiendmae_pretrain -d 901 {SMALL} -steps 100000 -batch_size 2 -val_every 5 -num_gpus 2 -run orphan"
    )
    wait_for(process, "step 5/")
    ranks = descendants(process.pid, "spawn_main")
    assert len(ranks) >= 2
    os.kill(ranks[1], signal.SIGKILL)
    log, _ = process.communicate(timeout=90)
    assert process.returncode == 1 and "--c" in log


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run(world: World) -> None:
    """A node that stops answering: the others wait for it as long as set, then end with a message."""
    process = start(world, f"{ENDLESS} -num_gpus 2 -run hangs", HIENDMAE_TIMEOUT_MINUTES="0.5")
    wait_for(process, "step 10/")
    os.kill(descendants(process.pid, "spawn_main")[1], signal.SIGSTOP)
    log, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "--c" in log, log
    assert (world.root / RUNS / "hangs" / "checkpoint_latest.pth").is_file()


def test_truncated_latest_checkpoint_falls_back(alone: World) -> None:
    command = f"hiendmae_pretrain -d 901 {SMALL} -steps 20 -batch_size 4 -log_every 1 -val_every 4 -run truncated"
    process = start(alone, command)
    wait_for(process, "step 8/20")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    folder = alone.root / RUNS / "truncated"
    latest = folder / "checkpoint_latest.pth"
    assert (folder / "checkpoint_older_1.pth").is_file() and not (folder / "checkpoint_older_2.pth").exists()
    shutil.copyfile(folder / "checkpoint_latest.pth", folder / "whole.pth")
    with open(latest, "r+b") as file:
        file.truncate(latest.stat().st_size // 2)
    log = alone.run(f"{command} --c")
    assert "checkpoint_latest.pth is not a file of plain tensors" in log
    assert "Continuing from checkpoint_older_1.pth, step " in log
    expected, found = weights(alone, "alone"), weights(alone, "truncated")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


NON_FINITE = """
import sys
import pretraining.commands.pretrain as cli
from pretraining.data.b2nd import PreprocessedCorpus
read = PreprocessedCorpus.read
def spoiled(self, case, start, size):
    crop = read(self, case, start, size).copy()
    if case == 2:
        crop[..., 3] = float("nan")
    return crop
PreprocessedCorpus.read = spoiled
cli.main()
"""


def test_non_finite_loss_stops_before_the_step(world: World) -> None:
    flags = f"-d 901 {SMALL} -steps 50 -batch_size 2 -val_every 1 -run spoiled"
    words = [sys.executable, "-c", NON_FINITE, *flags.split()]
    done = subprocess.run(
        words, env=world.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stdout
    message = done.stdout.splitlines()[-1]
    assert "The loss is not finite at step" in message and f"{DATASET}/" in message and ":" in message
    dump = torch.load(message.split("are in ")[1].split(";")[0], weights_only=True)
    from pretraining.config import RunConfig
    from pretraining.data.stream import canonical_crops
    from pretraining.model import HiEndMAE

    model = HiEndMAE(RunConfig.from_dict(dump["config"]).model)
    model.load_state_dict(dump["network_weights"])  # of before the step: finite
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    batch = dump["batches"][0]
    assert model(canonical_crops(batch, torch.device("cpu")), batch["ids_shuffle"]).loss.isnan()


@pytest.mark.slow
def test_full_disk_keeps_the_old_checkpoint(world: World, tmp_path: Path) -> None:
    """The results folder is a small file system that fills up after the first checkpoint."""
    results = tmp_path / "small"
    results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=250m", "tmpfs", str(results)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        env = {"nnUNet_results": str(results)}
        command = (
            f"hiendmae_pretrain -d 901 {SMALL} -batch_size 2 -val_every 2 -steps 1000 -run full -keep_checkpoints 1"
        )
        process = start(world, command, **env)
        wait_for(process, "step 2/")
        wait_for(process, "step 4/")  # so a checkpoint is there
        free = os.statvfs(results).f_bavail * os.statvfs(results).f_frsize
        assert free > 2**21, f"{free} bytes are free"
        with suppress(OSError), open(results / "filler", "wb", buffering=0) as filler:  # a checkpoint may be faster
            for _ in range(free // 2**20 - 1):
                filler.write(bytes(2**20))
        log, _ = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in log, log
        assert "could not be written" in log or "No space left" in log
        latest = next(results.rglob("checkpoint_latest.pth"))
        assert torch.load(latest, weights_only=True)["step"] >= 1
        assert not list(results.rglob("*.tmp"))
        (results / "filler").unlink()
        process = start(world, f"{command} --c", **env)
        wait_for(process, "step ")
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "checkpoint written" in log, log
    finally:
        subprocess.run(["umount", str(results)], check=True)


class Six:
    """As many cases as the shared data set has."""

    datasets = ()

    def __len__(self) -> int:
        return 6

    def name(self, case: int) -> str:
        return f"{DATASET}/phantom_00{case}"


def test_damaged_volume_is_named(world: World, tmp_path: Path) -> None:
    """Met by a loader process in the middle of a run: one line, exit 1, nothing of the run is lost."""
    shutil.copytree(world.root / "preprocessed", tmp_path / "preprocessed", ignore=shutil.ignore_patterns("*_body_*"))
    cases = [tmp_path / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres" / f"phantom_00{i}.b2nd" for i in range(6)]
    for training_case in split_cases(Six(), 41)[0]:  # type: ignore[arg-type]
        file = cases[training_case]
        content = bytearray(file.read_bytes())
        content[len(content) // 4 : -len(content) // 4] = bytes(len(content) // 2)
        file.write_bytes(content)
    env = {**world.env, "nnUNet_preprocessed": str(tmp_path / "preprocessed"), "nnUNet_results": str(tmp_path)}
    command = [str(Path(sys.executable).with_name("hiendmae_pretrain")), *f"-d 901 {SMALL} -steps 9".split()]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert (
        "Traceback" not in done.stderr
        and line.startswith("hiendmae_pretrain: error: Cannot read ")
        and "Preprocess this case again." in line
    )


LEAK = """
import os, sys
from pathlib import Path
from pretraining.commands.arguments import corpus_of
from pretraining.commands.pretrain import parser, make_config
from pretraining.data.stream import CropStream, split_cases
args = parser().parse_args(sys.argv[1:])
corpus = corpus_of(args)
stream = CropStream(corpus, make_config(args, corpus), split_cases(corpus, 41)[0])
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
for i in range(10_000):
    stream[i]
    if i == 999:
        before = rss()
print((rss() - before) / 2**20)
"""


@pytest.mark.slow
def test_memory_stays_flat(world: World) -> None:
    """Resident memory after 10,000 crops is that after 1,000."""
    world.run("hiendmae_pack -d 901 -o HiEndMAE_packed_leak")
    flags = ["-preset", "tiny", "-device", "cpu", "-crop_size", "24", "24", "24"]
    for source in ("-d 901", "-packed HiEndMAE_packed_leak"):
        grown = float(subprocess.check_output([sys.executable, "-c", LEAK, *source.split(), *flags], env=world.env))
        assert grown < 20, f"{source}: {grown:.1f} MiB more after 10,000 crops"
