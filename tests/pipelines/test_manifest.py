"""Laws of pipelines.manifest and of the pair sets it describes: complete, seeded, provable, readable by others."""

import dataclasses
import io
import json

import duckdb
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.dataset
import pytest
from PIL import Image

from diffsr_core.degradation import Degradation
from pipelines import patches, storage
from pipelines.blobs import decode_blob
from pipelines.ledger import Ledger
from pipelines.loop import prefetch
from pipelines.manifest import PAIR_SCHEMA, Manifest, Shard, load_manifest
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.reader import PairReader, iter_pairs

NUM_SOURCES, PATCH, PER_IMAGE = 12, 16, 7


def put(source, name, *, seed, grey=False, side=64):
    """Write a noisy PNG whose every patch is unlike any other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side) if grey else (side, side, 3), dtype=np.uint8)
    source.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(source / name)


def make(root, **changes):
    fields = {"source": str(root / "source"), "output": str(root / "pairs"), "patch": PATCH, "engine": "local"}
    fields |= {"max_per_image": PER_IMAGE, "val_share": 0.3, "test_share": 0.1, "unit_megabytes": 0.03}
    return make_pairs(PairsConfig(**{**fields, **changes}))


def fill(root):
    for index in range(NUM_SOURCES):
        put(root / "source", f"{index:02d}.png", seed=index, grey=index % 4 == 0)


@pytest.fixture(scope="module", autouse=True)
def small_row_groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "ROW_GROUP_BYTES", 4_000)  # about 4 pairs
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
def own(tmp_path):
    """A set that a test may change: its root folder."""
    fill(tmp_path)
    make(tmp_path)
    return tmp_path


def table(pairs):
    return pa.dataset.dataset(f"{pairs}/data", format="parquet").to_table().to_pandas()


def reader(pairs, split="train", *, seed=0, **options):
    return PairReader(pairs, load_manifest(pairs), split, seed=seed, **options)


def hashes(read, positions):
    return [storage.digest_bytes(read.pair(position)[0].tobytes()) for position in positions]


def tree(root):
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_set_has_what_the_other_tests_need(pairs):
    manifest = load_manifest(pairs)
    assert len(manifest.shards) >= 3 and all(manifest.num_pairs(split) for split in ("train", "val"))
    files = [pa.parquet.ParquetFile(f"{pairs}/{shard.name}") for shard in manifest.shards]
    assert max(file.num_row_groups for file in files) >= 3
    assert sum(manifest.num_pairs(split) for split in ("train", "val", "test")) == NUM_SOURCES * PER_IMAGE


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("window_groups", [1, 4, 100])
def test_every_pair_of_the_split_comes_exactly_once_an_epoch(pairs, split, window_groups):
    rows = table(pairs)
    expected = sorted(rows[rows["split"] == split]["hr_sha256"])
    if not expected:
        with pytest.raises(ValueError, match=f"split \\({split}\\)"):
            reader(pairs, split)
        return
    read = reader(pairs, split, window_groups=window_groups)
    assert read.num_pairs == len(expected)
    for epoch in (0, 1, 5):
        assert sorted(hashes(read, range(epoch * len(expected), (epoch + 1) * len(expected)))) == expected


def test_the_order_is_a_function_of_the_seed_and_new_each_epoch(pairs):
    count = reader(pairs).num_pairs
    orders = {(seed, epoch): hashes(reader(pairs, seed=seed), range(epoch * count, (epoch + 1) * count))
              for seed in (0, 1) for epoch in (0, 1)}  # fmt: skip
    assert len({tuple(order) for order in orders.values()}) == 4
    assert hashes(reader(pairs, seed=1), range(count, 2 * count)) == orders[1, 1]


def test_to_resume_at_a_position_is_to_continue(pairs):
    count = reader(pairs).num_pairs
    whole = hashes(reader(pairs), range(2 * count + 5))
    for position in (1, count - 1, count, 2 * count + 1):
        assert hashes(reader(pairs), range(position, 2 * count + 5)) == whole[position:]
    back = reader(pairs)
    assert [hashes(back, [position])[0] for position in (count + 3, 0, 2)] == [whole[count + 3], whole[0], whole[2]]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_slices_of_the_ranks_are_the_batch(pairs, world):
    size, steps = 6, range(2, 6)
    whole = [reader(pairs).batch(range(step * size, (step + 1) * size)) for step in steps]
    share = size // world
    ranks = [list(prefetch(reader(pairs), batch_size=size, first=2, last=6, rank=rank, share=share))
             for rank in range(world)]  # fmt: skip
    for index, (hr, lr) in enumerate(whole):
        assert hr.shape == (size, PATCH, PATCH, 3) and lr.shape == (size, PATCH // 4, PATCH // 4, 3)
        assert np.array_equal(np.concatenate([rank[index][0] for rank in ranks]), hr)
        assert np.array_equal(np.concatenate([rank[index][1] for rank in ranks]), lr)


def test_hr_and_lr_of_a_pair_belong_together_and_grey_is_repeated_only_in_batches(pairs):
    rows = table(pairs).set_index("hr_sha256")
    read, channels = reader(pairs), set()
    for position in range(read.num_pairs):
        hr, lr = read.pair(position)
        row = rows.loc[storage.digest_bytes(hr.tobytes())]
        assert np.array_equal(lr, decode_blob(row["lr"])) and row["split"] == "train"
        channels.add(hr.shape[2])
        (batch_hr,), (batch_lr,) = read.batch(range(position, position + 1))
        assert np.array_equal(batch_hr, np.repeat(hr, 3 // hr.shape[2], axis=2))
        assert np.array_equal(batch_lr, np.repeat(lr, 3 // lr.shape[2], axis=2))
    assert channels == {1, 3}


def test_a_batch_has_the_channels_of_the_model_and_a_pair_of_others_is_an_error_that_says_what_to_do(pairs, tmp_path):
    for index in range(4):
        put(tmp_path / "source", f"{index}.png", seed=index, grey=True)
    make(tmp_path, val_share=0.0, test_share=0.0)
    grey = reader(str(tmp_path / "pairs"))
    for channels in (1, 3, 4):
        hr, lr = grey.batch(range(5), channels=channels)
        assert hr.shape == (5, PATCH, PATCH, channels) and lr.shape == (5, PATCH // 4, PATCH // 4, channels)
        for position in range(5):
            assert all(np.array_equal(hr[position, :, :, c : c + 1], grey.pair(position)[0]) for c in range(channels))
            assert all(np.array_equal(lr[position, :, :, c : c + 1], grey.pair(position)[1]) for c in range(channels))
    mixed = reader(pairs)
    for channels in (1, 2, 4):
        with pytest.raises(ValueError, match=f"have 3 channels: the model reads {channels}; choose another preset"):
            mixed.batch(range(mixed.num_pairs), channels=channels)


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


def test_pandas_duckdb_and_pyarrow_read_the_set_with_no_help_of_ours(pairs):
    names = [f"{pairs}/{shard.name}" for shard in load_manifest(pairs).shards]
    frame = pandas.concat([pandas.read_parquet(name) for name in names])
    assert list(frame.columns) == PAIR_SCHEMA.names
    by_duck = duckdb.sql(
        f"select split, count(*), sum(octet_length(hr)), max(crop.y), min(hr_h) from read_parquet({names}) group by all"
    ).fetchall()
    by_pandas = [
        (split, len(rows), rows["hr"].map(len).sum(), max(crop["y"] for crop in rows["crop"]), rows["hr_h"].min())
        for split, rows in frame.groupby("split")
    ]
    assert sorted(by_duck) == sorted(by_pandas)
    manifest = load_manifest(pairs)
    assert {row[0]: row[1] for row in by_duck} == {
        split: manifest.num_pairs(split) for split in ("train", "val", "test") if manifest.num_pairs(split)
    }
    assert len(table(pairs)) == len(frame)
    for row in frame.to_dict("records"):
        picture = Image.open(io.BytesIO(row["hr"]))
        assert (picture.format.lower(), picture.size) == (row["hr_codec"], (row["hr_w"], row["hr_h"]))


def test_the_shards_keep_to_the_format_that_was_promised(pairs):
    for shard in load_manifest(pairs).shards:
        file = pa.parquet.ParquetFile(f"{pairs}/{shard.name}")
        assert file.schema_arrow.remove_metadata().equals(PAIR_SCHEMA)
        for column in (file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)):
            blob = column.path_in_schema in ("hr", "lr")
            assert column.compression == ("UNCOMPRESSED" if blob else "ZSTD"), column.path_in_schema
            assert not (blob and column.is_stats_set), column.path_in_schema
            assert column.is_stats_set or column.path_in_schema in ("hr", "lr") or "crop" in column.path_in_schema


def test_stored_order_gives_every_row_of_the_split_once(pairs):
    rows = table(pairs)
    found = [row["pair_id"] for row in iter_pairs(pairs, load_manifest(pairs), "val")]
    assert sorted(found) == sorted(rows[rows["split"] == "val"]["pair_id"])


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[:99] + bytes([d[99] ^ 1]) + d[100:]])
def test_an_altered_shard_is_refused_by_name(own, change):
    pairs = str(own / "pairs")
    manifest = load_manifest(pairs)
    shard = next(shard for shard in manifest.shards if shard.splits.get("train"))
    path = own / "pairs" / shard.name
    path.write_bytes(change(path.read_bytes()))
    for use in (
        lambda: PairReader(pairs, manifest, "train", seed=0),
        lambda: list(iter_pairs(pairs, manifest, "train")),
    ):
        with pytest.raises(ValueError, match=f"{shard.name}.*altered"):
            use()


def test_an_empty_split_is_refused(own):
    make(own, output=str(own / "all"), val_share=0.0, test_share=0.0)
    assert reader(str(own / "all")).num_pairs == NUM_SOURCES * PER_IMAGE
    with pytest.raises(ValueError, match="val.*must hold pairs"):
        reader(str(own / "all"), "val")


SHARD = Shard(name="data/a.parquet", bytes=9, sha256="0", splits={"train": 2, "val": 1}, dropped_sources=["x", "y"])


def test_the_digest_changes_with_anything_that_the_manifest_says():
    base = Manifest(recipe={"scale": 4}, shards=[SHARD])
    changes = {"name": "data/b.parquet", "bytes": 8, "sha256": "1", "splits": {"train": 3, "val": 1}}
    changes |= {"dropped_sources": ["x"]}
    assert set(changes) == {field.name for field in dataclasses.fields(Shard)}
    others = [Manifest(recipe={"scale": 4}, shards=[dataclasses.replace(SHARD, **{k: v})]) for k, v in changes.items()]
    others += [Manifest(recipe={"scale": 2}, shards=[SHARD]), Manifest(recipe={"scale": 4}, shards=[])]
    others += [Manifest(recipe={"scale": 4}, shards=[SHARD, dataclasses.replace(SHARD, name="data/b.parquet")])]
    assert len({base.digest, *(other.digest for other in others)}) == len(others) + 1


def test_the_digest_does_not_depend_on_any_order():
    second = dataclasses.replace(SHARD, name="data/b.parquet")
    flipped = dataclasses.replace(SHARD, dropped_sources=["y", "x"], splits={"val": 1, "train": 2})
    one = Manifest(recipe={"a": 1, "b": 2}, shards=[SHARD, second])
    assert one.digest == Manifest(recipe={"b": 2, "a": 1}, shards=[second, flipped]).digest


def test_a_manifest_is_read_back_equal_and_refused_when_anything_in_it_was_edited(own):
    uri, pairs = own / "pairs" / "manifest.json", str(own / "pairs")
    text = uri.read_text()
    assert load_manifest(pairs).to_bytes().decode() == text
    document = json.loads(text)
    edits = [("recipe", {**document["recipe"], "seed": 9}), ("shards", document["shards"][1:]), ("format", 2)]
    for field, value in (("splits", {"train": 1}), ("sha256", "0"), ("dropped_sources", ["00.png"]), ("bytes", 1)):
        edits.append(("shards", [{**document["shards"][0], field: value}, *document["shards"][1:]]))
    for name, value in edits:
        uri.write_text(json.dumps({**document, name: value}))
        with pytest.raises(ValueError, match="make the set again"):
            load_manifest(pairs)
    uri.unlink()
    with pytest.raises(ValueError, match="must hold a manifest.json"):
        load_manifest(pairs)


def test_a_rerun_with_nothing_new_keeps_every_byte(own):
    before = tree(own / "pairs" / "data") | {"manifest": (own / "pairs" / "manifest.json").read_bytes()}
    summary = make(own)
    assert (summary.inputs, summary.unchanged) == (0, NUM_SOURCES)
    after = tree(own / "pairs" / "data") | {"manifest": (own / "pairs" / "manifest.json").read_bytes()}
    assert after == before


def test_the_same_sources_give_the_same_bytes_elsewhere(own, tmp_path):
    make(tmp_path, output=str(tmp_path / "again"))
    ours, again = ({path.name: path.read_bytes() for path in (tmp_path / name / "data").iterdir()} for name in
                   ("pairs", "again"))  # fmt: skip
    assert ours == again
    assert load_manifest(str(tmp_path / "again")).digest == load_manifest(str(tmp_path / "pairs")).digest


def test_a_new_source_adds_a_shard_and_keeps_the_old(own):
    before, manifest = tree(own / "pairs" / "data"), load_manifest(str(own / "pairs"))
    put(own / "source", "new.png", seed=99)
    summary = make(own)
    after, grown = tree(own / "pairs" / "data"), load_manifest(str(own / "pairs"))
    assert (summary.inputs, summary.unchanged) == (1, NUM_SOURCES)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    assert grown.digest != manifest.digest and all(shard in grown.shards for shard in manifest.shards)
    assert sum(sum(shard.splits.values()) for shard in grown.shards) == (NUM_SOURCES + 1) * PER_IMAGE


def rows_that_count(pairs):
    manifest = load_manifest(pairs)
    rows = [row for split in ("train", "val", "test") for row in iter_pairs(pairs, manifest, split)]
    read = [sha for split in ("train", "val", "test") if manifest.num_pairs(split)
            for sha in hashes(reader(pairs, split), range(manifest.num_pairs(split)))]  # fmt: skip
    assert sorted(read) == sorted(row["hr_sha256"] for row in rows)
    return rows


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
    before = sorted(row["pair_id"] for row in rows_that_count(pairs))
    for seed in (77, 1):
        put(tmp_path / "source", "01.png", seed=seed)
        make(tmp_path, unit_megabytes=unit_megabytes)
    assert sorted(row["pair_id"] for row in rows_that_count(pairs)) == before


def test_a_source_that_rots_drops_its_rows_and_leaves_the_rest(own):
    (own / "source" / "01.png").write_bytes(b"no picture")
    summary = make(own, max_dead_share=1.0)
    assert (summary.inputs, summary.dead) == (1, 1)
    rows = rows_that_count(str(own / "pairs"))
    assert "01.png" not in {row["source_key"] for row in rows} and len(rows) == (NUM_SOURCES - 1) * PER_IMAGE


def test_another_recipe_is_refused_before_anything_is_written(own):
    before = tree(own / "pairs")
    for changes in ({"seed": 1}, {"patch": 32}, {"codec": "png"}, {"val_share": 0.2}, {"degradation": "bilinear"}):
        with pytest.raises(ValueError, match=f"same recipe.*{next(iter(changes))}="):
            make(own, **changes)
    assert tree(own / "pairs") == before
    make(own, unit_megabytes=1.0, max_dead_share=0.5)  # how it runs is no part of the recipe


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
    ours, other = ({path.name: path.read_bytes() for path in (root / "data").iterdir()} for root in
                   (own / "pairs", again))  # fmt: skip
    assert ours == other
    assert (again / "manifest.json").read_bytes() == (own / "pairs" / "manifest.json").read_bytes()
