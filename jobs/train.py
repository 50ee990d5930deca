"""Train a diffusion super-resolution model on a pair set.

ray job submit --working-dir . -- python jobs/train.py --help
"""

from pipelines.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("train")
