"""The recipe of the shipped models: its commands parse, its card is filled from its runs, its drawings repeat."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsr_core import presets
from diffsr_core.checkpoint import CARD, load_model, model_files, save_files
from diffsr_core.family import SuperResolver
from infra.shipped import dead_leaves, release
from pipelines import cli
from tests.core.tiny import PLAIN

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = REPOSITORY / "infra" / "shipped"
PHOTOS = REPOSITORY.parent / "shared" / "data" / "train" / "photos_open"


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    """The words of every Python that train.sh starts, in order; none of them runs."""
    photos, log = tmp_path / "photos", tmp_path / "log"
    photos.mkdir()
    for name in ("new.jpg", (SHIPPED / "held_out.txt").read_text().split()[0]):
        (photos / name).write_bytes(b"a photograph")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" "" >> {log}\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "STEPS": "8"}
    script = [str(SHIPPED / "train.sh"), str(photos), str(tmp_path / "tests"), str(tmp_path / "work")]
    subprocess.run(script, check=True, env=environment)
    assert sorted(p.name for p in (tmp_path / "work/held-out").iterdir()) != sorted(p.name for p in photos.iterdir())
    return [command.split("\0") for command in log.read_text().split("\0\0")[:-1]]


def test_every_command_of_the_recipe_is_a_job_whose_flags_parse(commands: list[list[str]]) -> None:
    jobs = [words for words in commands if words[0].startswith("jobs/")]
    for script, *flags in jobs:
        cli.parse(Path(script).stem, flags)
    assert {Path(words[0]).stem for words in jobs} == {"make_pairs", "train", "evaluate"}
    assert [words[1] for words in commands if words[0] == "-m"].count("infra.shipped.release") == 2


def test_what_a_run_begins_from_is_what_a_run_before_it_left(commands: list[list[str]]) -> None:
    left: set[str] = set()
    for words in commands:
        flags = dict(zip(words[1::2], words[2::2], strict=False)) if words[0] == "jobs/train.py" else {}
        if "--init" in words:
            assert words[words.index("--init") + 1].removesuffix("/model") in left
        left |= {words[words.index("--output") + 1]} if flags else set()


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not beside this checkout")
def test_the_photographs_that_are_held_out_are_ten_of_them_and_those_trained_on_are_attributed() -> None:
    held = (SHIPPED / "held_out.txt").read_text().split()
    photographs = {path.name for path in PHOTOS.glob("*.jpg")}
    assert len(set(held)) == len(held) == 10 and set(held) < photographs
    told = (SHIPPED / "attribution.md").read_text().replace("exhibición", "exhibici_n")
    for name in photographs - set(held):
        if name.startswith("cc_solus_"):
            assert name.removeprefix("cc_solus_").removesuffix(".jpg") in told


def test_a_release_has_the_average_in_half_precision_and_a_card_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(PLAIN, one_step=True, start_level=0.7)
    weights = SuperResolver(config).state_dict()
    average = {name: value + 1 for name, value in weights.items()}
    save_files(tmp_path / "w/diffsr-x4/model", model_files(config, weights, average, preset="tiny", card=""))
    recipe = asdict(presets.get("anchored-x4").recipe)
    recipe["stages"] = [{**recipe["stages"][0], "name": "energy"}]
    summary = {"metrics": {"images_seen": 16_000.0, "train_s": 5400.0}}
    run = {"document": {"pairs": "a" * 64, "recipe": recipe}, "summary": summary}
    (tmp_path / "w/diffsr-x4/run.json").write_text(json.dumps(run))
    for index, name in enumerate(release.SETS):
        folder = tmp_path / "w/evaluations/diffsr-x4" / name
        folder.mkdir(parents=True)
        metrics = {"bicubic_psnr_y": 20.25 + index, "model_psnr_y": 30.5 + index, "model_sigma": 1.5}
        (folder / "summary.json").write_text(json.dumps({"metrics": metrics}))
    points = [{"start_level": level, "summary": {"psnr_y": [30 + level, 29, 31]}} for level in (0.7, 0.0)]
    (tmp_path / "w/evaluations/diffsr-x4/dial").mkdir()
    (tmp_path / "w/evaluations/diffsr-x4/dial/curve.json").write_text(json.dumps({"points": points}))
    monkeypatch.setattr(release, "PRETRAINED", tmp_path / "pretrained")
    words = ["release", "--work", str(tmp_path / "w"), "--name", "diffsr-x4", "--runs", "diffsr-x4"]
    monkeypatch.setattr(sys, "argv", words)
    release.main()
    model, document = load_model(tmp_path / "pretrained/diffsr-x4")
    assert document["weights"] == ["model.safetensors"]
    assert all(torch.equal(model.state_dict()[name], value.half().float()) for name, value in average.items())
    card = (tmp_path / "pretrained/diffsr-x4" / CARD).read_text()
    assert (
        "| Set5 | bicubic | 20.25 | – |" in card
        and "| ten photographs held out | diffsr-x4, one step | 32.50 |" in card
    )
    assert "| one-step | 1,000 | 16 | energy score, diversity 1 | 0.003 | 1.50 | `aaaaaaaaaaaa` |" in card
    assert "Left out it is 0.7." in card and "|---:|\n| 0 | 30.00 | – | – |\n| 0.7 | 30.70 | – | – |\n\n" in card
    assert "float32, muon, crops of" in card and "from any noise level; other samplers" in card
    assert all(f"\n## {part}\n" in card for part in ("Data", "Training", "Scores", "Limits", "Attribution"))
    alone = replace(config, start_level=None)  # from noise, and so without a dial
    save_files(tmp_path / "w/diffsr-x4/model", model_files(alone, weights, average, preset="tiny", card=""))
    (tmp_path / "w/evaluations/diffsr-x4/dial/curve.json").unlink()
    release.main()
    card = (tmp_path / "pretrained/diffsr-x4" / CARD).read_text()
    assert "start-level" not in card and "from noise alone; other samplers" in card


def test_a_drawing_is_a_function_of_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_leaves, "SHAPES", 40)
    monkeypatch.setattr(sys, "argv", ["dead_leaves", "--output", str(tmp_path), "--count", "2"])
    dead_leaves.main()
    first, second = (np.asarray(Image.open(tmp_path / f"leaves-{seed:04d}.png")) for seed in (0, 1))
    assert first.shape == (dead_leaves.SIDE, dead_leaves.SIDE, 3) and not np.array_equal(first, second)
    assert np.array_equal(first, np.asarray(dead_leaves.draw_image(0))) and first.std() > 5
    kept = (tmp_path / "leaves-0000.png").stat().st_mtime_ns
    dead_leaves.main()
    assert (tmp_path / "leaves-0000.png").stat().st_mtime_ns == kept
