"""One unit of the upscale job: assets from source to result, side by side; published with sidecars, or accounted for.

An asset is one thread's from its first byte to its receipt: while one waits for the store, others are decoded, encoded
and published, and as many windows as may be in flight share the network's calls. Nothing depends on who is beside whom.
"""

import errno
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

from diffsr_core.checkpoint import model_from_files
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from pipelines import storage
from pipelines.calibration import planned_in_flight
from pipelines.config import fingerprint
from pipelines.corpus import Corpus, Original
from pipelines.engine import Enter
from pipelines.images import Refused
from pipelines.inventory import proven, sha256_of
from pipelines.kinds import Asset, Kind, PassedOver, Result, draw, out_of_memory
from pipelines.lease import Fence, publish_fenced
from pipelines.ledger import Receipt
from pipelines.models import load_files
from pipelines.quality import Thresholds
from pipelines.sidecars import Sidecar, Written, describe, read_sidecar, uncertainty_key
from pipelines.stills import Stills, StillSettings

# What a store says of a name that it cannot hold: too long, or a file where another name needs a folder.
BAD_NAME = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
HELD_BYTES = 3 * 2**29  # of all open assets together; a larger one is open alone
BESIDE = 3  # assets that are read, decoded, encoded or published while others are on the device


class UpscaleWorker:
    """Unit -> result objects and a receipt per asset; the model is loaded once. Plain arguments.

    recipe: all that decides the bytes, `sampling` and `still` in it; admission: what else decides what becomes of an
    input (StillSettings has both). model: its digest. in_flight: windows on the device at once, 0 for as
    many as a part of the free memory holds. fence: of the run, under which results are replaced.
    """

    def __init__(
        self,
        *,
        source: str,
        output: str,
        fence: int,
        model_uri: str,
        model: str,
        recipe: dict[str, Any],
        admission: dict[str, Any],
        in_flight: int = 0,
        device: str = "cpu",
        memory_share: float = 0.5,
    ) -> None:
        network, _ = model_from_files(load_files(model_uri))
        self.upscaler = Upscaler(network, SamplingRecipe(**recipe["sampling"]), device=device, regression=False)
        self.corpus, self.output, self.fence = Corpus(source=source), output, Fence(output, fence)
        self.model, self.recipe, self.fingerprint = model, recipe, fingerprint(recipe)
        still = recipe["still"] | admission
        thresholds = Thresholds(**{item.name: still.pop(item.name) for item in fields(Thresholds)})
        settings = StillSettings(**still, thresholds=thresholds)
        self.kind: Kind = Stills(settings, model=model, recipe=self.fingerprint)
        self.in_flight = in_flight or planned_in_flight(self.upscaler, share=memory_share)
        self._device = threading.BoundedSemaphore(self.in_flight)
        self._memory = MemoryBudget(HELD_BYTES)

    def __call__(self, rows: list[dict[str, Any]], enter: Enter) -> list[Receipt]:
        if enter.careful:  # one of them has killed its process: alone, it is found
            return [self._asset(row, enter) for row in rows]
        with ThreadPoolExecutor(self.in_flight + BESIDE, thread_name_prefix="asset") as pool:
            return list(pool.map(lambda row: self._asset(row, enter), rows))

    def _asset(self, row: dict[str, Any], enter: Enter) -> Receipt:
        started = time.time()
        known = {**row, "recipe": self.fingerprint, "model": self.model, "started": started}
        try:
            enter(row["key"])
            outcome = self._done(row)
        except PassedOver as passed:
            outcome = {"status": "skipped", "stage": passed.stage, "reason": passed.reason, "message": passed.message}
        except Refused as refused:
            outcome = {"status": "dead", "stage": refused.stage, "reason": refused.reason, "message": refused.message}
        return Receipt(**known, **outcome, seconds=time.time() - started)

    def _done(self, row: dict[str, Any]) -> dict[str, Any]:
        """Upscale and publish one asset; return the receipt's outcome. Raises Refused or PassedOver."""
        began = time.perf_counter()
        with self.corpus.fetch(row) as original:
            read_s = time.perf_counter() - began
            with (
                out_of_memory(),
                self._memory.held(self.kind.held_bytes(original)),
                self.kind.open(original, row) as asset,
            ):
                with named(asset.out_key):
                    there = read_sidecar(storage.join(self.output, asset.out_key))
                    self._check_free(asset.out_key, row["key"], there)
                if there is not None and self._is_done(there, row, original):
                    return there.outcome()
                device_s = self._upscaled(asset)
                result = asset.finish(self.upscaler)
                seconds = {"read_s": read_s, "device_s": device_s, **asset.seconds}
                began = time.perf_counter()
                outcome = self._publish(row, original, result, there)
                seconds["publish_s"] = time.perf_counter() - began
        return {**outcome, "metrics": {**outcome["metrics"], **seconds}}

    def _upscaled(self, asset: Asset) -> float:
        """Put every window of an asset through the network; return the seconds of its calls."""
        seconds = 0.0
        for window in asset.windows(self.upscaler):
            pixels = asset.read(window)
            with self._device:
                drawn = draw(self.upscaler, pixels, window, noise=asset.noise)
            seconds += drawn.seconds
            asset.assemble(window, drawn)
        return seconds

    def _publish(
        self, row: dict[str, Any], original: Original, result: Result, there: Sidecar | None
    ) -> dict[str, Any]:
        """Write the sidecar, the files beside the image, then the image; there: what lay at its place.

        Raises Refused for a name that cannot be.
        """
        files = {}
        for key, path in result.files.items():
            with open(path, "rb") as file:
                files[key] = Written(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
        document: dict[str, Any] = {
            "source": {"key": row["key"], "etag": row["etag"], "size": row["size"], "sha256": original.digest},
            "output": describe(result.out_key, files),
            "model": {"digest": self.model},
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "method": result.method,
            "quality": {"verdict": result.verdict, "message": result.message},
            "metrics": result.metrics,
            "digital_source_type": result.source_type,
            "synthetic": True,
            "notes": result.notes,
        }
        document["source"] |= result.source
        document["output"] |= {"format": result.format, **result.output}
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace")
        with named(result.out_key):
            if there is not None and there.out_key == result.out_key and uncertainty_key(result.out_key) not in files:
                self._remove_map(there)
            publish_fenced(storage.join(self.output, f"{result.out_key}.json"), text, self.fence)
            for key, path in result.files.items():
                publish_fenced(storage.join(self.output, key), path, self.fence)
        return Sidecar(document).outcome()

    def _remove_map(self, there: Sidecar) -> None:
        """Remove the map of the result that lies here, where it is the one that its sidecar names.

        Before its sidecar goes: a run that is killed in between finds it again.
        """
        uri = storage.join(self.output, beside := uncertainty_key(there.out_key))
        if beside in there.files and sha256_of(uri) == there.files[beside]:
            self.fence.check()
            storage.delete(uri)

    def _is_done(self, there: Sidecar, row: dict[str, Any], original: Original) -> bool:
        """Return whether the result is there already, whole: a run that was killed had written it, not its receipt."""
        found = (there.fingerprint, there.model, there.source_key, there.etag, there.source_sha256)
        wanted = (self.fingerprint, self.model, row["key"], row["etag"], original.digest)
        return found == wanted and proven(self.output, there.out_key) is not None

    def _check_free(self, key: str, source_key: str, there: Sidecar | None) -> None:
        """Raise Refused where `key` is the place of another source's result: of this night or of an earlier one.

        there: what lies at `key` now.
        """
        places = {key, uncertainty_key(key)} if self.upscaler.recipe.num_samples > 1 else {key}
        for taken in places - {source_key}:
            if storage.exists(storage.join(self.corpus.source, taken)):
                message = f"its result would be {taken!r}, which is a source itself; rename one"
                raise Refused("publish", "key_taken", message)
        if storage.is_local(self.output):  # a file system has no room for a file where a folder must be
            for taken in (key, f"{key}.json"):
                if storage.is_folder(storage.join(self.corpus.source, taken)):
                    message = f"its result would be {taken!r}, which is a folder of the source; rename one"
                    raise Refused("publish", "key_taken", message)
        if self.upscaler.recipe.num_samples > 1:  # a name that is too long is found before anything is written
            with suppress(FileNotFoundError):
                storage.open_file(storage.join(self.output, uncertainty_key(key))).close()
        owners = [there]
        if key.endswith(suffix := uncertainty_key("")):
            owners.append(read_sidecar(storage.join(self.output, key.removesuffix(suffix))))
        for sidecar in owners:
            if sidecar is not None and sidecar.source_key != source_key and key in sidecar.keys:
                message = f"{key!r} holds the result of {sidecar.source_key!r}; rename one of the two sources"
                raise Refused("publish", "key_taken", message)


class MemoryBudget:
    """What the assets of a worker may hold together: each waits for its share."""

    def __init__(self, total_bytes: int) -> None:
        self._total = self._free = total_bytes
        self._changed = threading.Condition()

    @contextmanager
    def held(self, wanted_bytes: int) -> Iterator[None]:
        """Hold so much for the body, or all there is where that is less."""
        share = min(wanted_bytes, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= share)
            self._free -= share
        try:
            yield
        finally:
            with self._changed:
                self._free += share
                self._changed.notify_all()


@contextmanager
def named(key: str) -> Iterator[None]:
    """Turn what a store says of a name that it cannot hold into a refusal; one that is full or away ends the job."""
    try:
        yield
    except OSError as error:
        if error.errno not in BAD_NAME:
            raise
        raise Refused("publish", "bad_name", f"{key!r} cannot be written: {error}; rename it") from error
