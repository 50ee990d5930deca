"""Laws of pipelines.preflight: what cannot train is refused before the first step, with the numbers and a remedy."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from diffsr_core import presets
from diffsr_core.memory import MemoryPlan
from pipelines import preflight as module
from pipelines.manifest import Manifest, Shard
from pipelines.preflight import allowed_consistency, available_memory, check_cpus, check_memory, check_pairs
from pipelines.storage import digest_bytes
from tests.pipelines.tiny_sets import RECIPE, SCALE, SIDE, make_row, manifest_of, noise, write_shard

MADE = {**RECIPE, "patch": SIDE, "lr_source": False}
LR = SIDE // SCALE
Change = Callable[[pa.Table], pa.Table]


@pytest.fixture
def made(tmp_path: Path) -> list[Shard]:
    """Two shards of a set: 12 pairs of train, of which 3 are grey, 3 of val and 3 of test."""
    splits = ("train", "train", "val", "train", "test", "train")
    sources = [
        [make_row(f"{s}.png", n, split=splits[s], hr=noise([s, n], channels=1) if s == 3 else None) for n in range(3)]
        for s in range(6)
    ]
    return [write_shard(tmp_path, name, sum(part, [])) for name, part in (("a", sources[:3]), ("b", sources[3:]))]


def refuse_or_pass(root: Path, manifest: Manifest, **options: Any) -> None:
    preset = options.pop("preset", "nano-x4")
    options = {"model": presets.get(preset).model, "batch_size": 4, "crop_px": None, **options}
    check_pairs(str(root), manifest, preset=preset, **options)


def alter(root: Path, shard: Shard, change: Change) -> Shard:
    """Write the shard anew with its table changed, as a stranger's tool would; what counts in it stays as it was."""
    path = root / shard.name
    pq.write_table(change(pq.read_table(path)), path)
    data = path.read_bytes()
    return replace(shard, bytes=len(data), sha256=digest_bytes(data))


def with_value(column: str, value: int | str, *, split: str, count: int) -> Change:
    """Return a change of one column in the first `count` rows of a split."""

    def change(table: pa.Table) -> pa.Table:
        rows = np.flatnonzero(pc.equal(table["split"], split).to_numpy())[:count]
        values = [value if row in rows else old for row, old in enumerate(table[column].to_pylist())]
        return table.set_column(table.column_names.index(column), column, [values])

    return change


def test_a_set_that_fits_the_model_passes_and_says_nothing(
    tmp_path: Path, made: list[Shard], capsys: pytest.CaptureFixture[str]
) -> None:
    for preset in ("nano-x4", "nano-x4-regression", "srdiff-df2k-x4"):
        for crop in (None, SIDE):
            refuse_or_pass(tmp_path, manifest_of(*made, recipe=MADE), preset=preset, crop_px=crop, batch_size=12)
    assert capsys.readouterr() == ("", "")


def test_what_is_allowed_and_odd_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_shard(tmp_path, "a", [make_row("a.png", n, hr=noise(n, channels=1)) for n in range(4)])
    refuse_or_pass(tmp_path, manifest_of(shard, recipe=MADE), preset="seed3-8-32")
    first, second = capsys.readouterr().err.splitlines()
    assert "made by bicubic, and seed3-8-32 enlarges its condition by bilinear" in first
    assert "split val holds no pairs" in second


RECIPES = [
    ({"scale": 8}, {}, r"pairs scale \(8\) must be that of nano-x4 \(4\).*this scale: .*srdiff-celeba-x8"),
    ({"scale": 5}, {}, r"pairs scale \(5\) must be that of nano-x4 \(4\); make other pairs$"),
    ({"patch": 20}, {}, r"pairs patch \(20\) must be a multiple of 8, 16 at least, for nano-x4; make"),
    ({"patch": 8}, {}, r"pairs patch \(8\) must be a multiple of 8, 16 at least, for nano-x4; make"),
    ({"patch": 44}, {"crop_px": 48}, r"crop \(48\) must be at most the patch of the pairs \(44\); use 40"),
    ({"patch": 44}, {"crop_px": 36}, r"crop \(36\) must be a multiple of 8, 16 at least, for nano-x4; use 40"),
    ({"patch": 44}, {"crop_px": 8}, r"crop \(8\) must be a multiple of 8, 16 at least, for nano-x4; use 40"),
    ({"patch": 12}, {"crop_px": 8}, r"crop \(8\) must be a multiple of 8, 16 at least, for nano-x4; make other"),
    ({}, {"batch_size": 13}, r"pairs in split train \(12\) must be at least the batch \(13\); add sources"),
]


@pytest.mark.parametrize(("recipe", "options", "message"), RECIPES)
def test_pairs_of_another_scale_or_size_or_too_few_are_refused_by_the_manifest(
    tmp_path: Path, made: list[Shard], recipe: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    for shard in made:
        (tmp_path / shard.name).unlink()  # no shard is looked at
    with pytest.raises(ValueError, match=message):
        refuse_or_pass(tmp_path, manifest_of(*made, recipe={**MADE, **recipe}), **options)


def test_an_empty_split_train_is_refused_and_test_and_val_are_counted(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, "a", [make_row(f"{n}", split="test" if n else "val") for n in range(5)])
    with pytest.raises(ValueError, match=r"split \(train\) .* holds none, val 1 and test 4: .*--val-share"):
        refuse_or_pass(tmp_path, manifest_of(shard, recipe=MADE))


@pytest.mark.parametrize("names", [["hr"], ["lr"], ["hr_channels", "lr_w"], ["split"], ["scale"], ["pair_id"]])
def test_missing_columns_are_named_with_their_shard(tmp_path: Path, made: list[Shard], names: list[str]) -> None:
    altered = alter(tmp_path, made[1], lambda table: table.drop_columns(names))
    with pytest.raises(ValueError, match=rf"shard \(data/b.parquet\) .* lacks {', '.join(names)}: make"):
        refuse_or_pass(tmp_path, manifest_of(made[0], altered, recipe=MADE))


def test_a_column_that_only_dropped_rows_need_is_missed_only_with_these(tmp_path: Path, made: list[Shard]) -> None:
    altered = alter(tmp_path, made[1], lambda table: table.drop_columns(["source_key"]))
    refuse_or_pass(tmp_path, manifest_of(made[0], altered, recipe=MADE))
    dropped = replace(altered, dropped_sources=["5.png"], splits={**altered.splits, "train": 3})
    with pytest.raises(ValueError, match=r"shard \(data/b.parquet\) .* lacks source_key:"):
        refuse_or_pass(tmp_path, manifest_of(made[0], dropped, recipe=MADE))


@pytest.mark.parametrize("damage", ["missing", "another size", "torn footer"])
def test_a_shard_that_is_lost_or_torn_is_refused_in_the_readers_words(
    tmp_path: Path, made: list[Shard], damage: str
) -> None:
    path = tmp_path / made[1].name
    data = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(data[:-20] + bytes(20 if damage == "torn footer" else 9))
    with pytest.raises(ValueError, match=rf"{made[1].name}.*{'missing' if damage == 'missing' else 'altered'}"):
        refuse_or_pass(tmp_path, manifest_of(*made, recipe=MADE))


ROWS = [
    ("scale", 8, r"must have scale 4; of 15 rows 2 have scale 8: make the set again"),
    ("hr_h", 24, r"must have 16 x 16 px in HR and 4 x 4 px in LR; of 15 rows 2 have 24 x 16 px in HR and 4 x 4 px"),
    ("hr_w", 24, r"of 15 rows 2 have 16 x 24 px in HR and 4 x 4 px in LR"),
    ("lr_h", 5, r"of 15 rows 2 have 16 x 16 px in HR and 5 x 4 px in LR"),
    ("lr_w", 5, r"of 15 rows 2 have 16 x 16 px in HR and 4 x 5 px in LR"),
    ("hr_channels", 4, r"must have 3 channels or 1 channel; of 15 rows 2 have 4 channels: .*--bands.*than nano-x4"),
]


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(("column", "value", "message"), ROWS)
def test_rows_unlike_the_others_are_refused_with_their_number_where_a_training_reads_them(
    tmp_path: Path, made: list[Shard], column: str, value: int, message: str, split: str
) -> None:
    index = 1 if split == "test" else 0
    made[index] = alter(tmp_path, made[index], with_value(column, value, split=split, count=2))
    if split == "test":
        refuse_or_pass(tmp_path, manifest_of(*made, recipe=MADE))
        return
    with pytest.raises(ValueError, match=message):
        refuse_or_pass(tmp_path, manifest_of(*made, recipe=MADE))


def test_of_many_kinds_of_wrong_rows_the_commonest_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    sizes = [1, 2, 2, 3, 3, 3, 4, 5, 5, 5, 5]
    rows = [{**make_row(f"{n}"), "hr_channels": channels} for n, channels in enumerate(sizes)]
    message = r"of 11 rows 4 have 5 channels, 2 have 2 channels, 1 have 4 channels: "
    with pytest.raises(ValueError, match=message):
        refuse_or_pass(tmp_path, manifest_of(write_shard(tmp_path, "a", rows), recipe=MADE))
    rows += [{**make_row("x"), "hr_channels": 6}, {**make_row("y"), "hr_channels": 7}]
    with pytest.raises(ValueError, match=r"of 13 rows 4 have 5 .*, 1 have 4 channels, 2 something else: "):
        refuse_or_pass(tmp_path, manifest_of(write_shard(tmp_path, "a", rows), recipe=MADE))


def test_rows_that_were_dropped_are_not_judged(tmp_path: Path, made: list[Shard]) -> None:
    table = pq.read_table(tmp_path / made[0].name)
    altered = alter(tmp_path, made[0], with_value("hr_channels", 4, split="train", count=1))
    first = table["pair_id"][0].as_py()
    altered = replace(altered, dropped_pairs=[first], splits={**altered.splits, "train": 5})
    refuse_or_pass(tmp_path, manifest_of(altered, made[1], recipe=MADE))


def test_a_split_column_that_says_another_thing_than_the_manifest_is_refused(tmp_path: Path, made: list[Shard]) -> None:
    made[0] = alter(tmp_path, made[0], with_value("split", "Train", split="train", count=6))
    with pytest.raises(ValueError, match=r"split \(train\) .* must hold 12 pairs, not 6: make the set again"):
        refuse_or_pass(tmp_path, manifest_of(*made, recipe=MADE))


def test_grey_serves_a_model_of_colours_and_colours_no_model_of_grey(tmp_path: Path) -> None:
    grey = write_shard(tmp_path, "a", [make_row(f"{n}", hr=noise(n, channels=1)) for n in range(4)])
    colour = write_shard(tmp_path, "b", [make_row(f"{n}") for n in range(4)])
    for preset in ("seed3-32-128", "seed3-8-32"):
        refuse_or_pass(tmp_path, manifest_of(grey, recipe=MADE), preset=preset)
    refuse_or_pass(tmp_path, manifest_of(grey, colour, recipe=MADE), preset="seed3-32-128")
    with pytest.raises(ValueError, match=r"must have 1 channel; of 8 rows 4 have 3 channels: "):
        refuse_or_pass(tmp_path, manifest_of(grey, colour, recipe=MADE), preset="seed3-8-32")


@pytest.mark.parametrize(("hr", "lr", "passes"), [(3, 3, True), (3, 1, True), (1, 3, True), (3, 4, False)])
def test_twins_whose_lr_has_other_channels_than_the_model_reads_are_refused(
    tmp_path: Path, hr: int, lr: int, passes: bool
) -> None:
    rows = [make_row("0", split="val", lr=noise(0, side=LR, channels=2))]  # of another split: not looked at
    rows += [make_row(f"{n}", hr=noise(n, channels=hr), lr=noise(n, side=LR, channels=lr if n == 3 else 3))
             for n in range(1, 6)]  # fmt: skip
    manifest = manifest_of(write_shard(tmp_path, "a", rows), recipe={**MADE, "lr_source": True})
    if passes:
        refuse_or_pass(tmp_path, manifest)
        return
    with pytest.raises(
        ValueError, match=r"must have 3 channels or 1 channel in LR for nano-x4; one of the first has 4 "
    ):
        refuse_or_pass(tmp_path, manifest)


def test_a_model_with_extra_maps_reads_exactly_its_channels(tmp_path: Path) -> None:
    model = presets.get("nano-x4-regression").model
    model = replace(model, encoder=replace(model.encoder, extra_channels=1))
    for lr in (1, 3, 4):
        rows = [make_row(f"{n}", lr=noise(n, side=LR, channels=lr)) for n in range(4)]
        manifest = manifest_of(write_shard(tmp_path, "a", rows), recipe={**MADE, "lr_source": True})
        if lr == 4:
            refuse_or_pass(tmp_path, manifest, model=model)
            continue
        with pytest.raises(ValueError, match=rf"must have 4 channels in LR for nano-x4; one of the first has {lr} ch"):
            refuse_or_pass(tmp_path, manifest, model=model)


def test_a_corrupt_first_row_is_left_to_the_budget_and_the_next_one_is_looked_at(tmp_path: Path) -> None:
    rows = [make_row(f"{n}", lr=noise(n, side=LR, channels=4)) for n in range(4)]
    for row in rows[:3]:
        row["lr"] = row["lr"][:9]
    with pytest.raises(ValueError, match="one of the first has 4 channels"):
        refuse_or_pass(tmp_path, manifest_of(write_shard(tmp_path, "a", rows), recipe=MADE))
    rows[3]["lr"] = b""
    refuse_or_pass(tmp_path, manifest_of(write_shard(tmp_path, "a", rows), recipe=MADE))


# Logical CPUs: the request is (num_workers, cpus_per_worker, num_data_workers).
def asked(workers: int, cpus: float, data: int, *nodes: dict[str, float], use_gpu: bool = False) -> dict[str, Any]:
    names = {"num_workers": workers, "cpus_per_worker": cpus, "num_data_workers": data}
    return {**names, "use_gpu": use_gpu, "nodes": list(nodes)}


def fits(**request: Any) -> bool:
    try:
        check_cpus(**request)
    except ValueError:
        return False
    return True


def test_workers_that_take_all_logical_cpus_are_refused_with_the_numbers() -> None:
    """The data set that hangs when actors take all CPUs: two workers of a CPU each on a machine of two (ray#44687)."""
    message = r"num_workers \(2\) must each find 2 logical CPUs \(1 to train, 1 for data workers\) on one node; 1 can: "
    with pytest.raises(ValueError, match=message + r"of 2 CPUs .*--num-workers 1"):
        check_cpus(**asked(2, 1.0, 1, {"CPU": 2.0}))
    with pytest.raises(ValueError, match=r"; 1 can: of 3 CPUs the largest of 1 nodes has 3: use fewer --data-workers"):
        check_cpus(**asked(2, 1.0, 1, {"CPU": 3.0}))
    check_cpus(**asked(2, 1.0, 1, {"CPU": 4.0}))


def test_a_bundle_that_fits_no_node_is_refused_though_there_are_cpus_enough() -> None:
    with pytest.raises(
        ValueError, match=r"num_workers \(2\) must each find 4 logical CPUs .* on one node; 0 can: of 24 "
    ):
        check_cpus(**asked(2, 3.0, 1, *[{"CPU": 3.0}] * 8))
    message = (
        r"find 4 logical CPUs .* and a GPU on one node; 1 can: .* the largest of 3 nodes has 64: .*--num-workers 1"
    )
    with pytest.raises(ValueError, match=message):
        check_cpus(**asked(2, 3.0, 1, {"CPU": 64}, {"CPU": 3, "GPU": 4}, {"CPU": 4, "GPU": 1}, use_gpu=True))


def test_shares_of_a_cpu_are_counted_as_ray_counts_them() -> None:
    assert fits(**asked(3, 0.1, 1, {"CPU": 3.3})) and not fits(**asked(3, 0.1, 1, {"CPU": 3.2}))
    assert fits(**asked(2, 1.5, 1, {"CPU": 2.5}, {"CPU": 2.5})) and not fits(**asked(2, 1.5, 1, {"CPU": 4.9}))


@pytest.mark.parametrize(("gpus", "remedy"), [(2, "use --num-workers 2"), (0, "leave out --use-gpu")])
def test_more_gpus_than_there_are_is_refused(gpus: int, remedy: str) -> None:
    nodes: list[dict[str, float]] = [{"CPU": 16.0, "GPU": 1.0}] * gpus + [{"CPU": 64.0}]
    with pytest.raises(ValueError, match=rf"num_workers \(4\) must have a GPU each; the cluster has {gpus}: {remedy}"):
        check_cpus(**asked(4, 1.0, 1, *nodes, use_gpu=True))


def test_whole_cpus_are_refused_exactly_where_no_placement_holds_them() -> None:
    generator, verdicts = np.random.default_rng(0), set()
    for _ in range(400):
        workers, cpus, data = (int(generator.integers(1, most)) for most in (5, 4, 3))
        nodes = [{"CPU": float(generator.integers(0, 9)), "GPU": float(generator.integers(0, 3))}
                 for _ in range(generator.integers(0, 4))]  # fmt: skip
        use_gpu = bool(generator.integers(2))
        left = [dict(node) for node in nodes]
        for _ in range(workers):  # every bundle is alike, so the first node that holds it is as good as any
            home = next((n for n in left if n["CPU"] >= cpus + data and (n["GPU"] >= 1 or not use_gpu)), None)
            if home is None:
                break
            home["CPU"] -= cpus + data
            home["GPU"] -= use_gpu
        else:
            verdicts.add(True)
            assert fits(**asked(workers, float(cpus), data, *nodes, use_gpu=use_gpu))
            continue
        verdicts.add(False)
        assert not fits(**asked(workers, float(cpus), data, *nodes, use_gpu=use_gpu))
    assert verdicts == {True, False}


def test_the_number_of_workers_in_a_remedy_is_the_largest_that_passes() -> None:
    seen = 0
    for workers, cpus, data in itertools.product((2, 3, 5), (0.5, 1.0, 2.0), (1, 4)):
        for nodes in ([{"CPU": 8.0}], [{"CPU": 4.0}, {"CPU": 5.0}], [{"CPU": 2.0}] * 5):
            request = asked(workers, cpus, data, *nodes)
            if fits(**request):
                continue
            with pytest.raises(ValueError) as refused:
                check_cpus(**request)
            if found := re.search(r"or --num-workers (\d+)", str(refused.value)):
                seen, most = seen + 1, int(found[1])
                assert fits(**{**request, "num_workers": most})
                assert not fits(**{**request, "num_workers": most + 1})
    assert seen > 3


def test_a_cluster_that_grows_is_waited_for_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for nodes in ([], [{"CPU": 2.0}], [{"CPU": 2.0, "GPU": 1.0}]):
        request = asked(2, 1.0, 1, *nodes, use_gpu=True)
        with pytest.raises(ValueError, match="or --wait-for-nodes where the cluster grows"):
            check_cpus(**request)
        assert capsys.readouterr().err == ""
        check_cpus(**request, may_grow=True)
        assert re.search(r"num_workers \(2\) .*it waits until the cluster grows", capsys.readouterr().err)
    check_cpus(**asked(1, 1.0, 1, {"CPU": 2.0}), may_grow=True)
    assert capsys.readouterr().err == ""


def test_a_worker_without_cpus_is_refused() -> None:
    for cpus in (0.0, 1e-5, -1.0):
        with pytest.raises(ValueError, match=r"cpus_per_worker \(.*\) must be at least 0.0001"):
            check_cpus(**asked(1, cpus, 1, {"CPU": 3.0}))


# Memory.
GIB = 2**30


def plan_of(*, fixed: int, activations: int) -> MemoryPlan:
    """A plan of so many bytes, fixed in four parts."""
    part = fixed // 4
    return MemoryPlan(
        parameters_bytes=part,
        gradients_bytes=part,
        optimizer_bytes=fixed - 3 * part,
        averages_bytes=part,
        activations_bytes=activations,
    )


def test_a_plan_that_fits_passes_to_the_byte() -> None:
    plan = plan_of(fixed=4 * GIB, activations=3 * GIB)
    check_memory(plan, available_bytes=7 * GIB, where="here")
    message = f"memory of a worker, {plan.describe()}, must be at most the 7.00 GiB of here; use "
    with pytest.raises(ValueError, match=re.escape(message)):
        check_memory(plan, available_bytes=7 * GIB - 1, where="here")


ACTIVATIONS, SHARDING = ("--micro-batch", "--checkpoint-activations", "--precision bf16"), ("--strategy fsdp2",)


@pytest.mark.parametrize(
    ("fixed", "activations", "remedies"),
    [
        (6, 6, ACTIVATIONS + SHARDING),
        (2, 11, ACTIVATIONS),
        (11, 2, SHARDING),
        (11, 11, ACTIVATIONS + SHARDING),
        (10, 10, ACTIVATIONS + SHARDING),
    ],
)
def test_only_remedies_that_can_help_are_named(fixed: int, activations: int, remedies: tuple[str, ...]) -> None:
    plan = plan_of(fixed=fixed * GIB, activations=activations * GIB)
    with pytest.raises(ValueError, match="or more memory$") as error:
        check_memory(plan, available_bytes=10 * GIB, where="here")
    assert [name for name in ACTIVATIONS + SHARDING if name in str(error.value)] == list(remedies)
    flags = ["--micro-batch", "--checkpoint-activations", "--precision", "--strategy"]
    for count in range(len(flags) + 1):
        with pytest.raises(ValueError) as error:
            check_memory(plan, available_bytes=10 * GIB, where="here", in_use=flags[:count])
        left = [name for name in remedies if not name.startswith(tuple(flags[:count]))]
        shown = str(error.value).partition("; use ")[2]
        assert [name for name in ACTIVATIONS + SHARDING if name in shown] == left
        assert shown.endswith(", or more memory") if left else shown == "more memory"


STAT = f"anon 5\nactive_file 7\ninactive_file {2 * GIB}\ntotal_inactive_file {3 * GIB}"


def group(folder: str, most: int | str, used: int, *, version: int = 2, stat: str = STAT) -> dict[str, str]:
    """Return the files of a control group by name; most and used are GiB, most may be a word."""
    limit, usage = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    texts = {limit: most if isinstance(most, str) else most * GIB, usage: used * GIB, "stat": stat}
    return {f"{folder}memory.{name}": f"{text}\n" for name, text in texts.items()}


MACHINES: dict[str, tuple[str, dict[str, str], int, str]] = {  # own groups, files, GiB expected, whose they are
    "no limits": ("0::/\n", {}, 50, "this machine"),
    "version 2": ("0::/a/b\n", group("a/b/", 16, 6) | group("a/", "max", 9), 16 - (6 - 2), "control group"),
    "an ancestor has less": ("0::/a/b\n", group("a/b/", 16, 6) | group("a/", 20, 15), 20 - (15 - 2), "control group"),
    "a container sees its own group at the root": ("0::/docker/0a\n", group("", 8, 4), 8 - (4 - 2), "control group"),
    "a limit above what there is": ("0::/\n", group("", 80, 1), 50, "this machine"),
    "version 1": (
        "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
        group("memory/a/", 16, 6, version=1) | group("memory/", "9223372036854771712", 9, version=1),
        16 - (6 - 3),
        "control group",
    ),
    "more in use than the limit": ("0::/\n", group("", 4, 7, stat="anon 1"), 0, "control group"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_process_may_use_the_least_that_its_machine_and_its_control_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    own, files, gib, where = MACHINES[machine]
    for name, text in {"own": own, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(module, "_OWN", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50 * GIB))
    found, words = available_memory(False)
    assert found == gib * GIB and where in words


def test_here_there_is_some_memory_and_not_more_than_the_machine_has() -> None:
    found, where = available_memory(False)
    assert 0 < found <= psutil.virtual_memory().total and "/" not in where


def test_a_gpu_that_is_not_there_is_refused_and_one_that_is_there_has_its_whole_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"use_gpu \(True\) must find a GPU where it trains.*--use-gpu"):
        available_memory(True)
    gpus = {1: SimpleNamespace(total_memory=139 * GIB, name="NVIDIA H200")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    assert available_memory(True) == (139 * GIB, "the GPU (NVIDIA H200)")


@pytest.mark.parametrize(
    ("recipe", "allowed"),
    [
        ({"degradation": "bicubic", "lr_source": "", "scale": 4}, "exact"),
        ({"degradation": "bilinear", "lr_source": "", "scale": 4}, "low-band"),
        ({"degradation": '{"name": "real"}', "lr_source": "", "scale": 2}, "low-band"),
        ({"degradation": "bicubic", "lr_source": "s3://twins", "scale": 4}, "low-band"),
        ({"degradation": "noise", "lr_source": "", "scale": 1}, "off"),
    ],
)
def test_only_what_bicubic_made_may_be_projected_exactly(recipe: dict[str, Any], allowed: str) -> None:
    assert allowed_consistency(recipe) == allowed
