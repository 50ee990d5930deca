"""Laws of pipelines.report: one file that needs nothing else, every row in it, and no name that can break it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipelines.report import markdown_table, write_report

METHODS = ["bicubic", "regression", "model"]
METRICS = ["psnr", "ssim", "psnr_y", "ssim_y", "lr_psnr"]
MEANS = {
    **dict(zip([f"bicubic_{name}" for name in METRICS], [27.306, 0.81234, 28.71, 0.83, 41.5], strict=True)),
    **dict(zip([f"regression_{name}" for name in METRICS], [29.0, 0.85, 30.456, 0.87, 50.0], strict=True)),
    **dict(zip([f"model_{name}" for name in METRICS], [28.4, 0.85, 30.1, 0.9, 100.0], strict=True)),
}
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
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def scored(key, value):
    row = {f"{method}_{name}": value + i for i, method in enumerate(METHODS) for name in METRICS}
    return row | {"key": key, "reason": "", "message": "", "seconds": value / 10}


def asset(key, status, **more):
    empty = {"out_key": "", "out_bytes": 0, "metrics": {}, "stage": "", "reason": "", "message": ""}
    return {**empty, "key": key, "status": status, **more}


def report(**changes):
    arguments = {
        "title": "Evaluation of nano",
        "methods": METHODS,
        "metrics": MEANS | {"seconds_per_image": 1.25},
        "rows": [
            scored("a.png", 20.5),
            {"key": "broken.png", "reason": "truncated", "message": "ends early", "seconds": 0.1},
            scored("b.png", 10.25),
        ],
        "strips": [("a.png", png(40, seed=1)), ("b.png", png(80, seed=2))],
        "ledger": [],
        "provenance": {"model": "nano, digest 0123"},
    }
    return write_report(**arguments | changes)


LEDGER = [
    asset("fine.jpg", "done", out_key="fine.jpg.png", size=900, out_bytes=123_456,
          metrics={"lr_psnr": 55.125, "colour_drift": 0.2}, thumb_in=png(4, 4, 3), thumb_out=png(16, 16, 4)),
    asset("later.txt", "skipped", stage="sniff", reason="not_an_image", message="a text"),
    asset("bad.png", "dead", stage="decode", reason="corrupt", message="unpacks to something absurd"),
]  # fmt: skip


def pictures(page):
    prefix = "data:image/png;base64,"
    assert all(image["src"].startswith(prefix) for image in page.all("img"))
    return [base64.b64decode(image["src"].removeprefix(prefix), validate=True) for image in page.all("img")]


def test_the_markdown_table_is_exactly_this():
    assert markdown_table(MEANS, METHODS, METRICS) == (
        "| method | PSNR | SSIM | PSNR-Y | SSIM-Y | LR-PSNR |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| bicubic | 27.31 | 0.8123 | 28.71 | 0.8300 | 41.50 |\n"
        "| regression | 29.00 | 0.8500 | 30.46 | 0.8700 | 50.00 |\n"
        "| diffusion | 28.40 | 0.8500 | 30.10 | 0.9000 | 100.00 |"
    )
    with pytest.raises(KeyError, match="model_psnr"):
        markdown_table({"bicubic_psnr": 1.0}, ["bicubic", "model"], ["psnr"])


def test_the_page_asks_for_nothing_outside_itself():
    html = report(ledger=LEDGER)
    page = Page(html)
    assert page.stack == []
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    for _, attrs in page.elements:
        assert not {"srcset", "action", "data", "poster", "background", "formaction"} & set(attrs)
        assert attrs.get("src", "data:").startswith("data:") and attrs.get("href", "#").startswith("#")
    anchors = {link["href"][1:] for link in page.all("a")}
    assert anchors <= {attrs.get("id") for _, attrs in page.elements}
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    policy = page.all("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_same_scores_give_the_same_bytes():
    assert report(ledger=LEDGER) == report(ledger=LEDGER)


def test_every_row_is_there_and_those_without_scores_say_why():
    page = Page(report())
    for row in ("a.png", "b.png"):
        assert page.text.count(row) == 2  # over its crops and in the table
    assert "3 images:\n  2 scored, 1 not scored" in page.text and "1.25 seconds per image" in page.text
    assert re.search(r"not scored\s+broken\.png\s+truncated – ends early", page.text)
    a, b = page.rows[-2:]
    assert a == [
        "a.png",
        *["20.50", "20.5000", "20.50", "21.50", "21.5000", "21.50", "22.50", "22.5000", "22.50", "2.05"],
    ]
    assert b == [
        "b.png",
        *["10.25", "10.2500", "10.25", "11.25", "11.2500", "11.25", "12.25", "12.2500", "12.25", "1.02"],
    ]


def test_the_best_of_a_column_is_marked_by_more_than_its_colour():
    page = Page(report())
    assert page.rows[:4] == [
        ["method", "PSNR", "SSIM", "PSNR-Y", "SSIM-Y", "LR-PSNR"],
        ["bicubic", "27.31", "0.8123", "28.71", "0.8300", "41.50"],
        ["regression", "29.00★", "0.8500★", "30.46★", "0.8700", "50.00"],
        ["diffusion", "28.40", "0.8500★", "30.10", "0.9000★", "100.00★"],
    ]
    assert sum(span.get("aria-label") == "best" for span in page.all("span")) == 6
    alone = Page(report(methods=["model"], strips=[]))
    assert not [span for span in alone.all("span") if span.get("aria-label") == "best"]


def test_strips_are_embedded_byte_for_byte_under_the_names_of_their_columns():
    strips = [("a.png", png(40, seed=1)), ("not in rows.png", png(960, 192, seed=2))]
    page = Page(report(strips=strips))
    assert pictures(page) == [data for _, data in strips]
    assert [image["alt"] for image in page.all("img")] == [
        f"Crop of {key}, from left to right: LR, bicubic, regression, diffusion, HR" for key, _ in strips
    ]
    styles = [div["style"] for div in page.all("div") if div.get("class") == "strip"]
    assert styles == ["--width: 40; --smallest: 20; --tiles: 5", "--width: 960; --smallest: 1; --tiles: 5"]
    heads = page.text.index("LRbicubicregressiondiffusionHR")
    assert "PSNR20.50SSIM20.5000LR-PSNR20.50" in page.text[heads:]


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a" + bytes(40), png(41), png(40)[:12]], ids=["empty", "gif", "uneven", "cut"]
)
def test_a_strip_that_is_not_a_png_of_equal_tiles_is_an_error(data):
    with pytest.raises(ValueError, match=r"strip of 'k' .* must"):
        report(strips=[("k", data)])


def test_refused_assets_come_first_with_stage_reason_and_message():
    page = Page(report(ledger=LEDGER))
    text = " ".join(page.text[page.text.index("What happened to each asset") :].split())
    assert "3 in: 1 done, 1 skipped, 1 refused" in text
    assert text.index("bad.png") < text.index("later.txt") < text.index("fine.jpg")
    assert "✕ refused bad.png decode: corrupt – unpacks to something absurd" in text
    assert "– skipped later.txt sniff: not_an_image – a text" in text
    assert "fine.jpg → fine.jpg.png 900 Bytes → 123.5 kB LR-PSNR 55.12 dB colour drift 0.20 of 255" in text
    assert pictures(page)[2:] == [LEDGER[0]["thumb_in"], LEDGER[0]["thumb_out"]]
    assert [image["alt"] for image in page.all("img")][2:] == ["LR thumbnail of fine.jpg", "SR thumbnail of fine.jpg"]
    assert "6 in: 5 done, 1 refused" in report(ledger=[LEDGER[2], *LEDGER[:1] * 5])


def test_a_status_without_a_name_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match="status is 'lost'"):
        report(ledger=[asset("a", "lost")])


def test_what_is_empty_has_no_section():
    assert "What happened to each asset" not in report()
    nothing = Page(report(methods=[], metrics={}, rows=[], strips=[], provenance={}))
    assert nothing.all("section") == [] and nothing.all("img") == []
    only = Page(report(methods=[], metrics={}, rows=[], strips=[], provenance={}, ledger=LEDGER))
    assert [section["aria-labelledby"] for section in only.all("section")] == ["assets"]


def hostile_report():
    return report(
        title=HOSTILE,
        metrics=MEANS | {"odd'\"<b>_psnr": 1.0},
        methods=[*METHODS, "odd'\"<b>"],
        rows=[
            scored(HOSTILE, 20.0) | {"odd'\"<b>_psnr": 1.0},
            scored("z.png", 30.0),
            {"key": HOSTILE, "reason": HOSTILE, "message": HOSTILE},
        ],
        strips=[(HOSTILE, png(48))],
        ledger=[
            asset(HOSTILE, "done", out_key=HOSTILE, out_bytes=1, metrics={HOSTILE: 1.0}, thumb_out=png(9)),
            asset(HOSTILE, "dead", stage=HOSTILE, reason=HOSTILE, message=HOSTILE),
            asset("\ud800 lone", "dead", reason="corrupt"),
        ],
        provenance={HOSTILE: HOSTILE},
    )


def test_hostile_names_stay_text():
    html, plain = hostile_report(), Page(report(ledger=LEDGER))
    page = Page(html)
    assert page.stack == []
    assert page.scripts == plain.scripts and len(page.scripts) == 1
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"title"}
    assert {name for _, attrs in page.elements for name in attrs} <= {name for _, a in plain.elements for name in a}
    assert page.text.count(SHOWN) == 16
    assert "\u202e" not in html and "\\ud800 lone" in page.text
    assert html.encode()  # a lone surrogate would not encode


def chromium(folder, html, *options):
    """Open the page in a headless Chromium of its own; return what it prints."""
    (folder / "report.html").write_text(html, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, (folder / "report.html").as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@needs_chromium
def test_the_page_is_drawn_in_the_scheme_that_the_reader_prefers(tmp_path):
    shots = {}
    for scheme, number in {"dark": 0, "light": 1}.items():
        to = tmp_path / f"{scheme}.png"
        chromium(tmp_path, report(ledger=LEDGER), f"--blink-settings=preferredColorScheme={number}",
                 "--window-size=900,1600", f"--screenshot={to}")  # fmt: skip
        shots[scheme] = np.asarray(Image.open(to).convert("L")).astype(int)
    dark, light = shots["dark"], shots["light"]
    assert dark.shape == light.shape == (1600, 900)
    assert dark[2, 2] < 60 and light[2, 2] > 200
    for shot in (dark, light):
        assert 0.01 < np.mean(np.abs(shot - shot[2, 2]) > 100) < 0.5  # text and pictures, on a background


@needs_chromium
@pytest.mark.parametrize("width", [500, 1200])
def test_no_name_makes_the_page_wider_than_the_window_and_the_table_sorts(tmp_path, width):
    probe = """<script>
      const wide = document.documentElement.scrollWidth - innerWidth;
      const head = document.querySelector('th[data-column="1"]'), button = head.querySelector("button");
      const keys = () => [...document.querySelectorAll(".sortable tbody tr")].map(row => row.cells[1].textContent);
      button.click(); const up = [head.ariaSort, keys()];
      button.click(); const down = [head.ariaSort, keys()];
      const tiles = [...document.querySelectorAll(".heads > div")].map(div => div.getBoundingClientRect().width);
      const strip = document.querySelector(".strip img").getBoundingClientRect().width;
      document.title = JSON.stringify({wide, up, down, tiles, strip, title: document.title});
    </script></body>"""
    html = hostile_report().replace("</body>", probe)
    printed = chromium(tmp_path, html, f"--window-size={width},900", "--dump-dom")
    found = json.loads(Page(printed).text.strip().splitlines()[0])
    assert found["wide"] <= 0
    assert found["up"] == ["ascending", ["20.00", "30.00"]] and found["down"] == ["descending", ["30.00", "20.00"]]
    assert found["strip"] % 48 == 0 and found["strip"] >= 6 * 160  # a whole zoom of the 48 px strip
    assert found["tiles"] == pytest.approx([found["strip"] / 6] * 6, abs=0.1)
    assert "owned" in found["title"] and found["title"] != "owned"
