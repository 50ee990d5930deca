"""The answers of a study: files as its page saves them, and how often each method was taken for the photograph.

The fool rate is the share of trials in which the model's image was taken for the reference; 50 % is perfect confusion
(Saharia et al., "Image Super-Resolution via Iterative Refinement", 2021, section 4.3).
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, InstanceOf, ValidationError

from pipelines import storage
from pipelines.config import STRICT, check
from pipelines.engine import say
from pipelines.intervals import LEVEL, RESAMPLES, SEED, Interval, rate_interval
from pipelines.model_card import plain
from pipelines.pages import visible

MIN_RESPONDENTS = 3  # of whom a spread can be told
EXTREMES = 5  # images that fool most, and least
EXPLANATION = """The fool rate is the share of trials in which the method's image was taken for the photograph: 50 % is
perfect confusion. 50 % is inside where either interval holds it. Answers of one person are alike, so the
interval over respondents says more than that over trials; fewer than 3 respondents have none."""
TASKS = {1: "task 1, LR shown", 2: "task 2, LR not shown"}


@dataclass(frozen=True, kw_only=True)
class FoolRate:
    """One method in one task. by_trials: Wilson's. by_respondents: bootstrap over people; None for fewer than 3."""

    method: str
    task: int
    trials: int
    respondents: int
    fooled: int
    by_trials: Interval
    by_respondents: Interval | None
    response_ms: float  # median

    @property
    def confused(self) -> bool:
        """Return whether 50 % is within either interval: a bootstrap of few people is narrower than it should be."""
        return any(found.low <= 0.5 <= found.high for found in (self.by_trials, self.by_respondents) if found)


@dataclass(frozen=True, kw_only=True)
class ImageCount:
    """How often one image of one method was taken for the reference."""

    key: str
    method: str
    task: int
    trials: int
    fooled: int


@dataclass(frozen=True, kw_only=True, order=True)
class LeftOut:
    """A file that was not counted, and why."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a study's files say. rows: one a trial, `respondent`, `complete` and all fields of an answer."""

    rows: tuple[dict[str, Any], ...]
    num_files: int  # that were given
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, kw_only=True)
class FoolRates:
    """Rates by task and method; images by task, those that fool most first; files as in `Collected`."""

    rates: tuple[FoolRate, ...]
    images: tuple[ImageCount, ...]
    num_files: int
    left_out: tuple[LeftOut, ...]


def read_answers(uris: Iterable[storage.Uri], *, digest: str | None = None) -> "Collected":
    """Return what was answered, one row a trial. Says what was left out, and what was counted once.

    A file that cannot be read, or that the page cannot have saved, is left out. A respondent's files (one saved half
    way, one at the end) count once, as the longest. digest: of the study; None for that of the first file. Raises
    ValueError where no file can be read, and for files that do not belong together: of other studies, shown for
    another time, or two that contradict each other; TransientError for a store that does not answer.
    """
    found: dict[str, tuple[str, _Answers]] = {}  # respondent -> name of the file, answers
    left_out: list[LeftOut] = []
    repeated = Counter[str]()
    first: tuple[str, _Answers] | None = None
    for uri in uris:
        name = visible(uri)
        try:
            answers = _answers(uri)
        except ValueError as error:
            left_out.append(LeftOut(file=name, reason=str(error)))
            say(f"answers: left out: {error}")
            continue
        first = first or (name, answers)
        _check_together(name, answers, first=first, digest=digest)
        before = found.get(answers.respondent, (name, answers))
        short, long = sorted((before, (name, answers)), key=lambda one: len(one[1].trials))
        check(
            long[1].trials[: len(short[1].trials)] == short[1].trials, f"respondent of {name}", answers.respondent,
            f"must say the same as in {before[0]}", "leave out the file that was changed",
        )  # fmt: skip
        repeated[answers.respondent] += answers.respondent in found
        found[answers.respondent] = long
    num_files = repeated.total() + len(found) + len(left_out)
    remedy = left_out[0].reason if left_out else "give the files that the page saved"
    check(bool(found), "answers", f"{num_files} files", "must hold one or more that can be counted", remedy)
    for respondent, times in sorted((+repeated).items()):
        say(f"answers: respondent {respondent} is in {times + 1} files, counted once")
    if left_out:
        say(f"answers: {len(left_out)} of {num_files} files were left out")
    parts = sum(not answers.complete for _, answers in found.values())
    if parts:
        say(f"answers: {parts} of {len(found)} respondents stopped before the end; what they answered counts")
    rows = tuple(
        {"respondent": respondent, "complete": answers.complete} | trial.model_dump()
        for respondent, (_, answers) in sorted(found.items())
        for trial in answers.trials
    )
    return Collected(rows=rows, num_files=num_files, left_out=tuple(sorted(left_out)))


def fool_rates(collected: Collected) -> FoolRates:
    """Return the rates of what `read_answers` found, whatever the order of its rows. Raises ValueError for none."""
    rows = collected.rows
    check(bool(rows), "answers", len(rows), "must be one or more", "give files with answers")
    groups = defaultdict[tuple[int, str], list[Mapping[str, Any]]](list)
    images = defaultdict[tuple[int, str, str], list[bool]](list)
    for row in rows:
        groups[row["task"], row["method"]].append(row)
        images[row["task"], row["method"], row["key"]].append(row["fooled"])
    counts = [
        ImageCount(key=key, method=method, task=task, trials=len(found), fooled=sum(found))
        for (task, method, key), found in images.items()
    ]
    counts.sort(key=lambda one: (one.task, -one.fooled / one.trials, -one.trials, one.key, one.method))
    return FoolRates(
        rates=tuple(_rate(groups[name]) for name in sorted(groups)), images=tuple(counts),
        num_files=collected.num_files, left_out=collected.left_out,
    )  # fmt: skip


def to_markdown(found: FoolRates) -> str:
    """Return the table of rates, what was left out, and the images that fool most and least, as GitHub's Markdown."""
    heads = ["task", "method", "trials", "respondents", "fool rate", "95 % over trials", "95 % over respondents"]
    lines = ["| " + " | ".join([*heads, "50 % is", "median response"]) + " |", "|---|---|" + "---:|" * 7]
    for rate in found.rates:
        cells = [TASKS[rate.task], plain(rate.method), f"{rate.trials:,}", f"{rate.respondents:,}"]
        cells += [f"{rate.by_trials.mean:.1%}", _ends(rate.by_trials), _ends(rate.by_respondents)]
        cells += ["inside" if rate.confused else "outside", f"{rate.response_ms / 1000:.2f} s"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", EXPLANATION]
    if found.left_out:
        lines += ["", f"**{len(found.left_out):,} of {found.num_files:,} files were left out:**", ""]
        lines += [f"* {plain(one.reason)}" for one in found.left_out]
    for task, words in TASKS.items():
        images = [one for one in found.images if one.task == task]
        least = images[EXTREMES:][::-1][:EXTREMES]
        for title, some in (("Fooled most", images[:EXTREMES]), ("Fooled least", least)):
            if some:
                lines += ["", f"{title} ({words}):", ""]
                lines += [f"* {plain(one.key)} ({plain(one.method)}): {one.fooled} of {one.trials}" for one in some]
    return "\n".join(lines) + "\n"


def to_json(found: FoolRates) -> str:
    """Return all of it: rates are shares from 0 to 1, an interval is its two ends, `contains_half` is `confused`."""
    rates = []
    for rate in found.rates:
        row = {name: value for name, value in asdict(rate).items() if not name.startswith("by_")}
        row["fool_rate"] = rate.by_trials.mean
        row["by_trials"] = rate.by_trials[1:]
        row["by_respondents"] = rate.by_respondents and rate.by_respondents[1:]
        rates.append(row | {"contains_half": rate.confused})
    document = {"files": found.num_files, "left_out": [asdict(one) for one in found.left_out], "rates": rates}
    document["images"] = [asdict(one) for one in found.images]
    return json.dumps(document, indent=1, allow_nan=False)


Milliseconds = Annotated[float, Field(ge=0)]
Side = Literal["left", "right"]


class _Answer(BaseModel):
    """One trial as the page stored it."""

    model_config = STRICT
    task: Literal[1, 2]
    key: InstanceOf[str]  # any text: a name may hold what UTF-8 does not
    method: InstanceOf[str]
    side_of_reference: Side
    chosen_side: Side
    fooled: bool
    response_ms: Milliseconds
    shown_ms: Milliseconds
    shown_scale: Annotated[float, Field(gt=0, le=1)]  # CSS px a pixel


class _Answers(BaseModel):
    """One file: a person's session, and all that is known of that person."""

    model_config = STRICT
    format: Literal[1]
    study: str
    title: InstanceOf[str]
    task: Literal[1, 2, "both"]
    seconds: Annotated[float, Field(gt=0)]
    fixation_s: Annotated[float, Field(ge=0)]
    respondent: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    started: str
    viewport: Annotated[list[int], Field(min_length=2, max_length=2)]  # width and height, CSS px
    device_pixel_ratio: Annotated[float, Field(gt=0)]
    planned: Annotated[int, Field(ge=1)]
    complete: bool
    trials: list[_Answer]


def _check_together(name: str, answers: _Answers, *, first: tuple[str, _Answers], digest: str | None) -> None:
    """Raises ValueError for a file whose trials were not those of the study, or were shown for another time."""
    own = answers.study
    check(digest in (None, own), f"study of {name}", own, f"must be {digest!r}", "give the files of that study")
    for field in ("study", "seconds", "fixation_s"):
        value, other = getattr(answers, field), getattr(first[1], field)
        rule = f"must be {other!r}, as in {first[0]}"
        check(value == other, f"{field} of {name}", value, rule, "count the files of each study by themselves")


def _answers(uri: storage.Uri) -> _Answers:
    """Return one file. Raises ValueError for what cannot be read, or the page cannot have written; TransientError."""
    name = visible(uri)
    try:
        found = _Answers.model_validate(json.loads(storage.read_bytes(uri)))
    except ValidationError as error:
        wrong = error.errors()[0]
        place = visible(".".join(map(str, wrong["loc"])) or "the whole")
        raise ValueError(f"answers {name}: {place}: {wrong['msg']}; use the file as the page saved it") from None
    except storage.TransientError:  # the next run may well read it, so nothing may be counted without it
        raise
    except OSError as error:
        reason = visible(error.strerror or error)
        raise ValueError(f"answers ({name}) must be a file that can be read: {reason}; give its whole name") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"answers {name} must be whole JSON ({error}); download the file again") from None
    for key, times in Counter(trial.key for trial in found.trials).items():
        check(times == 1, f"key in {name}", key, "must be asked once", "use the file as it was saved")
    for trial in found.trials:
        fooled = trial.chosen_side != trial.side_of_reference
        check(trial.fooled == fooled, f"fooled in {name}", trial.fooled, f"must be {fooled}", "use it as it was saved")
        fits = found.task in ("both", trial.task)
        check(fits, f"task in {name}", trial.task, f"must be {found.task}", "use the file as it was saved")
    whole = len(found.trials) == found.planned
    check(found.complete == whole, f"complete in {name}", found.complete, f"must be {whole}", "use it as it was saved")
    return found


def _rate(rows: Sequence[Mapping[str, Any]]) -> FoolRate:
    """Return the rate of one task and method."""
    people = defaultdict[str, list[bool]](list)
    for row in rows:
        people[row["respondent"]].append(row["fooled"])
    groups = [people[name] for name in sorted(people)]
    fooled = sum(map(sum, groups))
    return FoolRate(
        method=rows[0]["method"],
        task=rows[0]["task"],
        trials=len(rows),
        respondents=len(groups),
        fooled=fooled,
        by_trials=rate_interval(fooled, len(rows)),
        by_respondents=_cluster_interval(groups) if len(groups) >= MIN_RESPONDENTS else None,
        response_ms=float(np.median([row["response_ms"] for row in rows])),
    )


def _cluster_interval(groups: Sequence[Sequence[bool]], *, level: float = LEVEL) -> Interval:
    """Return the rate and its percentile interval over resampled people, each with all that he or she answered."""
    fooled, trials = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
    num = len(groups)
    times = np.random.default_rng(SEED).multinomial(num, np.full(num, 1 / num), size=RESAMPLES)
    low, high = np.quantile(times @ fooled / (times @ trials), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(fooled.sum() / trials.sum()), float(low), float(high))


def _ends(interval: Interval | None) -> str:
    return f"{interval.low:.1%} to {interval.high:.1%}" if interval else "–"
