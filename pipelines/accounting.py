"""The difference between what is listed and what the ledger says: why an asset is work, or is none."""

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ledger import GONE, OUTPUT_LOST

IO_TRANSIENT = "io_transient"  # a store that did not give it after all retries: another night may be luckier
MAX_TRIES = 3  # of one content that fails so; then it waits for retry-failed like every dead letter
# Why a listed asset is work, or is none (the last two), in the order in which it is judged.
WHY = ("new", "changed", "outdated", "lost", "retried", "failed", "unchanged")


def retryable(latest: pa.Table) -> pa.ChunkedArray:
    """Return for each receipt (bool) whether it is a dead letter that the next run tries again by itself."""
    transient = pc.and_(pc.equal(latest["status"], "dead"), pc.equal(latest["reason"], IO_TRANSIENT))
    return pc.and_(transient, pc.less(latest["attempts"], MAX_TRIES))


def accounted(
    listing: pa.Table,
    latest: pa.Table,
    *,
    recipe: str,
    model: str,
    retry_dead: bool,
    retry_skipped: bool = False,
    fence: int | None = None,
) -> pa.Table:
    """Return for each row of the listing, in its order: `known` (bool), `why` (one of WHY), the `fence` of the receipt
    of its key, and `attempts`, the number that a try would have now.

    An asset is known when the latest receipt of its key is of the same etag, recipe and model. The latest receipt
    decides, not any receipt: after a -> b -> a (a source edited back, a model rolled back) the output holds b, so a is
    work again. Dead letters stay dead until `retry_dead`, but for those that are `retryable`, and what was skipped
    stays so until `retry_skipped`; a lost output, and a source that was gone, is always work. fence: of the run that
    asks, which tries nothing twice.
    latest: key, etag, recipe, model, status, reason, attempts, fence.
    """
    place = pc.index_in(listing["key"], value_set=latest["key"])

    def here(flags: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.fill_null(flags.take(place), False)

    ours = pc.and_(pc.equal(latest["recipe"], recipe), pc.equal(latest["model"], model))
    lost, dead = pc.equal(latest["reason"], OUTPUT_LOST), pc.equal(latest["status"], "dead")
    skipped = pc.equal(latest["status"], "skipped")
    again = pc.or_(pc.or_(retryable(latest), pc.and_(dead, retry_dead)), pc.and_(skipped, retry_skipped))
    if fence is not None:
        again = pc.and_(again, pc.not_equal(latest["fence"], fence))
    had = here(pc.invert(pc.equal(latest["reason"], GONE)))
    same = pc.fill_null(pc.equal(latest["etag"].take(place), listing["etag"]), False)
    cases = [pc.invert(had), pc.invert(same), pc.invert(here(ours)), here(lost), here(again), here(dead)]
    why = pc.case_when(pc.make_struct(*cases), *map(pa.scalar, WHY))  # the first that holds
    failed_before = pc.is_in(why, value_set=pa.array(["retried", "failed"]))
    one = pa.scalar(1, pa.int32())
    attempts = pc.if_else(failed_before, pc.add(latest["attempts"].take(place), one), one)
    known = pc.is_in(why, value_set=pa.array(["failed", "unchanged"]))
    return pa.table({"known": known, "why": why, "fence": latest["fence"].take(place), "attempts": attempts})
