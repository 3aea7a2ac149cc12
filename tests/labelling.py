"""Small generated images with two independent attributes, and the table of them."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ATTRIBUTES = ("red", "striped")


def draw_attributes(root: Path, train: int = 60, val: int = 30, test: int = 20, size: int = 32) -> Path:
    """A table ``labels.csv`` of images that are red or not, and striped or not, by independent draws; its path."""
    random = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows: list[Sequence[str]] = [("path", "labels", "split")]
    for number, split in enumerate(["train"] * train + ["val"] * val + ["test"] * test):
        found = random.integers(0, 2, 2).astype(bool)
        pixels = np.full((size, size, 3), 110.0)
        pixels[..., 0] += 90 * found[0]
        pixels[np.arange(size) % 4 < 2] -= 80 * found[1]
        pixels += random.normal(0, 20, pixels.shape)
        name = f"images/{number:03}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name)
        rows.append((name, ";".join(np.array(ATTRIBUTES)[found]), split))
    return write_table(root / "labels.csv", rows)


def write_table(path: Path, rows: Sequence[Sequence[object]], delimiter: str = ",") -> Path:
    """Write rows as a CSV; its path."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path
