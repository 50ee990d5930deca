"""Laws of pipelines.gate: promoted exactly when every rule holds, and each rule can refuse alone."""

import math

import pytest

from pipelines.gate import Rules, judge

RULES = Rules(guarded={"ssim": 0.01}, min_gain=0.1)


def row(key, **fields):
    scores = {"model_psnr_y": 30.0, "model_ssim": 0.9, "model_lr_psnr": 50.0, "seconds": 1.0}
    scores |= {"bicubic_psnr_y": 28.0, "bicubic_ssim": 0.88, "bicubic_lr_psnr": 40.0}
    return {"key": key, "reason": "", "message": "", **scores, **fields}


def rows(count=3, **fields):
    return [row(f"{i}.png", **fields) for i in range(count)]


BETTER = {"model_psnr_y": 30.5}


def failing(verdict):
    return [check.rule for check in verdict.checks if not check.holds]


def test_a_better_challenger_is_promoted_and_every_rule_was_asked():
    verdict = judge(rows(**BETTER), rows(), RULES)
    assert verdict.promoted and failing(verdict) == []
    assert [check.rule for check in verdict.checks] == [
        "all scored", "finite", "same images", "psnr_y improves", "ssim holds", "lr_psnr floor", "latency",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"model_psnr_y": 30.1 - 1e-6}, "psnr_y improves"),
        ({**BETTER, "model_ssim": 0.89 - 1e-6}, "ssim holds"),
        ({**BETTER, "seconds": 2.0 + 1e-6}, "latency"),
    ],
)
def test_each_mean_alone_refuses_just_below_its_bound_and_holds_just_above(fields, rule):
    verdict = judge(rows(**fields), rows(), RULES)
    assert not verdict.promoted and failing(verdict) == [rule]
    above = {"model_psnr_y": 30.1 + 1e-6, "model_ssim": 0.89 + 1e-6, "seconds": 2.0}
    assert judge(rows(**above), rows(), RULES).promoted


def test_one_image_below_the_lr_psnr_floor_refuses_whatever_the_mean():
    challenger = [row("0.png", **BETTER, model_lr_psnr=99.0), row("1.png", **BETTER, model_lr_psnr=44.9)]
    assert failing(judge(challenger, rows(2), RULES)) == ["lr_psnr floor"]
    challenger[1]["model_lr_psnr"] = 45.0
    assert judge(challenger, rows(2), RULES).promoted


def test_one_image_without_a_score_refuses():
    challenger = [*rows(2, **BETTER), {"key": "2.png", "reason": "corrupt", "message": "", "seconds": 0.1}]
    assert failing(judge(challenger, rows(), RULES)) == ["all scored"]


@pytest.mark.parametrize("champion", [None, rows()])
def test_no_scores_at_all_refuse(champion):
    for nothing in ([], [{"key": "0.png", "reason": "corrupt", "message": "", "seconds": 0.1}]):
        assert failing(judge(nothing, champion, RULES)) == ["all scored"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model_psnr_y", "model_ssim", "model_lr_psnr", "model_other"])
def test_a_score_that_is_not_finite_refuses(name, value):
    challenger = rows(**BETTER)
    challenger[1][name] = value
    for champion in (rows(), None):
        verdict = judge(challenger, champion, RULES)
        assert not verdict.promoted and "finite" in failing(verdict)


def test_a_champion_score_that_is_not_finite_is_no_reason_to_promote():
    assert not judge(rows(**BETTER), rows(model_psnr_y=math.nan), RULES).promoted


@pytest.mark.parametrize("side", ["champion", "challenger"])
def test_an_image_that_only_one_of_the_two_has_refuses(side):
    whole, short = rows(3), rows(2)
    pair = (rows(3, **BETTER), short) if side == "champion" else (rows(2, **BETTER), whole)
    assert failing(judge(*pair, RULES)) == ["same images"]


def test_an_image_that_the_champion_could_not_score_refuses():
    champion = [*rows(2), {"key": "2.png", "reason": "oom", "message": "", "seconds": 0.1}]
    assert failing(judge(rows(3, **BETTER), champion, RULES)) == ["same images"]


def test_images_are_compared_by_key_and_not_by_place():
    champion = rows(3)
    champion[0].update(model_psnr_y=10.0, seconds=0.5)
    assert judge(rows(**BETTER), champion, RULES) == judge(rows(**BETTER), champion[::-1], RULES)


def test_equal_scores_are_no_improvement():
    assert failing(judge(rows(), rows(), Rules(guarded={}))) == ["psnr_y improves"]


def test_a_first_challenger_is_judged_against_bicubic():
    assert judge(rows(model_psnr_y=28.2), None, RULES).promoted
    refused = judge(rows(model_psnr_y=28.0), None, RULES)
    assert failing(refused) == ["psnr_y improves"] and "bicubic 28.000" in "".join(refused.lines())
    assert failing(judge(rows(model_ssim=0.86), None, RULES)) == ["ssim holds"]
    assert judge(rows(seconds=1e9), None, RULES).promoted  # bicubic has no latency to compare with


def test_the_primary_metric_is_the_one_of_the_rules():
    rules = Rules(primary="ssim", guarded={"psnr_y": 1.0})
    assert judge(rows(model_ssim=0.91, model_psnr_y=29.1), rows(), rules).promoted
    assert failing(judge(rows(model_ssim=0.9, model_psnr_y=39.0), rows(), rules)) == ["ssim improves"]


def test_the_verdict_says_which_rule_failed():
    lines = judge(rows(**BETTER, seconds=3.0), rows(), RULES).lines()
    assert [line for line in lines if line.startswith("FAILS")] == ["FAILS  latency: 3.00 times, at most 2.00"]
    assert sum(line.startswith("holds") for line in lines) == 6
