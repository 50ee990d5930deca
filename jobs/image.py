"""Upscale one image, without a cluster: the pixels that the nightly job would publish.

python jobs/image.py in.jpg out.png --model models:/diffsr@champion
"""

from pipelines.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("image")
