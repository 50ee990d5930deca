"""Laws of pipelines.sampling: four jobs share its flags, each is checked, and each reaches the recipe."""

import dataclasses
import itertools
import re

import pytest
import yaml

from diffsr_core.sampler import SAMPLERS
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.schedule import GRIDS
from pipelines import cli
from pipelines.config import fingerprint
from pipelines.sampling import SamplingConfig

JOBS = {
    "evaluate": ["--model", "a", "--dataset", "b", "--output", "c"],
    "promote": ["--model", "a", "--dataset", "b"],
    "upscale": ["--source", "a", "--output", "b"],
    "manipulate": ["samples", "--lr", "a", "--output", "b"],
}
SHARED = ["sampler", "grid", "steps", "start_level", "seed", "consistency", "window", "margin", "tile", "halo"]
SHARED += ["micro_batch", "num_threads", "precision"]


def printed(capsys, job, *words):
    with pytest.raises(SystemExit) as stop:
        cli.parse(job, words)
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    return out


@pytest.mark.parametrize("job", JOBS)
def test_the_shared_flags_come_last_in_help_and_yaml_and_in_one_order(capsys, job):
    flags = [line.split()[0].rstrip(",") for line in printed(capsys, job, "--help").splitlines() if "  --" in line[:4]]
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")]
    names = [name for name in names if name not in ("config", "print_config")]
    keys = list(yaml.safe_load(printed(capsys, job, *JOBS[job], "--print-config")))
    assert names == keys and len(keys) > len(SHARED)
    assert keys[-len(SHARED) :] == SHARED and not set(keys[: -len(SHARED)]) & set(SHARED)


@pytest.mark.parametrize("job", JOBS)
def test_the_help_names_every_sampler_and_grid_under_its_own_heading(capsys, job):
    shared = printed(capsys, job, "--help").partition("\nsampling:\n")[2]
    words = re.findall(r"[\w-]+", shared)
    assert {*SAMPLERS, *GRIDS, "auto"} <= set(words) and f"\n{shared}".count("\n  --") == len(SHARED)


@pytest.mark.parametrize("job", JOBS)
def test_every_flag_reaches_the_recipe_and_the_defaults_are_the_recipes_own(job):
    assert cli.parse(job, JOBS[job]).sampling() == SamplingRecipe()
    flags = {"sampler": "dpmpp-2m", "grid": "karras", "steps": 5, "start_level": 0.5, "seed": 7, "consistency": "off"}
    flags |= {
        "window": 256,
        "margin": 8,
        "tile": 32,
        "halo": 2,
        "micro_batch": 6,
        "num_threads": 2,
        "precision": "bf16",
    }
    assert list(flags) == SHARED
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    wanted = dataclasses.replace(SamplingRecipe(), num_steps=flags.pop("steps"), **flags)
    assert cli.parse(job, [*JOBS[job], *words]).sampling() == wanted


@pytest.mark.parametrize("micro_batch", [3, 5, 7])
def test_an_odd_number_of_tiles_in_a_call_is_refused(micro_batch):
    with pytest.raises(ValueError, match=rf"micro_batch \({micro_batch}\) must be 1 or even.*use {micro_batch + 1}"):
        SamplingRecipe(micro_batch=micro_batch)


OWN = {"sampler": "dpmpp-2m", "grid": "karras", "num_steps": 5, "start_level": 0.5, "evidence": {"measure": "psnr"}}
GIVEN = {"sampler": "sr3", "grid": "linear", "steps": 50, "start_level": 0.0}  # the last one is falsy and given


@pytest.mark.parametrize("given", [c for n in range(5) for c in itertools.combinations(GIVEN, n)])
def test_a_flag_wins_over_the_models_own_schedule_and_that_over_the_usual(given):
    chosen = {name: GIVEN[name] for name in given}
    config, names = SamplingConfig(seed=3, **chosen), {"steps": "num_steps"}
    fields = {names.get(name, name): value for name, value in chosen.items()}
    own = {name: value for name, value in OWN.items() if name != "evidence"}
    assert config.sampling(OWN) == dataclasses.replace(SamplingRecipe(seed=3), **{**own, **fields})
    assert config.sampling() == config.sampling(None) == dataclasses.replace(SamplingRecipe(seed=3), **fields)


@pytest.mark.parametrize("job", ["evaluate", "promote", "manipulate"])
def test_what_is_left_out_on_the_command_line_and_in_yaml_is_the_models_own(job, tmp_path, capsys):
    config = cli.parse(job, [*JOBS[job], "--grid", "uniform"])
    assert (config.sampler, config.grid, config.steps, config.start_level) == (None, "uniform", None, None)
    (tmp_path / "job.yaml").write_text(printed(capsys, job, *JOBS[job], "--grid", "uniform", "--print-config"))
    again = cli.parse(job, [*JOBS[job][: job == "manipulate"], "--config", str(tmp_path / "job.yaml")])
    assert again == config
    base = SamplingConfig.sampling(again, OWN)
    assert (base.sampler, base.grid, base.num_steps, base.start_level) == ("dpmpp-2m", "uniform", 5, 0.5)


def test_the_help_says_whose_value_is_used_when_a_flag_is_left_out(capsys):
    shared = " ".join(printed(capsys, "evaluate", "--help").partition("\nsampling:\n")[2].split())
    for usual in ("else ddim", "else auto", "else 8", "else 0"):
        assert f"{usual}. (default: none)" in shared
    assert shared.count("Left out: ") == 5


def test_without_a_schedule_of_the_model_no_fingerprint_has_changed():
    """Computed before a model could have a schedule of its own: with others every night would make all again."""
    flags = {"sampler": "dpmpp-2m", "grid": "karras", "steps": 5, "start_level": 0.5}
    assert fingerprint(dataclasses.asdict(SamplingConfig().sampling())) == "405cd56b2e227dc3a7b6388b210e204b"
    assert fingerprint(dataclasses.asdict(SamplingConfig(**flags).sampling())) == "139d16bc964ed332436a34beb59985b1"
    upscale = cli.parse("upscale", JOBS["upscale"])
    assert fingerprint(upscale.recipe()) == "4966583d28510a71b66c133d5c587f75"
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert fingerprint(cli.parse("upscale", [*JOBS["upscale"], *words]).recipe()) == "68147eca45227bb586083cf8263664e7"


def test_a_schedule_of_the_model_is_another_recipe_and_the_same_as_its_flags():
    flags = SamplingConfig(sampler="dpmpp-2m", grid="karras", steps=5, start_level=0.5)
    assert SamplingConfig().sampling(OWN) == flags.sampling() == flags.sampling(OWN) != SamplingConfig().sampling()


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sampler euler", f"sampler ('euler') must be one of {', '.join(SAMPLERS)}; use one of them"),
        ("--sampler DDIM", "sampler ('DDIM') must be one of"),
        ("--grid cosine", f"grid ('cosine') must be one of auto, {', '.join(GRIDS)}; use one of them"),
        ("--steps 0", "steps (0) must be at least 1; use 4 to 100"),
        ("--steps=-3", "steps (-3) must be at least 1"),
        ("--steps 2.5", "steps ('2.5') must be a valid integer"),
        ("--start-level 1", "start_level (1.0) must be from 0 to below 1; use 0 or about 0.5"),
        ("--start-level=-0.1", "start_level (-0.1) must be from 0 to below 1"),
        ("--start-level nan", "start_level (nan) must be a finite number; write digits, like 0.5"),
        ("--seed=-1", "seed (-1) must be from 0 to 2**63 - 1; use 0"),
        (
            "--consistency soft",
            "consistency ('soft') must be 'exact', 'interval', 'low-band' or 'off'; use one of these",
        ),
        ("--tile 0", "tile (0) must be at least 1; use 64"),
        ("--tile 16 --halo 8", "halo (8) must be from 0 to less than half the tile (16); use 7"),
        ("--halo=-1", "halo (-1) must be from 0 to less than half the tile (64); use 8"),
        ("--num-threads 0", "num_threads (0) must be at least 1; use 1 or more"),
        ("--precision float16", "precision ('float16') must be 'float32' or 'bf16'; use one of these"),
    ],
)
def test_a_bad_value_is_one_line_with_field_value_rule_and_remedy(capsys, job, words, message):
    with pytest.raises(SystemExit) as stop:
        cli.parse(job, [*JOBS[job], *words.split()])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err and err.startswith(f"{job}.py: error: ")


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "ddim 8 steps"),
        ({"num_steps": 1, "start_level": 0.6}, "ddim 1 step from 0.6"),
        ({"sampler": "ddpm", "num_steps": 100}, "ddpm 100 steps"),
    ],
)
def test_a_recipe_is_called_by_its_sampler_steps_and_start(settings, label):
    assert SamplingRecipe(**settings).label == label
