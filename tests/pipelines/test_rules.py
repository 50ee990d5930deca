"""Laws of pipelines.rules: a rules file is read strictly, and what is written of rules is read back to equal ones."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.rules import Floor, Latency, Primary, Rules, parse_rules, to_yaml

LOWER, HIGHER = ["lpips", "niqe", "colour_drift", "device_s_per_mp"], ["psnr", "ssim", "psnr_y", "lr_psnr", "ms_ssim"]
NUMBERS = st.floats(-1e6, 1e6)
POSITIVE = st.none() | st.floats(1e-9, 1e9)
RULES = st.builds(
    Rules,
    primary=st.builds(
        Primary, metric=st.sampled_from(LOWER + HIGHER), min_gain=NUMBERS, require_significance=st.booleans(),
        level=st.floats(0.5, 0.9999),
    ),
    guarded=st.dictionaries(st.sampled_from(LOWER + HIGHER), st.floats(0, 1e6)),
    floors=st.dictionaries(
        st.sampled_from(HIGHER), st.builds(Floor, per_image_min=NUMBERS, quantile=st.floats(0, 0.999))
    ),
    latency=st.builds(Latency, metric=st.sampled_from(LOWER), max_ratio=POSITIVE, max_absolute=POSITIVE),
    max_dead=st.integers(0, 1000),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(rules=RULES)
def test_rules_that_are_written_are_read_back_as_they_were(rules):
    assert parse_rules(to_yaml(rules)) == rules


def test_an_empty_file_is_the_default_and_what_is_left_out_too():
    assert parse_rules("") == parse_rules("{}") == parse_rules(to_yaml(Rules())) == Rules()
    changed = parse_rules("primary: {metric: lpips}\nmax_dead: 2\n")
    assert changed == Rules(primary=Primary(metric="lpips"), max_dead=2)
    assert parse_rules("latency: {max_ratio: null, max_absolute: 3}").latency == Latency(max_ratio=None, max_absolute=3)
    assert parse_rules("guarded: {}\nfloors: {}") == Rules(guarded={}, floors={})


def test_rules_know_every_metric_that_they_ask_for_once():
    rules = Rules(primary=Primary(metric="psnr"), guarded={"psnr": 0.0, "niqe": 1.0}, floors={"lr_psnr": Floor(per_image_min=1)})  # fmt: skip  # noqa: E501
    assert rules.metrics() == ("psnr", "niqe", "lr_psnr", "device_s_per_mp")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("primary: {metric: pnsr}", r"primary\.metric \('pnsr'\) must be one of psnr, .*use one of them"),
        ("primary: {metric: sigma}", r"primary\.metric \('sigma'\) must be one of"),  # neither more nor less is better
        ("primary: {metric: top1}", r"primary\.metric \('top1'\) must be one of psnr, .*niqe.*; use"),  # no classifier
        ("guarded: {top5: 0.1}", r"guarded \('top5'\) must be one of"),
        ("primary: {metric: 3}", r"primary\.metric \(3\) must be"),
        ("primary: {gain: 1}", r"primary\.gain \(1\) is not a setting of Primary; .*min_gain"),
        ("primary: {min_gain: '0.1'}", r"primary\.min_gain \('0\.1'\) must be a valid number; write digits"),
        ("primary: {min_gain: .nan}", r"primary\.min_gain \(nan\) must be a finite number"),
        ("primary: {min_gain: true}", r"primary\.min_gain \(True\) must be"),
        ("primary: {require_significance: 1}", r"primary\.require_significance \(1\) must be"),
        ("primary: {level: 1}", r"primary\.level \(1\.0\) must be from 0\.5 to below 1; use 0\.95"),
        ("primary: {level: 95}", r"primary\.level \(95\.0\) must be"),
        ("primary: psnr", r"primary \('psnr'\) must hold `name: value` lines"),
        ("primary: null", r"primary \(None\) must hold"),
        ("guarded: [ssim]", r"guarded \(\['ssim'\]\) must hold"),
        ("guarded: {sim: 0.1}", r"guarded \('sim'\) must be one of"),
        ("guarded: {ssim: -0.1}", r"guarded\.ssim \(-0\.1\) must be at least 0"),
        ("guarded: {ssim: much}", r"guarded\.ssim \('much'\) must be a finite number"),
        ("guarded: {ssim: .inf}", r"guarded\.ssim \(inf\) must be a finite number"),
        ("guarded: {ssim: .nan}", r"guarded\.ssim \(nan\) must be a finite number"),
        ("guarded: {ssim: true}", r"guarded\.ssim \(True\) must be a finite number"),
        ("floors: {lr_psnr: 45}", r"floors\.lr_psnr \(45\) must hold"),
        ("floors: {lr_psnr: {}}", r"floors\.lr_psnr\.per_image_min \(missing\) must be given"),
        ("floors: {lr_psnr: {per_image_min: 1, quantile: 1}}", r"floors\.lr_psnr\.quantile \(1\.0\) must be from 0"),
        ("floors: {lr_psnr: {per_image_min: 1, max: 2}}", r"floors\.lr_psnr\.max \(2\) is not a setting"),
        ("floors: {niqe: {per_image_min: 1}}", r"floors \('niqe'\) must be a metric of which more is better; guard"),
        ("latency: {metric: psnr}", r"latency\.metric \('psnr'\) must be a cost"),
        ("latency: {max_ratio: 0}", r"latency\.max_ratio \(0\.0\) must be above 0"),
        ("latency: {max_absolute: -1}", r"latency\.max_absolute \(-1\.0\) must be above 0"),
        ("max_dead: -1", r"max_dead \(-1\) must be at least 0"),
        ("max_dead: 1.5", r"max_dead \(1\.5\) must be a whole number"),
        ("max_dead: true", r"max_dead \(True\) must be a whole number"),
        ("max_ded: 1", r"max_ded \(1\) is not a rule; use one of primary, guarded"),
        ("- primary", r"it \(\['primary'\]\) must hold"),
        ("guarded: {ssim: 0.1, ssim: 9}", r"ssim \('twice'\) must be given once"),
        ("max_dead: 1\nmax_dead: 2", r"max_dead \('twice'\) must be given once"),
        ("primary: [", r"must be plain YAML"),
        ("primary: !!python/object/apply:os.system [true]", r"must be plain YAML"),
        ("? [a]\n: 1", r"must be plain YAML"),
        ("[" * 500, r"must be plain YAML"),
        ("#" * 30_000, r"is no rules file"),
        ("\x00", r"must be plain YAML"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_place_its_value_the_rule_and_the_remedy(text, words):
    with pytest.raises(ValueError, match=rf"^mine\.yaml[: (].*{words}") as found:
        parse_rules(text, name="mine.yaml")
    assert "\n" not in str(found.value) and len(str(found.value)) < 700


def test_the_default_rules_ask_what_the_house_promises():
    assert Rules().floors == {"lr_psnr": Floor(per_image_min=45.0)} and Rules().max_dead == 0
    assert Rules().primary == Primary(metric="psnr_y", min_gain=0.0, require_significance=True, level=0.95)
    assert not math.isclose(Rules().guarded["ssim"], 0) and Rules().latency == Latency(max_ratio=2.0)
