"""What a GPU is asked for; `gpu.sh` says how. Each part has a share of the time, and is saved as it ends.

The layer and its contenders take turns; their times are medians. A copy reads and writes each value once, which is the
least that a layer can do, so that its bandwidth is the machine's.
"""

import argparse
import functools
import itertools
import math
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from layer import Loop
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize
from turns import medians

import ulsam
from ulsam.base.files import write_json
from ulsam.data.birds import draw_birds
from ulsam.layer.ops import which_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SHAPES = [(96, 14), (160, 7), (512, 14), (1024, 7), (32, 112)]  # channels, height and width
BLOCKS = [13, 14, 16, 17]  # of MobileNet-V2
ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "base": lambda model: model,
    "remove": lambda model: ulsam.remove(model, BLOCKS),
    "ULSAM": lambda model: ulsam.replace(model, BLOCKS, groups=4),
    "ULSAM, released": lambda model: ulsam.replace(model, BLOCKS, groups=4, form="released"),
}


class Machine:
    """The device, and the time that is left on it."""

    def __init__(self, device: str, minutes: float) -> None:
        self.device, self.end = torch.device(device), time.monotonic() + 60 * minutes

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def deadline(self, share: float) -> float:
        """When a part that may take this share of what is left has to end."""
        now = time.monotonic()
        return now + share * max(0.0, self.end - now)

    def in_turn(self, calls: dict[str, Callable[[], Any]], turns: int = 9) -> dict[str, float]:
        """Seconds a call of each: medians of turns of about 10 milliseconds."""
        return medians(calls, least_turns=turns, block=0.01, wait=self.wait)


def correctness(machine: Machine, end: float) -> dict[str, Any]:
    """The kernels against the definition in float64, on this device: what was wrong, by case."""
    from operator_cases import FORMS, Case, check

    found: dict[str, str] = {}
    shapes = [
        ((2, 96, 14, 14), 4),
        ((3, 160, 7, 7), 16),
        ((1, 87, 5, 3), 3),
        ((1, 16, 112, 112), 2),
        ((2, 130, 2, 9), 2),
    ]
    for (shape, groups), form, layout, dtype in itertools.product(shapes, FORMS, LAYOUTS, DTYPES.values()):
        if time.monotonic() > end:
            break
        case = Case(shape, groups, form, "relu", layout, dtype, 0)
        exact = case.run("reference", torch.float64)
        for name in ("x", "dy", "scale", "shift", "weight", "bias"):
            setattr(case, name, getattr(case, name).to(machine.device))
        case.norms = [norm.to(machine.device) for norm in case.norms]
        backend = which_backend(case.x)[0]
        outputs = {name: value.cpu() for name, value in case.run(backend).items()}
        case.x, case.dy = case.x.cpu(), case.dy.cpu()
        name = f"{backend}: {form}, {shape}, g = {groups}, {layout}, {dtype}"
        try:
            check(outputs, exact, case, dtype)
            found[name] = ""
        except AssertionError as error:
            found[name] = str(error)
    return {"cases": len(found), "wrong": {name: why for name, why in found.items() if why}}


def layers(machine: Machine, end: float) -> list[dict[str, Any]]:
    """Times of the layer, of a copy and of the loop over groups."""
    rows = []
    for batch, (channels, size), (dtype_name, dtype), (layout, memory_format) in itertools.product(
        (1, 32, 256), SHAPES, DTYPES.items(), LAYOUTS.items()
    ):
        if time.monotonic() > end:
            break
        x = torch.randn(batch, channels, size, size, device=machine.device).to(dtype)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        dy = torch.randn_like(x)
        ours = ulsam.ULSAM(channels, 4).to(machine.device)
        loop = Loop(channels, 4, "equations").to(machine.device, dtype)

        with torch.no_grad():
            modules = {"copy": torch.clone, "ours": ours, "loop": loop}
            inference = machine.in_turn({name: functools.partial(call, x) for name, call in modules.items()})
        steps = {
            name: functools.partial(input_gradients, module, x, dy) for name, module in (("ours", ours), ("loop", loop))
        }
        rows.append(
            {
                "shape": list(x.shape),
                "dtype": dtype_name,
                "layout": layout,
                "backend": which_backend(x)[0],
                "inference_seconds": inference,
                "gigabytes_a_second": {name: 2 * x.nbytes / value / 1e9 for name, value in inference.items()},
                "training_seconds": machine.in_turn(steps),
            }
        )
    return rows


def input_gradients(module: nn.Module, x: Tensor, dy: Tensor) -> Any:
    return torch.autograd.grad(module(x), [x, *module.parameters()], dy)


def models(machine: Machine, end: float) -> list[dict[str, Any]]:
    """MobileNet-V2 at 224 px: inference of folded models, and training steps, in turn."""
    rows = []
    for batch, (dtype_name, dtype) in itertools.product((1, 256), DTYPES.items()):
        if time.monotonic() > end:
            break
        x = torch.randn(batch, 3, 224, 224, device=machine.device).to(dtype, memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.long, device=machine.device)
        inference, training = {}, {}
        for name, edit in ARMS.items():
            model = edit(timm.create_model("mobilenetv2_100"))
            folded = ulsam.fold(model).to(machine.device, dtype, memory_format=torch.channels_last)
            inference[name] = functools.partial(folded, x)
            trained = model.to(machine.device, memory_format=torch.channels_last).train()
            training[name] = functools.partial(gradients, trained, x.float(), labels, dtype)
        with torch.inference_mode():
            row = {"batch": batch, "dtype": dtype_name, "inference_seconds": machine.in_turn(inference)}
        rows.append(row | ({"training_seconds": machine.in_turn(training, 5)} if batch > 1 else {}))
    return rows


def gradients(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Any:
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(images), labels)
    return torch.autograd.grad(loss, list(model.parameters()))


def throughput(machine: Machine, end: float, timm_train: str) -> dict[str, float]:
    """Images a second at 224 px, reading included: `ulsam train`, and timm's script where its path is given."""
    with tempfile.TemporaryDirectory() as folder:
        draw_birds(Path(folder, "birds"), classes=8, train=512, val=8, size=256)
        about = ["--model", "mobilenetv2_100", "--epochs", "3", "--amp", "--pin-mem"]
        commands = {"ulsam train": [sys.executable, "-m", "ulsam", "train", f"{folder}/birds", "--size", "224"]}
        commands["ulsam train"] += f"-b 256 -j 12 --epochs 3 --device {machine.device} --out {folder}/run".split()
        if timm_train:
            commands["timm's train.py"] = [sys.executable, timm_train, f"{folder}/birds", *about, "--img-size", "224"]
            commands["timm's train.py"] += f"--num-classes 8 -b 256 -j 12 --output {folder} --val-split val".split()
        found = {}
        for name, command in commands.items():
            left = end - time.monotonic()
            if left < 20:
                break
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            rates = re.findall(r"([\d,.]+) ?(?:img)?/s", done.stdout + done.stderr)
            found[name] = float(rates[-1].replace(",", "")) if rates else math.nan
    return found


def read(folder: Path, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images of class folders, [N, 3, size, size] of bytes on the device, and their classes."""
    from ulsam.data.images import read_image

    images, labels = [], []
    for label, part in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for file in sorted(part.iterdir()):
            image = pil_to_tensor(read_image(file))
            images.append(center_crop(resize(image, [size], antialias=True), [size, size]))
            labels.append(label)
    return torch.stack(images).to(device), torch.tensor(labels, device=device)


def batches(images: Tensor, labels: Tensor, size: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch, in random order: a random crop and flip of each image."""
    order = torch.randperm(len(images), device=images.device)
    for at in range(0, len(order) - batch + 1, batch):
        chosen = order[at : at + batch]
        scale = 0.5 + 0.5 * torch.rand(batch, device=images.device)
        flip = torch.randint(0, 2, (batch,), device=images.device) * 2 - 1
        shift = (torch.rand(batch, 2, device=images.device) * 2 - 1) * (1 - scale)[:, None]
        theta = torch.zeros(batch, 2, 3, device=images.device)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * flip, scale, shift
        grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
        yield (
            F.grid_sample(normalized(images[chosen]), grid, align_corners=False, padding_mode="reflection"),
            labels[chosen],
        )


def normalized(images: Tensor) -> Tensor:
    config = timm.get_pretrained_cfg("mobilenetv2_100")
    mean, deviation = (torch.tensor(it, device=images.device)[:, None, None] for it in (config.mean, config.std))
    return ((images.float() / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


def scratch(machine: Machine, end: float, data: Path, epochs: int) -> list[dict[str, Any]]:
    """Top-1 on test/ of models trained from random weights on train/ at 112 px: all arms of a seed, then the next."""
    size, batch, rate = 112, 64, 0.1
    train, test = (read(data / split, size, machine.device) for split in ("train", "test"))
    rows: list[dict[str, Any]] = []
    for seed in itertools.count():
        for arm, edit in ARMS.items():
            began = time.monotonic()
            longest = max((row["seconds"] for row in rows), default=0.0)
            if began + longest > end:
                return rows
            torch.manual_seed(seed)
            model = edit(timm.create_model("mobilenetv2_100", num_classes=int(train[1].max()) + 1))
            model = model.to(machine.device, memory_format=torch.channels_last).train()
            optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
            steps = epochs * (len(train[0]) // batch)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=min(0.5, 5 / epochs))
            for _ in range(epochs):
                for images, labels in batches(*train, size, batch):
                    with torch.autocast(machine.device.type, torch.bfloat16):
                        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
            model.eval()
            with torch.inference_mode():
                outputs = torch.cat([model(normalized(part)).argmax(1) for part in test[0].split(256)])
            top1 = float((outputs == test[1]).float().mean())
            rows.append({"arm": arm, "seed": seed, "epochs": epochs, "top1": top1, "seconds": time.monotonic() - began})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=Path)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--timm-train", default="")
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"))
    args = parser.parse_args()
    machine = Machine(args.device, args.minutes)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    result: dict[str, Any] = {
        "what": "seconds a call and images a second on one GPU; top-1 (shares) of models trained from random weights",
        "command": "benchmarks/gpu.sh IMAGES",
        "device": name,
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "cuda": torch.version.cuda},
    }
    parts: dict[str, tuple[float, Callable[[float], Any]]] = {  # the share of what is left
        "correctness": (0.15, lambda end: correctness(machine, end)),
        "layers": (0.3, lambda end: layers(machine, end)),
        "models": (0.25, lambda end: models(machine, end)),
        "throughput": (0.3, lambda end: throughput(machine, end, args.timm_train)),
    }
    if args.images:
        parts["scratch"] = (0.95, lambda end: scratch(machine, end, args.images, args.epochs))
    for part, (share, measure) in parts.items():
        began = time.monotonic()
        try:
            result[part] = measure(machine.deadline(share))
        except Exception:  # the other parts are measured all the same; this one says why not
            result[part] = {"failed": traceback.format_exc().splitlines()[-1]}
            traceback.print_exc()
        result[f"{part}_minutes"] = (time.monotonic() - began) / 60
        print(part, f"{result[f'{part}_minutes']:.1f} minutes", flush=True)
        write_json(args.out, result)


if __name__ == "__main__":
    main()
