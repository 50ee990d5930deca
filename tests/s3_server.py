"""A real S3 server for the tests: OpenStack Swift with its S3 API, on the loopback interface, without root.

Swift and not a mock, because the laws rest on what a store does under concurrency: `If-None-Match: *` is honoured
(the second writer gets 412), and multipart uploads are assembled by the server. Swift wants eventlet and pins of its
own, so it lives in a virtual environment of its own (about 80 MB); only its four processes meet the tests.

`python -m tests.s3_server` prepares that environment and stops: about 10 s the first time.
"""

import base64
import contextlib
import ctypes
import dataclasses
import email.utils
import fcntl
import hashlib
import hmac
import http.client
import os
import pwd
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
VENV = REPOSITORY / ".venv-swift"
REQUIREMENT = "swift==2.38.3"
HOST = "127.0.0.1"
START_TIMEOUT_S = 90.0  # about 3 s on two idle cores; the rest is for a machine that does other things as well
Processes = dict[str, subprocess.Popen[bytes]]

SWIFT_CONF = """
[swift-hash]
swift_hash_path_prefix = diffsr
swift_hash_path_suffix = tests
[storage-policy:0]
name = single
default = yes
"""

COMMON = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {root}
log_level = WARNING
"""

STORAGE = """
devices = {root}/devices
mount_check = false
fallocate_reserve = 0
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
recon_cache_path = {root}
"""

# No cache filter: only token logins need memcached, and a memcached that happens to run here is not ours to fill.
# The limits: on a busy machine a slow backend is not a broken one.
PROXY = """
[pipeline:main]
pipeline = s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
conn_timeout = 10
node_timeout = 60
error_suppression_limit = 1000000
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:slo]
use = egg:swift#slo
"""

# Run by Swift's own interpreter: three rings, one device, one replica. One process instead of nine calls of the tool.
BUILD_RINGS = """
import sys
from swift.common.ring import RingBuilder
root, *servers = sys.argv[1:]
for server in servers:
    name, port = server.split(":")
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
    device = dict(id=0, region=1, zone=1, ip="127.0.0.1", port=int(port), device="d1", weight=1.0, meta="")
    builder.add_dev({**device, "replication_ip": device["ip"], "replication_port": device["port"]})
    builder.rebalance()
    builder.get_ring().save(f"{root}/{name}.ring.gz")
"""


@dataclasses.dataclass(frozen=True)
class S3Server:
    endpoint_url: str
    access_key: str = "test:tester"
    secret_key: str = "testing"
    region: str = "us-east-1"

    def environment(self) -> dict[str, str]:
        """The variables with which s3fs, boto3, pyarrow and MLflow find this server.

        Path-style addresses need no variable: all of them use it for an endpoint that is an IP address.
        """
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,  # boto3 and s3fs
            "AWS_REGION": self.region,  # the C++ SDK in pyarrow
            "AWS_EC2_METADATA_DISABLED": "true",  # else a miss in the credentials waits for a cloud that is not there
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST])),
        }


def ensure_venv(path: Path = VENV) -> Path:
    """The `bin` folder of a virtual environment at `path` that holds Swift; builds it where it is missing.

    The marker is written last, so an interrupted build is built again; the lock is on the folder itself, so a second
    caller waits for the first and the lock leaves no file behind.
    """
    marker = path / "installed.txt"
    path.mkdir(parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not marker.exists() or marker.read_text() != REQUIREMENT:
            subprocess.run([sys.executable, "-m", "venv", "--clear", path], check=True)
            subprocess.run([path / "bin/python", "-m", "pip", "install", "--quiet", REQUIREMENT], check=True)
            marker.write_text(REQUIREMENT)
    finally:
        os.close(folder)
    return path / "bin"


def parent_with_xattr() -> Path:
    """A folder whose file system has extended attributes, where Swift keeps an object's metadata."""
    candidates = [Path(tempfile.gettempdir()), REPOSITORY / "build"]
    for parent in candidates:
        parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=parent) as probe, contextlib.suppress(OSError):
            os.setxattr(probe.name, "user.swift.metadata", b"1")
            return parent
    raise OSError(f"no extended attributes in {candidates}: set TMPDIR to a folder on ext4, xfs or btrfs")


@contextlib.contextmanager
def serve(root: Path) -> Iterator[S3Server]:
    """An S3 server with its configuration, data and logs under `root`, for as long as the block runs."""
    bin_dir = ensure_venv()
    ports = dict(zip(("account", "container", "object", "proxy"), free_ports(4), strict=True))
    configure(root, ports, bin_dir)
    server = S3Server(f"http://{HOST}:{ports['proxy']}")
    processes: Processes = {}
    try:
        for name in ports:
            processes[name] = start(name, root, bin_dir)
        wait_until_ready(server, ports, processes, root)
        yield server
    finally:
        stop(processes)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below the range from which the kernel takes the ports of outgoing connections."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(15000, 32000), 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"no {count} free ports on {HOST} in 15000..31999")


def configure(root: Path, ports: dict[str, int], bin_dir: Path) -> None:
    (root / "devices" / "d1").mkdir(parents=True)
    (root / "swift.conf").write_text(SWIFT_CONF)
    values = {"root": root, "user": pwd.getpwuid(os.getuid()).pw_name}
    for name, port in ports.items():
        template = COMMON + (PROXY if name == "proxy" else STORAGE)
        (root / f"{name}.conf").write_text(template.format(name=name, port=port, **values))
    rings = [f"{name}:{port}" for name, port in ports.items() if name != "proxy"]
    subprocess.run([bin_dir / "python", "-c", BUILD_RINGS, root, *rings], check=True)


def start(name: str, root: Path, bin_dir: Path) -> subprocess.Popen[bytes]:
    command = [bin_dir / f"swift-{name}-server", root / f"{name}.conf", "-v"]  # -v: the log goes to stderr too
    with (root / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent())


def die_with_parent() -> Callable[[], object]:
    """Runs in the child before Swift: it then ends with the thread that started it, even where that one is killed."""
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, signal.SIGTERM)


def wait_until_ready(server: S3Server, ports: dict[str, int], processes: Processes, root: Path) -> None:
    """Returns once all four listen and a bucket listing answers; raises `RuntimeError` with the logs' tails."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (all(map(listens, ports.values())) and lists_buckets(server)):
        ended = {name: code for name, process in processes.items() if (code := process.poll()) is not None}
        if ended or time.monotonic() > deadline:
            what = f"ended with {ended}" if ended else f"did not answer within {START_TIMEOUT_S:.0f} s"
            logs = [f"--- {name}.log\n{(root / f'{name}.log').read_text()[-2000:]}" for name in processes]
            raise RuntimeError("\n".join([f"the S3 server {what}", *logs]))
        time.sleep(0.1)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1.0):
        return True
    return False


def lists_buckets(server: S3Server) -> bool:
    """Whether `GET /` answers 200; signed by hand (AWS signature version 2), so that starting needs no S3 client."""
    date = email.utils.formatdate(usegmt=True)
    digest = hmac.digest(server.secret_key.encode(), f"GET\n\n\n{date}\n/".encode(), hashlib.sha1)
    headers = {"Date": date, "Authorization": f"AWS {server.access_key}:{base64.b64encode(digest).decode()}"}
    connection = http.client.HTTPConnection(server.endpoint_url.removeprefix("http://"), timeout=10.0)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/", headers=headers)
        return connection.getresponse().status == 200
    return False


def stop(processes: Processes) -> None:
    for process in processes.values():
        process.terminate()
    deadline = time.monotonic() + 10.0
    for process in processes.values():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    print(ensure_venv())
