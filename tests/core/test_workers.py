"""Laws of two real workers on this machine: together they are the one, killed or not, split or whole.

One float32 training of 6 steps over a change of stage, 5 images a step, so that one worker has 2 and the other 3. Sums
in another order move a gradient by 5e-10, and Adam, which divides by |g| + 1e-8, a few weights by 1e-2 of the rate.
"""

import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from diffsr_core.recipe import TrainingRecipe
from diffsr_core.training import Trainer, TrainerState
from tests.core.runs import recipe_of, share_of, stored
from tests.core.tiny import ANCHORED, model_of

RECIPE = recipe_of(
    "regression", "diffusion", num_steps=3, batch_size=5, learning_rate=1e-4, ema_half_lives_images=(4, 1)
)
# What was frozen, and gathered so, is trained after it.
OTHER_ORDER = recipe_of("diffusion", "joint", num_steps=2, batch_size=5, learning_rate=1e-4)
EVEN = recipe_of("regression", "diffusion", num_steps=2, batch_size=4, learning_rate=1e-4, micro_batch=1)
NUM_STEPS, CHECKPOINT, KILLED = 6, 2, 4
ROOT = Path(__file__).parents[2]


def trainer_of(recipe: TrainingRecipe = RECIPE, *, seed: int = 1, **fields: Any) -> Trainer:
    return Trainer(model_of(ANCHORED, seed=seed), recipe, **fields)


def spoiled(trainer: Trainer, *, rank: int, at: int) -> tuple[Tensor, Tensor]:
    """The share of a step, with a NaN in one worker's at step `at`."""
    hr, lr = share_of(trainer, trainer.step)
    return (hr * math.nan if (trainer.rank, trainer.step) == (rank, at) else hr), lr


# --- what each of the two processes does ---


class Counting:
    """Wraps an objective for the workers, and counts how often they meet."""

    def __init__(self) -> None:
        self.meetings = 0

    def __call__(self, objective: nn.Module) -> nn.Module:
        wrapped = nn.parallel.DistributedDataParallel(objective)
        wrapped.register_comm_hook(None, self.meet)
        return wrapped

    def meet(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        self.meetings += 1
        return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


class Process:
    """One of the workers; it keeps what the test asks of it in a folder."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def trainer(self, recipe: TrainingRecipe = RECIPE, **fields: Any) -> Trainer:
        return trainer_of(recipe, rank=self.rank, world=2, **fields)

    def keep(self, name: str, trainer: Trainer, **said: Any) -> None:
        torch.save((tuple(stored(trainer)), said), self.folder / f"{name}-{self.rank}")

    def run(self, name: str, trainer: Trainer, **said: Any) -> None:
        reports = []
        while not trainer.done:
            if trainer.step == CHECKPOINT:
                self.keep(f"{name}-midway", trainer)
            reports.append(trainer.train_step(*share_of(trainer, trainer.step)))
        self.keep(name, trainer, reports=reports, **said)

    def before_the_kill(self) -> None:
        self.run("ddp", self.trainer(wrap=nn.parallel.DistributedDataParallel))
        count = Counting()
        small = self.trainer(replace(RECIPE, micro_batch=1), wrap=count)
        self.run("ddp in micro-batches", small)
        self.keep("meetings", small, meetings=count.meetings)
        sick = self.trainer(wrap=nn.parallel.DistributedDataParallel)
        reports = [sick.train_step(*spoiled(sick, rank=1, at=1)) for _ in range(3)]
        self.keep("one sick worker", sick, skipped=[report["skipped"] for report in reports])
        self.run("fsdp", self.trainer(sharded=True))
        self.run("fsdp other order", self.trainer(OTHER_ORDER, sharded=True))
        self.run("fsdp in micro-batches", self.trainer(EVEN, sharded=True))
        doomed = self.trainer(wrap=nn.parallel.DistributedDataParallel)
        while doomed.step < KILLED:
            if doomed.step == CHECKPOINT:
                self.keep("killed", doomed)
            doomed.train_step(*share_of(doomed, doomed.step))
        os.kill(os.getpid(), signal.SIGKILL)

    def after_the_kill(self) -> None:
        checkpoint = load(self.folder, "killed")[0]
        resumed = self.trainer(wrap=nn.parallel.DistributedDataParallel, seed=99)
        resumed.load_state(checkpoint)
        self.run("ddp resumed", resumed)
        split = self.trainer(sharded=True, seed=99)
        split.load_state(checkpoint)
        self.run("fsdp resumed", split)


def main() -> None:
    torch.set_num_threads(1)
    folder, act, rank, port = sys.argv[1:]
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=int(rank), world_size=2)
    getattr(Process(Path(folder), int(rank)), act)()
    dist.destroy_process_group()


# --- what the tests see of it ---


def load(folder: Path, name: str, *, rank: int = 0) -> tuple[TrainerState, dict[str, Any]]:
    state, said = torch.load(folder / f"{name}-{rank}", weights_only=True)
    return TrainerState(*state), said


def run_both(folder: Path, act: str) -> list[int]:
    """The exit codes of two processes that do `act` together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.core.test_workers", str(folder), act]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [subprocess.Popen([*command, str(rank), str(port)], cwd=ROOT, env=environment) for rank in (0, 1)]
    try:
        return [worker.wait(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left that were killed, and the two that took up their work."""
    path = tmp_path_factory.mktemp("workers")
    assert run_both(path, "before_the_kill") == [-signal.SIGKILL] * 2
    assert run_both(path, "after_the_kill") == [0, 0]
    return path


def alone(recipe: TrainingRecipe = RECIPE, *, start: TrainerState | None = None) -> TrainerState:
    """What one worker makes of it."""
    trainer = trainer_of(recipe)
    if start is not None:
        trainer.load_state(start)
    while not trainer.done:
        trainer.train_step(*share_of(trainer, trainer.step))
    return stored(trainer)


@pytest.fixture(scope="module")
def one() -> TrainerState:
    return alone()


def gap(a: TrainerState, b: TrainerState) -> float:
    """The largest difference of any weight, average or, a hundred times as heavy, moment."""
    tables = [(a.weights, b.weights, 1), (a.optimizer, b.optimizer, 100)]
    tables += [(a.averages[half_life], b.averages[half_life], 1) for half_life in a.averages | b.averages]
    assert all(x.keys() == y.keys() for x, y, _ in tables)
    return max(float((x[name] - y[name]).abs().max()) * times for x, y, times in tables for name in x)


def same(a: TrainerState, b: TrainerState) -> bool:
    return gap(a, b) == 0 and a.counters == b.counters


def test_two_workers_are_one(folder: Path, one: TrainerState) -> None:
    two, _ = load(folder, "ddp")
    assert gap(two, one) < 1e-6
    assert two.counters == pytest.approx(one.counters, rel=1e-5)
    assert same(load(folder, "ddp", rank=1)[0], two)


def test_two_workers_that_were_killed_and_took_up_their_checkpoint_end_bit_for_bit_like_those_that_were_not(
    folder: Path,
) -> None:
    for rank in (0, 1):
        whole, said = load(folder, "ddp", rank=rank)
        resumed, again = load(folder, "ddp resumed", rank=rank)
        assert same(resumed, whole)
        assert again["reports"] == said["reports"][CHECKPOINT:]


def test_micro_batches_change_nothing_and_the_workers_meet_once_a_step(folder: Path, one: TrainerState) -> None:
    assert gap(load(folder, "ddp in micro-batches")[0], one) < 1e-6
    assert load(folder, "meetings")[1] == {"meetings": NUM_STEPS}


def test_what_one_worker_must_skip_both_skip(folder: Path) -> None:
    for rank in (0, 1):
        assert load(folder, "one sick worker", rank=rank)[1] == {"skipped": [0.0, 1.0, 0.0]}
    assert same(load(folder, "one sick worker")[0], load(folder, "one sick worker", rank=1)[0])


def test_sharded_workers_are_one_and_their_state_is_whole(folder: Path, one: TrainerState) -> None:
    assert gap(load(folder, "fsdp")[0], one) < 1e-6
    assert not load(folder, "fsdp", rank=1)[0].weights  # the first worker alone keeps them, not each one on its host
    assert gap(load(folder, "fsdp other order")[0], alone(OTHER_ORDER)) < 1e-6
    assert gap(load(folder, "fsdp in micro-batches")[0], alone(EVEN)) < 1e-6


def test_a_training_goes_on_with_another_number_of_workers_and_split_or_not(folder: Path, one: TrainerState) -> None:
    assert gap(load(folder, "fsdp resumed")[0], one) < 1e-6  # two whole workers -> two split ones
    for name in ("ddp-midway", "fsdp-midway"):  # two workers -> one
        assert gap(alone(start=load(folder, name)[0]), one) < 1e-6


if __name__ == "__main__":
    main()
