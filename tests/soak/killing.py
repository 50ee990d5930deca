"""Jobs as processes, and how they are killed: all of a job at once, or one of its Ray actors."""

import os
import random
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

Process = subprocess.Popen[bytes]
ACTOR = "ray::MapWorker"  # the title of Ray Data's actors, in which units run


def start(job: list[str], folder: Path) -> Process:
    """Start the job in a process group of its own; what it prints goes to a file, its temporary files to the folder."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "TMPDIR": str(folder / "tmp")}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(job, stdout=log, stderr=log, env=environment, start_new_session=True)


def kill(process: Process) -> None:
    """Kill -9 a job and everything that it started: Ray's processes are in groups of their own."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def kill_worker(process: Process, *, rng: random.Random) -> str:
    """Kill -9 one actor of a job that runs; return which of how many, or that there was none any more."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if (one.cmdline() or [""])[0].startswith(ACTOR):
                    found.append(one)
    if not found:
        return "no actor was there"
    number = rng.randrange(len(found))
    with suppress(psutil.NoSuchProcess):
        found[number].kill()
    return f"actor {number + 1} of {len(found)}"


def wait_for_files(process: Process, output: Path, count: int) -> None:
    """Return as soon as a job has `count` files in its output, its bookkeeping included, or has ended."""
    while process.poll() is None and num_files(output) < count:
        time.sleep(0.002)


def num_files(output: Path) -> int:
    """Return how many files there are below a folder, in which others come and go meanwhile."""
    return sum(len(names) for _, _, names in os.walk(output))
