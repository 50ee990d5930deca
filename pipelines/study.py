"""The page that asks people which of two images is the photograph; `answers` counts what they say.

Two-alternative forced choice as in section 4.3 of SR3 (Saharia et al., "Image Super-Resolution via Iterative
Refinement", 2021): two images side by side for 3 s, with the LR between them (task 1) or without it (task 2). Its
page saves a file of answers, and sends nothing.
"""

import math
import random
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config import check
from pipelines.images import Refused, decode
from pipelines.pages import pages

FORMAT = 1
FIXATION_S = 0.5
CHOOSING_S = 1.5  # a guess, for the page's word on how long it takes


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One image of one method: PNG or JPEG bytes, sr and hr of one size, which is a whole multiple of that of lr.

    lr is enlarged by repeating its pixels; give it enlarged, of the size of hr, to show it otherwise.
    """

    key: str
    method: str
    lr: bytes
    sr: bytes
    hr: bytes


def write_study(
    trials: Sequence[Trial],
    *,
    title: str,
    seed: int,
    seconds: float = 3.0,
    show_lr: bool | Literal["both"] = False,
    digest: str,
) -> str:
    """Return the HTML page: everything is inside it, it asks for nothing, and it carries no time.

    Nobody sees a photograph twice, as the half that returns is the reference: of several methods with one key each
    respondent is asked about one, and with show_lr="both" about half of the photographs in each task. One photograph,
    drawn with the seed, is for practice alone. digest: names the study in the answers. Raises ValueError.
    """
    check(math.isfinite(seconds) and 0 < seconds <= 60, "seconds", seconds, "must be above 0 and at most 60", "use 3")
    check(bool(digest), "digest", digest, "must name the study", "give the digest of what was evaluated")
    tasks = {True: [1], False: [2], "both": [1, 2]}[show_lr]
    photographs = _photographs(trials)
    check(
        len(photographs) > len(tasks), "trials", f"{len(photographs)} photographs",
        "must be one for practice and one or more a task", "give more images",
    )  # fmt: skip
    practice = random.Random(seed).choice(sorted(photographs))
    pictures: dict[bytes, int] = {}  # each is in the page once, however many trials show it
    shown = [_entry(trial, pictures, with_lr=1 in tasks) for trial in trials if trial.key != practice]
    asked = len(photographs) - 1
    study = {
        "format": FORMAT,
        "study": digest,
        "title": title,
        "tasks": tasks,
        "seconds": seconds,
        "fixation_s": FIXATION_S,
        "practice": _entry(photographs[practice], pictures, with_lr=1 in tasks),
        "trials": shown,
        "pictures": [b64encode(data).decode() for data in pictures],
    }
    minutes = math.ceil(asked * (FIXATION_S + seconds + CHOOSING_S) / 60)
    return pages().get_template("study.html").render(study=study, title=title, asked=asked, minutes=minutes)


def _photographs(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Return the first trial of each key. Raises ValueError for trials that cannot be shown, or say who is who."""
    first: dict[str, Trial] = {}
    for (key, method), times in Counter((trial.key, trial.method) for trial in trials).items():
        check(times == 1, "trials", key, f"must have one image of {method!r}, not {times}", "give each image once")
    for trial in trials:
        check(bool(trial.key and trial.method), "trials", (trial.key, trial.method), "must be named", "name both")
        same = first.setdefault(trial.key, trial)
        check(
            trial.hr == same.hr and trial.lr == same.lr, "trials", trial.key,
            "must have one reference and one LR for all methods", "encode them once",
        )  # fmt: skip
    return first


def _entry(trial: Trial, pictures: dict[bytes, int], *, with_lr: bool) -> dict[str, Any]:
    """Return what the page holds of a trial: names, size and the numbers of its pictures, which are added."""
    height, width = _size(trial, "hr")
    size = _size(trial, "sr")
    rule = f"must be of the size of hr ({width} x {height} px)"
    check(size == (height, width), f"sr of {trial.key!r}", f"{size[1]} x {size[0]} px", rule, "crop both alike")
    if with_lr:
        size = _size(trial, "lr")
        fits = height % size[0] == 0 and height // size[0] * size[1] == width
        rule = f"must divide that of hr ({width} x {height} px)"
        check(fits, f"lr of {trial.key!r}", f"{size[1]} x {size[0]} px", rule, "crop hr to a multiple of the scale")
    names = ("lr", "sr", "hr") if with_lr else ("sr", "hr")
    numbers = {name: pictures.setdefault(getattr(trial, name), len(pictures)) for name in names}
    return {"key": trial.key, "method": trial.method, "width": width, "height": height, **numbers}


def _size(trial: Trial, name: str) -> tuple[int, int]:
    """Return height and width. Raises ValueError for what some browser would not show, or not as it is stored."""
    data, label = getattr(trial, name), f"{name} of {trial.key!r}"
    known = data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))
    check(known, label, data[:8], "must be PNG or JPEG", "encode it as one")
    try:
        picture = decode(data)
    except Refused as error:
        raise ValueError(f"{label} must be an image that can be read: {error}; encode it again") from error
    check(not picture.exif_transposed, label, "EXIF orientation", "must be stored upright", "turn its pixels")
    height, width = picture.pixels.shape[:2]
    return height, width
