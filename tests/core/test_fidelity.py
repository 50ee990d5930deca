"""Laws of fidelity by bands: what is measured band by band is what the whole image gives."""

import numpy as np
import pytest

from diffsr_core.fidelity import CONTEXT, Fidelity
from diffsr_core.metrics import lr_psnr


def pair(height: int, width: int, channels: int, scale: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(height * width)
    white = np.iinfo(dtype).max
    lr = rng.integers(0, white + 1, (height, width, channels)).astype(dtype)
    noise = rng.integers(-white // 8, white // 8, (height * scale, width * scale, channels))
    sr = (lr.repeat(scale, axis=0).repeat(scale, axis=1).astype(np.int64) + noise).clip(0, white).astype(dtype)
    return lr, sr


def by_bands(lr: np.ndarray, sr: np.ndarray, step: int) -> Fidelity:
    scale = sr.shape[0] // lr.shape[0]
    fidelity = Fidelity(scale=scale)
    for top in range(0, len(lr), step):
        bottom = min(top + step, len(lr))
        first, last = max(0, top - CONTEXT), min(bottom + CONTEXT, len(lr))
        fidelity.add(lr[top:bottom], sr[first * scale : last * scale], above=top - first)
    return fidelity


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(("height", "width", "channels", "scale"), [(1, 1, 3, 4), (37, 11, 1, 2), (50, 23, 3, 3)])
def test_bands_of_any_height_give_the_lr_psnr_of_the_whole(
    height: int, width: int, channels: int, scale: int, dtype: str
) -> None:
    lr, sr = pair(height, width, channels, scale, dtype)
    whole = lr_psnr(lr, sr, scale=scale)
    for step in (1, 3, 8, 64):
        assert by_bands(lr, sr, step).lr_psnr == pytest.approx(whole, abs=1e-9)


def test_the_drift_is_that_of_the_channel_whose_mean_moved_most_in_levels_of_255() -> None:
    for dtype in ("uint8", "uint16"):
        lr, sr = pair(40, 30, 3, 2, dtype)
        means = np.abs(sr.mean(axis=(0, 1)) - lr.mean(axis=(0, 1))) * 255 / np.iinfo(dtype).max
        assert by_bands(lr, sr, 7).colour_drift == pytest.approx(means.max(), abs=1e-9)


def test_a_result_that_shrinks_to_its_lr_exactly_has_100_db() -> None:
    lr = np.full((20, 20, 3), 77, np.uint8)
    found = by_bands(lr, np.full((80, 80, 3), 77, np.uint8), 6)
    assert (found.lr_psnr, found.colour_drift) == (100.0, 0.0)
