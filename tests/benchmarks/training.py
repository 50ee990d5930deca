"""The training job against a bare loop on tensors in memory, on one core and on two; prints training.md.

    python -m tests.benchmarks.training > tests/benchmarks/training.md

Everything that is compared runs in turn (A B C, A B C), and a ratio is of two runs of one round: a machine that gets
slower in an hour then slows both. A rate is of a training under way: without its start, and without checkpoints.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffsr_core.family import SuperResolver
from diffsr_core.training import Trainer
from pipelines import demo
from tests.benchmarks.steps import cpu_name

ROOT = Path(__file__).resolve().parents[2]
WARM_STEPS, LOG_EVERY = 40, 10
BARE = "import sys; from tests.benchmarks.training import bare_loop; bare_loop(sys.argv[1])"
PAGE = """# The training job against a bare loop

Printed by `{command}` on {date} in {minutes:.0f} minutes. {cpu}, torch {torch}.

{preset}, patches of 64 px, batch {batch}, {precision}, one thread a worker; {steps} steps, of which a rate leaves out
the first {warm}; medians of {rounds} rounds (and the range).

| contender | images/s | of the steps' own time | s, with everything |
|---|---|---|---|
{rows}

*images/s*: by the time of day of the reports, which therefore are in it. *Of the steps' own time*: what the reports
tell as `images_per_s`, which leaves out the time that a report takes itself. *With everything*: from the command to its
end, with imports, Ray's start, the checkpoint at the end, its validation, and the model in MLflow; for the bare loop
with reading its tensors.

| ratio | goal | median | rounds |
|---|---|---|---|
{ratios}

The bare loop is the same `Trainer` with the same batches as float32 tensors in memory: it draws noise and symmetries,
takes its steps, and does nothing else. It, the job on `--engine local` and the training worker of the job on Ray have
core {first} for themselves, and Ray's other processes have core {second}; on *one core* and on *two cores* run all of a
job's processes. Two workers share the batch of {batch}, {half} each, by DDP over gloo; two bare loops do without gloo.
Ray's workers run at nice 15 (RAY_worker_niceness), which matters only beside other load.
"""


class Rate(NamedTuple):
    """Images per second on the wall, and of the steps' own time (None where nothing else is in the former); seconds
    from the command to its end."""

    images_per_s: float
    own: float | None
    seconds: float


def bare_loop(settings: str) -> None:
    """Train on tensors in memory; print `ready`, wait for a line, and print the time at which each step ended."""
    from pipelines.manifest import load_manifest
    from pipelines.reader import PairReader
    from pipelines.session import to_tensor
    from pipelines.training_config import TrainConfig

    config = TrainConfig(**json.loads(settings))
    torch.set_num_threads(config.threads)
    recipe = config.recipe()
    reader = PairReader(config.pairs, load_manifest(config.pairs), "train", seed=recipe.seed)
    spans = [range(step * recipe.batch_size, (step + 1) * recipe.batch_size) for step in range(recipe.num_steps)]
    batches = [[to_tensor(pixels) for pixels in reader.batch(span)] for span in spans]
    torch.manual_seed(recipe.seed)
    trainer = Trainer(SuperResolver(config.model()), recipe)
    print("ready", flush=True)
    sys.stdin.readline()
    ended = []
    for hr, lr in batches:
        trainer.train_step(hr, lr)
        ended.append(time.monotonic())
    print(json.dumps(ended))


def bare(settings: Mapping[str, Any], folder: Path, *, cores: Sequence[int]) -> Rate:
    """Return the rate of a bare loop on each of these cores, all at once, together."""
    began = time.monotonic()
    text = json.dumps({**settings, "output": "none"})
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, "-c", BARE, text],
            cwd=folder,
            env=environment(folder),
            **options,
        )
        for core in cores
    ]
    for process in running:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("a bare loop failed; its message is above")
    rates = []
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        ended = json.loads(process.communicate()[0])
        steps = range(WARM_STEPS, len(ended) - LOG_EVERY + 1)  # as the reports of the job have it
        rates.append((len(steps) - 1) * settings["batch_size"] / (ended[steps[-1] - 1] - ended[steps[0] - 1]))
    return Rate(sum(rates), None, time.monotonic() - began)


def job(
    settings: Mapping[str, Any], folder: Path, *, engine: str, cores: Sequence[int], worker_core: int | None = None
) -> Rate:
    """Return the rate of jobs/train.py, on these cores; worker_core: that of Ray's training worker."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        given = {**settings, "output": str(Path(output) / "run"), "engine": engine}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, str(ROOT / "jobs/train.py"), *flags]
        began = time.monotonic()
        with (folder / "log.txt").open("w+") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environment(folder)
            )
            if worker_core is not None:
                move_worker(process, worker_core)
            out = process.communicate()[0]
            seconds = time.monotonic() - began
            if process.returncode:
                log.seek(0)
                raise RuntimeError(f"{command} ended with exit code {process.returncode}\n{log.read()[-3000:]}")
    run_id = json.loads(out.rstrip().rpartition("\n")[2])["run_id"]
    return reported(run_id, folder, batch_size=settings["batch_size"], seconds=seconds)


def move_worker(process: "subprocess.Popen[str]", core: int) -> None:
    """Wait for the training worker among what a process has started, and move it to a core, threads to come included.

    Its threads begin on the cores of those that start them; so a few rounds find the last that began elsewhere.
    """
    import psutil

    rounds = 0
    while rounds < 6 and process.poll() is None:
        time.sleep(0.5)
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::RayTrainWorker"):
                    rounds += 1
                    for thread in child.threads():
                        os.sched_setaffinity(thread.id, {core})
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
    if rounds == 0 and process.poll() is None:
        raise RuntimeError("no training worker was found")


def reported(run_id: str, folder: Path, *, batch_size: int, seconds: float) -> Rate:
    """Return the rate that a run's reports in MLflow tell, from WARM_STEPS to the last without a checkpoint."""
    import mlflow

    history = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").get_metric_history(run_id, "train_s")
    reports = sorted((entry for entry in history if entry.step >= WARM_STEPS), key=lambda entry: entry.step)
    first, last = reports[0], reports[-2]
    images = (last.step - first.step) * batch_size
    return Rate(images / (last.timestamp - first.timestamp) * 1e3, images / (last.value - first.value), seconds)


def environment(folder: Path) -> dict[str, str]:
    """Return what every contender is started with; no cluster, and an MLflow store of its own."""
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(ROOT)}
    return {**{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}, **own}


def make_pairs(folder: Path) -> str:
    """Return the URI of the demo's pair set, made here."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    with redirect_stdout(sys.stderr):
        demo.prepare(folder / "demo")
        flags = ["--patch", 64, "--min-deviation", 4, "--max-per-image", 200, "--val-share", 0.225, "--test-share", 0]
        places = ["--source", folder / "demo" / "bucket", "--output", folder / "pairs"]
        demo.job("make_pairs", *places, *flags, "--engine", "local")
    return str(folder / "pairs")


def typed() -> str:
    """Return the command that was typed."""
    return " ".join(["python -m tests.benchmarks.training", *sys.argv[1:]])


def spread(values: Sequence[float], form: str) -> str:
    """Return a median and its range."""
    low, middle, high = (format(value, form) for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def row(name: str, rates: Sequence[Rate]) -> str:
    """Return a contender's row."""
    own = [rate.own for rate in rates if rate.own is not None]
    cells = [spread([rate.images_per_s for rate in rates], ".1f"), spread(own, ".1f") if own else "-"]
    return f"| {' | '.join([name, *cells, spread([rate.seconds for rate in rates], '.0f')])} |"


def main() -> None:
    """Print training.md."""
    parser = argparse.ArgumentParser(description="The training job against a bare loop, on one core and on two.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--preset", default="nano-x4", help="one with an encoder stage")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", help="a pair set; default: the demo's, made first")
    arguments = parser.parse_args()
    num_steps, batch, cores = arguments.steps, arguments.batch, sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or num_steps < WARM_STEPS + 3 * LOG_EVERY or num_steps % LOG_EVERY or batch % 2:
        raise SystemExit(f"needs two cores, an even batch, and steps a multiple of {LOG_EVERY}, 70 or more")
    first, second = cores[:2]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="diffsr-bench-") as name:
        folder = Path(name)
        settings = {
            "pairs": arguments.pairs or make_pairs(folder),
            "preset": arguments.preset,
            "batch_size": batch,
            "encoder_steps": 20,
            "steps": num_steps - 20,
            "precision": demo.precision(),
            "log_every": LOG_EVERY,
            "checkpoint_every": num_steps,
        }
        two = {**settings, "num_workers": 2}
        contenders: dict[str, Callable[[], Rate]] = {
            "bare loop": partial(bare, settings, folder, cores=[first]),
            "job, local": partial(job, settings, folder, engine="local", cores=[first]),
            "job, Ray": partial(job, settings, folder, engine="ray", cores=[second], worker_core=first),
            "job, Ray, all on one core": partial(job, settings, folder, engine="ray", cores=[first]),
            "job, Ray, 2 workers, two cores": partial(job, two, folder, engine="ray", cores=[first, second]),
            "two bare loops": partial(bare, {**settings, "batch_size": batch // 2}, folder, cores=[first, second]),
        }
        rates: dict[str, list[Rate]] = {name: [] for name in contenders}
        for number in range(arguments.rounds):
            for name, run in contenders.items():
                rates[name].append(run())
                print(f"round {number + 1}: {name}: {rates[name][-1]}", file=sys.stderr, flush=True)
    ratios = []
    one, local, ray, alone, together, both = rates
    for over, under, goal in ((local, one, 0.97), (ray, one, 0.97), (together, alone, 1.7), (together, local, None),
                              (together, both, 0.9)):  # fmt: skip
        found = [a.images_per_s / b.images_per_s for a, b in zip(rates[over], rates[under], strict=True)]
        each = ", ".join(f"{value:.3f}" for value in found)
        ratios.append(f"| {over} / {under} | {goal or '-'} | {statistics.median(found):.3f} | {each} |")
    print(PAGE.format(command=typed(), date=datetime.date.today(), minutes=(time.monotonic() - began) / 60,
                      cpu=cpu_name(), torch=torch.__version__, preset=arguments.preset, batch=batch, half=batch // 2,
                      precision=demo.precision(), steps=num_steps, warm=WARM_STEPS, rounds=arguments.rounds,
                      rows="\n".join(row(*item) for item in rates.items()), ratios="\n".join(ratios), first=first,
                      second=second))  # fmt: skip


if __name__ == "__main__":
    main()
