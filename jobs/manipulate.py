"""Look into the space of a model's results for one LR image: samples, images between two, fused content.

python jobs/manipulate.py --help
"""

from pipelines.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("manipulate")
