"""What a model says about an image and what it looked at: probabilities, attention maps, a class activation map."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ulsam.base.errors import NotFinite, UlsamError
from ulsam.base.eval_mode import eval_mode
from ulsam.data.image_channels import opened_pixels
from ulsam.data.images import Pixels, read_pixels
from ulsam.explanation.cam import cam_layer, grad_cam_plus_plus, watched
from ulsam.explanation.explanation import Explanation, LayerMaps
from ulsam.layer.ulsam import ULSAM
from ulsam.model.given import model_and_spec
from ulsam.model.spec import ModelSpec
from ulsam.surgery.fold import has_inference_tensors, plain_copy
from ulsam.surgery.places import paper_places
from ulsam.training.evaluate import spec_transform

if TYPE_CHECKING:
    pass

Watch = Callable[[str, Tensor, Tensor], None]
"""Is given a ULSAM layer's name, its input [B, C, H, W] and its maps [B, g, H, W]."""


class Explainer:
    """Explains images, a batch at a time: one forward pass, and a backward pass through the head alone.

    Args:
        model: a classifier of `ulsam.load` or `ulsam.build`, with or without ULSAM layers, folded or not. Autograd
            cannot use one that was made in inference mode: a copy of it is explained.
        spec: the model's, for the size of its images and the names of its classes.
        watch: called for each ULSAM layer in each forward pass.

    Raises:
        UlsamError: the model takes other than RGB or gray images, gives several labels an image, or has no feature map
            to lay a CAM on.

    >>> from ulsam.model.build import build
    >>> from ulsam.model.spec import Edit
    >>> spec = ModelSpec("mobilenetv2_035", ("cat", "dog"), (Edit("replace", "17"),), input_size=(3, 64, 64))
    >>> explainer = Explainer(build(spec)[0], spec)
    >>> (found,) = explainer([explainer.transform.pixels(np.zeros((80, 90, 3), np.uint8))])
    >>> found.cam_layer, found.cam.shape, [(layer.name, layer.maps.shape) for layer in found.layers]
    ('bn2', (2, 2), [('blocks.5.2', (4, 2, 2))])
    """

    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, spec: ModelSpec, *, watch: Watch | None = None) -> None:
        spec.check_classes()
        spec.check_one_class("an explanation")
        if has_inference_tensors(model):
            model = plain_copy(model)
        self.model, self.spec, self.watch = model, spec, watch
        self.transform = spec_transform(spec)
        if self.transform.channels not in (1, 3):
            raise UlsamError(
                f"maps explain models of RGB or gray images; this one takes {self.transform.channels} channels"
            )
        self.attention = {name: module for name, module in model.named_modules() if isinstance(module, ULSAM)}
        self.places = paper_places(model)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.cam_layer = cam_layer(model, torch.zeros(1, *spec.input_size, device=self.device, dtype=self.dtype))

    def images(self, pixels: Sequence[Tensor]) -> Tensor:
        """The model's input [B, C, H, W] of images [H, W, C] in uint8, as ``transform.pixels`` makes them."""
        return self.transform.normalize(torch.stack(list(pixels))).to(self.device, self.dtype)

    @torch.inference_mode(False)
    def __call__(self, pixels: Sequence[Tensor], targets: Sequence[int] | None = None) -> list[Explanation]:
        """Explain images.

        Args:
            pixels: [H, W, C] in uint8 each, as ``transform.pixels`` makes them.
            targets: the class that each CAM is of; by default the most probable one.

        Raises:
            NotFinite: the model's outputs are not finite.
        """
        maps: dict[str, Tensor] = {}

        def look(name: str) -> Callable[..., None]:
            def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
                with torch.no_grad():
                    maps[name] = cast(ULSAM, layer).attention(args[0])
                    if self.watch:
                        self.watch(name, args[0], maps[name])

            return hook

        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.model))
            outputs = stack.enter_context(watched(self.model, self.cam_layer))
            for name, layer in self.attention.items():
                stack.callback(layer.register_forward_pre_hook(look(name)).remove)
            logits = self.model(self.images(pixels))
            if not logits.isfinite().all():
                raise NotFinite("the model outputs numbers that are not finite (NaN or infinity)")
            best = logits.argmax(1) if targets is None else torch.tensor(list(targets), device=self.device)
            (gradients,) = torch.autograd.grad(logits.gather(1, best[:, None]).sum(), outputs[-1])
        cams = grad_cam_plus_plus(outputs[-1].detach().float(), gradients.float()).cpu().numpy()
        probabilities = logits.detach().float().softmax(1).cpu().numpy()
        found = {name: each.float().cpu().numpy() for name, each in maps.items()}
        return [
            Explanation(
                pixels=one.numpy(),
                classes=self.spec.classes,
                probabilities=probabilities[number],
                target=int(best[number]),
                layers=tuple(
                    LayerMaps(name, self.places.get(name), layer.form, found[name][number])
                    for name, layer in self.attention.items()
                    if name in found
                ),
                cam=cams[number],
                cam_layer=self.cam_layer,
            )
            for number, one in enumerate(pixels)
        ]


def explain(
    model: nn.Module | str | os.PathLike[str],
    image: str | os.PathLike[str] | Image.Image | Pixels,
    spec: ModelSpec | None = None,
    *,
    target: str | None = None,
) -> Explanation:
    """What a model says about one image, and what it looked at.

    Args:
        model: a model file, or a model together with its ``spec``, as `ulsam.load` gives them.
        image: an image file, a Pillow image, or an array in uint8, [H, W, 3] or, of gray, [H, W, 1]; resized and
            cropped as for evaluation.
        spec: of the model; not with a model file, which holds its own.
        target: the class that the CAM is of; by default the most probable one.

    Raises:
        UlsamError: not a model file, a model without its spec, an image that cannot be read, or an unknown class.

    >>> from ulsam.model.build import build
    >>> spec = ModelSpec("mobilenetv2_035", ("cat", "dog"), input_size=(3, 64, 64))
    >>> found = explain(build(spec)[0], Image.new("RGB", (80, 70)), spec, target="dog")
    >>> found.pixels.shape, found.classes[found.target], found.layers
    ((64, 64, 3), 'dog', ())
    """
    explainer = Explainer(*model_and_spec(model, spec))
    channels = explainer.transform.channels
    pixels = cast(Pixels, opened_pixels(image, channels)) if isinstance(image, Image.Image) else image
    if isinstance(pixels, str | os.PathLike):
        pixels = read_pixels(Path(pixels), explainer.transform.reduction, channels=channels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
        raise UlsamError(f"an image as an array is uint8 [H, W, {channels}], not {pixels.dtype} {list(pixels.shape)}")
    classes = explainer.spec.classes
    if target is not None and target not in classes:
        raise UlsamError(f"the model has no class {target!r}: it knows {', '.join(classes[:8])}")
    return explainer([explainer.transform.pixels(pixels)], None if target is None else [classes.index(target)])[0]
