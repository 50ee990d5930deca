"""Importers of the weights that others trained and released: the public SR3 code's, and SRDiff's own.

What such a model needs beside its weights, and `released_model` gives:
    SR3      is told sqrt(alphas_cumprod), and not the angle; linear betas 1e-6 to 1e-2, T = 2000; the condition is the
             bicubic image; it was sampled with the posterior variance and x_0 clipped to [-1, 1]
    SRDiff   enlarges LR / 256, not LR / 255 (an anchor gain of 255/256); diffuses (x_HR - anchor) * 2 clipped to
             [-1, 1]; is told the step t; cosine betas, T = 100

Sources: the names and shapes of github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement at 01d27a7 and of
github.com/LeiaLi/SRDiff at 5628508.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffsr_core.family import ModelConfig
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.networks.rrdb import RRDBConfig, RRDBNet
from diffsr_core.networks.sr3 import SR3Config, SR3UNet
from diffsr_core.networks.srdiff import SRDiffConfig, SRDiffUNet
from diffsr_core.schedule import Schedule

# Both codes keep their schedule beside the weights; ours is computed from its settings.
SCHEDULE_BUFFERS = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}

# (hidden, multipliers, num_blocks) of the two released SR3 files, 16 -> 128 and 64 -> 512, and their numbers of groups.
SR3_GROUPS: dict[tuple[int, tuple[int, ...], int], int] = {
    (64, (1, 2, 4, 8, 8), 2): 32,
    (64, (1, 2, 4, 8, 16), 1): 16,
}

# Our names -> the released ones, applied in this order. What needs arithmetic is in the functions below.
SR3_RULES = (
    (r"^first\.", "downs.0."),
    (r"^embedding\.0\.", "noise_level_mlp.1."),
    (r"^embedding\.2\.", "noise_level_mlp.3."),
    (r"^middle\.([01])\.", r"mid.0.\1."),
    (r"^middle\.2\.", "mid.1.0."),
    (r"^last\.0\.", "final_conv.block.0."),
    (r"^last\.2\.", "final_conv.block.3."),
    (r"\.0\.norm([12])\.", r".res_block.block\1.block.0."),
    (r"\.0\.conv([12])\.", r".res_block.block\1.block.3."),
    (r"\.0\.embed\.", ".res_block.noise_func.noise_func.0."),
    (r"\.0\.skip\.", ".res_block.res_conv."),
    (r"\.1\.(norm|qkv|out)\.", r".attn.\1."),
    (r"^", "denoise_fn."),
)
SRDIFF_RULES = (
    (r"\.embed\.", ".mlp.1."),
    (r"\.skip\.", ".res_conv."),
    (r"\.conv([12])\.", r".block\1.block.1."),
    (r"^(downs\.\d+\.2)\.", r"\1.conv.1."),
    (r"^(ups\.\d+\.2)\.", r"\1.conv.0."),
    (r"^condition\.", "cond_proj."),
    (r"^embedding\.1\.", "mlp.0."),
    (r"^embedding\.3\.", "mlp.2."),
    (r"^middle\.0\.", "mid_block1."),
    (r"^middle\.1\.", "mid_block2."),
    (r"^final\.0\.", "final_conv.0.block.1."),
    (r"^final\.1\.", "final_conv.1."),
    (r"^", "denoise_fn."),
)


class Released(NamedTuple):
    """Settings that the tensors' names and shapes tell, and the weights by our names: `encoder.` and `denoiser.`.

    encoder is None for SR3, whose condition is no network's.
    """

    encoder: RRDBConfig | None
    denoiser: SRDiffConfig | SR3Config
    weights: dict[str, Tensor]


def read_released(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file or of a torch file, out of `state_dict` and `model` where nested.

    Runs no code of the file. ValueError when it holds anything but named tensors; OSError when it cannot be opened.
    """
    try:
        is_safetensors = path.suffix == ".safetensors"
        content = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # foreign bytes can break a reader in any way, and each has its own error for it
        raise ValueError(
            f"weights ({path.name}) cannot be read as plain tensors ({type(error).__name__}), and code that comes with "
            "weights is never run; ask for the file as safetensors"
        ) from error
    for nest in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(nest), dict):
            content = content[nest]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"weights ({path.name}) hold a {type(content).__name__}, they must be named tensors")
    others = [f"{name} ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"weights ({path.name}) must be tensors only, not {_listed(others)}; name the file of weights")
    return dict(content)


def import_sr3(state: Mapping[str, Tensor], *, num_groups: int | None = None) -> Released:
    """Return the model of the public SR3 code (`*_gen.pth`).

    num_groups: no tensor tells it; None is right for the two released files, 32 (16 -> 128) and 16 (64 -> 512).
    Dropout, of which only training knows, is 0. ValueError when the names or shapes are not those of such a model.
    """
    hidden, in_channels = _shape(state, "denoise_fn.downs.0.weight")[:2]
    channels = _shape(state, "denoise_fn.final_conv.block.3.weight")[0]
    levels: list[list[int]] = [[]]  # the width of each block
    factors = []
    for i in range(1, len(state)):
        entry = f"denoise_fn.downs.{i}"
        if f"{entry}.conv.weight" in state:
            levels.append([])
        elif f"{entry}.res_block.block1.block.3.weight" in state:
            levels[-1].append(_shape(state, f"{entry}.res_block.block1.block.3.weight")[0])
            if f"{entry}.attn.qkv.weight" in state:
                factors.append(2 ** (len(levels) - 1))
    if not all(levels):
        raise ValueError(f"weights must have a block in each of their {len(levels)} levels; name a *_gen.pth of SR3")
    multipliers, num_blocks = tuple(level[0] // hidden for level in levels), len(levels[0])
    groups = num_groups or SR3_GROUPS.get((hidden, multipliers, num_blocks))
    if groups is None:
        raise ValueError(
            f"num_groups must be given, as hidden {hidden}, multipliers {multipliers} and {num_blocks} blocks are "
            "neither released file's and no tensor tells it; it is norm_groups in the settings of the training"
        )
    config = SR3Config(
        channels=channels,
        condition_channels=in_channels - channels,
        hidden=hidden,
        multipliers=multipliers,
        num_blocks=num_blocks,
        attention_factors=tuple(sorted(set(factors))),
        num_groups=groups,
        released=True,
    )
    with torch.device("meta"):
        denoiser = SR3UNet(config)
    weights = _renamed(state, {"denoiser": (denoiser, lambda ours: _sr3_name(ours, num_blocks))})
    return Released(None, config, weights)


def import_srdiff(state: Mapping[str, Tensor]) -> Released:
    """Return the model of SRDiff's code. ValueError when the names or shapes are not those of such a model."""
    condition_channels, hidden, kernel, _ = _shape(state, "denoise_fn.cond_proj.weight")
    widths = [
        _shape(state, name)[0]
        for name in (f"denoise_fn.downs.{i}.0.block1.block.1.weight" for i in range(len(state)))
        if name in state
    ]
    encoder = RRDBConfig(
        scale=2 ** sum(re.fullmatch(r"rrdb\.upconv\d+\.weight", name) is not None for name in state),
        num_features=_shape(state, "rrdb.conv_first.weight")[0],
        num_blocks=sum(re.fullmatch(r"rrdb\.RRDB_trunk\.\d+\.RDB1\.conv1\.weight", name) is not None for name in state),
    )
    config = SRDiffConfig(
        hidden=hidden,
        multipliers=tuple(width // hidden for width in widths),
        condition_channels=condition_channels,
        condition_scale=kernel // 2,
    )
    for name, found, wanted in (
        ("scale", config.condition_scale, encoder.scale),
        ("condition channels", config.condition_channels, encoder.condition_channels),
    ):
        if found != wanted:
            raise ValueError(f"{name} of the denoiser ({found}) must be the encoder's, {wanted}; take both of one file")
    with torch.device("meta"):
        networks = {"encoder": (RRDBNet(encoder), _rrdb_name), "denoiser": (SRDiffUNet(config), _srdiff_name)}
    return Released(encoder, config, _renamed(state, networks))


def released_model(
    path: Path, *, scale: int | None = None, num_groups: int | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the whole model of a released file, with its quirks, and its weights.

    scale: SR3's files do not tell it, None is 8 for the two released; SRDiff's tell it, None or the same is right.
    num_groups: see `import_sr3`. ValueError for a file that is not such a model, or another scale than SRDiff's.
    """
    state = read_released(path)
    if "rrdb.conv_first.weight" in state:
        found = import_srdiff(state)
        assert found.encoder is not None
        if scale not in (None, found.encoder.scale):
            raise ValueError(f"scale ({scale}) must be that of the file, {found.encoder.scale}; leave it out")
        if num_groups is not None:
            raise ValueError(f"num_groups ({num_groups}) is of SR3's networks, SRDiff's have no groups; leave it out")
        schedule = Schedule(name="cosine", num_timesteps=100)
        config = ModelConfig(
            encoder=found.encoder, denoiser=found.denoiser, schedule=schedule, anchor_gain=255 / 256, told="step"
        )
        return config, found.weights
    found = import_sr3(state, num_groups=num_groups)
    shape = (found.denoiser.hidden, found.denoiser.multipliers, getattr(found.denoiser, "num_blocks", 0))
    if scale is None and shape not in SR3_GROUPS:
        raise ValueError("scale must be given, as this is neither released file and no tensor tells it; use 8 or 4")
    config = ModelConfig(
        encoder=InterpolationConfig(scale=scale or 8, channels=found.denoiser.channels),
        denoiser=found.denoiser,
        schedule=Schedule(name="linear", num_timesteps=2000),
        anchor="zero",
        residual_scale=1.0,
        told="amplitude",
    )
    return config, found.weights


def _renamed(
    state: Mapping[str, Tensor], networks: Mapping[str, tuple[nn.Module, Callable[[str], str]]]
) -> dict[str, Tensor]:
    """Return the state by our names in float32; `networks` has each part's network and our name -> the released one."""
    ours, shapes = {}, {}
    for part, (network, released) in networks.items():
        for name, value in network.state_dict().items():
            ours[released(name)] = f"{part}.{name}"
            shapes[released(name)] = value.shape
    faults = {
        "missing": [name for name in ours if name not in state],
        "unknown": [name for name in state if name not in ours and name not in SCHEDULE_BUFFERS],
        "of another shape": [name for name in ours if name in state and state[name].shape != shapes[name]],
    }
    if any(faults.values()):
        found = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"weights must be those of a released model, name for name ({found}); name another file")
    return {name: state[released].detach().float() for released, name in ours.items()}


def _sr3_name(ours: str, num_blocks: int) -> str:
    """Return the released name; there the first convolution and every resampling count as entries of the way."""

    def entry(match: re.Match[str]) -> str:
        way, i, resampling = match[1], int(match[2]), match[3] is not None
        i += 1 if way == "downs" else i // (num_blocks + 1) + resampling
        return f"{way}.{i}." + ("conv." if resampling else "")

    return _substituted(re.sub(r"^(downs|ups)\.(\d+)\.(\d\.conv\.)?", entry, ours), SR3_RULES)


def _srdiff_name(ours: str) -> str:
    return _substituted(ours, SRDIFF_RULES)


def _rrdb_name(ours: str) -> str:
    """Return the released name; there dense blocks and convolutions are counted from 1."""
    name = re.sub(
        r"^trunk\.(\d+)\.(\d)\.convs\.(\d)",
        lambda match: f"RRDB_trunk.{match[1]}.RDB{int(match[2]) + 1}.conv{int(match[3]) + 1}",
        ours,
    )
    name = re.sub(r"^upconvs\.(\d)", lambda match: f"upconv{int(match[1]) + 1}", name)
    return "rrdb." + name.replace("hr_conv", "HRconv")


def _substituted(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a convolution's weight; ValueError when the state has none of this name."""
    if name not in state or state[name].ndim != 4 or 0 in state[name].shape:
        raise ValueError(f"weights must have a convolution {name} to be of such a model; name another file")
    return tuple(state[name].shape)


def _listed(names: list[str]) -> str:
    """Return the first few of the names, and how many there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
