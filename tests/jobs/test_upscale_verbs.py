"""The verbs of the upscale job beside run: plan, status, verify, retry-failed and gc."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipelines import storage, upscaling
from pipelines.ledger import Ledger
from pipelines.upscaling import VERBS
from tests.core.tiny import ANCHORED
from tests.jobs.conftest import Ran, photograph, png, tree
from tests.jobs.tiny import NIGHT, model_folder, outcomes, waves, write_png, write_waves


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), ANCHORED)


@pytest.fixture(scope="module")
def outbox(inbox: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipelines.cli import run_job

    output = tmp_path_factory.mktemp("outbox") / "out"
    words = ["--source", inbox, "--output", output, "--model", model, *NIGHT, "--device-hour-price", 3.6]
    assert run_job("upscale", list(map(str, words))) == 0
    return output


@pytest.fixture
def night(model: Path, call: Callable[..., Ran]) -> Callable[..., Ran]:
    """Run a verb ("" for none) of this file's model: verb, source, output, further flags."""
    flags = ["--model", model, *NIGHT]

    def ran(verb: str, source: Path, output: Path, *further: object) -> Ran:
        return call("upscale", *filter(None, [verb]), "--source", source, "--output", output, *flags, *further)

    return ran


@pytest.fixture
def copied(inbox: Path, outbox: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A source and its output that a test may change."""
    shutil.copytree(inbox, tmp_path / "in")
    shutil.copytree(outbox, tmp_path / "out")
    return tmp_path / "in", tmp_path / "out"


def test_a_plan_counts_why_each_asset_is_work_and_writes_nothing(
    copied: tuple[Path, Path], night: Callable[..., Ran]
) -> None:
    source, output = copied
    write_png(source / "new.png", waves(10, 20))
    (source / "grey.png").write_bytes(png(photograph("coins.png", 20)))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    planned = night("plan", source, output, "--device-hour-price", 7200)
    metrics = planned.summary["metrics"]
    assert (planned.code, planned.summary["status"]) == (0, "planned")
    assert (planned.summary["inputs"], planned.summary["unchanged"]) == (2, 5)
    counts = {name: metrics[f"{name}_assets"] for name in ("new", "changed", "failed", "unchanged")}
    assert counts == {"new": 1, "changed": 1, "failed": 1, "unchanged": 4}
    assert metrics["source_bytes"] == sum((source / name).stat().st_size for name in ("new.png", "grey.png"))
    assert metrics["megapixels"] == pytest.approx((10 * 20 + 20 * 20) * 16 / 1e6)
    assert metrics["device_hours"] == pytest.approx(metrics["megapixels"] * metrics["seconds_per_megapixel"] / 3600)
    assert metrics["cost"] == pytest.approx(7200 * metrics["device_hours"]) and metrics["cost"] > 0
    assert "as the newest 5 results of this recipe and model took" in planned.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_the_first_plan_measures_the_network_and_makes_no_output(
    inbox: Path, tmp_path: Path, night: Callable[..., Ran]
) -> None:
    planned = night("plan", inbox, tmp_path / "out", "--limit", 3)
    assert (planned.summary["inputs"], planned.summary["metrics"]["new_assets"]) == (3, 6)
    assert planned.summary["metrics"]["seconds_per_megapixel"] > 0 and "as measured now" in planned.stderr
    dry = night("", inbox, tmp_path / "out", "--dry-run")
    assert (dry.summary["status"], dry.summary["inputs"]) == ("planned", 6)
    assert not (tmp_path / "out").exists()


def test_include_exclude_and_limit_choose_what_is_done(inbox: Path, tmp_path: Path, night: Callable[..., Ran]) -> None:
    chosen = night("", inbox, tmp_path / "out", "--include", "*e*.png", "--exclude", "rotten.png,deep/*", "--limit", 1)
    assert chosen.summary["inputs"] == 1
    rest = night("", inbox, tmp_path / "out", "--include", "*e*.png", "--exclude", "rotten.png,deep/*")
    assert rest.summary["inputs"] == 2
    assert set(outcomes(tmp_path / "out")) == {"grey.png", "odd size.png", "line\nbreak 'ü.png"}


def test_status_counts_without_a_source(outbox: Path, call: Callable[..., Ran]) -> None:
    found = call("upscale", "status", "--output", outbox)
    assert (found.code, found.summary["done"], found.summary["skipped"], found.summary["dead"]) == (0, 5, 0, 1)
    metrics = found.summary["metrics"]
    assert (metrics["done_pass"], metrics["dead_truncated"], metrics["units_left"]) == (5, 1, 0)
    assert "'rotten.png'" in found.stderr and "no run is at work" in found.stderr


def test_verify_finds_a_lost_and_an_altered_output_and_run_redoes_them(
    copied: tuple[Path, Path], night: Callable[..., Ran], call: Callable[..., Ran]
) -> None:
    source, output = copied
    before = tree(output)
    (output / "grey.png").unlink()
    (output / "alpha.png").write_bytes(b"altered")
    (output / "odd size.png.json").unlink()
    (output / "line\nbreak 'ü.png.json").write_bytes((output / "grey.png.json").read_bytes())
    damaged, receipts = tree(output), Ledger(str(output)).rows().num_rows
    found = call("upscale", "verify", "--output", output, "--dry-run")
    assert (found.code, found.summary["inputs"], found.summary["dead"]) == (1, 5, 4)
    assert "nothing was recorded" in found.stderr and repr("line\nbreak 'ü.png") in found.stderr
    assert (tree(output), Ledger(str(output)).rows().num_rows) == (damaged, receipts)
    quick = call("upscale", "verify", "--output", output, "--dry-run", "--quick")
    assert (quick.code, quick.summary["dead"]) == (1, 3)  # sizes and names tell all but the sidecar's content
    found = call("upscale", "verify", "--output", output)
    assert (found.code, found.summary["inputs"], found.summary["dead"]) == (1, 5, 4)
    # A sidecar that names another source is taken at its word, so the person who put it there has to remove it.
    (output / "line\nbreak 'ü.png.json").unlink()
    redone = night("", source, output)
    assert redone.summary["done"] == 4
    assert tree(output) == before
    assert call("upscale", "verify", "--output", output).code == 0


def test_a_ledger_that_was_lost_is_made_again_from_the_sidecars(
    copied: tuple[Path, Path], night: Callable[..., Ran], call: Callable[..., Ran]
) -> None:
    source, output = copied
    before, columns = tree(output), ["key", "etag", "size", "recipe", "model", "out_key", "out_sha256", "out_bytes"]
    had = {row["key"]: row for row in Ledger(str(output)).latest([*columns, "status"]).to_pylist()}
    shutil.rmtree(output / "_diffsr")
    found = call("upscale", "verify", "--output", output)
    assert (found.code, found.summary["metrics"]["adopted"]) == (0, 5), found.stderr
    now = {row["key"]: row for row in Ledger(str(output)).latest([*columns, "status"]).to_pylist()}
    assert had.keys() - now.keys() == {"rotten.png"}  # of which nothing was published
    assert {key: [row[name] for name in columns] for key, row in now.items()} == {
        key: [row[name] for name in columns] for key, row in had.items() if key != "rotten.png"
    }
    again = night("", source, output)
    assert (again.summary["inputs"], again.summary["dead"], again.summary["unchanged"]) == (1, 1, 5)
    assert tree(output) == before


def test_retry_failed_redoes_dead_letters_only(copied: tuple[Path, Path], night: Callable[..., Ran]) -> None:
    source, output = copied
    again = night("retry-failed", source, output, "--max-dead-share", "1")
    assert (again.summary["inputs"], again.summary["dead"], again.summary["unchanged"]) == (1, 1, 5)
    rows = Ledger(str(output)).latest(["key", "status", "attempts"]).to_pylist()
    assert [(row["key"], row["attempts"]) for row in rows if row["status"] == "dead"] == [("rotten.png", 2)]


def test_gc_deletes_what_a_receipt_once_named_only_when_told_and_nothing_of_others(
    tmp_path: Path, night: Callable[..., Ran], call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_png(source / "a.png", waves(16, 16))
    maps = ["--samples", 2]
    assert night("", source, output, *maps).summary["done"] == 1
    superseded = {"a.png", "a.png.json", "a.png.uncertainty.png"}  # of no use from the next night on
    assert night("", source, output, "--format", "webp", *maps).summary["done"] == 1
    for name in ("original.png", "original.png.json", "a.png.txt", "b.png.uncertainty.png"):
        (output / name).write_bytes(b"somebody else's")
    before, gc = tree(output), ["gc", "--output", output]
    for words in (gc, [*gc, "--delete", "--dry-run"]):
        listed = call("upscale", *words)
        assert (listed.code, listed.summary["inputs"], listed.summary["done"]) == (0, 3, 0)
        assert listed.summary["metrics"]["superseded"] == 3
        assert listed.summary["metrics"]["bytes"] == sum(len(before[name]) for name in superseded)
        assert "'original.png' is not ours, left alone" in listed.stderr and "would delete 'a.png'" in listed.stderr
        assert tree(output) == before
    assert call("upscale", *gc, "--delete").summary["done"] == 3
    assert tree(output) == {name: data for name, data in before.items() if name not in superseded}


def test_gc_with_a_source_also_takes_the_results_of_what_is_gone_and_a_returning_source_is_work_again(
    tmp_path: Path, night: Callable[..., Ran], call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_waves(source, 3)
    night("", source, output)
    first, kept = tree(output), (source / "00.png").read_bytes()
    (source / "00.png").unlink()
    words = ["gc", "--source", source, "--output", output]
    assert call("upscale", *words).summary["metrics"]["gone"] == 2
    assert tree(output) == first
    assert call("upscale", *words, "--delete").summary["done"] == 2
    assert set(tree(output)) == set(first) - {"00.png", "00.png.json"}
    (source / "00.png").write_bytes(kept)
    assert night("", source, output).summary["done"] == 1
    assert tree(output) == first


def test_gc_refuses_a_folder_without_a_ledger(tmp_path: Path, call: Callable[..., Ran]) -> None:
    (tmp_path / "original.png").write_bytes(b"precious")
    refused = call("upscale", "gc", "--output", tmp_path, "--delete")
    assert refused.code == 1 and "must have a ledger" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["original.png"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("source", "output"), [("a", "a"), ("a", "a/out"), ("a/in", "a"), ("link", "a/out"), ("a", "link"), ("a", "a/b/..")]
)
def test_an_output_that_is_not_apart_from_its_source_is_refused_untouched(
    tmp_path: Path, call: Callable[..., Ran], verb: str, source: str, output: str
) -> None:
    (tmp_path / "a" / "in").mkdir(parents=True)
    (tmp_path / "a" / "in" / "a.png").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    words = ["--source", tmp_path / source, "--output", tmp_path / output, "--model", "models:/nobody/1", "--delete"]
    refused = call("upscale", verb, *words)
    assert refused.code == 1
    assert f"output ('{storage.absolute(tmp_path / output)}') must lie apart from source" in refused.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a.png", "in", "link"]


@pytest.mark.parametrize(
    ("source", "output", "apart"),
    [
        ("s3://b/a", "s3://b/a/", False),
        ("s3://b/a", "s3a://b/a/out", False),
        ("s3://b/a//in", "s3://b/a", False),
        ("s3://b", "s3://b/out", False),
        ("file:///a", "/a/out", False),
        ("memory://a/in", "memory:///a", False),
        ("s3://b/a", "s3://b/another", True),
        ("s3://b/a", "s3://c/a", True),
        ("s3://b/a", "/b/a", True),
    ],
)
def test_prefixes_of_a_store_are_apart_name_by_name(source: str, output: str, apart: bool) -> None:
    with nullcontext() if apart else pytest.raises(ValueError, match="must lie apart from source"):
        upscaling._check_apart(source, output)


@pytest.mark.parametrize("verb", ["run", "plan", "retry-failed"])
def test_a_verb_that_reads_the_source_asks_for_it(tmp_path: Path, call: Callable[..., Ran], verb: str) -> None:
    refused = call("upscale", verb, "--output", tmp_path / "out", "--model", "models:/nobody/1")
    assert refused.code == 1 and "source (None) must be given; use --source URI" in refused.stderr
    assert not (tmp_path / "out").exists()
