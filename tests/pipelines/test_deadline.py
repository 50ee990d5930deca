"""Laws of pipelines.deadline: what runs too long is refused, in any thread, once; what cannot be stopped is ended."""

import contextlib
import random
import subprocess
import sys
import threading
import time
import timeit
from functools import partial

import pytest

from pipelines import deadline
from pipelines.deadline import time_limit
from pipelines.images import Refused


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def in_thread(function):
    """Return what `function` returned or raised in another thread."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    return found[0]


def overrun(*, body):
    started = time.perf_counter()
    with pytest.raises(Refused) as caught, time_limit(0.05):
        body()
    return caught.value, time.perf_counter() - started


@pytest.mark.parametrize("where", [lambda function: function(), in_thread])
def test_a_body_that_runs_too_long_is_interrupted_and_refused_in_any_thread(where):
    refused, seconds = where(lambda: overrun(body=lambda: spin(20)))
    assert (refused.stage, refused.reason, refused.message) == ("decode", "time_limit", "not done after 0.05 s")
    assert 0.05 <= seconds < 5


def test_a_body_in_time_is_left_alone_and_its_own_errors_pass():
    with time_limit(20) as nothing:
        assert nothing is None
    with pytest.raises(Refused, match="corrupt"), time_limit(20):
        raise Refused("decode", "corrupt", "its own")
    with pytest.raises(KeyboardInterrupt), time_limit(20):
        raise KeyboardInterrupt
    assert deadline._Watch.running == {}


def test_except_exception_does_not_swallow_the_interrupt():
    def careless():
        for _ in range(2):
            try:
                spin(3)
            except Exception:
                continue

    assert overrun(body=careless)[1] < 3


def test_a_swallowed_interrupt_and_an_end_in_c_code_are_refused_all_the_same():
    def swallowing():
        with contextlib.suppress(BaseException):
            spin(20)

    def failing():
        try:
            spin(20)
        finally:
            raise OSError("while cleaning up")

    for body in (swallowing, failing, lambda: time.sleep(0.2)):
        assert overrun(body=body)[0].reason == "time_limit"


def test_interrupts_at_the_very_end_neither_leak_nor_get_lost():
    """Thousands of limits about as long as their bodies, in threads that fight for the interpreter."""
    ends, leaks = {"done": 0, "time_limit": 0}, []

    def hammer(seed):
        dice = random.Random(seed)
        for _ in range(2000):
            limit, need = dice.random() * 2e-4 + 1e-9, dice.random() * 2e-4
            end = "done"
            try:
                try:
                    with time_limit(limit):
                        limit_set = time.monotonic()
                        spin(need) if dice.random() < 0.7 else time.sleep(need)
                        took = time.monotonic() - limit_set
                except Refused:
                    end = "time_limit"
                else:
                    if took > limit + 1:
                        leaks.append(f"lost: {took} s")
                spin(1e-5)
            except BaseException as error:
                leaks.append(repr(error))
            ends[end] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert leaks == [] and sum(ends.values()) == 6000
    assert min(ends.values()) > 100, ends
    assert deadline._Watch.running == {}


def test_an_interrupt_that_is_still_to_come_when_the_body_is_over_is_refused_and_gone():
    """Set by a unary minus written in C: there is no bytecode after it at which Python would look before the exit."""

    class Pending:
        __neg__ = partial(deadline._raise_in_thread, threading.get_ident(), deadline._TimeUp)

    pending = Pending()
    for _ in range(100):
        with pytest.raises(Refused, match="time_limit"), time_limit(20):
            deadline._Watch.running[threading.get_ident()].fired = True
            minus = -pending
    spin(1e-3)
    assert minus == 1


def test_a_use_costs_less_than_50_microseconds():
    def use():
        with time_limit(20):
            pass

    assert min(timeit.repeat(use, number=1000, repeat=5)) / 1000 < 50e-6


def test_one_watchdog_serves_all_uses():
    for _ in range(20):
        assert in_thread(lambda: overrun(body=lambda: spin(20)))[0].reason == "time_limit"
    assert [thread.name for thread in threading.enumerate()].count("time-limit") == 1


def test_the_nearest_of_several_limits_comes_first():
    with time_limit(20):
        assert in_thread(lambda: overrun(body=lambda: spin(20)))[1] < 5


def test_a_nested_use_and_senseless_times_are_mistakes():
    with time_limit(20):
        with pytest.raises(RuntimeError, match="does not nest"), time_limit(10):
            pass
        assert len(deadline._Watch.running) == 1
    for seconds in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="seconds="):
            time_limit(seconds)
    with pytest.raises(ValueError, match="grace="):
        time_limit(1, grace=0)


@pytest.mark.parametrize(
    ("library", "said"), [("CDLL", "cannot be stopped, 0.3 s after its 0.1 s"), ("PyDLL", "Timeout (0:00:00")]
)
def test_a_hang_in_c_ends_the_process_even_one_that_holds_the_interpreters_lock(library, said):
    code = f"""
import ctypes
from pipelines.deadline import time_limit
with time_limit(0.1, grace=0.3):
    ctypes.{library}(None).sleep(60)
"""
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1 and time.monotonic() - started < 20
    assert said in ended.stderr and 'File "<string>", line 5' in ended.stderr


def test_the_hard_stop_goes_when_the_body_does():
    code = """
import ctypes
from pipelines.deadline import time_limit
for _ in range(3):
    with time_limit(0.1, grace=0.2):
        pass
ctypes.CDLL(None).usleep(400_000)
ctypes.PyDLL(None).usleep(400_000)
print("alive")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (0, "alive\n"), ended.stderr
