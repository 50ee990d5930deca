"""Laws of pipelines.quality: thresholds are in range and in order, and the worst metric decides."""

import math

import pytest

from pipelines.quality import Thresholds, judge

LIMITS = Thresholds(review_lr_psnr=40, reject_lr_psnr=12, review_colour_drift=2, reject_colour_drift=16)


@pytest.mark.parametrize(
    ("lr_psnr", "drift", "verdict"),
    [
        (40.0, 2.0, "pass"),
        (100.0, 0.0, "pass"),
        (math.nextafter(40, 0), 2.0, "review"),
        (40.0, math.nextafter(2, 3), "review"),
        (12.0, 16.0, "review"),
        (math.nextafter(12, 0), 2.0, "rejected"),
        (40.0, math.nextafter(16, 17), "rejected"),
        (30.0, 17.0, "rejected"),
        (-math.inf, 0.0, "rejected"),
        (50.0, math.inf, "rejected"),
        (math.nan, 0.0, "rejected"),
        (50.0, math.nan, "rejected"),
    ],
)
def test_the_worst_metric_decides_and_a_value_at_a_threshold_has_not_crossed_it(lr_psnr, drift, verdict):
    found = judge({"lr_psnr": lr_psnr, "colour_drift": drift}, LIMITS)
    assert found.verdict == verdict
    assert (found.message == "") == (verdict == "pass")


def test_the_message_names_each_metric_with_its_value_and_its_threshold_the_worst_first():
    assert judge({"lr_psnr": 31.204, "colour_drift": 17.5}, LIMITS).message == (
        "colour_drift 17.50 levels of 255 is above 16 (rejected); lr_psnr 31.20 dB is below 40 (review)"
    )
    assert judge({"lr_psnr": math.nan, "colour_drift": 3.0}, LIMITS).message == (
        "lr_psnr is not a number; colour_drift 3.00 levels of 255 is above 2 (review)"
    )
    assert judge({"lr_psnr": 39.9999}, LIMITS).message == "lr_psnr 39.9999 dB is below 40 (review)"  # not "40.00"


def test_what_was_not_measured_is_not_judged():
    assert judge({}, LIMITS) == ("pass", "")
    assert judge({"colour_drift": 1.0, "megapixels": math.nan}, LIMITS).verdict == "pass"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"review_lr_psnr": 101}, r"review_lr_psnr \(101\) must be from 0 to 100; use 40"),
        ({"reject_lr_psnr": -1}, r"reject_lr_psnr \(-1\) must be from 0 to 100; use 12"),
        ({"reject_lr_psnr": math.nan}, r"reject_lr_psnr \(nan\) must be from 0 to 100"),
        ({"reject_colour_drift": 256}, r"reject_colour_drift \(256\) must be from 0 to 255; use 16"),
        ({"review_colour_drift": math.inf}, r"review_colour_drift \(inf\) must"),
        ({"reject_lr_psnr": 41}, r"reject_lr_psnr \(41\) must be at most review_lr_psnr \(40.0\)"),
        ({"reject_colour_drift": 1}, r"reject_colour_drift \(1\) must be at least review_colour_drift \(2.0\)"),
    ],
)
def test_thresholds_out_of_range_or_order_are_a_persons_mistake(settings, said):
    with pytest.raises(ValueError, match=said):
        Thresholds(**settings)


def test_both_thresholds_may_be_the_same_so_that_nothing_is_only_reviewed():
    hard = Thresholds(review_lr_psnr=30, reject_lr_psnr=30)
    assert judge({"lr_psnr": 29.9}, hard).verdict == "rejected" and judge({"lr_psnr": 30.0}, hard).verdict == "pass"
