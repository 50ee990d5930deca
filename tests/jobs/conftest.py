"""A small archive of real photographs, and a model trained from it: made once, by the jobs themselves."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffsr_core.degradation import Degradation

ROOT = Path(__file__).resolve().parent.parent.parent
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "camera.png", "rocket.jpg", "coins.png")
PAIRS_FLAGS = ["--patch", "32", "--max-per-image", "8", "--val-share", "0.3", "--test-share", "0"]
TRAIN_FLAGS = [
    "--batch-size",
    "4",
    "--encoder-steps",
    "6",
    "--steps",
    "6",
    "--checkpoint-every",
    "4",
    "--log-every",
    "2",
]


def png(pixels: np.ndarray) -> bytes:
    """Return the PNG of uint8 pixels."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def photograph(name: str, side: int = 96) -> np.ndarray:
    """Return a square crop from the middle of a photograph that ships inside scikit-image."""
    pixels = np.asarray(Image.open(str(files("skimage") / "data" / name)))
    y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[y : y + side, x : x + side]


@dataclass(frozen=True)
class Ran:
    """What a job left: exit code, the JSON summary, stdout before it, and stderr."""

    code: int
    summary: dict[str, Any]
    stderr: str


def script(job: str, *words: object) -> list[str]:
    """Return the command line of a job."""
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, words)]


def run(job: str, *words: object, env: dict[str, str] | None = None, timeout: float = 200) -> Ran:
    """Run a job in a process of its own, as a person would."""
    done = subprocess.run(
        script(job, *words), capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=timeout
    )
    lines = done.stdout.rstrip().splitlines()
    summary = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Ran(done.returncode, summary, done.stderr)


def run_until_killed(job: str, *words: object, when: Callable[[], bool], timeout: float = 120) -> None:
    """Start a job and kill -9 its whole process group as soon as `when()`; fails if the job ends before."""
    process = subprocess.Popen(
        script(job, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + timeout
    while not when():
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tree(folder: Path) -> dict[str, bytes]:
    """Return what a job published: every file but its own bookkeeping."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "_diffsr" not in path.parts
    }


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a job inside this process (no Ray): the same entry point, without the seconds that imports take."""
    from pipelines.cli import run_job

    def inside(job: str, *words: object) -> Ran:
        capfd.readouterr()
        code = run_job(job, [str(word) for word in words])
        out, err = capfd.readouterr()
        return Ran(code, json.loads(out.rstrip().splitlines()[-1]), err)

    return inside


@pytest.fixture(scope="session", autouse=True)
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow store of the tests' own."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        yield uri


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs, and one file that is cut short."""
    folder = tmp_path_factory.mktemp("archive")
    for name in PHOTOGRAPHS:
        (folder / name).with_suffix(".png").write_bytes(png(photograph(name)))
    (folder / "rotten.png").write_bytes(png(photograph("astronaut.png"))[:3000])
    return folder


@pytest.fixture(scope="session")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LR photographs: colour, grey, alpha, odd sizes, in a folder, a hostile name; one is cut short."""
    folder = tmp_path_factory.mktemp("inbox")
    low = {name: Degradation("bicubic", 4).apply(photograph(name), seed=0) for name in PHOTOGRAPHS}
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "person.png").write_bytes(png(low["astronaut.png"]))
    (folder / "grey.png").write_bytes(png(low["camera.png"]))
    (folder / "odd size.png").write_bytes(png(low["coffee.png"][:19, :11]))
    (folder / "line\nbreak 'ü.png").write_bytes(png(low["rocket.jpg"]))
    alpha = np.dstack([low["chelsea.png"], np.tile(np.arange(24, dtype=np.uint8) * 10, (24, 1))])
    (folder / "alpha.png").write_bytes(png(alpha))
    (folder / "rotten.png").write_bytes(png(low["astronaut.png"])[:700])
    return folder


@pytest.fixture(scope="session")
def pairs(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed pair set."""
    output = tmp_path_factory.mktemp("pairs") / "set"
    done = run("make_pairs", "--source", archive, "--output", output, "--engine", "local", *PAIRS_FLAGS)
    assert done.code == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted training run, registered as `tested` version 1."""
    output = tmp_path_factory.mktemp("train") / "run"
    flags = ["--pairs", pairs, "--output", output, "--engine", "local", "--register", "tested", *TRAIN_FLAGS]
    done = run("train", *flags)
    assert done.code == 0, done.stderr
    return output
