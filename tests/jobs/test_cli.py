"""The jobs and tools, seen from the command line."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import cli
from tests.jobs.conftest import ROOT, script


def line(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("job", cli.JOBS)
def test_help_names_every_flag_of_the_contract(job: str) -> None:
    shown = line(*script(job, "--help"))
    assert shown.returncode == 0 and not shown.stderr
    contract = {
        "make_pairs": "--source --output --scale --degradation --patch",
        "train": "--pairs --preset --output --steps --batch-size --num-workers --register",
        "evaluate": "--model --dataset --baselines --output",
        "promote": "--model --challenger --dataset --rollback",
        "upscale": "--source --output --model --sampler --steps --num-workers --batch-size --seed",
        "manipulate": "--lr --output --model --samples --first --second --weights --base --donor --mask --level --seed",
        "image": "--input --output --model --quality --samples --force",
        "import_weights": "--weights --output --scale --num-groups",
    }
    always = ["--config", "--print-config"] + ["--dry-run"] * (job not in ("manipulate", "image", "import_weights"))
    for flag in [*contract[job].split(), *always]:
        assert f"\n  {flag}" in shown.stdout, flag


NEEDED = {
    "make_pairs": ["--source", "a", "--output", "b"],
    "train": ["--pairs", "a", "--output", "b"],
    "evaluate": ["--model", "a", "--dataset", "b", "--output", "c", "--search-steps", "4,8"],
    "promote": ["--model", "a", "--dataset", "b"],
    "upscale": ["retry-failed", "--source", "a", "--output", "b"],
    "manipulate": ["interpolate", "--lr", "a", "--output", "b", "--weights", "0,1"],
    "image": ["a.jpg", "b.png"],
    "import_weights": ["--weights", "a", "--output", "b"],
}


@pytest.mark.parametrize("job", cli.JOBS)
def test_the_printed_config_of_every_job_holds_every_setting_and_reads_back(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(job, [*NEEDED[job], "--print-config"])
    shown = capsys.readouterr()
    config = cli.parse(job, NEEDED[job])
    assert (stop.value.code, shown.err) == (0, "")
    assert set(yaml.safe_load(shown.out)) == {item.name for item in dataclasses.fields(config)}
    (tmp_path / "job.yaml").write_text(shown.out)
    assert cli.parse(job, ["--config", str(tmp_path / "job.yaml")] if job != "manipulate" else
                     ["interpolate", "--config", str(tmp_path / "job.yaml")]) == config  # fmt: skip


def test_help_and_print_config_need_no_verb_and_running_does(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (
        (["--help"], 0),
        ([*NEEDED["manipulate"][1:], "--print-config"], 0),
        ([], 2),
        (["--lr", "a"], 2),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.parse("manipulate", words)
        assert stop.value.code == code
    assert "verb ('') must be one of samples, interpolate, fuse" in capsys.readouterr().err
    assert cli.split_verb("upscale", ["--limit", "1"]) == ("run", ["--limit", "1"])
    assert cli.split_verb("train", ["status"]) == ("", ["status"])


@pytest.mark.parametrize(
    ("job", "words", "pieces"),
    [
        ("make_pairs", "--source a --output b --patch 65", ["patch (65)", "multiple of scale (4)", "use 64"]),
        ("train", "--pairs a --output b --preset nano", ["preset ('nano')", "nano-x4"]),
        ("train", "--pairs a --output b --stepps 3", ["--stepps"]),
        ("evaluate", "--model a --dataset b --output c --baselines bicubic,best", ["baselines ('best')", "regression"]),
        ("promote", "--model a", ["dataset (None) must be given", "--dataset URI"]),
        ("upscale", "--source a --output b --halo 32", ["halo (32)", "tile (64)"]),
        ("upscale", "--source a", ["output"]),
        ("upscale", "improve --source a --output b", ["verb ('improve')", "retry-failed"]),
        ("manipulate", "--lr a --output b", ["verb ('')", "samples, interpolate, fuse"]),
        ("import_weights", "--weights a --output b --scale 0", ["scale (0)", "use 8"]),
    ],
)
def test_a_bad_argument_names_itself_its_rule_and_the_remedy(job: str, words: str, pieces: list[str]) -> None:
    done = line(*script(job, *words.split()))
    assert done.returncode == 2 and not done.stdout
    assert "Traceback" not in done.stderr
    for piece in pieces:
        assert piece in done.stderr


def test_a_flag_wins_over_the_file_and_the_printed_config_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("source: s3://a/b\noutput: out\nsteps: 5\nseed: 3\n")
    shown = line(*script("upscale", "--config", file, "--steps", 6, "--print-config"))
    assert shown.returncode == 0
    assert (yaml.safe_load(shown.stdout)["steps"], yaml.safe_load(shown.stdout)["seed"]) == (6, 3)
    file.write_text(shown.stdout)
    assert line(*script("upscale", "--config", file, "--print-config")).stdout == shown.stdout


def test_the_console_command_is_the_same_jobs() -> None:
    command = str(Path(sys.executable).parent / "diffsr")
    shown = line(command, "--help")
    assert shown.returncode == 0
    for verb in ("pairs", "train", "evaluate", "promote", "upscale", "manipulate", "image", "import"):
        assert f"\n  {verb} " in shown.stdout
    ours = line(command, "upscale", "--help").stdout.replace("diffsr upscale", "upscale.py")
    assert ours == line(*script("upscale", "--help")).stdout
    assert line(command, "improve").returncode == 2


def test_relative_paths_and_references_are_anchored_where_they_were_typed() -> None:
    config = cli.anchor(cli.parse("upscale", ["--source", "in", "--output", "s3://b/out", "--model", "run/model"]))
    assert (config.source, config.output) == (str(Path.cwd() / "in"), "s3://b/out")
    assert config.model == str(Path.cwd() / "run" / "model")
    assert cli.anchor(cli.parse("upscale", ["--source", "a", "--output", "b"])).model == "models:/diffsr@champion"


def test_every_job_file_is_a_few_lines_and_names_a_known_job() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(cli.JOBS)
    assert all(len(path.read_text().splitlines()) < 20 for path in (ROOT / "jobs").glob("*.py"))


def test_a_registry_out_of_reach_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    words = ["--model", "models:/diffsr@champion", "--source", str(tmp_path), "--output", str(tmp_path.parent / "o")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = subprocess.run(script("upscale", *words), capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 1 and '"status": "failed"' in done.stdout
    assert "Traceback" not in done.stderr and "127.0.0.1" in done.stderr


def test_every_job_command_of_the_readme_is_one_that_the_jobs_take() -> None:
    lines = [line.split() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python jobs/")]
    commands = [(words[1].removeprefix("jobs/").removesuffix(".py"), words[2:]) for words in lines]
    assert {job for job, _ in commands} == set(cli.JOBS)
    for job, words in commands:
        assert cli.parse(job, words)
