"""Score a model and its baselines on a data set.

ray job submit --working-dir . -- python jobs/evaluate.py --help
"""

from pipelines.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("evaluate")
