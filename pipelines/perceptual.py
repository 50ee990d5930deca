"""What the perceptual metrics need from files: the LPIPS network, NIQE's statistics, features for FID, KID and IS.

Nothing is downloaded. A file that is not there is an error that says which, where it is published and where to put it.
"""

import os
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file as load_tensors
from torch import Tensor, nn

from diffsr_core.distributions import Moments
from diffsr_core.niqe import Pristine

Backbone = Literal["alex", "vgg"]

# Convolutions (channels, kernel, stride, padding) and poolings (kernel, stride) in torchvision's order, ReLU after each
# convolution; LPIPS reads some of the ReLUs. The list ends with the last of them: what follows is never run.
_LAYERS: dict[str, list[tuple[int, ...]]] = {
    "alex": [(64, 11, 4, 2), (3, 2), (192, 5, 1, 2), (3, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)],
    "vgg": [
        *[(64, 3, 1, 1)] * 2,
        *[(2, 2), *[(128, 3, 1, 1)] * 2],
        *[(2, 2), *[(256, 3, 1, 1)] * 3],
        *[(2, 2), *[(512, 3, 1, 1)] * 3],
        *[(2, 2), *[(512, 3, 1, 1)] * 3],
    ],
}
_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
_SMALLEST_PX = {"alex": 31, "vgg": 16}
_BACKBONE_FILE = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
_BACKBONE_URL = "https://download.pytorch.org/models/"
_HEADS_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/"
_SHIFT, _SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def cache_folder() -> Path:
    """Return the user's folder for weights of metrics: `$XDG_CACHE_HOME/diffsr/lpips`, below ~/.cache where not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffsr" / "lpips"


def load_lpips(
    net: Backbone = "alex",
    *,
    folder: str | Path | None = None,
    backbone: str | Path | None = None,
    heads: str | Path | None = None,
) -> "Lpips":
    """Return the LPIPS network (version 0.1) in evaluation mode, without gradients for its weights.

    backbone: torchvision's state dict (keys `features.N.weight` and `.bias`; others are ignored). heads: the published
    linear layers (keys `linK.model.1.weight`). Both .pth (read as tensors only) or .safetensors; where a path is not
    given, the file's published name in folder, or in cache_folder(). Raises ValueError for another net, or a file that
    is missing, unreadable, or does not hold this network.
    """
    if net not in _LAYERS:
        raise ValueError(f"net is {net!r}: it must be one of {sorted(_LAYERS)}; the SR papers use alex")
    home = Path(folder or cache_folder())
    stack, lins_file = Path(backbone or home / _BACKBONE_FILE[net]), Path(heads or home / f"{net}.pth")
    found = read_weights(stack, reader="LPIPS", url=_BACKBONE_URL + _BACKBONE_FILE[net])
    lins = read_weights(lins_file, reader="LPIPS", url=f"{_HEADS_URL}{net}.pth")
    with torch.device("meta"):  # no memory and no draw from the global generator for weights that are replaced
        model = Lpips(net)
    wanted = model.state_dict()
    weights = {}
    for name, own in wanted.items():
        kind, _, rest = name.partition(".")
        source, key = (found, name) if kind == "features" else (lins, f"lin{rest.split('.')[0]}.model.1.weight")
        if key not in source or source[key].shape != own.shape:
            held = f"of shape {tuple(source[key].shape)}" if key in source else "missing"
            raise ValueError(
                f"{'backbone' if source is found else 'heads'}: {key} is {held}, must be {tuple(own.shape)} for net "
                f"{net!r}; give the file of this network"
            )
        weights[name] = source[key].float()
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def read_pristine(path: str | Path) -> Pristine:
    """Return NIQE's statistics from an .npz with BasicSR's names: mu_pris_param, cov_pris_param, gaussian_window.

    Raises ValueError for a missing or unreadable file, another name or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance, window = (file[k] for k in ("mu_pris_param", "cov_pris_param", "gaussian_window"))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"path is {str(path)!r}: it must be NIQE's niqe_pris_params.npz, as in BasicSR's basicsr/metrics "
            f"({type(error).__name__})"
        ) from error
    if (mean.size, covariance.shape, window.shape) != (36, (36, 36), (7, 7)):
        raise ValueError(
            f"path is {str(path)!r}: it holds shapes {mean.shape}, {covariance.shape}, {window.shape}; NIQE's are 36 "
            "numbers, (36, 36) and (7, 7)"
        )
    return Pristine(mean.reshape(36).astype(np.float64), covariance.astype(np.float64), window.astype(np.float64))


def read_features(path: str | Path) -> np.ndarray:
    """Return the features (N, D) of an .npy, or of a .safetensors that holds one tensor or one named `features`.

    Raises ValueError for a missing or unreadable file, another suffix, another number of dimensions.
    """
    place, suffix = str(path), Path(path).suffix
    if suffix not in (".npy", ".safetensors"):
        raise ValueError(f"path is {place!r}: features are read from .npy and .safetensors; convert the file")
    try:
        if suffix == ".npy":
            features: np.ndarray = np.load(path, allow_pickle=False)
        else:
            tensors = load_arrays(path)
            features = tensors["features"] if len(tensors) != 1 else next(iter(tensors.values()))
    except (OSError, ValueError, KeyError, EOFError, SafetensorError) as error:
        raise ValueError(f"path is {place!r}: no features could be read: {type(error).__name__}: {error}") from error
    if features.ndim != 2:
        raise ValueError(f"path is {place!r}: it holds shape {features.shape}; features are (N, D), one row per image")
    return features


def read_reference(path: str | Path) -> Moments | np.ndarray:
    """Return what FID compares with: moments, of an .npz with `mu` and `sigma` as pytorch-fid writes it, or features.

    Raises ValueError as read_features does, and for moments whose shapes do not fit or that are not finite.
    """
    if Path(path).suffix != ".npz":
        return read_features(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"path is {str(path)!r}: an .npz must hold mu and sigma, as pytorch-fid's --save-stats writes them: {error}"
        ) from error
    if mean.ndim != 1 or covariance.shape != mean.shape * 2 or not np.isfinite(covariance).all():
        raise ValueError(
            f"path is {str(path)!r}: mu has shape {mean.shape} and sigma {covariance.shape}; they must be (D,) and "
            "(D, D), and finite"
        )
    return Moments(mean, covariance)


def read_weights(path: Path, *, reader: str, url: str) -> dict[str, Tensor]:
    """Return the tensors of a .pth (read as tensors only) or .safetensors file; reader: who needs it, for the message.

    Raises ValueError for a file that is missing or unreadable, or holds no state dict.
    """
    if not path.is_file():
        raise ValueError(
            f"{reader} needs {path}, which is not there; nothing is downloaded: fetch {url} and put it there, or give "
            "the path of your copy"
        )
    try:
        if path.suffix == ".safetensors":
            # Copied out of the mapped file: where a weight lies in memory decides how its sums are rounded.
            return {key: value.clone() for key, value in load_tensors(path).items()}
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no closed list of what bad bytes raise
        raise ValueError(f"{path} could not be read as weights: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}: it must be a state dict, as published at {url}")
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


class Lpips(nn.Module):
    """The learned perceptual distance (Zhang et al., "The unreasonable effectiveness of deep features", 2018).

    Made with random weights: load_lpips gives the metric.
    """

    def __init__(self, net: Backbone) -> None:
        super().__init__()
        self.net = net
        modules: list[nn.Module] = []
        widths = []
        channels = 3
        for layer in _LAYERS[net]:
            if len(layer) == 2:
                modules.append(nn.MaxPool2d(*layer))
            else:
                width, kernel, stride, padding = layer
                modules += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
                channels = width
                if len(modules) - 1 in _TAPS[net]:
                    widths.append(width)
        self.features = nn.Sequential(*modules)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.smallest_px = _SMALLEST_PX[net]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance (N,) of RGB images (N, 3, H, W) in [-1, 1], 0 or more; no border is left out.

        At each of five depths the features are scaled to unit length per pixel, and the squared difference is weighted
        by the head and averaged over pixels; the sum is returned.
        Raises ValueError for other shapes or too small a side.
        """
        smallest = self.smallest_px
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < smallest:
            raise ValueError(
                f"shapes are {tuple(a.shape)} and {tuple(b.shape)}: both must be one (N, 3, H, W) of at least "
                f"{smallest} px each way; repeat a grey channel three times"
            )
        x = torch.cat([a, b])
        x = (x - x.new_tensor(_SHIFT)[:, None, None]) / x.new_tensor(_SPREAD)[:, None, None]
        total = x.new_zeros(len(a))
        depths = iter(self.heads)
        for index, module in enumerate(self.features):
            x = module(x)
            if index in _TAPS[self.net]:
                # The authors add 1e-10 to the root instead, whose gradient is infinite where all features are 0.
                unit = x / torch.sqrt(1e-8 + x.square().sum(dim=1, keepdim=True))
                first, second = unit.chunk(2)
                total = total + next(depths)((first - second).square()).mean(dim=(1, 2, 3))
        return total
