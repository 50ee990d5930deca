"""A job run as a person would, and the peak memory of each of its processes, from the kernel."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]


class Ran(NamedTuple):
    """What a job did: its summary, the seconds, its peak in bytes, and those of its workers (its own, if local)."""

    summary: dict[str, Any]
    seconds: float
    job_bytes: int
    worker_bytes: list[int]

    @property
    def most_bytes(self) -> int:
        """The peak of the largest process."""
        return max(self.job_bytes, *self.worker_bytes)


def peak_bytes(pid: int) -> int:
    """Return the most memory that a living process has ever held (resident), 0 if it has gone.

    The kernel's VmHWM, since `ru_maxrss` of a new process starts at the peak of the one that started it.
    """
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Watch(threading.Thread):
    """Keeps the peak and the last title of every process below one, until that one has ended."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.peaks: dict[int, int] = {}
        self.titles: dict[int, str] = {}

    def run(self) -> None:
        """Sample ten times a second: the kernel keeps the peak, so that only the last moments can be missed."""
        with suppress(psutil.NoSuchProcess):
            while self.root.status() != psutil.STATUS_ZOMBIE:
                for process in [self.root, *self.root.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        self.titles[process.pid] = (process.cmdline() or [""])[0]
                        self.peaks[process.pid] = max(self.peaks.get(process.pid, 0), peak_bytes(process.pid))
                time.sleep(0.1)


def run_job(job: str, source: Path, output: Path, flags: list[str], *, num_workers: int) -> Ran:
    """Run a job and watch it; its temporary files lie beside its output. Raises RuntimeError where it fails."""
    command = [sys.executable, str(ROOT / f"jobs/{job}.py"), "--source", str(source), "--output", str(output)]
    scratch = output.parent / "tmp"
    scratch.mkdir(exist_ok=True)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{output.parent}/mlflow.db", "TMPDIR": str(scratch)}
    with (output.parent / "log.txt").open("w+") as log:
        started = time.monotonic()
        process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        watch = Watch(process.pid)
        watch.start()
        out, _ = process.communicate()
        seconds = time.monotonic() - started
        watch.join()
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join([*command, *flags])}: exit code {process.returncode}\n{log.read()[-3000:]}")
    own = watch.peaks[process.pid]
    workers = [peak for pid, peak in watch.peaks.items() if watch.titles[pid].startswith("ray::")]
    return Ran(json.loads(out.splitlines()[-1]), seconds, own, sorted(workers, reverse=True)[:num_workers] or [own])
