"""The S3 server of the tests does what the laws need of a store. Whatever else fails here first, is not our bug."""

import os
import uuid

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.s3


@pytest.fixture
def store(s3):
    """An s3fs file system that knows only the environment, as in a job."""
    filesystem = fsspec.filesystem("s3", use_listings_cache=False)
    assert os.environ["AWS_ENDPOINT_URL"] == s3.endpoint_url
    return filesystem


@pytest.fixture
def bucket(store) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    store.mkdir(name)
    return name


def test_what_is_written_is_read_and_listed(store, bucket):
    store.pipe_file(f"{bucket}/a/one.bin", b"one")
    store.pipe_file(f"{bucket}/a/b/two.bin", b"second")
    assert store.cat_file(f"{bucket}/a/one.bin") == b"one"
    found = store.find(bucket, detail=True)
    assert {key: row["size"] for key, row in found.items()} == {f"{bucket}/a/one.bin": 3, f"{bucket}/a/b/two.bin": 6}
    assert all(row["ETag"].strip('"') for row in found.values())
    store.rm(f"{bucket}/a", recursive=True)
    assert store.find(bucket) == []


def test_multipart_upload_is_assembled(store, bucket):
    part_bytes = 6 << 20
    body = os.urandom(part_bytes) * 2 + b"tail"
    with store.open(f"{bucket}/large.bin", "wb", block_size=part_bytes) as file:
        file.write(body)
    info = store.info(f"{bucket}/large.bin")
    assert info["size"] == len(body)
    assert "-" in info["ETag"], "uploaded in one part: this proves nothing about multipart"
    assert store.cat_file(f"{bucket}/large.bin") == body


def test_second_conditional_create_fails_and_changes_nothing(store, bucket):
    store.pipe_file(f"{bucket}/lease.json", b"first", mode="create")
    with pytest.raises(OSError):  # FileExistsError on stores whose error code s3fs knows, plain OSError on this one
        store.pipe_file(f"{bucket}/lease.json", b"second", mode="create")
    assert store.cat_file(f"{bucket}/lease.json") == b"first"


def test_parquet_is_read_through_s3fs_and_through_arrow(store, bucket):
    table = pa.table({"key": ["a.png", "b.png"], "hr": [b"\x00" * 100, b"\x01" * 100]})
    pq.write_table(table, f"{bucket}/pairs.parquet", filesystem=store)
    assert pq.read_table(f"{bucket}/pairs.parquet", filesystem=store).equals(table)
    # By URI, as Ray reads it: only then pyarrow looks for the endpoint in the environment, S3FileSystem() does not.
    assert pq.read_table(f"s3://{bucket}/pairs.parquet").equals(table)


def test_server_side_copy_and_bulk_delete(store, bucket):
    store.pipe({f"{bucket}/a/{i}.bin": bytes([i]) for i in range(20)})
    store.copy(f"{bucket}/a/3.bin", f"{bucket}/b.bin")
    assert store.cat_file(f"{bucket}/b.bin") == b"\x03"
    store.rm(f"{bucket}/a", recursive=True)
    assert store.find(bucket) == [f"{bucket}/b.bin"]
