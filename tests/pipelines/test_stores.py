"""Laws of pipelines.storage before an object store, on one that is made up: pages, refusals, lost answers, probes."""

import errno
import os
import uuid

import pytest
from s3fs import S3FileSystem

from pipelines import retries, storage


def keys(uri):
    return [found.key for found in storage.list_objects(uri)]


class Store:
    """Stands in for S3: each request raises the next of the given errors, then succeeds; a listing has pages of two."""

    protocol = ("s3", "s3a")

    def __init__(self, *errors, objects=(), content=b"another's"):
        self.errors, self.objects, self.content = list(errors), sorted(objects), content

    def info(self, path):
        return {"type": "file", "size": len(self.content)}

    def cat_file(self, path):
        return self.content

    def split_path(self, path):
        return *path.split("/", 1), None

    def call_s3(self, method, *, Bucket, Prefix, ContinuationToken="0"):
        if self.errors and (error := self.errors.pop(0)):
            raise error
        found = [{"Key": key, "Size": size, "ETag": '"e"'} for key, size in self.objects if key.startswith(Prefix)]
        end = int(ContinuationToken) + 2
        more = {"IsTruncated": True, "NextContinuationToken": str(end)} if end < len(found) else {"IsTruncated": False}
        return {"Contents": found[end - 2 : end]} | more

    def pipe_file(self, path, data, *, mode, chunksize, timeout):
        assert mode == "create" and len(data) < 2 * chunksize and timeout > 0
        if self.errors:
            raise self.errors.pop(0)


def s3_error(code, kind=OSError):
    cause = Exception(code)
    cause.response = {"Error": {"Code": code}}
    error = kind(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
    error.__cause__ = cause
    return error


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(retries, "settings", retries.Settings(first_s=0.0))


def test_every_way_a_store_says_already_there_is_false_and_any_other_error_is_raised(no_pause):
    assert storage._create_s3(Store(), "b/k", b"x") is True
    assert storage._create_s3(Store(FileExistsError("there")), "b/k", b"x") is False
    assert storage._create_s3(Store(s3_error("PreconditionFailed")), "b/k", b"x") is False
    assert storage._create_s3(Store(s3_error("412")), "b/k", b"x") is False
    assert storage._create_s3(Store(s3_error("ConditionalRequestConflict")), "b/k", b"x") is True
    with pytest.raises(PermissionError):
        storage._create_s3(Store(s3_error("AccessDenied", PermissionError)), "b/k", b"x")
    with pytest.raises(OSError, match="pre-conditions"):
        storage._create_s3(Store(s3_error("InvalidArgument")), "b/k", b"x")
    with pytest.raises(storage.TransientError, match="failed 6 times"):
        storage._create_s3(Store(*[s3_error("ConditionalRequestConflict")] * 9), "b/k", b"x")


def test_who_is_refused_because_of_its_own_object_has_created_it(no_pause):
    """A lost answer, then the refusal; also where the HTTP client sent it again unseen, so that we know of no loss."""
    for errors in ([FileExistsError("there")], [ConnectionResetError("lost"), s3_error("PreconditionFailed")]):
        assert storage._create_s3(Store(*errors, content=b"mine"), "b/k", b"mine") is True
        assert storage._create_s3(Store(*errors, content=b"else"), "b/k", b"mine") is False
    gone = Store(FileExistsError("there"))
    gone.info = lambda path: (_ for _ in ()).throw(FileNotFoundError(path))  # its holder has removed it since
    assert storage._create_s3(gone, "b/k", b"mine") is True


def test_an_s3_listing_asks_again_for_the_page_that_failed_and_no_other(no_pause):
    stored = [(f"p/{number}", number) for number in range(7)]
    whole = list(storage._list_s3(Store(objects=stored), "bucket/p", ("",)))
    broken = Store(
        None, OSError(errno.EBUSY, "slow down"), None, ConnectionResetError(), TimeoutError(), objects=stored
    )
    assert list(storage._list_s3(broken, "bucket/p", ("",))) == whole and len(whole) == 7 and not broken.errors


def test_a_folder_that_a_store_does_not_list_is_an_error_and_no_empty_folder(monkeypatch, no_pause):
    root = f"memory://{uuid.uuid4().hex}"
    for name in ("a.png", "d/b.png", "e/c.png"):
        storage.publish(storage.join(root, name), b"x")
    filesystem, _ = storage.open_filesystem(root)
    honest = type(filesystem).ls

    def ls(self, path, **options):
        if path.endswith("/d"):
            raise PermissionError(path)
        return honest(self, path, **options)

    assert keys(root) == ["a.png", "d/b.png", "e/c.png"]
    monkeypatch.setattr(type(filesystem), "ls", ls)
    with pytest.raises(PermissionError):
        keys(root)


def test_a_store_that_replaces_instead_of_creating_is_found_out_and_no_probe_is_left(monkeypatch, tmp_path):
    content, refuses = {}, [True]

    def create(store, path, data):
        if refuses[0] and path in content:
            return False
        content[path] = data
        return True

    S3FileSystem.clear_instance_cache()  # an instance of another test would have methods of its own
    monkeypatch.setattr(storage, "_create_s3", create)
    monkeypatch.setattr("s3fs.S3FileSystem.rm_file", lambda self, path: content.pop(path), raising=False)
    assert storage.honours_create("s3://bucket/out") is True
    refuses[0] = False
    assert storage.honours_create("s3://bucket/out") is False and content == {}
    assert storage.honours_create(tmp_path) is True and os.listdir(tmp_path) == []
    assert storage.honours_create("memory://anywhere") is False


def test_an_s3_listing_turns_every_page_and_leaves_out_markers_and_neighbours():
    stored = {"p/": 0, "p/a.png": 1, "p/_diffsr/x.png": 1, "p/d/": 0, "p/d/b.png": 2, "p/z.PNG": 0, "pq/no.png": 1}
    store = Store(objects=stored.items())
    found = list(storage._list_s3(store, "bucket/p", ("",)))
    assert [(item.key, item.size, item.etag) for item in found] == [
        ("a.png", 1, "e"),
        ("d/b.png", 2, "e"),
        ("z.PNG", 0, "e"),
    ]
    assert storage._list_s3(store, "bucket/nothing", ("",)) is None
