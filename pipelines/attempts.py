"""Which asset kills its worker: a trail that outlives the process, so that one bad file never stops a job (law 1).

A codec that crashes or an asset that makes the kernel kill the process raises no exception that could be caught. The
first attempt at a unit leaves one mark, `<output>/_diffsr/attempts/<unit id>.json`. Where a later attempt finds it,
each asset is marked before it is begun; one that was found begun twice is refused, as a dead letter `worker_died`.
"""

import json

from pipelines import storage
from pipelines.images import Refused

MAX_DEATHS = 2


class Attempts:
    """The trail of one unit. It is called with the key of each asset before that, `leave` when the unit is done.

    careful: this unit killed its process before; its assets are then to be done one at a time, or the wrong one is
    blamed.
    """

    def __init__(self, root: str, unit_id: str) -> None:
        self.uri = storage.join(root, "attempts", f"{unit_id}.json")
        self.careful = storage.exists(self.uri)
        self.deaths: dict[str, int] = {}
        if self.careful:
            trail = json.loads(storage.read_bytes(self.uri))
            self.deaths = trail["deaths"]
            if trail["begun"]:
                self.deaths[trail["begun"]] = self.deaths.get(trail["begun"], 0) + 1
        self._mark("")

    def __call__(self, key: str) -> None:
        """Mark the asset as begun; raise Refused when it has killed its worker before, MAX_DEATHS times."""
        if not self.careful:
            return
        if self.deaths.get(key, 0) >= MAX_DEATHS:
            raise Refused("run", "worker_died", f"its worker died {self.deaths[key]} times while it was at work on it")
        self._mark(key)

    def leave(self) -> None:
        """Remove the trail."""
        storage.delete(self.uri)

    def _mark(self, key: str) -> None:
        storage.publish(self.uri, json.dumps({"deaths": self.deaths, "begun": key}).encode())
