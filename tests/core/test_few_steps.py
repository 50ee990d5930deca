"""Laws of the few-steps benchmark: its control is sharpened as far as it says, and its verdicts follow the numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffsr_core.checkpoint import model_files, save_files, schedule_json
from diffsr_core.degradation import Degradation
from diffsr_core.metrics import lr_psnr, psnr, rgb_to_y, spectral_error
from diffsr_core.pixels import bicubic
from pipelines.measures import Meter, MeterSettings
from tests.benchmarks import few_steps
from tests.benchmarks import few_steps_scores as scores
from tests.benchmarks.few_steps import measured
from tests.benchmarks.few_steps_rows import STARTS, Cache, Model, drawing, key_of, load_models, read_pairs, rows_of
from tests.benchmarks.few_steps_scores import ANCESTRAL, CONTROL, FROM, MEAN, REGRESSION, STUDENT, Pixels, Scores
from tests.core import tiny


def picture(*, seed: int = 0, size: int = 64) -> Pixels:
    """Return noise whose amplitude falls with frequency, as a photograph's does, far from black and white."""
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :])
    planes = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, size, size))) / np.maximum(radius, 1 / size)).real
    pixels: Pixels = (128 + 20 * planes / planes.std()).transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8)
    return pixels


def halved(hr: Pixels) -> tuple[Pixels, Pixels]:
    """Return (SR, LR): bicubic of the LR with half of what HR has above it, so that a gain of 1 restores the rest."""
    lr = Degradation("bicubic", 4).apply(hr, seed=0)
    return scores.sharpened(hr, lr, gain=-0.5), lr


def test_the_energy_of_an_image_is_that_of_its_band_alone() -> None:
    y, x = np.mgrid[:64, :64]
    grid = 10.0 * (-1.0) ** (x + y)  # the highest frequency there is: nothing of it survives the reduction
    inner = (64 - 2 * 4) ** 2
    assert scores.high_energy(100 + grid) == pytest.approx(100 * inner, rel=1e-5)
    assert scores.high_energy(100 + 3 * grid) == pytest.approx(900 * inner, rel=1e-5)
    assert scores.high_energy(100 + 20 * np.sin(2 * np.pi * x / 64)) < 0.05 * inner  # below the LR's Nyquist


def test_hr_has_its_own_energy_and_bicubic_far_less() -> None:
    hr = picture()
    own, blurred = (
        scores.high_energy(rgb_to_y(x)) for x in (hr, bicubic(Degradation("bicubic", 4).apply(hr, seed=0), 4))
    )
    image = {"energy": own, "hr_energy": scores.high_energy(rgb_to_y(hr))}
    assert Scores(1, [image]).mean("texture") == 1.0
    assert Scores(1, [{**image, "energy": blurred}]).mean("texture") < 0.2


def test_the_texture_of_a_set_is_of_all_energy_together() -> None:
    found = Scores(1, [{"energy": 1.0, "hr_energy": 4.0}, {"energy": 90.0, "hr_energy": 96.0}])
    assert found.mean("texture") == pytest.approx(0.91)


def test_the_control_reaches_the_energy_with_one_gain_and_keeps_to_its_lr() -> None:
    images = [halved(picture(seed=k)) for k in range(2)]
    wanted = scores.total_energy([rgb_to_y(picture(seed=k)) for k in range(2)])
    gain, reached = scores.find_gain(images, wanted)
    assert gain == pytest.approx(1.0, abs=0.05)
    made = [scores.sharpened(sr, lr, gain=gain) for sr, lr in images]
    assert reached == scores.total_energy([rgb_to_y(sr) for sr in made]) == pytest.approx(wanted, rel=1e-3)
    assert min(lr_psnr(lr, sr, scale=4) for sr, (_, lr) in zip(made, images, strict=True)) > 50


def test_what_is_sharpened_is_projected_onto_its_lr_again() -> None:
    sr, lr = halved(picture())
    assert lr_psnr(lr, sr + 10, scale=4) < 30
    assert lr_psnr(lr, scores.sharpened(sr + 10, lr, gain=1.0), scale=4) > 50


def test_a_control_that_must_be_softened_gets_a_gain_below_0() -> None:
    image = halved(picture())
    half = 0.5 * scores.total_energy([rgb_to_y(image[0])])
    gain, reached = scores.find_gain([image], half)
    assert -1 < gain < 0 and reached == pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize(("energy", "end"), [(1e12, 8.0), (0.0, -1.0)])
def test_an_energy_that_no_gain_gives_ends_at_the_nearer_end(energy: float, end: float) -> None:
    image = halved(picture())
    gain, reached = scores.find_gain([image], energy, most=8.0)
    assert gain == end
    assert reached == scores.total_energy([rgb_to_y(scores.sharpened(*image, gain=end))])


def test_the_octaves_tell_which_frequencies_are_too_weak_and_by_how_much() -> None:
    rng = np.random.default_rng(0)
    white = 128 + 20 * rng.standard_normal((136, 136))
    assert scores.octave_errors(128 + (white - 128) / 2, white) == pytest.approx([20 * math.log10(0.5)] * 3, abs=1e-3)
    x = np.arange(136)[None, :]
    louder = white + 40 * np.sin(2 * np.pi * 0.18 * x)  # in the second octave alone
    fine, middle, coarse = scores.octave_errors(louder, white)
    assert middle > 0.5 and max(abs(fine), abs(coarse)) < 0.1


def test_the_octaves_are_of_the_spectral_error() -> None:
    a, b = (rgb_to_y(picture(seed=k, size=96)) for k in range(2))
    assert np.abs(scores.spectrum_error(a, b)).mean() == pytest.approx(spectral_error(a, b, border=4), rel=1e-12)


def good() -> dict[str, dict[str, Scores]]:
    """Return the scores of two sets that bear every claim out."""
    student = {"niqe": 4.0, "spectral_error": 1.0, "psnr_y": 29.5, "sigma": 5.0, "energy": 0.95, "hr_energy": 1.0}
    teacher = {**student, "niqe": 4.5, "spectral_error": 1.5, "psnr_y": 28.0}
    control = {**student, "niqe": 5.0, "spectral_error": 2.0, "sigma": 0.0}
    regression = {**control, "psnr_y": 31.0, "energy": 0.5}
    rows = {ANCESTRAL: (100, teacher), STUDENT: (1, student), MEAN: (4, student), CONTROL: (0, control)}
    rows[REGRESSION] = (0, regression)
    return {
        name: {row: Scores(calls, [dict(image), dict(image)]) for row, (calls, image) in rows.items()}
        for name in ("Set5", "BSD100")
    }


def judged(sets: dict[str, dict[str, Scores]], *, seconds: float = 0.05) -> list[bool]:
    """Return whether each claim holds: two of few calls, speed, texture, not mere gain."""
    return [v.holds for v in scores.verdicts(sets, {STUDENT: {"float32": 0.2, "bf16": seconds}})]


def test_numbers_that_bear_every_claim_out_are_believed_and_quoted() -> None:
    sets = good()
    assert judged(sets) == [True] * 5
    first, last = scores.verdicts(sets, {STUDENT: {"float32": 0.2, "bf16": 0.05}})[:2]
    assert "100 times fewer calls than SRDiff's 100, 2000 times fewer than SR3's 2000" in first.evidence
    assert "25 times fewer calls than SRDiff's 100, 500 times" in last.evidence
    assert "NIQE 4.00 against 4.50 (2 of 2 images)" in first.evidence


@pytest.mark.parametrize("name", ["Set5", "BSD100"])
@pytest.mark.parametrize(
    ("row", "measure", "value", "refuted"),
    [
        (STUDENT, "niqe", 4.6, [0]),
        (STUDENT, "spectral_error", 1.6, [0]),
        (STUDENT, "psnr_y", 27.9, [0]),
        (STUDENT, "niqe", math.nan, [0, 4]),
        (MEAN, "niqe", 4.6, [1]),
        (STUDENT, "sigma", 0.0, [4]),
        (CONTROL, "niqe", 3.9, [4]),
        (CONTROL, "spectral_error", 1.0, [4]),
        (CONTROL, "energy", 0.8, [4]),
    ],
)
def test_a_number_on_one_set_is_enough_to_say_no(
    name: str, row: str, measure: str, value: float, refuted: list[int]
) -> None:
    sets = good()
    for image in sets[name][row].images:
        image[measure] = value
    found = judged(sets)
    if name == "Set5" and row == STUDENT and measure == "psnr_y":
        refuted = [*refuted, 3]
    assert [index for index, holds in enumerate(found) if not holds] == refuted


def test_each_level_that_a_student_was_started_from_is_judged_and_one_with_texture_is_enough() -> None:
    sets = good()
    for found in sets.values():
        found[f"{FROM} 0"] = Scores(1, [{**image, "niqe": 9.0} for image in found[STUDENT].images])
        for row in (STUDENT, CONTROL):
            found[row] = Scores(found[row].calls, [{**image, "energy": 0.8} for image in found[row].images])
        found[f"{FROM} 0.3"] = Scores(1, [{**image, "niqe": 4.5} for image in found[STUDENT].images])
    assert judged(sets) == [True, True, True, True, True, True]
    for image in sets["BSD100"][f"{FROM} 0.3"].images:
        image["psnr_y"] = 27.9
    assert judged(sets) == [True, True, False, True, True, True]
    for image in sets["BSD100"][f"{FROM} 0"].images:
        image["niqe"] = 4.0  # now some level holds on each set, but none on both
    assert judged(sets) == [True, True, False, True, True, True]
    for image in sets["BSD100"][f"{FROM} 0"].images:
        image["niqe"] = 9.0
    some = scores.verdicts(sets, {STUDENT: {"float32": 0.05}})[2]
    assert some.evidence == "Worse are: Set5: from 0 NIQE, from 0.3 none; BSD100: from 0 NIQE, from 0.3 PSNR-Y"
    textured = scores.verdicts(sets, {STUDENT: {"float32": 0.2}})[4]
    assert f"*{STUDENT}* 0.800 at 29.50 dB, *{FROM} 0* 0.950 at 29.50 dB" in textured.evidence


def test_what_independent_draws_could_reach_is_that_of_real_ones() -> None:
    rng = np.random.default_rng(0)
    mean, residual, other = 2 * rng.standard_normal(200_000), *rng.standard_normal((2, 200_000))
    hr, s = mean + residual, 0.6
    draw = mean + s * other

    def db(image: NDArray[np.float64]) -> float:
        return float(-10 * np.log10(np.square(image - hr).mean()))

    share = np.square(draw).mean() / np.square(hr).mean()
    own = {"energy": np.square(mean).mean(), "hr_energy": np.square(hr).mean(), "psnr_y": db(mean)}
    assert scores.independent_psnr(Scores(0, [own]), share) == pytest.approx(db(draw), abs=0.03)


def test_too_many_calls_too_slow_and_too_smooth_are_no() -> None:
    sets = good()
    sets["Set5"][MEAN] = sets["Set5"][MEAN]._replace(calls=5)
    assert judged(sets)[1] is False
    assert judged(good(), seconds=0.081)[2] is False
    sets = good()
    for row in (STUDENT, CONTROL):
        for image in sets["Set5"][row].images:
            image["energy"] = 0.89
    assert judged(sets) == [True, True, True, False, True]


def test_a_score_is_the_mean_over_the_samples_and_sigma_is_of_all(tmp_path: Path) -> None:
    Image.fromarray(picture(size=32)).save(tmp_path / "0.png")
    (pair,) = read_pairs(tmp_path)
    drawn = [bicubic(pair.lr, 4), pair.hr // 2]
    meter = Meter(MeterSettings(names=("psnr_y", "sigma"), border=4), scale=4)
    both = scores.score(lambda lr, k: drawn[k], pair, meter, num_samples=2)
    deviation = np.abs(drawn[0].astype(float) - drawn[1]).mean() / 2
    single = [scores.score(lambda lr, k: drawn.pop(), pair, meter, num_samples=1) for _ in range(2)]
    for name in ("psnr_y", "energy", "hr_energy", "octave_0"):
        assert both[name] == pytest.approx((single[0][name] + single[1][name]) / 2, rel=1e-12)
    assert both["sigma"] == pytest.approx(deviation, rel=1e-6) and [one["sigma"] for one in single] == [0.0, 0.0]


def test_what_was_measured_is_kept_and_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    cache, asked = Cache(tmp_path / "new"), list[int]()

    def compute() -> dict[str, float]:
        asked.append(1)
        return {"niqe": math.nan, "psnr_y": 1 / 3}

    first = cache.of({"model": "a"}, compute)
    again = Cache(tmp_path / "new").of({"model": "a"}, compute)
    assert len(asked) == 1 and json.dumps(again) == json.dumps(first)
    cache.of({"model": "b"}, compute)
    assert len(asked) == 2
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".json"}


def test_what_decides_a_score_is_in_its_key(tmp_path: Path) -> None:
    Image.fromarray(picture(size=32)).save(tmp_path / "0.png")
    Image.fromarray(picture(seed=1, size=32)).save(tmp_path / "1.png")
    pair, other = read_pairs(tmp_path)
    model = tiny.model_of(tiny.ANCHORED)
    models = {name: Model(model, name) for name in ("student", "teacher")}
    rows = {row.name: row for row in rows_of(models, tmp_path)}
    changed = {**models, "student": Model(model, "another")}
    keys = [
        key_of(rows[STUDENT], models, pair, gain=0.0),
        key_of(rows[STUDENT], models, other, gain=0.0),
        key_of(rows[STUDENT], changed, pair, gain=0.0),
        key_of(rows[MEAN], models, pair, gain=0.0),
        key_of(rows[CONTROL], models, pair, gain=1.0),
        key_of(rows[CONTROL], models, pair, gain=2.0),
        key_of(rows[CONTROL], changed, pair, gain=1.0),
        key_of(rows[REGRESSION], models, pair, gain=0.0),
        key_of(rows[ANCESTRAL], models, pair, gain=0.0),
    ]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def folder(path: Path, *, seed: int, encoder: int, one_step: bool = True) -> Path:
    config = replace(tiny.ANCHORED, one_step=one_step)
    model = tiny.model_of(config, seed=seed)
    model.encoder.load_state_dict(tiny.model_of(config, seed=encoder).encoder.state_dict())
    weights = model.state_dict()
    save_files(path, model_files(config, weights, weights, preset="tiny", card=""))
    return path


def test_models_of_two_regressions_are_not_compared(tmp_path: Path) -> None:
    student = folder(tmp_path / "student", seed=1, encoder=1)
    teacher = folder(tmp_path / "teacher", seed=2, encoder=1, one_step=False)
    assert set(load_models(student, teacher, None)) == {"student", "teacher"}
    with pytest.raises(ValueError, match="distilled .* must have the student's encoder"):
        load_models(student, teacher, folder(tmp_path / "other", seed=3, encoder=3))


def test_a_student_and_a_teacher_cannot_be_taken_for_one_another(tmp_path: Path) -> None:
    student = folder(tmp_path / "student", seed=1, encoder=1)
    teacher = folder(tmp_path / "teacher", seed=2, encoder=1, one_step=False)
    with pytest.raises(ValueError, match="student .* must be trained to draw in one step"):
        load_models(teacher, teacher, None)
    with pytest.raises(ValueError, match="teacher .* must be the diffusion model"):
        load_models(student, student, None)


def test_every_kind_of_row_draws_what_it_says_onto_the_lr(tmp_path: Path) -> None:
    models = {
        name: Model(tiny.model_of(replace(tiny.ANCHORED, one_step=name != "teacher"), seed=1), name)
        for name in ("student", "teacher", "distilled")
    }
    lr = Degradation("bicubic", 4).apply(picture(size=32), seed=0)
    rows = {row.name: row for row in rows_of(models, tmp_path)}
    assert rows[ANCESTRAL].calls == 100 and rows[STUDENT].calls == 1 and rows[MEAN].calls == 4
    kinds = {
        (row.source, row.recipe.sampler, row.recipe.start_level, row.recipe.num_samples): row for row in rows.values()
    }
    assert len(kinds) == 12
    for row in kinds.values():
        short = replace(row, recipe=replace(row.recipe, num_steps=min(2, row.recipe.num_steps)))
        first, second = (drawing(short, models, tile=8, num_threads=1)(lr, k) for k in range(2))
        assert first.shape == (32, 32, 3)
        assert (first != second).any() == row.varies, row.name
    draw = drawing(rows[STUDENT], models, tile=8, num_threads=1)
    mean = np.stack([draw(lr, k) for k in range(4, 8)]).astype(float).mean(axis=0)
    assert np.abs(drawing(rows[MEAN], models, tile=8, num_threads=1)(lr, 1) - mean).max() <= 0.5


def test_a_student_of_any_level_is_drawn_from_its_own_and_from_others(tmp_path: Path) -> None:
    models = {
        "student": Model(tiny.model_of(replace(tiny.ANCHORED, one_step=True, start_level=0.7)), "s"),
        "teacher": Model(tiny.model_of(tiny.ANCHORED), "t"),
    }
    rows = {row.name: row.recipe.start_level for row in rows_of(models, tmp_path) if row.source == "student"}
    own = {STUDENT: 0.7, f"{STUDENT}, bf16": 0.7, MEAN: 0.7}
    assert rows == own | {f"{FROM} {level:g}": level for level in STARTS if level != 0.7} and len(rows) > 5


def searched(path: Path, *, model: str) -> Path:
    evidence = {
        "model": model,
        "data": "d",
        "measure": "niqe",
        "value": 4.0,
        "interval": [3, 5],
        "device_s_per_mp": 1,
    }
    schedule = {"sampler": "langevin", "grid": "log_snr", "num_steps": 3, "start_level": 0.0}
    path.mkdir()
    (path / "sampling.json").write_bytes(schedule_json({**schedule, "evidence": evidence}))
    return path


def test_a_searched_schedule_is_a_row_of_its_own_with_all_its_calls_and_only_for_its_network(tmp_path: Path) -> None:
    models = {name: Model(tiny.model_of(tiny.ANCHORED), name) for name in ("student", "teacher")}
    without = rows_of(models, tmp_path)
    (row,) = [row for row in rows_of(models, searched(tmp_path / "own", model="teacher")) if row not in without]
    assert (row.recipe.sampler, row.recipe.grid, row.recipe.num_steps) == ("langevin", "log_snr", 3)
    assert row.calls == 3 + 5 * 2
    with pytest.raises(ValueError, match="of another network"):
        rows_of(models, searched(tmp_path / "other", model="student"))


def test_a_set_is_measured_once_with_its_control_at_the_student_s_energy(tmp_path: Path) -> None:
    models = {name: Model(tiny.model_of(tiny.ANCHORED, seed=1), name) for name in ("student", "teacher")}
    wanted = ("bicubic", REGRESSION, CONTROL, STUDENT)
    rows = [row for row in rows_of(models, tmp_path) if row.name in wanted]
    for k in range(2):
        Image.fromarray(picture(seed=k, size=32)).save(tmp_path / f"{k}.png")
    pairs, cache = read_pairs(tmp_path), Cache(tmp_path / "kept")
    meter = Meter(MeterSettings(names=("psnr_y", "sigma"), border=4), scale=4)
    found, gain = measured("x", pairs, rows, models, meter, cache, num_threads=1)
    assert tuple(found) == wanted and gain != 0
    assert found[CONTROL].mean("texture") == pytest.approx(found[STUDENT].mean("texture"), rel=2e-3)
    assert found[STUDENT].mean("sigma") > 0 == found[CONTROL].mean("sigma")
    true, lr = rgb_to_y(pairs[0].hr), pairs[0].lr
    assert found["bicubic"].images[0]["psnr_y"] == psnr(rgb_to_y(bicubic(lr, 4)).round(), true.round(), border=4)

    def broken(lr: Pixels, sample: int) -> Pixels:
        raise AssertionError("drawn again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_steps, "drawing", lambda *_, **__: broken)
        for threads in (1, 2):  # scores are those of the first run; seconds alone are of the threads
            assert measured("x", pairs, rows, models, meter, cache, num_threads=threads) == (found, gain)
        with pytest.raises(AssertionError, match="drawn again"):
            changed = {**models, "student": models["student"]._replace(digest="another")}
            measured("x", pairs, rows, changed, meter, cache, num_threads=1)


def test_the_table_has_a_cell_for_every_column_and_a_dash_for_what_was_not_measured() -> None:
    image = {measure: math.nan for _, measure, _ in few_steps.COLUMNS}
    image |= {"energy": 1.0, "hr_energy": 2.0, "psnr_y": 28.126}
    header, rule, row = few_steps.table({"bicubic": Scores(0, [image])}, {"bicubic": {"float32": 0.0124}}).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert (cells["PSNR-Y, dB"], cells["HF energy"], cells["s, float32"]) == ("28.13", "0.500", "0.012")
    assert cells["NIQE"] == "-" and row.endswith("| - |")
