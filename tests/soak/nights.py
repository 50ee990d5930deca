"""Three nights over a bucket of a real S3 server, with files added, changed, broken and removed between them.

    python -m tests.soak.nights
    python -m tests.soak.nights --engine ray --num-workers 2

The second night goes through a proxy that breaks requests; before the third the model's alias moves to another
version. Prints the ledger's account after each night, then runs verify, gc with the source and a night with nothing to
do, and compares the bucket with that of a clean run of the last state. Exits 1 where a check does not hold.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffsr_core.family import ModelConfig
from pipelines.ledger import GONE, Ledger
from tests import hostile, s3_proxy, s3_server
from tests.core.tiny import MODELS
from tests.jobs.conftest import Ran, run
from tests.jobs.tiny import model_folder
from tests.soak.archive import Archive, fill, second_night, third_night
from tests.soak.bucket import Bucket

ROOT = Path(__file__).resolve().parents[2]
REF, SOURCE, OUTPUT, CLEAN = "models:/nightly@champion", "in/", "out/", "clean/"
SAMPLING = ["--steps", "1", "--tile", "64", "--micro-batch", "1", "--review-lr-psnr", "45"]
FAULTS = ("busy", "busy", "reset")
WHY = ("new", "changed", "outdated", "lost", "retried", "failed", "unchanged")
LEASE = ("_diffsr/lease.json", "_diffsr/fences/")


class Nights:
    """The bucket, the job's flags, and what was checked."""

    def __init__(self, bucket: Bucket, proxy: s3_proxy.Proxy, flags: list[str]) -> None:
        self.bucket, self.proxy, self.flags = bucket, proxy, flags
        self.archive = Archive(bucket, SOURCE)
        self.checks: list[tuple[bool, str]] = []

    def check(self, good: bool, law: str, found: object = "") -> None:
        """Note whether a law holds; found: what contradicts it."""
        self.checks.append((good, law if good else f"{law}; found {str(found)[:600]}"))
        print(f"* {'yes' if good else 'NO'}: {self.checks[-1][1]}", flush=True)

    def uri(self, prefix: str) -> str:
        """Return the URI of a prefix."""
        return f"s3://{self.bucket.name}/{prefix.rstrip('/')}"

    def job(self, verb: str, *words: str, output: str = OUTPUT, broken: float = 0.0) -> Ran:
        """Run a verb, through the proxy, which breaks this share of its requests."""
        self.proxy.rule, self.proxy.seen = s3_proxy.randomly(broken, seed=7, faults=FAULTS), []
        where = ["--source", self.uri(SOURCE), "--output", self.uri(output), "--model", REF]
        environment = {"AWS_ENDPOINT_URL": self.proxy.endpoint_url}
        return run("upscale", verb, *where, *self.flags, *words, env=environment, timeout=3600)

    def latest(self) -> dict[str, dict[str, Any]]:
        """Return the latest receipt of each key."""
        return {row["key"]: row for row in Ledger(self.uri(OUTPUT)).latest().to_pylist()}

    def night(self, title: str, changes: str, *, broken: float = 0.0) -> None:
        """Run a night and print its account."""
        before = self.latest() if self.bucket.listing(OUTPUT) else {}
        plan = self.job("plan").summary["metrics"]
        done = self.job("run", broken=broken)
        faults = sum(fault != "pass" for _, _, fault in self.proxy.seen)
        print(f"\n### {title}\n\n{changes}. Model: {self.model()}. Requests: {len(self.proxy.seen):,}, of which "
              f"{faults} were broken.\n", flush=True)  # fmt: skip
        print("Planned: " + ", ".join(f"{plan[f'{why}_assets']:.0f} {why}" for why in WHY) + ".\n")
        summary, metrics = done.summary, done.summary["metrics"]
        head = ("inputs", "done", "passed", "review", "rejected", "skipped", "dead", "unchanged", "left", "s")
        cells = [summary["inputs"], summary["done"], *(f"{metrics[name]:.0f}" for name in head[2:5])]
        cells += [summary["skipped"], summary["dead"], summary["unchanged"], f"{metrics['left']:.0f}"]
        print(table(head, [[*cells, f"{summary['seconds']:.0f}"]]), flush=True)
        rows = [row for row in Ledger(self.uri(OUTPUT)).rows().to_pylist() if row["run_id"] == summary["run_id"]]
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for row in rows:
            if row["status"] != "done":
                reasons.setdefault((row["status"], row["stage"], row["reason"]), []).append(row["key"])
        print(table(("status", "stage", "reason", "assets", "such as"), [
            [*kind, len(keys), shown(min(keys))] for kind, keys in sorted(reasons.items())]), flush=True)  # fmt: skip
        now = self.latest()
        if before:
            print(table(("key", "what was done to it", "ledger before", "ledger now"), [
                [shown(key), what, told(before.get(key)), told(now.get(key))]
                for key, what in sorted(self.archive.told.items())]), flush=True)  # fmt: skip
        self.judge(done, rows, now)

    def model(self) -> str:
        """Return what the alias points to."""
        from pipelines import tracking

        return f"{REF}, version {tracking.version_of(REF).version}"

    def judge(self, done: Ran, rows: list[dict[str, Any]], now: dict[str, dict[str, Any]]) -> None:
        """Check a night: each object has the outcome that it must have, of what it holds now, once."""
        truth, summary = self.archive.truth, done.summary
        self.check(done.code == 0, "exit code 0", done.stderr[-500:])
        counted = summary["done"] + summary["skipped"] + summary["dead"]
        self.check(summary["inputs"] == counted == len(rows), "inputs = done + skipped + dead = receipts", summary)
        self.check(len(rows) == len({row["key"] for row in rows}), "one receipt an asset")
        self.check(summary["inputs"] + summary["unchanged"] == len(truth), "inputs + unchanged = objects", summary)
        found = {key: (row["status"], row["reason"]) for key, row in now.items() if key in truth}
        dead = {key: expected for key, expected in truth.items() if "already_upscaled" not in expected}
        wrong = hostile.unexpected(dead, found)
        passed = {key for key in truth.keys() - dead.keys() if found.get(key) != ("skipped", "already_upscaled")}
        self.check(not wrong and not passed, f"each of {len(truth)} objects has the outcome that it must have",
                   [wrong, passed])  # fmt: skip
        listed = {key: item.etag.strip('"') for key, item in self.bucket.listing(SOURCE).items()}
        stale = {key for key in listed if key not in now or now[key]["etag"].strip('"') != listed[key]}
        self.check(not stale, "each latest receipt is of the content that lies there now", stale)
        there = self.bucket.outputs(OUTPUT).keys()
        self.check(self.archive.outputs() <= there, "every expected output is there", self.archive.outputs() - there)

    def only_results(self) -> set[str]:
        """Return the objects of the last results of sources that are dead letters by now: gc keeps them."""
        dead = {key for key, row in self.latest().items() if row["status"] == "dead"}
        rows = Ledger(self.uri(OUTPUT)).rows(["key", "status", "out_key"]).to_pylist()
        last = {row["key"]: row["out_key"] for row in rows if row["status"] == "done" and row["key"] in dead}
        return {name for key in last.values() for name in (key, f"{key}.json")}

    def end(self) -> None:
        """Verify, tidy up, compare with a clean run, and run once more with nothing to do."""
        print("\n### The end: verify, gc, a clean run beside it, and a night with nothing to do\n", flush=True)
        verified = self.job("verify")
        losses = verified.summary["dead"]
        self.check((verified.code, losses) == (0, 0), f"verify: {verified.summary['done']} outputs are as recorded, "
                   "none is lost", verified.stderr[-500:])  # fmt: skip
        before = self.bucket.outputs(OUTPUT)
        dry = self.job("gc")
        self.check(
            self.bucket.outputs(OUTPUT) == before, f"gc without --delete lists {counted(dry)} and removes nothing"
        )
        tidied = self.job("gc", "--delete")
        only = self.only_results()
        there, expected = self.bucket.outputs(OUTPUT).keys(), self.archive.outputs() | only
        law = (
            f"gc --source --delete removes {tidied.summary['done']}; the {len(expected)} outputs are the expected set, "
            f"{len(only)} of them the only results of sources that have rotted since"
        )
        self.check(tidied.code == 0 and there == expected, law, sorted(there ^ expected))
        now, listed = self.latest(), self.bucket.listing(SOURCE).keys()
        current = {key for key, row in now.items() if row["reason"] != GONE}
        self.check(current == listed, f"the latest receipts are those of the {len(listed)} objects, and "
                   f"{len(now) - len(current)} say that theirs is gone", current ^ listed)  # fmt: skip
        clean = self.job("run", output=CLEAN)
        fresh, kept = self.bucket.contents(CLEAN), self.bucket.contents(OUTPUT)
        kept = {key: content for key, content in kept.items() if key not in only}
        differing = sorted(key for key in fresh.keys() | kept.keys() if fresh.get(key) != kept.get(key))
        law = f"a clean run of the last state gives the same {len(kept)} objects, byte for byte"
        self.check(clean.code == 0 and not differing, law, differing)
        before = self.bucket.listing(OUTPUT)
        idle = self.job("run")
        asked = [(method, path) for method, path, _ in self.proxy.seen]
        after = self.bucket.listing(OUTPUT)
        touched = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        self.check((idle.code, idle.summary["inputs"], idle.summary["unchanged"]) == (0, 0, len(listed)),
                   f"a night with nothing to do: 0 inputs, {len(listed)} unchanged", idle.summary)  # fmt: skip
        self.check(all(key.startswith(LEASE) for key in touched), f"it writes its lease alone ({len(touched)} objects, "
                   f"{len(asked)} requests in all)", touched)  # fmt: skip
        reads = [path for method, path in asked if method == "GET" and f"/{SOURCE}" in path.partition("?")[0]]
        self.check(not reads, "it reads no source", reads[:5])


def table(head: tuple[str, ...], rows: list[list[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def shown(key: str) -> str:
    """Return a key for a table: quoted, cut, no bars."""
    return f"`{(key if len(key) < 50 else key[:47] + '...')!r}`".replace("|", "/")


def told(row: dict[str, Any] | None) -> str:
    """Return what a receipt says, for a table."""
    if row is None:
        return "-"
    reason = f" {row['stage']}/{row['reason']}" if row["reason"] else ""
    return f"{row['status']}{reason}, model {row['model'][:6]}, fence {row['fence']}"


def counted(ran: Ran) -> str:
    """Return what gc found, by kind."""
    kinds = ("superseded", "gone", "orphans", "temporary")
    return ", ".join(f"{ran.summary['metrics'][kind]:.0f} {kind}" for kind in kinds)


def register(folder: Path, config: ModelConfig, *, seed: int) -> int:
    """Register a tiny model as the next version; return its number."""
    from pipelines import tracking

    files = {path.name: path.read_bytes() for path in model_folder(folder, config, seed=seed).iterdir()}
    tracking.connect()
    with tracking.run("nightly"):
        return tracking.register_model(tracking.log_model(files, example=hostile.png(1, 8, 8)), "nightly")


def crown(version: int) -> None:
    """Point the alias to a version."""
    from pipelines import tracking

    tracking.connect().set_registered_model_alias("nightly", "champion", str(version))


def soak(folder: Path, arguments: argparse.Namespace) -> int:
    """Run the nights in an empty folder; return the exit code."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.chdir(folder)  # where MLflow keeps what it logs
    (folder / "s3").mkdir()
    flags = [*SAMPLING, "--no-track", "--engine", arguments.engine, "--num-workers", str(arguments.num_workers)]
    flags += ["--unit-megabytes", "0.2", "--max-dead-share", "0.6"]
    first, second = (register(folder / f"model-{seed}", MODELS["anchored"], seed=seed) for seed in (1, 2))
    crown(first)
    with (
        s3_server.serve(folder / "s3") as server,
        s3_proxy.serve(server.endpoint_url, lambda *_: "pass") as proxy,
    ):
        os.environ.update(server.environment())
        nights = Nights(Bucket(server, "nightly"), proxy, flags)
        fill(nights.archive, every=arguments.every)
        nights.night("Night 1", f"{len(nights.archive.truth)} objects, all new")
        result = nights.bucket.get(f"{OUTPUT}rgb.png")
        nights.night("Night 2", second_night(nights.archive, ("a result.png", result)), broken=arguments.broken)
        crown(second)
        nights.night("Night 3", third_night(nights.archive) + "; the alias moved to another version")
        nights.end()
    wrong = [law for good, law in nights.checks if not good]
    print(f"\n{len(nights.checks) - len(wrong)} of {len(nights.checks)} checks hold.")
    return 1 if wrong else 0


def main() -> int:
    """Print the account; return the exit code."""
    parser = argparse.ArgumentParser(description="Three nights over a bucket, and what the ledger says of them.")
    parser.add_argument("--engine", default="local", choices=["local", "ray"])
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--broken", type=float, default=0.05, help="share of the second night's requests that fail")
    parser.add_argument("--every", type=int, default=1, help="take every n-th file of the hostile corpus; 1 or 3")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(
        prefix="diffsr-nights-", dir=s3_server.parent_with_xattr(), ignore_cleanup_errors=True
    ) as name:
        return soak(Path(name), arguments)


if __name__ == "__main__":
    sys.exit(main())
