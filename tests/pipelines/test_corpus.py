"""Laws of pipelines.corpus and lists: what is named is listed once, and is fetched whole, verified, or refused."""

import hashlib
import os
import random
import tempfile
import threading
import tracemalloc
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import corpus as module
from pipelines import lists, storage
from pipelines.corpus import Corpus, Original
from pipelines.images import Refused
from pipelines.ledger import LISTING_SCHEMA, list_table
from tests.s3_server import S3Server


@pytest.fixture
def photos(tmp_path):
    """A folder of four images in two folders and a note."""
    for key in ("a.png", "sub/b.jpg", "sub/c d.TIF", "line\nbreak.png", "note.txt"):
        storage.publish(storage.join(str(tmp_path / "photos"), key), f"bytes of {key}".encode())
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def no_temporary_file_stays(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("spool")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def text(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


def parquet(path, /, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def rows_of(corpus):
    table = corpus.listing()
    assert table.schema == LISTING_SCHEMA and table["key"].to_pylist() == sorted(set(table["key"].to_pylist()))
    assert not any(column.null_count for column in table.columns)
    return {row["key"]: row for row in table.to_pylist()}


def fetched(corpus, row, *, twin=False):
    """Return the bytes of a row, or (stage, reason)."""
    try:
        with corpus.fetch_twin(row) if twin else corpus.fetch(row) as original:
            assert original.size == len(original.read())
            assert original.digest == hashlib.sha256(original.read()).hexdigest()
            return original.read()
    except Refused as refused:
        return refused.stage, refused.reason


def test_a_folder_is_listed_as_its_images_and_each_is_fetched_whole(photos):
    corpus = Corpus(source=str(photos))
    assert corpus.listing() == list_table(str(photos), suffixes=frozenset({".png", ".jpg", ".tif"}))
    for key, row in rows_of(corpus).items():
        assert fetched(corpus, row) == f"bytes of {key}".encode()


def test_a_text_list_names_its_objects_in_its_own_words_each_once(photos, tmp_path):
    uris = [
        "photos/a.png",
        str(photos / "sub/b.jpg"),
        f"file://{photos}/note.txt",
        "photos/a.png",
        "photos/../photos/a.png",
    ]
    names = ["a.png", "sub/b.jpg", "note.txt", "a.png", "a.png", "sub/c d.TIF"]
    source = text(tmp_path / "list.txt", "\ufeff# ours", "", *uris, "   ", "#photos/c.png", "photos/sub/c d.TIF\r")
    rows = rows_of(Corpus(source=source))
    assert set(rows) == {*uris, "photos/sub/c d.TIF"}
    assert {key: fetched(Corpus(source=source), row) for key, row in rows.items()} == {
        key: f"bytes of {name}".encode() for key, name in zip([*uris, "photos/sub/c d.TIF"], names, strict=True)
    }
    assert rows["photos/a.png"]["etag"] == storage.content_etag(b"bytes of a.png")
    assert rows["photos/a.png"]["size"] == 14


def test_the_first_line_counts_with_and_without_a_byte_order_mark(photos, tmp_path):
    for number, mark in enumerate((b"", b"\xef\xbb\xbf")):
        source = text(tmp_path / f"{number}.txt", mark + b"photos/a.png")
        assert list(rows_of(Corpus(source=source))) == ["photos/a.png"]


REFUSED = {
    "photos/gone.png": "missing",
    "photos": "io_error",
    "https://example.com/a.png": "bad_name",
    "http://169.254.169.254/latest": "bad_name",
    "simplecache::s3://bucket/a.png": "bad_name",
    "zip://a.png::file:///tmp/x.zip": "bad_name",
    "file:///tmp/a::b.png": "bad_name",
    "FILE:///etc/hostname": "bad_name",
    "s3://not_a bucket!/k.png": "bad_name",
    "s3://": "bad_name",
    "nul\0.png": "bad_name",
    "gs://bucket/a.png": "io_error",
    "/dev/zero": "io_error",
}


def test_what_a_list_names_and_no_store_gives_is_listed_and_ends_as_a_dead_letter(photos, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    expected = {**REFUSED, "pipe.png": "io_error"}
    for source in (text(tmp_path / "l.txt", *expected), parquet(tmp_path / "l.parquet", uri=list(expected))):
        rows = rows_of(Corpus(source=source))
        assert {key: (row["etag"], row["size"]) for key, row in rows.items()} == {
            key: ("unreadable", 0) for key in expected
        }
        assert {key: fetched(Corpus(source=source), row) for key, row in rows.items()} == {
            key: ("read", reason) for key, reason in expected.items()
        }


def test_an_etag_that_was_given_saves_nothing_from_the_same_end(tmp_path):
    source = parquet(tmp_path / "l.parquet", uri=list(REFUSED), etag=["e"] * len(REFUSED), size=[1] * len(REFUSED))
    corpus = Corpus(source=source)
    ends = {key: fetched(corpus, row) for key, row in rows_of(corpus).items()}
    assert ends == {
        key: ("read", "missing" if reason == "io_error" and key == "photos" else reason)
        for key, reason in REFUSED.items()
    }


def test_a_name_that_is_not_utf8_is_escaped_as_in_a_folder(tmp_path):
    corpus = Corpus(source=text(tmp_path / "list.txt", b"a\xff.png", "é.png"))
    rows = rows_of(corpus)
    assert sorted(rows) == ["a\\udcff.png", "é.png"]
    assert fetched(corpus, rows["a\\udcff.png"]) == ("read", "name_not_utf8")


def test_a_missing_object_that_comes_is_a_change(tmp_path):
    corpus = Corpus(source=text(tmp_path / "list.txt", "a.png"))
    (row,) = rows_of(corpus).values()
    (tmp_path / "a.png").write_bytes(b"here")
    assert fetched(corpus, row) == ("read", "source_changed")
    (row,) = rows_of(corpus).values()
    assert (row["etag"], fetched(corpus, row)) == (storage.content_etag(b"here"), b"here")


def test_a_parquet_list_tells_etag_and_size_and_the_store_is_asked_for_the_rest(photos, tmp_path, monkeypatch):
    asked = []
    honest = storage.look_up
    monkeypatch.setattr(storage, "look_up", lambda uri: asked.append(os.path.basename(uri)) or honest(uri))
    keys = ["photos/a.png", "photos/sub/b.jpg", "photos/sub/c d.TIF", "photos/a.png", None, "", "photos/none.png"]
    source = parquet(
        tmp_path / "list.PARQUET", url=keys, etag=["one", None, "", "two", "x", "x", "three"],
        size=[7, 8, 9, 10, 1, 1, None], other=[0] * 7,
    )  # fmt: skip
    rows = rows_of(Corpus(source=source))
    assert {key: (row["etag"], row["size"]) for key, row in rows.items()} == {
        "photos/a.png": ("given:one", 7),
        "photos/none.png": ("given:three", 0),
        "photos/sub/b.jpg": (storage.content_etag(b"bytes of sub/b.jpg"), 18),
        "photos/sub/c d.TIF": (storage.content_etag(b"bytes of sub/c d.TIF"), 20),
    }
    assert sorted(asked) == ["b.jpg", "c d.TIF"]
    (photos / "a.png").write_bytes(b"other")
    (photos / "sub/b.jpg").write_bytes(b"other")
    corpus = Corpus(source=source)
    assert fetched(corpus, rows["photos/a.png"]) == b"other"  # a change mark, and nothing to verify by
    assert fetched(corpus, rows["photos/sub/b.jpg"]) == ("read", "source_changed")


def test_rows_without_a_uri_are_said(tmp_path, capsys):
    rows_of(Corpus(source=parquet(tmp_path / "l.parquet", uri=["a", None, ""])))
    assert "2 rows of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()], ids=str)
def test_text_of_any_arrow_kind_is_read(tmp_path, kind):
    source = str(tmp_path / "l.parquet")
    pq.write_table(
        pa.table({"uri": pa.array(["b", "a", "b"]).cast(kind), "size": pa.array([1, 2, 3], pa.int32())}), source
    )
    assert list(rows_of(Corpus(source=source))) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("gone.txt", None, "must be a list file that exists"),
        ("folder.parquet", "folder", "must be a list file that exists"),
        ("text.parquet", b"a.png\n", "must be a Parquet file"),
        ("other.parquet", {"path": ["a"]}, "must have a column uri or url"),
        ("size.parquet", {"uri": ["a"], "size": ["large"]}, "whole numbers as size"),
    ],
)
def test_what_is_no_list_is_a_persons_mistake(tmp_path, name, content, match):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, dict):
        parquet(path, **content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        Corpus(source=str(path)).listing()


def test_a_list_longer_than_a_batch_is_whole_and_never_all_python_objects(tmp_path, monkeypatch):
    count = 200_000
    keys = [f"s3://bucket/{i:07d}.png" for i in random.Random(2).sample(range(count), count)]
    given = parquet(tmp_path / "l.parquet", uri=keys + keys[:10], etag=["e"] * (count + 10), size=[5] * (count + 10))
    lines = text(tmp_path / "l.txt", *keys, *keys[:10])
    for source in (given, lines):
        monkeypatch.setattr(lists, "_ask", lambda listing, _: listing)
        tracemalloc.start()
        found = Corpus(source=source).listing()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found["key"].equals(pa.chunked_array([sorted(keys)]))
        assert peak < 16 * 2**20  # 200,000 names as str are 15 MiB and their list 2 more; a batch is a third


TWINS = "{folder}{stem}x4{suffix}"


@pytest.fixture
def twins(photos, tmp_path, capsys):
    folder = tmp_path / "lr"
    for key in ("ax4.png", "sub/bx4.jpg", "lonely.png", "sub/other.png"):
        storage.publish(storage.join(str(folder), key), f"lr {key}".encode())
    return Corpus(source=str(photos), lr_source=str(folder), lr_name=TWINS), folder


def test_twins_are_found_by_their_names_and_orphans_are_counted(twins, photos, capsys):
    corpus, _ = twins
    rows = rows_of(corpus)
    hr, lr = storage.content_etag(b"bytes of a.png"), storage.content_etag(b"lr ax4.png")
    assert (rows["a.png"]["etag"], rows["a.png"]["size"]) == (f"{hr}+{lr}", 14 + 10)
    assert capsys.readouterr().err.count("2 of 4 objects") == 1
    for key in ("a.png", "sub/b.jpg"):
        assert fetched(corpus, rows[key]) == f"bytes of {key}".encode()
        assert fetched(corpus, rows[key], twin=True) == f"lr {key.replace('.', 'x4.')}".encode()
    hr = storage.content_etag(b"bytes of line\nbreak.png")
    assert rows["line\nbreak.png"]["etag"] == f"{hr}+none"
    assert fetched(corpus, rows["line\nbreak.png"], twin=True) == ("twin", "no_twin")
    assert fetched(corpus, rows["line\nbreak.png"]) == b"bytes of line\nbreak.png"


def test_a_twin_that_comes_or_changes_changes_the_etag_and_is_verified(twins):
    corpus, folder = twins
    before = rows_of(corpus)
    (folder / "line\nbreakx4.png").write_bytes(b"now")
    (folder / "ax4.png").write_bytes(b"edited")
    after = rows_of(corpus)
    assert {key for key in before if before[key] != after[key]} == {"a.png", "line\nbreak.png"}
    assert fetched(corpus, before["a.png"], twin=True) == ("read", "source_changed")
    assert fetched(corpus, after["a.png"], twin=True) == b"edited"
    assert fetched(corpus, before["line\nbreak.png"], twin=True) == ("twin", "no_twin")
    (folder / "ax4.png").unlink()
    assert fetched(corpus, after["a.png"], twin=True) == ("read", "missing")


def test_etags_with_a_plus_and_a_percent_of_their_own_come_back_whole(photos, monkeypatch):
    table = pa.table([["k.png"], ["a+b%2B+"], [1]], schema=LISTING_SCHEMA)
    monkeypatch.setattr(module, "list_table", lambda *_, **__: table)
    asked = []
    monkeypatch.setattr(storage, "stream_listed", lambda uri, etag: asked.append(etag) or iter([b"x"]))
    corpus = Corpus(source="s3://hr", lr_source="s3://lr")
    (row,) = rows_of(corpus).values()
    assert fetched(corpus, row) == fetched(corpus, row, twin=True) == b"x" and set(asked) == {"a+b%2B+"}


def test_every_field_of_a_twins_name_is_of_the_hr_key():
    for template, key, expected in (
        ("{key}", "f/a.b.png", "f/a.b.png"),
        ("{folder}LR/{stem}_x2.tif", "f/g/a.b.png", "f/g/LR/a.b_x2.tif"),
        ("{folder}{stem}", ".hidden", ".hidden"),
        ("x/{stem}{suffix}{suffix}", "top.png", "x/top.png.png"),
        ("{{{stem}}}", "{key}.png", "{{key}}"),
    ):
        assert module._twin_key(template, key) == expected


@pytest.mark.parametrize(
    "name", ["{name}", "{}", "{0}", "{key.__class__}", "{key!r}", "{stem:>9}", "{key", "same.png", ""]
)
def test_a_wrong_template_is_refused_at_once(name):
    with pytest.raises(ValueError, match="lr_name.*must be.*folder"):
        Corpus(source="hr", lr_source="lr", lr_name=name)


@pytest.mark.parametrize("places", [("list.txt", "lr"), ("hr", "list.parquet")])
def test_lists_have_no_twins(places):
    with pytest.raises(ValueError, match="where there is an lr_source"):
        Corpus(source=places[0], lr_source=places[1])


def test_no_images_have_no_twins(tmp_path):
    (tmp_path / "hr").mkdir()
    (tmp_path / "lr").mkdir()
    assert rows_of(Corpus(source=str(tmp_path / "hr"), lr_source=str(tmp_path / "lr"))) == {}


def test_a_large_object_is_a_file_for_the_time_of_the_body_and_never_in_memory(
    tmp_path, no_temporary_file_stays, monkeypatch
):
    monkeypatch.setattr(module, "SPOOL_BYTES", 4 << 20)
    content = random.Random(1).randbytes(40 << 20)
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "a.png").write_bytes(content)
    corpus = Corpus(source=str(tmp_path / "big"))
    (row,) = rows_of(corpus).values()
    tracemalloc.start()
    with corpus.fetch(row) as original:
        assert (original.digest, original.size, original.data) == (digest, len(content), None)
        assert original.head(10) == content[:10]
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
        tracemalloc.stop()
        assert not list(no_temporary_file_stays.iterdir())  # nor would a kill now leave one
        assert original.read() == content
    with pytest.raises(KeyError), corpus.fetch(row):
        raise KeyError
    (tmp_path / "big" / "a.png").write_bytes(content[::-1])  # found out at the end only, the file is there by then
    assert fetched(corpus, row) == ("read", "source_changed")


def test_an_object_of_just_the_limit_stays_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPOOL_BYTES", 1000)
    for size in (0, 1000, 1001):
        (tmp_path / f"{size}.png").write_bytes(bytes(size))
    corpus = Corpus(source=str(tmp_path))
    for key, row in rows_of(corpus).items():
        with corpus.fetch(row) as original:
            assert (original.path is None) == (key != "1001.png") and original.read() == bytes(original.size)


def test_a_full_disk_is_no_fault_of_the_object(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPOOL_BYTES", 10)
    (tmp_path / "a.png").write_bytes(bytes(100))
    corpus = Corpus(source=str(tmp_path))
    (row,) = rows_of(corpus).values()

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(OSError, match="No space"), corpus.fetch(row):
        pass


@pytest.fixture
def remote():
    """A corpus of thirty objects on memory://, of which one is gone, one changed and one larger than the others."""
    root = f"memory://{uuid.uuid4().hex}"
    for index in range(30):
        storage.publish(f"{root}/{index:02d}.png", bytes([index]) * (100 if index != 9 else 3000))
    corpus = Corpus(source=root)
    rows = list(rows_of(corpus).values())
    storage.delete(f"{root}/04.png")
    storage.publish(f"{root}/06.png", b"changed")
    yield corpus, rows
    filesystem, path = storage.open_filesystem(root)
    filesystem.rm(path, recursive=True)


def test_reading_ahead_gives_what_reading_one_by_one_gives_in_order(remote, monkeypatch):
    monkeypatch.setattr(module, "SPOOL_BYTES", 1000)
    corpus, rows = remote
    found = []
    for row, original in corpus.fetch_all(iter(rows)):
        end = original.read() if isinstance(original, Original) else (original.stage, original.reason)
        found.append((row["key"], end))
    assert found == [(row["key"], fetched(corpus, row)) for row in rows]
    assert [end for _, end in found if isinstance(end, tuple)] == [("read", "missing"), ("read", "source_changed")]


def test_what_is_ahead_is_bounded_by_number_and_by_bytes(remote, monkeypatch):
    corpus, rows = remote
    honest, begun, most = Corpus._download, [], []
    monkeypatch.setattr(Corpus, "_download", lambda self, row: begun.append(row["size"]) or honest(self, row))
    for limit, num_ahead in ((10**6, module.AHEAD), (250, 2), (1, 1)):
        monkeypatch.setattr(module, "SPOOL_BYTES", limit)
        begun.clear()
        most.clear()
        for done, _ in enumerate(corpus.fetch_all(rows)):
            threading.Event().wait(0.002)
            most.append(len(begun) - done)
        assert max(most) <= num_ahead and len(begun) == 30
        assert max(most) > 1 or num_ahead == 1


@pytest.mark.parametrize("stop", ["break", "raise"])
def test_who_leaves_early_leaves_no_file_and_no_thread(remote, monkeypatch, stop):
    monkeypatch.setattr(module, "SPOOL_BYTES", 50)
    corpus, rows = remote
    rows = [{**row, "size": 1} for row in rows]  # as a list may say: then they are spooled while they are ahead
    threads = threading.active_count()
    items = corpus.fetch_all(rows)
    with pytest.raises(KeyError):
        for _, original in items:
            assert original.path is not None
            if stop == "raise":
                raise KeyError
            items.close()
            raise KeyError
    items.close()
    assert threading.active_count() <= threads


def test_twins_are_read_ahead_too(remote):
    corpus, rows = remote
    paired = Corpus(source=corpus.source, lr_source=corpus.source)
    rows = [{**row, "etag": f"{row['etag']}+{row['etag'] if index % 2 else 'none'}"} for index, row in enumerate(rows)]
    ends = [(o.stage, o.reason) if isinstance(o, Refused) else o.read() for _, o in paired.fetch_all(rows, twin=True)]
    assert ends == [fetched(paired, row, twin=True) for row in rows]
    assert ends[0] == ("twin", "no_twin") and ends[1] == bytes([1]) * 100


def test_a_fault_of_ours_is_raised_and_no_dead_letter(remote, monkeypatch):
    monkeypatch.setattr(Corpus, "_download", lambda self, row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(remote[0].fetch_all(remote[1]))


@pytest.mark.s3
def test_lists_and_prefixes_on_s3_are_fetched_and_verified(s3: S3Server, tmp_path, monkeypatch):
    import s3fs

    monkeypatch.setattr(module, "SPOOL_BYTES", 1 << 20)
    s3fs.S3FileSystem(endpoint_url=s3.endpoint_url, use_listings_cache=False).mkdir("corpus")
    content = {f"in/{i:02d}.png": bytes([i]) * (1000 + i) for i in range(20)} | {"in/big.png": os.urandom(6 << 20)}
    for key, data in content.items():
        storage.publish(f"s3://corpus/{key}", data)
    storage.publish("s3://corpus/in/list.txt", "\n".join([*(k[3:] for k in content), "gone.png"]).encode())
    prefix, listed = Corpus(source="s3://corpus/in"), Corpus(source="s3://corpus/in/list.txt")
    rows = rows_of(prefix)
    assert rows == {key: row for key, row in rows_of(listed).items() if key != "gone.png"} and len(rows) == 21
    for corpus in (prefix, listed):
        found = {row["key"]: original.read() for row, original in corpus.fetch_all(rows.values())}
        assert found == {key[3:]: data for key, data in content.items()}
    storage.publish("s3://corpus/in/03.png", b"changed")
    storage.delete("s3://corpus/in/04.png")
    assert fetched(prefix, rows["03.png"]) == ("read", "source_changed")
    assert fetched(listed, rows["04.png"]) == ("read", "missing")
    assert fetched(listed, rows_of(listed)["gone.png"]) == ("read", "missing")
