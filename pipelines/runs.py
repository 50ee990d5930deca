"""What a job returns, and the names of runs."""

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A job's result: the one JSON line that ends its stdout. inputs = done + skipped + dead of this run.

    unchanged: assets that the ledger already had. exit_code is not printed.
    """

    job: str
    run_id: str
    status: str
    inputs: int = 0
    done: int = 0
    skipped: int = 0
    dead: int = 0
    unchanged: int = 0
    outputs: list[str] = field(default_factory=list)
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    exit_code: int = 0

    def to_line(self) -> str:
        """Return the JSON line."""
        fields = asdict(self)
        del fields["exit_code"]
        return json.dumps(fields, sort_keys=False)


class TrainingFailed(RuntimeError):
    """Training stopped before its end; its checkpoints are kept and the same command continues from them."""


def new_run_id(job: str) -> str:
    """Return a run's name: job, UTC time, and random digits. It is never written into an output or a sidecar."""
    return f"{job}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"


def check_tracking() -> None:
    """Raise ValueError for a job of a cluster that names no MLflow store: one in its own folder would go with it."""
    if os.environ.get("RAY_ADDRESS") and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "MLFLOW_TRACKING_URI (not set) must name an MLflow server when the job runs on a cluster (RAY_ADDRESS is "
            "set), or its models and runs would be lost with the job's folder; set it in the job's runtime environment"
        )
