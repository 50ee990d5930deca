"""What happened to every asset: plans and receipts. Everything lies under `<output>/_diffsr/`.

    plans/<id>.parquet      work that was decided on; one row group per unit; deleted when it is committed
    ledger/<fence>-<n>.parquet   receipts, append-only; the latest row of a key is the truth; compacted now and then

The object is written before its receipt. A kill between the two redoes an idempotent write (law 2).
"""

import io
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage

RECEIPT_SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("key", "etag")],
        ("size", pa.int64()),
        *[(name, pa.string()) for name in ("recipe", "model", "status", "out_key", "out_sha256")],
        ("out_bytes", pa.int64()),
        ("metrics", pa.map_(pa.string(), pa.float64())),
        ("attempts", pa.int32()),
        *[(name, pa.string()) for name in ("stage", "reason", "message")],
        ("started", pa.float64()),
        ("seconds", pa.float64()),
        *[(name, pa.string()) for name in ("run_id", "unit_id")],
        ("fence", pa.int64()),
    ]
)
LISTING_SCHEMA = pa.schema([("key", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
PLAN_SCHEMA = pa.schema([("unit_id", pa.string()), *LISTING_SCHEMA, ("attempts", pa.int32())])
SEGMENT = re.compile(r"\d{10}-\d{6}\.parquet")  # a stray file of some desktop is no segment
OUTPUT_LOST = "output_lost"  # written by verify; the next run redoes the asset
GONE = "gone"  # a source that is listed no more: it leaves the set, and is work again when it comes back
LEAST_BYTES = 2**14  # that an object counts in a unit: each has its cost, and 200,000 tiny ones are many units
MAX_SEGMENTS = 64
NUM_READERS = 8
ROW_GROUP_ROWS = 2**16
HISTORY = ("key", "recipe", "model", "out_key")  # what a compaction keeps the latest receipt of


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One ledger row. started is Unix seconds; a dead or skipped asset says stage, reason and message."""

    key: str
    etag: str
    size: int
    recipe: str
    model: str = ""
    status: Literal["done", "skipped", "dead"]
    out_key: str = ""
    out_sha256: str = ""
    out_bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    attempts: int = 1
    stage: str = ""
    reason: str = ""
    message: str = ""
    started: float = 0.0
    seconds: float = 0.0
    run_id: str = ""
    unit_id: str = ""
    fence: int = 0


class Ledger:
    """The ledger of one output. Reading needs no lease; appending does."""

    def __init__(self, output: str) -> None:
        self.root = storage.join(output, "_diffsr")

    def segments(self) -> list[str]:
        """Return the segments' URIs, oldest first: fences and counters are zero-padded, so names sort by time."""
        folder = storage.join(self.root, "ledger")
        return [storage.join(folder, name) for name in storage.list_names(folder) if SEGMENT.fullmatch(name)]

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return every receipt, oldest first, with its position in column `order`; of the given columns, all if None.

        Raises OSError where the segments do not stay for the time of one reading.
        """
        names = list(columns) if columns is not None else RECEIPT_SCHEMA.names
        schema = pa.schema([RECEIPT_SCHEMA.field(name) for name in names])
        for _ in range(10):
            uris = self.segments()
            try:
                with ThreadPoolExecutor(NUM_READERS) as pool:
                    tables = list(pool.map(partial(_read_segment, columns=names), uris))
            except FileNotFoundError:  # compacted under our hands
                continue
            if self.segments() == uris:  # a listing that runs beside a compaction may show neither old nor new
                table = pa.concat_tables(tables) if tables else schema.empty_table()
                return table.append_column("order", pa.array(np.arange(table.num_rows, dtype=np.int64)))
        raise OSError(f"the segments of {self.root} change faster than they are read; try again when its run has ended")

    def of_run(self, run_id: str, *, fence: int) -> pa.Table:
        """Return the receipts of one run, oldest first; only the newest segments are read. For the holder of fence."""
        found = [RECEIPT_SCHEMA.empty_table()]
        for table in self.newest(RECEIPT_SCHEMA.names):
            found.append(table.filter(pc.equal(table["run_id"], run_id)))
            if pc.any(pc.less(table["fence"], fence)).as_py():
                break
        rows = pa.concat_tables(found)
        return rows.take(np.arange(rows.num_rows - 1, -1, -1))

    def latest(self, columns: Sequence[str] | None = None, *, recipe: str | None = None) -> pa.Table:
        """Return the latest receipt of each key, oldest first; recipe: as if those of other recipes were not there."""
        names = list(columns) if columns is not None else RECEIPT_SCHEMA.names
        table = self.rows(list(dict.fromkeys([*names, "key", *(["recipe"] if recipe is not None else [])])))
        if recipe is not None:
            table = table.filter(pc.equal(table["recipe"], recipe))
        # Not `take`, which copies a column into one piece first.
        return table.filter(_is_last(table.select(["key", "order"]), ("key",))).select([*names, "order"])

    def newest(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the receipts in pieces, the newest first; who stops early has read no more than that.

        Raises FileNotFoundError where a compaction took the segments away meanwhile.
        """
        for uri in reversed(self.segments()):
            file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri)))
            for index in reversed(range(file.num_row_groups)):
                table = file.read_row_group(index, columns=list(columns))
                yield table.take(np.arange(table.num_rows - 1, -1, -1))

    def compact(self, *, fence: int) -> bool:
        """Put one segment in the place of more than MAX_SEGMENTS; return whether it did. For the holder of `fence`.

        It keeps the latest receipt of each (key, recipe, model, out_key): what `latest` gives with any recipe, and
        every object that was ever named, in the order of the originals. Its name sorts behind theirs, and they go only
        when it is there: killed in between, it hides what is left of them, and nothing reads differently.
        """
        uris = self.segments()
        newest = uris[-1].rpartition("/")[2] if uris else ""
        if len(uris) <= MAX_SEGMENTS or int(newest.partition("-")[0]) > fence:  # a newer holder's: not ours to compact
            return False
        keep = _is_last(self.rows(HISTORY), HISTORY)
        sink, start = io.BytesIO(), 0
        with pq.ParquetWriter(sink, RECEIPT_SCHEMA, compression="zstd") as writer:
            for uri in uris:  # one by one: the messages and metrics of all at once would take gigabytes
                table = _read_segment(uri, columns=RECEIPT_SCHEMA.names)
                writer.write_table(table.filter(keep.slice(start, table.num_rows)), row_group_size=ROW_GROUP_ROWS)
                start += table.num_rows
        self._publish(sink, fence=fence, number=self.next_number(fence))
        for uri in uris:
            storage.delete(uri)
        return True

    def next_number(self, fence: int) -> int:
        """Return the first number that no segment of this fence has."""
        names = [uri.rpartition("/")[2].removesuffix(".parquet").split("-") for uri in self.segments()]
        return 1 + max((int(number) for of, number in names if int(of) == fence), default=-1)

    def append(self, receipts: Sequence[Receipt], *, fence: int, number: int) -> None:
        """Write one segment. Its name is (fence, number), so two writers can never write the same one."""
        columns = {name: [getattr(r, name) for r in receipts] for name in RECEIPT_SCHEMA.names if name != "metrics"}
        columns["metrics"] = [list(r.metrics.items()) for r in receipts]
        table = pa.table([pa.array(columns[f.name], f.type) for f in RECEIPT_SCHEMA], schema=RECEIPT_SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)
        self._publish(sink, fence=fence, number=number)

    def _publish(self, sink: io.BytesIO, *, fence: int, number: int) -> None:
        storage.publish(storage.join(self.root, "ledger", f"{fence:010d}-{number:06d}.parquet"), sink.getvalue())


def _read_segment(uri: str, *, columns: Sequence[str]) -> pa.Table:
    source = pa.BufferReader(storage.read_bytes(uri))
    return pq.read_table(source, columns=list(columns), schema=RECEIPT_SCHEMA, use_threads=False)


def _is_last(table: pa.Table, by: Sequence[str]) -> pa.ChunkedArray:
    """Return for each row (bool) whether it is the last one of its group."""
    last = table.group_by(list(by)).aggregate([("order", "max")])["order_max"]
    return pc.is_in(table["order"], value_set=last)


def list_table(source: str, *, suffixes: frozenset[str] | None = None) -> pa.Table:
    """Return (key, etag, size) of every object below the source; it never holds them as Python objects all at once.

    A local name that is not UTF-8 is listed with its bytes escaped (`\\udcff`), as Parquet could not hold it: reading
    it then ends in a dead letter of its own, and the job goes on.
    """
    batches = []
    buffer: list[storage.StoredObject] = []

    def flush() -> None:
        keys = [o.key.encode(errors="backslashreplace").decode() for o in buffer]
        columns = [keys, [o.etag for o in buffer], [o.size for o in buffer]]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, LISTING_SCHEMA, strict=True)]
        batches.append(pa.record_batch(arrays, schema=LISTING_SCHEMA))
        buffer.clear()

    for item in storage.list_objects(source, suffixes=suffixes):
        buffer.append(item)
        if len(buffer) == 65_536:
            flush()
    flush()
    return pa.Table.from_batches(batches, schema=LISTING_SCHEMA).sort_by("key")


def pack(work: pa.Table, *, recipe: str, model: str, unit_bytes: int) -> Iterator[pa.Table]:
    """Yield units: consecutive rows of the sorted work, closed when they reach unit_bytes; PLAN_SCHEMA.

    work: key, etag, size, attempts.

    Each object counts at least LEAST_BYTES. A unit's id is a hash of its (key, etag) rows, the recipe and the model:
    it does not depend on the cluster.
    """
    ends = np.cumsum(np.maximum(work["size"].to_numpy(), LEAST_BYTES))
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = min(int(np.searchsorted(ends, before + unit_bytes)) + 1, len(ends))
        rows = work.slice(start, stop - start).select(["key", "etag", "size", "attempts"]).combine_chunks()
        hasher = blake2b(f"{recipe}\0{model}\0".encode(), digest_size=12)
        hasher.update("".join(pc.binary_join_element_wise(rows["key"], rows["etag"], "", "\0").to_pylist()).encode())
        yield rows.add_column(0, "unit_id", pa.repeat(hasher.hexdigest(), rows.num_rows))
        start = stop


class Plan:
    """A persisted plan: its URI, the unit ids by row group, what it was made for, and the fence of who made it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        data = storage.read_bytes(uri)
        self.file = pq.ParquetFile(io.BytesIO(data))
        metadata = self.file.schema_arrow.metadata or {}
        self.recipe, self.model = metadata[b"recipe"].decode(), metadata[b"model"].decode()
        self.fence = int(metadata[b"fence"])

    @property
    def root(self) -> str:
        """The `_diffsr` folder that the plan lies in."""
        return self.uri.rpartition("/plans/")[0]

    @property
    def num_units(self) -> int:
        """Number of units (row groups)."""
        return int(self.file.num_row_groups)

    def num_assets(self, indices: Iterable[int]) -> int:
        """Number of assets in these units."""
        return sum(int(self.file.metadata.row_group(index).num_rows) for index in indices)

    def unit(self, index: int) -> list[dict[str, Any]]:
        """Return unit `index` as rows of PLAN_SCHEMA."""
        rows: list[dict[str, Any]] = self.file.read_row_group(index).to_pylist()
        return rows

    def unit_ids(self) -> list[str]:
        """Return the id of each unit, by index."""
        ids, metadata = self.file.read(columns=["unit_id"])["unit_id"], self.file.metadata
        ends = np.cumsum([metadata.row_group(index).num_rows for index in range(self.num_units)], dtype=np.int64)
        return list(ids.take(pa.array(ends - 1)).to_pylist())


def save_plan(ledger: Ledger, units: Iterable[pa.Table], *, recipe: str, model: str, fence: int) -> Plan:
    """Write a plan, one row group per unit, and return it. The name is random: a plan is found by listing.

    fence: of the lease that it is made under. Only receipts from then on tell which of its units are done, as after
    a -> b -> a a unit has the id of one that was done long ago.
    """
    sink = io.BytesIO()
    schema = PLAN_SCHEMA.with_metadata({"recipe": recipe, "model": model, "fence": str(fence)})
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for unit in units:
            writer.write_table(unit.cast(PLAN_SCHEMA).replace_schema_metadata(schema.metadata))
    uri = storage.join(ledger.root, "plans", f"{uuid.uuid4().hex}.parquet")
    storage.publish(uri, sink.getvalue())
    return Plan(uri)


def units_left(plan: Plan, ledger: Ledger) -> list[int]:
    """Return the indices of the units without a receipt since the plan was made."""
    rows = ledger.rows(["unit_id", "fence"])
    ended = pc.unique(rows.filter(pc.greater_equal(rows["fence"], plan.fence))["unit_id"])
    left = pc.invert(pc.is_in(pa.array(plan.unit_ids(), pa.string()), value_set=ended))
    return [int(index) for index in pc.indices_nonzero(left).to_pylist()]


def open_plans(ledger: Ledger) -> list[Plan]:
    """Return the plans that were not committed."""
    folder = storage.join(ledger.root, "plans")
    return [Plan(storage.join(folder, name)) for name in storage.list_names(folder) if name.endswith(".parquet")]
