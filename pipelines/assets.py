"""One asset from source to result: read, upscaled, published with its sidecar, or refused with a reason."""

import errno
import json
import time
from typing import Any, NamedTuple

from diffsr_core.checkpoint import model_from_files
from diffsr_core.upscaler import SamplingRecipe, Upscaler
from pipelines import storage
from pipelines.config import fingerprint
from pipelines.corpus import read_source
from pipelines.engine import Enter
from pipelines.images import Refused
from pipelines.ledger import Receipt
from pipelines.models import load_files
from pipelines.pictures import output_key, upscale_picture

# What a store says of a name that it cannot hold: too long, or a file where another name needs a folder.
BAD_NAME = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)


class Sidecar(NamedTuple):
    """What a sidecar says: whose result it describes, and the digest of that result."""

    source_key: str
    out_sha256: str


def read_sidecar(uri: str) -> Sidecar | None:
    """Return what the sidecar of the result at `uri` says, None where it is missing or damaged."""
    try:
        document = json.loads(storage.read_bytes(f"{uri}.json"))
        return Sidecar(str(document["source"]["key"]), str(document["output"]["sha256"]))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except (ValueError, LookupError, TypeError, RecursionError):  # not JSON, or not of our shape
        return None


class UpscaleWorker:
    """Unit -> result objects and a receipt per asset; the model is loaded once."""

    def __init__(
        self,
        *,
        source: str,
        output: str,
        model_uri: str,
        model_name: dict[str, Any],
        sampling: dict[str, Any],
        recipe: dict[str, Any],
        in_flight: int,
        device: str,
    ) -> None:
        network, _ = model_from_files(load_files(model_uri))
        self.upscaler = Upscaler(network, SamplingRecipe(**sampling), device=device, in_flight=in_flight)
        self.source, self.output, self.model, self.recipe = source, output, model_name, recipe
        self.fingerprint = fingerprint(recipe)

    def __call__(self, rows: list[dict[str, Any]], enter: Enter) -> list[Receipt]:
        return [self._asset(row, enter) for row in rows]

    def _asset(self, row: dict[str, Any], enter: Enter) -> Receipt:
        started = time.time()
        receipt = {**row, "recipe": self.fingerprint, "model": self.model["digest"], "started": started}
        try:
            enter(row["key"])
            result = self._publish(row)
        except Refused as refused:
            result = {"status": "dead", "stage": refused.stage, "reason": refused.reason, "message": refused.message}
        return Receipt(**receipt, **result, seconds=time.time() - started)

    def _publish(self, row: dict[str, Any]) -> dict[str, Any]:
        """Upscale one asset; write the sidecar, then the image; return the receipt's outcome. Raises Refused."""
        data = read_source(self.source, row)
        result = upscale_picture(
            self.upscaler,
            data,
            format=self.recipe["format"],
            quality=self.recipe["quality"],
            max_pixels=int(self.recipe["max_megapixels"] * 1e6),
        )
        key = output_key(row["key"], result.source_format, self.recipe["format"])
        sha256 = storage.digest_bytes(result.data)
        sidecar = {
            "source": {"key": row["key"], "etag": row["etag"], "sha256": storage.digest_bytes(data)},
            "output": {"key": key, "sha256": sha256, "bytes": len(result.data), "format": result.format},
            "model": self.model,
            "recipe": self.recipe,
            "metrics": result.metrics,
            "synthetic": True,
        }
        try:
            self._check_free(key, row["key"])
            storage.publish(
                storage.join(self.output, f"{key}.json"), json.dumps(sidecar, indent=1, sort_keys=True).encode()
            )
            storage.publish(storage.join(self.output, key), result.data)
        except OSError as error:  # a store that is full or away is no fault of the asset and ends the job
            if error.errno not in BAD_NAME:
                raise
            raise Refused("publish", "bad_name", f"{key!r} cannot be written: {error}; rename it") from error
        return {"status": "done", "out_key": key, "out_sha256": sha256, "out_bytes": len(result.data),
                "metrics": result.metrics}  # fmt: skip

    def _check_free(self, key: str, source_key: str) -> None:
        """Raise Refused where `key` is the place of another source's result: of this night or of an earlier one."""
        if key != source_key and storage.exists(storage.join(self.source, key)):
            raise Refused("publish", "key_taken", f"its result would be {key!r}, which is a source itself; rename one")
        sidecar = read_sidecar(storage.join(self.output, key))
        if sidecar is not None and sidecar.source_key != source_key:
            message = f"{key!r} holds the result of {sidecar.source_key!r}; rename one of the two sources"
            raise Refused("publish", "key_taken", message)
