"""Train an edited YOLO model with Ultralytics, whose trainers build the model anew from its YAML: without its edits.

Validation, prediction, fusing, export and the checkpoints need nothing: an edited model is an ordinary model.
"""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ulsam.base.errors import UlsamError
from ulsam.model.spec import apply, edits_of
from ulsam.surgery.edited import EditedYaml, changes, lacks_weights, note_weights
from ulsam.surgery.trace import default_input_size


def trainer_for(yolo: Any) -> type:
    """The trainer class of ``yolo`` that keeps the edits of ``yolo.model``, for ``yolo.train(trainer=...)``.

    Training starts with the weights of ``yolo.model`` (with ``pretrained=False`` from new ones, with
    ``pretrained="file.pt"`` from those of that file), and resumes with the edits of the checkpoint. Every task is
    covered: detection, segmentation, classification, pose and oriented boxes.

    Args:
        yolo: an `ultralytics.YOLO`, built from a YAML or loaded from a ``.pt`` file, whose ``model`` was edited.

    Raises:
        UlsamError: the model holds no edit; later, in training, when the weights to start with hold other edits.

    Example::

        yolo = YOLO("yolo11n.yaml")
        ulsam.insert(yolo.model, "model.9")
        yolo.train(trainer=trainer_for(yolo), data="coco8.yaml", epochs=10)
    """
    start: nn.Module = yolo.model
    wanted = edits_of(start)
    if not wanted:
        raise UlsamError("yolo.model holds no edit: edit it first, or train without this trainer")
    base = yolo.task_map[yolo.task]["trainer"]

    class EditedTrainer(base):  # type: ignore[misc, valid-type]
        def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
            if weights is None and self.args.pretrained is not False:
                weights = start
            edits = wanted
            if weights is not None and (held := edits_of(weights)) != wanted:
                if self.resume:
                    edits = held
                elif held or not isinstance(self.args.pretrained, str | Path):
                    raise UlsamError(
                        f"this trainer is for the edits {wanted}, and the weights to start with hold {held}: "
                        "call trainer_for again"
                    )
            plain = dict(cfg) if isinstance(cfg, EditedYaml) else cfg
            model: Any = super().get_model(cfg=plain, weights=None, verbose=verbose)
            channels, *_ = default_input_size(model)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*trainer_for")  # this is that trainer
                apply(model, edits, input_size=(channels, 256, 256))  # a multiple of every YOLO's stride
            if weights is not None:
                model.load(weights)
            if edits_of(model) != edits:
                raise UlsamError(f"loading the weights took edits out of the model: {edits} became {edits_of(model)}")
            _fill_aside(model, weights)
            return model

    return EditedTrainer


def _fill_aside(model: nn.Module, weights: nn.Module | None) -> None:
    """Give the blocks that edits put aside in ``model`` their weights, or note that none are known."""
    theirs = {} if weights is None else dict(weights.named_modules()) | changes(weights)[1]
    for name, old in changes(model)[1].items():
        source = theirs.get(name)
        state = {} if source is None or lacks_weights(source) else source.state_dict()
        known = {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in old.state_dict().items()}
        if known:
            old.load_state_dict(state)
        note_weights(old, None)
        note_weights(old, known)
