"""Upscale a bucket with a registered model, every asset exactly once.

ray job submit --working-dir . -- python jobs/upscale.py --help
"""

from pipelines.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("upscale")
