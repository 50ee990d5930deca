"""The whole loop on real photographs in minutes: what `make demo` runs. Each step is a job that you could type.

It begins with the model that ships, and fine-tunes it on the archive. The photographs come with
scikit-image. Everything is written below --output; run again, it redoes nothing.
"""

import argparse
import io
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffsr_core.degradation import Degradation, crop_to_multiple
from pipelines import storage

ARCHIVE = [
    "brick.png",
    "camera.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
]
HELD_OUT = ("astronaut.png", "chelsea.png", "coins.png")
SHIPPED = "pretrained:diffsr-x4"
WORKERS = ["--num-workers", 2]


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="where everything is written")
    parser.add_argument("--encoder-steps", type=int, default=150, help="fine-tuning steps of the encoder")
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps of the denoiser")
    options = parser.parse_args()
    root: Path = options.output.absolute()
    started = time.monotonic()
    prepare(root)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root}/mlflow.db"
    first = root / "first.png"
    if not first.exists():
        job("image", root / "inbox/people/astronaut.png", first)
    pairs = ["--patch", 64, "--min-deviation", 4, "--max-per-image", 200, "--val-share", 0.225, "--test-share", 0]
    job("make_pairs", "--source", root / "bucket", "--output", root / "pairs", *pairs,
        "--unit-megabytes", 1, "--num-workers", 2)  # fmt: skip
    recipe = ["--preset", "anchored-x4", "--init", SHIPPED, "--one-step", "--diversity", 0.8, "--learning-rate", 3e-4,
              "--encoder-steps", options.encoder_steps, "--steps", options.steps]  # fmt: skip
    trained = job("train", "--pairs", root / "pairs", "--output", root / "run", *recipe, "--precision", precision(),
                  "--num-workers", 2, "--cpus-per-worker", 0.5, "--register", "diffsr")  # fmt: skip
    version = trained["outputs"][-1].rpartition("/")[2]
    job("evaluate", "--model", f"models:/diffsr/{version}", "--against", SHIPPED, "--dataset", root / "held-out",
        "--output", root / "evaluation", *WORKERS)  # fmt: skip
    # Three photographs have wide intervals, and of two plausible textures neither is the photograph's.
    job("promote", "--model", "diffsr", "--challenger", version, "--dataset", root / "held-out", "--output",
        root / "promotion", "--ssim-margin", 0.02, *WORKERS)  # fmt: skip
    job("upscale", "run", "--source", root / "inbox", "--output", root / "outbox", "--model", "models:/diffsr@champion",
        "--unit-megabytes", 0.02, *WORKERS)  # fmt: skip
    nights = sorted((root / "outbox/_diffsr/reports").glob("*/night.html"))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\n{time.monotonic() - started:.0f} s; largest process of a job {peak:.1f} GiB")
    print(f"The first image: {first}")
    print(f"The evaluation:  {root}/evaluation/report.html")
    print(f"The night:       {nights[-1]}")
    print(f"MLflow:  {sys.executable} -m mlflow server --backend-store-uri sqlite:///{root}/mlflow.db --port 5000")


def precision() -> str:
    """Return bf16 where this CPU multiplies it in hardware, else float32 (emulated bf16 is several times slower)."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def job(name: str, *words: object) -> dict[str, Any]:
    """Run one job as a person would, its progress passing through; return its JSON summary. A failure ends the demo."""
    script = Path(__file__).resolve().parent.parent / "jobs" / f"{name}.py"
    arguments = [str(word) for word in words]
    print(f"\n$ python jobs/{name}.py {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout)
        raise SystemExit(f"demo: jobs/{name}.py ended with exit code {done.returncode}; its message is above")
    line = done.stdout.rstrip().rpartition("\n")[2]
    print(line, flush=True)
    summary: dict[str, Any] = json.loads(line)
    return summary


def prepare(root: Path) -> None:
    """Write the bucket, the held-out photographs and the inbox of LR photographs, once."""
    if (root / "inbox").is_dir():
        print(f"{root} has its photographs already")
        return
    data = files("skimage") / "data"
    for folder, names in (("bucket", ARCHIVE), ("held-out", HELD_OUT)):
        for name in names:
            storage.publish(root / folder / name, (data / name).read_bytes())
    photographs = {name: np.asarray(Image.open(root / "held-out" / name)) for name in HELD_OUT}
    low = {name: Degradation("bicubic", 4).apply(crop_to_multiple(x, 4), seed=0) for name, x in photographs.items()}
    person, cat, coins = (Image.fromarray(low[name]) for name in HELD_OUT)
    veil = Image.linear_gradient("L").resize(cat.size)
    with_alpha = cat.copy()
    with_alpha.putalpha(veil)
    turned = Image.Exif()
    turned[0x0112] = 6  # "turn me 90 degrees clockwise to look right"
    inbox = {
        "people/astronaut.png": encoded(person, "PNG"),
        "cat with alpha.png": encoded(with_alpha, "PNG"),
        "coins, grey.png": encoded(coins, "PNG"),
        "people/turned by EXIF.jpg": encoded(person.crop((20, 0, 110, 128)).rotate(90, expand=True), "JPEG", turned),
        "small.webp": encoded(cat.crop((30, 5, 83, 46)), "WEBP"),
        "truncated.png": encoded(person, "PNG")[:9000],
    }
    for name, content in inbox.items():
        storage.publish(root / "inbox.new" / name, content)
    os.replace(root / "inbox.new", root / "inbox")
    print(f"{len(ARCHIVE)} photographs in {root}/bucket, {len(HELD_OUT)} held out, {len(inbox)} files to upscale")


def encoded(image: Image.Image, format: str, exif: Image.Exif | None = None) -> bytes:
    """Return the image's bytes: lossless, but for JPEG."""
    sink = io.BytesIO()
    options: dict[str, Any] = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    image.save(sink, format, **options, **({"exif": exif} if exif else {}))
    return sink.getvalue()


if __name__ == "__main__":
    main()
