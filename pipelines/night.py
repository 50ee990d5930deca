"""The account of a night: what a person wants to know in the morning, from the receipts of one run.

It lies in `<output>/_diffsr/reports/<run_id>/`: summary.json, night.html and dead_letters.parquet. Reports are no
outputs: they may say when and by which run.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import receipts, storage
from pipelines.contact_sheet import draw_groups
from pipelines.engine import say
from pipelines.ledger import GONE
from pipelines.night_page import amount, duration, plural, write_night
from pipelines.publication import publish_dead_letters
from pipelines.receipts import Distribution, Failure, counts, metric, total

STAGES = ("read", "decode", "device", "encode", "publish")  # each has its seconds in a receipt's metrics
MEASURES = ("lr_psnr", "colour_drift", "uncertainty")


@dataclass(frozen=True, kw_only=True)
class Night:
    """All numbers of one run.

    inputs = done + skipped + dead, each key once, by its latest receipt; done = passed + review + rejected. gone:
    sources that are listed no more, no inputs. unchanged: assets that the ledger had before; left: work that was
    planned and not reached; stopped: why, "" where nothing was left. Bytes, megapixels (1e6 px) and the seconds per
    asset are those of what was done. seconds: wall-clock time with num_workers devices; device_s: in network calls,
    over all workers, and device_busy their share of the time that the devices were held. cost: device hours at work *
    device_hour_price; cost_held: those that were held; None without a price. inputs_digest: of all (key, etag).
    """

    run_id: str
    source: str
    output: str
    inputs: int
    done: int
    passed: int
    review: int
    rejected: int
    skipped: int
    dead: int
    gone: int
    unchanged: int
    left: int
    stopped: str
    skipped_by: dict[str, int]
    failures: list[Failure]
    source_bytes: int
    output_bytes: int
    source_megapixels: float
    output_megapixels: float
    seconds: float
    num_workers: int
    assets_per_s: float
    output_megapixels_per_s: float
    device_s: float
    device_busy: float
    stage_s: dict[str, float]
    stage_shares: dict[str, float]
    seconds_p50: float
    seconds_p95: float
    device_hour_price: float | None
    cost: float | None
    cost_held: float | None
    measures: dict[str, Distribution]
    inputs_digest: str
    recipe: str
    model: dict[str, str]
    settings: dict[str, Any]

    @property
    def folder(self) -> str:
        """Where the report lies."""
        return storage.join(self.output, storage.OWN_FOLDER, "reports", self.run_id)

    def numbers(self) -> dict[str, float]:
        """Return every number by a flat name: counts, throughput, cost, stage_s_*, and such as lr_psnr_p1."""
        flat = {name: float(value) for name, value in asdict(self).items() if type(value) in (int, float)}
        flat |= {f"stage_s_{name}": value for name, value in self.stage_s.items()}
        for measure, found in self.measures.items():
            flat |= {f"{measure}_{name}": float(value) for name, value in asdict(found).items()}
        flat |= {f"skipped_{reason}": float(count) for reason, count in self.skipped_by.items()}
        return flat | {f"dead_{failed.stage}_{failed.reason}": float(failed.count) for failed in self.failures}


def account(
    rows: pa.Table,
    *,
    run_id: str,
    source: str,
    output: str,
    unchanged: int,
    stopped: str,
    left: int,
    seconds: float,
    num_workers: int,
    device_hour_price: float | None,
    recipe: str,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Night:
    """Return the account of one run's receipts (RECEIPT_SCHEMA), in any order of keys, oldest first of each key."""
    rows = receipts.latest(rows)
    is_gone = pc.equal(rows["reason"], GONE)
    gone = receipts.count(is_gone)
    if gone:  # or a million rows would be copied
        rows = rows.filter(pc.invert(is_gone))

    def of(status: str, *columns: str) -> pa.Table:
        return rows.select(columns).filter(pc.equal(rows["status"], status))

    done = of("done", "size", "out_bytes", "seconds", "reason", "metrics")
    skipped, dead = of("skipped", "reason"), of("dead", "key", "stage", "reason", "message")
    graded = counts(done["reason"])
    review, rejected = graded.get("review", 0), graded.get("rejected", 0)
    stage_s = {stage: total(rows, f"{stage}_s") for stage in STAGES}
    output_megapixels, held_s = total(done, "megapixels"), seconds * num_workers
    quick, slow = np.percentile(done["seconds"].to_numpy(), [50, 95]) if done.num_rows else (0.0, 0.0)
    return Night(
        run_id=run_id,
        source=source,
        output=output,
        inputs=rows.num_rows,
        done=done.num_rows,
        skipped=skipped.num_rows,
        dead=dead.num_rows,
        passed=done.num_rows - review - rejected,
        review=review,
        rejected=rejected,
        gone=gone,
        unchanged=unchanged,
        left=left,
        stopped=stopped,
        skipped_by=counts(skipped["reason"]),
        failures=receipts.failures(dead),
        source_bytes=int(pc.sum(done["size"]).as_py() or 0),
        output_bytes=int(pc.sum(done["out_bytes"]).as_py() or 0),
        source_megapixels=total(done, "source_megapixels"),
        output_megapixels=output_megapixels,
        seconds=seconds,
        num_workers=num_workers,
        assets_per_s=_ratio(done.num_rows, seconds),
        output_megapixels_per_s=_ratio(output_megapixels, seconds),
        device_s=stage_s["device"],
        device_busy=_ratio(stage_s["device"], held_s),
        stage_s=stage_s,
        stage_shares={stage: _ratio(spent, sum(stage_s.values())) for stage, spent in stage_s.items()},
        seconds_p50=float(quick),
        seconds_p95=float(slow),
        device_hour_price=device_hour_price,
        cost=_cost(stage_s["device"], device_hour_price),
        cost_held=_cost(held_s, device_hour_price),
        measures={name: found for name in MEASURES if (found := receipts.distribution(metric(done, name))) is not None},
        inputs_digest=receipts.digest(rows),
        recipe=recipe,
        model={name: str(value) for name, value in model.items()},
        settings=dict(settings),
    )


def publish_night(night: Night, rows: pa.Table) -> None:
    """Write the report of a night below its output; nothing where it had no inputs. rows: those of its account.

    summary.json is written last: where it is, the report is whole. Raises OSError for a store that takes nothing.
    """
    if not night.inputs:
        return
    rows = receipts.latest(rows)
    publish_dead_letters(night.folder, rows)
    page = write_night(night, draw_groups(night.source, night.output, rows), receipts.attention(rows))
    storage.publish(storage.join(night.folder, "night.html"), page.encode())
    storage.publish(storage.join(night.folder, "summary.json"), to_json(night).encode())


def track_night(night: Night) -> str | None:
    """Log a published night to MLflow and return the run's id; None, and a warning, where that cannot be done.

    The night is done and its report lies beside its results: a server that is away must not fail it.
    """
    if not night.inputs:
        return None
    from pipelines import tracking  # seconds to import, and a night with nothing new does not need it
    from pipelines.mlflow_store import impatient
    from pipelines.outbox import first_line

    try:
        tracking.connect()
        with impatient(60):
            return tracking.log_night(night, [storage.join(night.folder, n) for n in ("summary.json", "night.html")])
    except Exception as error:  # the clients of stores raise types of their own, and no error here is worth a night
        say(f"upscale: MLflow does not know of this night: {first_line(error)}; its report lies in {night.folder}")
        return None


def one_line(night: Night) -> str:
    """Return the night in one line for a person."""
    if not night.inputs:
        text = f"nothing to do, {plural(night.unchanged, 'asset')} unchanged"
    else:
        held = [(night.review, "to review"), (night.rejected, "rejected and published as bicubic")]
        notes = ", ".join(f"{count:,} {what}" for count, what in held if count)
        text = f"{night.done:,} of {plural(night.inputs, 'asset')} done" + (f" ({notes})" if notes else "")
        text += f", {night.skipped:,} skipped" if night.skipped else ""
        if night.failures:
            worst = night.failures[0]
            text += f", {plural(night.dead, 'dead letter')} (most: {worst.count:,} × {worst.stage} {worst.reason})"
        text += f"; {amount(night.output_megapixels)} MP in {duration(night.seconds)}"
        text += f" ({amount(night.output_megapixels_per_s)} MP/s, device busy {100 * night.device_busy:.0f} %"
        text += ")" if night.cost is None else f", cost {night.cost:,.2f})"
    if night.stopped:
        text += f"; stopped: {night.stopped}, {night.left:,} left"
    return f"upscale: {' '.join(text.split())}"


def to_json(night: Night) -> str:
    """Return the night as JSON."""
    return json.dumps(asdict(night), indent=1, allow_nan=False)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _cost(seconds: float, price: float | None) -> float | None:
    return None if price is None else seconds / 3600 * price
