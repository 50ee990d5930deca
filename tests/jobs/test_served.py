"""Laws of the serving face: `mlflow models serve` answers image bytes with image bytes, over HTTP, as does load_model.

One real server process serves `models:/diffsr@champion`, from another folder, with nothing of this checkout on its
path but what the environment itself has installed: the stored copy of the code is marked, and the marks are looked for.
"""

import ast
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffsr_core.checkpoint import SAMPLING, model_from_files, schedule_json
from diffsr_core.upscaler import Upscaler
from pipelines import cli, tracking
from pipelines.mlflow_store import connect
from pipelines.models import load_files, resolve
from pipelines.pictures import PictureRequest, upscale_picture, usual_params, usual_request
from pipelines.stills import StillSettings
from tests.core.tiny import ANCHORED, MODELS
from tests.jobs.conftest import ROOT, Ran, png
from tests.jobs.tiny import model_folder, waves, write_png

MARK = "of the stored code"
LR = png(waves(12, 20))
SCHEDULE = {"sampler": "ddpm", "grid": "linear", "num_steps": 3, "start_level": 0.25}
# As they stand in the README.
PYTHON = """\
import mlflow, pathlib

model = mlflow.pyfunc.load_model("models:/diffsr@champion")
(result,) = model.predict([pathlib.Path("photo.png").read_bytes()])
pathlib.Path("large.png").write_bytes(result)
"""
CURL = """\
echo "{\\"inputs\\": [\\"$(base64 -w0 photo.png)\\"]}" |
  curl -sS --fail-with-body -H 'Content-Type: application/json' -d @- http://127.0.0.1:5000/invocations |
  python -c 'import base64, json, sys
sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["predictions"][0]))' > large.png
"""


@dataclass(frozen=True)
class Answer:
    """What the server said, and after how many bytes."""

    status: int
    body: bytes

    @property
    def message(self) -> str:
        return str(json.loads(self.body)["message"])

    @property
    def images(self) -> list[bytes]:
        """Return the images of an answer; one that is an error fails the test."""
        assert self.status == 200, self.body[:2000]
        return [base64.b64decode(text) for text in json.loads(self.body)["predictions"]]


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    port: int
    log: Path

    def post(self, body: bytes, content_type: str = "application/json") -> Answer:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations", data=body, headers={"Content-Type": content_type}
        )
        try:
            with urllib.request.urlopen(request, timeout=200) as found:
                return Answer(found.status, found.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read())

    def ask(self, *images: bytes, **params: object) -> Answer:
        texts = [base64.b64encode(data).decode() for data in images]
        return self.post(json.dumps({"inputs": texts} | ({"params": params} if params else {})).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a schedule of its own."""
    found = model_folder(tmp_path_factory.mktemp("model"), ANCHORED)
    evidence = {"model": resolve(str(found)).digest, "data": "d", "measure": "psnr", "value": 1.0}
    document = {**SCHEDULE, "evidence": {**evidence, "interval": [0.0, 2.0], "device_s_per_mp": 1.0}}
    (found / SAMPLING).write_bytes(schedule_json(document))
    return found


@pytest.fixture(scope="module")
def champion(folder: Path, registry: str) -> str:
    """The model, logged and registered as the jobs do; the code that lies with it is marked. Its REF."""
    client = connect()
    with tracking.run("serve"):
        uri = tracking.log_model(load_files(str(folder)), example=LR)
    version = tracking.register_model(uri, "diffsr")
    client.set_registered_model_alias("diffsr", "champion", str(version))
    stored = Path(urlsplit(client.get_model_version_download_uri("diffsr", str(version))).path)
    if not stored.is_dir():
        stored = Path(urlsplit(str(mlflow.get_logged_model(uri.removeprefix("models:/")).artifact_location)).path)
    with open(stored / "code" / "pipelines" / "provenance.py", "a") as file:
        file.write(f'\n\ndef version() -> str:\n    return "{MARK}"\n')
    return "models:/diffsr@champion"


@pytest.fixture(scope="module")
def serving(champion: str, registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`mlflow models serve`, in a folder of its own and with an environment that names nothing of ours."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bin = Path(sys.executable).parent
    words = [str(bin / "mlflow"), "models", "serve", "-m", champion, "--env-manager", "local", "-p", str(port)]
    environment = {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "MLFLOW_TRACKING_URI": registry}
    server = Server(port, elsewhere / "server.log")
    with open(server.log, "wb") as log:
        process = subprocess.Popen(
            words, cwd=elsewhere, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 150  # 7 s on an idle machine
        while time.monotonic() < deadline:
            assert process.poll() is None, server.log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(server.log.read_text())
        yield server
        assert process.poll() is None, server.log.read_text()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def server(serving: Server) -> Iterator[Server]:
    """The server; what it logged since the test began is shown if the test fails."""
    start = serving.log.stat().st_size
    yield serving
    print(serving.log.read_bytes()[start:].decode(errors="replace")[-4000:])


@pytest.fixture
def oracle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """What the same means give in this process, by plain calls; request: the settings."""
    monkeypatch.setattr("pipelines.stills.version", lambda: MARK)
    found = resolve(str(folder))
    model, _ = model_from_files(found.files)
    usual = asdict(usual_request(found.sampling, model.config))

    def ask(data: bytes, **request: Any) -> bytes:
        asked = PictureRequest(**{**usual, **request})
        upscaler = Upscaler(model, asked.recipe(model.config), regression=False)
        settings = StillSettings(format=asked.format, quality=asked.quality)
        return upscale_picture(upscaler, data, settings=settings, model=found.digest).data

    return ask


def test_image_bytes_are_answered_with_image_bytes(server: Server, oracle: Callable[..., bytes]) -> None:
    (made,) = server.ask(LR).images
    assert Image.open(io.BytesIO(made)).size == (80, 48) and made == oracle(LR)
    photo = io.BytesIO()
    Image.fromarray(waves(9, 9, phase=2)).save(photo, "JPEG")
    first, second = server.ask(photo.getvalue(), LR).images
    assert first == oracle(photo.getvalue()) and second == made
    assert Image.open(io.BytesIO(first)).format == "JPEG"
    assert server.ask().images == []


def test_the_server_runs_the_code_that_lies_with_the_model_and_not_the_checkout_s(server: Server) -> None:
    (made,) = server.ask(LR).images
    assert f"DiffSR {MARK}".encode() in made


def test_the_schedule_that_is_stored_with_the_model_is_the_server_s(
    server: Server, folder: Path, oracle: Callable[..., bytes]
) -> None:
    params = usual_params(load_files(str(folder)))
    own = {"sampler": "ddpm", "grid": "linear", "steps": 3, "start_level": 0.25}
    assert own.items() <= params.items()
    assert server.ask(LR).images == server.ask(LR, **own).images == [oracle(LR, **own)]
    assert server.ask(LR).images != server.ask(LR, steps=2).images


@pytest.mark.parametrize(
    "params",
    [
        {"steps": 1},
        {"seed": 7},
        {"sampler": "ddim", "grid": "uniform", "start_level": 0.0},
        {"format": "jpeg", "quality": 40},
        {"format": "tiff", "consistency": "off"},
    ],
)
def test_a_request_chooses_how_it_is_drawn_and_written(
    params: dict[str, Any], server: Server, oracle: Callable[..., bytes]
) -> None:
    (made,) = server.ask(LR, **params).images
    assert made == oracle(LR, **params) and made != oracle(LR)
    if "format" in params:
        assert Image.open(io.BytesIO(made)).format == params["format"].upper()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"steps": 0}, "steps (0) must be at least 1"),
        ({"steps": 1001}, "steps (1001) must be at most 1000"),
        ({"sampler": "best"}, "sampler ('best') must be one of ddim"),
        ({"grid": "fine"}, "grid ('fine')"),
        ({"start_level": 1.5}, "start_level (1.5)"),
        ({"seed": -1}, "seed (-1)"),
        ({"consistency": "perhaps"}, "consistency ('perhaps')"),
        ({"format": "gif"}, "format ('gif')"),
        ({"quality": 0}, "quality (0) must be from 1 to 100"),
        ({"steps": "many"}, "'steps'"),
    ],
)
def test_a_wrong_setting_is_named_in_the_answer(params: dict[str, Any], words: str, server: Server) -> None:
    answer = server.ask(LR, **params)
    assert answer.status == 400 and words in answer.message


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>not here</html>", "sniff: not_an_image"),
        (b"", "sniff: empty_file"),
        (LR[:200], "truncated"),
        (png(np.zeros((2, 2_200_000), np.uint8)), "too_large"),  # above what a server takes
    ],
)
def test_what_is_not_an_image_is_answered_with_the_reason_and_the_server_lives(
    data: bytes, reason: str, server: Server
) -> None:
    answer = server.ask(data)
    assert answer.status == 400 and answer.message.startswith("image 1 of 1: ") and reason in answer.message
    assert len(answer.body) < 1000  # MLflow's own would hold the request
    assert server.ask(LR).status == 200


def test_one_rotten_image_of_three_is_named_and_none_is_answered(server: Server) -> None:
    answer = server.ask(LR, b"rotten", LR)
    assert answer.status == 400 and answer.message.startswith("image 2 of 3: sniff: not_an_image")
    assert "predictions" not in json.loads(answer.body)


def test_requests_at_the_same_time_get_what_each_would_get_alone(server: Server, oracle: Callable[..., bytes]) -> None:
    images = [png(waves(12, 20, phase=index)) for index in range(6)]
    wanted = [oracle(data, seed=index % 3) for index, data in enumerate(images)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda index: server.ask(images[index], seed=index % 3), range(6)))
    assert [answer.images for answer in answers] == [[data] for data in wanted]


def test_parquet_takes_the_bytes_as_they_are_and_other_bodies_are_refused(server: Server) -> None:
    sink = io.BytesIO()
    pd.DataFrame({"image": [LR, LR]}).to_parquet(sink)
    assert server.post(sink.getvalue(), "application/vnd.apache.parquet").images == server.ask(LR, LR).images
    assert server.post(LR, "image/png").status == 415  # what MLflow's server does not take, whatever the model is
    assert server.post(b"{", "application/json").status == 400
    assert server.post(json.dumps({"inputs": "text"}).encode()).status == 400


def test_the_curl_line_of_the_readme_works_as_it_stands(server: Server, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed here")
    (tmp_path / "photo.png").write_bytes(LR)
    words = CURL.replace(":5000/", f":{server.port}/")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [(tmp_path / "large.png").read_bytes()] == server.ask(LR).images


def test_the_five_lines_of_the_readme_give_what_the_server_gives(
    server: Server, champion: str, registry: str, tmp_path: Path
) -> None:
    assert len([line for line in PYTHON.splitlines() if line]) <= 5 and champion in PYTHON
    (tmp_path / "photo.png").write_bytes(LR)
    environment = {"PATH": os.environ["PATH"], "MLFLOW_TRACKING_URI": registry}
    more = "import pipelines.pictures\nprint(pipelines.pictures.__file__)\n"
    done = subprocess.run(
        [sys.executable, "-c", PYTHON + more],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "/code/pipelines/pictures.py" in done.stdout  # the copy's, not the checkout's
    assert [(tmp_path / "large.png").read_bytes()] == server.ask(LR).images


def test_the_tool_for_one_image_takes_the_model_that_ships_unless_it_is_told_otherwise(
    champion: str, folder: Path, tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = cli.Job("pipelines.one_image", "ImageConfig", "upscale_image", "image", "image in.jpg out.png")
    monkeypatch.setitem(cli.JOBS, "image", cli.JOBS.get("image", entry))
    words = ["--input", write_png(tmp_path / "in.png", waves(12, 20)), "--tile", "16", "--halo", "4"]
    by_alias = call("image", *words, "--output", tmp_path / "a.png", "--model", "models:/diffsr@champion")
    by_folder = call("image", *words, "--output", tmp_path / "b.png", "--model", folder)
    shipped = call("image", *words, "--output", tmp_path / "c.png")
    assert (by_alias.code, by_folder.code, shipped.code) == (0, 0, 0)
    assert "diffsr v" in by_alias.stderr and "pretrained:diffsr-x4" in shipped.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_the_signature_says_what_goes_in_and_out_and_every_setting_with_its_default(
    champion: str, folder: Path
) -> None:
    signature = mlflow.models.get_model_info(champion).signature
    assert [item.type.name for item in (*signature.inputs, *signature.outputs)] == ["binary", "binary"]
    assert {item.name: item.default for item in signature.params} == usual_params(load_files(str(folder)))


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_can_be_served(name: str) -> None:
    request = usual_request(None, MODELS[name])
    recipe = request.recipe(MODELS[name])
    recipe.check_fits(MODELS[name])
    assert recipe.micro_batch == 1 and recipe.tile >= 32


def test_the_requirements_that_are_logged_hold_all_that_the_served_code_imports(champion: str) -> None:
    ours = "name.partition('.')[0] in ('pipelines', 'diffsr_core')"
    code = f"import sys, pipelines.served; print(*[m.__file__ for name, m in sys.modules.items() if {ours}])"
    files = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200).stdout
    assert len(files.split()) > 30
    imported = set[str]()
    for file in files.split():
        for node in ast.parse(Path(file).read_text()).body:  # what is inside a function is asked for when it is needed
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    owners = packages_distributions()
    direct = {_name(owners[name][0]) for name in imported if name in owners} - {"diffsr"}
    path = mlflow.artifacts.download_artifacts(f"{champion}/requirements.txt")
    reached, left = set[str](), {_name(line) for line in Path(path).read_text().splitlines()}
    while left:
        reached.add(name := left.pop())
        with suppress(PackageNotFoundError):  # for another platform
            left |= {_name(line) for line in requires(name) or [] if "extra ==" not in line} - reached
    assert {"torch", "numpy", "pillow", "safetensors"} <= direct
    assert direct - reached == set()


def _name(requirement: str) -> str:
    """Return the normal form of the name in a requirement."""
    end = next((at for at, char in enumerate(requirement) if not (char.isalnum() or char in "-_.")), len(requirement))
    return requirement[:end].lower().replace("_", "-").replace(".", "-")
