"""A bucket of images becomes a training set: LR-HR pairs in Parquet.

ray job submit --working-dir . -- python jobs/make_pairs.py --help
"""

from pipelines.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("make_pairs")
