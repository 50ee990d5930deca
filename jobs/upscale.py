"""Upscale a bucket with a registered model, every asset exactly once.

ray job submit --working-dir . -- python jobs/upscale.py --help
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("upscale", sys.argv[1:]))
