"""Recipes that make the low-resolution image from the high-resolution one."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffsr_core.blur import convolve, gaussian_kernel, sinc_kernel
from diffsr_core.noise import gaussian, noise_key, philox4x32
from diffsr_core.resize import check_divisible, downscale_pixels, resize_pixels, round_pixels

Pixels = NDArray[np.float64]
# uint8 HWC pixels, C = 1 or 3, and a quality of 1 to 100 -> the pixels encoded and decoded. The core has no codec.
JpegCodec = Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]
Range = tuple[float, float]
Setting = Range | float

# The recipes and their settings: a pair is the range that each image draws from, a number is a share of the images.
DEGRADATIONS: Mapping[str, Mapping[str, Setting]] = MappingProxyType(
    {
        "bicubic": {},
        "bilinear": {},
        "blur-bicubic": {"blur": (0.2, 3.0), "anisotropic": 0.5},
        "noise": {"noise": (1.0, 30.0), "shot": (0.0, 0.0), "grey": 0.0},
        "jpeg": {"quality": (30.0, 95.0)},
        "real": {
            "blur": (0.2, 3.0),
            "blur_2": (0.0, 3.0),
            "anisotropic": 0.5,
            "sinc": 0.1,
            "sinc_last": 0.5,
            "cutoff": (1.0, 3.1),
            "resize": (0.6, 1.5),
            "resize_2": (0.3, 1.2),
            "bicubic": 0.5,
            "noise": (1.0, 30.0),
            "noise_2": (1.0, 25.0),
            "shot": (0.0, 2.0),
            "grey": 0.4,
            "quality": (30.0, 95.0),
            "quality_2": (30.0, 95.0),
        },
    }
)
_LIMITS: Mapping[str, Range] = MappingProxyType(
    {"blur": (0, 32), "noise": (0, 255), "shot": (0, 255), "quality": (1, 100)}
    | {"resize": (0.05, 4), "cutoff": (0.1, math.pi)}
)
_CODED = ("jpeg", "real")
_ONLY_INTEGERS = ("noise", *_CODED)
_MOST_CHANNELS = 16


def crop_to_multiple(hr: NDArray[Any], scale: int) -> NDArray[Any]:
    """Return the view of HW or HWC pixels from the top left whose sides are multiples of scale (MATLAB's modcrop).

    Raises ValueError for a scale below 1 or an image smaller than one scale.
    """
    if scale < 1:
        raise ValueError(f"scale is {scale}: it must be a whole number of at least 1; 2, 3, 4 and 8 are usual")
    height, width = hr.shape[0] // scale * scale, hr.shape[1] // scale * scale
    if height == 0 or width == 0:
        raise ValueError(
            f"hr is {hr.shape[0]}x{hr.shape[1]} px: each side must be at least scale {scale}; leave this image out"
        )
    return hr[:height, :width]


class Draws:
    """The random numbers of one image, each a function of the seed and of how many were drawn before it.

    From the counters of diffsr_core.noise, not numpy's Generator, whose numbers another version may change (NEP 19):
    a recorded recipe must give its pixels again.
    """

    def __init__(self, seed: int) -> None:
        self._key, self._count = noise_key(seed, "degradation", 0), 0

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high), or low where they are equal."""
        counter = torch.tensor([0, 0, 0, self._next()])
        return low + (high - low) * (int(philox4x32(counter, self._key)[0]) / 2**32)

    def chance(self, share: float) -> bool:
        """Return True for this share of the draws: never for 0, always for 1."""
        return self.uniform(0.0, 1.0) < share

    def shuffled(self, steps: list[Callable[[Pixels], Pixels]]) -> list[Callable[[Pixels], Pixels]]:
        """Return the steps in a random order."""
        return [
            step for _, step in sorted([(self.uniform(0.0, 1.0), step) for step in steps], key=lambda pair: pair[0])
        ]

    def normal(self, height: int, width: int, channels: int) -> Pixels:
        """Return standard normal noise (height, width, channels)."""
        field = gaussian(self._key, channels=channels, height=height, width=width, step=self._next())
        noise: Pixels = field[0].permute(1, 2, 0).double().numpy()
        return noise

    def _next(self) -> int:
        self._count += 1
        return self._count


@dataclass(frozen=True)
class Degradation:
    """A named recipe with its scale and settings; the settings that are not given have the values of DEGRADATIONS.

    A range is two numbers or one. blur: standard deviation in HR px, drawn once, or for a share `anisotropic` of the
    images once per axis, with an angle. noise: standard deviation of 255; shot: variance per level of brightness, so
    that the whole is noise^2 + shot * x (Foi et al., "Practical Poissonian-Gaussian noise modeling", 2008); grey: share
    of the images whose channels share one noise. quality: of JPEG, a whole number.

    `real` is our own recipe after the idea of Zhang et al., "BSRGAN", 2021, and Wang et al., "Real-ESRGAN", 2021: blur,
    resize, noise and JPEG in random order, then blur, resize and noise again in random order, then the resize to the
    LR size and JPEG in random order. The first resize goes to resize[0] times the LR size up to resize[1] times the HR
    size, the second to resize_2 times the LR size; bicubic: share of them by that kernel, the others are bilinear. A
    blur after a resize is scaled with it: the order decides its place, not its strength. sinc: share of the blurs that
    are a low-pass with a cutoff in radians per px; sinc_last: share of the images with one after the last resize.

    Raises ValueError for a name that is not in DEGRADATIONS, a scale below 1 (below 2 for bicubic and bilinear, which
    would do nothing), or a setting that the recipe does not have or that is out of range.
    """

    name: str
    scale: int
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in DEGRADATIONS:
            raise ValueError(
                f"degradation is {self.name!r}: it must be one of {', '.join(sorted(DEGRADATIONS))}; choose one of them"
            )
        least = 1 if DEGRADATIONS[self.name] else 2
        if isinstance(self.scale, bool) or not isinstance(self.scale, int) or self.scale < least:
            raise ValueError(
                f"scale is {self.scale!r}: it must be a whole number of at least {least} for {self.name}; 2, 3, 4 and "
                "8 are usual, and 1 with a recipe that does more than resize"
            )
        object.__setattr__(self, "settings", _complete(self.name, self.settings))

    @classmethod
    def parse(cls, text: str, scale: int) -> "Degradation":
        """Return the recipe of a name, or of JSON such as {"name": "jpeg", "settings": {"quality": [30, 60]}}.

        What `to_json` gives is read back. Raises ValueError for other text or another scale, and as the recipe does.
        """
        if not text.startswith("{"):
            return cls(text, scale)
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"degradation is {text!r}: it must be a name or JSON ({error}); correct it") from None
        settings, told = document.pop("settings", {}), document.pop("scale", scale)
        if told != scale:
            raise ValueError(f"scale is {scale}: the recipe {text!r} must be of that scale; give one without a scale")
        if document.keys() != {"name"} or not isinstance(settings, dict):
            raise ValueError(f"degradation is {text!r}: as JSON it must hold a name and may hold settings; correct it")
        return cls(document["name"], scale, settings)

    def to_json(self) -> str:
        """Return the canonical JSON text: all settings, sorted keys, no spaces, equal for equal recipes."""
        document = {"name": self.name, "scale": self.scale} | ({"settings": self.settings} if self.settings else {})
        return json.dumps(document, sort_keys=True, separators=(",", ":"))

    def apply(self, hr: NDArray[Any], *, seed: int, jpeg: JpegCodec | None = None) -> NDArray[Any]:
        """Return the LR pixels, HW or HWC in the type of hr, a function of (recipe, hr, seed) and the codec alone.

        hr: uint8, uint16 or float32 pixels of 1 to 16 channels whose sides are multiples of the scale. Float64
        throughout, one rounding at the end, halves away from zero; JPEG sees 8 bits. A float32 result is neither
        rounded to integers nor clipped, and a sample that is not finite spreads (by a blur over the whole image): leave
        such images out. bicubic and bilinear draw nothing: the seed changes nothing. jpeg: needed by jpeg and real.
        Raises ValueError for another type (noise, jpeg and real: also for float32), size or number of channels (JPEG
        has 1 or 3), or a missing codec.
        Source of bicubic: MATLAB's imresize of a double image, then im2uint8.
        """
        if hr.dtype not in (np.uint8, np.uint16, np.float32):
            raise ValueError(
                f"hr is {hr.dtype}: it must be uint8, uint16 or float32; convert it with its own range in mind"
            )
        if hr.dtype == np.float32 and self.name in _ONLY_INTEGERS:
            raise ValueError(
                f"hr is float32: {self.name} must have uint8 or uint16, because its levels are of 255 and a float has "
                "no such range; use bicubic, bilinear or blur-bicubic, or convert hr with its own range in mind"
            )
        if hr.ndim not in (2, 3) or not 1 <= hr[:1, :1].size <= _MOST_CHANNELS:
            raise ValueError(
                f"hr has shape {hr.shape}: it must be HW, or HWC of 1 to {_MOST_CHANNELS} channels; pass one image"
            )
        if self.name in _CODED and jpeg is None:
            raise ValueError(
                f"jpeg is None: {self.name} must have a JPEG codec; pass one, pixels and quality to pixels"
            )
        if self.name in _CODED and hr[:1, :1].size not in (1, 3):
            raise ValueError(
                f"hr has shape {hr.shape}: {self.name} must have 1 or 3 channels; use blur-bicubic or noise"
            )
        check_divisible(hr.shape[0], hr.shape[1], self.scale)
        lr = self._degraded(hr.reshape(*hr.shape[:2], -1), seed, jpeg)
        whole = lr.astype(np.float32) if hr.dtype == np.float32 else round_pixels(lr, hr.dtype)
        return whole[:, :, 0] if hr.ndim == 2 else whole

    def _degraded(self, x: NDArray[Any], seed: int, jpeg: JpegCodec | None) -> Pixels:
        """Return the LR (h, w, C) of x (H, W, C), not rounded."""
        if self.name in ("bicubic", "bilinear"):
            return downscale_pixels(x, self.scale, kernel="bilinear" if self.name == "bilinear" else "bicubic")
        s, draws = self.settings, Draws(seed)
        if self.name == "blur-bicubic":
            blurred = _blurred(x.astype(np.float64), draws, sigma=s["blur"], anisotropic=s["anisotropic"])
            return downscale_pixels(blurred, self.scale)
        # One level of 255 in the range of x.
        unit = float(np.iinfo(x.dtype).max) / 255
        if self.name == "real":
            assert jpeg is not None
            return _real(x.astype(np.float64), self.scale, s, draws, jpeg, unit)
        lr = downscale_pixels(x, self.scale)
        if self.name == "noise":
            return _noisy(lr, draws, noise=s["noise"], shot=s["shot"], grey=s["grey"], unit=unit)
        assert jpeg is not None
        return _compressed(lr, draws, quality=s["quality"], jpeg=jpeg, unit=unit)


def _complete(name: str, given: Mapping[str, Any]) -> dict[str, Setting]:
    """Return all settings of a recipe, those given in canonical form. Raises ValueError."""
    defaults = DEGRADATIONS[name]
    for key in given:
        if key not in defaults:
            known = ", ".join(sorted(defaults)) or "none"
            raise ValueError(f"setting is {key!r}: it must be one that {name} has: {known}; choose among them")
    return {key: _checked(key, given[key], default) if key in given else default for key, default in defaults.items()}


def _checked(key: str, value: Any, default: Setting) -> Setting:
    is_range = isinstance(default, tuple)
    numbers = list(value) if is_range and isinstance(value, (list, tuple)) else [value]
    low, high = _LIMITS[key.removesuffix("_2")] if is_range else (0.0, 1.0)
    fits = all(type(number) in (int, float) and low <= number <= high for number in numbers)
    if not fits or len(numbers) not in (1, 2) or numbers[0] > numbers[-1]:
        rule = "two numbers, the lower first, or one," if is_range else "a number"
        raise ValueError(f"{key} is {value!r}: it must be {rule} from {low:g} to {high:g}; correct it")
    return (float(numbers[0]), float(numbers[-1])) if is_range else float(numbers[0])


def _blurred(x: Pixels, draws: Draws, *, sigma: Range, anisotropic: float) -> Pixels:
    first = draws.uniform(*sigma)
    if not draws.chance(anisotropic):
        return convolve(x, gaussian_kernel((first, first)))
    return convolve(x, gaussian_kernel((first, draws.uniform(*sigma)), angle=draws.uniform(0.0, math.pi)))


def _noisy(x: Pixels, draws: Draws, *, noise: Range, shot: Range, grey: float, unit: float) -> Pixels:
    variance = (draws.uniform(*noise) * unit) ** 2 + draws.uniform(*shot) * unit * np.maximum(x, 0.0)
    height, width, channels = x.shape
    return x + np.sqrt(variance) * draws.normal(height, width, 1 if draws.chance(grey) else channels)


def _compressed(x: Pixels, draws: Draws, *, quality: Range, jpeg: JpegCodec, unit: float) -> Pixels:
    level = int(draws.uniform(quality[0], quality[1] + 1))
    pixels = round_pixels(x / unit, np.dtype(np.uint8))
    decoded = jpeg(pixels, level)
    if decoded.shape != pixels.shape or decoded.dtype != np.uint8:
        raise ValueError(
            f"jpeg gave {decoded.dtype} of shape {decoded.shape}: it must give uint8 of shape {pixels.shape}, as it "
            "was given; mend the codec"
        )
    return decoded.astype(np.float64) * unit


def _real(x: Pixels, scale: int, s: Mapping[str, Any], draws: Draws, jpeg: JpegCodec, unit: float) -> Pixels:
    """Return the LR of the two-stage recipe that Degradation describes."""
    lr_size = (x.shape[0] // scale, x.shape[1] // scale)

    def blur(x: Pixels, sigma: Range) -> Pixels:
        if draws.chance(s["sinc"]):
            return convolve(x, sinc_kernel(draws.uniform(*s["cutoff"])))
        ratio = x.shape[0] / (lr_size[0] * scale)
        return _blurred(x, draws, sigma=(sigma[0] * ratio, sigma[1] * ratio), anisotropic=s["anisotropic"])

    def resize(x: Pixels, low: float, high: float) -> Pixels:
        """To between low and high times the LR size."""
        factor = draws.uniform(low, high)
        height, width = (max(1, round(side * factor)) for side in lr_size)
        return resize_pixels(x, (height, width), kernel="bicubic" if draws.chance(s["bicubic"]) else "bilinear")

    def fit(x: Pixels) -> Pixels:
        lr = resize_pixels(x, lr_size)
        return convolve(lr, sinc_kernel(draws.uniform(*s["cutoff"]))) if draws.chance(s["sinc_last"]) else lr

    def noisy(x: Pixels, noise: Range) -> Pixels:
        return _noisy(x, draws, noise=noise, shot=s["shot"], grey=s["grey"], unit=unit)

    def compress(x: Pixels, quality: Range) -> Pixels:
        return _compressed(x, draws, quality=quality, jpeg=jpeg, unit=unit)

    first = [
        lambda x: blur(x, s["blur"]),
        lambda x: resize(x, s["resize"][0], s["resize"][1] * scale),
        lambda x: noisy(x, s["noise"]),
        lambda x: compress(x, s["quality"]),
    ]
    second = [
        lambda x: blur(x, s["blur_2"]),
        lambda x: resize(x, *s["resize_2"]),
        lambda x: noisy(x, s["noise_2"]),
    ]
    # JPEG may come after the last resize, so that some LR have blocks on their own grid, as files found have.
    last = [fit, lambda x: compress(x, s["quality_2"])]
    for step in draws.shuffled(first) + draws.shuffled(second) + draws.shuffled(last):
        x = step(x)
    return x
