"""The anchored-x4 network, prepared, against exports of it to other runtimes; prints exports.md.

    python -m tests.benchmarks.exports > tests/benchmarks/exports.md

It needs onnx, onnxscript, onnxruntime and openvino, which the project does not install: run it with the Python of an
environment that has them beside torch, numpy and safetensors. torch.compile also needs a C++ compiler.

Every runtime has a process of its own, two in turn; a call is measured in CPU seconds of its process, all threads, so
that on a shared machine what others took is left out, and each network reports its best call.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffsr_core import presets
from diffsr_core.family import SuperResolver
from diffsr_core.prepared import prepared
from diffsr_core.sampler import default_grid
from diffsr_core.schedule import sampling_grid
from tests.benchmarks.steps import cpu_name, gflops_of

PRESET = "anchored-x4"
BATCH, LR_PX = 4, 64  # the micro-batch and the tile of a recipe
CALLS, WARM_UP, ROUNDS = 12, 3, 2
CONVS_A_CALL = 4  # convolutions timed beside each call of the network
LEAST_GAIN = 1.3  # over ours of the same precision: what a second runtime must give to be kept
MOST_OFF = 1e-4  # of a float32 export, anywhere in its outputs
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino")
GRAPH, REFERENCE = "network.onnx", "reference.npz"

Arrays = tuple[np.ndarray, ...]
Call = Callable[[], Arrays]


class Measured(NamedTuple):
    """Of a network in a runtime: least CPU seconds of a call and of the convolution beside it; the largest difference
    of its outputs from plain torch in float32."""

    seconds: float
    conv_seconds: float
    off: float


class OneStep(nn.Module):
    """(LR (B, 3, h, w), x_T (B, 48, h, w)) -> (image (B, 3, 4h, 4w), features (B, 64, h, w), prediction like x_T).

    Called as Upscaler calls the two networks; the noise level is the grid's noisiest, so a graph may fold it.
    """

    def __init__(self, model: SuperResolver) -> None:
        super().__init__()
        self.model = model
        self.level = sampling_grid(model.config.schedule, 1, family=default_grid("ddim"))[0].item()

    def forward(self, lr: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, image = self.model.encoder(lr)
        level = torch.full((len(x_t),), self.level, device=x_t.device)
        return image.float(), features.float(), self.model.predict(x_t, level, features).float()


def network() -> OneStep:
    """Return the preset's networks in eval mode, weights random, no convolution zero as training would begin."""
    torch.manual_seed(0)
    model = SuperResolver(presets.get(PRESET).model).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return OneStep(model).eval()


def inputs() -> tuple[Tensor, Tensor]:
    """Return (LR in [-1, 1], x_T)."""
    generator = torch.Generator().manual_seed(1)
    lr = 2 * torch.rand(BATCH, 3, LR_PX, LR_PX, generator=generator) - 1
    return lr, torch.randn(BATCH, 48, LR_PX, LR_PX, generator=generator)


def call_of(module: nn.Module | Callable[..., Any], precision: str, *, guard: Any = torch.inference_mode) -> Call:
    """Return the call of a torch module under the autocast of its precision."""
    given = inputs()

    def call() -> Arrays:
        with guard(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return tuple(out.numpy() for out in module(*given))

    return call


def ours(precision: str, _: Path) -> Call:
    """Return the call of the prepared network."""
    return call_of(prepared(network(), precision="bf16" if precision == "bf16" else "float32"), precision)


def compiled(precision: str, _: Path) -> Call:
    """Return the call of the channels_last network that torch.compile made, its weights frozen into it."""
    plain = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return call_of(torch.compile(plain, options={"freezing": True}), precision, guard=torch.no_grad)


def onnx_runtime(_: str, folder: Path) -> Call:
    """Return the call of the exported graph in onnxruntime, float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    given = dict(zip((i.name for i in session.get_inputs()), (t.numpy() for t in inputs()), strict=True))
    return lambda: tuple(session.run(None, given))


def open_vino(precision: str, folder: Path) -> Call:
    """Return the call of the exported graph in OpenVINO. Raises RuntimeError where it does not take the precision."""
    import openvino

    wanted = {"float32": openvino.Type.f32, "bf16": openvino.Type.bf16}[precision]
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": wanted, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    made = core.compile_model(core.read_model(folder / GRAPH), "CPU", settings)
    precision_taken = made.get_property("INFERENCE_PRECISION_HINT")
    if precision_taken != wanted:
        raise RuntimeError(f"OpenVINO runs in {precision_taken}, not in {precision}, on this CPU")
    request, given = made.create_infer_request(), [t.numpy() for t in inputs()]

    def call() -> Arrays:
        found = request.infer(given, share_inputs=True, share_outputs=True)
        return tuple(found[port] for port in made.outputs)

    return call


RUNTIMES: dict[str, tuple[Callable[[str, Path], Call], tuple[str, ...]]] = {
    "ours, prepared": (ours, ("float32", "bf16")),
    "onnxruntime": (onnx_runtime, ("float32",)),
    "OpenVINO": (open_vino, ("float32", "bf16")),
    "torch.compile": (compiled, ("float32", "bf16")),
}
OURS = "ours, prepared"


def convolution(precision: str) -> Callable[[], object]:
    """Return the call of the yardstick: one 3x3 convolution of 64 to 64 channels at the tile's size, channels_last."""
    torch.manual_seed(2)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    conv = prepared(layer, precision="bf16" if precision == "bf16" else "float32")
    pixels = torch.randn(BATCH, 64, LR_PX, LR_PX).to(dtype).contiguous(memory_format=torch.channels_last)

    def call() -> object:
        with torch.inference_mode():
            return conv(pixels)

    return call


def taken(call: Callable[[], object]) -> float:
    """Return the CPU seconds of one call, of all threads of this process."""
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(runtime: str, folder: Path) -> dict[str, Measured]:
    """Return what a runtime takes per precision, its precisions and their convolutions in turn."""
    torch.set_num_threads(1)
    make, precisions = RUNTIMES[runtime]
    calls = {precision: make(precision, folder) for precision in precisions}
    convs = {precision: convolution(precision) for precision in precisions}
    with np.load(folder / REFERENCE) as stored:
        wanted = [stored[name] for name in stored.files]
    off = {p: max(float(np.abs(a - b).max()) for a, b in zip(calls[p](), wanted, strict=True)) for p in precisions}
    seconds, conv_seconds = dict.fromkeys(precisions, math.inf), dict.fromkeys(precisions, math.inf)
    for index in range(WARM_UP + CALLS):
        for precision in precisions:
            conv_s = min(taken(convs[precision]) for _ in range(CONVS_A_CALL))
            call_s = taken(calls[precision])
            if index >= WARM_UP:
                conv_seconds[precision] = min(conv_s, conv_seconds[precision])
                seconds[precision] = min(call_s, seconds[precision])
    return {p: Measured(seconds[p], conv_seconds[p], off[p]) for p in precisions}


def export(folder: Path) -> None:
    """Write the graph, of fixed shapes, and what plain torch gives in float32 for the inputs."""
    torch.set_num_threads(1)
    plain, given = network(), inputs()
    np.savez(folder / REFERENCE, *call_of(plain, "float32", guard=torch.no_grad)())
    torch.onnx.export(plain, given, folder / GRAPH, dynamo=True, external_data=False, verbose=False)


def apart(*arguments: str) -> str:
    """Return the last line on stdout of this module run in a process of its own, on one thread."""
    command = [sys.executable, "-m", "tests.benchmarks.exports", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return (done.stdout.strip().splitlines() or [""])[-1]


def rounds(names: list[str], folder: Path) -> dict[tuple[str, str], list[Measured]]:
    """Return what every (runtime, precision) took in each round, the runtimes in turn."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for _ in range(ROUNDS):
        for name in names:
            told = json.loads(apart("--measure", name, "--folder", str(folder)))
            for precision, numbers in told.items():
                found.setdefault((name, precision), []).append(Measured(*numbers))
    return found


def best(found: list[Measured]) -> Measured:
    """Return the best of the rounds: least times, largest difference."""
    return Measured(*(pick(values) for pick, values in zip((min, min, max), zip(*found, strict=True), strict=True)))


def rows(found: dict[tuple[str, str], list[Measured]], gflops: float) -> Iterator[str]:
    """Yield the rows of the table."""
    conv_gflops = 2 * 9 * 64**2 * BATCH * LR_PX**2 / 1e9
    for (name, precision), each in found.items():
        one, yardstick = best(each), best(found[OURS, precision])
        gain, rate, peak = yardstick.seconds / one.seconds, gflops / one.seconds, conv_gflops / one.conv_seconds
        each_round = " / ".join(f"{m.seconds * 1e3:.0f}" for m in each)
        yield (
            f"| {name} | {precision} | {one.seconds * 1e3:.0f} | {each_round} | {gain:.2f}x | "
            f"{rate:.0f} | {peak:.0f} | {rate / peak:.0%} | {one.off:.1e} |"
        )


def decision(found: dict[tuple[str, str], list[Measured]]) -> str:
    """Return what the numbers decide, as a paragraph."""
    gains = {
        key: best(found[OURS, key[1]]).seconds / best(each).seconds for key, each in found.items() if key[0] != OURS
    }
    said = "; ".join(f"{name} {precision} {gain:.2f}x" for (name, precision), gain in gains.items())
    winners = [f"{name} in {precision}" for (name, precision), gain in gains.items() if gain >= LEAST_GAIN]
    most = max(max(m.seconds for m in found[OURS, key[1]]) / best(found[key]).seconds for key in gains)
    verdict = f"{' and '.join(winners)} reached it." if winners else "None reached it, so none is kept."
    return (
        f"Another runtime is kept only where ours of the same precision takes {LEAST_GAIN} times as long: it would be "
        "other bytes for the same recipe, a dependency, and a conversion to prove for every network. "
        f"Measured: {said}; with ours in its worse round, {most:.2f}x at most. {verdict}"
    )


def missing() -> list[str]:
    """Return the packages of other runtimes that this Python lacks."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def page(found: dict[tuple[str, str], list[Measured]], gflops: float) -> str:
    """Return exports.md."""
    left_out = "" if ("torch.compile", "bf16") in found else " torch.compile was left out: here is no C++ compiler."
    about = (
        f"{PRESET}, its weights random and none of them zero: the encoder's image and features and one call of the "
        f"denoiser at the noisiest level, {gflops:.1f} GFLOPs in {BATCH} tiles of {LR_PX} px, as a recipe has them. "
        "An export is one graph of that fixed shape, in which the level is a constant; ours is two networks, called as "
        "Upscaler calls them; torch.compile is given the same, channels_last, with frozen weights." + left_out
    )
    columns = (
        f"Milliseconds of CPU time per call: the least of {CALLS} calls after {WARM_UP + 1} to warm up, in each of "
        f"{ROUNDS} rounds, and the least of these. The *convolution* is one of 3x3, 64 to 64 channels, at that size, "
        "channels_last and packed, of the same type, by torch in the same process; *share* is the network's GFLOP/s "
        "over its. *off* is the largest difference from plain torch in float32 over all outputs: each float32 row is "
        f"below {MOST_OFF:.0e}, or this page is not printed."
    )
    return f"""# Would an export of the network be faster?

Printed by `python -m tests.benchmarks.exports` on {datetime.date.today()}.
{cpu_name()}, 1 thread.
torch {torch.__version__}, {", ".join(f"{name} {version(name)}" for name in PACKAGES)}.

{textwrap.fill(about, 120)}

{textwrap.fill(columns, 120)}

| runtime | precision | ms | each round | ours / it | GFLOP/s | of the convolution | share | off |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows(found, gflops))}

{textwrap.fill(decision(found), 120)}"""


def main() -> None:
    """Print exports.md. Exits with a message where a package is missing or a float32 row is not torch's network."""
    parser = argparse.ArgumentParser(description="The prepared network against exports of it.")
    parser.add_argument("--folder", type=Path, help="for the processes of its own: write the graph here, and stop")
    parser.add_argument("--measure", choices=RUNTIMES, help="with --folder: one runtime, as JSON")
    arguments = parser.parse_args()
    if lacking := missing():
        sys.exit(f"this Python lacks {', '.join(lacking)}: install them beside torch in an environment of its own")
    if arguments.measure and not arguments.folder:
        parser.error("--measure needs --folder, where the graph is")
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder)))
    elif arguments.folder:
        export(arguments.folder)
    else:
        names = [name for name in RUNTIMES if name != "torch.compile" or shutil.which("g++") or shutil.which("clang++")]
        with tempfile.TemporaryDirectory() as folder:
            apart("--folder", folder)
            found = rounds(names, Path(folder))
        for (name, precision), each in found.items():
            if precision == "float32" and not best(each).off < MOST_OFF:
                sys.exit(
                    f"{name} differs from torch by {best(each).off:.1e} in float32: it must be below {MOST_OFF:.0e}"
                )
        print(page(found, gflops_of(network(), inputs())))


if __name__ == "__main__":
    main()
