"""Which code runs, and in what environment: what the tags and the environment.txt of a run say."""

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch


def commit() -> str:
    """Return DIFFSR_COMMIT, else the git commit of the checkout that this package is part of, else "unknown".

    "-dirty" follows where something differs from that commit. A package that is installed below another project's
    checkout is not part of it: git must know its files.
    """
    if known := os.environ.get("DIFFSR_COMMIT"):
        return known
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one that git does not trust
        return "unknown"


@cache
def version() -> str:
    """Return the installed version of diffsr; "unknown" where it runs from a folder that was not installed."""
    try:
        return metadata.version("diffsr")
    except metadata.PackageNotFoundError:
        return "unknown"


def environment() -> str:
    """Return the environment of this process as text: Python, platform, CPU, torch, GPUs, each distribution's version.

    It names neither the machine nor a path. GPUs are asked for without a CUDA context, which the driver does not need.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    found = {
        (dist.metadata["Name"], dist.version) for dist in metadata.distributions() if dist.metadata["Name"] is not None
    }
    packages = sorted((f"{name}=={number}" for name, number in found), key=str.lower)
    lines = [
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
        f"cpu {_cpu_model()}, {os.cpu_count()} logical, {capability}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, cuDNN {cudnn or 'none'}",
        *_gpus(),
        "",
        *packages,
    ]
    return "\n".join(lines) + "\n"


def _git(*words: str) -> str:
    here = str(Path(__file__).resolve().parent)
    done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ["gpu none on the driver's machine"]
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [f"gpu {pynvml.nvmlDeviceGetName(handle)}, driver {driver}" for handle in handles]
    finally:
        pynvml.nvmlShutdown()
