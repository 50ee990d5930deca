"""One shard of a pair set: a Parquet file that is written row group by row group and published whole.

Memory is one row group, whatever the unit. Blobs are stored uncompressed, as they are compressed already; statistics
are kept of scalar columns only. The same rows give the same bytes.
"""

import hashlib
import json
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.manifest import FORMAT, PAIR_SCHEMA

ROW_GROUP_BYTES = 16 * 2**20
BLOBS = ("hr", "lr")
_REPEATED = ["source_key", "source_etag", "hr_codec", "lr_codec", "degradation", "split"]
_REPEATED += ["hr_dtype", "source_format", "source_profile"]
_NESTED = {"crop": ("y", "x", "h", "w"), **{name: ("list.element",) for name in ("mean", "deviation", "histogram")}}


class Published(NamedTuple):
    """A shard that is in its place."""

    sha256: str
    bytes: int


class ShardWriter:
    """A context manager: `add` rows of PAIR_SCHEMA, then `publish`. What was not published leaves nothing behind."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        # Without a name: a process that is killed leaves nothing behind.
        self._file = TemporaryFile(prefix="diffsr-")  # noqa: SIM115
        self._schema = PAIR_SCHEMA.with_metadata(
            {"diffsr.format": str(FORMAT), "diffsr.recipe": json.dumps(recipe, sort_keys=True)}
        )
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self.num_rows = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
        self._file.close()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take rows; write a row group whenever ROW_GROUP_BYTES of blobs have come together."""
        for row in rows:
            self._rows.append(row)
            self._bytes += sum(len(row[name]) for name in BLOBS)
            self.num_rows += 1
            if self._bytes >= ROW_GROUP_BYTES:
                self._flush()

    def publish(self, uri: str) -> Published:
        """Finish the file and store it at `uri`. There must be rows."""
        self._flush()
        assert self._writer is not None, "a shard without rows is not published"
        self._writer.close()
        self._writer = None
        size = self._file.seek(0, 2)
        self._file.seek(0)
        sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._file.seek(0)
        storage.publish_file(uri, f"/dev/fd/{self._file.fileno()}")
        return Published(sha256, size)

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._file,
                self._schema,
                compression={leaf: "NONE" if leaf in BLOBS else "ZSTD" for leaf in _leaves()},
                use_dictionary=_REPEATED,
                write_statistics=[leaf for leaf in _leaves() if leaf not in BLOBS and "." not in leaf],
                write_page_checksum=True,
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), row_group_size=len(self._rows))
        self._rows, self._bytes = [], 0


def _leaves() -> list[str]:
    """Return the names that Parquet has for the columns."""
    return [f"{name}.{leaf}" if leaf else name for name in PAIR_SCHEMA.names for leaf in _NESTED.get(name, ("",))]
