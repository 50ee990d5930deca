"""The jobs and tools, one definition with two faces: `python jobs/<job>.py ...` and `diffsr <verb> ...`."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, NoReturn

from pipelines.heap import share_heap

PLACES = ("URI", "FILE", "FILES", "FOLDER")  # units of settings that are places
DONE, FAILED, BAD_ARGUMENTS, BUDGET_EXCEEDED, LEASE_HELD = 0, 1, 2, 3, 5  # 4 is a refused promotion


@dataclass(frozen=True)
class Job:
    """Where a job lives: imported when it is called, so that `--help` of one does not pay for the others.

    default: the verb when the first word is none, "" where one must be given; None for a job without verbs, whose
    module else lists them in VERBS. words: the module's function that turns words without a flag into flags.
    """

    module: str
    config: str
    function: str
    verb: str
    examples: str
    default: str | None = None
    words: str = ""


JOBS = {
    "make_pairs": Job("pipelines.pairs", "PairsConfig", "make_pairs", "pairs",
                      "make_pairs.py --source s3://archive/photos --output s3://archive/pairs --scale 4 --patch 256"),
    "train": Job("pipelines.training", "TrainConfig", "train", "train",
                 "train.py --pairs s3://archive/pairs --output s3://archive/runs/1 --preset nano-x4 --register diffsr"),
    "evaluate": Job("pipelines.evaluation", "EvaluateConfig", "evaluate", "evaluate", default="run", examples=
                    "evaluate.py --model models:/diffsr/1 --dataset s3://archive/held-out --output s3://archive/eval/1"),
    "promote": Job("pipelines.promotion", "PromoteConfig", "promote", "promote",
                   "promote.py --model diffsr --challenger 2 --dataset s3://archive/held-out\n"
                   "promote.py --model diffsr --rollback"),
    "upscale": Job("pipelines.upscaling", "UpscaleConfig", "upscale", "upscale",
                   "upscale.py --source s3://archive/in --output s3://archive/out --model models:/diffsr@champion\n"
                   "upscale.py status --source s3://archive/in --output s3://archive/out", default="run"),
    "manipulate": Job("pipelines.manipulation", "ManipulateConfig", "manipulate", "manipulate",
                      "manipulate.py samples --lr photo.png --output samples --model runs/1/model\n"
                      "manipulate.py interpolate --lr photo.png --output between --model runs/1/model\n"
                      "manipulate.py fuse --lr photo.png --donor other.png --mask mask.png --output fused", default=""),
    "image": Job("pipelines.one_image", "ImageConfig", "upscale_image", "image",
                 "image.py in.jpg out.png --start-level 0.4  (more texture than the model's own; 0.9: less)\n"
                 "image.py in.jpg out.png --model runs/1/model", words="split_words"),
    "import_weights": Job("pipelines.importing", "ImportConfig", "import_weights", "import",
                          "import_weights.py --weights I640000_E37_gen.pth --scale 8 --output s3://archive/models/sr3"),
}  # fmt: skip


def parse(job: str, argv: Sequence[str], *, prog: str | None = None) -> Any:
    """Return the job's config from its flags (its verb is skipped). Bad arguments are SystemExit(2)."""
    from pipelines.config import parse as parse_config

    entry = JOBS[job]
    config_class = getattr(import_module(entry.module), entry.config)
    _, argv = split_verb(job, argv)
    if entry.words:
        argv = getattr(import_module(entry.module), entry.words)(argv)
    return parse_config(config_class, argv, prog=prog or f"{job}.py", examples=entry.examples)


def split_verb(job: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return (verb, the flags): some jobs take a verb as first word."""
    words, entry = list(argv), JOBS[job]
    if entry.default is None:
        return "", words
    if not words or words[0].startswith("-"):
        asks = {"-h", "--help", "--print-config"} & set(words)
        if entry.default or asks:
            return entry.default, words
        words = ["", *words]
    verbs = import_module(entry.module).VERBS
    if words[0] not in verbs:
        print(f"{job}: error: verb ({words[0]!r}) must be one of {', '.join(verbs)}; use one of them", file=sys.stderr)
        raise SystemExit(BAD_ARGUMENTS)
    return words[0], words[1:]


def anchor(config: Any) -> Any:
    """Return the config with relative local paths made absolute: workers run in other folders."""
    from pipelines import storage

    changes: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        kind = item.metadata.get("unit")

        def place(text: str, kind: str | None = kind) -> str:
            is_place = kind in PLACES or kind in ("REF", "REFS") and not text.startswith(("models:/", "pretrained:"))
            return storage.absolute(text) if is_place else text

        if isinstance(value, str):
            changes[item.name] = place(value)
        elif isinstance(value, tuple) and kind in ("REFS", "FILES"):
            changes[item.name] = tuple(map(place, value))
    return replace(config, **changes)


def run_job(job: str, argv: Sequence[str], *, prog: str | None = None) -> int:
    """Run a job from its command line; print its summary as the last line of stdout; return the exit code."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    config = anchor(parse(job, argv, prog=prog))
    verb, _ = split_verb(job, argv)
    from pipelines.lease import LeaseHeld
    from pipelines.runs import Summary, TrainingFailed, new_run_id
    from pipelines.work import BudgetExceeded

    function: Callable[..., Summary] = getattr(import_module(JOBS[job].module), JOBS[job].function)
    started = time.monotonic()
    summary = Summary(job=JOBS[job].verb, run_id=new_run_id(JOBS[job].verb), status="failed", exit_code=FAILED)
    try:
        summary = function(config) if JOBS[job].default is None else function(config, verb=verb)
    except BudgetExceeded as error:
        counts: dict[str, Any] = dict(error.counts)
        summary = replace(summary, exit_code=BUDGET_EXCEEDED, **counts)
        print(f"{prog or job}: error: {error}", file=sys.stderr)
    except LeaseHeld as error:
        summary = replace(summary, exit_code=LEASE_HELD)
        print(f"{prog or job}: error: {error}", file=sys.stderr)
    except (ValueError, OSError, ImportError, TrainingFailed) as error:
        print(f"{prog or job}: error: {error}", file=sys.stderr)
    except Exception as error:
        if not _is_the_outside_world(error):
            raise
        print(f"{prog or job}: error: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        # Also when the code is at fault and a traceback follows: who reads stdout always finds the line.
        summary = replace(summary, seconds=round(time.monotonic() - started, 3))
        print(summary.to_line(), flush=True)
    return summary.exit_code


def run_and_exit(job: str, *, prog: str | None = None, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a job as the whole of this process, and leave with its exit code.

    It leaves at once, with all said and written: the interpreter's own end aborts now and then (exit code -6,
    "terminate called without an active exception", 3 of 18 local upscales) in the threads of the libraries' C++ side,
    which would make a night that went well look failed.
    """
    share_heap()
    code = run_job(job, sys.argv[1:] if argv is None else argv, prog=prog)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_the_outside_world(error: Exception) -> bool:
    """Return whether a store or a registry failed, not our code: told by module, so that neither need be imported."""
    return type(error).__module__.partition(".")[0] in ("mlflow", "botocore", "aiobotocore", "requests")


def main() -> None:
    """The console command `diffsr`."""
    verbs = {entry.verb: job for job, entry in JOBS.items()}
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print("usage: diffsr VERB [options]\n\nverbs (each has --help):")
        for verb, job in verbs.items():
            print(f"  {verb:12}{_first_line(job)}")
        raise SystemExit(DONE if words else BAD_ARGUMENTS)
    if words[0] not in verbs:
        print(
            f"diffsr: error: verb ({words[0]!r}) must be one of {', '.join(verbs)}; see diffsr --help", file=sys.stderr
        )
        raise SystemExit(BAD_ARGUMENTS)
    run_and_exit(verbs[words[0]], prog=f"diffsr {words[0]}", argv=words[1:])


def _first_line(job: str) -> str:
    entry = JOBS[job]
    return str(getattr(import_module(entry.module), entry.config).__doc__).partition("\n")[0]
