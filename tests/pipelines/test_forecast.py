"""Laws of pipelines.forecast: a night's megapixels and device time from a few headers and from what others took."""

import random

import pyarrow as pa
import pytest

from pipelines import ledger as ledger_module
from pipelines.forecast import LEAST_RECEIPTS, MOST_RECEIPTS, SAMPLE, Calibration, calibrate, duration, forecast_night
from pipelines.ledger import Ledger, Receipt

ONE = Calibration(1.0, "as told")


def table(rows):
    keys, sizes = [key for key, _ in rows], [size for _, size in rows]
    return pa.table(
        {"key": pa.array(keys, pa.string()), "etag": ["e"] * len(rows), "size": pa.array(sizes, pa.int64())}
    )


def told(rows, megapixels_of, *, calibration=ONE, num_workers=1, price=0.0):
    return forecast_night(
        table(rows), megapixels_of=megapixels_of, calibration=calibration, num_workers=num_workers,
        device_hour_price=price,
    )  # fmt: skip


def test_few_assets_are_all_read_and_told_exactly():
    sizes = {"a.png": 0.5, "b.jpg": 2.0, "c": None, "d.png": 7.25}
    found = told([(key, 1) for key in sizes], lambda row: sizes[row["key"]])
    expected = {"sampled": 4, "unreadable": 1, "megapixels": 9.75, "megapixels_margin": 0}
    assert {name: found.metrics[name] for name in expected} == expected


def test_time_and_cost_follow_from_the_calibration_the_workers_and_the_price():
    found = told([("a.png", 5)], lambda row: 1800.0, calibration=Calibration(10.0, "from here"), num_workers=4, price=3)
    assert [found.metrics[name] for name in ("device_hours", "hours", "cost")] == [5.0, 1.25, 15.0]
    for part in ("1,800.0 output megapixels", "5.0 h of device time", "10 s per megapixel (from here)", "1.2 h with",
                 "num_workers 4", "cost 15.00", "1 of them (0 cannot"):  # fmt: skip
        assert part in found.text
    assert "cost" not in told([("a.png", 5)], lambda row: 1.0).text


def test_nothing_to_do_takes_nothing():
    found = told([], lambda row: pytest.fail("nothing is to be read"))
    assert found.text == "nothing to do" and found.metrics["cost"] == found.metrics["megapixels"] == 0


def test_the_sample_lies_evenly_in_the_list_and_is_no_larger_than_said():
    seen = []
    told([(f"{i:05d}.png", 10) for i in range(10_000)], lambda row: seen.append(int(row["key"][:5])) or 1.0)
    steps = [after - before for before, after in zip(seen, seen[1:], strict=False)]
    assert len(seen) == SAMPLE == 24 and min(steps) >= 416 and max(steps) <= 417
    assert abs(seen[0] - (10_000 - 1 - seen[-1])) <= 1


def test_megapixels_that_follow_the_bytes_of_each_format_are_told_exactly():
    per_byte = {".jpg": 4e-6, ".PNG": 1e-6, ".png": 1e-6, "": 2e-6}
    generator = random.Random(4)
    rows = [(f"{i:04d}{generator.choice(list(per_byte))}", generator.randrange(1, 10**7)) for i in range(2000)]

    def megapixels(key, size):
        return size * per_byte[key[4:]]

    found = told(rows, lambda row: megapixels(row["key"], row["size"]))
    assert found.metrics["megapixels"] == pytest.approx(sum(megapixels(*row) for row in rows), rel=1e-9)
    assert found.metrics["megapixels_margin"] == pytest.approx(0, abs=1e-6)


def test_a_format_that_is_not_in_the_sample_is_scaled_like_the_others():
    rows = [(f"{i:04d}.jpg", 10) for i in range(1000)] + [("zz.webp", 500)]
    assert told(rows, lambda row: row["size"] / 10).metrics["megapixels"] == pytest.approx(1050)


def test_what_cannot_be_read_costs_nothing_and_counts_by_its_share():
    rows = [(f"{i:04d}.jpg", 10) for i in range(SAMPLE * 10)]
    found = told(rows, lambda row: None if int(row["key"][:4]) // 10 % 2 else 1.0)
    assert found.metrics["unreadable"] == SAMPLE / 2 and found.metrics["megapixels"] == pytest.approx(SAMPLE * 5)


def test_real_spread_is_forecast_within_15_percent_and_the_margin_is_honest():
    """P2: 24 of 5,000 images whose bytes per pixel vary by a third; 40 archives."""
    generator, errors, scores = random.Random(7), [], []
    for _ in range(40):
        sizes = [int(generator.lognormvariate(13.5, 0.6)) for _ in range(5000)]
        actual = [size * 4e-6 * generator.lognormvariate(0, 0.33) for size in sizes]
        rows = [(f"{i:05d}.jpg", size) for i, size in enumerate(sizes)]
        found = told(rows, lambda row, actual=actual: actual[int(row["key"][:5])]).metrics
        errors.append(found["megapixels"] / sum(actual) - 1)
        scores.append((found["megapixels"] - sum(actual)) / found["megapixels_margin"])
    assert sum(abs(error) < 0.15 for error in errors) >= 36 and abs(sum(errors) / 40) < 0.04
    assert 0.6 < (sum(score**2 for score in scores) / 40) ** 0.5 < 1.6


def result(index, *, device_s=2.0, megapixels=0.5, recipe="r", model="m", status="done"):
    metrics = {"device_s": device_s, "megapixels": megapixels, "lr_psnr": 50.0}
    return Receipt(key=f"{index}", etag="e", size=1, recipe=recipe, model=model, status=status, metrics=metrics)


def calibrated(output, measure=lambda: 99.0):
    return calibrate(str(output), recipe="r", model="m", measure=measure)


def test_five_results_of_the_same_recipe_and_model_calibrate_by_their_totals(tmp_path):
    ledger = Ledger(str(tmp_path))
    others = [result(i, recipe="x") for i in range(9)] + [result(i, model="x") for i in range(9)]
    others += [result(i, status="dead") for i in range(9)]
    few = [result(i, device_s=1.0 + i, megapixels=0.1 + i) for i in range(LEAST_RECEIPTS - 1)]
    ledger.append(others + few, fence=1, number=0)
    found = calibrated(tmp_path)
    assert found.seconds_per_megapixel == 99.0 and "measured now" in found.origin
    ledger.append([result(9, device_s=50.0, megapixels=10.0)], fence=2, number=0)
    found = calibrated(tmp_path, measure=lambda: pytest.fail("the ledger knows"))
    assert found.seconds_per_megapixel == pytest.approx((1 + 2 + 3 + 4 + 50) / (0.1 + 1.1 + 2.1 + 3.1 + 10))
    assert "newest 5 results" in found.origin


def test_results_without_device_time_do_not_count(tmp_path):
    rows = [result(i) for i in range(4)] + [result(i, device_s=0.0) for i in range(4, 9)]
    rows.append(Receipt(key="n", etag="e", size=1, recipe="r", model="m", status="done"))
    Ledger(str(tmp_path)).append(rows, fence=1, number=0)
    assert calibrated(tmp_path).seconds_per_megapixel == 99.0


def test_only_the_newest_results_count_and_older_segments_are_not_even_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "ROW_GROUP_ROWS", 400)
    ledger = Ledger(str(tmp_path))
    ledger.append([result(i, device_s=1e6) for i in range(50)], fence=1, number=0)
    ledger.append([result(i, device_s=7.0) for i in range(500)] + [result(i) for i in range(900)], fence=2, number=0)
    honest, reads = ledger_module.storage.read_bytes, []
    monkeypatch.setattr(ledger_module.storage, "read_bytes", lambda uri: reads.append(uri) or honest(uri))
    found = calibrated(tmp_path)
    newest = 100 * 7.0 + 900 * 2.0
    assert found.seconds_per_megapixel == pytest.approx(newest / (MOST_RECEIPTS * 0.5)) and len(reads) == 1


def test_an_output_without_a_ledger_is_measured(tmp_path):
    assert calibrated(tmp_path / "none") == (99.0, calibrated(tmp_path / "none").origin)
    assert not (tmp_path / "none").exists()


def test_durations_are_told_in_the_unit_a_person_would_use():
    assert [duration(hours) for hours in (2.5, 0.5, 0.005, 0)] == ["2.5 h", "30.0 min", "18.0 s", "0.0 s"]
