"""What a job reads: a folder or prefix of objects, or a list of URIs; with LR twins beside it where they are real.

A listing says what there is (key, etag, size); `fetch` gives the bytes of one row of it, or a refusal that says why
not. A list names its objects, so nothing in it is passed over: what is missing, or no image, ends as a dead letter.
"""

import hashlib
import os
import string
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from pipelines import storage
from pipelines.config import check
from pipelines.engine import say
from pipelines.images import SUFFIXES, Refused
from pipelines.ledger import LISTING_SCHEMA, list_table
from pipelines.lists import GIVEN, is_list, read_list

SPOOL_BYTES = 32 * 2**20  # larger objects lie in a temporary file; also the most that is read ahead
AHEAD = 8  # objects from a store: 10 to 30 ms each are spent waiting
BATCH = 65_536
NO_TWIN = "none"
PROTOCOLS = frozenset({"local", "file", "s3", "s3a", "gs", "gcs", "az", "abfs", "memory"})  # files and object stores
FIELDS = ("key", "folder", "stem", "suffix")
Row = dict[str, Any]


class Original(NamedTuple):
    """The content of one object: SHA-256 in hexadecimal, size in bytes, and the bytes, or above SPOOL_BYTES the path of
    a temporary file (/dev/fd/...), which lives as long as the fetch."""

    digest: str
    size: int
    data: bytes | None
    path: str | None

    def read(self) -> bytes:
        """Return the whole content."""
        return self.head(self.size)

    def head(self, count: int) -> bytes:
        """Return the first `count` bytes, fewer where there are no more."""
        if self.data is not None:
            return self.data[:count]
        with open(str(self.path), "rb") as file:
            return file.read(count)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The objects of one job.

    source: a folder or prefix, of which every image is taken, or a list, of which every URI is: a text (`.txt`, one a
    line; blank lines and those that begin with # are none) or a Parquet file (`.parquet`, column `uri` or `url`, and
    `etag` and `size` where they are known). A relative path in a list is relative to the list.
    lr_source, lr_name: the folder or prefix of LR twins, and the key of a twin in it, made of {key}, {folder} ("" or
    with its slash), {stem} and {suffix} (with its dot) of the HR key. Raises ValueError.
    """

    source: str
    lr_source: str = ""
    lr_name: str = "{key}"

    def __post_init__(self) -> None:
        remedy = f"use some of {', '.join(f'{{{name}}}' for name in FIELDS)}, like {{folder}}{{stem}}x4.png"
        try:
            parts = [part[1:] for part in string.Formatter().parse(self.lr_name) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"lr_name ({self.lr_name!r}) must be a template ({error}); {remedy}") from None
        known = all(name in FIELDS and not spec and not conversion for name, spec, conversion in parts)
        check(known and bool(parts), "lr_name", self.lr_name, "must be made of what it knows of an HR key", remedy)
        for name in ("source", "lr_source"):
            check(not (self.lr_source and is_list(getattr(self, name))), name, getattr(self, name),
                  "must be a folder or prefix where there is an lr_source", "lists have no twins")  # fmt: skip

    def listing(self) -> pa.Table:
        """Return LISTING_SCHEMA, sorted by key, each key once; raises ValueError for a source that is not there.

        With twins the etag is "<hr>+<lr>", or "<hr>+none" where there is no twin, and the size is that of both. What
        of a list cannot be looked up has the etag "unreadable"; an etag that the list gives is "given:<etag>".
        """
        if is_list(self.source):
            return read_list(self.source, uri_of=self._uri)
        listing = list_table(self.source, suffixes=SUFFIXES)
        return self._with_twins(listing) if self.lr_source else listing

    @contextmanager
    def fetch(self, row: Row) -> Iterator[Original]:
        """Give the content of a listed row for the time of the body. Raises Refused("read", ...)."""
        with _lent(self._download(row)) as original:
            yield original

    @contextmanager
    def fetch_twin(self, row: Row) -> Iterator[Original]:
        """`fetch` the LR twin of a listed row. Raises Refused("twin", "no_twin", ...) where the listing found none."""
        with _lent(self._download_twin(row)) as original:
            yield original

    def fetch_all(self, rows: Iterable[Row], *, twin: bool = False) -> Iterator[tuple[Row, Original | Refused]]:
        """Yield each row with its content, or its twin's, or the refusal, in order; close it to leave early.

        What was yielded lives until the next is asked for. Objects of a store are read ahead: at most AHEAD of them,
        and SPOOL_BYTES by the sizes that were listed.
        """
        download = self._download_twin if twin else self._download
        place = self.lr_source if twin else self.source
        local = not is_list(place) and isinstance(storage.open_filesystem(place)[0], LocalFileSystem)
        with closing(_ahead(download, iter(rows), num_ahead=0 if local else AHEAD)) as fetched:
            for row, original in fetched:
                if isinstance(original, Refused):
                    yield row, original
                    continue
                with _lent(original):
                    yield row, original

    def _uri(self, key: str) -> str:
        """Return where the object of a key lies. Raises ValueError for a key that names none of ours."""
        if not is_list(self.source):
            return storage.join(self.source, key)
        protocol, separator, _ = key.partition("://")
        if not separator or "/" in protocol:
            folder = self.source.rpartition("/")[0]
            if os.path.isabs(key):
                return key
            return storage.join(folder, key) if "://" in folder else os.path.join(folder, key)
        if protocol not in PROTOCOLS or "::" in key:
            raise ValueError(f"{key!r}: must be a path or a plain URI of {', '.join(sorted(PROTOCOLS))}; copy it there")
        return key

    def _download(self, row: Row) -> Original:
        etag, key = row["etag"], row["key"]
        if self.lr_source:
            etag = unquote(etag.partition("+")[0])
        with reading(key):
            uri = self._uri(key)
        return _download(key, uri, None if is_list(self.source) and etag.startswith(GIVEN) else etag)

    def _download_twin(self, row: Row) -> Original:
        key, (_, _, etag) = _twin_key(self.lr_name, row["key"]), row["etag"].partition("+")
        if etag == NO_TWIN:
            raise Refused("twin", "no_twin", f"{row['key']!r} has no LR twin: {key!r} is not in {self.lr_source}")
        with reading(key):
            uri = storage.join(self.lr_source, key)
        return _download(key, uri, unquote(etag))

    def _with_twins(self, listing: pa.Table) -> pa.Table:
        twins = list_table(self.lr_source, suffixes=SUFFIXES)
        keys = [
            pa.array([_twin_key(self.lr_name, key) for key in batch["key"].to_pylist()], pa.string())
            for batch in listing.to_batches(max_chunksize=BATCH)
        ]
        names = pa.chunked_array(keys, pa.string())
        place = pc.index_in(names, value_set=twins["key"])
        etags = pc.fill_null(_quoted(twins["etag"]).take(place), NO_TWIN)
        sizes = pc.fill_null(twins["size"].take(place), 0)
        orphans = twins.num_rows - len(pc.unique(place.drop_null()))
        if orphans:
            say(f"{orphans} of {twins.num_rows} objects in {self.lr_source} are the LR twin of no HR object")
        joined = pc.binary_join_element_wise(_quoted(listing["etag"]), etags, "+")
        return pa.table([listing["key"], joined, pc.add(listing["size"], sizes)], schema=LISTING_SCHEMA)


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Turn what a store raises when it does not give what was listed into Refused("read", ...)."""
    try:
        yield
    except FileNotFoundError:
        if "\\udc" in key:  # as list_table wrote it
            raise Refused("read", "name_not_utf8", f"{key!r}: its name is no UTF-8; rename it") from None
        raise Refused("read", "missing", f"{key!r} was listed and is not there") from None
    except storage.Changed as error:
        raise Refused("read", "source_changed", f"{error}; the next run takes the new content") from None
    except storage.TransientError as error:  # all tries failed: it is work again the next night
        raise Refused("read", "io_transient", f"{key!r}: {error}") from None
    except (OSError, ImportError) as error:  # ImportError: fsspec has no package for this protocol here
        raise Refused("read", "io_error", f"{key!r}: {error}") from None
    except ValueError as error:  # a name that storage does not take, as S3 allows "a/../b"
        raise Refused("read", "bad_name", str(error)) from None


def read_source(source: str, row: Row) -> bytes:
    """Return the bytes of an object listed below `source`. Raises Refused when the store does not give what was."""
    with reading(row["key"]):
        return storage.read_listed(storage.join(source, row["key"]), row["etag"])


def _twin_key(template: str, key: str) -> str:
    folder, slash, name = key.rpartition("/")
    stem, suffix = os.path.splitext(name)
    return template.format(key=key, folder=folder + slash, stem=stem, suffix=suffix)


def _quoted(etags: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return etags without a "+" of their own: stores may answer base64."""
    return pc.replace_substring(pc.replace_substring(etags, "%", "%25"), "+", "%2B")


def _download(key: str, uri: str, etag: str | None) -> Original:
    """Return the content of an object; what it may have left on the disk is the caller's. Raises Refused."""

    def pieces() -> Iterator[bytes]:
        with reading(key):
            yield from storage.stream_listed(uri, etag)

    digest, size, held = hashlib.sha256(), 0, []
    stream = pieces()
    for piece in stream:
        digest.update(piece)
        size += len(piece)
        held.append(piece)
        if size > SPOOL_BYTES:
            break
    else:
        return Original(digest.hexdigest(), size, b"".join(held), None)
    descriptor, name = tempfile.mkstemp(prefix="diffsr-")
    os.unlink(name)  # it lives as long as the descriptor: a process that is killed leaves nothing behind
    try:
        with open(descriptor, "wb", closefd=False) as file:  # a full disk is no fault of the object, and ends the job
            for piece in held:
                file.write(piece)
            held.clear()
            for piece in stream:
                digest.update(piece)
                size += len(piece)
                file.write(piece)
    except BaseException:
        os.close(descriptor)
        raise
    return Original(digest.hexdigest(), size, None, f"/dev/fd/{descriptor}")


@contextmanager
def _lent(original: Original) -> Iterator[Original]:
    try:
        yield original
    finally:
        if original.path is not None:
            os.close(int(original.path.rpartition("/")[2]))


def _ahead(
    download: Callable[[Row], Original], rows: Iterator[Row], *, num_ahead: int
) -> Generator[tuple[Row, Original | Refused], None, None]:
    """Yield what `download` gives for each row, in order; num_ahead 0: in this thread, when it is asked for."""

    def attempt(row: Row) -> Original | Refused:
        try:
            return download(row)
        except Refused as refused:
            return refused

    if not num_ahead:
        for row in rows:
            yield row, attempt(row)
        return
    pending: deque[tuple[Row, Future[Original | Refused]]] = deque()
    pool = ThreadPoolExecutor(num_ahead)
    try:
        upcoming = next(rows, None)
        while pending or upcoming is not None:
            while upcoming is not None and len(pending) < num_ahead:
                if pending and sum(row["size"] for row, _ in pending) + upcoming["size"] > SPOOL_BYTES:
                    break
                pending.append((upcoming, pool.submit(attempt, upcoming)))
                upcoming = next(rows, None)
            row, future = pending.popleft()
            yield row, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for _, future in pending:
            with suppress(
                Exception
            ):  # cancelled, or failed: it was not asked for; only what it left on the disk matters
                if isinstance(left := future.result(), Original):
                    with _lent(left):
                        pass
