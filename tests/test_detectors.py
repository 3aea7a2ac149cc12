"""Whole detection and segmentation models of other libraries: found in, edited, undone, saved and loaded."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import detection, segmentation

import ulsam
from calibrating import calibrated
from ulsam.base.errors import UlsamError
from ulsam.surgery.trace import trace

NEW: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
SMALL: dict[str, Any] = {**NEW, "min_size": 64, "max_size": 64}
FEW: dict[str, Any] = {"box_score_thresh": 0.0, "box_detections_per_img": 4, "rpn_post_nms_top_n_test": 20}


def segmenter(name: str, encoder: str) -> nn.Module:
    library = pytest.importorskip("segmentation_models_pytorch")
    return getattr(library, name)(encoder, encoder_weights=None, classes=2)


def transformer(name: str, **config: Any) -> nn.Module:
    library = pytest.importorskip("transformers")
    made = getattr(library, name.partition("For")[0] + "Config")(num_labels=3, **config)
    return getattr(library, name)(made)


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 2, 1, 1], "layer_type": "basic"}
#: how a model is made, a block to replace, a place to insert behind, at least this many candidates
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str, int]] = {
    "ssdlite": (
        lambda: detection.ssdlite320_mobilenet_v3_large(**NEW, score_thresh=0.0),
        "backbone.features.0.5",
        "backbone.features.1.0",
        50,
    ),
    "faster r-cnn": (
        lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(**SMALL, **FEW),
        "backbone.body.5",
        "backbone.fpn.layer_blocks.1",
        40,
    ),
    "mask r-cnn": (
        lambda: detection.maskrcnn_resnet50_fpn(**SMALL, **FEW),
        "backbone.body.layer2.1",
        "backbone.body.layer4",
        20,
    ),
    "keypoint r-cnn": (
        lambda: detection.keypointrcnn_resnet50_fpn(**SMALL, **FEW, num_keypoints=2),
        "backbone.body.layer2.1",
        "backbone.fpn.layer_blocks.0",
        15,
    ),
    "retinanet": (
        lambda: detection.retinanet_resnet50_fpn(**SMALL, score_thresh=0.0),
        "backbone.body.layer3.2",
        "backbone.body.layer1",
        15,
    ),
    "fcos": (
        lambda: detection.fcos_resnet50_fpn(**SMALL, score_thresh=0.0),
        "backbone.body.layer3.2",
        "backbone.body.layer1",
        15,
    ),
    "deeplab": (lambda: segmentation.deeplabv3_mobilenet_v3_large(**NEW), "backbone.5", "classifier.0", 40),
    "lraspp": (lambda: segmentation.lraspp_mobilenet_v3_large(**NEW), "backbone.5", "classifier.cbr", 40),
    "smp unet": (lambda: segmenter("Unet", "mobilenet_v2"), "encoder.features.3", "decoder.blocks.0", 35),
    "smp fpn": (lambda: segmenter("FPN", "tu-mobilenetv3_small_050"), "encoder.model.blocks.2.1", "decoder.p4", 15),
    "hf resnet": (
        lambda: transformer("ResNetForImageClassification", **RESNET),
        "resnet.encoder.stages.1.layers.1",
        "resnet.embedder",
        10,
    ),
    "hf mobilenet": (
        lambda: transformer("MobileNetV2ForImageClassification", depth_multiplier=0.35),
        "mobilenet_v2.layer.3",
        "mobilenet_v2.conv_stem",
        20,
    ),
    "hf segmenter": (
        lambda: transformer("MobileNetV2ForSemanticSegmentation", depth_multiplier=0.35),
        "mobilenet_v2.layer.3",
        "segmentation_head.conv_projection",
        20,
    ),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """New weights are the same whatever ran before: not every one changes a detection."""
    torch.manual_seed(0)


def outputs(model: nn.Module) -> list[Tensor]:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model.eval()(image)) if isinstance(leaf, Tensor)]


def agree(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


#: Of those with outputs of the same kind, all but one or two.
SLOW = (
    "faster r-cnn",
    "ssdlite",
    "lraspp",
    "hf segmenter",
    "hf resnet",
    "mask r-cnn",
    "keypoint r-cnn",
    "retinanet",
    "fcos",
    "deeplab",
    "smp fpn",
    "hf mobilenet",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_a_whole_model_is_edited(name: str) -> None:
    make, block, behind, least = MODELS[name]
    model = calibrated(make())
    state, generator, before = deepcopy(model.state_dict()), torch.get_rng_state(), outputs(model)
    assert any(leaf.numel() for leaf in before)

    places = [place.name for place in ulsam.candidates(model)]
    assert len(places) >= least and block in places
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)

    ulsam.replace(model, block, groups=2)
    replaced = outputs(model)
    assert not agree(replaced, before)
    ulsam.insert(model, behind, groups=2)
    both = outputs(model)
    assert not agree(both, replaced)

    loaded = ulsam.apply(make(), ulsam.edits_of(model))
    loaded.load_state_dict(model.state_dict())
    assert agree(outputs(loaded), both)

    ulsam.undo(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert agree(outputs(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf resnet", "lraspp", "smp fpn"])
def test_every_candidate_is_accepted(name: str) -> None:
    model = MODELS[name][0]()
    before = outputs(model)
    for place in ulsam.candidates(model):
        ulsam.undo(ulsam.replace(model, place.name, groups=1))
    assert agree(outputs(model), before)


def test_a_detector_trains_through_the_layer() -> None:
    model = ulsam.insert(MODELS["ssdlite"][0](), "backbone.features.1.0", groups=2).train()
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = model(list(torch.rand(2, 3, 64, 64)), [target, target])
    sum(losses.values()).backward()
    gradients = [p.grad for name, p in model.named_parameters() if ".ulsam." in name]
    assert len(gradients) == 2 and all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_what_no_detector_takes_is_named() -> None:
    model = MODELS["faster r-cnn"][0]()
    with pytest.raises(UlsamError, match=r"FasterRCNN does not run on one image of \[5, 64, 64\] .*must match"):
        trace(model, (5, 64, 64))


def test_a_replaced_block_keeps_plain_attributes_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    block: Any = model[1]
    block.i, block.f, block.type, block.groups_of = 1, [-1, 0], "block", {"a": (1, None)}
    block.fold = block.attention = True  # names of ULSAM's own methods
    block.act, block.table, block.parts = torch.relu, [torch.ones(1)], [nn.ReLU()]
    block.forward = block.forward  # bound to the block, as Ultralytics leaves it
    new: Any = ulsam.replace(model, "1", groups=2, input_size=(3, 12, 12))[1]
    assert (new.i, new.f, new.type, new.groups_of, new.stride) == (1, [-1, 0], "block", {"a": (1, None)}, (1, 1))
    assert (new.groups, callable(new.fold), callable(new.attention)) == (2, True, True)
    assert not {"act", "table", "parts", "forward"} & set(vars(new))
    assert new.attention(torch.rand(1, 8, 4, 4)).shape == (1, 2, 4, 4)
