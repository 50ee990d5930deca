"""Laws of pipelines.report: one file that needs nothing else, every row in it, and no name that can break it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipelines.curve import Curve
from pipelines.evaluated import Evaluation, Picture, judged
from pipelines.intervals import Interval
from pipelines.plots import BINS, curve_plot, distributions, log_ticks, plain, ticks
from pipelines.report import markdown_table, write_report

METHODS = {"bicubic": "bicubic", "regression": "regression", "model": "diffusion"}
MEASURES = ["psnr", "ssim", "lpips", "colour_drift"]
HOSTILE = 'in"b\'ox/</script><script>document.title="owned"</script>\n&amp;\u202egnp' + "x" * 900 + ".png"
SHOWN = HOSTILE.replace("\n", "\\n").replace("\u202e", "\\u202e")
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine's PATH")


class Page(HTMLParser):
    """What a browser sees: elements with their attributes, the rows of tables, all text but style and script."""

    VOID = ("meta", "img", "input")

    def __init__(self, html):
        super().__init__()
        self.elements, self.stack, self.text, self.scripts, self.rows = [], [], "", [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):  # of SVG
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        inside = self.stack[-1] if self.stack else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.text += data
            if {"td", "th"} & set(self.stack):
                self.rows[-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def png(width, height=8, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(pixels)


def flat(colour, side=64):
    return encoded(np.full((side, side, 3), colour, np.uint8))


def encoded(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def scored(key, value):
    """Rows of one image: `value` for bicubic, one more for each method after it, in every measure."""
    return [
        {"key": key, "method": method, "reason": "", "message": "", **dict.fromkeys(MEASURES, value + i)}
        for i, method in enumerate(METHODS)
    ]


def failed(key, *methods, reason="truncated", message="ends early"):
    return [{"key": key, "method": method, "reason": reason, "message": message} for method in methods or METHODS]


SUMMARY = {
    "bicubic": {"psnr": Interval(27.306, 27.1, 27.5), "ssim": Interval(0.81234, 0.8, 0.82),
                "lpips": Interval(0.4, 0.3, 0.5), "colour_drift": Interval(0.5, 0.5, 0.5)},
    "regression": {"psnr": Interval(29.0, 28.0, 30.0), "ssim": Interval(0.85, 0.85, 0.85),
                   "lpips": Interval(0.35, 0.35, 0.4), "colour_drift": Interval(0.5, 0.5, 0.5)},
    "model": {"psnr": Interval(28.4, 28.3, 28.5), "ssim": Interval(0.850001, 0.84, 0.86),
              "lpips": Interval(0.1, 0.05, 0.15)},
}  # fmt: skip


def point(sampler, steps, cost, mean, *, start_level=0.0, **more):
    choice = SimpleNamespace(sampler=sampler, grid="karras", num_steps=steps)
    summary = {"psnr": Interval(mean, mean - 0.1, mean + 0.1), **more}
    return SimpleNamespace(
        choice=choice, start_level=start_level, summary=summary, device_s_per_mp=cost, seconds_per_mp=2 * cost
    )


def curve(**changes):
    points = [point("ddim", n, 0.1 * n, 30 - 2 / n) for n in (2, 4, 8, 16)]
    points += [point("dpmpp-2m", n, 0.1 * n, 30.3 - 2 / n, start_level=0.5) for n in (2, 4, 8)]
    arguments = {"points": points, "measure": "psnr", "better": "higher", "knee": 5, "chosen": 3}
    return Curve(**arguments | changes)


def picture(key="a.png", why="worst PSNR", side=64, **more):
    colours = {"lr": (255, 0, 0), "bicubic": (0, 255, 0), "regression": (0, 0, 0), "model": (0, 0, 255)}
    crops = {name: flat(colour, side) for name, colour in {**colours, "hr": (255, 255, 0)}.items()}
    return Picture(**{"key": key, "why": why, "crops": crops, "uncertainty": flat((255, 0, 255), side)} | more)


def evaluation(**changes):
    arguments = {
        "title": "Evaluation of nano",
        "methods": METHODS,
        "rows": [*scored("a.png", 20.5), *scored("b.png", 10.25), *failed("broken.png")],
        "measures": MEASURES,
        "summary": SUMMARY,
        "sets": {"bicubic": {"fid": 40.0}, "model": {"fid": 20.0}},
        "pictures": [picture(), picture("b.png", "seeded sample"), picture(why="seeded sample")],
        "curve": curve(),
        "provenance": {"model": "nano, digest 0123"},
    }
    return Evaluation(**arguments | changes)


def report(**changes):
    return write_report(evaluation(**changes))


def pictures(page):
    prefix = "data:image/png;base64,"
    assert all(image["src"].startswith(prefix) for image in page.all("img"))
    return [base64.b64decode(image["src"].removeprefix(prefix), validate=True) for image in page.all("img")]


def data_of(page):
    """The rows that the script of the page reads."""
    (text,) = [text for text in page.scripts if text.startswith('{"methods"')]
    return json.loads(text)


def test_the_markdown_table_is_exactly_this():
    assert markdown_table(SUMMARY, {"model": {"fid": 20.0}}, METHODS | {"model": "a|b\n"}, MEASURES) == (
        "| method | PSNR (dB) ↑ | SSIM ↑ | LPIPS ↓ | Colour drift (levels of 255) ↓ | FID ↓ |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| bicubic | 27.31 [27.10, 27.50] | 0.8123 [0.8000, 0.8200] | 0.4000 [0.3000, 0.5000] | 0.50 | – |\n"
        "| regression | 29.00 [28.00, 30.00] | 0.8500 | 0.3500 [0.3500, 0.4000] | 0.50 | – |\n"
        "| a\\|b\\n | 28.40 [28.30, 28.50] | 0.8500 [0.8400, 0.8600] | 0.1000 [0.0500, 0.1500] | – | 20.00 |"
    )


@pytest.mark.parametrize("where", [{"measures": ["beauty"]}, {"sets": {"model": {"beauty": 1.0}}}])
def test_a_measure_without_a_name_is_an_error_and_not_left_out(where):
    with pytest.raises(ValueError, match=r"'beauty'.* must be among"):
        report(**where)


def test_the_page_asks_for_nothing_outside_itself():
    html = report()
    page = Page(html)
    assert page.stack == []
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    for _, attrs in page.elements:
        assert not {"srcset", "action", "data", "poster", "background", "formaction", "xlink:href"} & set(attrs)
        assert attrs.get("src", "data:").startswith("data:") and attrs.get("href", "#").startswith("#")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    policy = page.all("meta")[1]["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_the_same_scores_give_the_same_bytes():
    assert report() == report()


def test_the_summary_has_means_with_intervals_and_stars_the_best_by_what_is_better():
    page = Page(report())
    rows = [[" ".join(cell.split()) for cell in row] for row in page.rows[:4]]
    assert rows == [
        ["method", "PSNR ↑dB", "SSIM ↑", "LPIPS ↓", "Colour drift ↓levels of 255", "FID ↓"],
        ["bicubic", "27.31 [27.10, 27.50]", "0.8123 [0.8000, 0.8200]", "0.4000 [0.3000, 0.5000]", "0.50", "40.00"],
        ["regression", "★29.00 [28.00, 30.00]", "★0.8500", "0.3500 [0.3500, 0.4000]", "0.50", "–"],
        ["diffusion", "28.40 [28.30, 28.50]", "★0.8500 [0.8400, 0.8600]", "★0.1000 [0.0500, 0.1500]", "–", "★20.00"],
    ]
    assert "Peak signal-to-noise ratio" in page.text  # the measures' own notes
    alone = Page(report(methods={"model": "diffusion"}, pictures=[], curve=None))
    assert not [span for span in alone.all("span") if span.get("aria-label") == "best"]


def test_a_mean_over_fewer_images_than_were_scored_says_so():
    rows = [*scored("a", 1.0), *scored("b", 2.0), *scored("c", 3.0), *failed("d", "model")]
    rows += [row for row in scored("d", 4.0) if row["method"] != "model"]  # no method's mean has d in it
    for row in rows:
        if row["key"] in "cd" and row["method"] == "bicubic":
            row["ssim"] = None
        if row["key"] in "bc" and row["method"] == "model":
            row["ssim"] = None
    page = Page(report(rows=rows))
    rows = {row[0]: [" ".join(cell.split()) for cell in row] for row in page.rows[1:4]}
    assert rows["bicubic"][2] == "0.8123† [0.8000, 0.8200]" and rows["diffusion"][2].startswith("★0.8500† [")
    assert sum("†" in cell for row in rows.values() for cell in row) == 2
    titles = [cell["title"] for cell in page.all("td") if "title" in cell]
    assert titles == ["n = 2 of 3", "n = 1 of 3"]
    assert "† over fewer of these images" in page.text and "SSIM n = 2 of 3 or 1 of 3." in " ".join(page.text.split())
    assert "†" not in report()


def test_every_image_is_counted_and_those_without_a_score_say_why():
    oom = failed("part.png", "model", reason="oom", message="too large")
    rows = [*scored("a.png", 20.5), *failed("broken.png"), *failed("gone.png", reason="missing", message=""),
            *[row for row in scored("part.png", 1.0) if row["method"] != "model"], *oom]  # fmt: skip
    page = Page(report(rows=rows))
    lead = " ".join(page.text[: page.text.index("Summary")].split())
    counts = "4 images: 1 scored, 1 by some methods only, 2 not scored (missing 1, oom 1, truncated 1)."
    assert lead.endswith(counts)
    text = " ".join(page.text.split())
    assert "✕ truncated 1 image broken.png ends early" in text and "✕ oom 1 image part.png diffusion: too large" in text
    table = {row[0]: row[1:] for row in page.rows[-4:]}
    assert table == {
        "a.png": [*["20.50", "21.50", "22.50"], *["20.5000", "21.5000", "22.5000"] * 2],
        "broken.png": ["✕ truncated – ends early"],
        "gone.png": ["✕ missing"],
        "part.png✕ diffusion: oom – too large": [*["1.00", "2.00", "–"], *["1.0000", "2.0000", "–"] * 2],
    }
    data = data_of(page)
    assert [row[0] for row in data["rows"]] == ["a.png", "broken.png", "gone.png", "part.png"]
    assert data["rows"][1][1:3] == [[], [[i, "truncated – ends early"] for i in range(3)]]
    assert data["rows"][3][1] == [1, 2, None] * 4 and data["rows"][3][2] == [[2, "oom – too large"]]


def test_scores_are_written_with_the_digits_that_are_shown_and_what_is_no_number_is_a_dash():
    values = [[1 / 3, 1 / 3], [float("nan"), None], [float("inf"), -0.001]]
    rows = [
        {"key": f"{i}", "method": "model", "reason": "", "message": "", "psnr": psnr, "ssim": ssim}
        for i, (psnr, ssim) in enumerate(values)
    ]
    page = Page(report(rows=rows, methods={"model": "m"}, measures=["psnr", "ssim"], pictures=[]))
    assert [row[1] for row in data_of(page)["rows"]] == [[0.33, 0.3333], [None, None], [None, -0.001]]
    assert [row[1:] for row in page.rows[-3:]] == [["0.33", "0.3333"], ["–", "–"], ["inf", "-0.0010"]]


def test_crops_are_embedded_byte_for_byte_once_and_under_their_names():
    shown = [picture(), picture("not in rows.png", "seeded sample", uncertainty=None), picture(why="seeded sample")]
    page = Page(report(pictures=shown))
    assert pictures(page) == [*shown[0].crops.values(), shown[0].uncertainty, *shown[1].crops.values()]
    labels = ["LR (input)", *METHODS.values(), "HR (reference)", "uncertainty"]
    alts = [f"{label}: crop of a.png" for label in labels] + [
        f"{label}: crop of not in rows.png" for label in labels[:-1]
    ]
    assert [image["alt"] for image in page.all("img")] == alts
    figures = [figure for figure in page.all("figure") if figure.get("class") == "picture"]
    assert [(figure["id"], figure["style"]) for figure in figures] == [
        ("picture-1", "--width: 64; --height: 64"),
        ("picture-2", "--width: 64; --height: 64"),
    ]
    assert "a.png is shown above" in page.text and {"href": "#picture-1"} in page.all("a")
    assert [row for row in page.rows if row[0] == "PSNR"] == [["PSNR", "★22.50", "20.50", "21.50"]]


def test_the_evaluated_method_comes_first_in_the_scores_of_a_picture():
    tables = {"model": ["measure", "diffusion", "bicubic", "regression"],
              "other": ["measure", "last", "bicubic", "regression"]}  # fmt: skip
    for last, heads in tables.items():
        methods = {**METHODS} if last == "model" else {"bicubic": "bicubic", "regression": "regression", last: "last"}
        rows = [row | {"method": row["method"].replace("model", last)} for row in scored("a.png", 20.5)]
        crops = {name.replace("model", last): data for name, data in picture().crops.items()}
        page = Page(report(methods=methods, rows=rows, pictures=[picture(crops=crops)]))
        at = page.rows.index(heads)
        assert page.rows[at + 1] == ["PSNR", "★22.50", "20.50", "21.50"]
        assert page.rows[0][0] == "method" and page.rows[3][0] == heads[1]  # elsewhere the order is that of methods


NO_CROPS = {
    "empty": {"lr": b""},
    "gif": {"lr": b"GIF89a" + bytes(40)},
    "cut": {"lr": png(40)[:12]},
    "uneven": {"lr": png(40), "hr": png(41)},
    "none": {},
}


@pytest.mark.parametrize("crops", NO_CROPS.values(), ids=NO_CROPS)
def test_crops_that_are_not_pngs_of_one_size_are_an_error(crops):
    with pytest.raises(ValueError, match=r"of 'k' .* must"):
        report(pictures=[picture("k", crops=crops, uncertainty=None)])
    with pytest.raises(ValueError, match=r"of 'k' .* must"):
        report(pictures=[picture("k", uncertainty=png(9))])


def test_what_is_empty_has_no_section():
    bare = {"methods": {}, "rows": [], "measures": [], "summary": {}, "sets": {}, "pictures": [], "curve": None}
    nothing = Page(report(**bare, provenance={}))
    assert nothing.all("section") == [] and nothing.all("img") == []
    every = ["summary", "not-scored", "curve", "spreads", "pictures", "images", "provenance"]
    assert [section["aria-labelledby"] for section in Page(report()).all("section")] == every


def test_ticks_are_round_inside_and_few():
    for low, high in [(0.0, 1.0), (27.31, 27.34), (-3.0, 1000.0), (1e-5, 3e-5)]:
        found = ticks(low, high)
        assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high
        assert np.allclose(np.diff(found), found[1] - found[0]) and f"{found[1] - found[0]:.0e}"[0] in "125"
    assert log_ticks(0.15, 4.0) == [0.2, 0.5, 1.0, 2.0] and log_ticks(1e-3, 1e4) == [10.0**k for k in range(-3, 5)]
    assert [plain(value) for value in (0, 0.0001, 0.25, 27.5, 1000.0, 123456.0)] == [
        "0", "0.0001", "0.25", "27.5", "1000", "123456",
    ]  # fmt: skip


def test_the_plot_puts_each_point_where_its_logarithm_and_its_mean_are():
    found = curve_plot(curve(), width=600, height=300)
    assert [series["label"] for series in found["series"]] == ["ddim, karras", "dpmpp-2m, karras"]
    first = found["series"][0]["marks"]
    gaps = np.diff([mark["x"] for mark in first])
    assert gaps == pytest.approx(gaps.mean(), abs=0.2) and gaps[0] > 0  # twice the cost, one distance
    means = [mark["y"] for mark in first]
    assert (means[0] - means[1]) / (means[1] - means[2]) == pytest.approx(2, rel=0.02)  # 30 - 2 / n
    for mark in first:
        assert mark["low"] - mark["y"] == pytest.approx(mark["y"] - mark["high"], abs=0.2)
        assert found["left"] < mark["x"] < found["right"] and found["top"] < mark["y"] < found["bottom"]
    names = {label["role"]: label["text"] for label in found["labels"] if label["role"]}
    assert names == {"knee": "4 steps: knee", "chosen": "16 steps: chosen"}


def test_points_that_differ_in_their_start_alone_lie_along_it_and_have_no_knee():
    levels, means = (0.7, 0.0, 0.35), (30.5, 29.0, 29.8)
    points = [point("ddim", 1, 0.1, mean, start_level=level) for level, mean in zip(levels, means, strict=True)]
    found = curve_plot(curve(points=points, knee=1, chosen=0), width=600, height=300)
    (series,) = found["series"]
    assert [mark["text"] for mark in series["marks"]] == ["0", "0.35", "0.7"]
    assert np.diff([mark["x"] for mark in series["marks"]]) == pytest.approx(0.35 * (584 - 58) / 0.8, abs=0.2)
    assert [label["text"] for label in found["labels"] if label["role"]] == ["0.7: chosen"]
    page = Page(report(curve=curve(points=points, knee=1, chosen=0)))
    assert "numbers beside the points are start levels" in page.text and "knee" not in page.text


def test_no_text_of_the_plot_lies_on_another_or_on_a_mark():
    rng = np.random.default_rng(3)
    points = [point(s, n, 0.1 * n, float(30 + rng.normal() / 5)) for s in ("a", "b", "c", "d") for n in (1, 2, 3, 4, 6)]
    found = curve_plot(curve(points=points), width=358, height=330)
    boxes = [(t["x"], t["y"] - 10, t["x"] + 7 * len(t["text"]), t["y"]) for t in found["labels"] if not t["role"]]
    boxes += [(m["x"] - 5, m["y"] - 5, m["x"] + 5, m["y"] + 5) for series in found["series"] for m in series["marks"]]
    texts = len(boxes) - 20
    assert texts > 5
    for i, a in enumerate(boxes[:texts]):
        assert all(a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3] for b in boxes[i + 1 :])


def test_a_point_that_has_no_place_is_counted_and_stays_in_the_table():
    points = [point("ddim", 2, 0.0, 30.0), point("ddim", 4, 1.0, float("nan")), point("ddim", 8, 1.0, 31.0)]
    page = Page(report(curve=curve(points=points, knee=2, chosen=2)))
    assert "2 points without a time or a score are not drawn" in page.text
    rows = [[" ".join(cell.split()) for cell in row] for row in page.rows if row[0].startswith("ddim")]
    assert rows == [
        ["ddim, karras", "2", "0", "30.00 [29.90, 30.10]", "0", "0", ""],
        ["ddim, karras", "4", "0", "–", "1", "2", ""],
        ["ddim, karras", "8", "0", "31.00 [30.90, 31.10]", "1", "2", "knee and chosen"],
    ]
    assert "8 steps: knee and chosen" in page.text
    none = Page(report(curve=curve(points=points[:1], knee=0, chosen=0)))
    assert "1 point without a time or a score is not drawn" in none.text and not none.all("polyline")


def test_distributions_are_numpys_histograms_and_quantiles_on_one_axis():
    rng = np.random.default_rng(1)
    values = {"a": rng.normal(5, 1, 300).tolist(), "b": rng.normal(7, 1, 200).tolist(), "none": []}
    found = distributions(values)
    assert list(found["methods"]) == ["a", "b"]
    every = np.concatenate([values["a"], values["b"]])
    counts = {m: np.histogram(values[m], BINS, (every.min(), every.max()))[0] for m in ("a", "b")}
    most = max(c.max() for c in counts.values())
    for method in ("a", "b"):
        bars = {int(i): float(top) for i, top in re.findall(r"M(\d+) 100V([\d.]+)H", found["methods"][method]["bars"])}
        assert bars == {i: pytest.approx(100 - 100 * n / most, abs=0.05) for i, n in enumerate(counts[method]) if n}
        assert found["methods"][method]["quantiles"] == pytest.approx(
            np.percentile(values[method], [5, 25, 50, 75, 95])
        )
        span = every.max() - every.min()
        assert found["methods"][method]["mean_at"] == pytest.approx(
            BINS * (np.mean(values[method]) - every.min()) / span, abs=0.01
        )
    alike = distributions({"a": [3.0, 3.0]})["methods"]["a"]
    assert alike["bars"] == f"M{BINS // 2} 100V0.0H{BINS // 2 + 1}V100Z" and alike["places"] == [BINS / 2] * 5


def test_an_image_keeps_what_each_method_said_of_it():
    rows = [*scored("a", 1.0)[:2], *failed("a", "model"), {**scored("a", 1.0)[0], "method": "stranger"}]
    (image,) = judged(rows, list(METHODS))
    assert list(image.scores) == ["bicubic", "regression"] and image.failures == {"model": ("truncated", "ends early")}
    assert image.score("regression", "psnr") == 2.0 and image.score("model", "psnr") is None


def hostile_report():
    odd = "odd'\"<b>"
    rows = [row for key, value in ((HOSTILE, 20.0), ("z.png", 30.0)) for row in scored(key, value)]
    rows += [*failed(HOSTILE + "2", *METHODS, odd, reason=HOSTILE, message=HOSTILE), *failed("\ud800 lone")]
    return report(
        title=HOSTILE,
        methods={**METHODS, odd: HOSTILE},
        rows=rows,
        pictures=[picture(HOSTILE, HOSTILE, 48), picture(HOSTILE, HOSTILE, 48)],
        curve=curve(points=[point(HOSTILE, 2, 1.0, 30.0), point("ddim", 2, 1.5, 30.0)], knee=0, chosen=1),
        provenance={HOSTILE: HOSTILE},
    )


def test_hostile_names_stay_text():
    html, plain_page = hostile_report(), Page(report())
    page = Page(html)
    assert page.stack == []
    assert len(page.scripts) == len(plain_page.scripts) == 3
    for mine, other in zip(page.scripts, plain_page.scripts, strict=True):
        assert mine == other or mine.startswith('{"methods"')  # the data, in which no tag can begin or end
    assert "<" not in next(text for text in page.scripts if text.startswith('{"methods"'))
    data = data_of(page)
    assert [row[0] for row in data["rows"]] == [SHOWN, "z.png", SHOWN + "2", "\\ud800 lone"]
    assert data["methods"][3] == SHOWN and data["rows"][2][2][0] == [0, f"{SHOWN} – {SHOWN}"]
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain_page.elements}
    assert {n for _, attrs in page.elements for n in attrs} <= {n for _, attrs in plain_page.elements for n in attrs}
    assert page.text.count(SHOWN) > 20 and "gnp" in page.text
    assert "\u202e" not in html and "\\ud800 lone" in page.text
    assert html.encode()  # a lone surrogate would not encode


def chromium(folder, html, *options):
    """Open the page in a headless Chromium of its own; return what it prints."""
    (folder / "report.html").write_text(html, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, (folder / "report.html").as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def driven(folder, html, script, *options):
    """Run a script in the page and return what it leaves in `found`."""
    end = "document.title = 'found ' + JSON.stringify(found); document.body.remove();"
    probe = f"<script>const found = {{}};\n{script}\n{end}</script></body>"
    printed = chromium(folder, html.replace("</body>", probe), "--dump-dom", *options)
    return json.loads(unescape(re.search("<title>found (.*?)</title>", printed)[1]))


def shot(folder, html, *options, size=(900, 1600)):
    chromium(folder, html, f"--window-size={size[0]},{size[1]}", f"--screenshot={folder / 'shot.png'}", *options)
    return np.asarray(Image.open(folder / "shot.png").convert("RGB")).astype(int)


@needs_chromium
def test_the_page_is_drawn_in_the_scheme_that_the_reader_prefers(tmp_path):
    shots = {
        scheme: shot(tmp_path, report(), f"--blink-settings=preferredColorScheme={number}").mean(axis=2)
        for scheme, number in {"dark": 0, "light": 1}.items()
    }
    dark, light = shots["dark"], shots["light"]
    assert dark.shape == light.shape == (1600, 900)
    assert dark[2, 2] < 60 and light[2, 2] > 200
    for page in (dark, light):
        assert 0.01 < np.mean(np.abs(page - page[2, 2]) > 100) < 0.5  # text and pictures, on a background


@needs_chromium
def test_the_slider_moves_the_divider_between_the_chosen_layers(tmp_path):
    """Which pixels are shown is read from a screenshot: every layer is of one colour, and so is the page."""
    drive = """<script>
      const style = "body > * { display: none } body { background: #fff }"
        + "figure { position: fixed; left: 0; width: 400px } .scripts .stage::after { display: none }";
      const say = element => element.dispatchEvent(new Event("input", {bubbles: true}));
      const states = [[], [25], [75, "bicubic", "uncertainty"], [75, "hr", "lr", "swap"], [25, "hr", "hr"]];
      document.querySelectorAll("figure.picture").forEach((figure, index) => {
        const [at, first, second, swap] = states[index], [left, right] = figure.querySelectorAll("select");
        const range = figure.querySelector("input[type=range]");
        if (at) { range.value = at; say(range); }
        if (first) { left.value = first; say(left); right.value = second; say(right); }
        if (swap) figure.querySelector(".swap").click();
        figure.querySelectorAll("figcaption, .pair, input, .scores").forEach(element => element.style.display = "none");
        figure.style.top = `${450 * index}px`;
        document.body.append(figure);
        figure.style.display = "block";
      });
      document.head.append(Object.assign(document.createElement("style"), {textContent: style}));
    </script></body>"""
    html = report(pictures=[picture(f"{number}.png") for number in range(5)]).replace("</body>", drive)
    image = shot(tmp_path, html, size=(900, 2250))
    named = {(255, 0, 0): "lr", (0, 255, 0): "bicubic", (0, 0, 255): "model", (255, 255, 0): "hr",
             (255, 0, 255): "uncertainty", (255, 255, 255): ""}  # fmt: skip

    def widths(number):
        """The px of each colour in the middle row of a picture, from left to right."""
        row = [named[tuple(pixel)] for pixel in image[450 * number + 190].tolist()]
        order = list(dict.fromkeys(row))
        assert row == [name for name in order for _ in range(row.count(name))]  # each colour once, in one piece
        return {name: row.count(name) for name in order if name}

    assert widths(0) == {"lr": 192, "model": 192}  # 6 px a pixel: the most that fit into 400
    assert widths(1) == {"lr": 96, "model": 288}
    assert widths(2) == {"bicubic": 288, "uncertainty": 96}
    assert widths(3) == {"lr": 288, "hr": 96}
    assert widths(4) == {"hr": 384}


POINTER = """
  const stages = [...document.querySelectorAll(".stage")], ranges = [...document.querySelectorAll("input[type=range]")];
  const at = () => stages.map(stage => stage.style.getPropertyValue("--at"));
  found.first = at();
  const box = stages[0].getBoundingClientRect(), y = box.top + 5;
  stages[0].setPointerCapture = () => {}; stages[0].hasPointerCapture = () => true;
  const move = (type, share, button = 0) => stages[0].dispatchEvent(new PointerEvent(type,
    {bubbles: true, pointerId: 1, button, clientX: box.left + share * box.width, clientY: y}));
  move("pointerdown", .2, 2); found.other_button = at();
  move("pointerdown", .2); found.pressed = at();
  found.focused = document.activeElement === ranges[0];
  move("pointermove", .9); found.moved = at(); found.value = ranges[0].value;
  found.text = ranges[0].getAttribute("aria-valuetext");
  const all = document.querySelector("#all-left");
  all.value = "hr"; all.dispatchEvent(new Event("input"));
  found.left = [...document.querySelectorAll(".layer.left")].map(layer => layer.dataset.layer);
  found.right = [...document.querySelectorAll(".layer.right")].map(layer => layer.dataset.layer);
"""
TABLE = """
  const table = document.querySelector("#table");
  const keys = () => [...table.tBodies[0].rows].map(row => row.querySelector(".name").textContent);
  const head = column => table.querySelector(`th[data-column="${column}"]`);
  const heads = () => [...table.tHead.rows[0].cells].map(cell => cell.textContent);
  const say = element => element.dispatchEvent(new Event("input", {bubbles: true}));
  found.start = [head(-1).ariaSort, keys()];
  const button = head(2).querySelector("button"); button.focus();
  found.reached = document.activeElement === button && button.tabIndex === 0 && button.type === "button";
  button.click(); found.up = [head(2).ariaSort, head(-1).ariaSort, keys()];
  button.click(); found.down = [head(2).ariaSort, keys()];
  found.kept = document.activeElement === button;
  const filter = document.querySelector("#filter");
  filter.value = "B"; say(filter); found.filtered = [keys(), document.querySelector("#shown").textContent];
  filter.value = "?"; say(filter); found.none = [keys(), document.querySelector("#shown").textContent];
  filter.value = ""; say(filter);
  const only = document.querySelector("#only-unscored");
  only.checked = true; say(only); found.unscored = table.tBodies[0].textContent;
  only.checked = false; say(only);
  found.heads = heads();
  for (const box of document.querySelectorAll(".column")) { box.checked = box.value === "3"; say(box); }
  found.chosen = [heads(), [...table.tBodies[0].rows[0].cells].map(cell => cell.textContent)];
  found.link = table.querySelector("a").getAttribute("href");
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """What a page answers to a pointer on its pictures, and to its table's controls: one browser for both."""
    rows = [*scored("a.png", 20.5), *scored("b10.png", 10.25), *failed("b9.png"), *scored("c.png", 30.0)]
    script = f"{{ {POINTER} }} {{ {TABLE} }}"
    return driven(tmp_path_factory.mktemp("used"), report(rows=rows), script, "--window-size=900,900")


@needs_chromium
def test_a_pointer_and_the_controls_of_all_pictures_move_them(used):
    assert used["first"] == used["other_button"] == ["50%", "50%"]
    assert used["pressed"] == ["20%", "50%"] and used["moved"] == ["90%", "50%"] and used["value"] == "90"
    assert used["focused"] and used["text"] == "90 % LR (input), 10 % diffusion"
    assert used["left"] == ["hr", "hr"] and used["right"] == ["model", "model"]


@needs_chromium
def test_the_table_sorts_filters_and_shows_the_columns_that_are_chosen(used):
    assert used["start"] == ["ascending", ["a.png", "b9.png", "b10.png", "c.png"]]
    assert used["up"] == ["ascending", None, ["b10.png", "a.png", "c.png", "b9.png"]]  # no score: last, both ways
    assert used["down"] == ["descending", ["c.png", "a.png", "b10.png", "b9.png"]]
    assert used["reached"] and used["kept"]
    assert used["filtered"] == [["b10.png", "b9.png"], "1 to 2 of 2"]
    assert used["none"] == [[], "no image has such a name"]
    assert used["unscored"] == "b9.png✕ truncated – ends early"
    assert used["heads"] == ["image", "PSNR (dB)", "SSIM", "LPIPS"]
    assert used["chosen"] == [["image", "Colour drift (levels of 255)"], ["c.png", "30.00", "31.00", "32.00"]]
    assert used["link"] == "#picture-1"


@needs_chromium
def test_five_thousand_images_are_there_at_once_and_sort_in_a_moment(tmp_path):
    methods = {**METHODS, "lanczos": "Lanczos"}
    rows = [
        {
            "key": f"{i:05d}.png",
            "method": method,
            "reason": "",
            "message": "",
            **dict.fromkeys(MEASURES, i * 7919 % 5000),
        }
        for i in range(5000)
        for method in methods
    ]
    html = report(rows=rows, methods=methods, pictures=[])
    assert len(html) < 3e6
    assert html.count(".png</span></th>") == 50 and "The first 50 of 5,000 images" in html  # without script
    script = """
      const table = document.querySelector("#table"), shown = () => document.querySelector("#shown").textContent;
      const keys = () => [...table.tBodies[0].rows].map(row => row.querySelector(".name").textContent);
      found.loaded = performance.now() - performance.timing.responseEnd + performance.timing.navigationStart;
      found.rows = keys().length; found.first = shown();
      const before = performance.now();
      table.querySelector('th[data-column="1"] button').click();
      found.sorted = performance.now() - before; found.top = keys().slice(0, 2);
      document.querySelector("#next").click(); found.second = shown();
      for (let i = 0; i < 24; i++) document.querySelector("#next").click();
      found.last = shown(); found.end = document.querySelector("#next").disabled;
    """
    for _ in range(3):  # the fastest counts: a busy machine lets a browser wait
        found = driven(tmp_path, html, script)
        if found["loaded"] < 5000 and found["sorted"] < 2000:
            break
    assert found["loaded"] < 5000 and found["sorted"] < 2000
    expected = sorted(range(5000), key=lambda i: i * 7919 % 5000)[:2]
    assert found["rows"] == 200 and found["top"] == [f"{i:05d}.png" for i in expected]
    assert found["first"] == "1 to 200 of 5,000" and found["second"] == "201 to 400 of 5,000"
    assert found["last"] == "4,801 to 5,000 of 5,000" and found["end"]


@needs_chromium
def test_no_name_makes_the_page_wider_than_the_window(tmp_path):
    script = """
      found.wide = [innerWidth, document.documentElement.scrollWidth - innerWidth];
      found.stage = document.querySelector(".stage").getBoundingClientRect().width;
      found.title = document.title;
      document.querySelector('[name="spread"]:not(:checked)').click();
      found.spreads = [...document.querySelectorAll(".spread")].map(f => getComputedStyle(f).display);
    """
    found = driven(tmp_path, hostile_report(), script, "--window-size=1200,900")
    assert found["wide"][0] == 1200 and found["wide"][1] <= 0
    assert found["stage"] == 576  # 12 px a pixel of the 48 px crop: the most that fit
    assert found["spreads"] == ["none", "block", "none", "none"]
    assert "owned" in found["title"] and found["title"] != "owned"


@needs_chromium
def test_on_a_phone_nothing_is_wider_than_the_window(tmp_path):
    """A window that narrow exists for screenshots alone, so the page says by its colour what it found."""
    say = """<script>
      const say = () => {
        const page = document.documentElement, stage = document.querySelector(".stage").getBoundingClientRect().width;
        const bars = [innerWidth === 390, page.scrollWidth <= 390, stage === 336].map((right, index) =>
          Object.assign(document.createElement("div"), {className: "said", style: `position: fixed; z-index: 9; left: 0;
            right: 0; height: 100px; top: ${100 * index}px; background: ${right ? "#0f0" : "#f00"}`}));
        document.querySelectorAll(".said").forEach(old => old.remove());
        document.body.append(...bars);
      };
      addEventListener("resize", say); say();
    </script></body>"""
    image = shot(tmp_path, hostile_report().replace("</body>", say), size=(390, 300))
    assert [image[y, 200].tolist() for y in (50, 150, 250)] == [[0, 255, 0]] * 3
