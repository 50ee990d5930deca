"""Laws of what is measured: each name gives the kernel's number, None where it does not apply, and never NaN."""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffsr_core.colour import channel_bias
from diffsr_core.distributions import frechet_distance, kernel_distance, moments
from diffsr_core.fidelity import CONTEXT, Fidelity
from diffsr_core.metrics import diversity, lr_psnr, ms_ssim, rgb_to_y, spectral_error
from diffsr_core.niqe import niqe
from diffsr_core.pixels import bicubic, to_model_range
from diffsr_core.resize import imresize
from diffsr_core.seams import seam_ratio
from diffsr_core.tiling import Tile, padded_size, tiles
from pipelines import classifiers
from pipelines.measures import DEFAULT, FROM_ROWS, MEASURES, SET_MEASURES, Features, Meter, MeterSettings, set_measures
from pipelines.measures import check_settings as check_meter
from pipelines.perceptual import Lpips, load_lpips, read_pristine, read_reference

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[2] / "../shared/data"
PRISTINE = DATA / "niqe/niqe_pris_params.npz"
BRIEF = (
    "psnr ssim psnr_y ssim_y ms_ssim lr_psnr lpips niqe spectral_error colour_drift seam sigma top1 top5 "
    "seconds_per_mp device_s_per_mp"
)
SCALE = 4


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trio(height: int = 176, width: int = 200, channels: int = 3, *, seed: int = 0) -> dict[str, np.ndarray]:
    """sr, hr and lr: what is measured is neither perfect nor noise."""
    rng = np.random.default_rng(seed)
    lr = rng.integers(20, 230, (height // SCALE, width // SCALE, channels), dtype=np.uint8)
    sr = bicubic(lr, SCALE)
    hr = np.clip(sr + rng.normal(2, 9, sr.shape), 0, 255).astype(np.uint8)
    return {"sr": sr, "lr": lr, "hr": hr}


def measured(settings: MeterSettings | None = None, **images: Any) -> dict[str, float | None]:
    return Meter(settings or MeterSettings(), scale=SCALE)(images.pop("sr"), **images)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of LPIPS with random weights under its published names, and statistics of NIQE."""
    place = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = Lpips("alex").state_dict()
    heads = {key: abs(value) for key, value in state.items() if key.startswith("heads")}
    torch.save({k: 3 * v for k, v in state.items() if k not in heads}, place / "alexnet-owt-7be5be79.pth")
    torch.save({f"lin{key.split('.')[1]}.model.1.weight": v for key, v in heads.items()}, place / "alex.pth")
    window = np.exp(-np.square(np.arange(-3, 4)) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    statistics = {"mu_pris_param": np.zeros((1, 36)), "cov_pris_param": np.eye(36)}
    np.savez(place / "niqe.npz", **statistics, gaussian_window=np.outer(window, window))
    return place


class FakeClassifier:
    """Holds class k for the (k + 1)th likeliest, whatever it sees."""

    def __init__(self, path: str) -> None:
        self.num_classes = 10

    def rank(self, pixels: np.ndarray, label: int) -> int:
        assert min(pixels.shape[:2]) >= 64 and pixels.shape[2] in (1, 3)
        return label


class FakeInception:
    def __init__(self, path: str) -> None:
        pass

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(2048, pixels.mean(), np.float32), np.array([0.25, 0.75], np.float32)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "Classifier", FakeClassifier)
    monkeypatch.setattr(classifiers, "Inception", FakeInception)


def everything(weights: Path) -> MeterSettings:
    files = {"niqe": str(weights / "niqe.npz"), "lpips": str(weights), "classifier": "c", "inception": "i"}
    return MeterSettings(names=(*DEFAULT, "sigma"), **files)


def test_the_registry_names_each_measure_once_with_what_a_reader_needs() -> None:
    assert " ".join(MEASURES) == BRIEF and " ".join(SET_MEASURES) == "fid kid inception_score"
    for name, measure in (MEASURES | SET_MEASURES).items():
        assert measure.name == name and measure.label and measure.digits in range(6)
        assert measure.better in ("higher", "lower", "none") and measure.note.endswith(".")
    assert set(DEFAULT) < set(MEASURES) and not set(DEFAULT) & {"niqe", "lpips", "sigma", "top1", "top5", *FROM_ROWS}


def test_every_measure_but_those_of_the_rows_is_produced_in_the_order_of_tables(weights: Path, fakes: None) -> None:
    images = trio(208, 212)
    samples = np.stack([images["sr"], images["hr"]])
    plan = tiles(52, 53, tile=32, halo=8)
    meter = Meter(everything(weights), scale=SCALE)
    found = meter(images["sr"], lr=images["lr"], hr=images["hr"], seams=plan, samples=samples, label=1)
    assert tuple(found) == meter.measures == tuple(name for name in MEASURES if name not in FROM_ROWS)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert (found["top1"], found["top5"]) == (0.0, 1.0)
    assert set(set_measures({"hr": [few(0)] * 20, "model": [few(k) for k in range(20)]}, reference=None)["model"]) == (
        set(SET_MEASURES)
    )


def test_measures_that_have_a_better_direction_move_that_way_when_the_result_is_spoilt(
    weights: Path, fakes: None
) -> None:
    images = trio(208, 212)
    images["sr"] = np.clip(images["hr"] + np.random.default_rng(5).normal(0, 1, images["hr"].shape), 0, 255)
    images["sr"] = images["sr"].astype(np.uint8)
    images["lr"] = imresize(images["hr"], Fraction(1, SCALE))
    spoilt = images["sr"].copy()
    spoilt[:, 96:] = np.clip(spoilt[:, 96:] * 0.5 + 70, 0, 255)  # a seam at the tile's edge, drift, less contrast
    plan = tiles(52, 53, tile=32, halo=8)
    good, bad = (measured(everything(weights), **images | {"sr": sr}, seams=plan) for sr in (images["sr"], spoilt))
    for name in (*DEFAULT, "lpips"):
        first, second = (good[name], bad[name]) if MEASURES[name].better == "higher" else (bad[name], good[name])
        assert first is not None and second is not None and first > second, name


def test_psnr_and_ssim_are_those_of_scikit_image_inside_the_border() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    images = trio()
    for settings, border in ((MeterSettings(), SCALE), (MeterSettings(border=0), 0), (MeterSettings(border=9), 9)):
        found = measured(settings, **images)
        inner = (slice(border, 176 - border), slice(border, 200 - border))
        a, b = images["hr"][inner], images["sr"][inner]
        ya, yb = (np.floor(16.5 + (x @ [65.481, 128.553, 24.966]) / 255) for x in (a, b))
        options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        for name, pair, axis in (("ssim", (a, b), 2), ("ssim_y", (ya, yb), None)):
            full = skimage.structural_similarity(*pair, channel_axis=axis, full=True, **options)[1]
            assert found[name] == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)
        assert found["psnr"] == pytest.approx(skimage.peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
        assert found["psnr_y"] == pytest.approx(skimage.peak_signal_noise_ratio(ya, yb, data_range=255), abs=1e-9)


def test_the_other_measures_are_the_kernels_of_the_core(weights: Path, fakes: None) -> None:
    images = trio(208, 212)
    sr, hr, lr = images["sr"], images["hr"], images["lr"]
    plan, samples = tiles(52, 53, tile=32, halo=8), np.stack([sr, hr, sr])
    found = measured(everything(weights), **images, seams=plan, samples=samples)
    assert found["ms_ssim"] == pytest.approx(ms_ssim(sr, hr, border=SCALE), abs=1e-12)
    assert found["lr_psnr"] == pytest.approx(lr_psnr(lr, sr, scale=SCALE), abs=1e-9)
    assert found["spectral_error"] == spectral_error(rgb_to_y(sr), rgb_to_y(hr), border=SCALE)
    assert found["seam"] == seam_ratio(sr, plan, scale=SCALE) and found["seam"] != 1
    assert found["sigma"] == diversity(samples)
    assert found["niqe"] == niqe(sr, read_pristine(weights / "niqe.npz"), border=SCALE)
    with torch.no_grad():
        distance = load_lpips("alex", folder=weights)(to_model_range(sr), to_model_range(hr))
    assert found["lpips"] == pytest.approx(float(distance), rel=1e-6) and float(distance) > 1e-6


@pytest.mark.skipif(not PRISTINE.is_file(), reason="no parameters of NIQE in ../shared/data")
def test_niqe_takes_the_published_statistics() -> None:
    images = trio(208, 304)
    found = measured(MeterSettings(niqe=str(PRISTINE)), **images)
    assert found["niqe"] == niqe(images["sr"], read_pristine(PRISTINE), border=SCALE) > 0


@pytest.mark.skipif(
    not ((DATA / "published").is_dir() and (DATA / "matlab").is_dir()),
    reason="no published tables or MATLAB pairs in ../shared/data",
)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_published_scores_of_set5_are_reproduced_per_image_and_grey_is_its_own_luma(scale: int) -> None:
    with open(DATA / f"published/result_Set5_SRF_{scale}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    meter = Meter(MeterSettings(names=("psnr", "ssim", "psnr_y", "ssim_y")), scale=scale)
    assert len(rows) == 5
    for row in rows:
        place = DATA / f"matlab/B_set5_x{scale}"
        hr, lr = (np.asarray(Image.open(place / k / f"{row['image']}.png").convert("RGB")) for k in ("HR", "LR"))
        # These tables round the luma to 8 bits, so here it is the image.
        y_hr, y_sr, y_lr = (
            np.floor(rgb_to_y(x) + 0.5).astype(np.uint8)[..., None] for x in (hr, imresize(lr, scale, flavour="B"), lr)
        )
        found = meter(y_sr, lr=y_lr, hr=y_hr)
        assert found["psnr_y"] == pytest.approx(float(row["PSNR_Bicubic"]), abs=1e-4)
        assert found["ssim_y"] == pytest.approx(float(row["SSIM_Bicubic"]), abs=6e-6)
        assert (found["psnr"], found["ssim"]) == (found["psnr_y"], found["ssim_y"])


def test_a_colour_drift_is_that_of_the_upscale_job_band_by_band() -> None:
    images = trio()
    sr, lr = images["hr"], images["lr"]  # of another mean than the LR
    found = measured(**images | {"sr": sr})
    banded, step = Fidelity(scale=SCALE), 10
    for top in range(0, len(lr), step):
        first, last = max(0, top - CONTEXT), min(top + step + CONTEXT, len(lr))
        banded.add(lr[top : top + step], sr[first * SCALE : last * SCALE], above=top - first)
    assert found["colour_drift"] == pytest.approx(banded.colour_drift, abs=1e-12)
    assert found["lr_psnr"] == pytest.approx(banded.lr_psnr, abs=1e-9)
    assert found["colour_drift"] == pytest.approx(abs(channel_bias(lr, sr, scale=SCALE)).max(), abs=0.1)
    assert found["colour_drift"] > 1


def test_a_colour_drift_has_its_closed_form_of_the_channel_that_moved_most() -> None:
    lr = np.full((12, 16, 3), 100, np.uint8)
    sr = np.full((48, 64, 3), 100, np.uint8) + np.array([1, 0, 0], np.uint8)
    sr[..., 2] -= 7
    found = measured(sr=sr, lr=lr, hr=sr)
    assert found["colour_drift"] == pytest.approx(7, abs=1e-12)


def test_a_plan_of_the_padded_canvas_counts_as_far_as_the_image_reaches() -> None:
    size = [padded_size(n, tile=32, stride=16) for n in (40, 53)]
    plan = tiles(*size, tile=32, halo=8)
    images = trio(160, 212)
    rows, columns = (sorted({tile[k] for tile in plan}) for k in (2, 4))  # where the cores begin
    assert size == [48, 64] and rows == [0, 24] and columns == [0, 24, 40]
    own = [
        Tile(0, 0, top, bottom, left, right)
        for top, bottom in ((0, 24), (24, 40))
        for left, right in ((0, 24), (24, 40), (40, 53))
    ]
    assert measured(**images, seams=plan)["seam"] == seam_ratio(images["sr"], own, scale=SCALE)
    with pytest.raises(ValueError, match="the plan covers 40x40"):
        measured(**images, seams=own[:2] + own[3:5])


@pytest.mark.parametrize(
    ("name", "least"),
    [("psnr", 1), ("psnr_y", 1), ("ssim", 11), ("ssim_y", 11), ("ms_ssim", 161), ("spectral_error", 2)],
)
def test_an_image_too_small_inside_the_border_has_none_and_the_smallest_has_a_number(name: str, least: int) -> None:
    sr, hr = (np.random.default_rng(k).integers(0, 256, (least + 4, least + 9, 3), np.uint8) for k in (0, 1))
    settings = MeterSettings(border=2, names=(name,))
    assert Meter(settings, scale=1)(sr, lr=sr, hr=hr)[name] is not None
    smaller = Meter(settings, scale=1)(sr[1:], lr=sr[1:], hr=hr[1:])
    assert smaller == {name: None}


def test_networks_and_niqe_give_none_where_an_image_is_too_small_flat_or_no_picture(weights: Path, fakes: None) -> None:
    settings = everything(weights)
    names = ("lpips", "niqe", "top1", "top5")

    def at(height: int, width: int, channels: int = 3) -> list[bool]:
        found = measured(settings, **trio(height, width, channels), label=0)
        return [found[name] is not None for name in names]

    assert at(200, 104) == [True, True, True, True]  # inside the border: 192 x 96 px, two blocks
    assert at(196, 104) == [True, False, True, True]
    assert at(64, 64, 1) == [True, False, True, True]
    assert at(60, 64) == [True, False, False, False]
    assert at(28, 32) == [False, False, False, False]
    assert at(200, 104, 4) == [False, False, False, False]
    bands = measured(settings, **trio(200, 204, 4), label=0)
    assert {name for name in DEFAULT if bands[name] is None} == {"psnr_y", "ssim_y", "spectral_error", "seam"}
    flat = np.full((200, 200, 3), 9, np.uint8)
    found = measured(settings, sr=flat, hr=flat, lr=flat[::4, ::4])
    assert found["niqe"] is None and found["psnr"] == found["lr_psnr"] == 100 and found["spectral_error"] == 0
    assert all(value is None or math.isfinite(value) for value in found.values())


def test_what_is_not_given_is_none_a_plan_two_samples_a_label(weights: Path, fakes: None) -> None:
    images = trio(200, 200)
    found = measured(everything(weights), **images)
    assert {name for name, value in found.items() if value is None} == {"seam", "sigma", "top1", "top5"}
    assert measured(everything(weights), **images, samples=images["sr"][None])["sigma"] is None
    assert measured(everything(weights), **images, samples=np.stack([images["sr"]] * 2))["sigma"] == 0.0
    whole = tiles(50, 50, tile=50, halo=8)
    assert measured(everything(weights), **images, seams=whole)["seam"] == 1.0  # a plan that cuts nowhere


def test_a_class_among_the_likeliest_counts_one_and_any_other_nothing(fakes: None) -> None:
    settings, images = MeterSettings(names=(), classifier="c"), trio(64, 64)
    found = [tuple(measured(settings, **images, label=k).values()) for k in range(6)]
    assert found == [(1.0, 1.0), *[(0.0, 1.0)] * 4, (0.0, 0.0)]


def test_features_are_given_with_the_network_alone_and_for_pictures_alone(fakes: None) -> None:
    images = trio(64, 64)
    found = Meter(MeterSettings(inception="i"), scale=SCALE).features(images["sr"])
    assert found is not None and found.vector.shape == (2048,) and found.probabilities.sum() == 1
    assert Meter(MeterSettings(inception="i"), scale=SCALE).features(trio(64, 64, 4)["sr"]) is None
    assert Meter(MeterSettings(), scale=SCALE).features(images["sr"]) is None


@pytest.mark.parametrize("name", ["sr", "hr", "lr"])
def test_images_that_are_not_of_8_bits_or_do_not_fit_are_refused(name: str) -> None:
    images = trio(64, 64)
    with pytest.raises(ValueError, match=rf"{name} \(.*float64.*must be uint8"):
        measured(**images | {name: images[name].astype(float)})
    with pytest.raises(ValueError, match=rf"{name} \(.*must be uint8"):
        measured(**images | {name: images[name][..., 0]})
    with pytest.raises(ValueError, match="must be uint8.*4 times lr"):
        measured(**images | {name: images[name][:-4]})
    with pytest.raises(ValueError, match="must be uint8.*4 times lr"):
        measured(**images | {name: images[name][..., :1]})


def test_a_file_adds_what_it_is_for_and_settings_survive_json(weights: Path) -> None:
    assert MeterSettings().measures == DEFAULT
    assert MeterSettings(niqe="n", classifier="c").measures == (*DEFAULT[:6], "niqe", *DEFAULT[6:], "top1", "top5")
    assert MeterSettings(names=("sigma", "psnr", "seconds_per_mp", "fid"), inception="i").measures == ("psnr", "sigma")
    settings = MeterSettings(names=("psnr",), lpips=str(weights), border=0)
    again = MeterSettings(**json.loads(json.dumps(asdict(settings))))
    images = trio(64, 64)
    assert measured(again, **images) == measured(settings, **images)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        *[("niqe", "niqe"), ("lpips", "lpips"), ("top1", "classifier"), ("top5", "classifier")],
        *[("fid", "inception"), ("kid", "inception"), ("inception_score", "inception")],
    ],
)
def test_a_name_without_its_file_is_an_error_that_names_the_flag(name: str, flag: str) -> None:
    with pytest.raises(ValueError, match=rf"measures \('{name}'\) needs a file.*--{flag}, or leave {name} out"):
        check_meter(MeterSettings(names=("psnr", name)))


def test_settings_that_cannot_be_met_are_refused_before_any_work(weights: Path, tmp_path: Path) -> None:
    check_meter(MeterSettings(names=(*MEASURES,)[:6], lpips=str(weights), niqe=str(weights / "niqe.npz")))
    check_meter(MeterSettings(names=FROM_ROWS))
    statistics = dict(np.load(weights / "niqe.npz"))
    np.savez(tmp_path / "nan.npz", **statistics | {"mu_pris_param": np.full((1, 36), np.nan)})
    np.savez(tmp_path / "wide.npz", **statistics | {"gaussian_window": np.eye(7) / 7})
    cases = [
        (MeterSettings(names=("psnr", "pnsr")), r"measures \('pnsr'\) is unknown; use some of psnr, ssim"),
        (MeterSettings(border=-1), r"border \(-1\) must be 0 px or more"),
        (MeterSettings(niqe=str(tmp_path / "none.npz")), "none.npz.*niqe_pris_params"),
        (MeterSettings(niqe=str(tmp_path / "nan.npz")), "nan.npz.*not finite"),
        (MeterSettings(niqe=str(tmp_path / "wide.npz")), "window is not the outer product"),
        (MeterSettings(lpips=str(tmp_path)), "alexnet-owt-7be5be79.pth, which is not there"),
        (MeterSettings(classifier=str(tmp_path / "none.pth")), "--classifier.*none.pth, which is not there"),
        (MeterSettings(inception=str(tmp_path / "none.pth")), "--inception.*none.pth, which is not there"),
    ]
    for settings, said in cases:
        with pytest.raises(ValueError, match=said):
            check_meter(settings)


def test_a_reference_must_be_readable_and_of_the_network(tmp_path: Path, fakes: None) -> None:
    np.save(tmp_path / "good.npy", np.zeros((3, 2048)))
    np.save(tmp_path / "narrow.npy", np.zeros((3, 64)))
    np.savez(tmp_path / "good.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez(tmp_path / "flat.npz", mu=np.zeros(6), sigma=np.zeros(6))
    np.savez(tmp_path / "other.npz", mean=np.zeros(6))
    settings = MeterSettings(inception="i")
    for name in ("good.npy", "good.npz"):
        check_meter(settings, reference=str(tmp_path / name))
        with pytest.raises(ValueError, match=r"reference \(.*--inception, or leave --reference out"):
            check_meter(MeterSettings(), reference=str(tmp_path / name))
    for name, said in (("narrow.npy", "64 columns"), ("narrow.npz", "6 columns"), ("flat.npz", r"\(D, D\)"),
                       ("other.npz", "must hold mu and sigma"), ("none.npz", "mu and sigma"), ("none.npy", "no feat"),
                       ("a.pkl", "are read from")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            check_meter(settings, reference=str(tmp_path / name))
    found = read_reference(tmp_path / "narrow.npz")
    assert not isinstance(found, np.ndarray) and np.array_equal(found.covariance, np.eye(6))


def few(seed: int, *, shift: float = 0.0) -> Features:
    rng = np.random.default_rng(seed)
    raw = rng.random(3)
    return Features((rng.normal(size=6) + shift).astype(np.float32), (raw / raw.sum()).astype(np.float32))


def sets(number: int = 30) -> dict[str, list[Features]]:
    return {
        "hr": [few(k) for k in range(number)],
        "near": [few(100 + k, shift=0.1) for k in range(number)],
        "far": [few(200 + k, shift=2.0) for k in range(number)],
    }


def silent(text: str) -> None:
    raise AssertionError(f"a note that was not expected: {text}")


def test_sets_are_compared_with_the_originals_which_are_not_compared_with_themselves() -> None:
    linalg, kernels = pytest.importorskip("scipy.linalg"), pytest.importorskip("sklearn.metrics.pairwise")
    features = sets()
    found = set_measures(features, reference=None, note=silent)
    assert {method: set(scores) for method, scores in found.items()} == {
        "hr": {"inception_score"},
        "near": {*SET_MEASURES},
        "far": {*SET_MEASURES},
    }
    truth = np.array([each.vector for each in features["hr"]], np.float64)
    for method in ("near", "far"):
        made = np.array([each.vector for each in features[method]], np.float64)
        a, b = np.cov(made.T), np.cov(truth.T)
        root = linalg.sqrtm(a @ b).real
        fid = np.sum((made.mean(0) - truth.mean(0)) ** 2) + np.trace(a + b - 2 * root)
        assert found[method]["fid"] == pytest.approx(fid, rel=1e-6)
        xx, yy, xy = (
            kernels.polynomial_kernel(*pair, degree=3, coef0=1)
            for pair in ((made, made), (truth, truth), (made, truth))
        )
        n = len(made)
        kid = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (xx, yy)) - 2 * xy.mean()
        assert found[method]["kid"] == pytest.approx(kid, rel=1e-6)
    assert found["near"]["fid"] < found["far"]["fid"] and found["near"]["kid"] < found["far"]["kid"]


def test_a_reference_takes_the_place_of_the_originals_which_are_then_scored_too() -> None:
    features = sets()
    other = np.array([few(300 + k).vector for k in range(25)])
    found = set_measures(features, reference=other, note=silent)
    for method in features:
        made = np.array([each.vector for each in features[method]])
        assert found[method]["fid"] == frechet_distance(moments(made), moments(other))
        assert found[method]["kid"] == kernel_distance(made, other)
    notes: list[str] = []
    published = set_measures(features, reference=moments(other), note=notes.append)
    assert {method: scores["fid"] for method, scores in published.items()} == pytest.approx(
        {method: scores["fid"] for method, scores in found.items()}
    )
    assert not any("kid" in scores for scores in published.values())
    assert len(notes) == 1 and "no KID; give features as .npy" in notes[0]
    with pytest.raises(ValueError, match="one network"):
        set_measures(features, reference=other[:, :5])


def test_the_inception_score_is_over_ten_splits_of_an_order_that_does_not_change() -> None:
    sure = [Features(np.zeros(6, np.float32), np.eye(2, dtype=np.float32)[k % 2]) for k in range(2000)]
    score = set_measures({"hr": sure, "same": [sure[0]] * 20}, reference=None, note=silent)
    assert score["same"]["inception_score"] == 1.0
    assert 1.98 < score["hr"]["inception_score"] < 2  # two classes; a split does not hold just as many of each
    ordered = sorted(sure, key=lambda each: each.probabilities[0])
    assert (
        1.98 < set_measures({"hr": ordered}, reference=None)["hr"]["inception_score"] < 2
    )  # and not 1: it is shuffled
    assert set_measures({"hr": sure}, reference=None) == {"hr": score["hr"]}


def test_what_has_too_few_images_is_left_out_with_a_note_and_never_nan() -> None:
    for number, left in ((0, 0), (1, 0), (2, 2), (19, 2), (20, 3)):
        notes: list[str] = []
        features = sets(20) | {"model": sets(20)["near"][:number]}
        found = set_measures(features, reference=None, note=notes.append)["model"]
        assert len(found) == left and all(math.isfinite(value) for value in found.values())
        assert len([note for note in notes if note.startswith(f"model, {number} images: no")]) == (left < 3) + (
            left < 2
        )
    for hr in ([], sets()["hr"][:1]):
        found = set_measures({"hr": hr, "model": sets()["near"]}, reference=None, note=notes.append)
        assert set(found["model"]) == {"inception_score"} and found["hr"] == {}
    assert set(set_measures({"model": sets()["near"]}, reference=None)["model"]) == {"inception_score"}
