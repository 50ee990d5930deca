"""Laws of pipelines.heap: threads and children share one heap, large arrays lie in it, what a user has set stands."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the heap of glibc")

# Eight threads hold memory at once, and one 64 MiB; malloc_info then lists the heaps, and counts what lies outside.
PROGRAM = """
import ctypes, os, subprocess, sys, threading
from pipelines.heap import share_heap
if "share" in sys.argv[1:]:
    share_heap()
if "child" in sys.argv[1:]:
    raise SystemExit(subprocess.call([sys.executable, *sys.argv[:1]]))
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.fdopen.argtypes = [ctypes.c_size_t], [ctypes.c_int, ctypes.c_char_p]
libc.malloc_info.argtypes, libc.fflush.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
barrier = threading.Barrier(8)
def hold():
    libc.malloc(100_000)
    barrier.wait()
threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.malloc(1 << 26)
read, write = os.pipe()
stream = libc.fdopen(write, b"w")
libc.malloc_info(0, stream)
libc.fflush(stream)
print(os.read(read, 1 << 20).decode())
"""


def heaps(tmp_path, *words, **variables):
    """Return how many heaps a process has, and whether its large array lies outside of them."""
    (tmp_path / "program.py").write_text(PROGRAM)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), *words],
        env={**clean, "PYTHONPATH": os.getcwd(), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    (outside,) = re.findall(r'<total type="mmap" count="\d+" size="(\d+)"', done.stdout)
    return done.stdout.count("<heap "), int(outside) >= 1 << 26


def test_all_threads_share_one_heap_that_holds_large_arrays_and_without_it_they_do_not(tmp_path):
    assert heaps(tmp_path, "share") == (1, False)
    several, outside = heaps(tmp_path)
    assert several > 1
    assert outside


def test_the_processes_that_it_starts_do_so_too(tmp_path):
    assert heaps(tmp_path, "share", "child") == (1, False)


def test_what_the_user_has_set_stands(tmp_path):
    assert heaps(tmp_path, "share", MALLOC_ARENA_MAX="3") == (3, False)
    assert heaps(tmp_path, "share", MALLOC_MMAP_THRESHOLD_="1048576") == (1, True)
