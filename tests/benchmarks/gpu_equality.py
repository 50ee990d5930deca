"""Whether a device computes what the CPU computes, and how nearly: noise and resizing by bits, networks by distance.

Noise, resizing and the projection are sequences of IEEE operations, one rounding each, which both sides have to round
alike: no value may differ. A convolution sums in an order of its own, so a network is judged by the relative distance
|device - CPU| / |CPU| (root mean squares):

* float32, TF32 off: at most FLOAT32_LIMIT. Sums in another order, Winograd's included, move a network's output by 1e-7
  to 1e-5 of its size, and the sines of its embedding, at angles of up to 1000, by as much as 6e-5. TF32 rounds each
  factor to 11 bits: 3e-4 and more. So the limit lies between what must be allowed and what must not.
* bf16: the device may be at most BF16_RATIO times as far from the CPU's float32 as the CPU's bf16 is. Both round each
  layer to 8 bits, but not the same layers: autocast's lists differ, and each error is one draw of its kind.

Whole images follow: float32 within one level of 255 in at most LEVEL_SHARE of the samples (a value has to lie within
the error of a rounding boundary to differ at all), bf16 by the same ratio of distances, in levels.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffsr_core import presets
from diffsr_core.consistency import project
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.noise import gaussian, noise_key
from diffsr_core.pixels import Pixels
from diffsr_core.prepared import prepared
from diffsr_core.resize import downscale, resize, upscale
from diffsr_core.sampler import SAMPLERS
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler, threads
from tests.benchmarks.gpu_cases import Case, Section, Verdict, model_of, picture, tf32
from tests.core import tiny

FLOAT32_LIMIT = 1e-4
BF16_RATIO = 2.0
LEVEL_SHARE = 0.005
LEVEL_FLOOR = 0.05  # of 255: below it bf16 is as near as anyone can see
# Between them every kind of network. A twin is the denoiser's network in one pass.
PRESETS = ("anchored-x4", "nano-x4", "srdiff-df2k-x4", "sr3-lite-16-128", "sr3-lite-16-128-regression", "seed3-8-32")
TINY = ("anchored", "srdiff", "sr3", "one-pass-twin", "seed3")
SIDE_PX = {"cuda": (257, 383), "cpu": (33, 47)}
NUM_THREADS = {"cuda": 8, "cpu": 1}  # of the CPU beside the device


def section(device: str) -> Section:
    """Return the cases of equality with the CPU."""
    cases = [
        Case("noise", partial(noise, device)),
        Case("resizing", partial(resizing, device)),
        Case("projection", partial(projection, device)),
    ]
    for name, config, lr_px in _networks(device):
        cases.append(Case(f"network {name}", partial(network, name, config, lr_px, device)))
    for name, config, sampler in _images(device):
        cases.append(Case(f"image {name}, {sampler}", partial(image, name, config, sampler, device)))
    return Section("Equality with the CPU", cases)


def noise(device: str) -> list[Verdict]:
    """Compare windows of the counter-based field, some beyond its origin."""
    height, width = SIDE_PX[device]
    key = noise_key(3, "equality", 0)
    windows = [(48, 0, 0, 0), (3, 7, -5, -2), (6, 1999, 2**31, 100)]
    pairs = []
    for channels, step, y0, x0 in windows:
        expected, found = (
            gaussian(key, channels=channels, height=height, width=width, step=step, y0=y0, x0=x0, device=place)
            for place in ("cpu", device)
        )
        pairs.append((expected, found))
    return [same_bits("noise", pairs)]


def resizing(device: str) -> list[Verdict]:
    """Compare both directions, other kernels and a size that is no multiple, float32 and float64."""
    height, width = (4 * side for side in SIDE_PX[device])
    pairs = []
    for dtype in (torch.float32, torch.float64):
        x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1
        y = x.to(device)
        pairs += [(downscale(x, 4), downscale(y, 4)), (upscale(x, 2), upscale(y, 2))]
        size = (height * 3 // 7, width * 2 // 3)
        pairs.append((resize(x, size, kernel="lanczos3"), resize(y, size, kernel="lanczos3")))
    return [same_bits("resizing", pairs)]


def projection(device: str) -> list[Verdict]:
    """Compare every mode of the projection onto the LR."""
    generator = torch.Generator().manual_seed(2)
    height, width = SIDE_PX[device]
    lr = torch.rand(1, 3, height, width, generator=generator) * 2 - 1
    sr = upscale(lr, 4) + torch.randn(1, 3, 4 * height, 4 * width, generator=generator) * 0.1
    pairs = []
    for mode in ("exact", "interval", "low-band"):
        expected = project(sr, lr, scale=4, iterations=6, mode=mode)
        pairs.append((expected, project(sr.to(device), lr.to(device), scale=4, iterations=6, mode=mode)))
    return [same_bits("projection", pairs)]


def network(name: str, config: ModelConfig, lr_px: int, device: str) -> list[Verdict]:
    """Compare the encoder's and the denoiser's outputs, float32 and bf16."""
    model = model_of(config)
    with threads(NUM_THREADS[device]):
        inputs = inputs_of(model, lr_px)
        plain = outputs(model, inputs, precision="float32", device="cpu")
        narrow = outputs(model, inputs, precision="bf16", device="cpu")
        with tf32(False):
            found = outputs(model, inputs, precision="float32", device=device)
        narrow_found = outputs(model, inputs, precision="bf16", device=device)
    return [
        float32_verdict(f"network {name}, float32", plain, found),
        bf16_verdict(f"network {name}, bf16", plain, narrow, narrow_found),
    ]


def inputs_of(model: SuperResolver, lr_px: int) -> list[Tensor]:
    """Return lr, and for a denoiser x_t, noise levels and features, of two images.

    The features are the CPU's everywhere, so that an encoder's errors are counted once.
    """
    config, generator = model.config, torch.Generator().manual_seed(3)
    lr = torch.rand(2, config.encoder.lr_channels, lr_px, lr_px, generator=generator) * 2 - 1
    if config.denoiser is None:
        return [lr]
    x_t = torch.randn(2, *config.diffused_shape(lr_px, lr_px), generator=generator)
    with torch.inference_mode():
        return [lr, x_t, torch.tensor([0.3, 0.9]), model.condition(lr).features]


def outputs(model: SuperResolver, inputs: list[Tensor], *, precision: str, device: str) -> list[Tensor]:
    """Return the encoder's image, and the denoiser's prediction where there is one, float32 and on the CPU."""
    ready = prepared(model, precision="bf16" if precision == "bf16" else "float32", device=device)
    lr, *denoised = (x.to(device) for x in inputs)
    enabled = precision == "bf16"
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
        found = [ready.encoder(lr)[1]]
        if denoised:
            found.append(ready.predict(*denoised))
    return [x.float().cpu() for x in found]


def image(name: str, config: ModelConfig, sampler: str, device: str) -> list[Verdict]:
    """Compare whole images from the Upscaler, float32 and bf16."""
    plain = upscaled(config, sampler, precision="float32", device="cpu", beside=device)
    with tf32(False):
        found = upscaled(config, sampler, precision="float32", device=device, beside=device)
    narrow = upscaled(config, sampler, precision="bf16", device="cpu", beside=device)
    narrow_found = upscaled(config, sampler, precision="bf16", device=device, beside=device)
    return [
        levels_verdict(f"image {name}, {sampler}, float32", plain, found),
        ratio_verdict(f"image {name}, {sampler}, bf16", plain, narrow, narrow_found),
    ]


def upscaled(config: ModelConfig, sampler: str, *, precision: str, device: str, beside: str) -> Pixels:
    """Return the SR of one small picture, in several tiles, one window and a call that is not full."""
    stride, size = config.lr_stride, {"cuda": (56, 72), "cpu": (18, 26)}[beside]
    recipe = SamplingRecipe(
        sampler=sampler,
        num_steps=3,
        corrections=1 if sampler == "langevin" else None,
        tile={"cuda": 48, "cpu": 16}[beside],
        halo=-(-4 // stride) * stride,
        window=512,
        micro_batch=4,
        num_threads=NUM_THREADS[beside] if device == "cpu" else 1,
        precision="bf16" if precision == "bf16" else "float32",
    )
    upscaler = Upscaler(model_of(config), recipe, device=device, regression=False)
    return upscaler(picture(*size, config.encoder.channels), digest="equality").sr


def same_bits(name: str, pairs: list[tuple[Tensor, Tensor]]) -> Verdict:
    """Return the verdict on (CPU's, device's) tensors of which no value may differ in a bit."""
    total = differing = worst = 0
    for expected, found in pairs:
        kind = torch.int64 if expected.dtype == torch.float64 else torch.int32
        a, b = (x.cpu().contiguous().view(kind) for x in (expected, found))
        differing += int((a != b).sum())
        # Of values on two sides of 0 this is no distance in units of the last place, but as large as it looks.
        worst = max(worst, int((a.to(torch.float64) - b.to(torch.float64)).abs().max()))
        total += a.numel()
    ulp = f", by up to {worst:,} ulp" if differing else ""
    return Verdict(name, f"{differing:,} of {total:,} values differ{ulp}", "0", differing == 0)


def distance(expected: Tensor, found: Tensor) -> float:
    """Return |found - expected| / |expected|, root mean squares; inf where a value is no number."""
    if not torch.isfinite(found).all():
        return float("inf")
    size = max(float(expected.double().norm()), 1e-30)
    return float((found.double() - expected.double()).norm()) / size


def float32_verdict(name: str, expected: list[Tensor], found: list[Tensor]) -> Verdict:
    """Return the verdict on a network's float32 outputs: the worst of them."""
    worst = max(distance(a, b) for a, b in zip(expected, found, strict=True))
    return Verdict(name, f"distance {worst:.1e}", f"{FLOAT32_LIMIT:.0e}", worst <= FLOAT32_LIMIT)


def bf16_verdict(name: str, plain: list[Tensor], cpu: list[Tensor], found: list[Tensor]) -> Verdict:
    """Return the verdict on a network's bf16 outputs: that whose distance is the largest multiple of the CPU's."""
    distances = [(distance(p, f), distance(p, c)) for p, c, f in zip(plain, cpu, found, strict=True)]
    own, others = max(distances, key=lambda pair: pair[0] / max(pair[1], FLOAT32_LIMIT))
    good = own <= BF16_RATIO * max(others, FLOAT32_LIMIT)
    return Verdict(name, f"distance {own:.1e}, CPU {others:.1e}", f"{BF16_RATIO:g} times the CPU's", good)


def levels_verdict(name: str, expected: Pixels, found: Pixels) -> Verdict:
    """Return the verdict on float32 images, in levels."""
    apart = np.abs(expected.astype(np.int64) - found.astype(np.int64))
    share, most = float((apart > 0).mean()), int(apart.max())
    limit = f"1 level in {LEVEL_SHARE:.1%}"
    return Verdict(name, f"{most} levels, {share:.3%} of samples", limit, most <= 1 and share <= LEVEL_SHARE)


def ratio_verdict(name: str, plain: Pixels, cpu: Pixels, found: Pixels) -> Verdict:
    """Return the verdict on bf16 images: their distances in levels to the CPU's float32 image."""
    own, others = (float(np.sqrt(((x.astype(float) - plain) ** 2).mean())) for x in (found, cpu))
    good = own <= BF16_RATIO * max(others, LEVEL_FLOOR)
    return Verdict(name, f"{own:.3f} levels, CPU {others:.3f}", f"{BF16_RATIO:g} times the CPU's", good)


def _networks(device: str) -> list[tuple[str, ModelConfig, int]]:
    """Return names, models and LR sides of the networks that are compared."""
    if device == "cpu":
        return [(name, tiny.MODELS[name], 16) for name in TINY]
    found = [presets.get(name) for name in PRESETS]
    return [(name, p.model, p.patch // p.model.scale) for name, p in zip(PRESETS, found, strict=True)]


def _images(device: str) -> list[tuple[str, ModelConfig, str]]:
    """Return names, models and samplers of the images to compare: all samplers, and a model that predicts eps."""
    if device == "cpu":
        small = tiny.MODELS["anchored"]
        return [("anchored", small, s) for s in SAMPLERS] + [("srdiff", tiny.MODELS["srdiff"], "ddpm")]
    nano, anchored = (presets.get(name).model for name in ("nano-x4", "anchored-x4"))
    rows = [("nano-x4", nano, s) for s in SAMPLERS]
    return [*rows, ("anchored-x4", anchored, "ddim"), ("tiny srdiff", tiny.MODELS["srdiff"], "ddpm")]
