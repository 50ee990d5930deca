"""What a verb that looks after an output finds, said without a flood, and what it records of that."""

from collections import Counter
from dataclasses import replace

from pipelines.engine import say
from pipelines.lease import Lease
from pipelines.ledger import Ledger, Receipt

BATCH = 10_000  # receipts of a segment
SHOWN = 20  # lines about one kind of finding


class Repairs:
    """Appends receipts of this run in segments, each under a checked lease; none in a dry run."""

    def __init__(self, ledger: Ledger, lease: Lease, *, dry_run: bool) -> None:
        self.ledger, self.lease, self.dry_run = ledger, lease, dry_run
        self.buffer: list[Receipt] = []
        self.number = ledger.next_number(lease.fence)

    def add(self, receipt: Receipt) -> None:
        self.buffer.append(replace(receipt, run_id=self.lease.run_id, fence=self.lease.fence))
        if len(self.buffer) == BATCH:
            self.flush()

    def flush(self) -> None:
        if self.buffer and not self.dry_run:
            self.lease.check()
            self.ledger.append(self.buffer, fence=self.lease.fence, number=self.number)
            self.number += 1
        self.buffer = []


class Findings:
    """Says the first SHOWN findings of each kind, and at the end how many more there were."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.counts: Counter[str] = Counter()

    def __call__(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN:
            say(f"{self.verb}: {text}" if kind == "not ours" else f"{self.verb}: {kind} {text}")

    def end(self) -> None:
        for kind, count in self.counts.items():
            if count > SHOWN:
                say(f"{self.verb}: and {count - SHOWN} more: {kind}")
