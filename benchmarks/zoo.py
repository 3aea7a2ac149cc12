"""Edit one small model of every timm module, torchvision's classifiers, detectors and segmenters, and Ultralytics'.

Each model is new, with random weights, and runs in a process of its own. ULSAM takes the place of one block and is
inserted behind another. Each step has a check that can fail (their docstrings say which). A step works, is refused by
an UlsamError, is nothing that the unedited model can do, or has FAILED. Models that the file holds are skipped.

    python benchmarks/zoo.py                        # results/zoo.json; an hour on one core
    python benchmarks/zoo_table.py > docs/zoo.md    # the table
"""

import argparse
import copy
import io
import json
import logging
import multiprocessing
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
os.environ.setdefault("YOLO_CONFIG_DIR", "/tmp/ulsam-zoo-yolo")

import timm
import torch
import torchvision
import ultralytics
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ulsam
from ulsam.base.errors import UlsamError, first_line
from ulsam.base.files import write_atomic
from ulsam.base.provenance import processor, versions

STEPS = ("candidates", "replace", "insert", "forward", "backward", "fold", "undo", "export")
NEW: dict[str, Any] = {"weights": None}
WITHOUT_AUX: dict[str, Any] = {**NEW, "aux_logits": False, "init_weights": True}
WHOLE: dict[str, Any] = {**NEW, "weights_backbone": None, "num_classes": 3}
SMALL: dict[str, Any] = {**WHOLE, "min_size": 128, "max_size": 128}
FEW: dict[str, Any] = {**SMALL, "box_score_thresh": 0.0, "box_detections_per_img": 4, "rpn_post_nms_top_n_test": 20}
#: torchvision's models: the smallest of each classifier's family
TORCHVISION: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("alexnet", "vgg11", "vgg11_bn", "squeezenet1_1", "densenet121", "mobilenet_v2"), NEW),
    **dict.fromkeys(("mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0"), NEW),
    **dict.fromkeys(("efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50"), NEW),
    **dict.fromkeys(("resnext50_32x4d", "wide_resnet50_2", "convnext_tiny", "maxvit_t", "swin_t", "swin_v2_t"), NEW),
    "vit_b_32": NEW,
    "googlenet": WITHOUT_AUX,
    "inception_v3": WITHOUT_AUX,
    **dict.fromkeys(("ssdlite320_mobilenet_v3_large", "ssd300_vgg16"), WHOLE | {"score_thresh": 0.0}),
    **dict.fromkeys(("retinanet_resnet50_fpn", "fcos_resnet50_fpn"), SMALL | {"score_thresh": 0.0}),
    **dict.fromkeys(("fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn"), FEW),
    "keypointrcnn_resnet50_fpn": FEW | {"num_keypoints": 2},
    **dict.fromkeys(("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"), WHOLE),
}
ULTRALYTICS = [f"{name}{task}" for name in ("yolov8n", "yolo11n", "yolo26n") for task in ("", "-seg", "-cls")]
NAMES = [
    *(f"timm/{module}" for module in timm.list_modules() if hasattr(timm.models, module)),
    *(f"torchvision/{name}" for name in TORCHVISION),
    *(f"ultralytics/{name}" for name in ULTRALYTICS),
]


def smallest(module: str) -> str:
    """The model with the fewest parameters of a timm module."""
    with torch.device("meta"):
        sizes = {name: count(timm.create_model(name)) for name in timm.list_models(module=module)}
    return min(sizes, key=lambda name: (sizes[name], name))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make(name: str) -> tuple[str, nn.Module, list[int]]:
    """The model's name, a new model, and the pixels on a side to try: few first."""
    family, _, model = name.partition("/")
    if family == "torchvision":
        fixed = {"maxvit_t": [224], "vit_b_32": [224]}
        return model, torchvision.models.get_model(model, **TORCHVISION[model]), fixed.get(model, [128, 224])
    if family == "ultralytics":
        return model, ultralytics.YOLO(f"{model}.yaml").model, [128]
    model = smallest(model)
    made = timm.create_model(model)
    config = made.pretrained_cfg
    usual = config["input_size"][-1]
    least = config.get("min_input_size", [128])[-1]
    return model, made, [usual] if config.get("fixed_input_size") else [128, least, usual]


class Zoo:
    """One model and the steps that are taken with it."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.dtype = torch.float32
        self.model, self.base, sizes = make(name)
        self.is_detector = name.startswith("torchvision/") and hasattr(self.base, "transform")
        for parameter in self.base.requires_grad_(True).parameters():
            if parameter.min() == parameter.max() < 1e-2:  # a gate or a bias that hides a branch from the outputs
                nn.init.uniform_(parameter, 0.2, 0.5)
        self.calibrate(sizes)
        self.before = self.run(self.base)
        self.places: dict[str, tuple[str, int]] = {}  # where each accepted edit is, and its groups

    def calibrate(self, sizes: list[int]) -> None:
        """Find the size, and set the BatchNorms to the statistics of the images, so that features do not fade."""
        for pixels in sizes:
            self.x = torch.rand(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
            try:
                self.run(self.base.eval())
                break
            except Exception as error:  # of the model's own code
                failure = error
        else:
            raise failure
        norms = [module for module in self.base.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = 1.0
        self.run(self.base)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def run(self, model: Callable[[Tensor], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(model(self.x.to(self.dtype))) if isinstance(leaf, Tensor)]

    def edited(self, only: str = "") -> nn.Module:
        """A copy with the edits that were accepted, weights from a normal distribution in the layers."""
        if not self.places:
            raise UlsamError("no edit was accepted")
        model = copy.deepcopy(self.base)
        for edit, (place, groups) in self.places.items():
            if only in ("", edit):
                getattr(ulsam, edit)(model, place, groups, input_size=self.size)
        torch.manual_seed(2)
        for layer in layers(model):
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.2)
        return model

    def candidates(self, model: nn.Module) -> None:
        """The model is as it was. Chooses the block to replace, and another to insert behind."""
        state = copy.deepcopy(model.state_dict())
        found = ulsam.candidates(model, self.size)
        self.candidate_count = len(found)
        assert_same(list(model.state_dict().values()), list(state.values()))
        assert_same(self.run(model), self.before)
        found = found or [one for one in ulsam.candidates(model, self.size, leaves=True) if one.type == "Conv2d"]
        maps = [place.name for place in found if place.shape[1] * place.shape[2] > 1]
        blocks = [name for name, part in model.named_modules() if name and len(list(part.children())) > 1]
        self.block = maps[len(maps) // 2] if maps else blocks[len(blocks) // 2]
        apart = [name for name in maps if not f"{name}.".startswith(f"{self.block}.")]
        apart = [name for name in apart if not self.block.startswith(f"{name}.")]
        first = next((name for name, part in model.named_modules() if isinstance(part, nn.Conv2d)), self.block)
        around = first.rpartition(".")[0]
        first = around if around and hasattr(model.get_submodule(around), "fuse") else first
        self.behind = apart[len(apart) // 2] if apart else first

    def replace(self, _: nn.Module) -> None:
        """The outputs change, and change again with the layer's weights; every other key is that of the base."""
        self.check_edit("replace", self.block)

    def insert(self, _: nn.Module) -> None:
        """As replace."""
        self.check_edit("insert", self.behind)

    def check_edit(self, edit: str, place: str) -> None:
        model, base = copy.deepcopy(self.base), set(self.base.state_dict())
        for groups in (4, 3, 2, 1):  # the first that divides the channels
            try:
                getattr(ulsam, edit)(model, place, groups, input_size=self.size)
                break
            except UlsamError as error:
                if "groups" not in str(error):
                    raise
        self.places[edit] = place, groups
        (name,) = [name for name, part in model.named_modules() if isinstance(part, ulsam.ULSAM)]
        others = {key for key in model.state_dict() if not key.startswith(f"{name}.")}
        gone = {key for key in base if edit == "replace" and key.startswith(f"{place}.")}
        assert others == base - gone, f"other keys: {sorted(others ^ (base - gone))[:3]}"
        new = self.run(model)
        assert not same(new, self.before), "the outputs are the base model's"
        for scale in (10.0, 100.0):
            nn.init.normal_(model.get_submodule(name).depthwise.weight, std=scale)
            nn.init.normal_(model.get_submodule(name).pointwise.weight, std=scale)
            assert not same(self.run(model), new), "the outputs do not depend on the layer's weights"

    def forward(self, _: nn.Module) -> None:
        """The outputs are, bit by bit, those of the base model with hooks that compute the edits."""
        if not self.places:
            raise UlsamError("no edit was accepted")
        for edit in self.places:
            model, base = self.edited(edit), copy.deepcopy(self.base)
            ((name, layer),) = [(name, part) for name, part in model.named_modules() if isinstance(part, ulsam.ULSAM)]
            if edit == "insert":
                hook: Any = lambda _module, _args, output, layer=layer: layer(output)  # noqa: E731
            else:
                hook = lambda _module, args, _output, layer=layer: layer(args[0])  # noqa: E731
            place = name.removesuffix(".ulsam") if edit == "insert" else self.block
            base.get_submodule(place).register_forward_hook(hook)
            assert_same(self.run(model), self.run(base))

    def backward(self, model: nn.Module) -> None:
        """In training mode every parameter of the layers gets a gradient."""
        model.train()
        torch.manual_seed(0)
        target = {"boxes": torch.tensor([[8.0, 8.0, 80.0, 80.0]]), "labels": torch.tensor([1])}
        target |= {"masks": torch.ones(1, *self.size[1:], dtype=torch.uint8), "keypoints": torch.full((1, 2, 3), 40.0)}
        outputs = tree_leaves(model(list(self.x), [target] * 2) if self.is_detector else model(self.x))
        some = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.stack([(leaf * torch.rand_like(leaf)).sum() for leaf in some]).sum().backward()
        for layer in layers(model):
            for name, parameter in layer.named_parameters():
                gradient = parameter.grad
                assert gradient is not None and gradient.isfinite().all() and gradient.any(), f"no gradient of {name}"

    def fold(self, model: nn.Module) -> None:
        """The outputs agree to 1e-4, and the layers are there."""
        folded = ulsam.fold(model, self.size)
        assert len(layers(folded)) == len(layers(model)), "a layer is gone"
        assert_close(self.run(folded), self.run(model))

    def undo(self, model: nn.Module) -> None:
        """Outputs, classes and state are, bit by bit, those of the base model."""
        ulsam.undo(model)
        assert_same(self.run(model), self.before)
        assert [type(part) for part in model.modules()] == [type(part) for part in self.base.modules()]
        assert list(model.state_dict()) == list(self.base.state_dict())
        assert_same(list(model.state_dict().values()), list(self.base.state_dict().values()))

    def export(self, model: nn.Module) -> None:
        """What torch.export makes of it agrees to 1e-4, and holds no operator of ulsam."""
        program = torch.export.export(model, (self.x.to(self.dtype),))
        assert "torch.ops.ulsam" not in program.graph_module.code, "an operator of ulsam is in the graph"
        assert_close(self.run(program.module()), self.run(model))

    def onnx(self, model: nn.Module) -> None:
        """What PyTorch's ONNX exporter makes of it agrees to 1e-3 under ONNX Runtime."""
        program = torch.onnx.export(model, (self.x,), dynamo=True, verbose=False)
        assert program is not None
        assert_close([torch.as_tensor(leaf) for leaf in program(self.x)], self.run(model), 1e-3)

    def outcome(self, step: str) -> str:
        check: Callable[[nn.Module], None] = getattr(self, step)
        whole = step in ("backward", "fold", "undo", "export", "onnx")
        try:
            check(self.edited() if whole else self.base)
        except UlsamError as error:
            return f"refused: {first_line(error)}"
        except Exception as error:  # whatever the step meets
            said = f"FAILED: {type(error).__name__}: {first_line(error)[:200]}"
            if step in ("backward", "export", "onnx") and (own := failure(lambda: check(copy.deepcopy(self.base)))):
                said = f"the model itself: {own}"
            if step in ("fold", "export") and "not close" in said and not failure(lambda: self.in_float64(check)):
                said = "the model itself: amplifies the rounding of float32; in float64 the step works"
            return said
        return "works"

    def in_float64(self, check: Callable[[nn.Module], None]) -> None:
        self.dtype = torch.float64
        try:
            check(self.edited().double())
        finally:
            self.dtype = torch.float32


def failure(step: Callable[[], None]) -> str | None:
    try:
        step()
    except Exception as error:  # of the model's own code
        return first_line(error)[:200]
    return None


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, ulsam.ULSAM)]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two, strict=True))


def assert_same(one: list[Tensor], two: list[Tensor]) -> None:
    assert same(one, two), "not the same"


def assert_close(one: list[Tensor], two: list[Tensor], to: float = 1e-4) -> None:
    assert [a.shape for a in one] == [b.shape for b in two], "not the same shapes"
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=to, atol=to * float(b.abs().max()) if b.numel() else 0, equal_nan=True)


def child(name: str, steps: list[str], results: Connection) -> None:
    """Send what is known of the model, piece by piece."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    sys.stderr = io.StringIO()  # torch.export prints the graphs that it cannot make
    try:
        zoo = Zoo(name)
    except Exception as error:  # of the model's own code
        results.send(("steps", {step: f"the model itself: {first_line(error)[:200]}" for step in steps}))
        return
    results.send(("", {"model": zoo.model, "parameters": count(zoo.base), "size": zoo.size[-1]}))
    for step in steps:
        said = zoo.outcome(step)
        results.send(("steps", {step: said}))
        if step == "candidates" and said == "works":
            results.send(("", {"candidates": zoo.candidate_count, "replaced": zoo.block, "behind": zoo.behind}))
        elif step == "candidates":
            break


def watch(name: str, steps: list[str], limit: float) -> dict[str, Any]:
    """Run one model in a process of its own; what it sent until it ended or its time was over."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(name, steps, there))
    began = time.perf_counter()
    process.start()
    there.close()
    row: dict[str, Any] = {"steps": {}}
    ended = f"FAILED: not done in {limit:.0f} s"
    # the pipe alone does not show the end: other models' processes hold it open too
    while wait([here, process.sentinel], max(0.0, limit - (time.perf_counter() - began))):
        try:
            if not here.poll():
                raise EOFError
            key, value = here.recv()
        except EOFError:
            process.join()
            ended = f"FAILED: the process ended with {process.exitcode}"
            break
        row.update(value if not key else {key: row[key] | value})
    process.kill()
    process.join()
    missing = [step for step in steps if step not in row["steps"]]
    if row["steps"].get("candidates", "works") != "works":
        ended = row["steps"]["candidates"]
    row["steps"] |= dict.fromkeys(missing[:1], ended) | dict.fromkeys(missing[1:], "not reached")
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="?", default="", help="a regular expression: only the models that it finds")
    parser.add_argument("--again", action="store_true", help="also models that the file holds")
    parser.add_argument("--onnx", action="store_true", help="also export to ONNX")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default: 2)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a model (default: 120)")
    parser.add_argument("--out", type=Path, default=Path("results/zoo.json"))
    args = parser.parse_args()
    table: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    table["versions"] = versions() | {"ultralytics": ultralytics.__version__}
    table["machine"] = {"processor": processor(), "threads": 1}
    todo = [name for name in NAMES if re.search(args.names, name) and (args.again or name not in table["models"])]
    lock = threading.Lock()

    def one(name: str) -> None:
        row = watch(name, [*STEPS, *["onnx"] * args.onnx], args.limit)
        with lock:
            table["models"][name] = row
            table["models"] = {name: table["models"][name] for name in NAMES if name in table["models"]}
            write_atomic(args.out, json.dumps(table, indent=1) + "\n")
            bad = {step: said for step, said in row["steps"].items() if said != "works"}
            print(f"{name}: {row.get('model')}, {row['seconds']} s, {bad}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, todo))


if __name__ == "__main__":
    main()
