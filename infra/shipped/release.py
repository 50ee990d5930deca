"""Writes a shipped model: the average of a trained one in half precision, with the card that its runs and scores fill.

    python -m infra.shipped.release --work WORK --name diffsr-x4 --runs regression diffsr-x4

WORK is what train.sh leaves: run folders, and evaluations/NAME/{set5,bsd100,held-out}/summary.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffsr_core.checkpoint import CONFIG, model_from_files, released_files, save_files
from pipelines.models import load_files

HERE = Path(__file__).resolve().parent
PRETRAINED = HERE.parents[1] / "pipelines" / "pretrained"
SETS = {"set5": "Set5", "bsd100": "BSD100", "held-out": "ten photographs held out"}
BASELINES = {"bicubic": "bicubic", "regression": "its regression alone"}
MEASURES = {"psnr_y": 2, "ssim_y": 4, "niqe": 2, "spectral_error": 2, "lr_psnr": 1, "sigma": 2}
OF_THE_DIAL = ("psnr_y", "niqe", "spectral_error")


def main() -> None:
    """Write pipelines/pretrained/NAME."""
    parser = argparse.ArgumentParser(description="Write a shipped model from its training run and its evaluations.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--runs", nargs="+", required=True, help="run folders below WORK, in the order of the training")
    parser.add_argument("--note", default="", help="what the table of stages does not tell")
    arguments = parser.parse_args()
    work, name = arguments.work, arguments.name
    files = load_files(str(work / name / "model"))
    model, document = model_from_files(files)
    template = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True)
    card = template.get_template("card.md").render(
        name=name,
        real=name.endswith("-real"),
        drawn=(work / "photos" / "leaves").is_dir(),
        scale=model.config.scale,
        start_level=model.config.start_level,
        recipe=json.loads((work / arguments.runs[-1] / "run.json").read_text())["document"]["recipe"],
        dial=_dial(work / "evaluations" / name / "dial" / "curve.json"),
        weights=f"{sum(x.numel() for x in model.parameters()) / 1e6:.2f}",
        digest=document["digest"],
        note=arguments.note,
        sibling=(PRETRAINED / f"{name}-real").is_dir(),
        stages=[_stage(work / run) for run in arguments.runs],
        scores=[row for key, label in SETS.items() for row in _rows(work / "evaluations" / name / key, label, name)],
        attribution=(HERE / "attribution.md").read_text().strip(),
    )
    released = released_files(files, card=card)
    save_files(PRETRAINED / name, released)
    size = sum(map(len, released.values()))
    print(f"{PRETRAINED / name}: {size / 2**20:.1f} MiB, digest {json.loads(released[CONFIG])['digest'][:12]}")


def _stage(folder: Path) -> dict[str, Any]:
    """Return what a run did, by its run.json."""
    run = json.loads((folder / "run.json").read_text())
    recipe, metrics = run["document"]["recipe"], run["summary"]["metrics"]
    (stage,) = recipe["stages"]
    return {
        "name": {"energy": "one-step"}.get(stage["name"], stage["name"]),
        "steps": f"{metrics['images_seen'] / recipe['batch_size']:,.0f}",
        "batch": recipe["batch_size"],
        "rate": f"{stage['learning_rate']:g}",
        "hours": f"{metrics['train_s'] / 3600:.2f}",
        "pairs": run["document"]["pairs"][:12],
        "extra": f"energy score, diversity {stage['diversity']:g}"
        if stage["name"] == "energy"
        else f"{stage['loss'].upper()}",
    }


def _rows(folder: Path, label: str, name: str) -> list[list[str]]:
    """Return a set's rows: of a variant for real images, that for clean ones too."""
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    methods = {**BASELINES, "model": f"{name}, one step"}
    if (sibling := name.removesuffix("-real")) != name:
        methods[sibling] = f"{sibling}, one step"
    return [
        [label, shown, *(_cell(metrics.get(f"{method}_{measure}"), digits) for measure, digits in MEASURES.items())]
        for method, shown in methods.items()
    ]


def _dial(file: Path) -> list[list[str]]:
    """Return the scores by start level that a search has found, from the most texture on."""
    points = json.loads(file.read_text())["points"] if file.is_file() else []
    return [
        [
            f"{point['start_level']:g}",
            *(_cell(point["summary"].get(name, [None])[0], MEASURES[name]) for name in OF_THE_DIAL),
        ]
        for point in sorted(points, key=lambda point: point["start_level"])
    ]


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
