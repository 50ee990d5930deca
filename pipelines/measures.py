"""What is measured of a super-resolved image, and of a set of them: the names, what they need, and the meter."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffsr_core.distributions import Moments, frechet_distance, inception_score, kernel_distance, moments
from diffsr_core.fidelity import Fidelity
from diffsr_core.metrics import diversity, ms_ssim, psnr, rgb_to_y, spectral_error, ssim
from diffsr_core.niqe import niqe
from diffsr_core.pixels import to_model_range
from diffsr_core.seams import seam_ratio
from diffsr_core.tiling import Tile
from pipelines import classifiers
from pipelines.config import check
from pipelines.engine import say
from pipelines.perceptual import load_lpips, read_pristine, read_reference

Pixels = NDArray[np.uint8]

# Least px each way inside the border; below it the measure is not defined.
_SMALLEST_PX = {"psnr": 1, "psnr_y": 1, "ssim": 11, "ssim_y": 11, "ms_ssim": 161, "spectral_error": 2, "niqe": 96}
_SPLITS = 10  # of the inception score, as published; each must hold two images


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measure as tables name it. note: one sentence for the reader of a report."""

    name: str
    label: str
    unit: str
    better: Literal["higher", "lower", "none"]
    digits: int
    note: str


def _table(*rows: tuple[str, str, str, Literal["higher", "lower", "none"], int, str]) -> dict[str, Measure]:
    fields = ("name", "label", "unit", "better", "digits", "note")
    return {row[0]: Measure(**dict(zip(fields, row, strict=True))) for row in rows}  # type: ignore[arg-type]


MEASURES = _table(
    ("psnr", "PSNR", "dB", "higher", 2, "Peak signal-to-noise ratio over all channels, inside the border."),
    ("ssim", "SSIM", "", "higher", 4, "Structural similarity, the mean over channels, inside the border."),
    ("psnr_y", "PSNR-Y", "dB", "higher", 2, "PSNR of the BT.601 luma, rounded as in MATLAB; grey is its own."),
    ("ssim_y", "SSIM-Y", "", "higher", 4, "SSIM of the BT.601 luma, rounded as in MATLAB; grey is its own."),
    ("ms_ssim", "MS-SSIM", "", "higher", 4, "SSIM over five scales, for images of at least 161 px inside the border."),
    ("lr_psnr", "LR-PSNR", "dB", "higher", 2, "PSNR between the LR and the downscaled result: how well it is kept."),
    ("lpips", "LPIPS", "", "lower", 4, "Learned perceptual distance to the original, version 0.1, AlexNet."),
    ("niqe", "NIQE", "", "lower", 2, "Distance of local statistics from those of pristine photographs; no original."),
    ("spectral_error", "Spectral error", "dB", "lower", 2,
     "How far the radial power spectrum of the luma lies from that of the original, over all frequencies."),
    ("colour_drift", "Colour drift", "levels of 255", "lower", 2,
     "How far the mean of a channel has moved from that of the LR, at most."),
    ("seam", "Seam", "", "lower", 3, "How much steeper the image is across tile borders than beside them: 1 is none."),
    ("sigma", "Diversity σ", "levels of 255", "none", 2,
     "Standard deviation over samples of one LR, the mean over pixels; quote the number of samples with it."),
    ("top1", "Top-1", "", "higher", 3, "Share of images whose class a ResNet-50 holds for the likeliest."),
    ("top5", "Top-5", "", "higher", 3, "Share of images whose class a ResNet-50 holds for one of the five likeliest."),
    ("seconds_per_mp", "Seconds per MP", "s/MP", "lower", 2, "Wall-clock seconds per megapixel of the result."),
    ("device_s_per_mp", "Device seconds per MP", "s/MP", "lower", 2,
     "Seconds of network calls per megapixel of the result."),
)  # fmt: skip
SET_MEASURES = _table(
    ("fid", "FID", "", "lower", 2,
     "Frechet distance of Inception features; biased upwards for few images, so compare sets of one size."),
    ("kid", "KID", "", "lower", 5, "Kernel distance of Inception features, without a bias; may be slightly negative."),
    ("inception_score", "Inception score", "", "higher", 2,
     "How sure and how varied an Inception network's classes are, over ten splits; too low for few images."),
)  # fmt: skip
DEFAULT = ("psnr", "ssim", "psnr_y", "ssim_y", "ms_ssim", "lr_psnr", "spectral_error", "colour_drift", "seam")
FROM_ROWS = ("seconds_per_mp", "device_s_per_mp")  # of the rows' seconds; no meter measures them
_FILE_OF = {"niqe": "niqe", "lpips": "lpips", "top1": "classifier", "top5": "classifier"}
_FILE_OF |= dict.fromkeys(SET_MEASURES, "inception")


@dataclass(frozen=True, kw_only=True)
class MeterSettings:
    """What to measure, in plain values. names: of MEASURES and SET_MEASURES; a file adds what it is for."""

    names: tuple[str, ...] = DEFAULT
    border: int | None = None  # px left out at each side; None: the scale
    niqe: str | None = None
    lpips: str | None = None
    classifier: str | None = None
    inception: str | None = None

    def identity(self) -> dict[str, Any]:
        """Return the settings, their files by what is in them: what decides the numbers."""
        files = files_digest([self.niqe, self.lpips, self.classifier, self.inception])
        return {"names": sorted(self.measures), "border": self.border, "files": files, "sets": bool(self.inception)}

    @property
    def measures(self) -> tuple[str, ...]:
        """The per-image measures of a meter with these settings, in the order of tables: the keys of what it gives."""
        asked = {*self.names, *(name for name, file in _FILE_OF.items() if getattr(self, file))}
        return tuple(name for name in MEASURES if name in asked and name not in FROM_ROWS)


def files_digest(paths: Iterable[str | None]) -> str:
    """Return the sha256 of the contents of these files and of those in these folders; None is none."""
    found = hashlib.sha256()
    for path in filter(None, paths):
        files = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
        for file in filter(Path.is_file, files):
            with file.open("rb") as content:
                found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


class Features(NamedTuple):
    """What the Inception network says of an image: its features, float32 (2048,), and probabilities of the classes."""

    vector: NDArray[np.float32]
    probabilities: NDArray[np.float32]


def check_settings(settings: MeterSettings, *, reference: str | None = None) -> None:
    """Read every file that is given. Raises ValueError for an unknown name, a missing file, or one that is no use.

    reference: what FID and KID compare with instead of the originals, see perceptual.read_reference.
    """
    Meter(settings, scale=1)
    if reference is not None:
        check(settings.inception is not None, "reference", reference, "must be compared with features of a network",
              "give its weights with --inception, or leave --reference out")  # fmt: skip
        found = read_reference(reference)
        width = (found.mean if isinstance(found, Moments) else found).shape[-1]
        check(width == classifiers.NUM_FEATURES, "reference", f"{reference}, {width} columns",
              f"must have {classifiers.NUM_FEATURES} columns", "give features of the same network")  # fmt: skip


def set_measures(
    features: Mapping[str, Sequence[Features]],
    *,
    reference: Moments | NDArray[Any] | None,
    note: Callable[[str], None] = say,
) -> dict[str, dict[str, float]]:
    """Return method -> set measure -> value, with a note for each that is left out for too few images.

    features: of each method's images, and of the originals as "hr", all in the order of keys. reference: what FID and
    KID compare with; moments have no KID. None: the originals, which are then not compared with themselves. The
    inception score is over ten consecutive splits of a fixed random order. Raises ValueError for a reference of another
    network.
    """
    vectors = {method: np.array([each.vector for each in found]) for method, found in features.items()}
    truth = vectors.get("hr", np.empty((0, 0))) if reference is None else reference
    known = truth if isinstance(truth, Moments) else moments(truth) if len(truth) > 1 else None
    measured: dict[str, dict[str, float]] = {}
    for method, found in features.items():
        scores = measured.setdefault(method, {})
        few = f"{method}, {len(found)} images"
        if reference is not None or method != "hr":
            if len(found) > 1 and known is not None:
                scores["fid"] = frechet_distance(moments(vectors[method]), known)
                if not isinstance(truth, Moments):
                    scores["kid"] = kernel_distance(vectors[method], truth)
            else:
                note(f"{few}: no FID and no KID; they need two images, and two to compare with")
        if len(found) >= 2 * _SPLITS:
            order = np.random.default_rng(0).permutation(len(found))
            scores["inception_score"] = inception_score(
                np.array([found[index].probabilities for index in order]), splits=_SPLITS
            ).mean
        else:
            note(f"{few}: no inception score; it needs {2 * _SPLITS}")
    if isinstance(reference, Moments):
        note("the reference holds moments alone: no KID; give features as .npy or .safetensors for it")
    return measured


class Meter:
    """Measures images one by one. Built once a process: it holds the networks."""

    def __init__(self, settings: MeterSettings, *, scale: int) -> None:
        """Read the files. Raises ValueError as check_settings does, before any work."""
        for name in settings.names:
            check(name in MEASURES or name in SET_MEASURES, "measures", name, "is unknown",
                  f"use some of {', '.join([*MEASURES, *SET_MEASURES])}")  # fmt: skip
            file = _FILE_OF.get(name)
            check(file is None or bool(getattr(settings, file)), "measures", name, "needs a file, and nothing is "
                  "downloaded", f"give its path with --{file}, or leave {name} out")  # fmt: skip
        check(settings.border is None or settings.border >= 0, "border", settings.border, "must be 0 px or more",
              "leave it out for the scale, as tables do")  # fmt: skip
        self.measures = settings.measures
        self._scale, self._border = scale, scale if settings.border is None else settings.border
        self._pristine = read_pristine(settings.niqe) if settings.niqe else None
        if self._pristine is not None:  # statistics that no image could be scored with are found out here
            value = niqe(np.random.default_rng(0).integers(0, 256, (96, 192), np.uint8), self._pristine)
            check(bool(np.isfinite(value)), "niqe", settings.niqe, "holds values that are not finite", "give BasicSR's")
        self._lpips = load_lpips("alex", folder=settings.lpips) if settings.lpips else None
        self._classifier = classifiers.Classifier(settings.classifier) if settings.classifier else None
        self._inception = classifiers.Inception(settings.inception) if settings.inception else None

    def __call__(
        self,
        sr: Pixels,
        *,
        lr: Pixels,
        hr: Pixels,
        seams: Sequence[Tile] | None = None,
        samples: NDArray[np.uint8] | None = None,
        label: int | None = None,
    ) -> dict[str, float | None]:
        """Return the measures of an image by name, None for one that does not apply to it.

        sr, hr: uint8 (H, W, C), lr: (H / scale, W / scale, C). seams: the tiling plan, in LR px; what of it lies beyond
        the LR, a canvas's padding, does not count. samples: uint8 (K, H, W, C) of this LR. label: the class index.
        Raises ValueError for other types or shapes.
        """
        border, scale = self._border, self._scale
        wanted = (lr.shape[0] * scale, lr.shape[1] * scale, *lr.shape[2:])
        for name, image, shape in (("lr", lr, lr.shape), ("sr", sr, wanted), ("hr", hr, wanted)):
            check(image.dtype == np.uint8 and image.ndim == 3 and image.shape == shape, name,
                  f"{image.dtype} {image.shape}", f"must be uint8 (H, W, C), {scale} times lr {lr.shape}",
                  "decode the published file to 8 bits, and check the crop")  # fmt: skip
        room = min(sr.shape[:2]) - 2 * border
        fits = {name for name, least in _SMALLEST_PX.items() if room >= least}
        if sr.shape[2] in (1, 3):
            luma, true_luma = _luma(sr), _luma(hr)
        else:  # bands are no picture: no luma, and no network knows them
            luma = true_luma = np.empty((0, 0))
            fits &= {"psnr", "ssim", "ms_ssim"}
        fidelity = Fidelity(scale=scale)  # that of the upscale job: a figure there means the same here
        fidelity.add(lr, sr, above=0)
        rank = self._rank(sr, label)
        formulas: dict[str, Callable[[], float | None]] = {
            "psnr": lambda: psnr(sr, hr, border=border),
            "ssim": lambda: _by_channel(ssim, sr, hr, border=border),
            "psnr_y": lambda: psnr(_rounded(luma), _rounded(true_luma), border=border),
            "ssim_y": lambda: ssim(_rounded(luma), _rounded(true_luma), border=border),
            "ms_ssim": lambda: _by_channel(ms_ssim, sr, hr, border=border),
            "lr_psnr": lambda: fidelity.lr_psnr,
            "lpips": lambda: self._perceptual_distance(sr, hr),
            "niqe": lambda: self._naturalness(sr),
            "spectral_error": lambda: spectral_error(luma, true_luma, border=border),
            "colour_drift": lambda: fidelity.colour_drift,
            "seam": lambda: seam_ratio(sr, _inside(seams, lr), scale=scale) if seams is not None else None,
            "sigma": lambda: diversity(samples) if samples is not None and len(samples) > 1 else None,
            "top1": lambda: float(rank < 1) if rank is not None else None,
            "top5": lambda: float(rank < 5) if rank is not None else None,
        }
        return {name: formulas[name]() if name in fits or name not in _SMALLEST_PX else None for name in self.measures}

    def features(self, sr: Pixels) -> Features | None:
        """Return what the set measures need of an image; None without the network, or for other than grey or RGB."""
        if self._inception is None or sr.shape[2] not in (1, 3):
            return None
        return Features(*self._inception(sr))

    def _perceptual_distance(self, sr: Pixels, hr: Pixels) -> float | None:
        """Return LPIPS, over the whole image."""
        if self._lpips is None or min(sr.shape[:2]) < self._lpips.smallest_px or sr.shape[2] not in (1, 3):
            return None
        first, second = (to_model_range(x).expand(1, 3, -1, -1) for x in (sr, hr))
        with torch.inference_mode():
            return float(self._lpips(first, second))

    def _naturalness(self, sr: Pixels) -> float | None:
        """Return NIQE inside the border; None where less than two of its blocks are not flat."""
        assert self._pristine is not None
        try:
            return niqe(sr, self._pristine, border=self._border)
        except ValueError:  # the statistics are good, so it is this image that cannot be scored
            return None

    def _rank(self, sr: Pixels, label: int | None) -> int | None:
        """Return how many classes are held for likelier than the label."""
        small = min(sr.shape[:2]) < classifiers.SMALLEST_PX
        if self._classifier is None or label is None or small or sr.shape[2] not in (1, 3):
            return None
        return self._classifier.rank(sr, label)


def _rounded(luma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Y in whole levels, as MATLAB gives it to published tables: 0.01 dB less at 28 dB, 0.09 at 38."""
    return np.floor(luma + 0.5)


def _luma(pixels: Pixels) -> NDArray[np.float64]:
    return rgb_to_y(pixels) if pixels.shape[2] == 3 else pixels[:, :, 0].astype(np.float64)


def _by_channel(measure: Callable[..., float], sr: Pixels, hr: Pixels, *, border: int) -> float:
    """Return the mean over channels, one by one: a plane stays in the cache, which takes half the time of all."""
    return float(np.mean([measure(sr[..., k], hr[..., k], border=border) for k in range(sr.shape[2])]))


def _inside(plan: Sequence[Tile], lr: Pixels) -> list[Tile]:
    """Return the plan with cores that end at the LR's: a canvas is padded at the bottom and at the right."""
    height, width = lr.shape[:2]
    return [
        tile._replace(core_bottom=min(tile.core_bottom, height), core_right=min(tile.core_right, width))
        for tile in plan
        if tile.core_top < height and tile.core_left < width
    ]
