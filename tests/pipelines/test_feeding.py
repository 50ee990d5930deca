"""Laws of pipelines.feeding: each rank its own slice, in order, the same bytes whoever decodes, and nothing left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipelines import feeding
from pipelines.commit import publish_manifest
from pipelines.engine import cluster
from pipelines.feeding import FeedConfig, feed_from_ray, feed_in_thread, positions
from pipelines.manifest import load_manifest
from pipelines.reader import Fed, PairIndex, PairReader, read_index
from tests.pipelines.tiny_sets import RECIPE, SIDE, make_row, manifest_of, noise, write_shard


def publish(root: Path, rows: list[dict[str, Any]]) -> str:
    shard = write_shard(root, "x", rows)
    publish_manifest(str(root), manifest_of(shard, recipe={**RECIPE, "patch": SIDE}))
    return str(root)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """23 pairs, one of them corrupt."""
    rows = [make_row("a.png", number) for number in range(23)]
    rows[7]["lr"] = rows[7]["lr"][:30]
    return publish(tmp_path_factory.mktemp("set"), rows)


@pytest.fixture(scope="module")
def index(pairs: str) -> PairIndex:
    return read_index(pairs, load_manifest(pairs), "train")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A set that cannot be trained on: nobody said which of its values is white."""
    return publish(tmp_path_factory.mktemp("floats"), [make_row("a.png", hr=noise(0, dtype=np.float32))])


def config_of(pairs: str, **fields: Any) -> FeedConfig:
    given = {"batch_size": 6, "share": range(6), "first": 2, "last": 12, **fields}
    return FeedConfig(pairs=pairs, split="train", seed=1, channels=3, **given)


def equal(one: Fed, other: Fed) -> bool:
    same = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one[:2], other[:2], strict=True))
    return same and one.corrupt == other.corrupt


def alive() -> int:
    return sum(thread.name.startswith("feed") for thread in threading.enumerate())


def until(holds: Any, *, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(holds())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_slices_of_the_ranks_are_the_batch(pairs: str, index: PairIndex, world: int) -> None:
    read = PairReader(pairs, load_manifest(pairs), "train", seed=1)
    whole = [read.tolerant_batch(range(6 * step, 6 * step + 6)) for step in range(2, 12)]
    shares = [range(rank * 6 // world, (rank + 1) * 6 // world) for rank in range(world)]
    ranks = [list(feed_in_thread(config_of(pairs, share=share), index)) for share in shares]
    assert sum(len(fed.corrupt) for rank in ranks for fed in rank) == sum(len(fed.corrupt) for fed in whole) > 1
    for step, expected in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        hr, lr = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
        joined = Fed(hr, lr, tuple(text for part in parts for text in part.corrupt))
        assert equal(joined, expected)


def test_positions_are_a_function_of_the_step() -> None:
    config = config_of("", batch_size=10, share=range(4, 7))
    assert [*positions(config, 0), *positions(config, 3)] == [4, 5, 6, 34, 35, 36]


@pytest.mark.parametrize("ahead", [0, 1, 4, 100])
def test_a_batch_comes_for_each_step_and_no_more_than_these_are_decoded_ahead(
    pairs: str, index: PairIndex, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    whole = feeding.Decoder.decode

    def decode(self: feeding.Decoder, step: int) -> Fed:
        decoded.append(step)
        return whole(self, step)

    monkeypatch.setattr(feeding.Decoder, "decode", decode)
    feed = feed_in_thread(config_of(pairs), index, ahead=ahead)
    next(feed)
    assert until(lambda: len(decoded) == min(10, ahead + 1))
    time.sleep(0.1)
    assert decoded == list(range(2, 2 + min(10, ahead + 1)))
    assert len(list(feed)) == 9 and decoded == list(range(2, 12))
    assert not list(feed_in_thread(config_of(pairs, first=5, last=5), index))


def test_a_feed_of_a_million_steps_starts_at_once_and_its_thread_ends_when_it_is_closed(
    pairs: str, index: PairIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert until(lambda: not alive())
    start = time.monotonic()
    whole = feeding.Decoder.decode

    def decode(self: feeding.Decoder, step: int) -> Fed:
        time.sleep(0.1)
        return whole(self, step)

    monkeypatch.setattr(feeding.Decoder, "decode", decode)
    feed = feed_in_thread(config_of(pairs, last=1_000_000), index, ahead=100)
    assert len(list(islice(feed, 3))) == 3 and alive() == 1
    feed.close()  # type: ignore[attr-defined]
    assert until(lambda: not alive()) and time.monotonic() - start < 3


@pytest.mark.parametrize("error", [ValueError("damaged"), MemoryError("much"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_ends_the_reader_is_raised(pairs: str, index: PairIndex, error: BaseException,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    whole = feeding.Decoder.decode

    def decode(self: feeding.Decoder, step: int) -> Fed:
        if step == 4:
            raise error
        return whole(self, step)

    monkeypatch.setattr(feeding.Decoder, "decode", decode)
    feed = feed_in_thread(config_of(pairs), index)
    assert len(list(islice(feed, 2))) == 2
    with pytest.raises(type(error)) as raised:
        next(feed)
    assert raised.value is error and until(lambda: not alive())


def test_a_data_worker_imports_no_torch() -> None:
    program = "import pipelines.feeding, sys; print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


def decoders() -> list[int]:
    """The data workers that live on this rank's machine, below its raylet."""
    every = psutil.process_iter(["ppid", "cmdline"])
    return [p.pid for p in every if p.info["ppid"] == os.getppid() and "Decoder" in " ".join(p.info["cmdline"] or [])]


class Rank:
    """What holds a CPU, as a worker of Ray Train does."""

    def same(self, config: FeedConfig, index_ref: list[Any], *, kill_at: int) -> dict[str, Any]:
        """Feed the steps from Ray and in a thread, and kill a data worker at one of them."""
        import ray

        fed: list[Fed] = []
        before: list[int] = []
        for step, batch in enumerate(feed_from_ray(config, index_ref[0], num_data_workers=2)):
            if step == kill_at:
                before = decoders()
                os.kill(before[0], signal.SIGKILL)
            fed.append(batch)
        oracle = list(feed_in_thread(config, ray.get(index_ref[0])))
        return {
            "steps": len(fed),
            "equal": [equal(*each) for each in zip(fed, oracle, strict=True)],
            "corrupt": sum(len(batch.corrupt) for batch in fed),
            "writable": all(batch.hr.flags.writeable and batch.lr.flags.writeable for batch in fed),
            "workers": len(before),
            "gone": until(lambda: not decoders()),
        }

    def closed(self, config: FeedConfig, index_ref: list[Any]) -> tuple[int, float, bool]:
        """Take three batches of a feed and close it."""
        start = time.monotonic()
        feed: Any = feed_from_ray(config, index_ref[0], num_data_workers=1)
        taken = len(list(islice(feed, 3)))
        feed.close()
        return taken, time.monotonic() - start, until(lambda: not decoders())

    def failure(self, config: FeedConfig, index_ref: list[Any]) -> tuple[type, str, bool]:
        """Return what a feed raises."""
        try:
            list(feed_from_ray(config, index_ref[0], num_data_workers=1))
        except Exception as error:
            return type(error), str(error), until(lambda: not decoders())
        raise AssertionError("nothing was raised")


@pytest.fixture(scope="module")
def rank() -> Iterator[Any]:
    """A Rank in a placement group that holds just its own CPU, on a cluster of three."""
    with cluster(num_cpus=3):
        import ray
        from ray import cloudpickle
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call] # workers import no tests
        group = placement_group([{"CPU": 1}])
        inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        yield ray.remote(Rank).options(num_cpus=1, scheduling_strategy=inside).remote()


@pytest.mark.ray
def test_data_workers_feed_what_a_thread_feeds_though_one_is_killed(pairs: str, index: PairIndex, rank: Any) -> None:
    import ray

    config = config_of(pairs, share=range(2, 5), last=42)
    done = ray.get(rank.same.remote(config, [ray.put(index)], kill_at=10), timeout=60)
    assert done["steps"] == 40 and all(done["equal"]) and done["corrupt"] > 1 and done["writable"]
    assert done["workers"] == 2 and done["gone"]


@pytest.mark.ray
def test_a_feed_on_ray_leaves_nothing_when_it_is_closed_or_fails_with_the_reader_s_own_error(
    pairs: str, floats: str, index: PairIndex, rank: Any
) -> None:
    import ray

    taken, seconds, gone = ray.get(rank.closed.remote(config_of(pairs, last=1_000_000), [ray.put(index)]), timeout=60)
    assert taken == 3 and seconds < 30 and gone
    bad = ray.put(read_index(floats, load_manifest(floats), "train"))
    raised, text, gone = ray.get(rank.failure.remote(config_of(floats), [bad]), timeout=60)
    assert raised is ValueError and gone
    assert text.startswith("value_range (None)") and "\n" not in text
    raised, text, _ = ray.get(rank.failure.remote(replace(config_of(floats), pairs="/nowhere"), [bad]), timeout=60)
    assert raised is ValueError and "must hold a manifest.json" in text
