"""Move the champion alias, on evidence, or roll it back.

ray job submit --working-dir . -- python jobs/promote.py --help
"""

from pipelines.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("promote")
