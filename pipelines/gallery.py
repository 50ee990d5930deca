"""Which images of an evaluation a person is shown, and their pictures: for the report, and for the study."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.comparisons import UNCERTAINTY
from pipelines.datasets import Dataset
from pipelines.evaluated import Picture
from pipelines.measures import MEASURES
from pipelines.scoring import Contender, Running, draw_pictures
from pipelines.study import Trial

WORST, SAMPLE = 4, 8
WORST_BY = ("lpips", "psnr_y", "psnr", "niqe", "lr_psnr")  # the first two of these that were measured
CROP_PX, STUDY_PX = 176, 256  # 176 fills a phone at twice its size, and a column of a wide window at three times


def choose(rows: Sequence[Mapping[str, Any]], *, seed: int) -> dict[str, str]:
    """Return key -> why it is shown: the worst of `model` by two measures, and a sample that the seed decides."""
    scored = [row for row in rows if row["method"] == "model" and not row["reason"]]
    chosen: dict[str, str] = {}
    for name in [name for name in WORST_BY if any(row.get(name) is not None for row in scored)][:2]:
        measure, having = MEASURES[name], [row for row in scored if row.get(name) is not None]
        having.sort(key=lambda row: (row[name] * (1 if measure.better == "higher" else -1), row["key"]))
        for row in having[:WORST]:
            chosen.setdefault(row["key"], f"worst {measure.label}")
    for key in drawn([row["key"] for row in scored], SAMPLE, seed=seed):
        chosen.setdefault(key, "seeded sample")
    return chosen


def drawn(keys: Sequence[str], count: int, *, seed: int) -> list[str]:
    """Return this many keys, or all: those with the smallest hashes, so that a key's neighbours do not matter."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode(errors="surrogateescape")).digest())[
        :count
    ]


def pictures(
    rows: Sequence[Mapping[str, Any]], dataset: Dataset, contenders: Sequence[Contender], running: Running, *, seed: int
) -> list[Picture]:
    """Return the pictures of the images that `choose` takes, in its order."""
    chosen = choose(rows, seed=seed)
    if not chosen:
        return []
    found = draw_pictures(dataset, contenders, chosen, side=CROP_PX, running=running, label="pictures")
    return [
        Picture(
            key=key,
            why=why,
            crops={name: png for name, png in found[key].items() if name != UNCERTAINTY},
            uncertainty=found[key].get(UNCERTAINTY),
        )
        for key, why in chosen.items()
        if key in found
    ]


def trials(
    rows: Sequence[Mapping[str, Any]],
    dataset: Dataset,
    contenders: Sequence[Contender],
    running: Running,
    *,
    count: int,
    seed: int,
) -> list[Trial]:
    """Return the trials of a study: each of `count` images once for each contender."""
    keys = drawn([row["key"] for row in rows if row["method"] == "model" and not row["reason"]], count, seed=seed)
    found = draw_pictures(dataset, contenders, set(keys), side=STUDY_PX, running=running, label="study")
    return [
        Trial(key=key, method=each.method, lr=found[key]["lr"], sr=found[key][each.method], hr=found[key]["hr"])
        for key in keys
        if key in found
        for each in contenders
    ]
