"""From the choice of an image to its maps on the page of `ulsam explore`: seconds, in Chromium, models of 224 px.

Two models of MobileNet-V2 with 100 classes and random weights, one of them with blocks 14 and 17 replaced by ULSAM.
Each image is given to a page that was just opened: a drawn bird as a JPEG of 0.2 and of 12 million pixels. The clock
runs from the choice of the file until every image on it is decoded. Chromium is `$ULSAM_CHROMIUM`, or that on the PATH.

    python benchmarks/explored.py     # results/explored.json; a minute on a quiet machine
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from explain_speed import EDITS, make_models
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from ulsam.base.files import check_writable, write_atomic
from ulsam.base.provenance import processor, versions
from ulsam.data.birds import draw_birds

SIZES = {"small": (512, 384), "large": (4000, 3000)}
DECODED = "Promise.all([...document.images].filter((it) => it.src).map((it) => it.decode()))"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="images of each size (default: 20)")
    parser.add_argument("--size", type=int, default=224, help="of the models' input, in pixels (default: 224)")
    parser.add_argument("--out", default="results/explored.json")
    args = parser.parse_args(argv)
    check_writable(args.out)
    with tempfile.TemporaryDirectory() as folder:
        models, images = make_models(Path(folder), args.size), make_images(Path(folder))
        seconds = measure(models, images, args.times)
    result = {
        "what": "seconds from the choice of an image to its maps on a page that was just opened, in Chromium",
        "command": "python benchmarks/explored.py",
        "models": {name: ["mobilenetv2_100", *map(str, edits)] for name, edits in EDITS.items()},
        "size": args.size,
        "seconds": {
            name: {
                "megapixels": round(math.prod(SIZES[name]) / 1e6, 1),
                **{"first": times[0], "median": statistics.median(times), "largest": max(times), "times": len(times)},
            }
            for name, times in seconds.items()
        },
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["seconds"], indent=1))


def make_images(folder: Path) -> dict[str, Path]:
    bird = next(draw_birds(folder / "birds", classes=2, train=1, val=1, size=256).rglob("*.jpg"))
    images = {name: folder / f"{name}.jpg" for name in SIZES}
    for name, path in images.items():
        Image.open(bird).resize(SIZES[name], Image.Resampling.BICUBIC).save(path, quality=90)
    return images


def measure(models: Sequence[Path], images: dict[str, Path], times: int) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "ulsam", "explore", *map(str, models), "--port", "0"]
    chromium = os.environ.get("ULSAM_CHROMIUM") or shutil.which("chromium")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            browser = playwright.chromium.launch(executable_path=chromium)
            return {name: [one_image(browser, address, path) for _ in range(times)] for name, path in images.items()}
        finally:
            server.terminate()


def one_image(browser: Browser, address: str, image: Path) -> float:
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("article")
    began = time.perf_counter()
    page.set_input_files("#file", image)
    page.wait_for_selector(".photo[src]")
    page.evaluate(DECODED)
    took = time.perf_counter() - began
    page.close()
    return took


if __name__ == "__main__":
    main()
