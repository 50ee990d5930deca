"""Laws of the importers: a released file becomes settings and weights, name for name, and nothing in it is run."""

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffsr_core.importers import Released, import_sr3, import_srdiff, read_released
from diffsr_core.networks.rrdb import RRDBConfig, RRDBNet
from diffsr_core.networks.sr3 import SR3Config, SR3UNet
from diffsr_core.networks.srdiff import SRDiffConfig, SRDiffUNet

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
SR3 = "sr3_unofficial_tiny"
SRDIFF = ["srdiff_tiny_celeba_x8", "srdiff_tiny_df2k_x4"]

# What both public codes register beside the network.
BUFFERS = {
    "betas": torch.zeros(3),
    "sqrt_recipm1_alphas_cumprod": torch.zeros(3),
    "posterior_mean_coef2": torch.ones(3),
}


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(released weights, settings, tensors that the reference implementation made of them)."""
    if not (GOLDEN / f"{name}.json").is_file():
        pytest.skip("the golden tensors of the reference implementations lie beside the checkout, not in it: none here")
    weights, made = (load_file(GOLDEN / f"{name}.{kind}.safetensors") for kind in ("weights", "io"))
    return weights, json.loads((GOLDEN / f"{name}.json").read_text()), made


def loaded(network: nn.Module, released: Released, part: str) -> nn.Module:
    prefix = f"{part}."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in released.weights.items() if k.startswith(prefix)})
    return network.eval()


@torch.no_grad()
def test_an_sr3_file_gives_the_settings_and_the_output_of_the_code_that_wrote_it(tmp_path: Path) -> None:
    weights, settings, io = golden(SR3)
    torch.save(OrderedDict({**weights, **BUFFERS}), tmp_path / "I640000_E37_gen.pth")
    released = import_sr3(read_released(tmp_path / "I640000_E37_gen.pth"), num_groups=settings["norm_groups"])
    assert released.encoder is None
    assert released.denoiser == SR3Config(
        channels=settings["out_channel"],
        condition_channels=settings["in_channel"] - settings["out_channel"],
        hidden=settings["inner_channel"],
        multipliers=tuple(settings["channel_mults"]),
        num_blocks=settings["res_blocks"],
        attention_factors=tuple(settings["image_size"] // size for size in settings["attn_res"]),
        num_groups=settings["norm_groups"],
        released=True,
    )
    assert len(released.weights) == settings["keys"]
    net = loaded(SR3UNet(released.denoiser), released, "denoiser")
    condition, x_t = io["net_input"].chunk(2, dim=1)
    assert (net(x_t, io["net_noise_level"][:, 0], condition) - io["net_output"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", SRDIFF)
@torch.no_grad()
def test_an_srdiff_file_gives_the_settings_and_the_output_of_the_code_that_wrote_it(name: str, tmp_path: Path) -> None:
    weights, settings, io = golden(name)
    model = OrderedDict({**weights, **BUFFERS})
    optimizer = {
        "state": {0: {"step": 7, "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.99)}],
    }
    torch.save(
        {"global_step": 7, "optimizer_states": [optimizer], "state_dict": {"model": model}}, tmp_path / "model.ckpt"
    )
    released = import_srdiff(read_released(tmp_path / "model.ckpt"))
    assert released.encoder == RRDBConfig(
        scale=settings["scale"], num_features=settings["rrdb_num_feat"], num_blocks=settings["rrdb_num_block"]
    )
    assert released.denoiser == SRDiffConfig(
        hidden=settings["hidden_size"],
        multipliers=tuple(settings["dim_mults"]),
        condition_channels=released.encoder.condition_channels,
        condition_scale=settings["scale"],
    )
    assert (
        sum(value.numel() for value in released.weights.values()) == settings["unet_params"] + settings["rrdb_params"]
    )
    features, image = loaded(RRDBNet(released.encoder), released, "encoder")(io["lr"])
    assert (image.clamp(-1, 1) - io["rrdb_output"]).abs().max() < 1e-5
    found = loaded(SRDiffUNet(released.denoiser), released, "denoiser")(io["x_t"], io["t"], features)
    assert (found - io["unet_output"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("multipliers", "num_blocks", "factors", "groups"), [((1, 2, 4, 8, 8), 2, (8,), 32), ((1, 2, 4, 8, 16), 1, (), 16)]
)
def test_the_groups_of_the_two_released_sr3_files_are_known(
    multipliers: tuple[int, ...], num_blocks: int, factors: tuple[int, ...], groups: int
) -> None:
    config = SR3Config(
        hidden=64,
        multipliers=multipliers,
        num_blocks=num_blocks,
        attention_factors=factors,
        num_groups=groups,
        released=True,
    )
    assert import_sr3(released_names(config)).denoiser == config


def released_names(config: SR3Config) -> dict[str, Tensor]:
    """Tensors on the meta device with the names that the public code gives a network of these settings."""
    state: dict[str, tuple[int, ...]] = {}

    def conv(name: str, fan_in: int, fan_out: int, kernel: int = 3, bias: bool = True) -> None:
        state[f"{name}.weight"] = (fan_out, fan_in, kernel, kernel)
        if bias:
            state[f"{name}.bias"] = (fan_out,)

    def pair(name: str, *shape: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, fan_in: int, width: int, attention: bool) -> None:
        for i, channels in ((1, fan_in), (2, width)):
            pair(f"{name}.res_block.block{i}.block.0", channels)
            conv(f"{name}.res_block.block{i}.block.3", channels, width)
        pair(f"{name}.res_block.noise_func.noise_func.0", width, config.hidden)
        if fan_in != width:
            conv(f"{name}.res_block.res_conv", fan_in, width, 1)
        if attention:
            pair(f"{name}.attn.norm", width)
            conv(f"{name}.attn.qkv", width, 3 * width, 1, bias=False)
            conv(f"{name}.attn.out", width, width, 1)

    pair("noise_level_mlp.1", 4 * config.hidden, config.hidden)
    pair("noise_level_mlp.3", config.hidden, 4 * config.hidden)
    conv("downs.0", config.condition_channels + config.channels, config.hidden)
    skips, levels, i = [config.hidden], list(enumerate(config.multipliers)), 1
    for level, multiplier in levels:
        width = config.hidden * multiplier
        for _ in range(config.num_blocks):
            block(f"downs.{i}", skips[-1], width, 2**level in config.attention_factors)
            skips.append(width)
            i += 1
        if level < len(levels) - 1:
            conv(f"downs.{i}.conv", width, width)
            skips.append(width)
            i += 1
    block("mid.0", width, width, True)
    block("mid.1", width, width, False)
    seen, i = width, 0
    for level, multiplier in reversed(levels):
        width = config.hidden * multiplier
        for _ in range(config.num_blocks + 1):
            block(f"ups.{i}", seen + skips.pop(), width, 2**level in config.attention_factors)
            seen, i = width, i + 1
        if level:
            conv(f"ups.{i}.conv", width, width)
            i += 1
    pair("final_conv.block.0", seen)
    conv("final_conv.block.3", seen, config.channels)
    return {f"denoise_fn.{name}": torch.empty(shape, device="meta") for name, shape in state.items()}


def test_the_names_that_these_tests_make_up_are_those_of_the_public_code() -> None:
    weights, settings, _ = golden(SR3)
    config = import_sr3(weights, num_groups=settings["norm_groups"]).denoiser
    assert isinstance(config, SR3Config)
    assert {k: v.shape for k, v in released_names(config).items()} == {k: v.shape for k, v in weights.items()}


def test_another_sr3_file_must_say_its_groups() -> None:
    weights, _, _ = golden(SR3)
    with pytest.raises(ValueError, match=r"num_groups must be given.*\(1, 2, 4\).*norm_groups"):
        import_sr3(weights)
    with pytest.raises(ValueError, match=r"multiple of num_groups \(5\)"):
        import_sr3(weights, num_groups=5)


def imported(name: str, weights: dict[str, Tensor]) -> Released:
    return import_sr3(weights, num_groups=8) if name == SR3 else import_srdiff(weights)


@pytest.mark.parametrize("name", [SR3, *SRDIFF])
def test_every_tensor_lands_once_unchanged_and_in_float32(name: str) -> None:
    weights, _, _ = golden(name)
    found = imported(name, {key: value.double() for key, value in weights.items()}).weights
    assert all(value.dtype == torch.float32 for value in found.values())
    fingerprints = [sorted((tuple(v.shape), float(v.double().sum())) for v in d.values()) for d in (found, weights)]
    assert fingerprints[0] == fingerprints[1]
    assert {key.split(".")[0] for key in found} == ({"denoiser"} if name == SR3 else {"encoder", "denoiser"})


@pytest.mark.parametrize("name", [SR3, *SRDIFF])
def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(name: str) -> None:
    weights, _, _ = golden(name)
    lost, bent = sorted(key for key in weights if key.endswith(".bias") and "downs." in key)[:2]
    changed = {key: value for key, value in weights.items() if key != lost}
    changed |= {bent: weights[bent][:-1], "denoise_fn.extra.gate": torch.zeros(1), "ema.weight": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        imported(name, changed)
    text = str(caught.value)
    assert f"missing: {lost};" in text
    assert "unknown: denoise_fn.extra.gate, ema.weight;" in text
    assert f"of another shape: {bent})" in text


@pytest.mark.parametrize("name", [SR3, *SRDIFF])
def test_losing_any_one_tensor_is_an_error(name: str) -> None:
    weights, _, _ = golden(name)
    for key in sorted(weights)[:: len(weights) // 6]:
        with pytest.raises(ValueError):
            imported(name, {other: value for other, value in weights.items() if other != key})


def test_a_long_list_of_faults_is_cut_and_counted() -> None:
    weights, _, _ = golden(SR3)
    weights |= {f"foreign.{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(ValueError, match=r"unknown: foreign\.0, .*foreign\.7 and 12 more"):
        import_sr3(weights, num_groups=8)


def test_the_file_of_one_model_is_not_the_other() -> None:
    with pytest.raises(ValueError, match=r"denoise_fn\.downs\.0\.weight"):
        import_sr3(golden(SRDIFF[0])[0])
    with pytest.raises(ValueError, match=r"denoise_fn\.cond_proj\.weight"):
        import_srdiff(golden(SR3)[0])
    with pytest.raises(ValueError, match=r"denoise_fn\.downs\.0\.weight"):
        import_sr3({})


def test_an_encoder_of_another_scale_or_width_is_refused() -> None:
    x8, x4 = golden(SRDIFF[0])[0], golden(SRDIFF[1])[0]
    mixed = {k: v for k, v in x8.items() if k.startswith("denoise_fn.")} | {
        k: v for k, v in x4.items() if k.startswith("rrdb.")
    }
    with pytest.raises(ValueError, match=r"scale of the denoiser \(8\) must be the encoder's, 4"):
        import_srdiff(mixed)


class Hostile:
    """A pickle of this writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_file_is_an_error_and_is_not_run(tmp_path: Path, legacy: bool) -> None:
    marker, path = tmp_path / "owned", tmp_path / "I640000_E37_gen.pth"
    content = {"denoise_fn.downs.0.weight": torch.zeros(1), "betas": Hostile(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"I640000_E37_gen\.pth.*code that comes with weights is never run"):
        read_released(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the proof that the file is hostile
    assert marker.exists()


def test_a_bare_pickle_a_torn_file_and_a_text_are_errors(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    marker = tmp_path / "owned"
    files = {
        "bare.pth": pickle.dumps(Hostile(marker), protocol=2),
        "torn.pth": (tmp_path / "whole.pth").read_bytes()[:1500],
        "torn.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:1500],
        "text.pth": b"<html>quota exceeded</html>",
        "empty.pth": b"",
        "empty.safetensors": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"weights \({name}\) cannot be read as plain tensors"):
            read_released(tmp_path / name)
    assert not marker.exists()


def test_what_is_no_mapping_of_tensors_is_an_error_that_says_what_it_is(tmp_path: Path) -> None:
    for content, message in (
        ([torch.zeros(1)], "hold a list"),
        ({}, "hold a dict"),
        ({"a": torch.zeros(1), "epoch": 3}, r"not epoch \(int\)"),
        ({"state_dict": {"model": {"a": [torch.zeros(1)]}}}, r"not a \(list\)"),
    ):
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=message):
            read_released(tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError):
        read_released(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError):
        read_released(tmp_path / "absent.safetensors")


def test_a_safetensors_file_is_read_as_a_torch_file_is(tmp_path: Path) -> None:
    state = {"denoise_fn.a": torch.arange(6.0).reshape(2, 3), "betas": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pth")
    for name in ("model.safetensors", "model.pth"):
        found = read_released(tmp_path / name)
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
