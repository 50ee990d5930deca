"""Score a model and its baselines on a data set.

ray job submit --working-dir . -- python jobs/evaluate.py --help
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("evaluate", sys.argv[1:]))
