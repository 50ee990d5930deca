"""What several tests share. Nothing here starts unless a test asks for it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.classifiers import torchvision_models
from tests import s3_server

with suppress(ValueError):  # torchmetrics imports torchvision, which does not load by itself beside torch's CPU build
    torchvision_models()


@pytest.fixture(scope="session")
def s3() -> Iterator[s3_server.S3Server]:
    """A real S3 server, started once per session and found through the environment; its buckets are the tests' own."""
    parent = s3_server.parent_with_xattr()
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix="diffsr-s3-", ignore_cleanup_errors=True) as root,
        s3_server.serve(Path(root)) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment().items():
            patch.setitem(os.environ, name, value)
        yield server
