"""Distillation: a trained model, the teacher, gives each image soft targets and feature maps to come near to.

The soft targets are those of Hinton, Vinyals and Dean, 2015 (https://arxiv.org/abs/1503.02531). The temperature of 4
that is the default is that of Zagoruyko and Komodakis, 2017 (https://arxiv.org/abs/1612.03928), and of most work since.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulsam.base.errors import UlsamError, printable
from ulsam.base.eval_mode import eval_mode
from ulsam.model.build import load
from ulsam.model.spec import ModelSpec
from ulsam.model.trained import locate
from ulsam.surgery.edited import edited
from ulsam.surgery.fold import fold
from ulsam.surgery.trace import ModuleTrace, trace
from ulsam.training.class_weights import weighted_cross_entropy
from ulsam.training.config import TrainConfig

Output = tuple[Tensor, list[Tensor]]  # logits, and the feature maps at the places


@dataclass(frozen=True)
class Teacher:
    """A trained model, ready to teach students of one recipe; :func:`open_teacher` makes it.

    Args:
        model: folded, in eval mode; nothing in it is trained.
        spec: of its file.
        digest: SHA-256 of its file, in hexadecimal.
        scale, shift: [C, 1, 1]; the student's normalized pixels times ``scale`` plus ``shift`` are the teacher's.
        places: names of the modules, in both models, whose feature maps are compared.
        notes: lines for the user.
    """

    model: nn.Module
    spec: ModelSpec
    digest: str
    scale: Tensor
    shift: Tensor
    places: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_teacher(config: TrainConfig, spec: ModelSpec, student: nn.Module) -> Teacher | None:
    """The teacher that the settings name, for this student; None if they name none.

    Args:
        config: with ``teacher``, a model file, and the ``distill`` settings.
        spec: of the student; its classes must be the teacher's, in the same order.
        student: stays as it is.

    Raises:
        UlsamError: no model file, one of other classes, one that does not run at the student's input size, or one
            without a feature map of a name and shape that the student has too, where maps are to be compared.
    """
    if config.teacher is None:
        return None
    model, its = load(config.teacher)
    its.check_one_class("teaching")
    if its.classes != spec.classes:
        raise UlsamError(f"{config.teacher} cannot teach: {_other_classes(its.classes, spec.classes)}")
    if its.input_size[0] != spec.input_size[0]:
        raise UlsamError(
            f"{config.teacher} cannot teach: it takes images of {its.input_size[0]} channels, and these have "
            f"{spec.input_size[0]}"
        )
    flows = trace(model, spec.input_size)  # raises where it does not run at this size
    places = shared_places(student, flows, spec.input_size) if config.distill_features else []
    notes = []
    # a folded convolution outputs what its BatchNorm did, so a map compared there would be another one
    if any(isinstance(model.get_submodule(name), nn.Conv2d) for name in places):
        notes = ["the teacher is not folded: a feature map is taken at a convolution"]
    else:
        try:
            model = fold(model, spec.input_size, channels_last=False)
        except UlsamError as error:
            notes = [f"the teacher is not folded: {error}"]
    mean, std, its_mean, its_std = (
        torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std, its.mean, its.std)
    )
    return Teacher(
        model.requires_grad_(False),
        its,
        hashlib.sha256(locate(config.teacher).read_bytes()).hexdigest(),
        std / its_std,
        (mean - its_mean) / its_std,
        tuple(places),
        tuple(notes),
    )


def shared_places(student: nn.Module, teacher: Mapping[str, ModuleTrace], input_size: Sequence[int]) -> list[str]:
    """Where the student's feature maps are compared with the teacher's.

    That is at every place of an edit, and at the last map before the head, which begins with the pooling: at the
    outermost module that outputs it, and once if an edit's place outputs this very map. Where the teacher outputs
    another shape, nothing is compared. None of this depends on the size of the maps.

    Args:
        student: with the edits.
        teacher: what :func:`ulsam.surgery.trace.trace` says of it, at the same ``input_size`` (C, H, W).

    Raises:
        UlsamError: there is no such place.

    >>> from ulsam import build
    >>> model, plain = (build(ModelSpec("mobilenetv2_035", ("a", "b")))[0] for _ in range(2))
    >>> size = (3, 64, 64)
    >>> from ulsam import remove
    >>> shared_places(remove(model, "14,17"), trace(plain, size), size)
    ['blocks.4.2', 'blocks.5.2', 'bn2']
    """
    flows = trace(student, input_size)
    maps = [name for name in flows if name and flows[name].is_four_dimensional]
    outermost = [name for name in maps if not any(name.startswith(f"{other}.") for other in maps)]
    pools = [
        number for number, name in enumerate(outermost) if "Adaptive" in type(student.get_submodule(name)).__name__
    ]
    last = outermost[: pools[-1] if pools else None][-1:]
    wanted = dict.fromkeys([*edited(student), *last])
    places = [
        name
        for name in wanted
        if name in teacher
        and teacher[name].is_four_dimensional
        and teacher[name].output_shape == flows[name].output_shape
    ]
    if places and places[-1:] == last and _is_repeated(student, places, input_size):
        del places[-1]
    if not places:
        raise UlsamError(
            "distill_features compares feature maps at places of one name and shape, and the teacher has none at "
            f"{', '.join(wanted)}: leave distill_features out, or take the model that was edited as the teacher"
        )
    return places


def soft_target_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Hinton's loss: the mean over images of T^2 * KL(teacher || student), both softened by the temperature T; nats.

    The factor T^2 keeps the size of its gradients, which softening divides by T^2 (section 2 of the paper).

    Args:
        logits: [B, classes], of the student.
        teacher_logits: [B, classes], of the teacher.
        temperature: above 0.

    >>> soft_target_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), 4.0).item()  # logits may be shifted
    0.0
    """
    student, teacher = ((values.float() / temperature).log_softmax(1) for values in (logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def feature_loss(maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """The mean over places of the squared error of the student's map, as a share of the mean square of the teacher's.

    So it depends neither on the number of channels and positions nor on the scale of the maps: 0 is no difference, 1
    is what a map of zeros would get.

    Args:
        maps: [B, C, H, W] each, of the student.
        teacher_maps: the teacher's, of the same shapes.

    >>> feature_loss([torch.zeros(2, 8, 4, 4)], [torch.full((2, 8, 4, 4), 5.0)]).item()
    1.0
    """
    shares = [
        F.mse_loss(mine.float(), its.float()) / its.float().square().mean()
        for mine, its in zip(maps, teacher_maps, strict=True)
    ]
    return torch.stack(shares).mean()


class FeatureCapture(nn.Module):
    """A model that also outputs the feature maps at named places in it; within :meth:`listening` alone.

    >>> model = nn.Sequential(nn.Identity(), nn.Flatten())
    >>> tapped = FeatureCapture(model, ["0"])
    >>> with tapped.listening():
    ...     logits, maps = tapped(torch.ones(2, 3, 4, 4))
    >>> logits.shape, maps[0].shape, len(model[0]._forward_hooks)
    (torch.Size([2, 48]), torch.Size([2, 3, 4, 4]), 0)
    """

    def __init__(self, model: nn.Module, places: Sequence[str]) -> None:
        super().__init__()
        self.model, self.places = model, tuple(places)
        self.features: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Output:
        logits = self.model(images)
        return logits, [self.features.pop(place) for place in self.places]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the maps are noted; outside the model has no hook, so copies and measurements of it have none."""
        handles = [
            self.model.get_submodule(place).register_forward_hook(partial(self._note, place)) for place in self.places
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, place: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features[place] = output.clone()  # what comes next may change it in place: x += shortcut, a ReLU


class Distiller:
    """A teacher beside a student in training: it sees the student's batches, at the student's size.

    Args:
        config: the weights of the losses, and the form of the step: the teacher is compiled where the student is.
        teacher: stays as it is; a copy of its model does the work.
        student: the plain model; `student` is what a step calls, with the maps beside the logits.
        device, layout: those of the student.
    """

    def __init__(
        self,
        config: TrainConfig,
        teacher: Teacher,
        student: nn.Module,
        device: torch.device,
        layout: torch.memory_format,
    ) -> None:
        self.config = config
        self.student = FeatureCapture(student, teacher.places)
        model = copy.deepcopy(teacher.model).to(device).to(memory_format=layout)
        self.teacher = FeatureCapture(model, teacher.places).eval()
        self.same_pixels = bool((teacher.scale == 1).all() and (teacher.shift == 0).all())
        self.scale, self.shift = teacher.scale.to(device), teacher.shift.to(device)
        self._run: nn.Module = self.teacher
        if config.compile == "inductor":
            self._run = cast(nn.Module, torch.compile(self.teacher, dynamic=False))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it both models may be run: their feature maps are noted."""
        with ExitStack() as stack:
            stack.enter_context(self.student.listening())
            stack.enter_context(self.teacher.listening())
            yield

    @torch.no_grad()
    def teach(self, images: Tensor) -> Output:
        """The teacher's logits [B, classes] and maps for the student's batch [B, C, H, W]."""
        output: Output = self._run(images if self.same_pixels else images * self.scale + self.shift)
        return output

    def loss(
        self,
        output: Output,
        teacher_output: Output,
        labels: Tensor,
        *,
        smoothing: float,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """(1 - w) * cross-entropy + w * :func:`soft_target_loss` + f * :func:`feature_loss`.

        w is ``distill`` and f is ``distill_features`` of the settings.

        Args:
            output: of the student.
            teacher_output: of :meth:`teach`.
            labels: class numbers [B], or shares [B, classes].
            smoothing: of the labels, in the cross-entropy.
            class_weights: [classes], in the cross-entropy.
        """
        (logits, maps), (its_logits, its_maps) = output, teacher_output
        weight, temperature = cast(float, self.config.distill), cast(float, self.config.distill_temperature)
        hard = weighted_cross_entropy(logits.float(), labels, class_weights, smoothing)
        total = (1 - weight) * hard + weight * soft_target_loss(logits, its_logits, temperature)
        if maps:
            total = total + cast(float, self.config.distill_features) * feature_loss(maps, its_maps)
        return total


def describe(config: TrainConfig, teacher: Teacher) -> str:
    """One line about what is taught, for the user."""
    edits = "; ".join(map(str, teacher.spec.edits)) or "none"
    maps = f"; maps weigh {config.distill_features:g}, at {', '.join(teacher.places)}" if teacher.places else ""
    return (
        f"{teacher.spec.base}; edits: {edits}; soft targets weigh {config.distill:g}, "
        f"at temperature {config.distill_temperature:g}{maps}"
    )


@torch.no_grad()
def _is_repeated(model: nn.Module, places: Sequence[str], input_size: Sequence[int]) -> bool:
    """Whether the last of these places outputs the very tensor that an earlier one does, unchanged since."""
    outputs: dict[str, tuple[Tensor, int]] = {}

    def note(place: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[place] = output, output._version

    handles = [model.get_submodule(place).register_forward_hook(partial(note, place)) for place in places]
    try:
        with eval_mode(model):
            model(torch.zeros(1, *input_size, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    last, version = outputs[places[-1]]
    return any(outputs[place][0] is last and outputs[place][1] == version for place in places[:-1])


def _other_classes(its: Sequence[str], ours: Sequence[str]) -> str:
    """How the classes differ, in one line."""
    if len(its) != len(ours):
        return f"it knows {len(its)} classes, the data has {len(ours)}"
    number = next(n for n, (left, right) in enumerate(zip(its, ours, strict=True)) if left != right)
    return f"its class {number} is {printable(its[number])!r}, that of the data is {printable(ours[number])!r}"
