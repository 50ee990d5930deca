"""Laws of pipelines.checkpoints: whole or not there, the newest whole one is used, N and the best are kept."""

import errno
import json
import math
import os
import random
import resource
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from diffsr_core.checkpoint import CARD, CONFIG, EMA, WEIGHTS
from diffsr_core.training import TrainerState
from pipelines import storage
from pipelines.checkpoints import (
    OPTIMIZER,
    STATE,
    Saved,
    best_files,
    load_newest,
    newest_files,
    newest_step,
    save_checkpoint,
)

FURTHER = "ema-9000.safetensors"
MODEL = {CARD, CONFIG, EMA, WEIGHTS}
ALL = {*MODEL, FURTHER, "ema-70.safetensors", OPTIMIZER, STATE}


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power, and on a busy disk the waiting takes minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "run")
        return
    uri = f"memory://{uuid.uuid4().hex}"
    yield uri
    filesystem, path = storage.open_filesystem(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def filled(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((2,), value)}


def state_of(step: int, **counters: float) -> TrainerState:
    return TrainerState(
        weights=filled(step),
        averages={2000: filled(step + 0.5), 9000: filled(step + 0.25), 70: filled(step + 0.125)},
        optimizer={"0.exp_avg": torch.arange(6.0).reshape(2, 3).T * step},  # not contiguous
        counters={"step": step, "norm_mean": 0.1 + step, **counters},
    )


def write(
    output: Path | str, step: int, *, keep: int = 99, score: float | None = None, state: TrainerState | None = None
) -> None:
    state = state or state_of(step)
    model = {WEIGHTS: save(state.weights), EMA: save(next(iter(state.averages.values())))}
    files = {**model, CONFIG: b"{}", CARD: f"# {step}".encode()}
    save_checkpoint(str(output), files, state, metrics={"loss": step / 4}, keep=keep, score=score)


def folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"{step:08d}"


def there(output: Path) -> list[int]:
    """The folders that are there, empty ones too."""
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir())


def newest(output: Path | str) -> int | None:
    saved = load_newest(str(output))
    return None if saved is None else int(saved.state.counters["step"])


def card(files: dict[str, bytes] | None) -> int | None:
    return None if files is None else int(files[CARD][2:])


def loaded(output: Path | str) -> Saved:
    saved = load_newest(str(output))
    assert saved is not None
    return saved


def test_where_there_is_none_there_is_none(uri: str) -> None:
    assert load_newest(uri) is None and newest_files(uri) is None and best_files(uri) is None and newest_step(uri) == 0


def test_what_was_saved_is_loaded_bit_for_bit(uri: str) -> None:
    write(uri, 7)
    saved, expected = loaded(uri), state_of(7)
    for found, wanted in (
        (saved.state.weights, expected.weights),
        (saved.state.optimizer, expected.optimizer),
        *((saved.state.averages[images], average) for images, average in expected.averages.items()),
    ):
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert list(saved.state.averages) == [2000, 9000, 70]  # the first is the model's: its place is kept
    assert saved.state.counters == expected.counters and saved.metrics == {"loss": 1.75}
    assert saved.files.keys() == MODEL and saved.files[CARD] == b"# 7"
    assert newest_files(uri) == best_files(uri) == saved.files and newest_step(uri) == 7


def test_numbers_keep_their_type_and_their_last_bit(output: Path) -> None:
    write(output, 1, state=state_of(1, third=1 / 3, tiny=5e-324, images=2**60 + 1))
    counters = loaded(output).state.counters
    assert counters["third"] == 1 / 3 and counters["tiny"] == 5e-324 and counters["images"] == 2**60 + 1
    assert type(counters["step"]) is int and type(counters["third"]) is float


def test_a_number_that_json_has_not_is_kept_by_name(output: Path) -> None:
    metrics = {"val_loss": math.nan, "gradient_norm": math.inf, "low": -math.inf, "loss": 0.5}
    state = state_of(3, norm_mean=math.inf)
    files = {WEIGHTS: save(state.weights), EMA: save(state.averages[2000])}
    save_checkpoint(str(output), files, state, metrics=metrics, keep=1, score=math.nan)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads((folder(output, 3) / STATE).read_bytes(), parse_constant=refuse)
    assert document["metrics"] == {"val_loss": "nan", "gradient_norm": "inf", "low": "-inf", "loss": 0.5}
    saved = loaded(output)
    assert math.isnan(saved.metrics.pop("val_loss"))
    assert saved.metrics == {"gradient_norm": math.inf, "low": -math.inf, "loss": 0.5}
    assert saved.state.counters["norm_mean"] == math.inf


def test_the_newest_is_used_by_number_and_not_by_text_or_time(output: Path) -> None:
    for step in (1000, 900, 20_000, 3, 100_000_000, 99_999_999):
        write(output, step)
        assert newest(output) == newest_step(str(output)) == step  # what is later was gone back behind, and is deleted
    for step in (100_000_001, 100_000_002):
        write(output, step)
    assert there(output) == [3, 99_999_999, 100_000_001, 100_000_002] and newest(output) == 100_000_002


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def altered(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {
    "state.json is missing": (STATE, None, "it was cut short: state.json is missing"),
    "state.json is empty": (STATE, lambda data: b"", "state.json is damaged"),
    "state.json is cut": (STATE, lambda data: data[:-5], "state.json is damaged"),
    "state.json is no text": (STATE, lambda data: b"\xff" + data, "state.json is damaged"),
    "state.json is of another kind": (STATE, lambda data: b"[1]", "state.json is damaged"),
    "state.json says nothing": (STATE, lambda data: b"{}", "state.json is damaged"),
    "state.json has another step": (STATE, lambda data: data.replace(b'"step": 2', b'"step": 9'), "is damaged"),
    "state.json has another score": (STATE, lambda data: data.replace(b'"score": 2', b'"score": 0'), "is damaged"),
    "state.json has a NaN": (STATE, lambda data: data.replace(b'"loss": 0.5', b'"loss": NaN'), "is damaged"),
    **{f"{name} is missing": (name, None, f"{name} is missing") for name in sorted(ALL - {STATE})},
    **{f"{name} is cut": (name, lambda data: data[:-1], f"{name} has ") for name in sorted(ALL - {STATE})},
    **{f"{name} is altered": (name, altered, f"{name} was altered") for name in sorted(ALL - {STATE})},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_and_it_is_said_what_is_wrong_and_what_is_used(
    output: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    name, change, reason = DAMAGE[damage]
    write(output, 1, score=3.0)
    write(output, 2, score=2.0)
    at = folder(output, 2) / name
    readers: list[Callable[[str], Any]] = [newest, newest_step, newest_files, best_files]
    before = [read(str(output)) for read in readers]
    assert capsys.readouterr().err == ""
    at.unlink() if change is None else rewrite(at, change)
    for read, whole in zip(readers, before, strict=True):
        found, said = read(str(output)), capsys.readouterr()
        assert (card(found) if isinstance(found, dict) else found) == 1 and found != whole
        assert "checkpoint 00000002 is passed over" in said.err and reason in said.err and said.out == ""
        assert "checkpoint 00000001 is used instead" in said.err and said.err.count("\n") == 1


def test_when_all_are_damaged_there_is_none_and_each_is_named(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        write(output, step)
    for step in (1, 2, 3):
        (folder(output, step) / WEIGHTS).write_bytes(b"")
    assert newest(output) is None
    said = capsys.readouterr().err
    assert all(f"{step:08d}" in said for step in (1, 2, 3)) and said.count("no other is whole") == 3


def test_a_truncated_one_is_known_before_any_content_is_read(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        write(output, step)
    for step in (2, 3):
        rewrite(folder(output, step) / OPTIMIZER, lambda data: data[:-1])
    opened = []

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(uri: str, **options: Any) -> Any:
            opened.append(uri)
            assert uri.endswith(STATE) or real.__name__ == "open_file", "gigabytes are hashed, not held"
            return real(uri, **options)

        return call

    for name in ("open_file", "read_bytes"):
        monkeypatch.setattr(storage, name, noted(getattr(storage, name)))
    assert newest_step(str(output)) == 1
    assert all(uri.endswith(STATE) for uri in opened if "/00000001/" not in uri)
    assert sorted(uri.rsplit("/")[-1] for uri in opened if "/00000001/" in uri) == sorted(ALL)


def test_an_error_of_the_store_is_not_taken_for_damage(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(output, 1)
    write(output, 2)

    def fails(uri: str, **_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error", uri)

    monkeypatch.setattr(storage, "read_bytes", fails)
    with pytest.raises(OSError, match="Input/output"):
        load_newest(str(output))  # going back to step 1 would delete step 2, which may be whole


def test_the_newest_n_are_kept(uri: str) -> None:
    for step in (1, 2, 3, 4):
        write(uri, step, keep=2)
        kept = sorted({name.split("/")[1] for name in storage.list_names(uri)})
        assert kept == [f"{step:08d}" for step in range(max(1, step - 1), step + 1)]
    write(uri, 5, keep=1)
    assert storage.list_names(uri) == sorted(f"checkpoints/00000005/{name}" for name in ALL)


def test_the_best_is_kept_and_of_equal_ones_the_later(output: Path) -> None:
    scores = {1: None, 2: 5.0, 3: 4.0, 4: 6.0, 5: math.nan, 6: 4.0, 7: -math.inf, 8: None, 9: 3.5, 10: 7.0}
    best = {1: 1, 2: 2, 3: 3, 4: 3, 5: 3, 6: 6, 7: 6, 8: 6, 9: 9, 10: 9}
    for step, score in scores.items():
        write(output, step, keep=1, score=score)
        assert there(output) == sorted({step, best[step]})
        assert card(best_files(str(output))) == best[step] and newest(output) == step
    write(output, 11, score=3.5)
    assert there(output) == [9, 10, 11] and card(best_files(str(output))) == 11


def test_what_is_not_whole_takes_no_place_of_the_newest_n(output: Path) -> None:
    for step in (10, 20, 30, 40):
        write(output, step)
    rewrite(folder(output, 30) / EMA, lambda data: data[:-1])
    (folder(output, 40) / STATE).unlink()
    write(output, 35, keep=2)  # training went back to 20, and has another interval now
    assert there(output) == [20, 35]


def test_what_others_put_there_is_left_alone(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(output, 1)
    at = output / "checkpoints"
    strangers = [
        at / ".DS_Store",
        at / "notes" / "a.txt",
        at / "7" / STATE,
        at / "00000003.bak" / STATE,
        at / "٣" / "x",
    ]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1")
    write(output, 2, keep=1)
    assert newest(output) == 2 and all(path.exists() for path in strangers) and not folder(output, 1).exists()
    assert capsys.readouterr().err == ""


def test_a_keep_below_one_is_refused(output: Path) -> None:
    with pytest.raises(ValueError, match=r"keep \(0\) must be at least 1.*; use"):
        write(output, 1, keep=0)
    assert not output.exists()


def test_a_save_that_dies_anywhere_leaves_a_whole_newest_and_a_whole_best(
    output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, newest_seen, finished = 0, [], False
    while not finished:
        at = output / str(allowed)
        write(at, 1, score=1.0)
        write(at, 2, score=2.0)
        write(at, 3, score=3.0)
        left = [allowed]

        def dying(real: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return real(*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in ("publish", "delete"):
                patch.setattr(storage, name, dying(getattr(storage, name)))
            try:
                write(at, 4, keep=1, score=4.0)
                finished = True
            except KeyboardInterrupt:
                pass
        capsys.readouterr()
        newest_seen.append(newest(at))
        said = capsys.readouterr().err
        assert "altered" not in said and "bytes" not in said and "safetensors" not in said  # cut short, and no worse
        assert card(best_files(str(at))) == 1
        for found in (folder(at, step) for step in there(at)):
            names = {path.name for path in found.iterdir()}
            assert STATE not in names or names == ALL  # it is the first to go
        allowed += 1
    assert newest_seen == [3] * 8 + [4] * 17  # 8 files are written, then the 8 of step 3 deleted, and of step 2
    assert there(at) == [1, 4]


def test_runs_killed_at_any_moment_go_on_from_a_whole_checkpoint(output: Path) -> None:
    """Each child saves step after step until SIGKILL; what it has announced, or something later, is loaded whole."""
    chance, step = random.Random(5), 0
    (output / "checkpoints").mkdir(parents=True)
    for _ in range(20):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                while True:
                    step += 1
                    write(output, step, keep=2, score=-step)
                    os.write(writing, b".")
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, "rb", buffering=0) as file:
            step += len(file.read(1))
            time.sleep(chance.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            step += len(file.read())
        found = newest(output) or 0
        assert found in (step, step + 1)  # killed between the save and its announcement
        step = found
    assert step >= 20
    write(output, step + 1, keep=2)
    assert there(output) == [step, step + 1]
    assert [name for _, _, names in os.walk(output) for name in names if name.startswith(".tmp-")] == []


def test_an_empty_folder_of_a_killed_run_goes_and_what_others_put_there_stays(output: Path) -> None:
    for name in ("00000069", "00000070", "mine"):
        (output / "checkpoints" / name).mkdir(parents=True)
    (output / "checkpoints" / "00000071").write_bytes(b"a file")
    write(output, 70)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"00000070", "00000071", "mine"}


@pytest.mark.parametrize("name", [WEIGHTS, EMA, CONFIG, CARD, FURTHER, OPTIMIZER, STATE])
def test_a_full_disk_passes_through_with_the_others_untouched(
    output: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for step in (1, 2, 3):
        write(output, step)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    real = storage._put_local

    def full(path: str, *arguments: Any, **options: Any) -> bool:
        if path.endswith(f"/{name}"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_put_local", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            write(output, 4, keep=1)
    write(output / "twin", 4)
    sizes = {path.name: path.stat().st_size for path in folder(output / "twin", 4).iterdir()}
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(folder(output, 4) / name)
    assert f"{name} needs {sizes[name]:,} bytes, the checkpoint {sum(sizes.values()):,}" in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before and there(output) == [1, 2, 3]
    write(output, 4, keep=1)
    assert there(output) == [4] and newest(output) == 4


def test_a_file_that_the_system_cuts_short_is_cleared_away(output: Path) -> None:
    """The kernel itself ends the write of one file in its middle, by a limit on the size of files."""
    write(output, 1)
    state = state_of(2)._replace(optimizer={"0.exp_avg": torch.zeros(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"optimizer.safetensors needs 400,\d{3} bytes") as caught:
            write(output, 2, state=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert there(output) == [1] and newest(output) == 1
    write(output, 2, state=state)
    assert newest(output) == 2


def test_an_error_of_an_object_store_names_file_and_bytes_too(
    monkeypatch: pytest.MonkeyPatch, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(uri, 1)
    real, broken = storage.publish, [True]

    def publish(at: str, data: bytes) -> None:
        if broken[0] and at.endswith(OPTIMIZER):
            raise OSError("XMinioStorageFull")
        real(at, data)

    def delete(at: str) -> None:
        raise PermissionError(errno.EACCES, "Forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", publish)
        patch.setattr(storage, "delete", delete)  # nor can what was written be cleared away: harmless
        with pytest.raises(OSError, match=r"XMinioStorageFull: optimizer.safetensors needs \d+ bytes"):
            write(uri, 2)
    assert newest(uri) == 1 and "cut short" in capsys.readouterr().err
    write(uri, 2)
    assert newest(uri) == 2


def test_remains_of_steps_that_come_again_are_overwritten(output: Path) -> None:
    for step in (1, 2, 3):
        write(output, step)
    (folder(output, 2) / STATE).unlink()
    rewrite(folder(output, 3) / WEIGHTS, altered)
    (folder(output, 3) / "ema-1.safetensors").write_bytes(b"of other settings")
    (folder(output, 3) / f".tmp-{'0' * 16}").write_bytes(b"of a killed writer")
    write(output, 3)
    assert there(output) == [1, 3] and newest(output) == 3
    assert {path.name for path in folder(output, 3).iterdir()} == ALL


def test_the_state_holds_size_and_hash_of_every_other_file(output: Path) -> None:
    write(output, 1)
    inside = {path.name: path.read_bytes() for path in folder(output, 1).iterdir()}
    document = json.loads(inside.pop(STATE))
    assert document["sha256"] == {name: storage.digest_bytes(data) for name, data in inside.items()}
    assert document["bytes"] == {name: len(data) for name, data in inside.items()}


@pytest.mark.parametrize("seed", range(20))
def test_no_altered_byte_of_a_state_goes_unseen(output: Path, seed: int) -> None:
    write(output, 1)
    chance = random.Random(seed)

    def change(data: bytes) -> bytes:
        at = chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(7))]) + data[at + 1 :]

    before = json.loads((folder(output, 1) / STATE).read_bytes())
    rewrite(folder(output, 1) / STATE, change)
    try:
        same = json.loads((folder(output, 1) / STATE).read_bytes()) == before  # white space may change
    except ValueError:
        same = False
    assert (newest(output) is not None) == same
