"""Move the champion alias, on evidence, or roll it back.

ray job submit --working-dir . -- python jobs/promote.py --help
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("promote", sys.argv[1:]))
