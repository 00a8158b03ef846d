"""Nothing outlives the process that started it."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

KILLED = {
    "loader processes that are just being started": """
        from pretraining.stream import MicroBatches, train_loader
        batches = iter(train_loader(range(9), MicroBatches(0, 1, 2), 2, False))
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
