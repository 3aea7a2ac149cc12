"""The input pipeline's time against timm's loader, step by step and as a whole; and training from disk and from memory.

The loaders run in one process on one thread, in turn, on the same files, which the system holds in memory after the
first turn; a figure is a median of processor seconds (user and system) an image, so it is one core's. timm's loader
comes in both its forms, with the same augmentations: it normalizes each image, or a batch at once (its prefetcher).

    python benchmarks/pipeline.py                          # on drawn birds; 4 minutes on two cores
    python benchmarks/pipeline.py --data images/train    # on a folder of classes
"""

import argparse
import io
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import PIL
import simplejpeg
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.data import ImageDataset, create_loader
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from training import ours, rates_in_turn
from turns import interval

from ulsam.base.provenance import processor
from ulsam.data import loading
from ulsam.data.augment import Normalize, TrainTransform, jittered
from ulsam.data.birds import draw_birds
from ulsam.data.cache import ImageCache
from ulsam.data.folder import scan
from ulsam.data.images import read_image, read_pixels
from ulsam.data.sources import FolderImages
from ulsam.training.config import TrainConfig
from ulsam.training.machine import adapt_to_device

NameT = TypeVar("NameT")
LOOK: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bilinear"}
SCALE, FLIP, BATCH = (0.25, 1.0), 0.5, 32
LARGER = {"500 x 375": (500, 375, 96), "2000 x 1500": (2000, 1500, 32)}
JITTERS = {"crop, flip": 0.0, "crop, flip, color jitter 0.4": 0.4}


def medians(contenders: Mapping[NameT, Callable[[], int]], turns: int) -> dict[NameT, float]:
    """Processor seconds an image of each contender, which returns how many it did; the first turn is left out."""
    times: dict[NameT, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, call in contenders.items():
            began = time.process_time()
            images = call()
            if turn:
                times[name].append((time.process_time() - began) / images)
    return {name: statistics.median(found) for name, found in times.items()}


def loaders(folder: Path, size: int, jitter: float, turns: int) -> dict[str, float]:
    """Seconds an image of whole epochs: our loader from disk and from memory, timm's in both forms."""
    images = FolderImages(scan(folder, 1).samples, scan(folder, 1).classes)
    common: dict[str, Any] = {"hflip": FLIP, **LOOK}
    transform = TrainTransform(
        (3, size, size), crop_scale=SCALE, color_jitter=jitter, rand_augment=None, random_erasing=0.0, **common
    )
    contenders = {}
    for name, cache in (("disk", None), ("memory", ImageCache(len(images), 2**31))):
        order = loading.EpochOrder(images, BATCH, seed=0)
        contenders[name] = loading.train_loader(
            images, transform, order, batch_size=BATCH, seed=0, workers=0, cache=cache
        )
    for name, prefetcher in (("timm", False), ("timm_prefetcher", True)):
        contenders[name] = create_loader(
            ImageDataset(str(folder)),
            (3, size, size),
            BATCH,
            is_training=True,
            scale=SCALE,
            color_jitter=jitter or None,
            num_workers=0,
            persistent_workers=False,
            use_prefetcher=prefetcher,
            device=torch.device("cpu"),
            **common,
        )
    return medians({name: _epoch(loader) for name, loader in contenders.items()}, turns)


def _epoch(loader: Any) -> Callable[[], int]:
    def read() -> int:
        return sum(len(batch.labels if isinstance(batch, loading.Batch) else batch[1]) for batch in loader)

    return read


def steps(folder: Path, size: int, turns: int) -> dict[str, dict[str, float]]:
    """Seconds an image of each step, in each way that was tried."""
    files = [path for path, _ in scan(folder, 1).samples]
    contents = [Path(path).read_bytes() for path in files]
    images, pixels = [read_image(path) for path in files], [read_pixels(path) for path in files]
    small = [image.resize((size, size)) for image in images]
    tensors = torch.stack([torch.from_numpy(read_pixels(_jpeg(image))) for image in small])
    generator, normalize = random.Random(0), Normalize(LOOK["mean"], LOOK["std"])
    per_image = transforms.Compose([transforms.ToTensor(), transforms.Normalize(LOOK["mean"], LOOK["std"])])
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4)

    def crop_of(array: Any) -> tuple[int, int]:  # three quarters of each side
        return 3 * array.shape[0] // 4, 3 * array.shape[1] // 4

    def by_pillow(mode: Image.Resampling) -> Callable[[int], Any]:
        return lambda n: images[n].crop((0, 0, *crop_of(pixels[n])[::-1])).resize((size, size), mode)

    def by_torch(mode: str) -> Callable[[int], Any]:
        def resize(n: int) -> Any:
            height, width = crop_of(pixels[n])
            cut = torch.from_numpy(pixels[n])[None, :height, :width].permute(0, 3, 1, 2)
            return F.interpolate(cut, (size, size), mode=mode, antialias=True)

        return resize

    def each(step: Callable[[int], Any]) -> Callable[[], int]:
        def run() -> int:
            for number in range(len(files)):
                step(number)
            return len(files)

        return run

    def normalize_batches() -> int:
        for first in range(0, len(tensors), BATCH):
            normalize(tensors[first : first + BATCH])
        return len(tensors)

    contenders: dict[tuple[str, str], Callable[[], int]] = {
        ("decode", "pillow"): each(lambda n: Image.open(io.BytesIO(contents[n])).convert("RGB")),
        ("decode", "torchvision"): each(
            lambda n: decode_jpeg(torch.frombuffer(bytearray(contents[n]), dtype=torch.uint8), ImageReadMode.RGB)
        ),
        ("decode", "simplejpeg"): each(lambda n: simplejpeg.decode_jpeg(contents[n])),
        ("crop_and_resize_bilinear", "pillow"): each(by_pillow(Image.Resampling.BILINEAR)),
        ("crop_and_resize_bilinear", "pytorch_uint8"): each(by_torch("bilinear")),
        ("crop_and_resize_bicubic", "pillow"): each(by_pillow(Image.Resampling.BICUBIC)),
        ("crop_and_resize_bicubic", "pytorch_uint8"): each(by_torch("bicubic")),
        ("normalize", "each_image_torchvision"): each(lambda n: per_image(small[n])),
        ("normalize", "a_batch_at_once"): normalize_batches,
        ("seed", "three_generators"): each(lambda n: loading.seed_all(0, 1, 0, n)),
        ("seed", "one_generator"): each(lambda n: random.Random(1 << 96 | n)),
        ("color_jitter", "torchvision_on_pillow"): each(lambda n: jitter(small[n])),
        ("color_jitter", "ours"): each(lambda n: jittered(tensors[n], 0.4, generator)),
    }
    found: dict[str, dict[str, float]] = {}
    for (step, way), seconds in medians(contenders, turns).items():
        found.setdefault(step, {})[way] = seconds
    return found


def training(folder: Path, size: int, turns: int, work: Path) -> dict[str, float]:
    """Images a second of steps of `ulsam train` from disk and from memory, and the median ratio of their turns."""
    steps = {}
    for name, cache in (("disk", "false"), ("memory", "true")):
        settings = {"layout": "channels_last", "amp": "none", "compile": "none", "cache": cache, "device": "cpu"}
        config = adapt_to_device(TrainConfig(data=str(folder), size=size, val_fraction=0.1, **settings), loading.CPU)
        steps[name] = ours(config, str(work / name))
    for _ in range(len(scan(folder, 1).samples) // BATCH):
        steps["memory"]()  # the first epoch fills it
    rates = rates_in_turn(steps, BATCH, turns)
    ratios = [disk / memory for disk, memory in zip(*rates.values(), strict=True)]
    low, high = interval(ratios)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    return {**middle, "ratio": statistics.median(ratios), "ratio_low": low, "ratio_high": high}


def _jpeg(image: Image.Image) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream


def chosen(source: Path, number: int, target: Path, size: Sequence[int] | None = None) -> Path:
    """So many of a folder's images, spread over it, in a folder with their classes; as they are or enlarged."""
    samples = scan(source, 1).samples
    for place in range(min(number, len(samples))):
        path = Path(samples[place * len(samples) // min(number, len(samples))][0])
        copy = target / path.parent.name / f"{path.stem}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        if size is None and path.suffix.lower() in (".jpg", ".jpeg"):
            copy.write_bytes(path.read_bytes())
        else:
            image = read_image(path)
            copy.write_bytes(_jpeg(image.resize(tuple(size), Image.Resampling.BICUBIC) if size else image).getvalue())
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder of images a class (default: drawn birds)")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", default="results/pipeline.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = args.data or draw_birds(work / "birds", classes=8, train=args.images // 8, val=1, size=224) / "train"
        own = chosen(source, args.images, work / "own")
        with Image.open(next(own.glob("*/*"))) as first:
            title = f"{first.width} x {first.height}"
        threads = torch.get_num_threads()
        rates = training(own, args.size, args.turns + 1, work)
        torch.set_num_threads(1)
        cases, folders = [], {title: own}
        for larger, (width, height, number) in LARGER.items():
            folders[larger] = chosen(source, number, work / larger, (width, height))
        for images, folder in folders.items():
            for augmentations, jitter in JITTERS.items():
                found = loaders(folder, args.size, jitter, args.turns)
                cases.append({"images": images, "augmentations": augmentations, "seconds": found})
                best = min(found["timm"], found["timm_prefetcher"])
                print(
                    f"{images:12} {augmentations:30} {1 / found['disk']:7.0f} images a second and core; "
                    f"timm / ours {found['timm'] / found['disk']:.2f}, its better form {best / found['disk']:.2f}, "
                    f"from memory {best / found['memory']:.2f}",
                    flush=True,
                )
        tried = steps(own, args.size, args.turns)
    for step, ways in tried.items():
        for way, seconds in ways.items():
            print(f"{step:26} {way:24} {1e6 * seconds:7.0f} us")
    print(f"training, disk / memory: {rates['ratio']:.3f} ({rates['ratio_low']:.3f} to {rates['ratio_high']:.3f})")
    result = {
        "what": "processor seconds an image on one thread, medians of turns; training: images a second",
        "command": f"python benchmarks/pipeline.py{' --data FOLDER' if args.data else ''}",
        "data": args.data.parent.name if args.data else "birds",
        "input": args.size,
        "machine": {"processor": processor(), "threads_of_training": threads},
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": simplejpeg.__version__,
            "python": platform.python_version(),
        },
        "loaders": cases,
        "steps": tried,
        "training_images_per_second": rates,
    }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
