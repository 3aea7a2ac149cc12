"""The training step of ULSAM models against their base model's, and `ulsam train` against timm's way of training.

Steps: MobileNet-V2 at 160 px, batch 32, forward, backward and update on random images, in each memory layout and
precision; all models take turns in one process. A figure is the median of the paired ratios, a turn each, with a
bootstrapped 95 % interval.

Images a second, reading included: `ulsam train` as it sets itself up, a loop written from timm's public API in the
manner of timm's training script (with its defaults, and with channels_last and bfloat16), and the script itself where
its path is given: it is not in timm's wheel. The same model, augmentations and reading processes; the loops take turns.

    python benchmarks/training.py --data cub100                     # results/training.json; 6 minutes on two cores
    python benchmarks/training.py --data cub100 --timm-script pytorch-image-models/train.py
"""

import argparse
import dataclasses
import functools
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from turns import interval, seconds_of

from ulsam.base.distributed import World
from ulsam.base.provenance import processor
from ulsam.base.timing import in_turn
from ulsam.model.build import build
from ulsam.training import parts
from ulsam.training.config import TrainConfig
from ulsam.training.loop import Trainer
from ulsam.training.machine import adapt_to_device
from ulsam.training.probe import resolve_auto, setup_candidates, training_step

CPU = torch.device("cpu")
BASE = TrainConfig("none", model="mobilenetv2_100", size=160, batch_size=32, compile="none")
NETS = {
    "base": [],
    "replace 14,17": ["replace 14,17 g=4"],
    "replace 14,17, released": ["replace 14,17 g=4 form=released"],
    "replace 13,14,16,17": ["replace 13,14,16,17 g=4"],
    "replace 13,14,16,17, released": ["replace 13,14,16,17 g=4 form=released"],
    "insert 17": ["insert 17 g=4"],
    "insert 17, released": ["insert 17 g=4 form=released"],
}
SKIPPED, TIMED = 6, 14  # steps of a turn; the first use up what was read while the others had their turns
AUGMENTATION = {"scale": (0.25, 1.0), "hflip": 0.5, "color_jitter": 0.0, "interpolation": "bicubic"}


def steps(seconds: float) -> list[dict[str, Any]]:
    """A row for each model, layout and precision."""
    rows = []
    for setup in setup_candidates(BASE, CPU):
        take = {}
        for name, edits in NETS.items():
            config = dataclasses.replace(BASE, edits=edits, **dataclasses.asdict(setup))
            spec = parts.spec_of_run(config, [str(number) for number in range(100)])
            take[name] = training_step(config, build(spec)[0], spec.input_size, CPU)
        turns = list(in_turn({name: functools.partial(seconds_of, step) for name, step in take.items()}, seconds, 1000))
        times = {name: [turn[name] for turn in turns] for name in take}
        for name, found in times.items():
            ratios = [ours / base for ours, base in zip(found, times["base"], strict=True)]
            row = {
                "layout": setup.layout,
                "amp": setup.amp,
                "model": name,
                "seconds": statistics.median(found),
                "over_base": statistics.median(ratios),
                "over_base_95": list(interval(ratios)),
                "turns": len(found),
            }
            rows.append(row)
            low, high = row["over_base_95"]
            print(
                f"{setup!s:30} {name:30} {1e3 * row['seconds']:6.0f} ms; over base {row['over_base']:.3f} "
                f"({low:.3f} to {high:.3f})",
                flush=True,
            )
    return rows


def ours(config: TrainConfig, run: str) -> Callable[[], Any]:
    """A step of `ulsam train`."""
    trainer = Trainer(config, Path(run), World(0, 1, CPU))
    trainer.prepare()

    def endless() -> Iterator[Any]:
        while True:
            yield from trainer._begin_epoch()
            trainer.at.epoch, trainer.at.batch = trainer.at.epoch + 1, 0

    batches = endless()
    return lambda: trainer._update(batches, False, False)


def timm_loop(config: TrainConfig, threads: int, best: bool) -> Callable[[], Any]:
    """A step in the manner of timm's training script: its defaults, or channels_last and bfloat16."""
    dataset = create_dataset("", root=config.data, split="train", is_training=True)
    model = timm.create_model(config.model, num_classes=len(dataset.reader.class_to_idx)).train()
    layout = torch.channels_last if best else torch.contiguous_format
    model = model.to(memory_format=layout)
    loader = create_loader(
        dataset,
        config.size,
        config.batch_size,
        is_training=True,
        num_workers=config.workers,
        device=CPU,
        **AUGMENTATION,
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    loss_of = LabelSmoothingCrossEntropy(config.smoothing)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()

    def step() -> None:
        torch.set_num_threads(threads)
        images, labels = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=best):
            loss = loss_of(model(images.contiguous(memory_format=layout)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def rates_in_turn(contenders: dict[str, Callable[[], Any]], images: int, turns: int) -> dict[str, list[float]]:
    """Images a second of each contender in every turn; a call of it is a step with so many images."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, take in contenders.items():
            for _ in range(SKIPPED):
                take()
            found[name].append(TIMED * images / seconds_of(lambda take=take: [take() for _ in range(TIMED)]))
    return found


def rates(config: TrainConfig, turns: int) -> dict[str, float]:
    """Images a second, reading included: medians of the turns."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        step = ours(config, folder)
        contenders: dict[str, Callable[[], Any]] = {
            "ulsam_train": lambda: (torch.set_num_threads(config.threads or threads), step()),
            "timm_loop_defaults": timm_loop(config, threads, best=False),
            "timm_loop_channels_last_bf16": timm_loop(config, threads, best=True),
        }
        found = rates_in_turn(contenders, config.batch_size, turns)
    torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in found.items()}


def script_rate(script: str, config: TrainConfig, flags: list[str]) -> float:
    """Images a second, as the training script of timm 1.0 logs them: the median of its steps 21 to 60."""
    words = f"--model {config.model} --img-size {config.size} -b {config.batch_size}".split()
    words += f"--num-classes {classes(config.data)} -j {config.workers} --opt sgd --lr {config.lr}".split()
    words += f"--weight-decay {config.weight_decay} --smoothing {config.smoothing} --epochs 1 --device cpu".split()
    words += [
        "--scale",
        "0.25",
        "1.0",
        "--color-jitter",
        "0",
        "--train-interpolation",
        "bicubic",
        "--val-split",
        "train",
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, config.data, *words, "--log-interval", "1", "--output", folder, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found: list[float] = []
        line = ""
        assert process.stdout
        for line in process.stdout:
            if match := re.search(r"Train: .*Time: *[\d.]+s, *([\d.]+)/s", line):
                found.append(float(match[1]))
            if len(found) == 60:
                break
        process.terminate()
        process.wait()
    if len(found) <= 20:
        sys.exit(f"{script} took {len(found)} steps, not 60: {line.strip()}")
    return statistics.median(found[20:])


def classes(data: str) -> int:
    return sum(path.is_dir() for path in (Path(data) / "train").iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="image folder with train/, for images a second")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timm-script", help="path of timm's train.py")
    parser.add_argument("--seconds", type=float, default=25, help="for each layout and precision")
    parser.add_argument("--turns", type=int, default=3, help="of the loops that read images")
    parser.add_argument("--out", default="results/training.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    speed: dict[str, Any] = {"images_per_second": None}
    if args.data:
        config = dataclasses.replace(BASE, data=args.data, workers=args.workers, epochs=100)
        config = resolve_auto(adapt_to_device(config, CPU))
        found: dict[str, Any] = {**rates(config, args.turns)}
        for name, flags in (("defaults", ""), ("best_flags", "--channels-last --amp --amp-dtype bfloat16")):
            script = args.timm_script
            found[f"timm_script_{name}"] = script_rate(script, config, flags.split()) if script else None
        speed = {"images_per_second": found, "config": dataclasses.asdict(config)}
        speed["config"]["data"] = Path(args.data).name
        for name, rate in found.items():
            print(f"{name:40} {f'{rate:.1f} images a second' if rate else 'not measured'}", flush=True)
    result = {
        "what": "MobileNet-V2, 160 px, batch 32: seconds a training step, and images a second with reading",
        "command": f"python benchmarks/training.py --seconds {args.seconds:g}"
        + (" --data DATA" if args.data else "")
        + (" --timm-script TRAIN" if args.timm_script else ""),
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "steps": steps(args.seconds),
        "loops": speed,
    }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
