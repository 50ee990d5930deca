"""Receipts of a night that never was, for the tests of its account, its pictures and its run."""

import pyarrow as pa

from pipelines.ledger import RECEIPT_SCHEMA, Receipt

GIVEN = {
    "run_id": "upscale-1",
    "unchanged": 7,
    "stopped": "",
    "left": 0,
    "seconds": 100.0,
    "num_workers": 2,
    "device_hour_price": 3.6,
    "recipe": "f00d",
    "model": {"name": "nano", "version": "3", "digest": "d1"},
    "settings": {"sampler": "ddim", "seed": 0},
}


def table(receipts: list[Receipt]) -> pa.Table:
    columns = {
        field.name: pa.array(
            [list(r.metrics.items()) if field.name == "metrics" else getattr(r, field.name) for r in receipts],
            field.type,
        )
        for field in RECEIPT_SCHEMA
    }
    return pa.table(columns, schema=RECEIPT_SCHEMA)


def done(key: str, *, reason: str = "", seconds: float = 1.0, etag: str = "e", **metrics: float) -> Receipt:
    return Receipt(
        key=key, etag=etag, size=100, recipe="f00d", status="done", out_key=key, out_bytes=1000, reason=reason,
        message=f"{key} is odd" if reason else "", metrics=metrics, seconds=seconds, run_id="upscale-1",
    )  # fmt: skip


def dead(key: str, stage: str, reason: str, message: str = "") -> Receipt:
    return Receipt(key=key, etag="e", size=9, recipe="f00d", status="dead", stage=stage, reason=reason, message=message)


def skipped(key: str, reason: str) -> Receipt:
    return Receipt(key=key, etag="e", size=9, recipe="f00d", status="skipped", stage="list", reason=reason)
