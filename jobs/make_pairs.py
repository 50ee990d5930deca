"""A bucket of images becomes a training set: LR-HR pairs in Parquet.

ray job submit --working-dir . -- python jobs/make_pairs.py --help
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("make_pairs", sys.argv[1:]))
