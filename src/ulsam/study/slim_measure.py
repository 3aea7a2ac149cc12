"""What a trained model scores with sets of its blocks replaced, on a sample of its training images."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from ulsam.base.distributed import World
from ulsam.data.opening import unlabeled
from ulsam.data.sources import AnyImages
from ulsam.model.spec import ModelSpec
from ulsam.study.slim_blocks import SwitchableModel
from ulsam.study.slim_damage import SampleScore, score
from ulsam.study.slim_stacked import can_stack, scores_together
from ulsam.surgery.reconstruct import Known, reconstruct
from ulsam.training.config import TrainConfig
from ulsam.training.sample import ImageSample, draw_sample

#: Of the reconstruction by which sets are compared; training starts with a longer one.
STEPS = 200


class SetMeasurer:
    """Measures sets of blocks.

    Args:
        switched: the model, on the device of ``world``.
        sample: the images to measure on.
        images: the training images, which the sample is from.
        spec: of the model, as training sees the images.
        config: of the training that follows.
        world: this process.
    """

    def __init__(
        self,
        switched: SwitchableModel,
        sample: ImageSample,
        images: AnyImages,
        spec: ModelSpec,
        config: TrainConfig,
        world: World,
    ) -> None:
        self.switched, self.sample, self.images = switched, sample, images
        self.spec, self.config, self.world = spec, config, world
        self._known: Known = {}

    @cached_property
    def reconstruction_images(self) -> list[Tensor]:
        """The images to reconstruct on, in batches [B, C, H, W]: others than the sample's, drawn when first used."""
        other = self.config.images_for_reconstruction
        return draw_sample(
            unlabeled(other) if other else self.images,
            self.spec,
            self.config.reconstruct_images,
            self.world,
            apart_from=0 if other else self.sample.count + len(self.sample.unreadable),
            workers=self.config.workers,
        ).images

    def scores(self, sets: Sequence[Sequence[str]]) -> list[SampleScore]:
        """The score with each of these sets replaced, in one pass where the model allows it.

        Args:
            sets: names of blocks.
        """
        if len(sets) > 1 and self._can_stack:
            return scores_together(self.switched, sets, self.sample.batches)
        scores = []
        for names in sets:
            with self.switched.replaced(names) as model:
                scores.append(score(model, self.sample, self.spec.classes, self.world))
        return scores

    def explained(self) -> dict[str, float]:
        """Reconstruct each new layer alone; the share of its block's output that it explains, by the block's name."""
        layers = self.switched.reconstruct(self.reconstruction_images)
        return {layer.name: layer.explained for layer in layers}

    def reconstructed_score(self, names: Sequence[str]) -> SampleScore:
        """The score with these blocks replaced and the layers behind them reconstructed."""
        model = self.switched.edited(names, self.world.device)
        reconstruct(model, self.reconstruction_images, steps=STEPS, freeze=self.config.freeze, known=self._known)
        return score(model, self.sample, self.spec.classes, self.world)

    @cached_property
    def _can_stack(self) -> bool:
        return can_stack(self.switched, self.sample.images[0][:2])
