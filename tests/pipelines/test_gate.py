"""Laws of pipelines.gate: passed exactly when every rule holds, and each rule can refuse alone."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pipelines.gate import Facts, Signature, judge
from pipelines.intervals import paired_interval
from pipelines.rules import Floor, Latency, Primary, Rules
from pipelines.summaries import summarise

RULES = Rules(
    primary=Primary(metric="psnr_y", min_gain=0.1), guarded={"ssim": 0.01, "colour_drift": 0.5}, floors={
        "lr_psnr": Floor(per_image_min=45.0)}, latency=Latency(max_ratio=2.0, max_absolute=9.0)
)  # fmt: skip
SIGNATURE = Signature(scale=4, channels_in=3, channels_out=3)
SCORES = {"psnr_y": 30.0, "ssim": 0.9, "lr_psnr": 50.0, "colour_drift": 1.0, "device_s_per_mp": 1.0, "ms_ssim": None}
RULE_NAMES = [
    "same signature", "same images", "all scored", "finite", "psnr_y improves", "ssim no worse",
    "colour_drift no worse", "lr_psnr floor", "latency",
]  # fmt: skip
BETTER = {"psnr_y": 30.5}
COUNT = 5
EPS = 1e-6


def rows(method, count=COUNT, **fields):
    """Long rows; images differ from one another by the same offset in every method, which pairing removes."""
    offset = {"psnr_y": lambda i: i * 1.5, "ssim": lambda i: 0.01 * i}
    scores = SCORES | fields
    return [
        {"key": f"{i}.png", "method": method, "reason": "", "message": "", "seconds": 1.0, "megapixels": 1.0}
        | {name: value + offset.get(name, lambda i: 0.0)(i) if value is not None else None
           for name, value in scores.items()}
        for i in range(count)
    ]  # fmt: skip


def facts(**changes):
    return Facts(**{"num_images": COUNT, "challenger": SIGNATURE, "champion": SIGNATURE} | changes)


def verdict_of(scored, champion=None, rules=RULES, **changes):
    champion = rows("champion") if champion is None else champion
    return judge([*scored, *champion, *rows("bicubic", psnr_y=99.0)], rules, facts(**changes))


def failing(verdict):
    return [check.rule for check in verdict.checks if not check.holds]


def text_of(verdict, rule):
    return next(check.text for check in verdict.checks if check.rule == rule)


def test_a_better_challenger_passes_and_every_rule_was_asked():
    verdict = verdict_of(rows("challenger", **BETTER))
    assert verdict.passed and failing(verdict) == []
    assert [check.rule for check in verdict.checks] == RULE_NAMES
    assert "30.00" not in text_of(verdict, "psnr_y improves")  # the means are of these images: 33.5 and 33.0
    assert "33.50 dB, champion 33.00 dB: gain +0.5000 dB [+0.5000, +0.5000] at 95 %" in text_of(
        verdict, "psnr_y improves"
    )


@pytest.mark.parametrize(
    ("holds", "fails", "rule"),
    [
        ({"psnr_y": 30.1 + EPS}, {"psnr_y": 30.1 - EPS}, "psnr_y improves"),
        ({"ssim": 0.89 + EPS}, {"ssim": 0.89 - EPS}, "ssim no worse"),
        ({"colour_drift": 1.5 - EPS}, {"colour_drift": 1.5 + EPS}, "colour_drift no worse"),
        ({"lr_psnr": 45.0}, {"lr_psnr": 45.0 - EPS}, "lr_psnr floor"),
        ({"device_s_per_mp": 2.0}, {"device_s_per_mp": 2.0 + EPS}, "latency"),
    ],
)
def test_each_rule_can_refuse_alone_just_beyond_its_bound_and_holds_within(holds, fails, rule):
    assert verdict_of(rows("challenger", **{**BETTER, **holds})).passed
    verdict = verdict_of(rows("challenger", **{**BETTER, **fails}))
    assert not verdict.passed and failing(verdict) == [rule]


def test_the_absolute_ceiling_refuses_alone_and_holds_for_a_first_promotion_too():
    rules = replace(RULES, latency=Latency(max_ratio=None, max_absolute=9.0))
    for champion in (SIGNATURE, None):
        slow = rows("challenger", psnr_y=200.0, device_s_per_mp=9.0 + EPS)
        others = [*rows("champion"), *rows("bicubic")]
        assert failing(judge([*slow, *others], rules, facts(champion=champion))) == ["latency"]
        quick = rows("challenger", psnr_y=200.0, device_s_per_mp=9.0)
        assert judge([*quick, *others], rules, facts(champion=champion)).passed


def test_another_signature_refuses_alone_in_each_of_its_parts_and_says_which():
    for change in ({"scale": 2}, {"channels_in": 4}, {"channels_out": 1}, {"takes": "image and maps"}):
        other = replace(SIGNATURE, **change)
        verdict = verdict_of(rows("challenger", **BETTER), challenger=other)
        assert failing(verdict) == ["same signature"]
        assert str(other) in text_of(verdict, "same signature") and str(SIGNATURE) in text_of(verdict, "same signature")


def test_significance_asks_more_than_the_mean_and_can_be_left_out():
    gains = [0.61, 0.57, -0.52, 0.66, 0.49]
    challenger = [row | {"psnr_y": row["psnr_y"] + gain} for row, gain in zip(rows("challenger"), gains, strict=True)]
    interval = paired_interval(
        [row["psnr_y"] for row in challenger], [row["psnr_y"] for row in rows("champion")], level=0.95
    )
    assert interval.low < 0.1 < interval.mean
    refused = verdict_of(challenger)
    assert failing(refused) == ["psnr_y improves"] and refused.gains["psnr_y"] == interval
    by_mean = replace(RULES, primary=replace(RULES.primary, require_significance=False))
    assert verdict_of(challenger, rules=by_mean).passed
    bound = replace(by_mean, primary=replace(by_mean.primary, min_gain=interval.mean + EPS))
    assert failing(verdict_of(challenger, rules=bound)) == ["psnr_y improves"]
    bound = replace(RULES, primary=replace(RULES.primary, min_gain=interval.low - EPS))
    assert verdict_of(challenger, rules=bound).passed
    bound = replace(RULES, primary=replace(RULES.primary, min_gain=interval.low + EPS))
    assert failing(verdict_of(challenger, rules=bound)) == ["psnr_y improves"]
    narrower = replace(RULES, primary=replace(RULES.primary, min_gain=interval.low + EPS, level=0.8))
    assert verdict_of(challenger, rules=narrower).passed


def test_a_guard_looks_at_the_bad_end_of_the_interval_and_not_at_the_mean():
    changes = [0.02, 0.02, -0.05, 0.02, 0.02]
    challenger = [
        row | {"ssim": row["ssim"] + change} for row, change in zip(rows("challenger", **BETTER), changes, strict=True)
    ]
    assert np.mean(changes) > 0 and failing(verdict_of(challenger)) == ["ssim no worse"]
    low = verdict_of(challenger).gains["ssim"].low
    for margin, expected in ((-low + EPS, []), (-low - EPS, ["ssim no worse"])):
        assert failing(verdict_of(challenger, rules=replace(RULES, guarded={"ssim": margin}))) == expected


def test_a_metric_of_which_less_is_better_improves_downwards():
    rules = replace(RULES, primary=Primary(metric="lpips", min_gain=0.01), guarded={})
    champion = rows("champion", lpips=0.5)
    assert verdict_of(rows("challenger", lpips=0.49 - EPS), champion, rules).passed
    for worse in (0.49 + EPS, 0.6):
        assert failing(verdict_of(rows("challenger", lpips=worse), champion, rules)) == ["lpips improves"]
    assert verdict_of(rows("challenger", lpips=0.4), champion, rules).gains["lpips"].mean == pytest.approx(0.1)


def test_one_image_below_a_floor_refuses_whatever_the_mean_and_is_named():
    challenger = rows("challenger", **BETTER, lr_psnr=99.0)
    challenger[3]["lr_psnr"] = 44.9
    verdict = verdict_of(challenger)
    assert failing(verdict) == ["lr_psnr floor"]
    assert "1 of 5 images are below" in text_of(verdict, "lr_psnr floor")
    assert "'3.png' with 44.90 dB" in text_of(verdict, "lr_psnr floor")


@pytest.mark.parametrize("count", [10, 14])
@pytest.mark.parametrize(("below", "expected"), [(2, []), (3, ["lr_psnr floor"])])
def test_a_floor_with_a_quantile_leaves_that_share_below(count, below, expected):
    rules = replace(RULES, floors={"lr_psnr": Floor(per_image_min=45.0, quantile=0.2)})
    challenger = rows("challenger", count, **BETTER)
    for row in challenger[:below]:
        row["lr_psnr"] = 10.0
    assert failing(verdict_of(challenger, rows("champion", count), rules, num_images=count)) == expected


def lost(key, method, reason="oom", message="12 GiB"):
    return {"key": key, "method": method, "reason": reason, "message": message}


@pytest.mark.parametrize("gone", [[], [lost("2.png", "challenger")]])
def test_an_image_that_the_challenger_alone_lost_refuses_with_its_reason(gone):
    challenger = rows("challenger", **BETTER)
    verdict = verdict_of([*challenger[:2], *challenger[3:], *gone])
    assert failing(verdict) == ["same images"]
    why = "'2.png' (oom: '12 GiB')" if gone else "'2.png' (no row)"
    text = "4 images scored by both, 0 by challenger alone, 1 by champion alone; challenger lost " + why
    assert text_of(verdict, "same images") == text


@pytest.mark.parametrize("gone", [[], [lost("2.png", "champion")], [lost("2.png", "champion", "nan", "at 3")]])
def test_an_image_that_the_champion_alone_lost_is_named_and_left_out_and_refuses_nobody(gone):
    challenger, champion = rows("challenger", **BETTER), rows("champion")
    champion = [*champion[:2], *champion[3:], *gone]
    challenger[2] |= {"psnr_y": -1e9, "ssim": -1.0, "device_s_per_mp": 1e9}  # it would ruin every paired comparison
    verdict = verdict_of(challenger, champion)
    assert verdict.passed and verdict.gains["psnr_y"].mean == pytest.approx(0.5)
    why = f"'2.png' ({gone[0]['reason']}: {gone[0]['message']!r})" if gone else "'2.png' (no row)"
    assert f"1 by challenger alone, 0 by champion alone; champion lost, and they are not compared: {why}" in text_of(
        verdict, "same images"
    )
    equal = [row | {"psnr_y": row["psnr_y"] - 0.5} for row in challenger]
    assert failing(verdict_of(equal, champion)) == ["psnr_y improves"]  # the rest is judged as strictly


def test_what_the_challenger_alone_scored_must_be_finite_and_reach_the_floors():
    champion = [*rows("champion")[:4], lost("4.png", "champion")]
    for fields, rule in (({"lr_psnr": 44.0}, "lr_psnr floor"), ({"seam": math.inf}, "finite")):
        challenger = rows("challenger", **BETTER)
        challenger[4] |= fields
        verdict = verdict_of(challenger, champion)
        assert failing(verdict) == [rule] and "'4.png'" in text_of(verdict, rule)


def test_a_champion_that_scored_nothing_leaves_nothing_to_compare():
    champion = [lost(f"{i}.png", "champion") for i in range(COUNT)]
    assert "same images" in failing(verdict_of(rows("challenger", **BETTER), champion))


def test_a_result_of_nan_is_not_finite_where_the_challenger_made_it():
    def nan(method, keys):
        return [lost(f"{i}.png", method, "nan", "not finite") for i in keys]

    gone = verdict_of([*rows("challenger", **BETTER)[2:], *nan("challenger", (0, 1))])
    assert failing(gone) == ["same images", "finite"]
    assert text_of(gone, "finite") == "values that are not finite: 2, such as the result of challenger in '0.png'"
    champion = verdict_of(rows("challenger", **BETTER), [*rows("champion")[2:], *nan("champion", (0, 1))])
    assert champion.passed and "results of champion that are not finite, which refuses nobody: 2, such as '0.png'" in (
        text_of(champion, "finite")
    )
    rules = replace(RULES, max_dead=1)  # it allows for files that cannot be read
    both = verdict_of(
        [*rows("challenger", **BETTER)[1:], *nan("challenger", [0])],
        [*rows("champion")[1:], *nan("champion", [0])],
        rules,
    )
    assert failing(both) == ["finite"]


def test_what_is_missing_is_named_up_to_a_number_with_the_first_reason_cut_short():
    names = [f"{i}.png" for i in range(8)]
    rotten = [lost(key, method, "corrupt", "x" * 999) for key in names for method in ("challenger", "champion")]
    texts = [
        text_of(
            verdict_of([lost(key, "challenger", "corrupt", "x" * 999) for key in names], rows("champion", 8)),
            "same images",
        ),
        text_of(verdict_of(rotten, [], num_images=8), "all scored"),
    ]
    for text in texts:
        named = f"'0.png' (corrupt: '{'x' * 200}'), '1.png', '2.png', '3.png', '4.png' and 3 more"
        assert text.endswith(named)


def test_a_difference_that_is_small_is_not_shown_as_none():
    verdict = verdict_of(rows("challenger", psnr_y=30.0012), rules=replace(RULES, primary=Primary(min_gain=0.0005)))
    assert "gain +0.0012 dB [+0.0012, +0.0012] at 95 %; the low end must be above +0.0005 dB" in text_of(
        verdict, "psnr_y improves"
    )
    assert "gain +0.000000 [+0.000000, +0.000000] at 95 %; the low end must reach -0.010000" in text_of(
        verdict, "ssim no worse"
    )


def test_an_image_twice_refuses_alone():
    twice = rows("challenger", **BETTER)
    assert failing(verdict_of([*twice, twice[0]])) == ["same images"]


@pytest.mark.parametrize(("dead", "most", "expected"), [(1, 0, ["all scored"]), (1, 1, []), (2, 1, ["all scored"])])
def test_images_that_nobody_could_score_refuse_beyond_max_dead(dead, most, expected):
    rotten = [
        {"key": f"rotten-{i}", "method": method, "reason": "corrupt", "message": ""}
        for i in range(dead) for method in ("challenger", "champion")
    ]  # fmt: skip
    rules = replace(RULES, max_dead=most)
    assert (
        failing(verdict_of([*rows("challenger", **BETTER), *rotten], rules=rules, num_images=COUNT + dead)) == expected
    )
    unlisted = verdict_of(rows("challenger", **BETTER), rules=rules, num_images=COUNT + dead)
    assert failing(unlisted) == expected  # also where they have no row at all


def test_images_beyond_the_frozen_set_refuse():
    assert failing(verdict_of(rows("challenger", **BETTER), num_images=COUNT - 1)) == ["all scored"]


@pytest.mark.parametrize("champion", [SIGNATURE, None])
def test_no_scores_at_all_refuse_with_every_check(champion):
    verdict = judge([], RULES, facts(champion=champion))
    assert [check.rule for check in verdict.checks] == RULE_NAMES
    assert failing(verdict) == [name for name in RULE_NAMES if name not in ("same signature", "finite")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["psnr_y", "ssim", "lr_psnr", "device_s_per_mp", "seam", "seconds"])
@pytest.mark.parametrize("method", ["challenger", "champion"])
def test_a_value_that_is_not_finite_refuses_whatever_it_is_of(method, name, value):
    both = {"challenger": rows("challenger", **BETTER), "champion": rows("champion")}
    both[method][1][name] = value
    verdict = verdict_of(both["challenger"], both["champion"])
    assert "finite" in failing(verdict) and f"{name} of {method} in '1.png'" in text_of(verdict, "finite")
    if name in ("seam", "seconds"):
        assert failing(verdict) == ["finite"]


@pytest.mark.parametrize("method", ["challenger", "champion"])
def test_a_metric_of_the_rules_that_one_image_lacks_cannot_be_judged(method):
    both = {"challenger": rows("challenger", **BETTER), "champion": rows("champion")}
    both[method][1]["ssim"] = None
    assert failing(verdict_of(both["challenger"], both["champion"])) == ["ssim no worse"]
    del both[method][1]["ssim"]
    assert failing(verdict_of(both["challenger"], both["champion"])) == ["ssim no worse"]


def test_images_are_compared_by_key_and_not_by_place():
    challenger = [row | {"psnr_y": row["psnr_y"] + 0.1 * i} for i, row in enumerate(rows("challenger", **BETTER))]
    assert verdict_of(challenger) == verdict_of(challenger[::-1])


def test_the_interval_is_that_of_the_images_in_the_order_of_their_keys():
    gains = np.random.default_rng(0).normal(1, 1, 10)  # any other order draws other resamples
    challenger = [
        row | {"psnr_y": row["psnr_y"] + gain} for row, gain in zip(rows("challenger", 10), gains, strict=True)
    ]
    verdict = verdict_of(challenger[::-1], rows("champion", 10), num_images=10)
    first, second = ([row["psnr_y"] for row in scored] for scored in (challenger, rows("champion", 10)))
    assert verdict.gains["psnr_y"] == paired_interval(first, second)
    assert verdict.gains["psnr_y"] != paired_interval(first[::-1], second[::-1])


def test_equal_scores_are_no_improvement():
    rules = replace(RULES, primary=Primary())
    assert failing(verdict_of(rows("challenger"), rules=rules)) == ["psnr_y improves"]


def test_one_image_proves_nothing_unless_significance_is_left_out():
    both = rows("challenger", 1, **BETTER), rows("champion", 1)
    verdict = verdict_of(*both, num_images=1)
    assert failing(verdict) == ["psnr_y improves"] and "one image" in text_of(verdict, "psnr_y improves")
    by_mean = replace(RULES, primary=replace(RULES.primary, require_significance=False))
    assert verdict_of(*both, by_mean, num_images=1).passed


def test_a_first_challenger_is_judged_against_bicubic_and_nobody_asks_for_its_latency():
    def first(**fields):
        challenger = rows("challenger", **fields)
        return judge([*challenger, *rows("bicubic", psnr_y=28.0, device_s_per_mp=0.0)], RULES, facts(champion=None))

    assert first(psnr_y=28.1 + EPS, device_s_per_mp=8.9).passed
    refused = first(psnr_y=28.1 - EPS)
    assert failing(refused) == ["psnr_y improves"] and "bicubic 31.00 dB" in text_of(refused, "psnr_y improves")
    assert failing(first(ssim=0.8)) == ["ssim no worse"]


def test_bicubic_does_not_matter_where_there_is_a_champion():
    challenger, champion = rows("challenger", **BETTER), rows("champion")
    broken = [row | {"ssim": math.nan} for row in rows("bicubic", psnr_y=99.0)]
    assert judge([*challenger, *champion], RULES, facts()) == judge([*challenger, *champion, *broken], RULES, facts())


def test_a_champion_that_costs_nothing_cannot_be_matched_by_one_that_costs():
    champion = rows("champion", device_s_per_mp=0.0)
    assert failing(verdict_of(rows("challenger", **BETTER), champion)) == ["latency"]
    assert verdict_of(rows("challenger", **BETTER, device_s_per_mp=0.0), champion).passed


def test_the_verdict_says_which_rule_failed_with_its_numbers():
    lines = verdict_of(rows("challenger", **BETTER, device_s_per_mp=3.0)).lines()
    assert [line for line in lines if line.startswith("FAILS")] == [
        "FAILS  latency: 3.00 s/MP, champion 1.00 s/MP: 3.00 times, at most 2; at most 9.00 s/MP"
    ]
    assert sum(line.startswith("holds") for line in lines) == len(RULE_NAMES) - 1


def test_means_are_over_the_images_that_were_measured_and_a_nan_makes_none():
    scored = rows("challenger", 3, ssim=None)
    scored[0]["ms_ssim"], scored[2]["lr_psnr"] = 0.5, math.nan
    dead = {"key": "x", "method": "challenger", "reason": "corrupt", "message": ""}
    found = summarise([*scored, dead], ("challenger", "champion"), ("psnr_y", "ssim", "ms_ssim", "lr_psnr"))
    assert found["champion"] == {} and set(found["challenger"]) == {"psnr_y", "ms_ssim"}
    assert found["challenger"]["psnr_y"].mean == pytest.approx(31.5)
    assert found["challenger"]["ms_ssim"] == (0.5, 0.5, 0.5)
