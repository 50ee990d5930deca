"""Laws of status, verify and gc: the ledger is made to say what is there, and only what is ours and of no use goes."""

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import inventory, upkeep, verification
from pipelines.accounting import accounted
from pipelines.ledger import GONE, LISTING_SCHEMA, OUTPUT_LOST, Ledger, Receipt, pack, save_plan

NAMES = ["a.png", "deep/b c.png", "line\nbreak 'ü.png", "図.png", "zz.png"]


def sidecar_of(key, data, *, source=None, verdict="pass", uncertainty=None, recipe="r", model="m"):
    output = {"key": key, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "format": "PNG"}
    if uncertainty is not None:
        output["uncertainty"] = {
            "key": f"{key}.uncertainty.png", "sha256": hashlib.sha256(uncertainty).hexdigest()
        }  # fmt: skip
    return {
        "source": {"key": source or key, "etag": "e1", "size": 7, "sha256": "0" * 64, "format": "PNG", "mode": "RGB"},
        "output": output,
        "model": {"name": "n", "version": 1, "digest": model},
        "recipe": {},
        "fingerprint": recipe,
        "method": "diffusion",
        "quality": {"verdict": verdict, "message": "" if verdict == "pass" else "LR-PSNR 20 dB"},
        "metrics": {"lr_psnr": 51.5, "megapixels": 0.25},
        "synthetic": True,
        "notes": [],
    }


class Archive:
    """An output folder with results as the workers leave them."""

    def __init__(self, root):
        self.root, self.ledger, self.fence = root, Ledger(str(root)), 100

    def put(self, key, data=None, *, uncertainty=None, **changes):
        """Write a result with its sidecar; return the receipt of it."""
        data = f"pixels of {key}".encode() if data is None else data
        document = sidecar_of(key, data, uncertainty=uncertainty, **changes)
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        Path(f"{path}.json").write_text(json.dumps(document))
        if uncertainty is not None:
            Path(f"{path}.uncertainty.png").write_bytes(uncertainty)
        verdict = document["quality"]["verdict"]
        return Receipt(
            key=document["source"]["key"], etag="e1", size=7, recipe=document["fingerprint"], status="done",
            model=document["model"]["digest"], out_key=key, out_sha256=document["output"]["sha256"],
            out_bytes=len(data), metrics=document["metrics"], reason="" if verdict == "pass" else verdict,
            stage="" if verdict == "pass" else "quality", message=document["quality"]["message"],
        )  # fmt: skip

    def record(self, *receipts):
        self.fence += 1
        self.ledger.append(list(receipts), fence=self.fence, number=0)
        (self.root / "_diffsr" / "fences").mkdir(exist_ok=True)
        (self.root / "_diffsr" / "fences" / f"{self.fence:010d}").write_text(
            json.dumps({"fence": self.fence, "expires": 0.0, "run_id": "old", "host": "", "pid": 1})
        )

    def files(self):
        paths = [path for path in self.root.rglob("*") if path.is_file() and "_diffsr" not in path.parts]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in paths}

    def rows(self):
        return {row["key"]: row for row in self.ledger.latest().to_pylist()}

    def work(self, **changes):
        keys = sorted(changes.pop("keys", NAMES))
        listing = pa.table([keys, ["e1"] * len(keys), [7] * len(keys)], schema=LISTING_SCHEMA)
        settings = {"recipe": "r", "model": "m", "retry_dead": False, **changes}
        found = accounted(listing, self.ledger.latest(), **settings)
        return [key for key, known in zip(keys, found["known"].to_pylist(), strict=True) if not known]


@pytest.fixture
def archive(tmp_path):
    made = Archive(tmp_path / "out")
    made.root.mkdir()
    made.record(*(made.put(name) for name in NAMES))
    return made


def verify(archive, *, dry_run=False, quick=False):
    return upkeep.verify(str(archive.root), dry_run=dry_run, quick=quick)


def gc(archive, *, delete=True, source_keys=None):
    keys = None if source_keys is None else pa.chunked_array([source_keys], pa.string())
    return upkeep.gc(str(archive.root), delete=delete, source_keys=keys)


@pytest.mark.parametrize("quick", [False, True])
def test_what_is_as_recorded_stays_so_and_nothing_is_written(archive, quick):
    segments = archive.ledger.segments()
    found = verify(archive, quick=quick)
    assert (found.exit_code, found.inputs, found.done, found.dead, found.metrics["adopted"]) == (0, 5, 5, 0, 0)
    assert archive.ledger.segments() == segments and archive.work() == []


DAMAGES = {
    "missing": (lambda path: path.unlink(), True),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"!"), True),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), True),
    "without sidecar": (lambda path: Path(f"{path}.json").unlink(), True),
    "one bit": (lambda path: path.write_bytes(b"P" + path.read_bytes()[1:]), False),
    "sidecar of another": (lambda path: shutil.copy(f"{path.parent}/zz.png.json", f"{path}.json"), False),
    "sidecar not JSON": (lambda path: Path(f"{path}.json").write_bytes(b"\xff{"), False),
    "sidecar bomb": (lambda path: Path(f"{path}.json").write_bytes(b"[" * 100_000), False),
    "sidecar of no shape": (lambda path: Path(f"{path}.json").write_bytes(b'{"source": []}'), False),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found_recorded_and_work_again_and_a_quick_look_sees_what_a_listing_shows(archive, damage, capsys):
    harm, seen_by_quick = DAMAGES[damage]
    harm(archive.root / "図.png")
    assert verify(archive, quick=True, dry_run=True).dead == int(seen_by_quick)
    assert (verify(archive, dry_run=True).dead, archive.work()) == (1, [])
    assert "nothing was recorded" in capsys.readouterr().err
    found = verify(archive)
    assert (found.exit_code, found.done, found.dead) == (1, 4, 1) and "図.png" in capsys.readouterr().err
    row = archive.rows()["図.png"]
    assert (row["status"], row["stage"], row["reason"]) == ("dead", "verify", OUTPUT_LOST)
    assert (row["out_key"], row["etag"], row["recipe"]) == ("図.png", "e1", "r") and archive.work() == ["図.png"]
    assert verify(archive).dead == 0  # it is recorded once


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"other")], ids=["missing", "altered"])
def test_an_uncertainty_map_belongs_to_its_result(archive, harm):
    archive.record(archive.put("k.png", uncertainty=b"map"))
    assert verify(archive).dead == 0
    harm(archive.root / "k.png.uncertainty.png")
    assert verify(archive).dead == 1 and archive.rows()["k.png"]["reason"] == OUTPUT_LOST


def test_a_store_that_does_not_give_a_result_now_loses_nothing(archive, monkeypatch):
    def tired(uri):
        raise OSError(5, "the store is tired")

    monkeypatch.setattr(verification, "sha256_of", tired)
    found = verify(archive)
    assert (found.exit_code, found.dead, found.metrics["unreadable"]) == (1, 0, 5) and archive.work() == []


def test_a_ledger_that_was_deleted_is_made_again_and_the_next_night_has_nothing_to_do(archive, capsys):
    archive.record(archive.put("r.png", verdict="rejected", uncertainty=b"map"), archive.put("b.bmp.png", source="b"))
    told = ("key", "etag", "size", "recipe", "model", "status", "out_key", "out_sha256", "out_bytes", "metrics")
    told += ("reason", "stage", "message")

    def account():
        return {key: [row[name] for name in told] for key, row in archive.rows().items()}

    before, files = account(), archive.files()
    shutil.rmtree(archive.root / "_diffsr")
    assert verify(archive, quick=True).metrics["adopted"] == 0
    assert verify(archive, dry_run=True).metrics["adopted"] == 7 and archive.rows() == {}
    found = verify(archive)
    assert (found.exit_code, found.inputs, found.metrics["adopted"]) == (0, 0, 7)
    assert account() == before and archive.files() == files
    assert archive.work(keys=[*NAMES, "r.png", "b"]) == []
    assert verify(archive).metrics["adopted"] == 0
    assert gc(archive).inputs == 0 and archive.files() == files


@pytest.mark.parametrize("flaw", ["image", "key", "fingerprint", "map"])
def test_what_its_sidecar_does_not_prove_is_not_adopted(archive, flaw):
    archive.put("new.png", uncertainty=b"map")
    path = archive.root / "new.png.json"
    document = json.loads(path.read_text())
    if flaw == "image":
        (archive.root / "new.png").write_bytes(b"somebody else's")
    elif flaw == "map":
        document["output"]["uncertainty"]["key"] = "a.png"  # a result of ours, but not beside this one
        document["output"]["uncertainty"]["sha256"] = hashlib.sha256(b"pixels of a.png").hexdigest()
    elif flaw == "key":
        document["output"]["key"] = "a.png"
    else:
        del document["fingerprint"]
    path.write_text(json.dumps(document))
    files = archive.files()
    assert verify(archive).metrics["adopted"] == 0 and "new.png" not in archive.rows()
    assert gc(archive).inputs == 0 and archive.files() == files


def test_a_result_whose_receipt_was_never_written_is_adopted_unless_the_source_has_a_better_account(archive):
    dead = {"size": 7, "recipe": "r", "model": "m", "status": "dead", "stage": "read", "reason": "io_transient"}
    archive.record(*(Receipt(key=key, etag=etag, **dead) for key, etag in (("same", "e1"), ("edited", "e2"))))
    archive.put("same.png", source="same")
    archive.put("edited.png", source="edited")
    archive.put("a.png.webp", source="a.png")  # whose current result is a.png
    assert verify(archive).metrics["adopted"] == 1
    rows = archive.rows()
    assert (rows["same"]["out_key"], rows["edited"]["status"], rows["a.png"]["out_key"]) == (
        "same.png",
        "dead",
        "a.png",
    )


def test_gc_takes_what_a_current_receipt_supersedes_with_sidecar_and_map_and_is_dry_until_told(archive):
    archive.record(archive.put("old.png", uncertainty=b"map", source="s"))
    archive.record(archive.put("s.webp", uncertainty=b"map", source="s"))
    for name in ("original.png", "original.png.json", "zz.png.txt", "x.png.uncertainty.png", ".tmp-mine"):
        (archive.root / name).write_bytes(b"somebody else's")
    before = archive.files()
    dry = gc(archive, delete=False)
    gone = {"old.png", "old.png.json", "old.png.uncertainty.png"}
    assert (dry.inputs, dry.done, archive.files()) == (3, 0, before)
    assert dry.metrics["bytes"] == sum(len(before[name]) for name in gone)
    assert gc(archive).metrics["superseded"] == 3
    assert archive.files() == {name: data for name, data in before.items() if name not in gone}
    assert gc(archive).inputs == 0 and verify(archive).exit_code == 0


def test_gc_leaves_a_foreign_map_beside_a_superseded_result(archive):
    archive.record(archive.put("old.png", source="s"))
    archive.record(archive.put("s.webp", source="s"))
    (archive.root / "old.png.uncertainty.png").write_bytes(b"somebody else's")
    assert gc(archive).done == 2 and (archive.root / "old.png.uncertainty.png").exists()


def test_gc_takes_orphans_that_a_sidecar_proves_and_lonely_sidecars(archive, capsys):
    archive.put("orphan.png", uncertainty=b"map")
    archive.put("lonely.png")
    (archive.root / "lonely.png").unlink()  # killed between the sidecar and the image
    archive.put("altered.png")
    (archive.root / "altered.png").write_bytes(b"somebody else's")
    before = archive.files()
    found = gc(archive)
    assert found.metrics["orphans"] == found.done == 4
    taken = {"orphan.png", "orphan.png.json", "orphan.png.uncertainty.png", "lonely.png.json"}
    assert archive.files() == {name: data for name, data in before.items() if name not in taken}
    assert "'altered.png' is not ours, left alone" in capsys.readouterr().err


def test_gc_refuses_to_delete_more_orphans_than_results_which_is_a_ledger_that_was_lost(archive):
    for index in range(30):
        archive.put(f"o{index}.png")
    before = archive.files()
    assert gc(archive, delete=False).metrics["orphans"] == 60
    with pytest.raises(ValueError, match="run verify first"):
        gc(archive)
    assert archive.files() == before


def test_gc_takes_the_results_of_sources_that_are_gone_and_records_them(archive):
    before = archive.files()
    stays = [name for name in NAMES if name != "a.png"]
    assert gc(archive, delete=False, source_keys=[*stays, "new.png"]).metrics["gone"] == 2
    assert archive.files() == before and archive.rows()["a.png"]["status"] == "done"
    found = gc(archive, source_keys=[*stays, "new.png"])
    assert (found.metrics["gone"], found.metrics["superseded"], found.done) == (2, 0, 2)
    assert set(before) - set(archive.files()) == {"a.png", "a.png.json"}
    assert (archive.rows()["a.png"]["status"], archive.rows()["a.png"]["reason"]) == ("skipped", GONE)
    assert gc(archive, source_keys=stays).inputs == 0 and archive.work() == ["a.png"]  # when it comes back


@pytest.mark.parametrize("keys", [[], ["another.png"]])
def test_gc_refuses_a_source_that_holds_nothing_of_what_was_upscaled(archive, keys):
    before = archive.files()
    for delete in (False, True):
        with pytest.raises(ValueError, match="correct --source"):
            gc(archive, delete=delete, source_keys=keys)
    assert archive.files() == before and archive.work() == []


def test_gc_killed_between_the_receipt_and_the_objects_is_finished_by_the_next(archive, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(upkeep.storage, "delete", lambda uri: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            gc(archive, source_keys=NAMES[1:])
    assert (archive.root / "a.png").exists()
    assert gc(archive).metrics["superseded"] == 2 and not (archive.root / "a.png").exists()


def test_gc_takes_half_written_files_and_trails_and_markers_of_dead_runs_but_not_those_of_a_plan(archive):
    rows = pa.table([["n.png"], ["e"], [5], pa.array([1], pa.int32())], names=["key", "etag", "size", "attempts"])
    plan = save_plan(archive.ledger, pack(rows, recipe="r", model="m", unit_bytes=1), recipe="r", model="m", fence=9)
    ours = archive.root / "_diffsr"
    stale = [ours / "attempts" / "dead.json", ours / "stop-0000000003", archive.root / "deep" / f".tmp-{'0a' * 8}"]
    kept = [ours / "attempts" / f"{plan.unit_ids()[0]}.json", archive.root / "deep" / ".tmp-notes"]
    for path in (*stale, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"12345")
    assert gc(archive, delete=False).metrics["temporary"] == 3 and all(path.exists() for path in stale)
    assert gc(archive).done == 3
    assert not any(path.exists() for path in stale) and all(path.exists() for path in kept)


def test_a_result_that_has_the_name_of_a_map_is_a_result(archive):
    archive.record(archive.put("a.png.uncertainty.png"))
    before = archive.files()
    assert gc(archive).inputs == 0 and verify(archive).exit_code == 0
    archive.record(archive.put("a.webp", source="a.png"))
    assert gc(archive).done == 2 and set(before) - set(archive.files()) == {"a.png", "a.png.json"}


def test_status_counts_by_reason_and_verdict_and_tells_examples_runs_and_plans(archive, capsys):
    dead = {"etag": "e", "size": 7, "recipe": "r", "model": "m", "status": "dead"}
    letters = [Receipt(key=f"{i:03d}", stage="decode", reason="corrupt", message="why", **dead) for i in range(200)]
    letters += [Receipt(key="t", stage="read", reason="io_transient", attempts=2, run_id="n2", started=1e9, **dead)]
    letters += [Receipt(key="u", stage="read", reason="io_transient", attempts=3, run_id="n2", started=1e9, **dead)]
    archive.record(*letters, archive.put("v.png", verdict="review"))
    rows = pa.table([["n.png"], ["e"], [5], pa.array([1], pa.int32())], names=["key", "etag", "size", "attempts"])
    save_plan(archive.ledger, pack(rows, recipe="r", model="m", unit_bytes=1), recipe="r", model="m", fence=9)
    found = upkeep.status(str(archive.root))
    assert (found.inputs, found.done, found.dead, found.skipped) == (208, 6, 202, 0)
    expected = {"done_pass": 5, "done_review": 1, "dead_corrupt": 200, "dead_io_transient": 2, "retryable": 1}
    assert found.metrics == {**expected, "plans": 1, "units": 1, "units_left": 1}
    said = capsys.readouterr().err
    assert "decode/corrupt: 200" in said and said.count("(try 1): why") == 3 and "0 of 1 units are done" in said
    assert "run n2 (2001-09-09 01:46 UTC): 2 dead" in said and "no run is at work" in said
    upkeep.status(str(archive.root), limit=12)
    assert capsys.readouterr().err.count("(try 1): why") == 12


def test_an_inventory_follows_links_once_and_leaves_our_own_folder_out(tmp_path):
    for name in ("out/a", "out/b/c", "out/_diffsr/x", f"out/.tmp-{'0a' * 8}", "far/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "out" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "out" / "b" / "loop").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "dangling").symlink_to(tmp_path / "nowhere")
    table = inventory.list_sizes(str(tmp_path / "out"))
    assert table.to_pylist() == [{"key": k, "size": s} for k, s in (("a", 5), ("b/c", 7), ("link/d", 5))]
    assert inventory.list_leftovers(str(tmp_path / "out"))["key"].to_pylist() == [f".tmp-{'0a' * 8}"]


def test_gc_keeps_the_only_result_of_a_source_that_has_rotted_or_that_a_newer_model_failed_on(archive):
    archive.record(archive.put("kept.png"), archive.put("rotten.png", uncertainty=b"map"))
    failed = {"model": "m2", "status": "dead", "stage": "upscale", "reason": "nan", "size": 7, "recipe": "r"}
    archive.record(
        Receipt(key="kept.png", etag="e1", **failed), Receipt(key="rotten.png", etag="another content", **failed)
    )
    before = archive.files()
    assert gc(archive).inputs == 0 and archive.files() == before
    archive.record(archive.put("other.png", b"by the new model", model="m2", source="kept.png"))
    gc(archive)
    assert set(before) - set(archive.files()) == {"kept.png", "kept.png.json"}
