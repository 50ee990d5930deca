"""What happened to every asset: plans and receipts. Everything lies under `<output>/_diffsr/`.

    plans/<id>.parquet      work that was decided on; one row group per unit; deleted when it is committed
    ledger/<fence>-<n>.parquet   receipts, append-only; the latest row of a key is the truth

The object is written before its receipt. A kill between the two redoes an idempotent write (law 2).
"""

import io
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

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
PLAN_SCHEMA = pa.schema([("unit_id", pa.string()), ("key", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
LISTING_SCHEMA = pa.schema([("key", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
SEGMENT = re.compile(r"\d{10}-\d{6}\.parquet")  # a stray file of some desktop is no segment
OUTPUT_LOST = "output_lost"  # written by verify; the next run redoes the asset


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

    def rows(self) -> pa.Table:
        """Return every receipt, oldest first, with its position in column `order`."""
        tables = [pq.read_table(io.BytesIO(storage.read_bytes(uri)), schema=RECEIPT_SCHEMA) for uri in self.segments()]
        table = pa.concat_tables(tables) if tables else RECEIPT_SCHEMA.empty_table()
        return table.append_column("order", pa.array(range(table.num_rows), pa.int64()))

    def latest(self) -> pa.Table:
        """Return the latest receipt of each key."""
        table = self.rows()
        newest = table.group_by("key").aggregate([("order", "max")])["order_max"]
        return table.take(newest.combine_chunks()).sort_by("order")

    def append(self, receipts: Sequence[Receipt], *, fence: int, number: int) -> None:
        """Write one segment. Its name is (fence, number), so two writers can never write the same one."""
        columns = {name: [getattr(r, name) for r in receipts] for name in RECEIPT_SCHEMA.names if name != "metrics"}
        columns["metrics"] = [list(r.metrics.items()) for r in receipts]
        table = pa.table([pa.array(columns[f.name], f.type) for f in RECEIPT_SCHEMA], schema=RECEIPT_SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        storage.publish(storage.join(self.root, "ledger", f"{fence:010d}-{number:06d}.parquet"), sink.getvalue())


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


def difference(listing: pa.Table, latest: pa.Table, *, recipe: str, model: str, retry_dead: bool) -> pa.Table:
    """Return the rows of the listing that are not accounted for: no latest receipt of the same etag, recipe and model.

    The latest receipt decides, not any receipt: after a -> b -> a (a source edited back, a model rolled back) the
    output holds b, so a is work again. Dead letters stay dead until `retry_dead`; a lost output is always work.
    """
    same = pc.and_(pc.equal(latest["recipe"], recipe), pc.equal(latest["model"], model))
    same = pc.and_(same, pc.not_equal(latest["reason"], OUTPUT_LOST))
    if retry_dead:
        same = pc.and_(same, pc.not_equal(latest["status"], "dead"))
    accounted = latest.filter(same).select(["key", "etag"])
    return listing.join(accounted, keys=["key", "etag"], join_type="left anti").sort_by("key")


def pack(work: pa.Table, *, recipe: str, model: str, unit_bytes: int) -> Iterator[pa.Table]:
    """Yield units: consecutive rows of the sorted work, closed when they reach unit_bytes; PLAN_SCHEMA.

    A unit's id is a hash of its (key, etag) rows, the recipe and the model: it does not depend on the cluster.
    """
    start, total = 0, 0
    sizes = work["size"].to_pylist()
    for index, size in enumerate(sizes):
        total += size
        if total >= unit_bytes or index == len(sizes) - 1:
            rows = work.slice(start, index + 1 - start)
            hasher = blake2b(f"{recipe}\0{model}\0".encode(), digest_size=12)
            for key, etag in zip(rows["key"].to_pylist(), rows["etag"].to_pylist(), strict=True):
                hasher.update(f"{key}\0{etag}\0".encode())
            unit = pa.array([hasher.hexdigest()] * rows.num_rows, pa.string())
            yield rows.select(["key", "etag", "size"]).add_column(0, "unit_id", unit).combine_chunks()
            start, total = index + 1, 0


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
        return [self.file.read_row_group(i, columns=["unit_id"])["unit_id"][0].as_py() for i in range(self.num_units)]


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


def open_plans(ledger: Ledger) -> list[Plan]:
    """Return the plans that were not committed."""
    folder = storage.join(ledger.root, "plans")
    return [Plan(storage.join(folder, name)) for name in storage.list_names(folder) if name.endswith(".parquet")]
