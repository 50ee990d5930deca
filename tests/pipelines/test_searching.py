"""Laws of pipelines.searching: every candidate is scored, the best comes first and is the one that is returned."""

import json
from dataclasses import asdict, replace

import pytest

from diffsr_core.sampling import SamplingRecipe
from diffsr_core.search import GridChoice
from pipelines import searching
from pipelines.models import ResolvedModel
from pipelines.scoring import METRICS, Dataset, Item
from pipelines.searching import candidates_of, search_schedule

MODEL = ResolvedModel(ref="m", files={}, digest="d" * 64)
DATASET = Dataset(source="s", split="", degradation="{}", items=(Item(key="a", etag="1"), Item(key="b", etag="2")))
CANDIDATES = candidates_of(("ddim", "dpmpp-2m"), ("uniform", "karras"), (4, 2))
REASONLESS = {"reason": "", "seconds": 1.0}


def rows_of(*values):
    """Rows of images with these PSNR-Y; their LR-PSNR goes the other way."""
    return [
        {**REASONLESS, **{f"model_{name}": 0.0 for name in METRICS}, "model_psnr_y": v, "model_lr_psnr": 90 - v}
        for v in values
    ]


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Search with rows from `score(recipe)`; return (the found recipe, what was asked of the scorer, the output)."""

    def run(score, *, objective="psnr_y", recipe=None):
        asked, recipe = [], recipe or SamplingRecipe()

        def score_dataset(dataset, model, tried, **options):
            asked.append((tried, options))
            assert (dataset, model) == (DATASET, MODEL)
            return score(tried)

        monkeypatch.setattr(searching, "score_dataset", score_dataset)
        found = search_schedule(CANDIDATES, DATASET, MODEL, recipe, objective=objective, output=str(tmp_path),
                                engine="local", num_workers=1)  # fmt: skip
        return found, asked, tmp_path

    return run


def test_every_candidate_is_scored_once_and_keeps_the_rest_of_the_recipe(search):
    recipe = SamplingRecipe(sampler="sr3", num_steps=50, seed=9, tile=32, consistency="off", start_level=0.5)
    _, asked, _ = search(lambda tried: rows_of(30.0), recipe=recipe)
    assert [tried for tried, _ in asked] == [replace(recipe, **asdict(choice)) for choice in CANDIDATES]
    assert len(CANDIDATES) == 6  # dpmpp-2m is not tried on the uniform grid
    assert all(options["baselines"] == () and not options.get("num_strips") for _, options in asked)


def scored(tried):
    return rows_of(20 + tried.num_steps + (3 if tried.grid == "karras" else 0) + (1 if tried.sampler == "ddim" else 0))


@pytest.mark.parametrize(
    ("objective", "best"), [("psnr_y", ("ddim", "karras", 4)), ("lr_psnr", ("ddim", "uniform", 2))]
)
def test_the_best_by_the_objective_is_returned_and_stands_first_in_both_files(search, objective, best):
    found, _, output = search(scored, objective=objective)
    assert (found.sampler, found.grid, found.num_steps) == best
    document = json.loads((output / "search.json").read_text())
    assert document["objective"] == objective and document["data"] == DATASET.digest
    values = [each[f"model_{objective}"] for each in document["found"]]
    assert values == sorted(values, reverse=True) and len(set(values)) > 1
    order = [(each["sampler"], each["grid"], each["num_steps"]) for each in document["found"]]
    assert order[0] == best and {*order} == {(c.sampler, c.grid, c.num_steps) for c in CANDIDATES}
    lines = (output / "search.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["sampler", "grid", "steps", *METRICS, "s/image"]
    assert [(sampler, grid, int(steps)) for sampler, grid, steps, *_ in cells[2:]] == order


def test_of_equal_scores_the_fewer_steps_win_then_the_first_given(search):
    found, _, _ = search(lambda tried: rows_of(30.0))
    assert (found.sampler, found.grid, found.num_steps) == ("ddim", "uniform", 2)


def test_the_score_is_the_mean_of_the_images_that_could_be_scored(search):
    dead = {"key": "b", "reason": "truncated", "message": "", "seconds": 99.0}
    _, _, output = search(lambda tried: [*rows_of(30.0, 33.0), dead])
    first = json.loads((output / "search.json").read_text())["found"][0]
    assert (first["model_psnr_y"], first["seconds"]) == (31.5, 1.0)


def test_no_readable_image_and_a_score_that_is_no_number_end_it_and_write_nothing(search, tmp_path):
    with pytest.raises(ValueError, match=r"dataset \(s\) must hold at least one readable image"):
        search(lambda tried: [{"key": "a", "reason": "truncated", "message": "", "seconds": 0.1}])
    with pytest.raises(ValueError, match="must be a number"):
        search(lambda tried: rows_of(float("nan")))
    assert not list(tmp_path.iterdir())


def test_without_lengths_nothing_is_searched_and_no_sensible_pair_is_an_error():
    assert candidates_of(("ddim",), ("uniform",), ()) == []
    assert candidates_of(("ddim", "ddim"), ("uniform",), (2, 2)) == [GridChoice("ddim", "uniform", 2)]
    with pytest.raises(ValueError, match="dpmpp-2m needs log_snr or karras"):
        candidates_of(("dpmpp-2m",), ("uniform",), (2,))
