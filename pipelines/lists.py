"""Lists of URIs as the source of a job: a text or a Parquet file becomes a listing. Streamed, in Arrow batches."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import check
from pipelines.engine import say
from pipelines.ledger import LISTING_SCHEMA

GIVEN = "given:"  # before an etag that the list gives: it tells a change, and is nothing to verify by
UNREADABLE = "unreadable"
BATCH = 65_536
NUM_ASKERS = 16


def is_list(source: str) -> bool:
    """Return whether a source is a list by its name."""
    return source.lower().endswith((".txt", ".parquet"))


def read_list(source: str, *, uri_of: Callable[[str], str]) -> pa.Table:
    """Return LISTING_SCHEMA of a list, sorted by key, the first of each key.

    What the list does not tell is asked from the store that uri_of (which may raise ValueError) names for a key; the
    etag is UNREADABLE where it has no answer. Raises ValueError for what is no such list.
    """
    rule = "must be a list file that exists (a folder must not end in .txt or .parquet)"
    check(storage.exists(source), "source", source, rule, "correct it")
    batches = _parquet if source.lower().endswith(".parquet") else _text
    with storage.open_file(source) as file:
        listing = pa.Table.from_batches(batches(file, source), schema=LISTING_SCHEMA)
    return _ask(_first_of_each(listing), uri_of)


def _text(file: IO[bytes], _: str) -> Iterator[pa.RecordBatch]:
    """Yield keys in the order of the lines; bytes that are not UTF-8 are escaped as `list_table` does it."""
    lines = (line.rstrip(b"\r\n") for line in file)  # no splitlines: a name may hold any other line break
    first = (line.removeprefix(b"\xef\xbb\xbf") for line in itertools.islice(lines, 1))
    named = (line for line in itertools.chain(first, lines) if line.strip() and not line.startswith(b"#"))
    texts = (line.decode(errors="surrogateescape").encode(errors="backslashreplace").decode() for line in named)
    while keys := list(itertools.islice(texts, BATCH)):
        unknown = [pa.nulls(len(keys), field.type) for field in LISTING_SCHEMA][1:]
        yield pa.record_batch([pa.array(keys, pa.string()), *unknown], schema=LISTING_SCHEMA)


def _parquet(file: IO[bytes], source: str) -> Iterator[pa.RecordBatch]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"source ({source}) must be a Parquet file; correct it: {error}") from None
    names = table.schema_arrow.names
    check(
        "uri" in names or "url" in names, "source", source, f"must have a column uri or url, it has {names}", "add one"
    )
    column = "uri" if "uri" in names else "url"
    columns = [name for name in (column, "etag", "size") if name in names]
    twice = [name for name in columns if names.count(name) > 1]
    check(not twice, "source", source, f"must have each column once, it has {twice} more often", "rename the others")
    nameless = 0
    for batch in _batches(table, columns, source):
        try:
            keys = pc.cast(batch[column], pa.string())
            etags = pc.cast(batch["etag"], pa.string()) if "etag" in columns else pa.nulls(len(keys), pa.string())
            sizes = pc.cast(batch["size"], pa.int64()) if "size" in columns else pa.nulls(len(keys), pa.int64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            rule = f"must hold text as {column} and etag, and whole numbers as size"
            raise ValueError(f"source ({source}) {rule}; correct it: {error}") from None
        given = pc.if_else(pc.equal(etags, ""), None, pc.binary_join_element_wise(GIVEN, etags, ""))
        sizes = pc.if_else(pc.less(sizes, 0), None, sizes)
        named = pc.fill_null(pc.not_equal(keys, ""), False)
        nameless += len(keys) - named.true_count
        yield pa.record_batch([keys, given, sizes], schema=LISTING_SCHEMA).filter(named)
    if nameless:
        say(f"{nameless} rows of {source} have no {column} and are left out")


def _batches(table: pq.ParquetFile, columns: list[str], source: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from table.iter_batches(BATCH, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"source ({source}) must be a whole Parquet file; copy it again: {error}") from None


def _first_of_each(listing: pa.Table) -> pa.Table:
    ordered = listing.sort_by("key")  # a stable sort
    if ordered.num_rows < 2:
        return ordered
    new = pc.not_equal(ordered["key"].slice(1), ordered["key"].slice(0, ordered.num_rows - 1))
    return ordered.filter(pa.chunked_array([pa.array([True]), *new.chunks]))


def _ask(listing: pa.Table, uri_of: Callable[[str], str]) -> pa.Table:
    """Return the listing with what the list did not tell."""

    def look_up(key: str, given: str | None) -> storage.StoredObject:
        try:
            uri = uri_of(key)
            return storage.look_up(uri) if given is None else storage.StoredObject(key, given, storage.size(uri) or 0)
        except (OSError, ValueError, ImportError):  # as storage.look_up; a worker will say what is wrong with it
            return storage.StoredObject(key, given or UNREADABLE, 0)

    batches = []
    with ThreadPoolExecutor(NUM_ASKERS) as pool:
        for batch in listing.to_batches(max_chunksize=BATCH):
            unknown = pc.or_(pc.is_null(batch["etag"]), pc.is_null(batch["size"]))
            if unknown.true_count:
                ask = batch.filter(unknown)
                found = list(pool.map(look_up, ask["key"].to_pylist(), ask["etag"].to_pylist()))
                etags = pc.replace_with_mask(batch["etag"], unknown, pa.array([item.etag for item in found]))
                sizes = pc.replace_with_mask(batch["size"], unknown, pa.array([item.size for item in found]))
                batch = pa.record_batch([batch["key"], etags, sizes], schema=LISTING_SCHEMA)
            batches.append(batch)
    return pa.Table.from_batches(batches, schema=LISTING_SCHEMA)
