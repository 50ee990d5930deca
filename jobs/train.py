"""Train a diffusion super-resolution model on a pair set.

ray job submit --working-dir . -- python jobs/train.py --help
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("train", sys.argv[1:]))
