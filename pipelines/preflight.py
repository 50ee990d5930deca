"""What refuses a training before its first step, with the numbers: pairs, logical CPUs or memory that do not fit."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from diffsr_core import presets
from diffsr_core.consistency import Consistency
from diffsr_core.degradation import Degradation
from diffsr_core.family import ModelConfig
from diffsr_core.memory import MemoryPlan
from pipelines import storage
from pipelines.blobs import decode_blob
from pipelines.config import check
from pipelines.engine import say
from pipelines.images import Refused
from pipelines.manifest import Manifest, Shard, columns_that_decide, root_of
from pipelines.rows import AHEAD, find_pairs, iter_tables

FIRST = 16  # pairs of train whose LR is decoded


class Kind(NamedTuple):
    """What the small columns say of a pair; pairs are counted by it."""

    split: str
    hr_channels: int
    hr_h: int
    hr_w: int
    lr_h: int
    lr_w: int
    scale: int


COLUMNS = ("pair_id", "hr", "lr", *Kind._fields)  # those without which a shard cannot be trained on


def check_pairs(
    pairs: str, manifest: Manifest, *, model: ModelConfig, preset: str, batch_size: int, crop_px: int | None
) -> None:
    """Raise ValueError unless these pairs can train this model, in batches of batch_size; crop_px: HR side of a crop.

    The manifest is judged first, then the small columns of every shard, at last the LR of a few pairs. What is
    allowed and odd is said: pairs made by another kernel than the model's, an empty split `val`.
    """
    _check_recipe(manifest.recipe, model=model, preset=preset, crop_px=crop_px)
    have, val = manifest.num_pairs("train"), manifest.num_pairs("val")
    if not have:
        raise ValueError(
            f"split (train) of {pairs} must hold pairs; it holds none, val {val} and test {manifest.num_pairs('test')}"
            ": add sources, or make the set with a smaller --val-share and --test-share"
        )
    check(have >= batch_size, "pairs in split train", have, f"must be at least the batch ({batch_size})", "add sources")
    _check_columns(pairs, manifest)
    _check_rows(pairs, manifest, model=model, preset=preset)
    _check_lr_channels(pairs, manifest, model=model, preset=preset)
    if not val:
        say("train: the split val holds no pairs, so nothing is validated while training")


def _check_recipe(recipe: dict[str, Any], *, model: ModelConfig, preset: str, crop_px: int | None) -> None:
    scale, patch = recipe["scale"], recipe["patch"]
    if scale != model.scale:
        others = ", ".join(name for name in presets.names() if presets.get(name).model.scale == scale)
        check(False, "pairs scale", scale, f"must be that of {preset} ({model.scale})",
              "make other pairs" + (f", or use a preset of this scale: {others}" if others else ""))  # fmt: skip
    stride, least = model.lr_stride * scale, model.lr_smallest * scale
    rule = f"must be a multiple of {stride}, {least} at least, for {preset}"
    if crop_px is None:
        check(patch % stride == 0 and patch >= least, "pairs patch", patch, rule, "make other pairs")
    else:
        largest = patch // stride * stride
        remedy = f"use {largest}" if largest >= least else "make other pairs"
        check(crop_px <= patch, "crop", crop_px, f"must be at most the patch of the pairs ({patch})", remedy)
        check(crop_px % stride == 0 and crop_px >= least, "crop", crop_px, rule, remedy)
    made = _made_by(recipe)
    read = getattr(model.encoder, "kernel", "none")
    if made in ("bicubic", "bilinear") and read in ("bicubic", "bilinear") and made != read:
        say(f"train: the pairs were made by {made}, and {preset} enlarges its condition by {read}")


def allowed_consistency(recipe: dict[str, Any]) -> Consistency:
    """Return the projection that a model of these pairs may trust: only what bicubic made does bicubic give back.

    recipe: the manifest's. At scale 1 there is none: it would give the input back.
    """
    if recipe["scale"] == 1:
        return "off"
    return "exact" if _made_by(recipe) == "bicubic" else "low-band"


def _made_by(recipe: dict[str, Any]) -> str:
    return "twins" if recipe["lr_source"] else Degradation.parse(recipe["degradation"], recipe["scale"]).name


def _check_columns(pairs: str, manifest: Manifest) -> None:
    """Raise ValueError for the first shard that lacks a column; only footers are read, of several at the same time."""
    root, shards = root_of(pairs), manifest.sorted_shards()

    def missing(shard: Shard) -> list[str]:
        try:
            with storage.open_file(storage.join(root, shard.name), block_bytes=2**18) as handle:
                found = set(pq.read_schema(handle).names)
        except (FileNotFoundError, pa.ArrowInvalid):
            return []  # iter_tables comes next, and says what is wrong with this shard
        return sorted({*COLUMNS, *columns_that_decide(shard)} - found)

    with ThreadPoolExecutor(AHEAD) as pool:
        for shard, names in zip(shards, pool.map(missing, shards), strict=True):
            if names:
                raise ValueError(
                    f"shard ({shard.name}) must have the columns of a pair set; it lacks {', '.join(names)}: make the "
                    "set again with make_pairs.py"
                )


def _check_rows(pairs: str, manifest: Manifest, *, model: ModelConfig, preset: str) -> None:
    """Raise ValueError unless the rows of train and val are as many as was promised, and alike as a batch must be."""
    kinds: Counter[Kind] = Counter()
    for table in iter_tables(pairs, manifest, list(Kind._fields)):
        counted = table.group_by(list(Kind._fields)).aggregate([([], "count_all")])
        for *values, count in zip(*(counted[name].to_pylist() for name in (*Kind._fields, "count_all")), strict=True):
            kinds[Kind(*values)] += count
    kinds = Counter({kind: count for kind, count in kinds.items() if kind.split in ("train", "val")})
    for split in ("train", "val"):
        told, found = manifest.num_pairs(split), sum(count for kind, count in kinds.items() if kind.split == split)
        if found != told:
            raise ValueError(f"split ({split}) of {pairs} must hold {told} pairs, not {found}: make the set again")

    def check_all(what: Callable[[Kind], str], right: list[str], remedy: str) -> None:
        wrong: Counter[str] = Counter()
        for kind, count in kinds.items():
            if (found := what(kind)) not in right:
                wrong[found] += count
        if wrong:
            shown = ", ".join(f"{count} have {text}" for text, count in wrong.most_common(3))
            rest = wrong.total() - sum(count for _, count in wrong.most_common(3))
            raise ValueError(
                f"pairs ({pairs}) must have {' or '.join(right)}; of {kinds.total()} rows {shown}"
                f"{f', {rest} something else' if rest else ''}: {remedy}"
            )

    scale, patch = manifest.recipe["scale"], manifest.recipe["patch"]
    small, again = patch // scale, "make the set again, it is not what its recipe says"
    check_all(lambda row: f"scale {row.scale}", [f"scale {scale}"], again)
    check_all(lambda row: _sides(row.hr_h, row.hr_w, row.lr_h, row.lr_w), [_sides(patch, patch, small, small)], again)
    channels = [_channels(number) for number in sorted({1, model.encoder.channels}, reverse=True)]
    check_all(lambda row: _channels(row.hr_channels), channels, f"make them with other --bands, or choose "
              f"another preset than {preset}")  # fmt: skip


def _check_lr_channels(pairs: str, manifest: Manifest, *, model: ModelConfig, preset: str) -> None:
    """Raise ValueError for an LR among the first pairs: no column tells its channels, and a twin has its own."""
    encoder = model.encoder
    right = {encoder.lr_channels} if encoder.extra_channels else {1, encoder.lr_channels}
    shard = next(shard for shard in manifest.sorted_shards() if shard.splits.get("train"))
    (table,) = iter_tables(pairs, replace(manifest, shards=[shard]), ["pair_id"])
    ids = table.filter(pc.equal(table["split"], "train"))["pair_id"][:FIRST].to_pylist()
    for _, lr in find_pairs(pairs, shard.name, set(ids)).values():
        with suppress(Refused):  # a corrupt row is counted by the training, which has a budget for them
            if (found := decode_blob(lr).shape[2]) not in right:
                raise ValueError(
                    f"pairs ({pairs}) must have {' or '.join(map(_channels, sorted(right, reverse=True)))} in LR for "
                    f"{preset}; one of the first has {_channels(found)}: use other twins, or another preset"
                )


def _channels(number: int) -> str:
    return f"{number} channel{'' if number == 1 else 's'}"


def _sides(hr_h: int, hr_w: int, lr_h: int, lr_w: int) -> str:
    return f"{hr_h} x {hr_w} px in HR and {lr_h} x {lr_w} px in LR"


def bundle_cpus(cpus_per_worker: float, num_data_workers: int) -> float:
    """Return the logical CPUs that a worker reserves on its node: its own, and one for each of its data workers.

    Data workers that had to find CPUs of their own would wait without end for those that the other workers of a full
    cluster hold (ray#44687, ray#41603, mlforecast#731).
    """
    return cpus_per_worker + num_data_workers


def check_cpus(
    *,
    num_workers: int,
    cpus_per_worker: float,
    num_data_workers: int,
    use_gpu: bool,
    nodes: list[dict[str, float]],
    may_grow: bool = False,
) -> None:
    """Raise ValueError for what the nodes (CPU and GPU of each) cannot hold; where they may grow it is only said.

    num_data_workers: of each worker. A worker's bundle must fit one node.
    """
    check(_parts(cpus_per_worker) > 0, "cpus_per_worker", cpus_per_worker, "must be at least 0.0001", "use 0.5 or 1")
    lack = _lack(num_workers, cpus_per_worker, num_data_workers=num_data_workers, use_gpu=use_gpu, nodes=nodes)
    if lack is None:
        return
    what, remedy = lack
    if not may_grow:
        raise ValueError(f"{what}: {remedy}, or --wait-for-nodes where the cluster grows")
    say(f"train: {what}: it waits until the cluster grows")


def _lack(
    num_workers: int, cpus_per_worker: float, *, num_data_workers: int, use_gpu: bool, nodes: list[dict[str, float]]
) -> tuple[str, str] | None:
    """Return what the nodes lack, and the remedy; None where they lack nothing."""
    one, need = _parts(1), _parts(bundle_cpus(cpus_per_worker, num_data_workers))
    cpus, gpus = ([_parts(node.get(name, 0)) for node in nodes] for name in ("CPU", "GPU"))
    rooms = [min(cpu // need, gpu // one) if use_gpu else cpu // need for cpu, gpu in zip(cpus, gpus, strict=True)]
    room, num_gpus = sum(rooms), sum(gpu // one for gpu in gpus)
    if use_gpu and num_gpus < num_workers:
        what = f"num_workers ({num_workers}) must have a GPU each; the cluster has {num_gpus}"
        return what, f"use --num-workers {num_gpus}" if num_gpus else "leave out --use-gpu"
    if room >= num_workers:
        return None
    what = (
        f"num_workers ({num_workers}) must each find {need / one:g} logical CPUs ({cpus_per_worker:g} to train, "
        f"{num_data_workers} for data workers){' and a GPU' * use_gpu} on one node; {room} can: of {sum(cpus) / one:g} "
        f"CPUs the largest of {len(nodes)} nodes has {max(cpus, default=0) / one:g}"
    )
    fewer = f", or --num-workers {room}" if room else ""
    return what, f"use fewer --data-workers or --cpus-per-worker{fewer}"


def _parts(quantity: float) -> int:
    """Return a quantity as Ray counts it: in ten-thousandths, so that 3 x 0.1 is 0.3."""
    return round(quantity * 10_000)


def check_memory(plan: MemoryPlan, *, available_bytes: int, where: str, in_use: Collection[str] = ()) -> None:
    """Raise ValueError unless the plan fits into available_bytes; `where` names these.

    in_use: flags that the training has already, which are no remedy. Fewer activations help unless all the rest is
    what does not fit; sharding the rest helps unless the activations alone do not fit.
    """
    if plan.total_bytes <= available_bytes:
        return
    activations = plan.activations_bytes
    rest_fits, activations_fit = plan.total_bytes - activations < available_bytes, activations < available_bytes
    remedies = ["a smaller --micro-batch", "--checkpoint-activations", "--precision bf16"]
    remedies = remedies if rest_fits or not activations_fit else []
    remedies += ["--strategy fsdp2 over more workers"] if activations_fit or not rest_fits else []
    remedies = [remedy for remedy in remedies if not any(flag in remedy for flag in in_use)]
    remedies += ["or more memory" if remedies else "more memory"]
    raise ValueError(
        f"memory of a worker, {plan.describe()}, must be at most the {available_bytes / 2**30:.2f} GiB of {where}; "
        f"use {', '.join(remedies)}"
    )


def available_memory(use_gpu: bool) -> tuple[int, str]:
    """Return the bytes that this process may use on the machine it runs on, and the words for them.

    All memory of its GPU; or the least of what the machine has available and what its control groups leave. Workers
    that share a machine share it. Raises ValueError for a GPU that is not there.
    """
    if use_gpu:
        check(torch.cuda.is_available(), "use_gpu", True, "must find a GPU where it trains; PyTorch sees none",
              "leave out --use-gpu, or install PyTorch for the driver of this machine")  # fmt: skip
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return gpu.total_memory, f"the GPU ({gpu.name})"
    left = min(_left_by_control_groups(), default=None)
    free = psutil.virtual_memory().available
    return (free, "this machine") if left is None or free <= left else (left, "the control group of this process")


_CONTROL_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _left_by_control_groups() -> Iterator[int]:
    """Yield limit minus usage of each control group that this process is in and that limits memory.

    Files' pages that the kernel can drop are not usage, as they are not in the machine's own count. A container that
    sees only its own group finds it at the root, whatever its name is outside: so all ancestors are tried.
    """
    for line in _OWN.read_text().splitlines() if _OWN.exists() else []:  # 4:memory:/a/b in version 1, 0::/a/b in 2
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, usage, droppable = (
            (_CONTROL_GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else (_CONTROL_GROUPS, "memory.max", "memory.current", "inactive_file")
        )
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (folder / limit).exists():
                most = (folder / limit).read_text().strip()
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                if most != "max":
                    yield max(0, int(most) - int((folder / usage).read_text()) + int(stat.get(droppable, 0)))
