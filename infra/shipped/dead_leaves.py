"""Draws images of sharp edges to train with beside photographs: overlapping shapes, strokes and letters.

    python -m infra.shipped.dead_leaves --output FOLDER --count 100

Few photographs hold few edges of few kinds, and a network trained on them alone blurs those of others. Sizes follow the
law of natural images. Source: Lee, Mumford and Huang 2001 (dead leaves); Achddou et al. 2021
(networks trained on them restore photographs).
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, FINER = 256, 4  # drawn FINER times as large, then reduced: edges as a lens gives them
SMALLEST, LARGEST = 3.0, 160.0  # radii in px of the result
SHAPES = 250
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789&%?!"


def draw_image(seed: int) -> Image.Image:
    """Return one RGB image, SIDE x SIDE px, a function of the seed."""
    chance, side = random.Random(seed), SIDE * FINER
    palette = [_colour(chance) for _ in range(chance.randint(3, 24))]
    image = Image.new("RGB", (side, side), palette[0])
    brush = ImageDraw.Draw(image)
    for _ in range(SHAPES):
        colour = tuple(min(255, max(0, value + chance.randint(-12, 12))) for value in chance.choice(palette))
        # The density of radii falls with their square between the two ends.
        low, high = 1 / SMALLEST, 1 / LARGEST
        radius = FINER / (low + (high - low) * chance.random())
        x, y = chance.uniform(0, side), chance.uniform(0, side)
        chance.choice((_disk, _polygon, _polygon, _stripes, _stroke, _stroke, _letter))(
            brush, chance, x, y, radius, colour
        )
    image = image.reduce(FINER)
    if chance.random() < 0.5:  # film grain, and half of the images without
        noise = np.random.default_rng(seed).normal(0, chance.uniform(0.5, 4), (SIDE, SIDE, 1))
        image = Image.fromarray(np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8))
    return image


Colour = tuple[int, ...]


def _colour(chance: random.Random) -> Colour:
    """Return a colour: of any brightness, and mostly near grey, as those of photographs."""
    grey, spread = chance.randrange(256), chance.choice((10, 30, 80))
    return tuple(min(255, max(0, round(chance.gauss(grey, spread)))) for _ in range(3))


def _disk(brush: ImageDraw.ImageDraw, chance: random.Random, x: float, y: float, radius: float, colour: Colour) -> None:
    flat = chance.uniform(0.3, 1)
    brush.ellipse((x - radius, y - radius * flat, x + radius, y + radius * flat), fill=colour)


def _polygon(
    brush: ImageDraw.ImageDraw, chance: random.Random, x: float, y: float, radius: float, colour: Colour
) -> None:
    angles = sorted(chance.uniform(0, 2 * math.pi) for _ in range(chance.randint(3, 7)))
    brush.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=colour)


def _stripes(
    brush: ImageDraw.ImageDraw, chance: random.Random, x: float, y: float, radius: float, colour: Colour
) -> None:
    angle, count = chance.uniform(0, math.pi), chance.randint(3, 12)
    gap = max(2 * radius / count, 2.5 * FINER)
    across, along = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    for number in range(count):
        cx, cy = (c + across[i] * gap * (number - count / 2) for i, c in enumerate((x, y)))
        ends = [(cx - along[0] * radius, cy - along[1] * radius), (cx + along[0] * radius, cy + along[1] * radius)]
        brush.line(ends, fill=colour, width=max(1, round(gap * 0.5)))


def _stroke(
    brush: ImageDraw.ImageDraw, chance: random.Random, x: float, y: float, radius: float, colour: Colour
) -> None:
    points = [(x + chance.uniform(-3, 3) * radius, y + chance.uniform(-3, 3) * radius) for _ in range(4)]
    curve = []
    for step in range(33):
        t = step / 32
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        curve.append(tuple(sum(w * p[i] for w, p in zip(weights, points, strict=True)) for i in range(2)))
    brush.line(curve, fill=colour, width=max(1, round(chance.uniform(0.7, 8) * FINER)), joint="curve")


def _letter(
    brush: ImageDraw.ImageDraw, chance: random.Random, x: float, y: float, radius: float, colour: Colour
) -> None:
    text = "".join(chance.choice(LETTERS) for _ in range(chance.randint(1, 6)))
    brush.text((x, y), text, fill=colour, font=ImageFont.load_default(size=max(8.0 * FINER, min(radius, 40.0 * FINER))))


def main() -> None:
    """Write --count images below --output; one that is there is left as it is."""
    parser = argparse.ArgumentParser(description="Draw images of sharp edges to train with beside photographs.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.count):
        path = arguments.output / f"leaves-{seed:04d}.png"
        if not path.exists():
            draw_image(seed).save(path)


if __name__ == "__main__":
    main()
