"""Laws of a recipe: closed forms of its rates and shares, and what it refuses."""

import math

import pytest

from diffsr_core.recipe import StageRecipe, TrainingRecipe

STAGE = StageRecipe(name="regression", num_steps=6, learning_rate=1e-3)


def rates(decay: str, *, num_steps: int = 1000, **fields: object) -> list[float]:
    """The learning rate of every step of a stage whose full rate is 2."""
    stage = StageRecipe(name="diffusion", num_steps=num_steps, learning_rate=2.0, decay=decay, **fields)  # type: ignore[arg-type]
    return [stage.rate_at(step) for step in range(num_steps)]


def test_cosine_warms_up_linearly_and_falls_along_a_half_cosine_to_5_percent() -> None:
    found = rates("cosine", warmup_share=0.1)
    assert found[:101] == pytest.approx([2.0 * min(1, (k + 1) / 100) for k in range(101)], rel=1e-12)
    assert found[550] == pytest.approx(2.0 * (0.05 + 0.95 / 2), rel=1e-12)  # half of the way down
    assert found[325] == pytest.approx(2.0 * (0.05 + 0.95 * (1 + math.sqrt(0.5)) / 2), rel=1e-12)
    assert found[999] == pytest.approx(2.0 * 0.05, rel=1e-3)
    assert found[100:] == sorted(found[100:], reverse=True)


def test_constant_warms_up_and_stays() -> None:
    # SR3: 10 000 of 1 000 000 steps of warm-up, here 10 of 1000.
    assert rates("constant", warmup_share=0.01) == pytest.approx([2.0 * min(1, (k + 1) / 10) for k in range(1000)])


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    # SRDiff's pre-training: one rate, from its first step to its last.
    assert rates("constant", warmup_share=0.0) == [2.0] * 1000


def test_a_stage_may_warm_up_to_its_end() -> None:
    for decay in ("cosine", "constant"):
        assert rates(decay, num_steps=10, warmup_share=1.0) == pytest.approx([0.2 * (k + 1) for k in range(10)])


@pytest.mark.parametrize("decay", ["cosine", "constant", "halving"])
def test_a_stage_of_one_step_has_its_full_rate(decay: str) -> None:
    assert rates(decay, num_steps=1) == [2.0]


@pytest.mark.parametrize(
    ("plateaus", "spans"), [(1, [1000]), (2, [500, 500]), (3, [334, 333, 333]), (1000, [1] * 1000)]
)
def test_halving_is_a_staircase_of_equal_spans(plateaus: int, spans: list[int]) -> None:
    found = rates("halving", plateaus=plateaus, warmup_share=0.0)
    assert found == [2.0 / 2**i for i, span in enumerate(spans) for _ in range(span)]


def test_a_staircase_is_warmed_up_too() -> None:
    found = rates("halving", plateaus=2, num_steps=10, warmup_share=0.7)
    assert found == pytest.approx([2.0 * min(1, (k + 1) / 7) * (1 if k < 5 else 0.5) for k in range(10)])


def test_the_stages_follow_one_another_and_one_of_no_steps_is_passed_over() -> None:
    stages = tuple(StageRecipe(name="diffusion", num_steps=n, learning_rate=n) for n in (2, 0, 3))
    recipe = TrainingRecipe(stages=stages, batch_size=1)
    assert recipe.num_steps == 5
    found = [recipe.stage_at(step) for step in range(5)]
    assert [(stage.num_steps, within) for stage, within in found] == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    with pytest.raises(IndexError, match="behind the last stage"):
        recipe.stage_at(5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16, 37])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_shares_of_all_workers_are_the_batch_once_and_in_order_and_alike(batch_size: int, world: int) -> None:
    recipe = TrainingRecipe(stages=(STAGE,), batch_size=batch_size)
    shares = [recipe.share(rank, world) for rank in range(world)]
    assert [index for share in shares for index in share] == list(range(batch_size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


NAN, INF = math.nan, math.inf
STAGES_REFUSED = [
    ({"name": "denoise"}, r"stage name \('denoise'\) must be one of regression, diffusion, joint, "),
    ({"loss": "huber"}, r"stage loss \('huber'\) must be one of l1, l2; use one of them"),
    ({"weighting": "snr"}, r"stage weighting \('snr'\) must be one of none, min_snr; use one of them"),
    ({"decay": "linear"}, r"stage decay \('linear'\) must be one of cosine, constant, halving; use one of them"),
    ({"weighting": "min_snr"}, r"weighting \(min_snr\) is that of the squared error, not of l1; use loss l2"),
    ({"num_steps": -1}, r"num_steps \(-1\) must be at least 0 and finite; change it"),
    ({"learning_rate": -1e-4}, r"learning_rate \(-0.0001\) must be at least 0 and finite; change it"),
    ({"learning_rate": NAN}, r"learning_rate \(nan\) must be at least 0 and finite"),
    ({"learning_rate": INF}, r"learning_rate \(inf\) must be at least 0 and finite"),
    ({"regression_weight": -1.0}, r"regression_weight \(-1.0\) must be at least 0 and finite"),
    ({"regression_weight": NAN}, r"regression_weight \(nan\) must be at least 0"),
    ({"plateaus": 0}, r"plateaus \(0\) must be at least 1 and finite"),
    ({"teacher_steps": 0}, r"teacher_steps \(0\) must be at least 1 and finite"),
    ({"warmup_share": -0.1}, r"warmup_share \(-0.1\) must be from 0 to 1; 0.05 is usual"),
    ({"warmup_share": 1.5}, r"warmup_share \(1.5\) must be from 0 to 1"),
    ({"warmup_share": NAN}, r"warmup_share \(nan\) must be from 0 to 1"),
]


@pytest.mark.parametrize(("fields", "message"), STAGES_REFUSED)
def test_a_stage_that_cannot_be_is_refused_when_it_is_written(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageRecipe(**{"name": "diffusion", "num_steps": 1, "learning_rate": 1e-4, **fields})  # type: ignore[arg-type]


REFUSED = [
    ({"stages": ()}, r"stages \(0\) and batch_size \(16\) must be at least 1; use 1 or more"),
    ({"batch_size": 0}, r"stages \(1\) and batch_size \(0\) must be at least 1; use 1 or more"),
    ({"augmentation": "rotate"}, r"augmentation \('rotate'\) must be one of none, flip, dihedral; use one of them"),
    ({"optimizer": "sgd"}, r"optimizer \('sgd'\) must be one of adamw, adam, muon; use one of them"),
    ({"precision": "fp8"}, r"precision \('fp8'\) must be one of float32, bf16, fp16; use one of them"),
    ({"on_spike": "ignore"}, r"on_spike \('ignore'\) must be one of skip, stop; use one of them"),
    ({"crop_px": 0}, r"crop_px \(0\) must be at least 1 and finite; change it"),
    ({"micro_batch": 0}, r"micro_batch \(0\) must be at least 1 and finite"),
    ({"max_skipped_steps": -1}, r"max_skipped_steps \(-1\) must be at least 0 and finite"),
    ({"condition_blur_px": -1.0}, r"condition_blur_px \(-1.0\) must be at least 0 and finite"),
    ({"condition_blur_px": NAN}, r"condition_blur_px \(nan\) must be at least 0 and finite"),
    ({"condition_noise": INF}, r"condition_noise \(inf\) must be at least 0 and finite"),
    ({"weight_decay": NAN}, r"weight_decay \(nan\) must be at least 0 and finite"),
    ({"betas": (0.9, 1.0)}, r"betas \(1.0\) must be at least 0 and below 1; change it"),
    ({"betas": (NAN, 0.9)}, r"betas \(nan\) must be at least 0 and below 1; change it"),
    ({"gradient_clip": 0.0}, r"gradient_clip \(0.0\) must be above 0 and finite; change it"),
    ({"gradient_clip": NAN}, r"gradient_clip \(nan\) must be above 0 and finite; change it"),
    ({"spike_factor": 1.0}, r"spike_factor \(1.0\) must be above 1 and finite; change it"),
    ({"spike_factor": NAN}, r"spike_factor \(nan\) must be above 1 and finite; change it"),
    ({"ema_half_lives_images": ()}, r"ema_half_lives_images \(\) must be different images, 1 or more each; use 2000"),
    ({"ema_half_lives_images": (2, 0)}, r"ema_half_lives_images \(2, 0\) must be different"),
    ({"ema_half_lives_images": (2, 3, 2)}, r"ema_half_lives_images \(2, 3, 2\) must be different"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_recipe_that_cannot_be_is_refused_when_it_is_written(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingRecipe(**{"stages": (STAGE,), "batch_size": 16, **fields})  # type: ignore[arg-type]


def test_the_edges_of_what_is_allowed_are_allowed() -> None:
    StageRecipe(name="joint", num_steps=0, learning_rate=0.0, regression_weight=0.0, warmup_share=1.0)
    StageRecipe(name="diffusion", num_steps=1, learning_rate=0.0, loss="l2", weighting="min_snr", warmup_share=0.0)
    TrainingRecipe(stages=(STAGE,), batch_size=1, crop_px=1, micro_batch=1, max_skipped_steps=0, betas=(0.0, 0.0))
