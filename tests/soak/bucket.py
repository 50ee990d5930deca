"""A bucket as botocore sees it: the oracle's own client, which shares no code with what it judges."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import botocore.session
from botocore.config import Config

from tests.s3_server import S3Server


class Listed(NamedTuple):
    """What a listing says of an object."""

    etag: str
    modified: str


class Bucket:
    """One bucket, made here. Keys are used as they are: nothing is normalised."""

    def __init__(self, server: S3Server, name: str) -> None:
        self.name = name
        self._client: Any = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=server.endpoint_url,
            region_name=server.region,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            config=Config(s3={"addressing_style": "path"}),
        )
        self._client.create_bucket(Bucket=name)

    def put(self, key: str, data: bytes) -> None:
        """Write an object."""
        self._client.put_object(Bucket=self.name, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        """Return an object."""
        data: bytes = self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return data

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._client.delete_object(Bucket=self.name, Key=key)

    def listing(self, prefix: str) -> dict[str, Listed]:
        """Return all objects below a prefix by key without it."""
        return dict(self._listed(prefix))

    def outputs(self, prefix: str) -> dict[str, Listed]:
        """Return `listing` without the job's own folder."""
        return {key: found for key, found in self._listed(prefix) if not key.startswith("_diffsr/")}

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Return the bytes of `outputs`."""
        return {key: self.get(prefix + key) for key in self.outputs(prefix)}

    def _listed(self, prefix: str) -> Iterator[tuple[str, Listed]]:
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
            for item in page.get("Contents", []):
                yield item["Key"].removeprefix(prefix), Listed(item["ETag"], str(item["LastModified"]))
