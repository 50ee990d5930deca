"""All that needs a GPU to be proved or measured, in one command and in less than 8 minutes; prints its page.

    python -m tests.benchmarks.gpu_check > tests/benchmarks/gpu_check.md    # make gpu-check
    python -m tests.benchmarks.gpu_check --device cpu                       # tiny: shows that the code runs

It needs torch, numpy and safetensors: no Ray, no pairs, no weights, no network. Exit code 1 when a check fails, is not
run, or raises; how fast something is fails nothing.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from functools import lru_cache, partial

import torch

from tests.benchmarks import gpu_determinism, gpu_equality, gpu_memory, gpu_speed, training_gpu
from tests.benchmarks.gpu_cases import Case, Cells, Clock, Section, Verdict, free_memory, outcome
from tests.benchmarks.steps import cpu_name

BUDGET_S = 420.0
# Preset and images of a step; warm-up and measured steps are training_gpu's.
TRAINED = {
    "cuda": (("srdiff-df2k-x4", 64), ("sr3-lite-16-128", 64), ("anchored-x4", 64)),
    "cpu": (("nano-x4", 1),),
}
NUM_STEPS = {"cuda": 20, "cpu": 1}
SECTIONS = ("equality", "determinism", "memory", "beside", "yardsticks", "training", "speed")
PAGE = """# What a GPU gives

Printed by `{command}` on {date}.
{device}, torch {torch}{cuda}, {seconds:.0f} s.

**{sum}**

| check | result | limit | verdict |
|---|---|---|---|
{verdicts}
{sections}

{notes}"""
CPU_NOTE = """
On a CPU this page shows that the code runs: equality compares the CPU with itself, memory counts the tensors that live,
and sizes are tiny.
"""


def sections_of(names: Sequence[str], device: str) -> list[Section]:
    """Return the parts of these names, in the order in which they run: what is judged first, what compiles last."""
    made = {
        "equality": gpu_equality.section,
        "determinism": gpu_determinism.section,
        "memory": gpu_memory.section,
        "beside": gpu_speed.beside_section,
        "yardsticks": gpu_speed.yardsticks_section,
        "training": training_section,
        "speed": gpu_speed.section,
    }
    return [made[name](device) for name in SECTIONS if name in names]


def training_section(device: str) -> Section:
    """Return the cases of training speed; training_gpu says what its columns are."""
    cases = []
    for name, batch in TRAINED[device]:
        cases.append(Case(f"training of {name}", partial(trained, name, batch, device), 25.0))
    note = "bf16; the last stage of each preset; utilisation is against products of two bf16 matrices."
    return Section("Speed of training", cases, training_gpu.HEAD, note)


def trained(name: str, batch: int, device: str) -> list[Cells]:
    """Measure the training of one preset."""
    free_memory()
    result = training_gpu.timed(name, device=device, batch=batch, num_steps=NUM_STEPS[device], compiled=False)
    line = training_gpu.row(name, result, batch=batch, peak_flops=product_peak(device))
    return [Cells(tuple(cell.strip() for cell in line.strip("| ").split(" | ")))]


@lru_cache
def product_peak(device: str) -> float:
    """Return FLOP/s of products of two bf16 matrices."""
    return training_gpu.peak(device, training_gpu.MATRIX_SIDE[device] // (1 if device == "cuda" else 4))


def run(sections: list[Section], clock: Clock) -> tuple[list[Verdict], list[str]]:
    """Return the verdicts of all sections, and the tables of those that have one. stderr has each row at once."""
    verdicts, tables = list[Verdict](), list[str]()
    for section in sections:
        lines = []
        for case in section.cases:
            for row in outcome(case, clock, judged=not section.head):
                if isinstance(row, Verdict):
                    verdicts.append(row)
                    print(line_of(row), file=sys.stderr, flush=True)
                else:
                    lines.append(f"| {' | '.join(row.texts)} |")
                    print(lines[-1], file=sys.stderr, flush=True)
        if section.head:
            head = f"| {' | '.join(section.head)} |\n|{'---|' * len(section.head)}"
            tables.append(
                "\n".join([f"\n## {section.title}\n", head, *lines, *([f"\n{section.note}"] * bool(section.note))])
            )
    return verdicts, tables


def line_of(verdict: Verdict) -> str:
    """Return a verdict's row; a pipe in an error's message would end the cell."""
    word = {True: "pass", False: "**FAIL**", None: "-"}[verdict.passed]
    return f"| {' | '.join(text.replace('|', '/') for text in (*verdict[:3], word))} |"


def summary(verdicts: list[Verdict]) -> str:
    """Return one line: whether all that was judged is good."""
    judged = [verdict for verdict in verdicts if verdict.passed is not None]
    failed = [verdict.check for verdict in judged if not verdict.passed]
    if failed:
        return f"FAIL: {len(failed)} of {len(judged)}: {'; '.join(failed)}"
    return f"PASS: {len(judged)} of {len(judged)}" if judged else "nothing was judged"


def notes(names: Sequence[str], device: str) -> str:
    """Return why the limits are what they are, and on a CPU what the page does not say."""
    text = ""
    if "equality" in names and gpu_equality.__doc__:
        text = "## Limits of equality\n\n" + gpu_equality.__doc__.partition("\n\n")[2].strip() + "\n"
        for name in ("FLOAT32_LIMIT", "BF16_RATIO", "LEVEL_SHARE"):
            text = text.replace(name, f"{getattr(gpu_equality, name):g}")
    return text + (CPU_NOTE if device == "cpu" else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page; return the exit code."""
    parser = argparse.ArgumentParser(description="What needs a GPU to be proved or measured.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the code, tiny")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="only these")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="what would end later does not begin")
    given = parser.parse_args(arguments)
    device, names = given.device, given.sections
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --device cpu tries the code")
    clock = Clock(given.seconds)
    verdicts, tables = run(sections_of(names, device), clock)
    print(
        PAGE.format(
            command=" ".join(
                ["python -m tests.benchmarks.gpu_check", *(sys.argv[1:] if arguments is None else arguments)]
            ),
            date=datetime.date.today(),
            device=cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
            torch=torch.__version__,
            cuda=f", CUDA {torch.version.cuda}" if device == "cuda" else "",
            sum=summary(verdicts),
            verdicts="\n".join(map(line_of, verdicts)),
            sections="\n".join(tables),
            notes=notes(names, device),
            seconds=clock.used_s,
        )
    )
    return int(any(verdict.passed is False for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
