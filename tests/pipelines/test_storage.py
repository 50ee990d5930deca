"""Laws of pipelines.storage on local folders and on memory://."""

import errno
import os
import resource
import threading
import uuid

import pytest

from pipelines import storage

ROTTEN_NAMES = ["line\nbreak.png", "two  spaces .png", "hash#frag.png", "query?x=1.png", "percent%20%.png"]
ROTTEN_NAMES += ["-leading dash.png", "Füße 図 🦆.png", "~tilde.png", "[glob]*.png"]


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "root")
    else:
        uri = f"memory://{uuid.uuid4().hex}"
        yield uri
        filesystem, path = storage.open_filesystem(uri)
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)


def keys(uri, **options):
    return [found.key for found in storage.list_objects(uri, **options)]


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_temporaries(folder):
    return [name for _, _, names in os.walk(folder) for name in names if name.startswith(".tmp-")] == []


def test_what_is_published_is_read_back_and_listed(root):
    storage.publish(storage.join(root, "a/b.png"), b"one")
    storage.publish(storage.join(root, "a/b.png"), b"three")
    storage.publish(storage.join(root, "top.png"), b"")
    assert storage.read_bytes(storage.join(root, "a/b.png")) == b"three"
    found = {item.key: item.size for item in storage.list_objects(root)}
    assert found == {"top.png": 0, "a/b.png": 5}


def test_a_folder_is_no_object_and_a_missing_object_has_no_size(root):
    storage.publish(storage.join(root, "folder/b.png"), b"12345")
    assert storage.size(storage.join(root, "folder/b.png")) == 5
    assert storage.exists(storage.join(root, "folder/b.png"))
    for name in ("folder", "nothing"):
        assert storage.size(storage.join(root, name)) is None
        assert not storage.exists(storage.join(root, name))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))


def test_an_object_is_looked_up_as_it_is_listed_and_streamed_only_as_it_was_listed(root):
    content = os.urandom(5 << 20)
    storage.publish(storage.join(root, "a.png"), content)
    (listed,) = storage.list_objects(root)
    uri = storage.join(root, "a.png")
    assert storage.look_up(uri) == storage.StoredObject(uri, listed.etag, len(content))
    pieces = list(storage.stream_listed(uri, listed.etag))
    assert b"".join(pieces) == content == storage.read_listed(uri, listed.etag) and max(map(len, pieces)) == 1 << 20
    storage.publish(uri, content[::-1])
    with pytest.raises(storage.Changed, match="was listed with"):
        storage.read_listed(uri, listed.etag)
    assert b"".join(storage.stream_listed(uri, None)) == content[::-1]


def test_what_cannot_be_read_is_looked_up_as_unreadable_and_streamed_with_the_reason(root, tmp_path):
    storage.publish(storage.join(root, "folder/a.png"), b"x")
    for uri in (storage.join(root, "gone.png"), storage.join(root, "folder"), "/dev/zero"):
        assert storage.look_up(uri) == storage.StoredObject(uri, "unreadable", 0)
        with pytest.raises(OSError):
            list(storage.stream_listed(uri, None))


def test_delete_removes_and_a_second_delete_is_fine(root):
    uri = storage.join(root, "a.png")
    storage.publish(uri, b"x")
    storage.delete(uri)
    assert not storage.exists(uri)
    storage.delete(uri)


def test_every_name_survives_the_round_trip(root):
    for number, name in enumerate(ROTTEN_NAMES):
        storage.publish(storage.join(root, "sub dir", name), str(number).encode())
    listed = keys(root, suffixes=frozenset({".png"}))
    assert sorted(listed) == sorted(f"sub dir/{name}" for name in ROTTEN_NAMES)
    for key in listed:
        number = ROTTEN_NAMES.index(key.removeprefix("sub dir/"))
        assert storage.read_bytes(storage.join(root, key)) == str(number).encode()


def test_etag_is_a_matter_of_the_bytes_alone(root):
    for name, data in (("a", b"same"), ("b", b"same"), ("c", b"else")):
        storage.publish(storage.join(root, name), data)
    etags = {found.key: found.etag for found in storage.list_objects(root)}
    assert etags["a"] == etags["b"] != etags["c"]
    if "://" not in root:
        os.utime(os.path.join(root, "a"), (1, 1))
    assert {found.key: found.etag for found in storage.list_objects(root)} == etags


def test_listing_leaves_out_our_folder_at_the_top_and_our_temporaries(root):
    for name in ("_diffsr/plans/p.json", ".tmp-12ab", "in/.tmp-34cd", "in/_diffsr/kept.png", "_diffsr.png", ".hidden"):
        storage.publish(storage.join(root, name), b"x")
    assert sorted(keys(root)) == [".hidden", "_diffsr.png", "in/_diffsr/kept.png"]


def test_listing_is_sorted_within_each_folder_and_suffixes_ignore_case(root):
    for name in ("z.PNG", "b.jpg", "d/y.Jpg", "d/x.png", "a.txt", "png"):
        storage.publish(storage.join(root, name), b"x")
    assert keys(root, suffixes=frozenset({".png", ".JPG"})) == ["b.jpg", "z.PNG", "d/x.png", "d/y.Jpg"]


def test_listing_never_opens_what_the_suffix_filter_leaves_out(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would block for ever
    (tmp_path / "a.png").write_bytes(b"x")
    assert keys(tmp_path) == ["a.png"]


def test_a_root_that_is_missing_or_a_file_is_refused_at_the_call_with_its_name(root):
    with pytest.raises(ValueError, match="not-there.*must be"):
        storage.list_objects(storage.join(root, "not-there"))
    storage.publish(storage.join(root, "not-there-as-folder"), b"x")
    with pytest.raises(ValueError, match="must be a folder"):
        storage.list_objects(storage.join(root, "not-there-as-folder"))


def test_a_suffix_without_its_dot_is_refused(tmp_path):
    with pytest.raises(ValueError, match="begin with a dot"):
        storage.list_objects(tmp_path, suffixes=frozenset({"png"}))


def test_link_loops_end_and_each_real_folder_is_listed_once(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (root / "real" / "a.png").write_bytes(b"a")
    (outside / "b.png").write_bytes(b"b")
    (root / "real" / "up").symlink_to(root)
    (root / "again").symlink_to(root / "real")
    (root / "out").symlink_to(outside)
    (root / "out2").symlink_to(outside)
    (outside / "back").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "dangling.png").symlink_to(root / "nowhere")
    (root / "linked.png").symlink_to(root / "real" / "a.png")
    assert keys(root) == ["dangling.png", "linked.png", "self", "out/b.png", "real/a.png"]
    lost = {found.key for found in storage.list_objects(root) if found.etag == "unreadable"}
    assert lost == {"dangling.png", "self"}  # a link that leads nowhere is somebody's loss, not silence


def test_an_unreadable_file_is_listed_and_does_not_end_the_listing(tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"x")
    honest = open

    def broken(path, *arguments, **options):
        if str(path).endswith("b.png"):
            raise OSError(errno.EIO, "Input/output error")
        return honest(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", broken)
    found = {item.key: item.etag for item in storage.list_objects(tmp_path)}
    assert list(found) == ["a.png", "b.png", "c.png"]
    assert found["b.png"] == "unreadable" != found["a.png"] == found["c.png"]


@pytest.mark.parametrize("part", ["../x", "a/../../x", ".."])
def test_a_key_cannot_climb_out_of_its_root(part):
    with pytest.raises(ValueError, match="must not contain"):
        storage.join("s3://bucket/out", part)


def test_file_uris_and_paths_name_the_same_object(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a?b#c", "double::colon", "strange:/name", "back\\slash", "~"):
        storage.publish(f"file://{tmp_path}/{name}", name.encode())
        assert storage.read_bytes(name) == storage.read_bytes(tmp_path / name) == name.encode()
    assert storage.read_bytes(f"{tmp_path}/strange://name") == b"strange:/name"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content_and_no_temporary(tmp_path, monkeypatch, call):
    storage.publish(tmp_path / "a.png", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            storage.publish(tmp_path / "a.png", b"new")
        monkeypatch.setattr(os, "link", full)
        with pytest.raises(OSError, match="No space left"):
            storage.create(tmp_path / "lease.json", b"new")
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_write_that_the_system_cuts_short_leaves_the_old_content_and_no_temporary(tmp_path):
    storage.publish(tmp_path / "a.png", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError) as caught:
            storage.publish(tmp_path / "a.png", bytes(5 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_publish_file_streams_the_file_and_leaves_it(root, tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(3 << 20))
    storage.publish_file(storage.join(root, "deep/er/copy.bin"), source)
    assert storage.read_bytes(storage.join(root, "deep/er/copy.bin")) == source.read_bytes()
    assert no_temporaries(tmp_path)


def test_published_files_obey_the_umask(tmp_path):
    (tmp_path / "plain").write_bytes(b"x")
    storage.publish(tmp_path / "ours", b"x")
    assert os.stat(tmp_path / "ours").st_mode == os.stat(tmp_path / "plain").st_mode


def test_create_keeps_what_was_there(root):
    uri = storage.join(root, "lease.json")
    assert storage.create(uri, b"first") is True
    assert storage.create(uri, b"second") is False
    assert storage.read_bytes(uri) == b"first"


def test_of_concurrent_creators_exactly_one_wins_and_its_content_stays(tmp_path):
    for round_number in range(20):
        uri = tmp_path / f"lease-{round_number}.json"
        barrier, answers = threading.Barrier(4), {}

        def contend(name, uri=uri, barrier=barrier, answers=answers):
            barrier.wait()
            answers[name] = storage.create(uri, name.encode() * 1000)

        threads = [threading.Thread(target=contend, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [name for name, won in answers.items() if won]
        assert len(answers) == 4 and uri.read_bytes() == winner.encode() * 1000
    assert no_temporaries(tmp_path)


def test_a_file_is_created_only_where_nothing_is_and_on_a_store_only_in_one_request(root, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CREATE_BYTES", 10)
    (tmp_path / "small").write_bytes(b"small")
    (tmp_path / "large").write_bytes(b"eleven byte")
    uri = storage.join(root, "a.bin")
    assert storage.create_file(uri, tmp_path / "small") is True
    assert storage.create_file(uri, tmp_path / "small") is False
    if storage.is_local(root):
        assert storage.create_file(storage.join(root, "b.bin"), tmp_path / "large") is True
    else:
        with pytest.raises(ValueError, match=r"large.*11 bytes.*at most 10"):
            storage.create_file(storage.join(root, "b.bin"), tmp_path / "large")
    assert storage.read_bytes(uri) == (tmp_path / "small").read_bytes() == b"small"
    assert no_temporaries(tmp_path)


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///key", "s3://white space/key", "s3://b/k?versionId=1"])
def test_a_name_that_the_store_cannot_have_is_refused_before_it_is_asked(uri):
    with pytest.raises(ValueError, match="uri="):
        storage.open_filesystem(uri)


def test_an_s3_filesystem_follows_the_endpoint_of_the_environment_and_caches_no_listing(monkeypatch):
    for port in (9001, 9002):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        filesystem, path = storage.open_filesystem("s3://bucket/some prefix/")
        assert (filesystem.endpoint_url, path) == (f"http://127.0.0.1:{port}", "bucket/some prefix")
        assert filesystem.dircache.use_listings_cache is False
