"""One training step: a model and its optimizer in the memory layout, precision and form that the settings name."""

import contextlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ulsam.base.distributed import World
from ulsam.training import parts
from ulsam.training.class_weights import weight_tensor, weighted_cross_entropy
from ulsam.training.config import TrainConfig
from ulsam.training.distill import Distiller, Teacher

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class TrainingStep:
    """Takes training steps with ``model``, which it moves to the device; none of the settings is left at "auto".

    ``model`` stays the plain module, for state dicts, averaging and evaluation; ``wrapped`` is what a step calls: the
    same weights compiled, or shared with other processes, and, with a teacher, its feature maps beside the logits.
    With ``several`` labels an image the loss is the binary cross-entropy of each class.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        epoch_updates: int,
        world: World,
        teacher: Teacher | None = None,
        class_weights: Mapping[str, float] | None = None,
        several: bool = False,
    ) -> None:
        self.config, self.device, self.several = config, world.device, several
        self.layout = LAYOUTS[config.layout]
        self.model = model.to(world.device).to(memory_format=self.layout)
        self.frozen = parts.freeze(model, config.freeze)
        self.optimizer, self.schedule = parts.optimizer_of(config, self.model, epoch_updates)
        self.class_weights = weight_tensor(class_weights, world.device)
        self.amp = AMP_DTYPES[config.amp]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp == torch.float16)
        self.wrapped: nn.Module = self.model
        self.distiller: Distiller | None = None
        if teacher is not None:
            self.distiller = Distiller(config, teacher, self.model, world.device, self.layout)
            self.wrapped = self.distiller.student
        if config.compile == "inductor":
            self.wrapped = torch.compile(self.wrapped, dynamic=False)  # type: ignore[assignment]
        if world.size > 1:
            ids = [world.device] if world.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.wrapped, device_ids=ids)

    def train(self) -> None:
        """Put everything in training mode, but for what is frozen."""
        self.wrapped.train()
        for module in self.frozen:
            module.eval()  # BatchNorm statistics too

    def add_gradients(self, images: Tensor, labels: Tensor, *, smoothing: float, last: bool = True) -> float:
        """Forward and backward; the mean loss. Processes share their gradients in the ``last`` batch of an update.

        Args:
            images: [B, C, H, W] in the layout of the settings.
            labels: class numbers [B], or shares [B, classes]; of ``several`` labels an image 0 to 1 [B, classes].
            smoothing: of the labels; of several an image each moves so far towards a half.
        """
        more = isinstance(self.wrapped, DistributedDataParallel) and not last
        with self.wrapped.no_sync() if more else contextlib.nullcontext():  # type: ignore[operator]
            loss = self._loss(images, labels, smoothing)
            self.scaler.scale(loss / self.config.accumulate).backward()
        return loss.item()

    def _loss(self, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        precision = torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)
        if self.distiller is None:
            with precision:
                logits = self.wrapped(images)
            if self.several:
                return F.binary_cross_entropy_with_logits(logits.float(), parts.smoothed(labels, smoothing))
            return weighted_cross_entropy(logits.float(), labels, self.class_weights, smoothing)
        with precision, self.distiller.listening():
            teacher_output = self.distiller.teach(images)
            output = self.wrapped(images)
        return self.distiller.loss(
            output, teacher_output, labels, smoothing=smoothing, class_weights=self.class_weights
        )

    def update(self) -> None:
        """Move the weights by the gradients, clipped where the settings say so, and forget these."""
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
