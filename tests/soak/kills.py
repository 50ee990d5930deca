"""kill -9 at random moments of a job, then a resume: the set must be the clean run's, every file and byte.

    python -m tests.soak.kills
    python -m tests.soak.kills --kills 5 --engine ray --seed 3
    python -m tests.soak.kills --job upscale
    python -m tests.soak.kills --job upscale --engine ray --num-workers 2 --victim worker

The corpus is the hostile one and larger good pictures, in a dozen units. A trial starts the job into an empty output,
kills all of its processes at a random moment between its first file and its last (one trial in three is killed again
while it resumes), and runs it to its end. With `--victim worker` one of Ray's actors is killed, the job goes on and
must end well by itself. Prints a table; exits 1 where a set or its ledger differs, or an input has two receipts.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipelines.ledger import Ledger
from tests import hostile
from tests.core.tiny import MODELS
from tests.jobs.tiny import model_folder
from tests.soak.killing import Process, kill, kill_worker, num_files, start, wait_for_files

ROOT = Path(__file__).resolve().parents[2]
NUM_UNITS, AGAIN, DELAY_S = 12, 1 / 3, 0.2
GOOD = {"pairs": (60, 256, 320), "upscale": (10, 40, 56)}  # how many, and their size in px
THIN = 3  # of the hostile files the upscale job gets every third: those that take another path do, the rest is time
SCRIPTS = {"pairs": "make_pairs", "upscale": "upscale"}
# Two samples, so that there are uncertainty maps.
SAMPLING = [
    "--steps",
    "1",
    "--tile",
    "64",
    "--micro-batch",
    "1",
    "--samples",
    "2",
    "--choice",
    "best",
    "--no-track",
]
Account = dict[str, tuple[str, ...]]


class Trial(NamedTuple):
    """The kills: (the moment, what was there); what differs from the clean run; receipts beyond one for an input."""

    kills: list[tuple[str, str]]
    differing: list[str]
    accounts_differ: bool
    twice: list[str]
    exit_code: int

    @property
    def verdict(self) -> str:
        """What the table says."""
        wrong = [f"exit code {self.exit_code}"] if self.exit_code else []
        wrong += [f"differ: {self.differing[:5]}"] if self.differing else []
        wrong += ["the ledger differs"] if self.accounts_differ else []
        wrong += [f"two receipts: {self.twice[:5]}"] if self.twice else []
        return "NO: " + ", ".join(wrong) if wrong else "yes"


def make_corpus(folder: Path, job: str) -> float:
    """Write the hostile corpus, or a third of it, and larger good pictures; return its size in MiB."""
    hostile.make(folder)
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    for path in [path for index, path in enumerate(files) if job == "upscale" and index % THIN]:
        path.unlink()
    num_good, height, width = GOOD[job]
    for index in range(num_good):
        (folder / f"good {index:03d}.png").write_bytes(hostile.png(10_000 + index, height, width))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def flags_of(job: str, folder: Path) -> list[str]:
    """Return what a job needs beside source and output."""
    if job == "pairs":
        return ["--patch", "32", "--scale", "2"]
    return ["--model", str(model_folder(folder / "model", MODELS["anchored"])), *SAMPLING]


def what_is_there(output: Path) -> str:
    """Return counts of what a killed job had written."""
    names = [name for name in contents(output) if not Path(name).name.startswith(".diffsr-")]
    ledger, plans = (len(list(output.glob(p))) for p in ("_diffsr/ledger/*", "_diffsr/plans/*"))
    kinds = Counter("sidecars" if name.endswith(".json") else "maps" if ".uncertainty." in name else "images"
                    for name in names)  # fmt: skip
    if shards := len(list(output.glob("data/*"))):
        kinds = Counter(shards=shards, manifest=int((output / "manifest.json").exists()))
    made = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if count) or "no files"
    return f"{plans} plans, {made}, {ledger} ledger files"


def contents(output: Path) -> dict[str, bytes]:
    """Return every file of a set but the job's own bookkeeping; of one that goes meanwhile, nothing."""
    found = {}
    for path in sorted(output.rglob("*")):
        with suppress(FileNotFoundError):
            if path.is_file() and "_diffsr" not in path.relative_to(output).parts:
                found[str(path.relative_to(output))] = path.read_bytes()
    return found


def accounts(output: Path) -> Account:
    """Return what the ledger has of every input: status, stage, reason, and its object."""
    names = ("status", "stage", "reason", "out_key", "out_sha256")
    rows = Ledger(str(output)).latest().to_pylist()
    return {row["key"]: tuple(row[name] for name in names) for row in rows}


def twice(output: Path) -> list[str]:
    """Return the inputs of which the ledger has more than one receipt."""
    counts = Counter(Ledger(str(output)).rows(["key"])["key"].to_pylist())
    return sorted(key for key, count in counts.items() if count > 1)


def compared(output: Path, clean: Path, kills: list[tuple[str, str]], exit_code: int) -> Trial:
    """Return how an output differs from the clean one."""
    found, expected = contents(output), contents(clean)
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return Trial(kills, differing, accounts(output) != accounts(clean), twice(output), exit_code)


def struck(job: list[str], clean: Path, folder: Path, *, rng: random.Random) -> tuple[Process, tuple[str, str]]:
    """Start a job and return it at a random moment of its work, with the words for that moment.

    A moment is a number of files, from the first to the clean run's last, and up to DELAY_S after it: so the moments
    fall where something is written, however slow the machine is and however long the job takes to start.
    """
    output, last = folder / "set", num_files(clean)
    count, delay = rng.randint(min(num_files(output) + 1, last), last), rng.uniform(0, DELAY_S)
    process = start(job, folder)
    wait_for_files(process, output, count)
    time.sleep(delay)
    state = "it had ended" if process.poll() is not None else what_is_there(output)
    return process, (f"{count} of {last} files + {delay:.2f} s", state)


def trial(job: list[str], clean: Path, folder: Path, *, rng: random.Random) -> Trial:
    """Kill a run at a random moment, perhaps its resume too, let it end, and compare with the clean one."""
    kills: list[tuple[str, str]] = []
    while not kills or (len(kills) == 1 and rng.random() < AGAIN):
        process, moment = struck(job, clean, folder, rng=rng)
        kill(process)
        kills.append(moment)
    return compared(folder / "set", clean, kills, start(job, folder).wait())


def worker_trial(job: list[str], clean: Path, folder: Path, *, rng: random.Random) -> Trial:
    """Kill one actor at a random moment; the driver goes on, and nothing is started again."""
    process, (moment, state) = struck(job, clean, folder, rng=rng)
    victim = kill_worker(process, rng=rng)
    return compared(folder / "set", clean, [(f"{moment}, {victim}", state)], process.wait())


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description="kill -9 at random moments of a job, then a resume.")
    parser.add_argument("--job", default="pairs", choices=["pairs", "upscale"])
    parser.add_argument("--kills", type=int, default=20, help="trials")
    parser.add_argument("--victim", default="all", choices=["all", "worker"], help="worker: one of Ray's actors")
    parser.add_argument("--engine", default="local", choices=["local", "ray"])
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--job-flags", default="", help="further flags of the job, in one string")
    arguments = parser.parse_args()
    if arguments.victim == "worker" and arguments.engine != "ray":
        parser.error("--victim worker needs --engine ray: a plain loop has no other process")
    with tempfile.TemporaryDirectory(prefix="diffsr-kills-") as name:
        return soak(Path(name), arguments)


def soak(folder: Path, arguments: argparse.Namespace) -> int:
    """Run the clean job and the trials in an empty folder; print the table."""
    rng = random.Random(arguments.seed)
    (folder / "source").mkdir()
    (folder / "tmp").mkdir()
    megabytes = make_corpus(folder / "source", arguments.job)
    job = [sys.executable, str(ROOT / f"jobs/{SCRIPTS[arguments.job]}.py"), "--source", str(folder / "source")]
    job += ["--unit-megabytes", f"{megabytes / NUM_UNITS:.4f}", "--max-dead-share", "1"]
    job += [*flags_of(arguments.job, folder), "--engine", arguments.engine]
    job += ["--num-workers", str(arguments.num_workers), *arguments.job_flags.split()]
    clean = folder / "clean"
    if code := start([*job, "--output", str(clean)], folder).wait():
        print((folder / "log.txt").read_text()[-3000:], file=sys.stderr)
        raise SystemExit(f"the clean run failed with exit code {code}")
    summary = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    print(
        f"Clean run of {arguments.job}, engine {arguments.engine}, {arguments.num_workers} workers: "
        f"{summary['inputs']} inputs, {summary['done']} done, {summary['skipped']} skipped, {summary['dead']} dead; "
        f"{what_is_there(clean)}; {summary['seconds']:.0f} s.\n\n"
        "| trial | killed at | what was there | equal, each once |\n|---|---|---|---|",
        flush=True,
    )
    good = True
    strike = worker_trial if arguments.victim == "worker" else trial
    for number in range(1, arguments.kills + 1):
        place = folder / f"{number}"
        (place / "tmp").mkdir(parents=True)
        found = strike([*job, "--output", str(place / "set")], clean, place, rng=rng)
        moments = "; then ".join(moment for moment, _ in found.kills)
        states = "; then ".join(state for _, state in found.kills)
        print(f"| {number} | {moments} | {states} | {found.verdict} |", flush=True)
        if found.verdict != "yes":
            print((place / "log.txt").read_text()[-3000:], file=sys.stderr)
        good = good and found.verdict == "yes"
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
