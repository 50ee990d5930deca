"""Laws of pipelines.checkpoints: whole or not there, the newest whole one is used, N are kept."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save

from diffsr_core.checkpoint import EMA, WEIGHTS
from pipelines import storage
from pipelines.checkpoints import OPTIMIZER, STATE, load_newest, newest_files, newest_step, save_checkpoint


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


def write(output, step, *, keep=9):
    files = {WEIGHTS: save({"w": torch.full((2,), float(step))}), EMA: save({"w": torch.full((2,), step + 0.5)})}
    optimizer = {"exp_avg": torch.arange(6.0).reshape(2, 3).T * step}  # not contiguous
    counters = {"step": step, "stage": 1}
    save_checkpoint(
        str(output), {**files, "config.json": b"{}"}, optimizer, counters, metrics={"loss": step / 4}, keep=keep
    )


def folder(output, step):
    return output / "checkpoints" / f"{step:08d}"


def newest(output):
    saved = load_newest(str(output))
    return None if saved is None else saved[3]["step"]


def test_where_there_is_none_there_is_none(output):
    assert load_newest(str(output)) is None and newest_files(str(output)) is None


def test_what_was_saved_is_loaded_bit_for_bit(output):
    write(output, 7)
    weights, ema, optimizer, counters, metrics = load_newest(str(output))
    assert torch.equal(weights["w"], torch.tensor([7.0, 7.0])) and torch.equal(ema["w"], torch.tensor([7.5, 7.5]))
    assert torch.equal(optimizer["exp_avg"], torch.arange(6.0).reshape(2, 3).T * 7)
    assert counters == {"step": 7, "stage": 1} and metrics == {"loss": 1.75}


def test_the_newest_step_is_that_of_the_newest_whole_checkpoint(output):
    assert newest_step(str(output)) == 0
    write(output, 3)
    write(output, 12)
    assert newest_step(str(output)) == 12
    (folder(output, 12) / WEIGHTS).write_bytes(b"")
    assert newest_step(str(output)) == 3


def test_the_newest_is_used_by_number_and_not_by_text_or_time(output):
    for step in (1000, 900, 20_000, 3):
        write(output, step)
    assert newest(output) == 20_000


DAMAGE = {
    "state.json is missing": lambda at: (at / STATE).unlink(),
    "state.json is empty": lambda at: (at / STATE).write_bytes(b""),
    "state.json is cut": lambda at: (at / STATE).write_bytes((at / STATE).read_bytes()[:-5]),
    "state.json is of another kind": lambda at: (at / STATE).write_bytes(b"[1]"),
    "state.json names no hashes": lambda at: (at / STATE).write_bytes(b'{"step": 2}'),
    **{
        f"{name} is {how}": lambda at, name=name, change=change: (at / name).write_bytes(
            change((at / name).read_bytes())
        )
        for name in (WEIGHTS, EMA, OPTIMIZER, "config.json")
        for how, change in {"cut": lambda data: data[:-1], "altered": lambda data: data[:-1] + b"\x07"}.items()
    },
    **{f"{name} is missing": lambda at, name=name: (at / name).unlink() for name in (WEIGHTS, EMA, OPTIMIZER)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_word(output, capsys, damage):
    write(output, 1)
    write(output, 2)
    assert newest(output) == 2 and capsys.readouterr().err == ""
    DAMAGE[damage](folder(output, 2))
    assert newest(output) == 1
    said = capsys.readouterr()
    assert "00000002" in said.err and "passed over" in said.err and said.out == ""


def test_when_all_are_damaged_there_is_none_and_each_is_named(output, capsys):
    for step in (1, 2, 3):
        write(output, step)
        (folder(output, step) / WEIGHTS).write_bytes(b"")
    assert newest(output) is None
    said = capsys.readouterr().err
    assert all(f"{step:08d}" in said for step in (1, 2, 3))


def test_the_newest_n_are_kept(output):
    for step in (1, 2, 3, 4):
        write(output, step, keep=2)
        kept = sorted(int(path.parent.name) for path in (output / "checkpoints").glob(f"*/{STATE}"))
        assert kept == list(range(max(1, step - 1), step + 1))
    write(output, 5, keep=1)
    assert sorted(path.parent.name for path in (output / "checkpoints").glob("*/*")) == ["00000005"] * 5


def test_a_save_that_is_cut_short_leaves_the_one_before_usable_whatever_it_had_written(output, monkeypatch):
    write(output, 1, keep=1)
    publish, names = storage.publish, []
    for allowed in range(5):
        written = []

        def until_killed(uri, data, written=written, allowed=allowed):
            if len(written) == allowed:
                raise KeyboardInterrupt
            written.append(uri)
            publish(uri, data)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "publish", until_killed)
            with pytest.raises(KeyboardInterrupt):
                write(output, 2, keep=1)
        names.append(len(written))
        assert newest(output) == 1
        assert not (folder(output, 2) / STATE).exists()  # it is written last
        shutil.rmtree(folder(output, 2), ignore_errors=True)
    assert names == [0, 1, 2, 3, 4]
    write(output, 2, keep=1)
    assert newest(output) == 2


def test_an_interrupted_step_is_written_again_over_its_remains(output):
    write(output, 1)
    write(output, 2)
    (folder(output, 2) / STATE).unlink()
    (folder(output, 2) / WEIGHTS).write_bytes(b"half")
    write(output, 2)
    assert newest(output) == 2


def test_the_state_holds_the_hash_of_every_other_file(output):
    write(output, 1)
    inside = {path.name: storage.digest_bytes(path.read_bytes()) for path in folder(output, 1).iterdir()}
    del inside[STATE]
    assert json.loads((folder(output, 1) / STATE).read_bytes())["sha256"] == inside
