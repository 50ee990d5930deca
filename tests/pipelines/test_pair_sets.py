"""Laws of the pair sets that the job makes: complete, provable, grown without loss, and the same however they came."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.dataset
import pytest
from PIL import Image

from diffsr_core.degradation import Degradation
from pipelines import shards, storage
from pipelines.blobs import decode_blob
from pipelines.ledger import Ledger
from pipelines.manifest import PAIR_SCHEMA, SPLITS, load_manifest
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.reader import PairReader
from pipelines.rows import iter_pairs

NUM_SOURCES, PATCH, PER_IMAGE = 12, 16, 7


def put(source, name, *, seed, grey=False, side=64):
    """Write a noisy PNG whose every patch is unlike any other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side) if grey else (side, side, 3), dtype=np.uint8)
    source.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(source / name)


def make(root, **changes):
    fields = {"source": str(root / "source"), "output": str(root / "pairs"), "patch": PATCH, "engine": "local"}
    fields |= {"max_per_image": PER_IMAGE, "val_share": 0.3, "test_share": 0.1, "unit_megabytes": 0.03, "track": False}
    return make_pairs(PairsConfig(**{**fields, **changes}))


def fill(root):
    for index in range(NUM_SOURCES):
        put(root / "source", f"{index:02d}.png", seed=index, grey=index % 4 == 0)


@pytest.fixture(scope="module", autouse=True)
def small_row_groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_BYTES", 4_000)  # about 4 pairs
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A set that the tests only read: colour and grey, several shards of several row groups."""
    root = tmp_path_factory.mktemp("set")
    fill(root)
    summary = make(root)
    assert (summary.inputs, summary.done, summary.dead) == (NUM_SOURCES, NUM_SOURCES, 0)
    return str(root / "pairs")


@pytest.fixture
def own(pairs, tmp_path):
    """A copy of it, source, set and ledger, that a test may change: its root folder."""
    shutil.copytree(Path(pairs).parent, tmp_path, dirs_exist_ok=True)
    return tmp_path


def table(pairs):
    return pa.dataset.dataset(f"{pairs}/data", format="parquet").to_table().to_pandas()


def data(root):
    return {path.name: path.read_bytes() for path in sorted((root / "data").iterdir())}


def rows_that_count(pairs):
    """Return the rows of every split; what a training reads is the same."""
    manifest, rows = load_manifest(pairs), []
    for split in SPLITS:
        of_split = list(iter_pairs(pairs, manifest, split))
        rows += of_split
        if of_split:
            reader = PairReader(pairs, manifest, split, seed=0)
            read = [storage.digest_bytes(reader.pair(position)[0].tobytes()) for position in range(len(of_split))]
            assert sorted(read) == sorted(row["hr_sha256"] for row in of_split)
    return rows


def pair_ids(pairs):
    return sorted(row["pair_id"] for row in rows_that_count(pairs))


def test_the_set_has_what_the_other_tests_need(pairs):
    manifest = load_manifest(pairs)
    assert len(manifest.shards) >= 3 and all(manifest.num_pairs(split) for split in ("train", "val"))
    files = [pa.parquet.ParquetFile(f"{pairs}/{shard.name}") for shard in manifest.shards]
    assert max(file.num_row_groups for file in files) >= 3
    assert sum(manifest.num_pairs(split) for split in SPLITS) == NUM_SOURCES * PER_IMAGE == len(rows_that_count(pairs))


def test_lr_is_made_again_bit_for_bit_from_the_columns_of_a_row(pairs):
    rows = table(pairs)
    for row in rows.to_dict("records"):
        hr, lr = decode_blob(row["hr"]), decode_blob(row["lr"])
        again = Degradation(**json.loads(row["degradation"])).apply(hr, seed=row["degradation_seed"])
        assert again.tobytes() == lr.tobytes() and again.shape == lr.shape == (row["lr_h"], row["lr_w"], hr.shape[2])
        assert storage.digest_bytes(hr.tobytes()) == row["hr_sha256"]
    assert rows["degradation_seed"].nunique() == rows["pair_id"].nunique() == len(rows)


def test_hr_is_the_crop_of_its_source_that_the_row_names(pairs):
    for row in table(pairs).to_dict("records"):
        crop = row["crop"]
        path = f"{pairs}/../source/{row['source_key']}"
        pixels = np.asarray(Image.open(path))[crop["y"] : crop["y"] + crop["h"], crop["x"] : crop["x"] + crop["w"]]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["hr"]))), pixels)
        with open(path, "rb") as file:
            assert storage.content_etag(file.read()) == row["source_etag"]


def test_no_source_is_in_two_splits(pairs):
    assert (table(pairs).groupby("source_key")["split"].nunique() == 1).all()


def test_pandas_reads_the_shards_and_pillow_the_blobs_with_no_help_of_ours(pairs):
    frame = pandas.concat([pandas.read_parquet(f"{pairs}/{shard.name}") for shard in load_manifest(pairs).shards])
    assert list(frame.columns) == PAIR_SCHEMA.names
    for row in frame.to_dict("records"):
        picture = Image.open(io.BytesIO(row["hr"]))
        assert (picture.format.lower(), picture.size) == (row["hr_codec"], (row["hr_w"], row["hr_h"]))


def test_the_shards_keep_to_the_format_that_was_promised(pairs):
    nested = ("crop", "mean", "deviation", "histogram")
    for shard in load_manifest(pairs).shards:
        file = pa.parquet.ParquetFile(f"{pairs}/{shard.name}")
        assert file.schema_arrow.remove_metadata().equals(PAIR_SCHEMA)
        for column in (file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)):
            name = column.path_in_schema
            blob = name in ("hr", "lr")
            assert column.compression == ("UNCOMPRESSED" if blob else "ZSTD"), name
            assert column.is_stats_set == (not blob and name.partition(".")[0] not in nested), name


def test_a_rerun_with_nothing_new_keeps_every_byte(own):
    files = ["manifest.json", *(f"manifests/{path.name}" for path in (own / "pairs" / "manifests").iterdir())]
    before = data(own / "pairs") | {name: (own / "pairs" / name).read_bytes() for name in files}
    summary = make(own)
    assert (summary.inputs, summary.unchanged) == (0, NUM_SOURCES)
    assert data(own / "pairs") | {name: (own / "pairs" / name).read_bytes() for name in files} == before
    assert len(list((own / "pairs" / "manifests").iterdir())) == 1


def test_the_same_sources_give_the_same_bytes_elsewhere(own, tmp_path):
    make(tmp_path, output=str(tmp_path / "again"))
    assert data(tmp_path / "pairs") == data(tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (tmp_path / "pairs" / "manifest.json").read_bytes()


def test_a_new_source_adds_a_shard_and_keeps_the_old(own):
    before, manifest = data(own / "pairs"), load_manifest(str(own / "pairs"))
    put(own / "source", "new.png", seed=99)
    summary = make(own)
    after, grown = data(own / "pairs"), load_manifest(str(own / "pairs"))
    assert (summary.inputs, summary.unchanged) == (1, NUM_SOURCES)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    assert grown.digest != manifest.digest and all(shard in grown.shards for shard in manifest.shards)
    assert sum(sum(shard.splits.values()) for shard in grown.shards) == (NUM_SOURCES + 1) * PER_IMAGE


def test_the_set_that_a_training_named_stays_readable_as_the_corpus_grows(own):
    pairs = str(own / "pairs")
    named = f"{pairs}/manifests/{load_manifest(pairs).digest}.json"
    before = pair_ids(named)
    put(own / "source", "01.png", seed=77)
    (own / "source" / "02.png").unlink()
    make(own)
    assert pair_ids(named) == before != pair_ids(pairs)


@pytest.mark.parametrize("name", ["01.png", "02.png", "11.png"])
def test_a_changed_source_drops_its_old_rows_and_no_other(own, name):
    pairs = str(own / "pairs")
    old = {row["pair_id"]: row for row in rows_that_count(pairs)}
    put(own / "source", name, seed=77)
    assert make(own).inputs == 1
    new = {row["pair_id"]: row for row in rows_that_count(pairs)}
    assert {row["source_key"] for id_, row in old.items() if id_ not in new} == {name}
    assert {row["source_key"] for id_, row in new.items() if id_ not in old} == {name}
    assert len(new) == len(old) == NUM_SOURCES * PER_IMAGE
    assert {row["source_etag"] for row in new.values() if row["source_key"] == name} == {
        storage.content_etag((own / "source" / name).read_bytes())
    }


@pytest.mark.parametrize("unit_megabytes", [0.03, 1e-6], ids=["units of several", "a unit each: the same shard again"])
def test_a_source_edited_and_edited_back_counts_once_as_it_was(tmp_path, unit_megabytes):
    fill(tmp_path)
    make(tmp_path, unit_megabytes=unit_megabytes)
    pairs = str(tmp_path / "pairs")
    before = pair_ids(pairs)
    for seed in (77, 1):
        put(tmp_path / "source", "01.png", seed=seed)
        make(tmp_path, unit_megabytes=unit_megabytes)
    assert pair_ids(pairs) == before


def test_a_source_that_rots_drops_its_rows_and_leaves_the_rest(own):
    (own / "source" / "01.png").write_bytes(b"no picture")
    summary = make(own, max_dead_share=1.0)
    assert (summary.inputs, summary.dead) == (1, 1)
    rows = rows_that_count(str(own / "pairs"))
    assert "01.png" not in {row["source_key"] for row in rows} and len(rows) == (NUM_SOURCES - 1) * PER_IMAGE


def test_a_source_that_is_gone_leaves_the_set_and_counts_once_when_it_comes_back(own):
    pairs = str(own / "pairs")
    before = pair_ids(pairs)
    content = (own / "source" / "01.png").read_bytes()
    (own / "source" / "01.png").unlink()
    assert make(own).inputs == 0
    rows = rows_that_count(pairs)
    assert "01.png" not in {row["source_key"] for row in rows} and len(rows) == (NUM_SOURCES - 1) * PER_IMAGE
    (own / "source" / "01.png").write_bytes(content)
    assert make(own).inputs == 1 and pair_ids(pairs) == before
    assert make(own).inputs == 0


def test_more_sources_gone_than_is_allowed_is_an_error_that_commits_nothing(own):
    before = (own / "pairs" / "manifest.json").read_bytes()
    for index in range(NUM_SOURCES - 2):
        (own / "source" / f"{index:02d}.png").unlink()
    with pytest.raises(ValueError, match="max_gone_share"):
        make(own)
    assert (own / "pairs" / "manifest.json").read_bytes() == before
    make(own, max_gone_share=1.0)
    assert {row["source_key"] for row in rows_that_count(str(own / "pairs"))} == {"10.png", "11.png"}


def test_a_copy_under_another_name_in_another_shard_counts_when_the_first_goes_and_not_before(own):
    pairs, source = str(own / "pairs"), own / "source"
    before = pair_ids(pairs)
    (source / "copy.png").write_bytes((source / "01.png").read_bytes())
    make(own)
    rows = rows_that_count(pairs)
    assert len(rows) == len(before)
    kept = {row["source_key"] for row in rows} & {"01.png", "copy.png"}
    assert len(kept) == 1  # by the names of the shards, which are hashes
    (source / kept.pop()).unlink()
    make(own)
    assert sorted(row["hr_sha256"] for row in rows_that_count(pairs)) == sorted(row["hr_sha256"] for row in rows)


def test_two_copies_in_one_shard_count_as_one(tmp_path):
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        put(tmp_path / "source", name, seed=seed)
    make(tmp_path, unit_megabytes=1.0)
    rows = rows_that_count(str(tmp_path / "pairs"))
    assert {row["source_key"] for row in rows} == {"a.png", "c.png"} and len(rows) == 2 * PER_IMAGE


def test_another_recipe_is_another_set_beside_and_the_first_stays_as_it_was(own):
    pairs, before = str(own / "pairs"), data(own / "pairs")
    first = load_manifest(pairs)
    rows = pair_ids(pairs)
    for changes in ({"seed": 1}, {"patch": 32}, {"codec": "png"}, {"degradation": "bilinear"}):
        assert make(own, **changes).inputs == NUM_SOURCES
        other = load_manifest(pairs)
        assert not {shard.name for shard in other.shards} & {shard.name for shard in first.shards}
        assert pair_ids(f"{pairs}/manifests/{first.digest}.json") == rows
    after = data(own / "pairs")
    assert {name: after[name] for name in before} == before
    assert make(own, unit_megabytes=1.0, max_dead_share=0.5).inputs == 0  # how it runs is no part of the recipe
    assert load_manifest(pairs) == first


@pytest.mark.parametrize("number", [0, 1])
def test_killed_between_a_shard_and_its_receipt_a_rerun_ends_as_a_clean_run(own, tmp_path, monkeypatch, number):
    class Killed(BaseException):
        pass

    append, calls = Ledger.append, []

    def kill(self, receipts, *, fence, number=number):
        calls.append(receipts)
        if len(calls) > number:
            raise Killed
        append(self, receipts, fence=fence, number=len(calls))

    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", lambda self, receipts, *, fence, number: kill(self, receipts, fence=fence))
        patch.setattr("pipelines.work.FLUSH_S", -1.0)
        with pytest.raises(Killed):
            make(own, output=str(again))
    assert not (again / "manifest.json").exists() and len(list((again / "data").iterdir())) >= number + 1
    put(own / "source", "00-new.png", seed=5)
    make(own, output=str(again))
    make(own)
    assert data(own / "pairs") == data(again)
    assert (again / "manifest.json").read_bytes() == (own / "pairs" / "manifest.json").read_bytes()
