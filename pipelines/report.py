"""The evaluation as one HTML file that needs nothing else, and its table of means as Markdown.

The file works from `file://` and from an object store: styles, script and pictures are inside it, and its content
security policy forbids the browser any request. It carries no time, so the same scores give the same bytes.
"""

import math
import struct
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

METRIC_LABELS = {"psnr": "PSNR", "ssim": "SSIM", "psnr_y": "PSNR-Y", "ssim_y": "SSIM-Y", "lr_psnr": "LR-PSNR"}
METHOD_LABELS = {"model": "diffusion"}  # every other method is shown under its own name
STATUS_LABELS = {"dead": "refused", "skipped": "skipped", "done": "done"}  # in the order in which they are listed
PER_IMAGE = ("psnr", "ssim", "lr_psnr")
SMALLEST_TILE_PX = 160  # CSS px: the scores under a crop must fit below it


def markdown_table(means: Mapping[str, float], methods: Sequence[str], metrics: Sequence[str]) -> str:
    """Return a GitHub table, one line a method, without a final newline; dB to 2 decimals, SSIM to 4.

    means: `<method>_<metric>` -> value. Raises KeyError for one that is missing.
    """
    lines = [
        "| " + " | ".join(["method", *(METRIC_LABELS.get(name, name) for name in metrics)]) + " |",
        "|".join(["", "---", *("---:" for _ in metrics), ""]),
    ]
    for method in methods:
        cells = [_number(means[f"{method}_{name}"], name) for name in metrics]
        lines.append("| " + " | ".join([METHOD_LABELS.get(method, method), *cells]) + " |")
    return "\n".join(lines)


def write_report(
    *,
    title: str,
    methods: Sequence[str],
    metrics: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    strips: Sequence[tuple[str, bytes]],
    ledger: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, str],
) -> str:
    """Return the HTML text. What is empty has no section.

    metrics: means by `<method>_<metric>`, and seconds_per_image. rows: one an image, with key, reason (empty when
    scored), message, seconds and `<method>_<metric>`. strips: (key, PNG of tiles of equal width side by side: LR, each
    method, HR). ledger: rows as in `ledger.Receipt`, and thumb_in and thumb_out, PNG bytes, where there are any.
    Raises ValueError for a strip that is no such PNG and for a status that has no name here.
    """
    by_key = {row["key"]: row for row in rows}
    columns = ["LR", *(METHOD_LABELS.get(method, method) for method in methods), "HR"]
    environment = pages()
    environment.filters |= {"number": _number}
    names = [name for name in METRIC_LABELS if any(f"{method}_{name}" in metrics for method in methods)]
    return environment.get_template("report.html").render(
        title=title,
        methods={method: METHOD_LABELS.get(method, method) for method in methods},
        means=metrics,
        metric_labels=METRIC_LABELS,
        names=names,
        per_image=PER_IMAGE,
        best={name: _best(metrics, methods, name) for name in names},
        scored=[row for row in rows if not row["reason"]],
        unscored=[row for row in rows if row["reason"]],
        columns=columns,
        strips=[_strip(key, data, len(columns)) | {"row": by_key.get(key, {})} for key, data in strips],
        assets=[asset for status in STATUS_LABELS for asset in ledger if asset["status"] == status],
        counts=_counts(ledger),
        statuses=STATUS_LABELS,
        provenance=provenance,
    )


def _best(metrics: Mapping[str, float], methods: Sequence[str], name: str) -> set[str]:
    """Return the methods whose shown value is the highest; none when nobody is beaten or there is no number."""
    shown = {method: _number(metrics.get(f"{method}_{name}"), name) for method in methods}
    values = {method: float(text) for method, text in shown.items() if text != "–"}
    winners = {method for method, value in values.items() if value == max(values.values())}
    return winners if len(winners) < len(values) else set()


def _counts(ledger: Sequence[Mapping[str, Any]]) -> str:
    """Return such as "6 in: 5 done, 1 refused". Raises ValueError for a status that has no name here."""
    found = [str(asset["status"]) for asset in ledger]
    for status in set(found) - set(STATUS_LABELS):
        raise ValueError(f"status is {status!r}: it must be one of {', '.join(STATUS_LABELS)}; it would be left out")
    parts = [f"{found.count(status)} {label}" for status, label in reversed(STATUS_LABELS.items()) if status in found]
    return f"{len(found)} in: {', '.join(parts)}"


def _strip(key: str, data: bytes, num_tiles: int) -> dict[str, Any]:
    """Return what the page needs of a strip: its size in px and the smallest whole zoom at which it can be read."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise ValueError(f"strip of {key!r} begins with {data[:8]!r}: it must be a PNG; encode it as one")
    width, height = struct.unpack(">II", data[16:24])
    if width == 0 or width % num_tiles:
        raise ValueError(
            f"strip of {key!r} is {width} px wide: it must hold {num_tiles} tiles of equal width; give LR, methods, HR"
        )
    zoom = math.ceil(SMALLEST_TILE_PX * num_tiles / width)
    return {"key": key, "png": data, "width": width, "height": height, "zoom": zoom}


def _number(value: float | None, name: str) -> str:
    """Return a metric as text: 4 decimals for SSIM, 2 for everything else, a dash for what was not measured."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{4 if name.startswith('ssim') else 2}f}"


def pages() -> Environment:
    """Return the templates of pages that need nothing else: what is missing is an error, what is shown is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"png": data_uri, "name": visible}
    return environment


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + b64encode(data).decode()


def visible(text: object) -> str:
    """Return the text with what cannot be seen (newlines, controls, bidi overrides, lone surrogates) as an escape.

    A name can then neither forge another nor leave text that UTF-8 cannot hold.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
