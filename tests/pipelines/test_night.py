"""Laws of pipelines.night: its numbers are those of the receipts, its report is whole, and no name can break it."""

import json
import re
import time
import tracemalloc
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from nights import GIVEN, dead, done, skipped, table
from PIL import Image
from test_report import HOSTILE, SHOWN, Page, chromium, needs_chromium

from pipelines import night as nights
from pipelines.contact_sheet import Group, Strip, Tile
from pipelines.ledger import RECEIPT_SCHEMA
from pipelines.night import account, one_line, publish_night, to_json, track_night
from pipelines.night_page import amount, duration, share, write_night
from pipelines.receipts import attention

STAGES = ("read", "decode", "device", "encode", "publish")


def random_rows(count: int = 3000) -> pa.Table:
    random = np.random.default_rng(5)
    receipts = []
    for i in range(count):
        kind = i % 10
        if kind == 8:
            receipts.append(skipped(f"s{i}", ["large_enough", "excluded"][i % 20 == 8]))
        elif kind == 9:
            receipts.append(dead(f"d{i:05d}", "decode", ["corrupt", "truncated", "corrupt"][i // 10 % 3], f"why {i}"))
        else:
            times = {f"{stage}_s": float(t) for stage, t in zip(STAGES, random.random(5), strict=True)}
            times |= {"lr_psnr": float(random.normal(50, 5)), "colour_drift": float(random.gamma(2))}
            times |= {"megapixels": float(random.random()), "source_megapixels": 0.5}
            reason = ["", "", "review", "rejected"][random.integers(4)]
            receipts.append(done(f"k{i:05d}", reason=reason, seconds=float(random.random()), **times))
    return table(receipts)


def test_every_number_is_what_sql_says_of_the_receipts():
    rows = random_rows()
    night = account(rows, source="s", output="o", **GIVEN)
    sql = duckdb.connect()
    sql.register("r", rows.select([n for n in rows.column_names if n != "metrics"]))
    metrics = [dict(m) for m in rows["metrics"].to_pylist()]
    sql.register("m", pa.Table.from_pylist(metrics, pa.schema([(n, pa.float64()) for n in metrics[0]])))

    def one(query):
        return sql.sql(query).fetchall()[0]

    assert (night.inputs, night.done, night.skipped, night.dead) == one(
        "SELECT count(*), count_if(status='done'), count_if(status='skipped'), count_if(status='dead') FROM r"
    )
    assert (night.passed, night.review, night.rejected) == one(
        "SELECT count_if(reason=''), count_if(reason='review'), count_if(reason='rejected') FROM r WHERE status='done'"
    )
    query = "SELECT sum(size), sum(out_bytes), quantile_cont(seconds, .5), quantile_cont(seconds, .95) FROM r"
    assert (night.source_bytes, night.output_bytes, night.seconds_p50, night.seconds_p95) == pytest.approx(
        one(query + " WHERE status='done'")
    )
    assert night.skipped_by == dict(
        sql.sql("SELECT reason, count(*) FROM r WHERE status='skipped' GROUP BY 1").fetchall()
    )
    sums = one(f"SELECT {', '.join(f'sum({s}_s)' for s in STAGES)}, sum(megapixels), sum(source_megapixels) FROM m")
    assert [night.stage_s[stage] for stage in STAGES] == pytest.approx(sums[:5])
    assert [night.stage_shares[stage] for stage in STAGES] == pytest.approx([s / sum(sums[:5]) for s in sums[:5]])
    assert (night.output_megapixels, night.source_megapixels) == pytest.approx(sums[5:])
    for name, found in night.measures.items():
        p = ", ".join(f"quantile_cont({name}, {q})" for q in (0.01, 0.05, 0.5, 0.95, 0.99))
        expected = one(f"SELECT count({name}), avg({name}), min({name}), {p}, max({name}) FROM m")
        assert tuple(vars(found).values()) == pytest.approx(expected)
    assert list(night.measures) == ["lr_psnr", "colour_drift"]
    assert night.device_s == pytest.approx(sums[2])
    assert night.device_busy == pytest.approx(sums[2] / 200) and night.assets_per_s == night.done / 100
    assert night.output_megapixels_per_s == pytest.approx(sums[5] / 100)
    assert night.cost == pytest.approx(sums[2] / 1000) and night.cost_held == pytest.approx(0.2)


def test_the_error_histogram_has_every_dead_letter_and_the_first_three_of_each_kind():
    rows = random_rows()
    failures = account(rows, source="s", output="o", **GIVEN).failures
    assert [(f.stage, f.reason, f.count) for f in failures] == [
        ("decode", "corrupt", 200),
        ("decode", "truncated", 100),
    ]
    assert [(e.key, e.message) for e in failures[0].examples] == [
        ("d00009", "why 9"), ("d00029", "why 29"), ("d00039", "why 39"),
    ]  # fmt: skip
    long = account(table([dead("k", "read", "io_error", "x" * 9000)]), source="s", output="o", **GIVEN)
    assert len(long.failures[0].examples[0].message) == 500


def test_the_account_does_not_depend_on_the_order_of_the_receipts():
    rows = random_rows(300)
    turned = rows.take(np.random.default_rng(1).permutation(300))
    chunks = pa.concat_tables([rows.slice(start, 7) for start in range(0, 300, 7)])
    found = [to_json(account(r, source="s", output="o", **GIVEN)) for r in (rows, turned, chunks)]
    assert json.loads(found[1])["inputs_digest"] == json.loads(found[0])["inputs_digest"]
    rounded = [re.sub(r"(\d\.\d{9})\d+", r"\1", text) for text in found]  # sums of floats differ in the last digits
    assert rounded[0] == rounded[1] == rounded[2]


def test_the_digest_of_the_inputs_is_that_of_their_keys_and_contents_alone():
    def digest(*receipts):
        return account(table(list(receipts)), source="s", output="o", **GIVEN).inputs_digest

    first = digest(done("a"), dead("b", "read", "missing"))
    assert first == digest(done("a", reason="review", lr_psnr=3.0), done("b"))
    assert len({first, digest(done("a"), done("b", etag="f")), digest(done("a")), digest(done("ab"), done(""))}) == 4
    assert digest(done("a", etag="be")) != digest(done("ab", etag="e"))


def test_an_asset_that_was_lost_and_done_again_counts_once_and_a_source_that_is_gone_is_no_input():
    receipts = [dead("a", "verify", "output_lost"), done("b"), done("a", lr_psnr=50.0), skipped("c", "gone")]
    night = account(table(receipts), source="s", output="o", **GIVEN)
    assert (night.inputs, night.done, night.dead, night.gone, night.skipped) == (2, 2, 0, 1, 0)


def test_a_night_of_nothing_has_an_account_and_writes_nothing(tmp_path):
    rows = RECEIPT_SCHEMA.empty_table()
    night = account(rows, source="s", output=str(tmp_path), **GIVEN)
    publish_night(night, rows)
    assert night.inputs == 0 and night.measures == {} and night.device_busy == 0 and json.loads(to_json(night))
    assert list(tmp_path.iterdir()) == [] and track_night(night) is None
    assert one_line(night) == "upscale: nothing to do, 7 assets unchanged"


def test_values_that_are_no_number_are_in_no_distribution_and_no_sum():
    receipts = [done("a", lr_psnr=float("nan"), megapixels=float("nan")), done("b", lr_psnr=40.0, megapixels=2.0)]
    night = account(table(receipts), source="s", output="o", **GIVEN)
    assert (
        night.measures["lr_psnr"].count == 1 and night.measures["lr_psnr"].mean == 40 and night.output_megapixels == 2
    )
    assert json.loads(to_json(night))["measures"]["lr_psnr"]["min"] == 40


def test_the_line_tells_what_a_person_must_know_and_is_one_line():
    rows = table(
        [done("a", megapixels=50.0, device_s=150.0), done("b", reason="rejected"), dead("c", "decode", "corrupt")]
    )
    text = one_line(account(rows, source="s", output="o", **GIVEN | {"stopped": "max\nhours", "left": 1200}))
    assert text == (
        "upscale: 2 of 3 assets done (1 rejected and published as bicubic), 1 dead letter (most: 1 × decode corrupt); "
        "50 MP in 1 min 40 s (0.50 MP/s, device busy 75 %, cost 0.15); stopped: max hours, 1,200 left"
    )


@pytest.mark.parametrize(
    ("words", "value", "said"),
    [
        (duration, 0, "0 s"), (duration, 0.042, "0.042 s"), (duration, 59.4, "59.4 s"), (duration, 59.9, "1 min"),
        (duration, 3599.8, "1 h"), (duration, 7500, "2 h 5 min"), (duration, 273_600, "3 d 4 h"), (amount, None, "–"),
        (amount, 0.12345, "0.12"), (amount, 12.34, "12.3"), (amount, 12.0, "12"), (amount, 1234.6, "1,235"),
        (amount, 0.00123, "0.0012"), (share, 0.0, "0 %"), (share, 1e-9, "< 0.1 %"), (share, 0.9999, "> 99.9 %"),
        (share, 1.0, "100 %"), (share, 0.5432, "54.3 %"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(words, value, said):
    assert words(value) == said


def test_the_worst_two_hundred_are_listed_the_rejected_first():
    receipts = [done(f"p{i}", lr_psnr=1.0) for i in range(5)]
    receipts += [done(f"v{i:03d}", reason="review", lr_psnr=float(i)) for i in range(250)]
    receipts += [done(f"r{i}", reason="rejected", lr_psnr=90.0 - i) for i in range(3)]
    found = [row["key"] for row in attention(table(receipts))]
    assert found == ["r2", "r1", "r0", *[f"v{i:03d}" for i in range(197)]]
    page = Page(write_night(account(table(receipts), source="s", output="o", **GIVEN), [], attention(table(receipts))))
    assert len([row for row in page.rows if re.match(r"[rv]\d", row[0])]) == 200 and "worst 200 of 253" in page.text


def test_the_report_is_three_files_and_the_same_receipts_give_the_same_bytes(tmp_path):
    rows = table([done("a"), dead("b", "decode", "corrupt", "odd"), dead("a2", "read", "missing")])
    for _ in range(2):
        night = account(rows, source=str(tmp_path / "gone"), output=str(tmp_path), **GIVEN)
        publish_night(night, rows)
        folder = tmp_path / "_diffsr/reports/upscale-1"
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert set(files) == {"summary.json", "night.html", "dead_letters.parquet"}
    again = {path.name: path.read_bytes() for path in Path(night.folder).iterdir()}
    assert again == files
    assert pq.read_table(folder / "dead_letters.parquet")["key"].to_pylist() == ["a2", "b"]
    summary = json.loads(files["summary.json"])
    assert summary["inputs"] == 3 and summary["failures"][0]["examples"] == [{"key": "b", "message": "odd"}]
    assert "Cannot be shown" in files["night.html"].decode()


def hostile_night():
    rows = [done(HOSTILE, reason="review", lr_psnr=1.0), dead(HOSTILE + "2", HOSTILE, HOSTILE, "x" * 600)]
    rows += [skipped("s", HOSTILE), dead("b", "decode", "corrupt", HOSTILE[:400])]
    given = GIVEN | {"stopped": HOSTILE, "left": 2, "run_id": HOSTILE, "model": {HOSTILE: HOSTILE}, "recipe": HOSTILE}
    given |= {"settings": {HOSTILE: {HOSTILE: HOSTILE}}}
    night = account(table(rows), source=HOSTILE, output=HOSTILE, **given)
    tiles = [Tile(label, b"") for label in ("LR", "bicubic", "SR")]
    strips = [Strip(HOSTILE, HOSTILE, {"seconds": 1.0}, tiles=tiles), Strip("m", "", {"seconds": 1.0}, message=HOSTILE)]
    return write_night(night, [Group("t", "n", strips, []), Group("t", "n", [], [HOSTILE])], attention(table(rows)))


def test_hostile_names_stay_text_and_the_page_asks_for_nothing():
    html = hostile_night()
    page = Page(html)
    assert page.stack == [] and page.scripts == [] and page.text.count(SHOWN) >= 14
    assert not {"script", "b'ox", "link", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in page.elements
    }
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    assert "\u202e" not in html
    for _, attrs in page.elements:
        assert attrs.get("src", "data:").startswith("data:") and attrs.get("href", "#").startswith("#")
        assert not [name for name in attrs if name.startswith("on")]
    assert {link["href"][1:] for link in page.all("a")} <= {attrs.get("id") for _, attrs in page.elements}
    assert page.all("meta")[1]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_no_name_makes_the_page_wider_than_the_window(tmp_path, width):
    tell = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
    html = hostile_night().replace("</body>", tell).replace("default-src 'none';", "script-src 'unsafe-inline';")
    (tmp_path / "night.html").write_text(html, encoding="utf-8")
    frame = f"""<body><iframe src="night.html" style="border:0;width:{width}px;height:900px"></iframe><script>
      onmessage = event => document.title = event.data</script></body>"""
    printed = chromium(tmp_path, frame, "--window-size=1300,900", "--virtual-time-budget=2000", "--dump-dom")
    assert re.search(r"<title>(\d+)</title>", printed).group(1) == str(width)


@needs_chromium
def test_the_page_is_drawn_in_the_scheme_that_the_reader_prefers(tmp_path):
    html = write_night(account(random_rows(40), source="s", output="o", **GIVEN), [], [])
    for scheme, bounds in {"0": (0, 60), "1": (200, 256)}.items():
        to = tmp_path / f"{scheme}.png"
        chromium(tmp_path, html, f"--blink-settings=preferredColorScheme={scheme}", "--window-size=900,1200",
                 f"--screenshot={to}")  # fmt: skip
        shot = np.asarray(Image.open(to).convert("L")).astype(int)
        assert bounds[0] <= shot[2, 2] < bounds[1] and 0.01 < np.mean(np.abs(shot - shot[2, 2]) > 100) < 0.5


def test_many_assets_are_accounted_for_in_seconds_without_an_object_each():
    count = 300_000
    some = random_rows(1000)
    keys = pc.binary_join_element_wise("k", pa.array(np.arange(count)).cast(pa.string()), "")
    rows = pa.concat_tables([some] * (count // 1000)).set_column(0, "key", keys)
    del keys, some
    tracemalloc.start()
    began = time.process_time()
    night = account(rows, source="s", output="o", **GIVEN)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert night.inputs == count and seconds < 5
    assert peak < count * 50  # bytes: the floats of numpy take 8 each, a Python object per row would take 50 and more
    assert nights.STAGES == STAGES
