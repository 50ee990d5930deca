"""What an image scores in few_steps.py, the sharpened control, and the verdicts that follow from the numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffsr_core.consistency import project
from diffsr_core.metrics import inside, radial_spectrum, rgb_to_y
from diffsr_core.pixels import to_model_range, to_pixels
from diffsr_core.resize import downscale, upscale
from diffsr_core.sampling import SamplingRecipe
from pipelines.measures import Meter

SCALE, NUM_SAMPLES, NUM_OCTAVES = 4, 4, 3
STUDENT, MEAN, ANCESTRAL = "student, 1 step", f"student, mean of {NUM_SAMPLES}", "teacher, ancestral 100"
FROM = f"{STUDENT} from"  # a level
REGRESSION, CONTROL = "regression", "regression, sharpened"
SRDIFF_CALLS, SR3_CALLS = 100, 2000  # of the public samplers
# (label, measure, 1 where lower is better)
WANTED = (("NIQE", "niqe", 1), ("spectral error", "spectral_error", 1), ("PSNR-Y", "psnr_y", -1))
MOST_CALLS, MOST_SECONDS, LEAST_ENERGY, LEAST_PSNR = 4, 0.08, 0.9, 29.0

Pixels = NDArray[np.uint8]
Luma = NDArray[np.float64]
Draw = Callable[[Pixels, int], Pixels]  # (LR, index of the sample) -> SR, as it would be published
Measures = dict[str, float]  # NaN: does not apply to this image


class Pair(NamedTuple):
    """An image and its LR, uint8 RGB (H, W, 3) and (H / 4, W / 4, 3). digest: of the HR pixels."""

    name: str
    hr: Pixels
    lr: Pixels
    digest: str


class Scores(NamedTuple):
    """What a row scores on a set: the calls of an image, and the measures of each image, in one order for all rows."""

    calls: int
    images: list[Measures]

    def mean(self, name: str) -> float:
        """Return the mean over images; of `texture` the energy of all over that of HR. NaN where one has none."""
        if name == "texture":
            return self.total("energy") / self.total("hr_energy")
        return self.total(name) / len(self.images)

    def total(self, name: str) -> float:
        """Return the sum over images."""
        return math.fsum(image[name] for image in self.images)


class Verdict(NamedTuple):
    """A claim, whether the numbers bear it out, and the numbers."""

    claim: str
    holds: bool
    evidence: str


def sharpened(sr: Pixels, lr: Pixels, *, gain: float) -> Pixels:
    """Return sr with its band above the LR's Nyquist 1 + gain times as strong, projected onto the LR again."""
    image = to_model_range(sr)
    return published(image + gain * (image - upscale(downscale(image, SCALE), SCALE)), lr)


def published(image: torch.Tensor, lr: Pixels) -> Pixels:
    """Return the pixels of an image (1, C, H, W), projected as a recipe does that says nothing else."""
    usual = SamplingRecipe()
    own = project(image, to_model_range(lr), scale=SCALE, iterations=usual.consistency_iterations, mode="exact")
    pixels: Pixels = to_pixels(own)
    return pixels


def find_gain(images: Sequence[tuple[Pixels, Pixels]], energy: float, *, most: float = 64.0) -> tuple[float, float]:
    """Return (gain, energy reached) of sharpening regressions to this high-frequency energy: one gain for all.

    images: (SR, LR) of each; energy: of all together, as total_energy gives it. Found by bisection between -1, where
    nothing of the band is left, and at most `most`, to 0.1 %; where the energy lies beyond them, the nearer end.
    """

    def reached(gain: float) -> float:
        return total_energy([rgb_to_y(sharpened(sr, lr, gain=gain)) for sr, lr in images])

    low, high = -1.0, 1.0
    while (found := reached(high)) < energy and high < most:
        low, high = high, 2 * high
    if found <= energy:
        return high, found
    if low == -1.0 and (found := reached(low)) >= energy:
        return low, found
    for _ in range(40):
        middle = (low + high) / 2
        found = reached(middle)
        if abs(found - energy) <= 1e-3 * energy:
            return middle, found
        low, high = (middle, high) if found < energy else (low, middle)
    return middle, found


def high_energy(luma: Luma) -> float:
    """Return the sum of squares of luma (H, W) above the LR's Nyquist, x - up(down(x)), inside a border of 4 px."""
    x = torch.from_numpy(np.array(luma))[None, None]
    high = (x - upscale(downscale(x, SCALE), SCALE))[0, 0].numpy()
    return float(np.square(high[SCALE:-SCALE, SCALE:-SCALE]).sum())


def total_energy(lumas: Sequence[Luma]) -> float:
    """Return the energy of a set: large and rich images count for more, as their texture does."""
    return math.fsum(high_energy(luma) for luma in lumas)


def octave_errors(luma: Luma, true_luma: Luma) -> list[float]:
    """Return the mean of the spectrum's difference in dB over the finest octaves, finest first; below 0 is too weak.

    Octave k is from 0.5 / 2^(k + 1) to 0.5 / 2^k cycles per px: of scale 4 the first two lie above the LR's Nyquist.
    Border and floor are those of metrics.spectral_error, which is the mean of |difference| over all frequencies.
    """
    error = spectrum_error(luma, true_luma)
    side = min(inside(luma, SCALE, max_value=255, smallest=2).shape)
    frequency = np.arange(1, len(error) + 1) / side
    octaves = [(0.5 / 2 ** (k + 1) < frequency) & (frequency <= 0.5 / 2**k) for k in range(NUM_OCTAVES)]
    return [float(error[octave].mean()) if octave.any() else math.nan for octave in octaves]


def spectrum_error(luma: Luma, true_luma: Luma) -> NDArray[np.float64]:
    """Return by how many dB the power of luma is above the true one's, at each frequency of radial_spectrum."""
    found, true = (
        np.maximum(radial_spectrum(inside(x, SCALE, max_value=255, smallest=2)), 1 / 12) for x in (luma, true_luma)
    )
    error: NDArray[np.float64] = 10 * np.log10(found / true)
    return error


def score(draw: Draw, pair: Pair, meter: Meter, *, num_samples: int) -> Measures:
    """Return what an image scores, the mean over its samples; sigma is of all of them."""
    drawn = [draw(pair.lr, k) for k in range(num_samples)]
    true_luma = rgb_to_y(pair.hr)

    def measures(sr: Pixels) -> Measures:
        found = meter(sr, lr=pair.lr, hr=pair.hr, samples=np.stack(drawn) if num_samples > 1 else None)
        luma = rgb_to_y(sr)
        return {
            **{name: math.nan if value is None else float(value) for name, value in found.items()},
            **{f"octave_{k}": error for k, error in enumerate(octave_errors(luma, true_luma))},
            "energy": high_energy(luma),
        }

    each = [measures(sr) for sr in drawn]
    means = {name: math.fsum(one[name] for one in each) / num_samples for name in each[0]}
    return {**means, "sigma": means["sigma"] if num_samples > 1 else 0.0, "hr_energy": high_energy(true_luma)}


def verdicts(
    sets: Mapping[str, Mapping[str, Scores]], seconds: Mapping[str, Mapping[str, float]], *, energy_of: str = "Set5"
) -> list[Verdict]:
    """Return what the numbers say. sets: set -> row -> scores. seconds: row -> precision -> of one 256x256 output.

    energy_of: the set whose PSNR-Y and energy are asked for. What is not a number bears nothing out.
    """
    started = [row for row in sets[energy_of] if row.startswith(FROM)]
    fewer = [_few_calls(sets, row) for row in (STUDENT, MEAN)]
    drawn = {row: sets[energy_of][row] for row in (STUDENT, *started)}
    textured = _textured(drawn, energy_of, sets[energy_of][REGRESSION])
    return [*fewer, *([_some_level(sets, started)] if started else []), _fast(seconds), textured, _beats_gain(sets)]


def _worse(ours: Scores, theirs: Scores) -> list[str]:
    """Return the labels of what ours is worse in."""
    return [label for label, name, sign in WANTED if not sign * ours.mean(name) <= sign * theirs.mean(name)]


def _few_calls(sets: Mapping[str, Mapping[str, Scores]], row: str) -> Verdict:
    calls = next(iter(sets.values()))[row].calls
    holds, parts = calls <= MOST_CALLS, []
    for name, scores in sets.items():
        ours, theirs = scores[row], scores[ANCESTRAL]
        holds &= not _worse(ours, theirs)
        cells = []
        for label, measure, sign in WANTED:
            pairs = zip(ours.images, theirs.images, strict=True)
            count = sum(sign * a[measure] <= sign * b[measure] for a, b in pairs)
            values = f"{ours.mean(measure):.2f} against {theirs.mean(measure):.2f}"
            cells.append(f"{label} {values} ({count} of {len(ours.images)} images)")
        parts.append(f"{name}: {', '.join(cells)}")
    claim = f"*{row}* (calls: {calls}) is not worse than *{ANCESTRAL}* in NIQE, spectral error and PSNR-Y"
    ratios = f"{SRDIFF_CALLS / calls:g} times fewer calls than SRDiff's {SRDIFF_CALLS}, {SR3_CALLS / calls:g} times"
    return Verdict(claim, holds, f"{'; '.join(parts)}; {ratios} fewer than SR3's {SR3_CALLS}")


def _some_level(sets: Mapping[str, Mapping[str, Scores]], started: Sequence[str]) -> Verdict:
    worse = {row: {name: _worse(scores[row], scores[ANCESTRAL]) for name, scores in sets.items()} for row in started}
    parts = [
        f"{name}: {', '.join(f'from {_level(row)} {_listed(worse[row][name])}' for row in started)}" for name in sets
    ]
    claim = f"From some other level one call is not worse than *{ANCESTRAL}* in NIQE, spectral error and PSNR-Y"
    return Verdict(claim, any(not any(found.values()) for found in worse.values()), f"Worse are: {'; '.join(parts)}")


def _level(row: str) -> str:
    return row.removeprefix(FROM).strip()


def _listed(labels: Sequence[str]) -> str:
    return " and ".join(labels) or "none"


def _fast(seconds: Mapping[str, Mapping[str, float]]) -> Verdict:
    found = seconds[STUDENT]
    best = min(found, key=lambda precision: found[precision])
    cells = ", ".join(f"{precision} {taken:.3f} s" for precision, taken in found.items())
    claim = f"An output of 256x256 takes at most {MOST_SECONDS} s (in {best})"
    return Verdict(claim, found[best] <= MOST_SECONDS, f"*{STUDENT}*: {cells}")


def independent_psnr(regression: Scores, energy: float) -> float:
    """Return the PSNR-Y in dB at which draws about a mean have this share of HR's energy, above the mean's own share.

    HR is the mean and a residual; a draw is the mean and s times another residual of that law. Its share of the energy
    is e + s^2 (1 - e), e of the mean, and its squared error that of the mean times 1 + s^2.
    """
    own = regression.mean("texture")
    return regression.mean("psnr_y") - 10 * math.log10(1 + (energy - own) / (1 - own))


def _textured(drawn: Mapping[str, Scores], name: str, regression: Scores) -> Verdict:
    claim = f"It has {LEAST_ENERGY} of HR's high-frequency energy or more at {LEAST_PSNR:g} dB of PSNR-Y or more"
    found = {row: (scores.mean("texture"), scores.mean("psnr_y")) for row, scores in drawn.items()}
    holds = any(energy >= LEAST_ENERGY and quality >= LEAST_PSNR for energy, quality in found.values())
    cells = [f"*{row}* {energy:.3f} at {quality:.2f} dB" for row, (energy, quality) in found.items()]
    independent = independent_psnr(regression, LEAST_ENERGY)
    cells.append(f"independent draws about this regression would have it at {independent:.2f} dB")
    return Verdict(claim, holds, f"{name}: {', '.join(cells)}")


def _beats_gain(sets: Mapping[str, Mapping[str, Scores]]) -> Verdict:
    holds, parts = True, []
    for name, scores in sets.items():
        student, control = scores[STUDENT], scores[CONTROL]
        alike = abs(control.mean("texture") / student.mean("texture") - 1) <= 0.01
        holds &= alike and student.mean("sigma") > control.mean("sigma")
        cells = [f"σ {student.mean('sigma'):.2f} against {control.mean('sigma'):.2f}"]
        for label, measure in (("spectral error", "spectral_error"), ("NIQE", "niqe")):
            mine, other = student.mean(measure), control.mean(measure)
            holds &= mine < other
            cells.append(f"{label} {mine:.2f} against {other:.2f}")
        if not alike:
            cells.append("but the control does not have the student's energy")
        parts.append(f"{name}: {', '.join(cells)}")
    claim = f"Its texture is not mere gain: spectral error, NIQE and σ are better than those of *{CONTROL}*"
    return Verdict(claim, holds, "; ".join(parts))
