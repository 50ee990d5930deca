"""Laws of pipelines.reader: every pair that counts, seeded and epoch-exact, in the model's levels, and proven."""

import dataclasses
import hashlib
import io

import numpy as np
import pyarrow as pa
import pytest

from pipelines import reader as module
from pipelines import storage
from pipelines.blobs import decode_blob, encode_blob
from pipelines.commit import publish_manifest
from pipelines.manifest import load_manifest
from pipelines.reader import PairReader, read_index
from pipelines.rows import iter_pairs, iter_tables, read_pair
from tests.pipelines.tiny_sets import RECIPE, SCALE, SIDE, make_row, manifest_of, noise, write_shard

LR = SIDE // SCALE


def publish(root, *shards, recipe=RECIPE):
    publish_manifest(str(root), manifest_of(*shards, recipe=recipe))
    return str(root)


def split_of(source):
    return ("train", "val", "train", "train")[source % 4]


@pytest.fixture(scope="module")
def all_rows():
    """Rows of three shards by name: 12 sources of 7 pairs, colour and grey, `train` and `val`."""
    return {
        name: [
            make_row(f"{s:02d}.png", n, split=split_of(s), hr=noise([s, n], channels=1) if s % 4 == 0 else None)
            for s in range(4 * index, 4 * index + 4)
            for n in range(7)
        ]
        for index, name in enumerate("cab")
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, all_rows):
    """A set that the tests only read, all of whose rows count: several shards of several row groups."""
    root = tmp_path_factory.mktemp("set")
    return publish(root, *[write_shard(root, name, rows) for name, rows in all_rows.items()])


@pytest.fixture
def thinned(tmp_path, all_rows):
    """The same set without a source and two pairs: (pairs, the rows that count)."""
    gone, dropped = "02.png", [all_rows["a"][0]["pair_id"], all_rows["a"][9]["pair_id"]]
    rows = [r for name in "abc" for r in all_rows[name] if r["source_key"] != gone and r["pair_id"] not in dropped]
    shards = []
    for name, of_shard in all_rows.items():
        shard = write_shard(tmp_path, name, of_shard)
        left = [row["split"] for row in of_shard if row in rows]
        shards.append(
            dataclasses.replace(
                shard,
                splits={split: left.count(split) for split in ("train", "val", "test")},
                dropped_sources=[gone] if name == "c" else [],
                dropped_pairs=dropped if name == "a" else [],
            )
        )
    return publish(tmp_path, *shards), rows


def reader(pairs, split="train", *, seed=0, **options):
    return PairReader(pairs, load_manifest(pairs), split, seed=seed, **options)


def hashes(read, positions):
    return [storage.digest_bytes(read.pair(position)[0].tobytes()) for position in positions]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("window_groups", [1, 4, 100])
def test_every_pair_of_the_split_comes_exactly_once_an_epoch(pairs, all_rows, split, window_groups):
    expected = sorted(row["hr_sha256"] for rows in all_rows.values() for row in rows if row["split"] == split)
    read = reader(pairs, split, window_groups=window_groups)
    assert read.num_pairs == len(expected)
    for epoch in (0, 1, 5):
        assert sorted(hashes(read, range(epoch * len(expected), (epoch + 1) * len(expected)))) == expected


def test_what_was_dropped_is_never_read(thinned):
    pairs, rows = thinned
    for split in ("train", "val"):
        expected = [row["hr_sha256"] for row in rows if row["split"] == split]
        assert sorted(hashes(reader(pairs, split), range(len(expected)))) == sorted(expected)
        assert [row["hr_sha256"] for row in iter_pairs(pairs, load_manifest(pairs), split)] == expected
    tables = list(iter_tables(pairs, load_manifest(pairs), ["hr_sha256"]))
    assert [row["hr_sha256"] for table in tables for row in table.to_pylist()] == [row["hr_sha256"] for row in rows]


def test_the_order_is_that_of_shuffled_groups_and_shuffled_rows_in_windows_of_them(thinned):
    """The oracle is the documented order over lists: a training of an earlier version goes on with the same batches."""
    pairs, rows = thinned
    manifest = load_manifest(pairs)
    groups = []
    for shard in manifest.sorted_shards():
        file = pa.parquet.ParquetFile(f"{pairs}/{shard.name}")
        for number in range(file.num_row_groups):
            of_group = file.read_row_group(number).to_pylist()
            counting = {row["pair_id"] for row in rows if row["split"] == "train"}
            groups.append([row["hr_sha256"] for row in of_group if row["pair_id"] in counting])
    assert any(not group for group in groups)  # a group of which nothing counts is shuffled like the others
    expected = []
    for epoch in range(2):
        generator = np.random.default_rng([3, epoch])
        shuffled = [groups[i] for i in generator.permutation(len(groups))]
        for start in range(0, len(shuffled), 4):
            window = [sha for group in shuffled[start : start + 4] for sha in group]
            expected += [window[i] for i in generator.permutation(len(window))]
    assert hashes(reader(pairs, seed=3), range(len(expected))) == expected


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


def test_hr_and_lr_of_a_pair_belong_together_and_grey_is_repeated_only_in_batches(pairs, all_rows):
    by_hr = {row["hr_sha256"]: row for rows in all_rows.values() for row in rows}
    read, channels = reader(pairs), set()
    for position in range(read.num_pairs):
        hr, lr = read.pair(position)
        row = by_hr[storage.digest_bytes(hr.tobytes())]
        assert np.array_equal(lr, decode_blob(row["lr"])) and row["split"] == "train"
        channels.add(hr.shape[2])
        (batch_hr,), (batch_lr,) = read.batch(range(position, position + 1))
        assert batch_hr.dtype == batch_lr.dtype == np.uint8
        assert np.array_equal(batch_hr, np.repeat(hr, 3 // hr.shape[2], axis=2))
        assert np.array_equal(batch_lr, np.repeat(lr, 3 // lr.shape[2], axis=2))
    assert channels == {1, 3}


def one_shard(root, *sides, recipe=RECIPE):
    """A set of one pair for each (hr, lr)."""
    rows = [make_row(f"{number}.png", hr=hr, lr=lr) for number, (hr, lr) in enumerate(sides)]
    return publish(root, write_shard(root, "one", rows), recipe=recipe)


def test_a_batch_has_the_channels_of_the_model_and_a_pair_of_others_is_an_error_that_says_what_to_do(pairs, tmp_path):
    grey = reader(one_shard(tmp_path, *[(noise(n, channels=1), noise(n, side=LR, channels=1)) for n in range(5)]))
    for channels in (1, 3, 4):
        hr, lr = grey.batch(range(5), channels=channels)
        assert hr.shape == (5, SIDE, SIDE, channels) and lr.shape == (5, LR, LR, channels)
        for position in range(5):
            assert all(np.array_equal(hr[position, :, :, c : c + 1], grey.pair(position)[0]) for c in range(channels))
            assert all(np.array_equal(lr[position, :, :, c : c + 1], grey.pair(position)[1]) for c in range(channels))
    mixed = reader(pairs)
    for channels in (1, 2, 4):
        with pytest.raises(ValueError, match=f"have 3 channels: the model reads {channels}; choose another preset"):
            mixed.batch(range(mixed.num_pairs), channels=channels)


@pytest.mark.parametrize(("hr", "lr"), [(1, 4), (3, 4), (4, 3), (3, 2)])
def test_twins_of_other_channels_than_the_model_reads_are_an_error_that_says_which(tmp_path, hr, lr):
    read = reader(one_shard(tmp_path, (noise(0, channels=hr), noise(1, side=LR, channels=lr))))
    with pytest.raises(ValueError, match=f"have {hr} channels in HR and {lr} in LR: the model reads 3; choose another"):
        read.batch(range(1))
    if hr == 1:
        assert [x.shape for x in read.batch(range(1), channels=lr)] == [(1, SIDE, SIDE, lr), (1, LR, LR, lr)]


RANGES = [(np.uint16, None, (0, 65535)), (np.uint16, [100.0, 4095.0], (100, 4095)), (np.float32, [0.0, 1.0], (0, 1)),
          (np.float32, [-0.5, 0.25], (-0.5, 0.25)), (np.float32, [0, 2], (0, 2))]  # fmt: skip


@pytest.mark.parametrize(("dtype", "kept", "ends"), RANGES)
def test_more_than_8_bits_are_levels_of_255_by_the_value_range(tmp_path, dtype, kept, ends):
    hr, lr = noise(0, dtype=dtype), noise(1, side=LR, dtype=dtype)
    hr[0, 0, :2] = ends[0]
    hr[0, 1, :2] = ends[1]
    read = reader(one_shard(tmp_path, (hr, lr), recipe={**RECIPE, "value_range": kept}))
    assert all(np.array_equal(stored, given) for stored, given in zip(read.pair(0), (hr, lr), strict=True))
    batch = read.batch(range(1))
    for levels, pixels in zip(batch, (hr, lr), strict=True):
        expected = (pixels.astype(np.float64) - ends[0]) / (ends[1] - ends[0]) * 255
        assert levels.dtype == np.float32
        np.testing.assert_allclose(levels[0], expected, rtol=1e-6, atol=1e-4)  # outside of the range too: not clipped
    model_range = batch[0][0] / 127.5 - 1
    assert model_range[0, 0, 0] == -1 and abs(float(model_range[0, 1, 0]) - 1) < 1e-6


def test_floats_of_which_nobody_said_what_is_white_are_an_error(tmp_path):
    pairs = one_shard(tmp_path, (noise(0, dtype=np.float32), noise(1, side=LR, dtype=np.float32)))
    with pytest.raises(ValueError, match=r"value_range \(None\).*float32.*--value-range"):
        reader(pairs).batch(range(1))


def test_8_bits_beside_16_keep_their_levels_exactly(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    deep = noise(1, channels=1, dtype=np.uint16)
    sides = [(levels, levels[:LR, :LR]), (deep, deep[:LR, :LR])]
    pairs = one_shard(tmp_path, *sides, recipe={**RECIPE, "value_range": [0, 1000]})
    hr, lr = reader(pairs).batch(range(2), channels=1)
    assert hr.dtype == lr.dtype == np.float32
    assert sum(np.array_equal(picture, levels.astype(np.float32)) for picture in hr) == 1


def test_stored_order_gives_every_row_of_the_split_once_and_its_blobs_by_place(thinned):
    pairs, rows = thinned
    manifest = load_manifest(pairs)
    whole = list(iter_pairs(pairs, manifest, "val"))
    assert [row["pair_id"] for row in whole] == [row["pair_id"] for row in rows if row["split"] == "val"]
    for row in whole:
        assert read_pair(pairs, row["place"]) == (row["hr"], row["lr"])
    few = list(iter_pairs(pairs, manifest, "val", columns=["hr_sha256"]))
    assert [(row["hr_sha256"], row["place"]) for row in few] == [(row["hr_sha256"], row["place"]) for row in whole]
    assert "hr" not in few[0]


def test_a_set_is_read_alike_by_its_folder_and_by_each_of_its_manifests(pairs):
    manifest = load_manifest(pairs)
    rows = list(iter_pairs(pairs, manifest, "val"))
    for form in (f"{pairs}/manifest.json", f"{pairs}/manifests/{manifest.digest}.json"):
        assert load_manifest(form) == manifest
        assert hashes(reader(form), range(9)) == hashes(reader(pairs), range(9))
        assert list(iter_pairs(form, manifest, "val")) == rows
        assert read_pair(form, rows[0]["place"]) == (rows[0]["hr"], rows[0]["lr"])
        assert [t.num_rows for t in iter_tables(form, manifest, [])] == [t.num_rows for t in
                                                                         iter_tables(pairs, manifest, [])]  # fmt: skip


USES = {
    "train": lambda pairs, manifest: PairReader(pairs, manifest, "train", seed=0),
    "score": lambda pairs, manifest: list(iter_pairs(pairs, manifest, "train")),
    "count": lambda pairs, manifest: list(iter_tables(pairs, manifest, ["phash"])),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", ["shorter", "flipped", "torn footer", "another", "missing"])
def test_an_altered_shard_is_refused_by_name(thinned, use, change):
    pairs, _ = thinned
    manifest = load_manifest(pairs)
    shard = manifest.sorted_shards()[1]
    path = f"{pairs}/{shard.name}"
    data = storage.read_bytes(path)
    another = storage.read_bytes(f"{pairs}/{manifest.sorted_shards()[0].name}")
    changed = {"another": another, "shorter": data[:-1], "flipped": data[:99] + bytes([data[99] ^ 1]) + data[100:],
               "torn footer": data[:-20] + bytes(20)}  # fmt: skip
    storage.delete(path) if change == "missing" else storage.publish(path, changed[change])
    if (use, change) == ("count", "flipped"):
        return  # no hash there: a page that is read has its own checksum, the others do not matter
    with pytest.raises(ValueError, match=f"{shard.name}.*{'missing' if change == 'missing' else 'altered'}"):
        USES[use](pairs, manifest)


def test_a_damaged_blob_is_an_error_that_names_the_shard_and_the_row(tmp_path):
    """No reader's fault: it was written like that, so that the shard's hash is right."""
    rows = [make_row("a.png", number) for number in range(7)]
    rows[5]["hr"] = rows[5]["hr"][:40]
    read = reader(publish(tmp_path, write_shard(tmp_path, "x", rows, group_rows=3)))
    with pytest.raises(ValueError, match=r"shard \(data/x.parquet\) row 5 .*make the set again"):
        hashes(read, range(7))
    rows[5]["hr"] = encode_blob(noise(5, dtype=np.uint16), "webp")[:-9]
    read = reader(publish(tmp_path, write_shard(tmp_path, "x", rows, group_rows=3)))
    with pytest.raises(ValueError, match=r"shard \(data/x.parquet\) row 5 "):
        hashes(read, range(7))


PATCHED = {**RECIPE, "patch": SIDE}
FAULTS = {
    "hr is cut off": lambda row: {**row, "hr": row["hr"][:40]},
    "lr is no picture": lambda row: {**row, "lr": b"not a picture"},
    "lr is cut off npy": lambda row: {**row, "lr": encode_blob(noise(0, side=LR, dtype=np.uint16), "png")[:-9]},
    "hr is not there": lambda row: {**row, "hr": None},
    "both are smaller": lambda row: {**row, "hr": encode_blob(noise(0, side=8), "png"),
                                     "lr": encode_blob(noise(0, side=2), "png")},
    "lr is larger": lambda row: {**row, "lr": encode_blob(noise(0, side=LR + 1), "png")},
    "hr is flat": lambda row: {**row, "hr": npy(noise(0)[:, :, 0])},
    "hr has four channels": lambda row: {**row, "hr": encode_blob(noise(0, channels=4), "png")},
}  # fmt: skip


def npy(pixels):
    out = io.BytesIO()
    np.save(out, pixels)
    return pa.Codec("zstd").compress(out.getvalue(), asbytes=True)


def damaged(root, rows, numbers, fault):
    """The set of these rows, those of some numbers damaged, and its whole twin: the order is the same in both."""
    bad = [FAULTS[fault](row) if number in numbers else row for number, row in enumerate(rows)]
    sets = {"whole": rows, "bad": bad}
    return [reader(publish(root / name, write_shard(root / name, "x", of, group_rows=3), recipe=PATCHED), seed=2)
            for name, of in sets.items()]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("run", [1, 2])
def test_a_corrupt_row_is_named_and_the_next_whole_one_of_the_epoch_stands_in(tmp_path, fault, run):
    """The oracle is the whole twin; wherever the row comes in the epoch, its last place included."""
    rows = [make_row("a.png", number) for number in range(7)]
    order = [row["hr_sha256"] for row in rows]
    places = [order.index(sha) for sha in hashes(damaged(tmp_path, rows, [], fault)[0], range(14))]
    for at in (0, 2, 6):
        numbers = [places[(at + further) % 7] for further in range(run)]
        whole, bad = damaged(tmp_path / str(at), rows, numbers, fault)
        hr, lr = whole.batch(range(14))
        source = list(range(14))
        for position in range(14):
            while places[source[position]] in numbers:
                source[position] = source[position] // 7 * 7 + (source[position] + 1) % 7
        fed = bad.tolerant_batch(range(14), channels=3)
        assert np.array_equal(fed.hr, hr[source]) and np.array_equal(fed.lr, lr[source])
        named = [int(text.split(" row ")[1].split(":")[0]) for text in fed.corrupt]
        assert named == [number for number in places if number in numbers]
        assert all(text.startswith("shard (data/x.parquet) row ") and len(text) < 400 for text in fed.corrupt)


def test_a_whole_set_is_read_alike_with_and_without_tolerance(pairs):
    read = reader(pairs)
    (hr, lr), fed = read.batch(range(60)), read.tolerant_batch(range(60))
    assert np.array_equal(fed.hr, hr) and np.array_equal(fed.lr, lr) and fed.corrupt == ()


def test_more_corrupt_rows_in_a_row_than_are_an_accident_are_an_error(tmp_path, monkeypatch):
    rows = [make_row("a.png", number) for number in range(7)]
    _, bad = damaged(tmp_path / "all", rows, range(7), "hr is cut off")
    with pytest.raises(ValueError, match=r"must not have 7 corrupt rows in a row; the first is shard \(data/x.parquet"):
        bad.tolerant_batch(range(1))
    monkeypatch.setattr(module, "MAX_CORRUPT", 3)
    places = [bad._locate(position) for position in range(7)]
    numbers = [3 * group + row for group, row in places]
    _, bad = damaged(tmp_path / "two", rows, numbers[:2], "hr is cut off")
    assert len(bad.tolerant_batch(range(7)).corrupt) == 2
    _, bad = damaged(tmp_path / "three", rows, numbers[:3], "hr is cut off")
    with pytest.raises(ValueError, match="must not have 3 corrupt rows in a row.*make the set again"):
        bad.tolerant_batch(range(7))
    grey = reader(one_shard(tmp_path / "four", (noise(0, channels=4), noise(1, side=LR, channels=4))))
    with pytest.raises(ValueError, match="4 channels: the model reads 3.*choose another preset"):
        grey.tolerant_batch(range(1))


def test_a_shard_that_is_altered_while_it_is_read_is_no_corrupt_row(thinned):
    pairs, _ = thinned
    read = reader(pairs)
    for shard in read.shards:
        data = bytearray(storage.read_bytes(f"{pairs}/{shard.name}"))
        metadata = pa.parquet.read_metadata(f"{pairs}/{shard.name}")
        for group in range(metadata.num_row_groups):
            hr = metadata.row_group(group).column(metadata.schema.names.index("hr"))
            data[(hr.dictionary_page_offset or hr.data_page_offset) + hr.total_compressed_size // 2] ^= 1
        storage.publish(f"{pairs}/{shard.name}", bytes(data))
    with pytest.raises(ValueError, match="must be whole; it was altered"):
        read.tolerant_batch(range(1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_with_an_index_the_order_is_the_same_and_no_shard_is_opened_before_it_is_read(pairs, split, monkeypatch):
    manifest = load_manifest(pairs)
    index, expected = read_index(pairs, manifest, split), hashes(reader(pairs, split), range(50))
    monkeypatch.setattr(module.storage, "open_file", lambda *_, **__: pytest.fail("a shard was opened"))
    read = reader(pairs, split, index=index)
    monkeypatch.undo()
    assert hashes(read, range(50)) == expected


@pytest.mark.parametrize("column", ["hr", "lr", "split", "pair_id", "source_key"])
def test_a_shard_without_a_column_is_an_error_that_names_both(tmp_path, column):
    whole = write_shard(tmp_path, "a", [make_row("a.png")])
    shard = write_shard(tmp_path, "b", [make_row("b.png")])
    path = tmp_path / shard.name
    pa.parquet.write_table(pa.parquet.read_table(path).drop([column]), path)
    data = path.read_bytes()
    shard = dataclasses.replace(shard, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ValueError, match=rf"data/b.parquet\) must have the columns hr, .*lacks {column}; make the set"):
        read_index(publish(tmp_path, whole, shard), manifest_of(whole, shard), "train")


def test_an_empty_split_is_refused(pairs):
    with pytest.raises(ValueError, match="test.*must hold pairs"):
        reader(pairs, "test")


def test_a_manifest_that_counts_other_rows_than_there_are_is_refused(pairs):
    manifest = load_manifest(pairs)
    first = manifest.shards[0]
    wrong = dataclasses.replace(first, splits={**first.splits, "train": 1})
    with pytest.raises(ValueError, match="must hold 43 pairs, not 63"):
        PairReader(pairs, manifest_of(wrong, *manifest.shards[1:]), "train", seed=0)


class Watched(io.FileIO):
    """A file that keeps the largest read."""

    largest = 0

    def _saw(self, count):
        Watched.largest = max(Watched.largest, count)

    def read(self, size=-1):
        data = super().read(size)
        self._saw(len(data))
        return data

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self._saw(count)
        return count


def test_a_shard_is_never_in_memory_whole(tmp_path, monkeypatch):
    """Its hash is taken in pieces, then the footer and the columns that decide; blobs come a row group at a time."""
    rows = [make_row("a.png", number, hr=noise(number, side=512, channels=1)) for number in range(24)]
    shard = write_shard(tmp_path, "big", rows, group_rows=2)
    pairs = publish(tmp_path, dataclasses.replace(shard, dropped_pairs=[rows[0]["pair_id"]],
                                                  splits={"train": 23, "val": 0, "test": 0}))  # fmt: skip
    monkeypatch.setattr(module.storage, "open_file", lambda uri, **_: Watched(uri))
    read = reader(pairs)
    list(iter_tables(pairs, load_manifest(pairs), ["phash", "pair_id"]))
    row = next(iter_pairs(pairs, load_manifest(pairs), "train", columns=["pair_id"]))
    assert Watched.largest <= 2**18 < shard.bytes / 20
    assert read.pair(0)[0].shape == (512, 512, 1) and len(read_pair(pairs, row["place"])[0]) > 2**17
    assert 2**18 < Watched.largest < shard.bytes / 10


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_tables_come_one_a_shard_by_name_however_many_are_read_ahead(tmp_path, count):
    names = [hashlib.sha256(bytes([n])).hexdigest()[:6] for n in range(count)]
    shards = [write_shard(tmp_path, name, [make_row(f"{name}.png", split="val")]) for name in names]
    tables = list(iter_tables(str(tmp_path), manifest_of(*shards), ["source_key"]))
    assert [table["source_key"].to_pylist() for table in tables] == [[f"{name}.png"] for name in sorted(names)]
    assert all(table.column_names == ["source_key", "split"] for table in tables)
