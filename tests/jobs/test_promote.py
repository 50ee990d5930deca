"""The laws of promotion: the alias moves on evidence only, and who uses it sees the move at the next start."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.exceptions import MlflowException

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.rrdb import RRDBConfig
from pipelines import promotion, provenance, registry, tracking
from pipelines.lease import Lease
from pipelines.ledger import Ledger
from pipelines.rules import parse_rules
from tests.core.tiny import bands
from tests.jobs.conftest import Ran, photograph
from tests.jobs.tiny import BICUBIC, NIGHT, SAMPLING, receipts, waves, write_model, write_png

HALF = ModelConfig(encoder=RRDBConfig(scale=2, num_features=4, num_blocks=2), anchor="regression")  # x2
FLAGS = ("--engine", "local", *SAMPLING)
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coins.png")
ROW_NAMES = {"key", "method", "reason", "message"}
UNTIMED = ("--max-latency-ratio", "1000")  # what a call takes here for milliseconds is chance
EVIDENCE = ("verdict.json", "verdict.md", "promotion.html", "rules.yaml", "rows.parquet")


def stub(damage: float = 0.0) -> dict[str, torch.Tensor]:
    """Return weights of a diffusion whose every residual is one 4x4 pattern, of about 13 levels for damage 1.

    Without damage the result is bicubic with its projection, which beats bicubic.
    """
    weights = {name: torch.zeros_like(tensor) for name, tensor in SuperResolver(BICUBIC).state_dict().items()}
    last = [name for name, x in weights.items() if name.startswith("denoiser.") and x.shape == (48,)][-1]
    weights[last] += damage * torch.from_numpy(np.random.default_rng(0).standard_normal(48)).float()
    return weights


def random(config: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return SuperResolver(config).state_dict()


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Ask for the installed packages once, not with each run."""
    found = provenance.environment()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "environment", lambda: found)
        yield


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        write_png(folder / name, photograph(name, 64))
    return folder


@pytest.fixture
def register(tmp_path: Path) -> Callable[..., int]:
    """Register weights as the next version of a name: the folder as it is, without the seconds of a logged model."""

    def make(name: str, weights: dict[str, torch.Tensor], config: ModelConfig = BICUBIC) -> int:
        client = tracking.connect()
        if not client.search_registered_models(f"name='{name}'"):
            client.create_registered_model(name)
        home = tmp_path / "registered" / f"{name}-{len(list((tmp_path / 'registered').glob(f'{name}-*')))}"
        write_model(home / "artifacts" / "model", config, weights)
        return int(client.create_model_version(name, home.as_uri()).version)

    return make


@pytest.fixture
def promote(photographs: Path, tmp_path: Path, call: Callable[..., Ran]) -> Callable[..., Ran]:
    """Promote on this file's photographs into tmp_path/out: name, further flags."""
    flags = ["--dataset", photographs, "--output", tmp_path / "out", *FLAGS]
    return lambda name, *further: call("promote", "--model", name, *flags, *further)


@pytest.fixture
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A real HTTP server: its address, and the documents that came."""
    came: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", came
    server.shutdown()
    server.server_close()


def alias(name: str, which: str = "champion") -> int | None:
    return registry.alias_version(mlflow.MlflowClient(), name, which)


def tags(name: str, version: int) -> dict[str, str]:
    return dict(mlflow.MlflowClient().get_model_version(name, str(version)).tags)


def judged(tmp_path: Path, name: str, version: int) -> Path:
    """The folder of a version's last judgement."""
    found = (tmp_path / "out" / name).glob(f"v{version}-against-*/verdict.json")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def verdict(tmp_path: Path, name: str, version: int) -> dict[str, Any]:
    return dict(json.loads((judged(tmp_path, name, version) / "verdict.json").read_text()))


def promoted(done: Ran) -> float:
    return float(mlflow.MlflowClient().get_run(done.summary["run_id"]).data.metrics["promoted"])


def failed(document: dict[str, Any]) -> list[str]:
    return [check["rule"] for check in document["checks"] if not check["holds"]]


def test_a_first_promotion_a_champion_beaten_a_challenger_refused_and_a_rollback(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path, call: Callable[..., Ran]
) -> None:
    name = "gate"
    fair = register(name, stub(0.15))
    first = promote(name)
    assert (first.code, alias(name), alias(name, "previous_champion")) == (0, fair, None), first.stderr
    assert verdict(tmp_path, name, fair)["opponent"] == "bicubic" and tags(name, fair)["diffsr.promoted_from"] == "None"

    again = promote(name, "--challenger", fair)
    assert (again.code, again.summary["unchanged"]) == (0, 1) and "nothing to do" in again.stderr

    good = register(name, stub())
    moved = promote(name, *UNTIMED)
    assert (moved.code, alias(name), alias(name, "previous_champion")) == (0, good, fair), moved.stderr
    assert tags(name, good)["diffsr.promoted_from"] == str(fair) and tags(name, good)["diffsr.verdict"] == "passed"

    worse = register(name, stub(0.4))
    refused = promote(name, *UNTIMED)
    assert (refused.code, refused.summary["status"], alias(name)) == (4, "refused", good)
    assert "FAILS  psnr_y improves: " in refused.stderr
    found = verdict(tmp_path, name, worse)
    assert (found["verdict"], found["champion"]["version"]) == ("refused", good) and "promoted" not in found
    assert [promoted(each) for each in (first, moved, refused)] == [1, 1, 0]
    assert [each.summary["metrics"]["promoted"] for each in (first, moved, refused)] == [1, 1, 0]
    assert failed(found) == ["psnr_y improves", "ssim no worse"]
    assert tags(name, worse)["diffsr.verdict"] == "refused" and "diffsr.promoted_from" not in tags(name, worse)
    assert tags(name, worse)["diffsr.evidence"] == refused.summary["run_id"]

    lenient = ["--min-gain", "-100", "--ssim-margin", "2", "--lr-psnr-floor", "1", *UNTIMED]
    assert promote(name, *lenient).code == 0 and (alias(name), alias(name, "previous_champion")) == (worse, good)
    back = call("promote", "--model", name, "--rollback", "--rules", tmp_path / "broken.yaml")  # which it needs not
    assert (back.code, alias(name), alias(name, "previous_champion")) == (0, good, None)
    twice = call("promote", "--model", name, "--rollback")
    assert (twice.code, alias(name)) == (1, good) and "previous champion" in twice.stderr
    newest = promote(name, *lenient)
    assert (newest.summary["unchanged"], alias(name)) == (1, good) and f"v{worse} was rolled back" in newest.stderr
    named = promote(name, *lenient, "--challenger", worse)
    assert (named.code, alias(name), alias(name, "previous_champion")) == (0, worse, good)
    assert registry.ROLLED_BACK not in tags(name, worse)


def test_the_evidence_is_published_and_logged_whole_and_says_the_same_everywhere(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path
) -> None:
    name, client = "evidence", tracking.connect()
    champion, challenger = register(name, stub(0.15)), register(name, stub())
    client.set_registered_model_alias(name, "champion", str(champion))
    done = promote(name, *UNTIMED)
    assert done.code == 0, done.stderr
    folder = judged(tmp_path, name, challenger)
    assert {path.name for path in folder.iterdir()} == set(EVIDENCE)
    assert set(done.summary["outputs"]) == {str(folder / file) for file in EVIDENCE}
    document = verdict(tmp_path, name, challenger)
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    assert {(row["key"], row["method"]) for row in rows} == {
        (key, method) for key in PHOTOGRAPHS for method in ("challenger", "champion", "bicubic")
    }
    means = {
        f"{method}_{metric}": np.mean([row[metric] for row in rows if row["method"] == method])
        for method in ("challenger", "champion", "bicubic")
        for metric in ("psnr", "psnr_y", "ssim", "lr_psnr", "device_s_per_mp")
    }
    logged = client.get_run(done.summary["run_id"])
    for key, mean in means.items():
        method, _, metric = key.partition("_")
        assert logged.data.metrics[key] == pytest.approx(mean) == document["summary"][method][metric]["mean"]
    difference = means["challenger_psnr_y"] - means["champion_psnr_y"]
    assert logged.data.metrics["difference_psnr_y"] == pytest.approx(difference) and difference > 0
    assert document["gains"]["psnr_y"]["mean"] == pytest.approx(difference) and logged.data.metrics["promoted"] == 1
    assert {file.path for file in client.list_artifacts(done.summary["run_id"])} >= set(EVIDENCE)
    [used] = logged.inputs.dataset_inputs
    assert document["dataset"]["digest"].startswith(used.dataset.digest) and document["dataset"]["images"] == 3
    assert tags(name, challenger)["diffsr.evidence"] == done.summary["run_id"]
    assert parse_rules((folder / "rules.yaml").read_text()).latency.max_ratio == 1000
    page, table = (folder / "promotion.html").read_text(), (folder / "verdict.md").read_text()
    for check in document["checks"]:
        assert check["rule"] in page and f"| {check['rule']} | yes |" in table
    assert "| challenger, v2 |" in table and "champion, v1" in page


def test_the_same_promotion_leaves_the_same_evidence(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path
) -> None:
    worse = register("same", stub(2.0))
    times = ("seconds", "device_s", "seconds_per_mp", "device_s_per_mp")
    found = []
    for _ in range(2):
        assert promote("same").code == 4
        [folder] = (tmp_path / "out" / "same").glob(f"v{worse}-*")  # and in the same place
        rows = pq.read_table(folder / "rows.parquet").drop_columns(list(times)).to_pylist()
        document = json.loads((folder / "verdict.json").read_text())
        kept = [check for check in document["checks"] if check["rule"] != "latency"]
        found.append((rows, kept, document["gains"], document["dataset"], document["sampling"]))
    assert found[0] == found[1]


def test_each_judgement_keeps_its_evidence(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path
) -> None:
    name = "kept"
    first, second, third = (register(name, stub(damage)) for damage in (0.15, 0.1, 0.0))
    folders = []
    for version, flags, code in (
        (first, (), 0), (second, (), 0), (third, (), 0), (second, (), 4), (second, ("--min-gain", "1"), 4),
        (second, ("--seed", "7"), 4),
    ):  # fmt: skip
        done = promote(name, "--challenger", version, "--ssim-margin", "2", *UNTIMED, *flags)
        assert done.code == code, done.stderr
        folders.append(Path(done.summary["outputs"][0]).parent)
    names = [folder.name.rpartition("-")[0] for folder in folders]
    assert names == ["v1-against-none", "v2-against-v1", "v3-against-v2", *["v2-against-v3"] * 3]
    assert len(set(folders)) == 6 and all(re.fullmatch("[0-9a-f]{8}", path.name.rpartition("-")[2]) for path in folders)
    found = [json.loads((folder / "verdict.json").read_text()) for folder in folders]
    assert [each["verdict"] for each in found] == ["passed"] * 3 + ["refused"] * 3
    assert [each["challenger"]["version"] for each in found] == [1, 2, 3, 2, 2, 2]


def test_a_rules_file_decides_and_a_flag_wins_over_it(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path
) -> None:
    version = register("ruled", stub())
    rules = tmp_path / "rules.yaml"
    rules.write_text("primary: {metric: ssim, min_gain: 0.5}\nguarded: {}\nlatency: {max_absolute: 1.0e+6}\n")
    assert promote("ruled", "--rules", rules).code == 4
    document = verdict(tmp_path, "ruled", version)
    assert failed(document) == ["ssim improves"] and document["rules"]["primary"]["min_gain"] == 0.5
    assert promote("ruled", "--rules", rules, "--min-gain", "-1").code == 0
    document = verdict(tmp_path, "ruled", version)
    assert document["rules"]["primary"] == {
        "metric": "ssim",
        "min_gain": -1,
        "require_significance": True,
        "level": 0.95,
    }
    assert document["rules"]["guarded"] == {} and document["rules"]["latency"]["max_absolute"] == 1e6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("primary: {metric: pnsr}", "must be one of psnr"),
        ("primary: {metric: top1}", "/rules.yaml): primary.metric ('top1') must be one of psnr, "),
        (
            "guarded: {lpips: 0.1}",
            "/rules.yaml): metric ('lpips') is not measured without its weights; give them with "
            "--lpips, or ask for one of psnr, ",
        ),
    ],
)
def test_rules_that_cannot_be_judged_are_refused_before_any_work(
    text: str, words: str, register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path
) -> None:
    register("unruly", stub())
    (tmp_path / "rules.yaml").write_text(text)
    done = promote("unruly", "--rules", tmp_path / "rules.yaml")
    assert (done.code, alias("unruly")) == (1, None) and words in done.stderr and not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_rules_and_does_nothing(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path
) -> None:
    register("dry", stub())
    done = promote("dry", "--dry-run", "--lr-psnr-floor", "46")
    assert (done.code, done.summary["status"], alias("dry")) == (0, "planned", None)
    shown = done.stderr[done.stderr.index("# What a challenger") :]
    assert parse_rules(shown).floors["lr_psnr"].per_image_min == 46 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["scale", "channels"])
def test_a_challenger_of_another_signature_is_refused_without_any_work(
    other: str,
    register: Callable[..., int],
    promote: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"signature-{other}"
    champion = register(name, stub())
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", str(champion))
    config = bands(1) if other == "channels" else HALF
    version = register(name, random(config), config)
    monkeypatch.setattr(promotion, "score_dataset", lambda *a, **k: pytest.fail("scored"))
    refused = promote(name)
    assert (refused.code, alias(name)) == (4, champion), refused.stderr
    document = verdict(tmp_path, name, version)
    assert "same signature" in failed(document) and document["summary"]["challenger"] == {}
    assert "| same signature | **NO** |" in (judged(tmp_path, name, version) / "verdict.md").read_text()


def test_a_model_whose_network_gives_nan_is_refused_with_the_images_named(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path
) -> None:
    broken = {name: torch.full_like(x, torch.nan) if "denoiser" in name else x for name, x in stub().items()}
    version = register("broken", broken)
    refused = promote("broken")
    assert (refused.code, alias("broken")) == (4, None), refused.stderr
    assert {"same images", "finite"} <= set(failed(verdict(tmp_path, "broken", version)))
    assert "challenger lost 'astronaut.png' (nan: " in refused.stderr
    assert "the result of challenger in 'astronaut.png'" in refused.stderr


def test_a_champion_that_gives_nan_on_one_image_blocks_no_successor(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, score = "sick", promotion.score_dataset
    champion, good, bad = (register(name, stub(damage)) for damage in (0.15, 0.0, 0.4))
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", str(champion))

    def sick(*words: Any, **named: Any) -> Any:
        found = score(*words, **named)
        for row in found.rows:
            if (row["key"], row["method"]) == ("coins.png", "champion"):
                row |= {"reason": "nan", "message": "not finite at step 3"} | dict.fromkeys(row.keys() - ROW_NAMES)
        return found

    monkeypatch.setattr(promotion, "score_dataset", sick)
    assert promote(name, "--challenger", bad, *UNTIMED).code == 4
    done = promote(name, "--challenger", good, *UNTIMED)
    assert (done.code, alias(name)) == (0, good), done.stderr
    assert "champion lost, and they are not compared: 'coins.png' (nan: 'not finite at step 3')" in done.stderr


def test_an_image_that_cannot_be_read_refuses_unless_the_rules_allow_it(
    register: Callable[..., int], photographs: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    version = register("rotten", stub())
    folder = tmp_path / "some"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "cut.png").write_bytes((folder / "chelsea.png").read_bytes()[:2000])
    flags = ["--model", "rotten", "--dataset", folder, "--output", tmp_path / "out", *FLAGS]
    assert call("promote", *flags).code == 4
    document = verdict(tmp_path, "rotten", version)
    assert failed(document) == ["all scored"]
    [text] = [check["text"] for check in document["checks"] if check["rule"] == "all scored"]
    assert text.startswith("1 of 4 images without a score, at most 0: 'cut.png' (")
    (tmp_path / "rules.yaml").write_text("max_dead: 1")
    assert call("promote", *flags, "--rules", tmp_path / "rules.yaml").code == 0 and alias("rotten") == version


def test_a_champion_that_moves_while_it_is_compared_is_not_overwritten(
    register: Callable[..., int],
    promote: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    hook: tuple[str, list],
) -> None:
    name, client = "moving", tracking.connect()
    first, second, challenger = (register(name, stub(damage)) for damage in (0.15, 0.1, 0.0))
    client.set_registered_model_alias(name, "champion", str(first))
    score = promotion.score_dataset

    def meanwhile(*words: Any, **named: Any) -> Any:
        client.set_registered_model_alias(name, "champion", str(second))
        return score(*words, **named)

    monkeypatch.setattr(promotion, "score_dataset", meanwhile)
    late = promote(name, *UNTIMED, "--webhook", hook[0])
    assert (late.code, alias(name), alias(name, "previous_champion")) == (1, second, None)
    assert f"champion (v{second}) must still be the one that was compared (v{first})" in late.stderr
    assert "diffsr.promoted_from" not in tags(name, challenger)
    # Nothing says that it was promoted: that the rules held is another fact.
    assert tags(name, challenger)["diffsr.verdict"] == "passed, not promoted: the champion changed"
    run = client.get_run(tags(name, challenger)["diffsr.evidence"])
    assert (run.data.metrics["promoted"], run.info.status) == (0, "FAILED")
    document, folder = verdict(tmp_path, name, challenger), judged(tmp_path, name, challenger)
    assert document["verdict"] == "passed" and "promoted" not in document
    assert "the run and the version's tag diffsr.verdict say whether it did" in (folder / "promotion.html").read_text()
    [told] = hook[1]
    assert (told["event"], told["now"], told["promoted"], told["run_id"]) == (
        "overtaken",
        second,
        False,
        run.info.run_id,
    )

    monkeypatch.setattr(promotion, "score_dataset", score)
    again = promote(name, *UNTIMED)
    assert (again.code, alias(name), promoted(again)) == (0, challenger, 1)
    assert tags(name, challenger)["diffsr.verdict"] == "passed"


def test_a_refusal_names_the_champion_of_that_moment(
    register: Callable[..., int], promote: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, hook: tuple[str, list]
) -> None:
    name, client, score = "refusing", tracking.connect(), promotion.score_dataset
    first, second, _ = (register(name, stub(damage)) for damage in (0.15, 0.1, 0.4))
    client.set_registered_model_alias(name, "champion", str(first))

    def meanwhile(*words: Any, **named: Any) -> Any:
        client.set_registered_model_alias(name, "champion", str(second))
        return score(*words, **named)

    monkeypatch.setattr(promotion, "score_dataset", meanwhile)
    late = promote(name, *UNTIMED, "--webhook", hook[0])
    assert late.code == 4 and f"refused; the champion stays v{second}" in late.stderr
    assert [(each["event"], each["now"], each["promoted"]) for each in hook[1]] == [("refused", second, False)]


def test_the_evidence_is_whole_before_the_alias_moves_and_claims_no_promotion_yet(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "cut-short"
    version = register(name, stub())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", lambda *words: killed())
        promote(name)
    assert alias(name) is None and verdict(tmp_path, name, version)["verdict"] == "passed"
    client, told = mlflow.MlflowClient(), tags(name, version)
    assert {path.name for path in judged(tmp_path, name, version).iterdir()} == set(EVIDENCE)
    assert {file.path for file in client.list_artifacts(told["diffsr.evidence"])} >= set(EVIDENCE)
    assert "promoted" not in client.get_run(told["diffsr.evidence"]).data.metrics
    again = promote(name)
    assert (again.code, alias(name), promoted(again)) == (0, version, 1)


def test_a_champion_that_moves_between_the_two_last_reads_is_not_overwritten(
    versions: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, (first, second, third) = versions("racing", 3)
    registry.move_champion(client, "racing", first, expected=None, evidence="one")
    tag = client.set_model_version_tag

    def rival(name: str, version: str, key: str, value: str) -> None:
        tag(name, version, key, value)
        client.set_registered_model_alias(name, "champion", str(second))

    monkeypatch.setattr(client, "set_model_version_tag", rival)
    for before in (None, "7"):  # the tag of an earlier promotion, which stays
        if before is not None:
            tag("racing", str(third), registry.PROMOTED_FROM, before)
        client.set_registered_model_alias("racing", "champion", str(first))
        with pytest.raises(registry.Overtaken, match="must still be the one"):
            registry.move_champion(client, "racing", third, expected=first, evidence="three")
        assert (alias("racing"), alias("racing", "previous_champion")) == (second, None)
        assert tags("racing", third).get(registry.PROMOTED_FROM) == before


def test_two_promotions_of_a_model_in_one_output_keep_each_other_out_and_a_rollback_waits_for_none(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path, call: Callable[..., Ran]
) -> None:
    good, worse = register("busy", stub()), register("busy", stub(0.4))
    client = tracking.connect()
    registry.move_champion(client, "busy", good, expected=None, evidence="one")
    registry.move_champion(client, "busy", worse, expected=good, evidence="two")
    other = register("idle", stub())
    with Lease(str(tmp_path / "out" / "busy"), run_id="another"):
        held = promote("busy", "--challenger", good)
        assert held.code == 5 and "another" in held.stderr
        assert promote("idle").code == 0 and alias("idle") == other
        assert call("promote", "--model", "busy", "--rollback").code == 0 and alias("busy") == good


def test_the_webhook_hears_of_each_outcome_after_it(
    register: Callable[..., int],
    promote: Callable[..., Ran],
    call: Callable[..., Ran],
    hook: tuple[str, list],
    tmp_path: Path,
) -> None:
    url, came = hook
    good, better, worse = (register("told", stub(damage)) for damage in (0.15, 0.0, 0.4))
    for version in (good, better, worse):
        done = promote("told", "--challenger", version, *UNTIMED, "--webhook", f"{url}/s3cr3t")
        assert came[-1]["run_id"] == done.summary["run_id"] and came[-1]["challenger"]["version"] == version
        assert {**came[-1], **verdict(tmp_path, "told", version)} == came[-1]
        assert came[-1]["promoted"] is (version != worse)
        assert "s3cr3t" not in json.dumps(mlflow.MlflowClient().get_run(done.summary["run_id"]).data.params)
    call("promote", "--model", "told", "--rollback", "--webhook", url)
    assert [(each["event"], each["now"]) for each in came] == [
        ("promoted", good), ("promoted", better), ("refused", better), ("rolled_back", good),
    ]  # fmt: skip


def test_a_webhook_that_fails_fails_no_promotion(
    register: Callable[..., int], promote: Callable[..., Ran], hook: tuple[str, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.webhook.PAUSE_S", 0.01)
    version = register("deaf", stub())
    done = promote("deaf", "--webhook", f"{hook[0]}/broken")
    assert (done.code, alias("deaf"), len(hook[1])) == (0, version, 3) and "took no verdict (HTTP 500" in done.stderr


def test_the_nightly_upscale_picks_the_new_champion_up_at_its_next_start(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path, call: Callable[..., Ran]
) -> None:
    name, source, output = "nightly-gate", tmp_path / "in", tmp_path / "upscaled"
    for index in range(2):
        write_png(source / f"{index}.png", waves(16, 16, phase=index))
    night = ("upscale", "--source", source, "--output", output, "--model", f"models:/{name}@champion", *NIGHT)
    assert call(*night).code == 1  # nobody is champion yet
    old = register(name, stub(0.15))
    assert promote(name).code == 0
    first = call(*night)
    assert (first.code, first.summary["done"]) == (0, 2) and f"{name} v{old}" in first.stderr, first.stderr
    before, images = receipts(output), {path.name: path.read_bytes() for path in output.glob("*.png")}

    new, worse = register(name, stub()), register(name, stub(0.4))
    assert promote(name, "--challenger", worse, *UNTIMED).code == 4
    idle = call(*night)
    assert (idle.code, idle.summary["inputs"], idle.summary["unchanged"]) == (0, 0, 2)  # refused: nothing changes
    assert promote(name, "--challenger", new, *UNTIMED).code == 0
    second = call(*night)
    assert (second.code, second.summary["done"]) == (0, 2) and f"{name} v{new}" in second.stderr
    models = {row["model"] for row in Ledger(str(output)).rows().to_pylist()}
    assert len(models) == 2 and {row["model"] for row in before.values()} < models
    assert all((output / key).read_bytes() != data for key, data in images.items())

    assert call("promote", "--model", name, "--rollback").code == 0
    third = call(*night)
    assert (third.code, third.summary["done"]) == (0, 2) and f"{name} v{old}" in third.stderr
    assert {path.name: path.read_bytes() for path in output.glob("*.png")} == images  # the old champion's, to the byte


class Killed(Exception):
    pass


def killed() -> None:
    raise Killed


@pytest.fixture
def versions() -> Callable[[str, int], tuple[mlflow.MlflowClient, list[int]]]:
    """Make a registered model with empty versions."""

    def make(name: str, number: int) -> tuple[mlflow.MlflowClient, list[int]]:
        client = tracking.connect()
        client.create_registered_model(name)
        return client, [int(client.create_model_version(name, "file:///nothing").version) for _ in range(number)]

    return make


WRITES = ("set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias")


def killed_after(client: mlflow.MlflowClient, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this many writes to the registry through, and no more."""
    left = [number]

    def limited(write: Callable[..., object]) -> Callable[..., object]:
        def call(*words: object) -> object:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return write(*words)

        return call

    for name in WRITES:
        monkeypatch.setattr(client, name, limited(getattr(client, name)))


@pytest.mark.parametrize("writes", range(4))
def test_a_promotion_killed_between_its_writes_goes_through_when_repeated(
    writes: int, versions: Callable, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ran]
) -> None:
    name = f"killed-promotion-{writes}"
    client, (first, second, third) = versions(name, 3)
    registry.move_champion(client, name, first, expected=None, evidence="one")
    registry.move_champion(client, name, second, expected=first, evidence="two")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(client, writes, patch)
        registry.move_champion(client, name, third, expected=second, evidence="three")
    assert alias(name) == second  # the alias moves last, with its evidence
    if alias(name, "previous_champion") == second:
        refused = call("promote", "--model", name, "--rollback")
        assert (refused.code, alias(name)) == (1, second) and "cut short" in refused.stderr
    registry.move_champion(client, name, third, expected=second, evidence="three")
    assert (alias(name), alias(name, "previous_champion")) == (third, second)


@pytest.mark.parametrize("writes", range(3))
def test_a_rollback_killed_between_its_writes_never_brings_the_bad_version_back(
    writes: int, versions: Callable, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ran]
) -> None:
    name = f"killed-rollback-{writes}"
    client, (good, bad) = versions(name, 2)
    registry.move_champion(client, name, good, expected=None, evidence="one")
    registry.move_champion(client, name, bad, expected=good, evidence="two")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(client, writes, patch)
        registry.restore_champion(client, name, good, expected=bad)
    for _ in range(2):
        call("promote", "--model", name, "--rollback")
    assert alias(name) == good and registry.newest_version(client, name) == good
    assert client.get_model_version(name, str(good)).tags["diffsr.evidence"] == "one"


def test_when_every_version_was_rolled_back_one_must_be_named(versions: Callable) -> None:
    client, (only,) = versions("rolled", 1)
    client.set_model_version_tag("rolled", str(only), registry.ROLLED_BACK, "to v0")
    with pytest.raises(ValueError, match="--challenger"):
        registry.newest_version(client, "rolled")


def test_a_registry_that_fails_is_not_read_as_no_champion(monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracking.connect()
    assert registry.alias_version(client, "no such model", "champion") is None

    def fails(name: str) -> None:
        raise MlflowException("the server is away")

    monkeypatch.setattr(client, "get_registered_model", fails)
    with pytest.raises(MlflowException, match="is away"):
        registry.alias_version(client, "gate", "champion")


def test_a_job_of_a_cluster_needs_a_store_that_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    tracking.connect()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI \(not set\).*RAY_ADDRESS"):
        tracking.connect()


def test_the_bars_of_mlflow_are_off_unless_a_person_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    for wish, expected in (("", "false"), ("true", "true")):
        monkeypatch.setenv(name, wish)
        if not wish:
            monkeypatch.delenv(name)
        tracking.connect()
        assert os.environ[name] == expected


def test_a_rules_file_that_is_not_there_is_a_mistake_with_a_remedy(
    register: Callable[..., int], promote: Callable[..., Ran], tmp_path: Path
) -> None:
    register("ruleless", stub())
    for path in (tmp_path / "nofile.yaml", tmp_path):
        done = promote("ruleless", "--rules", path)
        assert done.code == 1 and f"rules ({path}) must be a YAML file that can be read: " in done.stderr
        assert "; correct the path" in done.stderr and "Errno" not in done.stderr


def test_a_model_that_loses_to_bicubic_is_no_first_champion(
    register: Callable[..., int], promote: Callable[..., Ran]
) -> None:
    register("hopeless", stub(2.0))
    refused = promote("hopeless")
    assert (refused.code, alias("hopeless")) == (4, None) and "FAILS  psnr_y improves" in refused.stderr


def test_nothing_to_roll_back_to_and_no_such_model_are_said(
    promote: Callable[..., Ran], call: Callable[..., Ran]
) -> None:
    assert "previous champion" in call("promote", "--model", "nobody", "--rollback").stderr
    missing = promote("nobody")
    assert missing.code == 1 and "registered version" in missing.stderr


@pytest.mark.parametrize(
    "flags", [("--webhook", "file:///etc/passwd"), ("--primary", "pnsr"), ("--ssim-margin", "-1"), ("--model", "a/b"),
              ("--model", "g'x"), ("--model", "a:b"), ("--model", " "), ("--model", "a\nb"), ("--primary", "top1"),
              ("--max-latency-ratio", "0"), ("--challenger", "0")],
)  # fmt: skip
def test_a_flag_that_makes_no_sense_is_refused_at_the_door(flags: tuple[str, str], promote: Callable[..., Ran]) -> None:
    with pytest.raises(SystemExit) as found:
        promote("anybody", *flags)
    assert found.value.code == 2
