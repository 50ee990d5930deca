"""The evaluation as one HTML file that needs nothing else, and its table of means as Markdown.

The file works from `file://` and from an object store: styles, script and pictures are inside it, and its content
security policy forbids the browser any request. It carries no time, so the same scores give the same bytes.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipelines.evaluated import Evaluation, Judged, Picture, judged
from pipelines.intervals import Interval
from pipelines.measures import MEASURES, SET_MEASURES, Measure
from pipelines.pages import pages, visible
from pipelines.plots import curve_plot, distributions

ARROWS = {"higher": "↑", "lower": "↓", "none": ""}
EVALUATED = ("model", "challenger")  # the method that the page is about: shown on the right of each slider
FIRST_COLUMNS = ("psnr_y", "ssim_y", "lpips", "lr_psnr", "psnr", "ssim")  # as many as fit are shown before one chooses
NUM_FIRST_COLUMNS = 3
STATIC_ROWS = 50  # of the table of images, for a reader without script
EXAMPLES = 3  # of the images that one reason left out
PLOT_SIZES_PX = {"wide": (1080, 420), "narrow": (358, 330)}  # text in a plot is not scaled, so a phone has its own


def markdown_table(
    summary: Mapping[str, Mapping[str, Interval]],
    sets: Mapping[str, Mapping[str, float]],
    methods: Mapping[str, str],
    measures: Sequence[str],
) -> str:
    """Return a GitHub table, one line a method, without a final newline: means, and [low, high] where that is wider.

    methods: name -> label. A dash is what was not measured. Measures of the whole set follow where there are any.
    Raises ValueError for a measure that has no name in `MEASURES`.
    """
    columns, whole = _measures(measures), _set_measures(sets)
    heads = ["method", *(f"{m.label}{_unit(m)} {ARROWS[m.better]}".strip() for m in [*columns, *whole])]
    lines = ["| " + " | ".join(heads) + " |", "|".join(["", "---", *("---:" for _ in heads[1:]), ""])]
    for method, label in methods.items():
        cells = [" ".join(filter(None, _interval(summary.get(method, {}).get(m.name), m))) for m in columns]
        cells += [number(sets.get(method, {}).get(m.name), m) for m in whole]
        lines.append("| " + " | ".join([visible(label).replace("|", "\\|"), *cells]) + " |")
    return "\n".join(lines)


def write_report(evaluation: Evaluation) -> str:
    """Return the HTML text. What is empty has no section.

    Raises ValueError for a picture whose crops are no PNGs of one size, and for a measure without a name in `MEASURES`.
    """
    methods = evaluation.methods
    measures, whole = _measures(evaluation.measures), _set_measures(evaluation.sets)
    images = judged(evaluation.rows, list(methods))
    anchors: dict[str, str] = {}
    groups = _groups(evaluation, anchors)
    chosen = _first_columns(evaluation.measures)
    evaluated = next((name for name in EVALUATED if name in methods), list(methods)[-1] if methods else "")
    environment = pages()
    environment.filters |= {"number": number, "unit": _unit, "cell": _interval, "count": "{:,}".format}
    return environment.get_template("report.html").render(
        title=evaluation.title,
        methods=methods,
        measures=measures,
        whole=whole,
        arrows=ARROWS,
        summary=evaluation.summary,
        sets=evaluation.sets,
        best=_best(evaluation, measures, whole),
        fewer=_fewer(evaluation, images),
        images=images,
        by_key={image.key: image for image in images},
        winners_of=lambda image, measure: winners({m: image.score(m, measure.name) for m in methods}, measure),
        num_scored=sum(not image.failures and bool(image.scores) for image in images),
        num_partly=sum(bool(image.failures and image.scores) for image in images),
        num_unscored=sum(not image.scores for image in images),
        reasons=_reasons(images, methods),
        curve=evaluation.curve,
        curve_measure=_measures([evaluation.curve.measure])[0] if evaluation.curve else None,
        curve_columns=_curve_columns(evaluation),
        plots={name: curve_plot(evaluation.curve, width=w, height=h) for name, (w, h) in PLOT_SIZES_PX.items()}
        if evaluation.curve
        else {},
        spreads=_spreads(images, methods, measures),
        groups=groups,
        uncertain=any(picture.uncertainty for picture in evaluation.pictures),
        evaluated=evaluated,
        own_first={evaluated: methods[evaluated], **methods} if methods else {},
        chosen=chosen,
        static_rows=STATIC_ROWS,
        table=_table(images, methods, measures, chosen, anchors),
        provenance=evaluation.provenance,
    )


def number(value: float | None, measure: Measure) -> str:
    """Return a value with the digits of its measure; a dash for what was not measured."""
    return "–" if value is None or math.isnan(value) else f"{value:z.{measure.digits}f}"


def _interval(interval: Interval | None, measure: Measure) -> tuple[str, str]:
    """Return the mean and "[low, high]" as text; nothing for an interval that is no wider than its mean as shown."""
    if interval is None:
        return "–", ""
    mean, low, high = (number(value, measure) for value in interval)
    return mean, "" if low == mean == high else f"[{low}, {high}]"


def _unit(measure: Measure) -> str:
    return f" ({measure.unit})" if measure.unit else ""


def _measures(names: Sequence[str]) -> list[Measure]:
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"measures ({name!r}) must be among {', '.join(MEASURES)}; add it there, with its label")
    return [MEASURES[name] for name in names]


def _set_measures(sets: Mapping[str, Mapping[str, float]]) -> list[Measure]:
    for name in {name for found in sets.values() for name in found} - SET_MEASURES.keys():
        raise ValueError(f"sets ({name!r}) must be among {', '.join(SET_MEASURES)}; add it there, with its label")
    return [measure for name, measure in SET_MEASURES.items() if any(name in found for found in sets.values())]


def _best(evaluation: Evaluation, measures: Sequence[Measure], whole: Sequence[Measure]) -> dict[str, set[str]]:
    """Return, by measure, the methods with the best shown value; none when nobody is beaten."""
    found = {}
    for measure in measures:
        intervals = {m: evaluation.summary.get(m, {}).get(measure.name) for m in evaluation.methods}
        found[measure.name] = winners({m: i.mean if i else None for m, i in intervals.items()}, measure)
    for measure in whole:
        values = {m: evaluation.sets.get(m, {}).get(measure.name) for m in evaluation.methods}
        found[measure.name] = winners(values, measure)
    return found


def _fewer(evaluation: Evaluation, images: Sequence[Judged]) -> dict[str, dict[str, str]]:
    """Return, by measure and method, "n of m": of m images that every method has a score for, the mean is over n.

    What is over all of them has no entry.
    """
    whole = [image for image in images if not image.failures]  # as `summarise` does
    found: dict[str, dict[str, str]] = {}
    for name in evaluation.measures:
        for method in (m for m in evaluation.methods if name in evaluation.summary.get(m, {})):
            of_it = [image.score(method, name) is not None for image in whole if method in image.scores]
            if not all(of_it):
                found.setdefault(name, {})[method] = f"{sum(of_it):,} of {len(of_it):,}"
    return found


def winners(values: Mapping[str, float | None], measure: Measure) -> set[str]:
    """Return the methods whose value is the best at the digits shown; none when no other is beaten by them."""
    if measure.better == "none":
        return set()
    shown = {method: number(value, measure) for method, value in values.items()}
    numbers = {method: float(text) for method, text in shown.items() if text != "–"}
    best = (max if measure.better == "higher" else min)(numbers.values(), default=0.0)
    found = {method for method, value in numbers.items() if value == best}
    return found if len(found) < len(numbers) else set()


def _reasons(images: Sequence[Judged], methods: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return why images have no score, the most frequent reason first, with the first of each as examples."""
    found: dict[str, dict[str, Any]] = {}
    for image in images:
        for reason in dict.fromkeys(reason for reason, _ in image.failures.values()):
            of = [method for method in methods if image.failures.get(method, ("",))[0] == reason]
            entry = found.setdefault(reason, {"reason": reason, "count": 0, "examples": []})
            entry["count"] += 1
            if len(entry["examples"]) < EXAMPLES:
                which = "" if len(of) == len(methods) else ", ".join(methods[method] for method in of)
                entry["examples"].append((image.key, which, image.failures[of[0]][1]))
    return sorted(found.values(), key=lambda entry: (-entry["count"], entry["reason"]))


def _curve_columns(evaluation: Evaluation) -> list[Measure]:
    """Return the measures of the curve's points: the one that is drawn first."""
    if evaluation.curve is None:
        return []
    found = {name for point in evaluation.curve.points for name in point.summary if name in MEASURES}
    return _measures([evaluation.curve.measure, *(n for n in MEASURES if n in found - {evaluation.curve.measure})])


def _spreads(
    images: Sequence[Judged], methods: Mapping[str, str], measures: Sequence[Measure]
) -> list[tuple[Measure, dict[str, Any]]]:
    """Return the distributions of each measure that has a finite value."""
    found = []
    for measure in measures:
        values = {
            method: [v for image in images if (v := image.score(method, measure.name)) is not None and math.isfinite(v)]
            for method in methods
        }
        if any(values.values()):
            found.append((measure, distributions(values)))
    return found


def _groups(evaluation: Evaluation, anchors: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Return the pictures by why they are shown, and fill `anchors` (by key); one shown before is only named."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for picture in evaluation.pictures:
        group = groups.setdefault(picture.why, [])
        if picture.key in anchors:
            group.append({"key": picture.key, "anchor": anchors[picture.key], "layers": []})
            continue
        anchors[picture.key] = anchor = f"picture-{len(anchors) + 1}"
        width, height = _size(picture)
        labels = {"lr": "LR (input)", **evaluation.methods, "hr": "HR (reference)"}
        layers = [(name, label, picture.crops[name]) for name, label in labels.items() if name in picture.crops]
        if picture.uncertainty is not None:
            layers.append(("uncertainty", "uncertainty", picture.uncertainty))
        group.append({"key": picture.key, "anchor": anchor, "width": width, "height": height, "layers": layers})
    return {why: sorted(group, key=lambda shown: not shown["layers"]) for why, group in groups.items()}


def _size(picture: Picture) -> tuple[int, int]:
    """Return the width and height in px that all of a picture's crops have."""
    sizes = set()
    layers = picture.crops if picture.uncertainty is None else {**picture.crops, "uncertainty": picture.uncertainty}
    for name, data in layers.items():
        if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 24:
            raise ValueError(f"crop {name} of {picture.key!r} begins with {data[:8]!r}: it must be a PNG; encode it so")
        sizes.add(struct.unpack(">II", data[16:24]))
    if len(sizes) != 1 or 0 in min(sizes):
        raise ValueError(
            f"crops of {picture.key!r} are of {sorted(sizes)} px: they must be of one size, so that they can cover one "
            "another; enlarge LR by repeating its pixels"
        )
    width, height = sizes.pop()
    return width, height


def _first_columns(names: Sequence[str]) -> list[str]:
    """Return the measures that the table of images begins with, in the order of the measures."""
    liked = [*(name for name in FIRST_COLUMNS if name in names), *(n for n in names if n not in FIRST_COLUMNS)]
    return [name for name in names if name in liked[:NUM_FIRST_COLUMNS]]


def _table(
    images: Sequence[Judged],
    methods: Mapping[str, str],
    measures: Sequence[Measure],
    chosen: Sequence[str],
    anchors: Mapping[str, str],
) -> Markup:
    """Return the scores of each image as JSON that no text in it can end: the script of the page draws them.

    A row: key, values (by measure, then by method, rounded as they are shown), [number of the method, why] of the
    methods without a score, and the anchor of its picture.
    """

    def rounded(value: float | None, measure: Measure) -> float | None:
        return None if value is None or not math.isfinite(value) else float(number(value, measure))

    rows = [
        [
            visible(image.key),
            [rounded(image.score(method, m.name), m) for m in measures for method in methods] if image.scores else [],
            [
                [index, visible(f"{reason} – {message}" if message else reason)]
                for index, method in enumerate(methods)
                if method in image.failures
                for reason, message in [image.failures[method]]
            ],
            anchors.get(image.key, ""),
        ]
        for image in images
    ]
    heads = [{"label": f"{m.label}{_unit(m)}", "digits": m.digits, "shown": m.name in chosen} for m in measures]
    document = {"methods": [visible(label) for label in methods.values()], "measures": heads, "rows": rows}
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
