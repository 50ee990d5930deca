"""Tiny models and pictures for jobs that run inside the test's process: made in milliseconds, no training needed."""

from pathlib import Path

import numpy as np

from diffsr_core.checkpoint import model_files, save_files
from diffsr_core.family import ModelConfig
from tests.core.tiny import model_of
from tests.jobs.conftest import png

SAMPLING = ("--steps", "2", "--tile", "16", "--halo", "4")


def model_folder(folder: Path, config: ModelConfig, *, seed: int = 1) -> Path:
    """Write a model with random weights, and return its folder."""
    weights = model_of(config, seed=seed).state_dict()
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
