"""`ray job submit -- python jobs/train.py` against a real Ray job server, with Ray's token authentication on."""

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.jobs.conftest import ROOT, TRAIN_FLAGS

HEAD = """
import os, sys, time, ray
context = ray.init(address="local", num_cpus=3, include_dashboard=True, dashboard_port=0, log_to_driver=False)
open(sys.argv[1] + ".new", "w").write(context.dashboard_url)
os.replace(sys.argv[1] + ".new", sys.argv[1])
sys.stdin.read()
"""


def uninstalled_python(folder: Path) -> Path:
    """Return a Python that sees this environment's packages, but not the ones of this project."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    inside = next(folder.glob("lib/python*/site-packages"))
    # The .pth files inside a folder that a .pth names are not read: so our editable install is not seen.
    (inside / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    found = subprocess.run([str(python), "-c", "import pipelines"], capture_output=True, text=True, cwd=folder)
    assert "No module named 'pipelines'" in found.stderr
    return python


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A private Ray with its job server; gives (address, environment of a user who holds the token)."""
    folder = tmp_path_factory.mktemp("server")
    token = folder / "token"
    token.write_text("a" * 64)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_ADDRESS", None)
    # As on a cluster: `python` on the head's PATH has the dependencies and not our packages, `ray` is the user's.
    python = uninstalled_python(folder / "image")
    environment["PATH"] = f"{python.parent}:{Path(sys.executable).parent}:{environment['PATH']}"
    url = folder / "url"
    command = [str(python), "-c", HEAD, str(url)]
    head = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd=folder)
    try:
        deadline = time.monotonic() + 90
        while not url.exists():
            assert head.poll() is None and time.monotonic() < deadline, "the job server did not start"
            time.sleep(0.1)
        yield f"http://{url.read_text()}", environment
    finally:
        assert head.stdin is not None
        head.stdin.close()
        head.wait(timeout=60)


def test_train_is_submitted_with_the_token_and_the_code_travels_with_the_job(
    server: tuple[str, dict[str, str]], pairs: Path, registry: str, tmp_path: Path
) -> None:
    address, environment = server
    output = tmp_path / "run"
    command = [str(ROOT / "infra" / "submit.sh"), "train", "--pairs", pairs, "--output", output,
               "--engine", "ray", "--cpus-per-worker", "0.5", *TRAIN_FLAGS]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command],
        env={**environment, "RAY_API_SERVER_ADDRESS": address, "MLFLOW_TRACKING_URI": registry},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"status": "done"' in done.stdout
    assert (output / "model" / "config.json").exists()


def test_without_the_token_the_server_refuses(server: tuple[str, dict[str, str]]) -> None:
    assert requests.get(f"{server[0]}/api/jobs/", timeout=10).status_code == 401
