"""Laws of a worker's memory, of what a run leaves in the ledger, and of the names that a store cannot hold."""

import errno
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines import ledger as ledger_module
from pipelines.assets import MemoryBudget, named
from pipelines.calibration import planned_in_flight, seconds_per_megapixel, window_bytes
from pipelines.images import Refused
from pipelines.ledger import Ledger, Receipt


def test_open_assets_never_hold_more_than_the_budget_and_all_come_through() -> None:
    budget, held, most, lock = MemoryBudget(100), [0], [0], threading.Lock()

    def work(wanted: int) -> None:
        with budget.held(wanted):
            with lock:
                held[0] += min(wanted, 100)
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= min(wanted, 100)

    threads = [threading.Thread(target=work, args=(wanted,)) for wanted in [30, 60, 500, 1, 99, 0, 45] * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert (held[0], 99 <= most[0] <= 100) == (0, True)


def test_what_a_body_raises_gives_its_share_back() -> None:
    budget = MemoryBudget(10)
    for _ in range(3):
        with pytest.raises(KeyError), budget.held(10):
            raise KeyError
    with budget.held(10):
        pass


@pytest.mark.parametrize("code", [errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EINVAL])
def test_a_name_that_the_store_cannot_hold_is_a_refusal(code: int) -> None:
    with pytest.raises(Refused) as caught, named("a.png"):
        raise OSError(code, "no")
    assert (caught.value.stage, caught.value.reason) == ("publish", "bad_name")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ECONNREFUSED])
def test_a_store_that_is_full_or_away_is_no_fault_of_the_asset(code: int) -> None:
    with pytest.raises(OSError) as caught, named("a.png"):
        raise OSError(code, "no")
    assert caught.value.errno == code


@pytest.mark.parametrize("compacted", [False, True])
def test_the_receipts_of_a_run_are_found_in_the_newest_segments_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compacted: bool
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_SEGMENTS", 4)
    monkeypatch.setattr(ledger_module, "ROW_GROUP_ROWS", 5)
    ledger, runs = Ledger(str(tmp_path)), {}
    for fence in range(1, 5):
        runs[fence] = [f"{fence} {index}" for index in range(6 * fence)]
        for number, part in enumerate((runs[fence][:5], runs[fence][5:])):
            receipts = [
                Receipt(key=key, etag="", size=1, recipe="", status="done", run_id=f"run {fence}", fence=fence)
                for key in part
            ]
            ledger.append(receipts, fence=fence, number=number)
    if compacted:
        assert ledger.compact(fence=4)
    assert ledger.of_run("run 4", fence=4)["key"].to_pylist() == runs[4]
    assert ledger.of_run("run 5", fence=5).num_rows == 0
    read = sum(table.num_rows for table in ledger.newest(["key"]))
    assert read == sum(map(len, runs.values()))


def test_more_memory_lets_more_windows_in_flight_and_never_fewer_than_one() -> None:
    from diffsr_core.sampling import SamplingRecipe
    from diffsr_core.upscaler import Upscaler
    from tests.core.tiny import ANCHORED, model_of

    recipe = SamplingRecipe(num_steps=1, tile=16, halo=4, window=64, margin=8)
    upscaler = Upscaler(model_of(ANCHORED, seed=1), recipe)
    assert (planned_in_flight(upscaler, share=1e-9), planned_in_flight(upscaler, share=0.9)) == (1, 8)
    whole = window_bytes(upscaler)
    held = 80 * 80 * 3 * 16 * 4  # one image of the window's results in float32 is the least
    assert held < whole < 200 * held
    assert np.isfinite(seconds := seconds_per_megapixel(upscaler.model, recipe, device="cpu")) and seconds > 0
