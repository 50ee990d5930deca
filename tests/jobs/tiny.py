"""Tiny models and pictures for jobs that run inside the test's process: made in milliseconds, no training needed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffsr_core.checkpoint import model_files, save_files
from diffsr_core.family import ModelConfig, SuperResolver
from pipelines.ledger import Ledger
from tests.core.tiny import ANCHORED, model_of
from tests.jobs.conftest import png

SAMPLING = ("--steps", "2", "--tile", "16", "--halo", "4")
# A night of the upscale job in the test's own process.
NIGHT = ("--engine", "local", "--no-track", "--batch-size", "3", *SAMPLING)
BICUBIC = replace(ANCHORED, anchor="bicubic")


def model_folder(folder: Path, config: ModelConfig, *, seed: int = 1) -> Path:
    """Write a model with random weights, and return its folder."""
    return write_model(folder, config, model_of(config, seed=seed).state_dict())


def bicubic_folder(folder: Path) -> Path:
    """Write a stub network: a diffusion that finds no residual, so that each result is bicubic, with its projection."""
    weights = SuperResolver(BICUBIC).state_dict()
    return write_model(folder, BICUBIC, {name: torch.zeros_like(tensor) for name, tensor in weights.items()})


def broken_folder(folder: Path) -> Path:
    """Write a model whose network gives NaN for every input."""
    weights = model_of(ANCHORED).state_dict()
    broken = {name: torch.full_like(x, torch.nan) if "denoiser" in name else x for name, x in weights.items()}
    return write_model(folder, ANCHORED, broken)


def write_model(folder: Path, config: ModelConfig, weights: dict[str, torch.Tensor]) -> Path:
    """Write a model folder with these weights, which are also its averaged ones; return it."""
    save_files(folder, model_files(config, weights, weights, preset="tiny", card="# tiny\n"))
    return folder


def waves(height: int, width: int, *, channels: int = 3, phase: float = 0.0) -> np.ndarray:
    """Return a uint8 (H, W, channels) picture without symmetry, far from flat."""
    y, x = np.mgrid[:height, :width]
    planes = [128 + 60 * np.sin(x / 5 + phase + index) + 50 * np.cos(y / 7 - phase) for index in range(channels)]
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """Write pixels of 1, 3 or 4 channels; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels))
    return path


def write_waves(folder: Path, count: int, *, height: int = 16, width: int = 16) -> list[Path]:
    """Write so many pictures, 00.png and on, each another one; return their paths."""
    return [write_png(folder / f"{index:02d}.png", waves(height, width, phase=index)) for index in range(count)]


def receipts(output: Path | str) -> dict[str, dict[str, Any]]:
    """Return the only receipt of each key, metrics as a dict: a key that a single night recorded twice is an error."""
    rows = Ledger(str(output)).rows().to_pylist()
    assert len({row["key"] for row in rows}) == len(rows), "an asset has two receipts"
    return {row["key"]: {**row, "metrics": dict(row["metrics"])} for row in rows}


def outcomes(output: Path | str) -> dict[str, tuple[str, str]]:
    """Return (status, reason) by key, of the latest receipts."""
    return {row["key"]: (row["status"], row["reason"]) for row in Ledger(str(output)).latest().to_pylist()}
