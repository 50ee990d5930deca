"""Laws of the model folder: bit for bit, nothing that can run code, and no damaged file is ever a model."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsr_core import presets
from diffsr_core.checkpoint import (
    CARD,
    CONFIG,
    EMA,
    WEIGHTS,
    _digest,
    config_from_json,
    load_model,
    model_files,
    model_from_files,
    save_files,
)
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.networks.srdiff import SRDiffConfig
from diffsr_core.schedule import Schedule
from tests.core.tiny import MODELS, ONE_PASS_TWIN, model_of

MODEL = ModelConfig(
    encoder=RRDBConfig(scale=2, num_features=4, num_blocks=2, head="pixel_shuffle"),
    denoiser=SRDiffConfig(channels=12, hidden=4, multipliers=(1, 2), condition_channels=4, condition_scale=1),
    schedule=Schedule(name="linear", num_timesteps=17),
    anchor="regression",
    space_to_depth=2,
    prediction="v",
)
OTHERS = [
    replace(MODEL, residual_scale=2.5),
    replace(MODEL, residual_clip=False),
    replace(MODEL, told="noise_level"),
    replace(MODEL, prediction="eps"),
    replace(MODEL, anchor="bicubic"),
    replace(MODEL, denoiser=replace(MODEL.denoiser, channels=3, condition_scale=2), space_to_depth=1),  # type: ignore[type-var]
    replace(MODEL, schedule=Schedule(name="cosine", num_timesteps=17)),
    replace(MODEL, schedule=Schedule(name="linear", num_timesteps=18)),
    replace(MODEL, schedule=Schedule(name="linear", num_timesteps=17, last_beta=0.02)),
    replace(MODEL, encoder=replace(MODEL.encoder, num_blocks=3)),
    replace(MODEL, encoder=replace(MODEL.encoder, extra_channels=1)),
    replace(MODEL, anchor="bicubic", anchor_gain=255 / 256),
    replace(MODEL, denoiser=replace(MODEL.denoiser, multipliers=(1, 3))),  # type: ignore[type-var]
    replace(MODEL, denoiser=None),
    *MODELS.values(),
]


def tensors(config: ModelConfig = MODEL, *, seed: int) -> dict[str, Tensor]:
    """Weights in the memory format of training, with the values that a careless format would lose."""
    torch.manual_seed(seed)
    model = SuperResolver(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = model.state_dict()
    first = weights["encoder.conv_first.bias"]
    first[:4] = torch.tensor([-0.0, 1e-42, 3.4e38, torch.finfo(torch.float32).eps])
    return weights


def folder(config: ModelConfig = MODEL, *, preset: str = "tiny", card: str = "# a card") -> dict[str, bytes]:
    return model_files(config, tensors(seed=1), tensors(seed=2), preset=preset, card=card)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        torch.equal(a[k].contiguous().view(torch.int32), b[k].contiguous().view(torch.int32)) for k in a
    )


@pytest.mark.parametrize("ema", [False, True])
def test_a_model_comes_back_bit_for_bit(ema: bool, tmp_path: Path) -> None:
    save_files(tmp_path / "a" / "model", folder())
    model, document = load_model(tmp_path / "a" / "model", ema=ema)
    assert same_bits(model.state_dict(), tensors(seed=2 if ema else 1))
    assert model.config == MODEL and not model.training
    assert document["preset"] == "tiny"


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_kind_of_model_comes_back_with_its_running_statistics(config: ModelConfig) -> None:
    model = model_of(config)
    weights = {
        name: value + 3 if value.dtype == torch.int64 else torch.rand_like(value)
        for name, value in model.state_dict().items()
    }
    found, _ = model_from_files(model_files(config, weights, weights, preset="tiny", card=""))
    assert type(found.encoder) is type(model.encoder) and type(found.denoiser) is type(model.denoiser)
    assert found.config == config and not found.training
    state = found.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in weights.items())


@pytest.mark.parametrize("config", [MODEL, *OTHERS, *(presets.get(name).model for name in presets.names())])
def test_a_configuration_comes_back_from_json(config: ModelConfig) -> None:
    document = json.loads(model_files(config, {}, {}, preset="p", card="")[CONFIG])
    assert config_from_json(document["model"]) == config


def test_a_model_written_again_has_the_same_bytes() -> None:
    files = folder()
    model, document = model_from_files(files, ema=False)
    again = model_files(model.config, model.state_dict(), tensors(seed=2), preset="tiny", card="# a card")
    assert again == files
    assert again[CONFIG] == folder()[CONFIG] and document == json.loads(files[CONFIG])


def test_the_files_are_safetensors_json_and_text_and_hold_no_pickle() -> None:
    files = folder()
    assert sorted(files) == sorted([CONFIG, WEIGHTS, EMA, CARD])
    for name in (WEIGHTS, EMA):
        (length,) = struct.unpack("<Q", files[name][:8])
        header = json.loads(files[name][8 : 8 + length])
        entries = [entry for key, entry in header.items() if key != "__metadata__"]
        assert {entry["dtype"] for entry in entries} == {"F32"}
        assert 8 + length + max(entry["data_offsets"][1] for entry in entries) == len(files[name])
    assert json.loads(files[CONFIG])["format"] == 2
    assert files[CARD] == b"# a card"


def digest(files: dict[str, bytes]) -> str:
    found: str = json.loads(files[CONFIG])["digest"]
    return found


def test_the_digest_is_one_of_weights_and_settings_and_nothing_else() -> None:
    base = digest(folder())
    assert len(base) == 64 and base == digest(folder()) == digest(folder(card="another card"))
    digests = {base, digest(folder(preset="other")), *(digest(folder(config)) for config in OTHERS)}
    assert len(digests) == 2 + len(OTHERS)


@pytest.mark.parametrize("which", [0, 1])
def test_the_digest_changes_with_one_bit_of_any_weight(which: int) -> None:
    digests = {digest(folder())}
    both = [tensors(seed=1), tensors(seed=2)]
    for name, value in list(both[which].items()):
        altered = value.flatten().clone()
        altered.view(torch.int32)[-1] ^= 1
        weights, ema = ({**side, name: altered.view(value.shape)} if side is both[which] else side for side in both)
        digests.add(digest(model_files(MODEL, weights, ema, preset="tiny", card="# a card")))
    assert len(digests) == 1 + len(both[which])


def test_weights_and_ema_are_not_interchangeable() -> None:
    files = folder()
    with pytest.raises(ValueError, match="digest"):
        model_from_files({**files, WEIGHTS: files[EMA], EMA: files[WEIGHTS]})


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, EMA])
def test_a_missing_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    files = folder()
    del files[name]
    with pytest.raises(ValueError, match=f"lacks {name}"):
        model_from_files(files)
    save_files(tmp_path, files)
    with pytest.raises(ValueError, match=f"lacks {name}"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, EMA])
@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_weight_file_is_an_error(name: str, keep: int) -> None:
    files = folder()
    with pytest.raises(ValueError, match=r"digest .* damaged"):
        model_from_files({**files, name: files[name][:keep]})


@pytest.mark.parametrize("name", [WEIGHTS, EMA])
@pytest.mark.parametrize("place", [0, 50, -1])
def test_one_altered_bit_of_a_weight_file_is_an_error(name: str, place: int) -> None:
    data = bytearray(folder()[name])
    data[place] ^= 1
    for ema in (False, True):  # also of the file that is not read
        with pytest.raises(ValueError, match="damaged"):
            model_from_files({**folder(), name: bytes(data)}, ema=ema)


@pytest.mark.parametrize(
    ("before", "after"),
    [('"residual_scale": 2.0', '"residual_scale": 4.0'), ('"preset": "tiny"', '"preset": "huge"'), ('"v"', '"eps"')],
)
def test_an_altered_setting_is_an_error(before: str, after: str) -> None:
    files = folder()
    text = files[CONFIG].decode()
    assert text.count(before) == 1
    with pytest.raises(ValueError, match="damaged"):
        model_from_files({**files, CONFIG: text.replace(before, after).encode()})


@pytest.mark.parametrize("number", [0, 1, 3, "2", None])
def test_a_foreign_format_is_an_error_that_names_it(number: object) -> None:
    files = folder()
    document = {**json.loads(files[CONFIG]), "format": number}
    with pytest.raises(ValueError, match=rf"format \({number}\)"):
        model_from_files({**files, CONFIG: json.dumps(document).encode()})


def altered(files: dict[str, bytes], *path: str, value: object) -> dict[str, bytes]:
    """A folder that says something else with the right digest, as a later version would write it."""
    document = json.loads(files[CONFIG])
    place = document["model"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    settings = {key: document[key] for key in ("format", "preset", "model")}
    document["digest"] = _digest(settings, {name: files[name] for name in (WEIGHTS, EMA)})
    return {**files, CONFIG: json.dumps(document).encode()}


@pytest.mark.parametrize(
    ("config", "path"),
    [(MODEL, ("encoder", "kind")), (MODEL, ("denoiser", "kind")), (ONE_PASS_TWIN, ("encoder", "network", "kind"))],
)
@pytest.mark.parametrize("kind", ["transformer", "", None])
def test_an_unknown_kind_of_network_is_an_error_that_lists_the_known_ones(
    config: ModelConfig, path: tuple[str, ...], kind: object
) -> None:
    weights = SuperResolver(config).state_dict()
    files = model_files(config, weights, weights, preset="tiny", card="")
    known = "rrdb, edsr, interpolation, one_pass" if path == ("encoder", "kind") else "srdiff, sr3, seed3, film"
    with pytest.raises(ValueError, match=rf"network kind \({kind!r}\) must be one of {known}; update DiffSR"):
        model_from_files(altered(files, *path, value=kind))
    assert model_from_files(altered(files, "prediction", value="x_0"))[0].config.prediction == "x_0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("prediction",), "flow", r"prediction \('flow'\)"),
        (("denoiser", "channels"), 3, r"channels \(3\) must be 12"),
        (("schedule", "name"), "sigmoid", r"schedule name \('sigmoid'\)"),
    ],
)
def test_a_setting_that_this_version_does_not_know_is_an_error(
    path: tuple[str, ...], value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_from_files(altered(folder(), *path, value=value))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b"null", b'"text"'])
def test_a_config_that_is_no_json_object_is_an_error_that_names_it(data: bytes) -> None:
    with pytest.raises(ValueError, match=CONFIG):
        model_from_files({**folder(), CONFIG: data})


@pytest.mark.parametrize("key", ["preset", "model", "digest"])
def test_a_config_without_a_key_is_an_error_that_names_both(key: str) -> None:
    files = folder()
    document = json.loads(files[CONFIG])
    del document[key]
    with pytest.raises(ValueError, match=rf"{CONFIG}.*{key}"):
        model_from_files({**files, CONFIG: json.dumps(document).encode()})
