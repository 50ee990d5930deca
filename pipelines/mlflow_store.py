"""Which MLflow store a process talks to, and whether it answers. Nothing here waits for minutes."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.exceptions import MlflowException

from pipelines.runs import check_tracking

EXPERIMENT = "diffsr"


def connect() -> mlflow.MlflowClient:
    """Return a client of the store that MLFLOW_TRACKING_URI names; without one, ./mlflow.db and ./mlruns.

    A relative SQLite path is made absolute, so that workers in other folders mean the same store. Raises ValueError,
    within seconds, for a store that does not answer or that MLflow refuses, and for a job of a cluster that names
    no store: its own folder, and a store in it, goes with the job.
    """
    check_tracking()
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout belongs to the JSON summary
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a job says itself how far it is
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    artifacts = None
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        uri, artifacts = f"sqlite:///{path}", (path.parent / "mlruns").as_uri()
        os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    with impatient():
        try:
            _check_database(uri)
            if artifacts is not None and mlflow.get_experiment_by_name(EXPERIMENT) is None:
                mlflow.create_experiment(EXPERIMENT, artifact_location=artifacts)
            mlflow.set_experiment(EXPERIMENT)
        except (MlflowException, ImportError) as error:
            reason = hide_passwords(str(error).strip().partition("\n")[0])
            raise ValueError(
                f"MLFLOW_TRACKING_URI ({hide_passwords(uri)}) must name an MLflow store that answers; it says: "
                f"{reason}; start that server, correct the address or its credentials, or use sqlite:///mlflow.db"
            ) from error
    return mlflow.MlflowClient()


@contextmanager
def impatient(timeout_s: int = 20) -> Iterator[None]:
    """For the body, a request to an MLflow server fails after seconds; MLflow itself tries 8 times, 120 s each.

    What the environment sets already stays as it is.
    """
    settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s)}
    mine = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def place() -> str:
    """Return where the store is, without the user and password that its URI may carry."""
    return hide_passwords(mlflow.get_tracking_uri())


def hide_passwords(text: str) -> str:
    """Return a text without the user and password that a URI in it may carry."""
    return re.sub(r"(?<=://)[^/\s]+@", "", text)


def _check_database(uri: str) -> None:
    """Ask a database once, as MLflow would ask it for 100 s; MlflowException where it does not answer."""
    if urlsplit(uri).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        import sqlalchemy

        try:
            engine = sqlalchemy.create_engine(uri)
            sqlalchemy.inspect(engine).get_table_names()
            engine.dispose()
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise MlflowException(str(error)) from error
