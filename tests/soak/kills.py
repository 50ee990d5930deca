"""kill -9 at random moments of the pairs job, then a resume: the set must be the clean run's, every file and byte.

    python -m tests.soak.kills
    python -m tests.soak.kills --kills 5 --engine ray --seed 3

The corpus is the hostile one and larger good pictures, in a dozen units. A trial starts the job into an empty output,
kills all of its processes at a random moment between its first file and its last (one trial in three is killed again
while it resumes), and runs it to its end. Prints a table; exits 1 where a set or its ledger differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from pipelines.ledger import Ledger
from tests import hostile

ROOT = Path(__file__).resolve().parents[2]
NUM_GOOD, NUM_UNITS, AGAIN, DELAY_S = 60, 12, 1 / 3, 0.2
Account = dict[str, tuple[str, str, str]]


class Trial(NamedTuple):
    """The kills: (the moment, what was there); whether the set and the ledger are the clean ones."""

    kills: list[tuple[str, str]]
    differing: list[str]
    accounts_differ: bool
    exit_code: int


def make_corpus(folder: Path) -> float:
    """Write the hostile corpus and NUM_GOOD larger pictures; return its size in MiB."""
    hostile.make(folder)
    for index in range(NUM_GOOD):
        (folder / f"good {index:03d}.png").write_bytes(hostile.png(10_000 + index, 256, 320))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def start(job: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start the job in a process group of its own; what it prints goes to a file, its temporary files to the folder."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "TMPDIR": str(folder / "tmp")}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(job, stdout=log, stderr=log, env=environment, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill -9 a job and everything that it started: Ray's processes are in groups of their own."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def wait_for_files(process: subprocess.Popen[bytes], output: Path, count: int) -> None:
    """Return as soon as a job has `count` files in its output, its bookkeeping included, or has ended."""
    while process.poll() is None and num_files(output) < count:
        time.sleep(0.002)


def num_files(output: Path) -> int:
    """Return how many files there are below a folder, in which others come and go meanwhile."""
    return sum(len(names) for _, _, names in os.walk(output))


def what_is_there(output: Path) -> str:
    """Return counts of what a killed job had written."""
    shards, ledger, plans = (len(list(output.glob(p))) for p in ("data/*", "_diffsr/ledger/*", "_diffsr/plans/*"))
    manifest = "manifest" if (output / "manifest.json").exists() else "no manifest"
    return f"{plans} plans, {shards} shards, {ledger} ledger files, {manifest}"


def contents(output: Path) -> dict[str, bytes]:
    """Return every file of a set but the job's own bookkeeping."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file())
    return {str(p.relative_to(output)): p.read_bytes() for p in files if "_diffsr" not in p.parts}


def accounts(output: Path) -> Account:
    """Return status, stage and reason of every input, as the ledger has them."""
    rows = Ledger(str(output)).latest().to_pylist()
    return {row["key"]: (row["status"], row["stage"], row["reason"]) for row in rows}


def trial(job: list[str], clean: Path, folder: Path, *, rng: random.Random) -> Trial:
    """Kill a run at a random moment, perhaps its resume too, let it end, and compare with the clean one.

    A moment is a number of files, from the first to the clean run's last, and up to DELAY_S after it: so the moments
    fall where something is written, however slow the machine is and however long the job takes to start.
    """
    output = folder / "set"
    job = [*job, "--output", str(output)]
    kills: list[tuple[str, str]] = []
    while not kills or (len(kills) == 1 and rng.random() < AGAIN):
        last = num_files(clean)
        count = rng.randint(min(num_files(output) + 1, last), last)
        delay = rng.uniform(0, DELAY_S)
        process = start(job, folder)
        wait_for_files(process, output, count)
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        state = "it had ended" if process.poll() is not None else what_is_there(output)
        kill(process)
        kills.append((f"{count} of {last} files + {delay:.2f} s", state))
    exit_code = start(job, folder).wait()
    found, expected = contents(output), contents(clean)
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return Trial(kills, differing, accounts(output) != accounts(clean), exit_code)


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description="kill -9 at random moments of the pairs job, then a resume.")
    parser.add_argument("--kills", type=int, default=20, help="trials")
    parser.add_argument("--engine", default="local", choices=["local", "ray"])
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--job-flags", default="", help="further flags of make_pairs, in one string")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="diffsr-kills-") as name:
        return soak(Path(name), arguments)


def soak(folder: Path, arguments: argparse.Namespace) -> int:
    """Run the clean job and the trials in an empty folder; print the table."""
    rng = random.Random(arguments.seed)
    (folder / "source").mkdir()
    (folder / "tmp").mkdir()
    megabytes = make_corpus(folder / "source")
    job = [sys.executable, str(ROOT / "jobs/make_pairs.py"), "--source", str(folder / "source"), "--patch", "32"]
    job += ["--scale", "2", "--unit-megabytes", f"{megabytes / NUM_UNITS:.4f}", "--max-dead-share", "1"]
    job += ["--engine", arguments.engine, "--num-workers", str(arguments.num_workers), *arguments.job_flags.split()]
    clean = folder / "clean"
    if code := start([*job, "--output", str(clean)], folder).wait():
        print((folder / "log.txt").read_text()[-3000:], file=sys.stderr)
        raise SystemExit(f"the clean run failed with exit code {code}")
    summary = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    print(
        f"Clean run, engine {arguments.engine}: {summary['inputs']} inputs, {summary['done']} done, "
        f"{summary['skipped']} skipped, {summary['dead']} dead; {len(contents(clean))} files of the "
        f"set.\n\n| trial | killed at | what was there | equal |\n"
        "|---|---|---|---|",
        flush=True,
    )
    good = True
    for number in range(1, arguments.kills + 1):
        (folder / f"{number}").mkdir()
        (folder / f"{number}" / "tmp").mkdir()
        found = trial(job, clean, folder / f"{number}", rng=rng)
        moments = "; then ".join(moment for moment, _ in found.kills)
        states = "; then ".join(state for _, state in found.kills)
        equal = not found.differing and not found.accounts_differ and found.exit_code == 0
        verdict = "yes" if equal else f"NO: exit code {found.exit_code}, {found.differing[:5]}"
        verdict += ", ledger differs" if found.accounts_differ else ""
        print(f"| {number} | {moments} | {states} | {verdict} |", flush=True)
        good = good and equal
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
