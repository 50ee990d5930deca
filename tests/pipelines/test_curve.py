"""Laws of pipelines.curve: each candidate is measured once, also when killed; the winner is stored with evidence."""

import json
from dataclasses import asdict, replace
from typing import NamedTuple

import mlflow
import numpy as np
import pytest

from diffsr_core.checkpoint import SAMPLING, SCHEDULE, model_files, save_files
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.search import GridChoice, choices, with_starts
from pipelines import curve as curves
from pipelines import registry, storage, tracking
from pipelines.curve import Curve, Point, check_pick, measure_curve, store_schedule, to_markdown
from pipelines.datasets import Dataset, Item
from pipelines.intervals import Interval, mean_interval
from pipelines.measures import Features, MeterSettings
from pipelines.models import ResolvedModel, resolve
from pipelines.scoring import Running, Scores

MODEL = ResolvedModel(ref="m", files={}, digest="d" * 64)
DATASET = Dataset(source="s", scale=4, items=(Item(key="a", etag="1"), Item(key="b", etag="2")))
CANDIDATES = choices(("ddim", "dpmpp-2m"), ("uniform", "karras"), (8, 2, 4))
METER = MeterSettings()


class Found(NamedTuple):
    curve: Curve
    asked: list
    document: dict
    table: list[list[str]]


def rows_of(*values, seconds=2.0, device_s=1.0):
    """Rows of images of half a megapixel with these PSNR-Y; their spectral error goes the other way."""
    return [
        {"key": str(index), "method": "model", "reason": "", "message": "", "psnr_y": value, "ms_ssim": None,
         "spectral_error": 90.0 - value, "lr_psnr": 50.0, "seconds": seconds, "device_s": device_s, "megapixels": 0.5}
        for index, value in enumerate(values)
    ]  # fmt: skip


def dead(key="z", reason="truncated"):
    return {"key": key, "method": "model", "reason": reason, "message": "cut short"}


def plain(tried):
    """Rows that get better with steps, at a cost: 2 steps 25 dB, 4 steps 28, 8 steps 29; karras 0.5 more."""
    value = {2: 25.0, 4: 28.0, 8: 29.0}[tried.num_steps] + (0.5 if tried.grid == "karras" else 0.0)
    return rows_of(value - 1, value + 1, device_s=0.1 * tried.num_steps * (0.5 if tried.sampler == "ddim" else 1))


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Measure a curve of what `rows(recipe)` gives."""

    def run(rows=plain, *, candidates=CANDIDATES, recipe=None, features=None, **options):
        asked = []

        def score_dataset(dataset, contenders, *, meter, running, label, labels):
            (contender,) = contenders
            tried = SamplingRecipe(**contender.recipe)
            assert dataset == DATASET and (running.engine, running.num_workers) == ("local", 1)
            found = rows(tried)
            asked.append(tried)
            return Scores(found, features(tried) if features else {})

        monkeypatch.setattr(curves, "score_dataset", score_dataset)
        monkeypatch.setattr("pipelines.scoring.publish_model", lambda model, output: "uri")
        arguments = {
            "measure": "psnr_y",
            "meter": METER,
            "output": str(tmp_path),
            "running": Running(engine="local"),
        } | options
        model = arguments.pop("model", MODEL)
        made = measure_curve(candidates, DATASET, model, recipe or SamplingRecipe(), **arguments)
        document = json.loads((tmp_path / "curve.json").read_text())
        lines = (tmp_path / "curve.md").read_text().splitlines()
        return Found(made, asked, document, [[cell.strip() for cell in line[2:-1].split("|")] for line in lines])

    return run


def shape(point):
    return point.choice.sampler, point.choice.grid, point.choice.num_steps


def test_every_candidate_is_measured_once_and_keeps_the_rest_of_the_recipe(measure):
    recipe = SamplingRecipe(sampler="sr3", num_steps=50, seed=9, tile=32, consistency="off", start_level=0.5)
    found = measure(recipe=recipe)
    assert found.asked == [replace(recipe, **asdict(choice)) for choice in CANDIDATES] and len(CANDIDATES) == 9
    assert {point.start_level for point in found.curve.points} == {0.5}  # where the recipe starts
    chosen = found.curve.points[found.curve.chosen]
    assert found.curve.recipe(recipe) == replace(recipe, **asdict(chosen.choice)) != recipe


def test_a_candidate_that_says_where_it_starts_starts_there(measure):
    late = with_starts([GridChoice("ddim", "uniform", 4)], (0.0, 0.25))
    found = measure(lambda tried: rows_of(30 + tried.start_level), candidates=late, recipe=SamplingRecipe(seed=3))
    assert [tried.start_level for tried in found.asked] == [0.0, 0.25]
    assert [point.start_level for point in found.curve.points] == [0.25, 0.0]
    again = measure(candidates=late, recipe=SamplingRecipe(seed=3))
    assert not again.asked and again.curve == found.curve
    assert found.curve.recipe(SamplingRecipe(seed=3)) == SamplingRecipe(seed=3, grid="uniform", num_steps=4,
                                                                        start_level=0.25)  # fmt: skip


@pytest.mark.parametrize("name", ["psnr_y", "spectral_error"])  # the higher the better, the lower
def test_the_best_comes_first_in_the_curve_and_in_both_files(measure, name):
    found = measure(lambda tried: rows_of(*({2: (20, 22), 4: (30, 31), 8: (25, 26)}[tried.num_steps])), measure=name)
    assert [shape(point)[2] for point in found.curve.points] == [4] * 3 + [8] * 3 + [2] * 3
    assert shape(found.curve.points[0]) == ("ddim", "uniform", 4)  # of equal ones the one that was given first
    assert (found.curve.measure, found.curve.data, found.curve.chosen) == (name, DATASET.digest, 0)
    assert found.curve.better == {"psnr_y": "higher", "spectral_error": "lower"}[name] == found.document["better"]
    assert (
        [(p["sampler"], p["grid"], p["num_steps"]) for p in found.document["points"]]
        == [(row[0], row[1], int(row[2])) for row in found.table[2:]]
        == [shape(point) for point in found.curve.points]
    )
    assert (found.document["data"], found.document["model"]) == (DATASET.digest, MODEL.digest)


def test_of_equal_scores_the_fewer_steps_win_then_the_first_given(measure):
    assert shape(measure(lambda tried: rows_of(30.0)).curve.points[0]) == ("ddim", "uniform", 2)


def test_means_and_times_are_of_the_images_that_could_be_scored(measure):
    def rows(tried):
        other = rows_of(33.0, seconds=8.0, device_s=3.0)[0] | {"key": "b", "megapixels": 1.5}
        return [*rows_of(30.0, seconds=1.0, device_s=0.5), other, dead()]

    point = measure(rows).curve.points[0]
    assert point.summary["psnr_y"] == mean_interval([30.0, 33.0]) and "ms_ssim" not in point.summary
    assert point.device_s_per_mp == pytest.approx(3.5 / 2) and point.seconds_per_mp == pytest.approx(9 / 2)


def test_knee_and_chosen_are_marked_and_pick_says_which_point_is_chosen(measure):
    only = choices(("ddim",), ("uniform",), (2, 4, 8))  # 25, 28, 29 dB at 0.2, 0.4, 0.8 s/MP: the knee is at 4
    best = measure(candidates=only)
    assert [shape(p)[2] for p in best.curve.points] == [8, 4, 2] and (best.curve.knee, best.curve.chosen) == (1, 0)
    assert [row[-1] for row in best.table[2:]] == ["chosen", "knee", ""]
    assert (best.document["knee"], best.document["chosen"]) == (1, 0)
    knee = measure(candidates=only, pick="knee")
    assert knee.curve.chosen == knee.curve.knee == 1 and knee.table[3][-1] == "knee and chosen"
    for pick, chosen in (("0", 0), ("0.9", 0), ("1.0", 1), ("3.9", 1), ("4", 2), ("1e3", 2)):
        assert measure(candidates=only, pick=pick).curve.chosen == chosen, pick
    lower = measure(candidates=only, measure="spectral_error", pick="1.0")  # 61, 62, 65 dB
    assert lower.curve.chosen == 1


@pytest.mark.parametrize("pick", ["", "worst", "-1", "nan", "inf", "knee "])
def test_an_unknown_pick_is_an_error_before_any_work(measure, pick):
    with pytest.raises(ValueError, match=r"pick \(.*\) must be best, knee"):
        check_pick(pick)
    with pytest.raises(ValueError, match="pick"):
        measure(lambda tried: pytest.fail("it was scored"), pick=pick)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("psnr_z", r"measure \('psnr_z'\) must be one of psnr"),
        ("sigma", "better higher or lower"),
        ("lpips", "must be among what is measured"),
        ("fid", "must be among what is measured"),
    ],
)
def test_a_measure_that_cannot_rank_is_an_error_before_any_work(measure, name, message):
    with pytest.raises(ValueError, match=message):
        measure(lambda tried: pytest.fail("it was scored"), measure=name)


def test_a_search_that_was_killed_goes_on_and_ends_as_one_that_was_not(measure, tmp_path):
    whole = measure(output=str(tmp_path))
    for path in tmp_path.rglob("*.json"):
        path.unlink()
    asked = []

    def killed(tried):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(tried)
        return plain(tried)

    with pytest.raises(KeyboardInterrupt):
        measure(killed)
    assert not (tmp_path / "curve.json").exists()
    again = measure()
    assert again.asked == whole.asked[4:] and asked == whole.asked[:4]
    assert (again.curve, again.document, again.table) == (whole.curve, whole.document, whole.table)
    assert measure(pick="knee", measure="spectral_error").asked == []  # another question to the same points


@pytest.mark.parametrize(
    "change",
    [
        {"model": replace(MODEL, digest="e" * 64)},
        {"recipe": SamplingRecipe(seed=1)},
        {"meter": MeterSettings(border=0)},
        {"running": Running(engine="local", use_gpu=True)},
        {"labels": {"a": 1}},
    ],
    ids=["model", "recipe", "meter", "device", "labels"],
)
def test_what_was_measured_of_something_else_is_not_used(measure, change):
    measure()
    assert len(measure(**change).asked) == len(CANDIDATES)
    assert not measure(**change).asked and not measure().asked


def test_what_was_measured_on_other_images_is_not_used(measure, monkeypatch):
    measure()
    monkeypatch.setitem(globals(), "DATASET", replace(DATASET, items=DATASET.items[:1]))
    assert len(measure().asked) == len(CANDIDATES)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"summary": {}}', b'{"summary": {"psnr_y": [1]}}'])
def test_a_record_that_cannot_be_read_is_named_and_measured_again(measure, tmp_path, data, capsys):
    measure()
    record = sorted((tmp_path / "_diffsr" / "curve").iterdir())[0]
    record.write_bytes(data)
    assert len(measure().asked) == 1 and record.name in capsys.readouterr().err
    assert not measure().asked


def test_a_candidate_that_fails_on_images_that_others_do_is_left_out_aloud(measure, capsys):
    def rows(tried):
        if tried.grid == "karras":  # the easy image alone: its mean would be the best
            return [rows_of(40.0)[0], dead("1", "nan")] if tried.sampler == "ddim" else [dead("0", "nan")]
        return plain(tried)

    found = measure(rows)
    assert {shape(point)[:2] for point in found.curve.points} == {("ddim", "uniform")}
    told = capsys.readouterr().err
    assert "ddim karras 8 steps is left out: it fails on 1 images that others do" in told
    assert "dpmpp-2m karras 8 steps is left out: no image could be scored, the first because of nan, cut short" in told


def test_no_readable_image_and_a_score_that_is_no_number_end_it_and_write_no_curve(measure, tmp_path):
    with pytest.raises(ValueError, match=r"dataset \(s\) must hold at least one image that can be scored"):
        measure(lambda tried: [dead()])
    with pytest.raises(ValueError, match=r"psnr_y \(nan\) of ddim uniform 8 steps must be a number"):
        measure(lambda tried: rows_of(30.0, float("nan")))
    assert not list(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"measure \('ms_ssim'\) fits no image"):
        measure(measure="ms_ssim")


def test_the_measures_of_a_whole_set_can_rank_as_in_sr3(measure):
    generator = np.random.default_rng(0)
    hr = generator.normal(size=(8, 3)).astype(np.float32)

    def features(tried):
        sets = {"hr": hr, "model": hr + (0.5 if tried.num_steps != 4 else 0.01)}
        return {name: [Features(vector, np.ones(2, np.float32) / 2) for vector in of_it]
                for name, of_it in sets.items()}  # fmt: skip

    found = measure(features=features, measure="fid", meter=MeterSettings(inception="a file"))
    assert found.curve.better == "lower" and {shape(p)[2] for p in found.curve.points[:3]} == {4}
    fid = found.curve.points[0].summary["fid"]
    assert fid.mean == fid.low == fid.high == pytest.approx(3 * 0.01**2, abs=1e-4)


def test_the_table_shows_each_measure_with_its_digits_and_not_what_was_not_measured():
    summary = {"psnr_y": Interval(30.126, 29.0, 31.0), "ssim": Interval(0.91234, 0.9, 0.92)}
    found = [
        Point(choice=GridChoice("ddim", "uniform", steps), start_level=start, summary=each, device_s_per_mp=0.0123,
              seconds_per_mp=4.5678)
        for steps, start, each in ((8, 0.5, summary), (4, 0.0, {"psnr_y": summary["psnr_y"]}))
    ]  # fmt: skip
    lines = to_markdown(Curve(points=found, measure="psnr_y", better="higher", knee=1, chosen=1)).splitlines()
    assert lines[0] == "| sampler | grid | steps | start | SSIM | PSNR-Y (dB) | device s/MP | s/MP | |"
    assert lines[2:] == [
        "| ddim | uniform | 8 | 0.5 | 0.9123 | 30.13 | 0.0123 | 4.57 |  |",
        "| ddim | uniform | 4 | 0 |  | 30.13 | 0.0123 | 4.57 | knee and chosen |",
    ]
    assert len({line.count("|") for line in lines}) == 1


# The winner goes into the model.


@pytest.fixture(scope="module")
def files():
    config = ModelConfig(encoder=RRDBConfig(scale=2, num_features=4, num_blocks=3), denoiser=None, anchor="regression")
    weights = SuperResolver(config).state_dict()
    return model_files(config, weights, weights, preset="tiny", card="# tiny\n")


@pytest.fixture
def folder(files, tmp_path):
    save_files(tmp_path / "model", files)
    return tmp_path / "model"


def test_the_winner_is_stored_beside_the_weights_with_its_evidence(measure, folder, tmp_path):
    before = resolve(str(folder))
    found = measure(model=before, pick="knee", recipe=SamplingRecipe(start_level=0.5)).curve
    assert store_schedule(before, found) == str(folder)
    after, point = resolve(str(folder)), found.points[found.knee]
    assert after.digest == before.digest and before.sampling is None
    mean, low, high = point.summary["psnr_y"]
    evidence = {"model": before.digest, "data": DATASET.digest, "measure": "psnr_y", "value": mean,
                "interval": [low, high], "device_s_per_mp": point.device_s_per_mp}  # fmt: skip
    schedule = {"sampler": point.choice.sampler, "grid": point.choice.grid, "num_steps": 4, "start_level": 0.5}
    assert after.sampling == {**schedule, "evidence": evidence} and set(schedule) == set(SCHEDULE)


def test_the_same_winner_again_writes_nothing_and_another_one_replaces_it(measure, folder, monkeypatch):
    store_schedule(resolve(str(folder)), measure(model=resolve(str(folder))).curve)
    first, data = resolve(str(folder)), (folder / SAMPLING).read_bytes()
    found = measure(model=first).curve
    slower = [replace(point, device_s_per_mp=9 * point.device_s_per_mp) for point in found.points]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", lambda uri, data: pytest.fail("it was written"))
        assert store_schedule(first, replace(found, points=slower)) == str(folder)  # a busier machine
    store_schedule(first, replace(found, chosen=found.knee + 1))
    assert (folder / SAMPLING).read_bytes() != data and resolve(str(folder)).digest == first.digest


def test_a_model_that_was_replaced_meanwhile_gets_no_schedule(measure, folder, files):
    before = resolve(str(folder))
    found = measure(model=before).curve
    document = json.loads(files["config.json"])
    config = ModelConfig(encoder=RRDBConfig(scale=2, num_features=5, num_blocks=3), denoiser=None, anchor="regression")
    weights = SuperResolver(config).state_dict()
    save_files(folder, model_files(config, weights, weights, preset=document["preset"], card=""))
    with pytest.raises(ValueError, match="must be the one that was measured; it was replaced meanwhile"):
        store_schedule(before, found)
    assert not (folder / SAMPLING).exists()


def test_a_curve_without_its_evidence_is_not_stored(measure, folder):
    found = measure(model=resolve(str(folder))).curve
    with pytest.raises(ValueError, match="data.*must be of type str"):
        store_schedule(resolve(str(folder)), replace(found, data=""))
    assert not (folder / SAMPLING).exists()


def test_in_the_registry_the_winner_is_a_new_version_which_says_of_which(measure, files, tmp_path, monkeypatch):
    logged = []

    def log_model(given, *, example, tags):
        """MLflow's own takes seconds for the code and the signature; the files and the registry are what counts."""
        assert example.startswith(b"\x89PNG")
        logged.append(dict(given))
        home = tmp_path / f"logged-{len(logged)}"
        save_files(home / "artifacts" / "model", given)
        (home / "MLmodel").write_text("model_uuid: 0\nflavors: {}\n")
        return f"file://{home}"

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setattr(tracking, "log_model", log_model)
    monkeypatch.chdir(tmp_path)
    client = tracking.connect()
    tags = {"diffsr.preset": "tiny", registry.ROLLED_BACK: "to v0", registry.EVIDENCE: "a run"}
    client.create_registered_model("x2")
    first = tracking.log_model(files, example=b"\x89PNG", tags={})
    client.create_model_version("x2", first, tags=tags)
    client.set_registered_model_alias("x2", "champion", "1")
    before = resolve("models:/x2@champion")
    found = measure(model=before)
    assert store_schedule(before, found.curve) == "models:/x2/2"
    after = resolve("models:/x2/2")
    assert after.digest == before.digest and before.sampling is None and after.sampling is not None
    assert {name: after.files[name] for name in files} == dict(before.files) and set(after.files) - {*files} == {
        SAMPLING
    }
    told = client.get_model_version("x2", "2").tags
    assert (told["diffsr.schedule_of"], told["diffsr.preset"]) == ("1", "tiny")
    assert "num_steps=8" in told["diffsr.schedule"] and told["diffsr.schedule_data"] == DATASET.digest
    assert registry.ROLLED_BACK not in told and registry.EVIDENCE not in told
    assert int(client.get_model_version_by_alias("x2", "champion").version) == 1  # promotion decides
    # Again, of the old version or of the new one: nothing new.
    assert store_schedule(before, found.curve) == store_schedule(after, found.curve) == "models:/x2/2"
    assert len(logged) == 2
    # Another choice is another version, also in a run of the caller.
    with tracking.run("evaluate") as run_id:
        assert store_schedule(before, replace(found.curve, chosen=found.curve.knee)) == "models:/x2/3"
        assert mlflow.active_run().info.run_id == run_id
    assert len(client.search_model_versions("name='x2'")) == 3
