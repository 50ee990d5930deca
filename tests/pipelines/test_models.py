"""Laws of pipelines.models: a reference is a whole, undamaged model or an error; a copy is whole or none."""

import json
from dataclasses import replace

import pytest
import torch

from diffsr_core.checkpoint import (
    CARD,
    CONFIG,
    EMA,
    SAMPLING,
    SCHEDULE,
    WEIGHTS,
    load_model,
    model_files,
    model_from_files,
    own_schedule,
    released_files,
    save_files,
    schedule_json,
)
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.sampling import ONE_STEP, SamplingRecipe
from pipelines import shipped, storage
from pipelines.models import FOLDER_FILES, MODEL_FILES, load_files, publish_files, publish_model, resolve
from pipelines.pictures import usual_params
from pipelines.sampling import SamplingConfig
from tests.core.tiny import ANCHORED


@pytest.fixture(scope="module")
def files():
    torch.manual_seed(0)
    config = ModelConfig(encoder=RRDBConfig(scale=2, num_features=4, num_blocks=3), denoiser=None, anchor="regression")
    weights = SuperResolver(config).state_dict()
    ema = {name: value + 1 for name, value in weights.items()}
    return model_files(config, weights, ema, preset="tiny", card="# tiny\n")


@pytest.fixture
def folder(files, tmp_path):
    save_files(tmp_path / "model", files)
    return tmp_path / "model"


@pytest.mark.parametrize("form", [str, lambda path: f"file://{path}", lambda path: f"{path}/"])
def test_a_folder_is_resolved_to_its_files_and_digest(folder, files, form):
    model = resolve(form(folder))
    assert model.files == files and model.digest == json.loads(files[CONFIG])["digest"]
    assert (model.label, model.version) == (form(folder), None)


def test_what_is_no_model_folder_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "file", "empty"):
        with pytest.raises(ValueError, match=f"{name}.*must be a folder with config.json"):
            resolve(str(tmp_path / name))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, EMA])
def test_a_folder_that_lacks_a_file_is_refused_and_the_file_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"(?s){folder}.*lacks {name}"):
        resolve(str(folder))


@pytest.mark.parametrize("name", [WEIGHTS, EMA])
@pytest.mark.parametrize("change", [lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: d[:-4], lambda d: b""])
def test_altered_or_cut_weights_are_refused(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{folder}.*damaged"):
        resolve(str(folder))


def alter(document, **fields):
    return json.dumps({**json.loads(document), **fields}).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: b"",
        lambda d: d[:-10],
        lambda d: b"[]",
        lambda d: b'{"format": 1}',
        lambda d: alter(d, digest="0" * 64),
        lambda d: alter(d, preset="other"),
        lambda d: alter(d, format=3),
        lambda d: json.dumps({k: v for k, v in json.loads(d).items() if k != "digest"}).encode(),
    ],
    ids=["empty", "cut", "a list", "bare", "other digest", "other preset", "other format", "no digest"],
)
def test_an_altered_config_is_a_value_error_that_names_the_model(folder, change):
    (folder / CONFIG).write_bytes(change((folder / CONFIG).read_bytes()))
    with pytest.raises(ValueError, match=str(folder)):
        resolve(str(folder))


def test_a_name_that_does_not_ship_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match="pretrained:any.*use one of them: pretrained:diffsr-x4"):
        resolve("pretrained:any")


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_model_is_whole_small_and_drawn_in_one_step(name):
    found = resolve(f"pretrained:{name}")
    network, _ = model_from_files(found.files)
    assert network.config.one_step and network.config.scale == int(name.split("-x")[1][0])
    assert {key: found.sampling[key] for key in SCHEDULE} == {
        "sampler": "ddim", "grid": "uniform", "num_steps": 1, "start_level": network.config.start_level or 0.0
    }  # fmt: skip
    assert sum(weight.numel() for weight in network.parameters()) <= 6_000_000
    assert sum(map(len, found.files.values())) <= 24 * 2**20
    assert all(bool(weight.isfinite().all()) for weight in network.parameters())
    card = found.files[CARD].decode()
    assert all(f"## {part}" in card for part in ("Data", "Training", "Scores", "Limits", "Attribution"))


def test_a_released_model_is_its_average_in_half_precision_and_another_model(folder, files):
    released = released_files(files, card="# Ours")
    assert set(released) == {CONFIG, WEIGHTS, CARD} and released[CARD] == b"# Ours"
    assert len(released[WEIGHTS]) < 0.3 * sum(len(files[name]) for name in (WEIGHTS, EMA))
    (before, document), (after, again) = model_from_files(files), model_from_files(released)
    assert document["digest"] != again["digest"] and before.config == after.config
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight.half().float()), name
    with pytest.raises(ValueError, match=f"lacks {WEIGHTS}"):
        model_from_files({name: data for name, data in released.items() if name != WEIGHTS})


def test_a_config_that_names_other_weights_is_refused(folder):
    (folder / CONFIG).write_bytes(alter((folder / CONFIG).read_bytes(), weights=["config.json"]))
    with pytest.raises(ValueError, match="names the weights"):
        resolve(str(folder))


@pytest.mark.parametrize("one_step", [False, True])
def test_a_model_says_which_projection_its_training_allows_and_a_flag_says_otherwise(one_step):
    config = replace(ANCHORED, one_step=one_step, consistency="low-band")
    weights = SuperResolver(config).state_dict()
    files = model_files(config, weights, weights, preset="tiny", card="")
    found = own_schedule(files, config)
    assert found == {"consistency": "low-band"} | ({**ONE_STEP, "start_level": 0.0} if one_step else {})
    assert SamplingConfig().sampling(found) == replace(SamplingConfig().sampling(), **found)
    assert SamplingConfig(consistency="interval").sampling(found).consistency == "interval"
    assert usual_params(files)["consistency"] == "low-band"
    with pytest.raises(ValueError, match="consistency \\('strict'\\) must be one of"):
        replace(config, consistency="strict")


def test_a_model_of_one_step_is_asked_for_one_step_and_no_other():
    config = replace(ANCHORED, one_step=True)
    weights = SuperResolver(config).state_dict()
    files = model_files(config, weights, weights, preset="tiny", card="")
    assert own_schedule(files, config) == {"sampler": "ddim", "grid": "uniform", "num_steps": 1, "start_level": 0.0}
    assert own_schedule(files, ANCHORED) is None
    assert usual_params(files)["steps"] == 1
    for asked in ({"num_steps": 8}, {"num_steps": 1, "sampler": "sr3"}):
        with pytest.raises(ValueError, match="trained to draw in one step"):
            SamplingRecipe(**asked).check_fits(config)
    with pytest.raises(ValueError, match="start_level \\(0.5\\) must be 0: this model was trained to draw from noise"):
        SamplingRecipe(num_steps=1, start_level=0.5).check_fits(config)
    SamplingRecipe(num_steps=1).check_fits(config)


def test_a_model_that_draws_from_any_level_is_drawn_from_its_own_unless_a_flag_says_otherwise():
    config = replace(ANCHORED, one_step=True, start_level=0.6)
    weights = SuperResolver(config).state_dict()
    files = model_files(config, weights, weights, preset="tiny", card="")
    own = own_schedule(files, config)
    assert own == {"sampler": "ddim", "grid": "uniform", "num_steps": 1, "start_level": 0.6}
    assert usual_params(files)["start_level"] == 0.6
    for flag, level in ((None, 0.6), (0.0, 0.0), (0.9, 0.9)):
        recipe = SamplingConfig(start_level=flag).sampling(own)
        assert recipe.start_level == level
        recipe.check_fits(config)
    for wrong in ({"start_level": 1.0}, {"start_level": -0.1}, {"one_step": False}):
        with pytest.raises(
            ValueError, match="start_level \\(.*\\) (must be a level of the schedule|is of models of one)"
        ):
            replace(config, **wrong)


def test_a_model_is_published_once_with_its_config_last(folder, files, tmp_path, monkeypatch):
    publish, written = storage.publish, []
    monkeypatch.setattr(storage, "publish", lambda uri, data: (written.append(uri), publish(uri, data)))
    model, output = resolve(str(folder)), str(tmp_path / "out")
    uri = publish_model(model, output)
    assert uri.endswith(f"/_diffsr/models/{model.digest}") and load_files(uri) == files
    assert sorted(written) == sorted(storage.join(uri, name) for name in files)
    assert written[-1] == storage.join(uri, CONFIG)
    assert publish_model(model, output) == uri and len(written) == len(files)
    assert resolve(uri).digest == model.digest


def test_a_copy_that_was_cut_short_is_no_model_and_is_made_again(folder, files, tmp_path, monkeypatch):
    model, output, publish = resolve(str(folder)), str(tmp_path / "out"), storage.publish

    def cut_short(uri, data):
        if uri.endswith(CONFIG):
            raise KeyboardInterrupt
        publish(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", cut_short)
        with pytest.raises(KeyboardInterrupt):
            publish_model(model, output)
    uri = storage.join(output, "_diffsr", "models", model.digest)
    with pytest.raises(ValueError, match="lacks config.json"):
        resolve(uri)
    assert load_files(publish_model(model, output)) == files


def test_only_the_files_of_a_model_are_copied(files, tmp_path):
    uri = str(tmp_path / "copy")
    publish_files(uri, {**files, "notes.pkl": b"code"})
    assert storage.list_names(uri) == sorted(MODEL_FILES) == sorted([CARD, CONFIG, EMA, WEIGHTS])
    (tmp_path / "copy" / "notes.pkl").write_bytes(b"code")
    assert set(load_files(uri)) == set(MODEL_FILES)
    assert set(FOLDER_FILES) == {*MODEL_FILES, SAMPLING} and FOLDER_FILES[-1] == CONFIG


# The schedule that was found for a network lies beside its weights.


def schedule(files, **evidence):
    found = {"model": json.loads(files[CONFIG])["digest"], "data": "d" * 64, "measure": "psnr_y", "value": 30.5,
             "interval": [30, 31.0], "device_s_per_mp": 0.25}  # fmt: skip
    return {"sampler": "dpmpp-2m", "grid": "karras", "num_steps": 5, "start_level": 0, "evidence": found | evidence}


def test_a_schedule_is_resolved_and_the_network_keeps_its_digest(folder, files):
    before = resolve(str(folder))
    (folder / SAMPLING).write_bytes(schedule_json(schedule(files)))
    after = resolve(str(folder))
    assert before.sampling is None and after.sampling == schedule(files)
    assert after.digest == before.digest and {**before.files, SAMPLING: schedule_json(schedule(files))} == after.files
    assert load_model(folder)[1]["digest"] == before.digest


def test_a_schedule_of_another_network_is_refused(folder, files):
    (folder / SAMPLING).write_bytes(schedule_json(schedule(files, model="e" * 64)))
    with pytest.raises(ValueError, match=rf"{folder}.*{SAMPLING} that was found for another network.*delete it"):
        resolve(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: b"",
        lambda d: d[:-10],
        lambda d: b"\xff" + d,
        lambda d: b"null",
        lambda d: b"[" * 100_000,
        lambda d: json.dumps([json.loads(d)]).encode(),
        lambda d: json.dumps({k: v for k, v in json.loads(d).items() if k != "grid"}).encode(),
        lambda d: alter(d, colour="red"),
        lambda d: alter(d, sampler="euler"),
        lambda d: alter(d, sampler=["ddim"]),
        lambda d: alter(d, grid="cosine"),
        lambda d: alter(d, num_steps=0),
        lambda d: alter(d, num_steps=4.0),
        lambda d: alter(d, num_steps=True),
        lambda d: alter(d, num_steps="4"),
        lambda d: alter(d, start_level=1),
        lambda d: alter(d, start_level=-0.5),
        lambda d: alter(d, start_level=float("nan")),
        lambda d: alter(d, start_level=None),
        lambda d: alter(d, evidence=None),
        lambda d: alter(d, evidence={}),
        *(
            lambda d, field=field: alter(d, evidence={**json.loads(d)["evidence"], **field})
            for field in (
                {"data": 7}, {"model": ""}, {"value": "30"}, {"value": float("inf")}, {"value": True}, {"more": 1},
                {"interval": [1.0]}, {"interval": [1, "2"]}, {"interval": 1.0}, {"device_s_per_mp": None},
            )
        ),
    ],
)  # fmt: skip
def test_a_damaged_schedule_is_an_error_that_names_it_and_is_never_written(folder, files, change):
    data = change(schedule_json(schedule(files)))
    (folder / SAMPLING).write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s){folder}.*{SAMPLING} is damaged.*delete it"):
        resolve(str(folder))
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    with pytest.raises(ValueError, match="is damaged"):
        schedule_json(document)


def test_a_copy_carries_the_schedule_and_follows_it(folder, files, tmp_path, monkeypatch):
    output, publish, written = str(tmp_path / "out"), storage.publish, []
    uri = publish_model(resolve(str(folder)), output)
    monkeypatch.setattr(storage, "publish", lambda uri, data: (written.append(uri), publish(uri, data)))
    for value in (30.5, 31.5):  # found, then found again: the digest says nothing of it
        (folder / SAMPLING).write_bytes(schedule_json(schedule(files, value=value)))
        model = resolve(str(folder))
        assert publish_model(model, output) == uri and resolve(uri).sampling == model.sampling
        assert publish_model(model, output) == uri and written == [storage.join(uri, SAMPLING)]
        written.clear()
    (folder / SAMPLING).unlink()
    assert publish_model(resolve(str(folder)), output) == uri and load_files(uri) == files


def test_a_network_that_replaces_another_does_not_keep_its_schedule(folder, files):
    publish_files(str(folder), {**files, SAMPLING: schedule_json(schedule(files))})
    assert resolve(str(folder)).sampling is not None
    publish_files(str(folder), files)
    assert load_files(str(folder)) == files
