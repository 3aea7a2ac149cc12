"""What several commands share: a model by name or file, the edits to make on it, and results as JSON."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulsam.base.errors import UlsamError
from ulsam.base.processes import is_first_process
from ulsam.base.providers import PROVIDERS
from ulsam.model.trained import locate, model_in, names

if TYPE_CHECKING:
    from ulsam.model.spec import Edit, ModelSpec

LAYERS = ("ulsam", "inverted_residual", "se", "eca", "cbam", "coord")
FORMS = ("equations", "released")


class _AddEdit(argparse.Action):
    """Append (kind, place) to ``args.edits``: the edits keep the order in which they were written."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, at: Any, option: Any = ""
    ) -> None:
        namespace.edits = [*(namespace.edits or ()), (option.lstrip("-"), at)]


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--replace``, ``--insert``, ``--remove`` (each repeatable), ``--layer``, ``--groups`` and ``--form``.

    >>> parser = argparse.ArgumentParser()
    >>> add_edit_options(parser)
    >>> for edit in edits_from(parser.parse_args(["--replace", "14,17", "--remove", "16", "--groups", "8"])):
    ...     print(edit)
    replace 14,17 g=8
    remove 16
    """
    place = "AT: module names, globs, or the paper's layer numbers for MobileNet-V1 and V2;\nseveral with commas."
    edits = parser.add_argument_group("edits, done in the order given", place)
    for kind, text in [
        ("replace", "put an attention layer in the place of these blocks"),
        ("insert", "put an attention layer behind these blocks"),
        ("remove", "take these blocks out"),
    ]:
        edits.add_argument(f"--{kind}", dest="edits", action=_AddEdit, metavar="AT", help=text)
    add_layer_options(edits)


def add_layer_options(group: "argparse._ActionsContainer", none: bool = False) -> None:
    """Add ``--layer``, ``--groups``, ``--width`` and ``--form``; :func:`layer_options` reads them.

    With ``none`` there is a layer of this name: the block is removed.
    """
    layers = "ulsam (default), inverted_residual, or timm's se, eca, cbam or coord"
    group.add_argument(
        "--layer",
        choices=(*LAYERS, *["none"] * none),
        metavar="NAME",
        help=layers + "; none: the blocks are removed" * none,
    )
    group.add_argument("--groups", type=int, metavar="G", help="subspaces of each ULSAM layer or preset (default: 4)")
    group.add_argument(
        "--width",
        type=int,
        metavar="W",
        help="hidden channels of the inverted residual: that of --layer, or one behind another layer",
    )
    group.add_argument("--form", choices=FORMS, metavar="NAME", help="of ULSAM: equations (default) or released")


def edits_from(args: argparse.Namespace, model: str | None = None) -> "tuple[Edit, ...]":
    """The edits of :func:`add_edit_options`, in the order given; see there.

    Raises:
        UlsamError: an unknown form or layer, ``--groups`` or ``--form`` beside another layer than ULSAM, or options
            with nothing to act on: no new layer, and ``model`` is no preset.
    """
    from ulsam.model.spec import Edit

    options = layer_options(args)
    if options and not _makes_layers(args) and not preset_arguments(args, model):
        raise UlsamError(f"--{next(iter(options))} has nothing to act on: add --replace AT or --insert AT")
    return tuple(Edit(kind, at, **(options if kind != "remove" else {})) for kind, at in args.edits or ())


def preset_arguments(args: argparse.Namespace, model: str | None) -> dict[str, Any]:
    """``--groups`` and ``--form`` as arguments of a preset, which has its layers already; empty for other models."""
    options = layer_options(args)
    if not options or _makes_layers(args) or options.keys() & {"layer", "width"}:
        return {}
    from ulsam.model.build import PLACEMENTS

    return options if model in PLACEMENTS else {}


def layer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_layer_options` that were given, as arguments of :class:`ulsam.model.spec.Edit`."""
    return {
        key: value for key in ("layer", "groups", "form", "width") if (value := getattr(args, key, None)) is not None
    }


def _makes_layers(args: argparse.Namespace) -> bool:
    return any(kind != "remove" for kind, _ in getattr(args, "edits", None) or ())


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and ``--size``; :func:`spec_from` reads them."""
    parser.add_argument(
        "model", metavar="MODEL", help="a timm name, a preset's included, a model file, or a run's folder"
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="height and width (default: the model's own)")


def spec_from(args: argparse.Namespace) -> "ModelSpec":
    """The spec that MODEL and ``--size`` mean, with a preset's ``--groups`` and ``--form``:
    `ulsam.model.build.spec_of_name`.

    >>> spec = spec_from(argparse.Namespace(model="mobilenetv2_100", size=96))
    >>> len(spec.classes), spec.input_size
    (1000, (3, 96, 96))
    """
    from ulsam.model.build import spec_of_name

    return spec_of_name(args.model, size=args.size, model_args=preset_arguments(args, args.model))


def add_model(parser: argparse.ArgumentParser, dest: str = "model", *, exported: bool = False) -> None:
    """Add MODEL, ``--pretrained`` and ``--weights``; :func:`model_from` reads them.

    Args:
        dest: of MODEL.
        exported: whether the command takes an exported model, too.
    """
    parser.add_argument(
        dest,
        metavar="MODEL",
        help="a model file, a run's folder, a trained model of the package, a timm name, or hf-hub:USER/MODEL"
        + "; or NAME.onnx of ulsam export" * exported,
    )
    group = parser.add_argument_group("weights, if MODEL is a timm name without a tag")
    group.add_argument("--pretrained", action="store_true", help="with the weights that timm has by default")
    group.add_argument("--weights", metavar="FILE", help="with the weights in this file")


def add_device(parser: "argparse._ActionsContainer", default: str = "auto") -> None:
    """Add ``--device``, of a command that takes an exported model, too."""
    parser.add_argument(
        "--device",
        default=default,
        metavar="NAME",
        help=f"auto, cpu, cuda or mps; for NAME.onnx auto, {', '.join(PROVIDERS)} (default: {default})",
    )


def model_from(args: argparse.Namespace, dest: str = "model") -> dict[str, Any]:
    """What the arguments of :func:`add_model` mean: ``model``, and ``spec`` where it is a model in memory.

    >>> model_from(argparse.Namespace(model="runs/mine", pretrained=False, weights=None))
    {'model': 'runs/mine'}
    """
    name = getattr(args, dest)
    _check_order(args, dest)
    if not args.pretrained and args.weights is None:
        return {"model": name}
    from ulsam.model.build import load

    model, spec = load(name, pretrained=args.pretrained, weights=args.weights)
    return {"model": model, "spec": spec}


def _check_order(args: argparse.Namespace, dest: str) -> None:
    """Raise if MODEL is a folder of images, or an image, and what follows it is a model."""
    from ulsam.data.folder import IMAGE_SUFFIXES

    name = getattr(args, dest)
    values = (getattr(args, other, None) for other in ("data", "paths", "images"))
    followed = next((value for value in values if isinstance(value, str | list)), [])  # some are numbers of images
    others = [followed] if isinstance(followed, str) else followed
    if (
        not others
        or _is_model(name)
        or not (os.path.isdir(name) or name.lower().endswith((*IMAGE_SUFFIXES, ".csv", ".tsv")))
    ):
        return
    found = next((other for other in others if _is_model(other)), None)
    if found is None and not any(map(os.path.exists, others)):
        from ulsam.model.pretrained import is_pretrained_name

        found = next(filter(is_pretrained_name, others), None)
    if found is not None:
        raise UlsamError(f"the model comes first: ulsam {args.command} {found} {name}")


def _is_model(name: str) -> bool:
    """Whether this is a model file, a run's folder, or a trained model of the package."""
    if os.path.isdir(name):
        return model_in(name) is not None
    return name in names() or (name.endswith((".safetensors", ".onnx")) and os.path.exists(name))


def numbers(kind: type[Any]) -> Callable[[str], tuple[Any, ...]]:
    """An argparse type: several numbers with commas between them.

    >>> numbers(int)("1,32")
    (1, 32)
    """

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(word) for word in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2") from None

    return read


def print_json(entry: Mapping[str, Any]) -> None:
    """Print a result of ``--json``: one line, in ASCII, so that it can be read whatever the terminal's encoding.

    Under torchrun the first process prints it.

    >>> print_json({"class": "Zaunkönig", "share": 0.5})
    {"class": "Zaunk\\u00f6nig", "share": 0.5}
    """
    if is_first_process():
        print(json.dumps(entry, default=os.fspath), flush=True)


def only_json(args: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Within it, with ``--json``, what work says about its progress goes to stderr: stdout has the result alone."""
    return contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()


def free_folder(name: str) -> Path:
    """runs/NAME-1, or the next number that no folder has yet."""
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def beside(model: str, ending: str) -> str:
    """The name of a file made from MODEL: beside it, with another ending; here, for a model that is known by name.

    >>> beside("runs/mine/model.safetensors", ".onnx"), beside("runs/mine/model.onnx", "-int8.onnx")
    ('runs/mine/model.onnx', 'runs/mine/model-int8.onnx')
    >>> beside("hf-hub:me/birds.v2", ".onnx")
    'birds.v2.onnx'
    """
    if model in names() or (not os.path.exists(model) and not model.endswith((".safetensors", ".onnx"))):
        return model.rpartition("/")[2].removeprefix("hf-hub:") + ending
    return str(locate(model).with_suffix("")) + ending
