"""Images a second of `ulsam explain`, from its start to the last file: models of 224 px, JPEGs of 512 x 384.

MobileNet-V2 with 100 classes and random weights, blocks 14 and 17 replaced by ULSAM: alone, against the model without
edits, and with `--numbers`, on a tenth of the images. Each is one process, as a user starts it.

    python benchmarks/explain_speed.py     # results/explain_speed.json; ten minutes on a quiet machine of two cores
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ulsam.base.files import check_writable, write_atomic
from ulsam.base.provenance import processor, versions
from ulsam.data.birds import draw_birds
from ulsam.model.build import build, make_spec, save
from ulsam.model.spec import Edit

SIDES = (512, 384)
EDITS = {"ulsam": (Edit("replace", "14,17"),), "base": ()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="in the folder (default: 500)")
    parser.add_argument("--size", type=int, default=224, help="of the models' input, in pixels (default: 224)")
    parser.add_argument("--out", default="results/explain_speed.json")
    args = parser.parse_args(argv)
    check_writable(args.out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, base = make_models(folder, args.size)
        many, few = (make_images(folder / f"{share}", max(1, args.images // share)) for share in (1, 10))
        cases = [
            measure("one model", [model, many], args.images, folder / "one"),
            measure("`--against` another one", [model, many, "--against", base], args.images, folder / "two"),
            measure("one model, `--numbers`", [model, few, "--numbers"], max(1, args.images // 10), folder / "numbers"),
        ]
    result = {
        "what": "images a second of ulsam explain, its start and all files included",
        "command": "python benchmarks/explain_speed.py",
        "models": {name: ["mobilenetv2_100", *map(str, edits)] for name, edits in EDITS.items()},
        "size": args.size,
        "jpegs": SIDES,
        "cases": cases,
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(cases, indent=1))


def make_models(folder: Path, size: int) -> list[Path]:
    """Model files of the models `EDITS`."""
    torch.manual_seed(0)
    paths = []
    for name, edits in EDITS.items():
        spec = make_spec("mobilenetv2_100", [f"class {number}" for number in range(100)], edits, size=size)
        paths.append(folder / f"{name}.safetensors")
        save(build(spec)[0], spec, paths[-1])
    return paths


def make_images(folder: Path, number: int) -> Path:
    """A folder of so many drawn birds, as large as images of the web."""
    drawn = draw_birds(folder / "drawn", classes=2, train=(number + 1) // 2, val=0, size=256)
    kept = folder / "images"
    kept.mkdir()
    for place, path in enumerate(sorted(drawn.rglob("*.jpg"))[:number]):
        Image.open(path).resize(SIDES, Image.Resampling.BICUBIC).save(kept / f"{place:04}.jpg", quality=90)
    return kept


def measure(what: str, words: Sequence[str | Path], images: int, out: Path) -> dict[str, str | int | float]:
    """Time one command.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "ulsam", "explain", *map(str, words), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    return {"what": what, "images": images, "seconds": seconds, "images_per_second": images / seconds}


if __name__ == "__main__":
    main()
