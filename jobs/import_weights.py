"""Turn a released SR3 or SRDiff weight file into a model folder.

python jobs/import_weights.py --help
"""

from pipelines.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("import_weights")
