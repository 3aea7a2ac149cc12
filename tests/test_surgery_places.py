"""Where a model can be edited: candidates, the names of places, and mistakes."""

import pytest
import timm
import torch
from torch import Tensor, nn

from surgery_models import SIZE, Branchy, Unit, assert_as_before, make_model, snapshot
from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.surgery.cost import cost
from ulsam.surgery.edit import insert, remove, replace, undo
from ulsam.surgery.find import candidates
from ulsam.surgery.places import layer_names, match


def meta(name: str) -> nn.Module:
    """The model's shapes alone: fast to build."""
    with torch.device("meta"):
        return make_model(name)


# ---------------------------------------------------------------------------------------------- candidates


def test_candidates_come_outermost_first_and_leaves_on_request():
    model = Branchy()
    assert [c.name for c in candidates(model, SIZE)] == ["left", "right", "right.0", "right.1", "attention"]
    leaves = [c.name for c in candidates(model, SIZE, leaves=True)]
    assert leaves == [
        "left", "left.conv", "left.norm",
        "right", "right.0", "right.0.conv", "right.0.norm", "right.1", "right.1.conv", "right.1.norm",
        "gated.conv", "gated.split.conv", "attention",
    ]  # fmt: skip
    found = candidates(model, SIZE)[0]
    assert (found.type, found.shape, found.groups) == ("Unit", (12, 16, 16), [1, 2, 3, 4, 6, 12])


@pytest.mark.parametrize(
    ("make", "size", "names"),
    [
        (Branchy, SIZE, ["left", "right", "attention"]),
        (lambda: meta("mobilenetv1_100"), (3, 64, 64), ["blocks.3.5"]),
        (lambda: meta("mobilenetv2_100"), (3, 64, 64), ["blocks.5.2"]),
        (lambda: meta("mobilenetv3_small_100"), (3, 64, 64), ["blocks.1.1", "blocks.2.1.se"]),
        (lambda: meta("ecaresnet26t"), (3, 64, 64), ["layer2.1"]),
        (lambda: meta("resnet18"), (3, 64, 64), ["layer1", "layer1.0", "layer4.1"]),
        (lambda: meta("torchvision/mobilenet_v2"), (3, 64, 64), ["features.16"]),
        (lambda: meta("torchvision/resnet18"), (3, 64, 64), ["layer2.1"]),
    ],
)
def test_a_replacement_saves_what_its_candidate_says(make, size, names):
    model = make()
    before = cost(model, size)
    found = {c.name: c for c in candidates(model, size, leaves=True)}
    for name in names:
        replace(model, name, found[name].groups[-1], input_size=size)
        after = cost(model, size)
        assert before.params - after.params == found[name].params, name
        assert before.macs - after.macs == found[name].macs, name
        undo(model)


def test_parameters_that_another_module_uses_are_not_saved():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Unit(8), Unit(8))
    model[2].conv.weight = model[1].conv.weight
    before = cost(model, SIZE).params
    found = {c.name: c.params for c in candidates(model, SIZE)}
    assert found == {"1": 16 - 16, "2": 16 - 16}
    assert cost(replace(model, "1", input_size=SIZE), SIZE).params == before - found["1"]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_model_of_tokens_has_no_candidate(name):
    model = meta(name)
    assert candidates(model) == []


# ------------------------------------------------------------------------------------------- naming places


@pytest.fixture(scope="module")
def v2() -> nn.Module:
    return timm.create_model("mobilenetv2_050")


@pytest.mark.parametrize(
    ("at", "names"),
    [
        ("14,17", ["blocks.4.2", "blocks.5.2"]),
        ([14, 17], ["blocks.4.2", "blocks.5.2"]),
        (["17", "14"], ["blocks.4.2", "blocks.5.2"]),
        (17, ["blocks.5.2"]),
        ("17:1", ["blocks.5.2"]),
        (1, ["conv_stem"]),
        (18, ["blocks.6.0"]),
        ("blocks.5.2, blocks.4.2", ["blocks.4.2", "blocks.5.2"]),
        ("blocks.5.*", ["blocks.5.0", "blocks.5.1", "blocks.5.2"]),
        ("*", ["conv_stem", "bn1", "blocks", "conv_head", "bn2", "global_pool", "classifier"]),
        ("blocks.6.**.conv", ["blocks.6.0.*.conv"]),
        ("conv_????", ["conv_stem", "conv_head"]),
    ],
)
def test_places_are_named_by_name_glob_or_number(v2, at, names):
    if at == "blocks.6.**.conv":
        with pytest.raises(UlsamError, match=r"no module is named 'blocks\.6\.\*\*\.conv'; nearest names: blocks\.6"):
            match(v2, at)
        return
    assert match(v2, at) == names


def test_two_stars_cross_dots_and_one_does_not():
    model = nn.Sequential(nn.Sequential(Unit(4), nn.Sequential(Unit(4))), Unit(4))
    assert match(model, "*.conv") == ["1.conv"]
    assert match(model, "**.conv") == ["0.0.conv", "0.1.0.conv", "1.conv"]
    assert match(model, "0.*") == ["0.0", "0.1"]


@pytest.mark.parametrize(
    ("model", "numbers"),
    [
        (
            "mobilenetv1_100",
            {1: "conv_stem", 2: "blocks.0.0", 6: "blocks.2.1", 7: "blocks.3.0", 12: "blocks.3.5", 14: "blocks.4.1"},
        ),
        ("mobilenetv2_050", {2: "blocks.0.0", 8: "blocks.3.0", 18: "blocks.6.0"}),
        ("torchvision/mobilenet_v2", {1: "features.0", 2: "features.1", 18: "features.17"}),
        ("resnet18", {}),
        ("mobilenetv3_small_100", {}),
        ("mobilenetv2_120d", {}),
        ("branchy", {}),
    ],
)
def test_layer_numbers_exist_for_v1_and_v2_alone(model, numbers):
    found = layer_names(meta(model))
    assert len(found) == (max(numbers) if numbers else 0)
    assert {n: found[n] for n in numbers} == numbers


def test_layer_numbers_outlive_edits(v2):
    model = meta("mobilenetv2_100")
    before = layer_names(model)
    insert(remove(replace(model, "14,17"), 16), "5:1,17")
    assert layer_names(model) == before


def test_layer_numbers_of_torchvisions_mobilenet_are_the_papers():
    model = meta("torchvision/mobilenet_v2")
    before = cost(model).macs
    assert before - cost(replace(model, "14,17")).macs == 38_114_944
    assert isinstance(model.features[13], ULSAM)
    assert isinstance(model.features[16], ULSAM)


# ------------------------------------------------------------------------------------------------ mistakes


MISTAKES = [
    (lambda n: replace(n, "stem", input_size=SIZE),
     r"^stem changes the shape from \[1, 3, 32, 32\] to \[1, 12, 16, 16\]; valid places near it: .*left"),
    (lambda n: replace(n, "left,nothing", input_size=SIZE), "no module is named 'nothing'"),
    (lambda n: replace(n, "lefft", input_size=SIZE), "no module is named 'lefft'; nearest names: left"),
    (lambda n: replace(n, "left", 5, input_size=SIZE), r"left: groups=5 does not divide 12 channels; valid: \[1, 2, 3"),
    (lambda n: replace(n, "left,right", 5, input_size=SIZE), "does not divide"),
    (lambda n: replace(n, "left", 0, input_size=SIZE), "does not divide"),
    (lambda n: replace(n, "left", form="papers", input_size=SIZE), "unknown form 'papers'"),
    (lambda n: replace(n, "twice", input_size=SIZE), "twice is used 2 times in one forward pass; valid places"),
    (lambda n: replace(n, "twice.conv", input_size=SIZE), r"twice\.conv is used 2 times .*; valid places .*conv"),
    (lambda n: insert(n, "twice", input_size=SIZE), "twice is used 2 times"),
    (lambda n: replace(n, "alias", input_size=SIZE), "alias is one module under two names"),
    (lambda n: replace(n, "same", input_size=SIZE), "same is one module under two names"),
    (lambda n: insert(n, "same.conv", input_size=SIZE), "same.conv is one module under two names"),
    (lambda n: replace(n, "gated", input_size=SIZE), "gated does not take exactly one tensor"),
    (lambda n: insert(n, "gated.split", input_size=SIZE), "gated.split does not output one tensor"),
    (lambda n: insert(n, "tokens", input_size=SIZE), r"tokens outputs tokens \[B, N, C\] = \[1, 256, 12\]"),
    (lambda n: insert(n, "last", input_size=(3, 64, 48)), r"last outputs \[1, 32, 24, 12\], channels in the last"),
    (lambda n: replace(n, "last", input_size=(3, 48, 48)), "last outputs .* channels in the last dimension"),
    (lambda n: insert(n, "head", input_size=SIZE), r"head outputs \[1, 5\]; an edit needs a feature map"),
    (lambda n: insert(n, "idle", input_size=SIZE), "idle is not called in a forward pass"),
    (lambda n: replace(n, "right,right.0", input_size=SIZE), "right.0 lies inside right: name only one of them"),
    (lambda n: remove(n, "**", input_size=SIZE), "lies inside"),
    (lambda n: remove(n, "stem.1", input_size=SIZE), "stem.1 has no parameters to save"),
    (lambda n: remove(n, "", input_size=SIZE), "no place named"),
    (lambda n: replace(n, [], input_size=SIZE), "no place named"),
    (lambda n: replace(n, "left,,right", input_size=SIZE), "no module is named ''"),
    (lambda n: replace(n, 14, input_size=SIZE), r"layer number 14: .*V1 and V2 alone; name modules of this Branchy"),
    (lambda n: replace(n, "14:1", input_size=SIZE), "14:1 means behind layer 14, an insertion; its replacement is 14"),
    (lambda n: replace(n, "left", input_size=(3, 0, 0)), r"input_size is C, H, W .* not \(3, 0, 0\)"),
    (lambda n: replace(n, "left", input_size=(4, 32, 32)), r"Branchy does not run on one image of \[4, 32, 32\]"),
    (lambda n: replace(n, "left", input_size=224), "input_size is C, H, W"),
    (undo, "this Branchy holds no edit to undo"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_a_mistake_is_named_and_leaves_the_model_as_it_was(mistake, message):
    model = Branchy()
    before = snapshot(model)
    with pytest.raises(UlsamError, match=message) as caught:
        mistake(model)
    assert "\n" not in str(caught.value)
    assert_as_before(model, before)


def test_v2_mistakes_name_what_would_be_valid(v2):
    before = snapshot(v2)
    for at, message in [
        (
            "18",
            r"^blocks\.6\.0 changes the shape from \[1, 80, 7, 7\] to \[1, 160, 7, 7\]; valid places .*blocks\.5\.2",
        ),
        ("19", "there is no layer 19; this model has layers 1 to 18"),
        ("17:2", "cannot read the layer number in '17:2'; write numbers with commas"),
        ("0", "there is no layer 0"),
    ]:
        with pytest.raises(UlsamError, match=message):
            replace(v2, at)
    with pytest.raises(UlsamError, match=r"blocks\.4\.2: groups=7 does not divide 48 channels; valid: \[1, 2, 3, 4, 6"):
        replace(v2, "17,14", 7)
    assert_as_before(v2, before)


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        (
            "vit_tiny_patch16_224",
            "blocks.3",
            r"blocks\.3 outputs tokens \[B, N, C\] = \[1, 197, 192\].* no valid place",
        ),
        ("swin_tiny_patch4_window7_224", "layers.1.blocks.0", r"outputs \[1, 28, 28, 192\], channels in the last"),
    ],
)
def test_token_and_channels_last_models_are_refused_by_name(name, at, message):
    model = meta(name)
    with pytest.raises(UlsamError, match=message):
        replace(model, at)
    if name.startswith("vit"):
        with pytest.raises(UlsamError, match=message.split(".*")[0]):
            insert(model, at)


def test_a_wide_image_does_not_make_a_map_look_like_channels_last():
    """16 channels and 16 rows: two equal dimensions in front, but these are channels and height."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Unit(16))
    assert [c.shape for c in candidates(model, (3, 16, 32))] == [(16, 16, 32)]
    insert(model, "1", input_size=(3, 16, 32))
    assert model[1].ulsam.channels == 16


@pytest.mark.parametrize("second", ["insert", "replace", "remove"])
@pytest.mark.parametrize("first", ["insert", "replace", "remove"])
def test_a_place_is_edited_once(first, second):
    edits = {"insert": insert, "replace": replace, "remove": remove}
    model = Branchy()
    edits[first](model, "right.1", input_size=SIZE)
    before = snapshot(model)
    if second == "insert" and first != "insert":
        edits[second](model, "right.1", input_size=SIZE)  # behind what stands there now
        assert isinstance(model.right[1].ulsam, ULSAM)
        return
    with pytest.raises(UlsamError, match=r"already|inserted behind it"):
        edits[second](model, "right.1", input_size=SIZE)
    if second != "insert":
        with pytest.raises(UlsamError, match="right holds an edit already"):
            edits[second](model, "right", input_size=SIZE)
    assert_as_before(model, before)


def test_the_parts_of_a_layer_are_no_places():
    model = replace(Branchy(), "left", input_size=SIZE)
    assert not any(c.name.startswith("left") for c in candidates(model, SIZE, leaves=True))
    with pytest.raises(UlsamError, match=r"left\.depthwise is part of an attention layer"):
        insert(model, "left.depthwise", input_size=SIZE)


class Walker(nn.Module):
    """Runs whatever its children are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Hoarder(nn.Module):
    """Calls a module past its name, and reads an attribute of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.kept = Unit(8)
        self.read = Unit(8)
        self.secret = [self.kept]

    def forward(self, x: Tensor) -> Tensor:
        x = self.secret[0](self.stem(x))
        return self.read(x) * self.read.norm.weight.mean()


class Picky(nn.Sequential):
    """Passes over what it does not know."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 1), Unit(8))

    def forward(self, x: Tensor) -> Tensor:
        for child in self:
            x = child(x) if isinstance(child, Unit | nn.Conv2d) else x
        return x


@pytest.mark.parametrize(
    ("make", "edit", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Walker()), lambda n: insert(n, "1", input_size=SIZE),
         r"cannot edit 1\.ulsam: the model would call it 2 times, not once"),
        (lambda: make_model("torchvision/densenet121"), lambda n: insert(n, "features.denseblock1", input_size=SIZE),
         r"cannot edit features\.denseblock1\.ulsam: afterwards DenseNet does not run"),
        (Hoarder, lambda n: replace(n, "kept", input_size=SIZE), "cannot edit kept: "),
        (Picky, lambda n: replace(n, "1", input_size=SIZE), "cannot edit 1: the model would call it 0 times"),
        (Hoarder, lambda n: remove(n, "read", input_size=SIZE), "cannot edit read: afterwards Hoarder does not run"),
    ],
)  # fmt: skip
def test_no_silent_failure_where_the_models_code_reaches_past_its_modules(make, edit, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(UlsamError, match=message):
        edit(model)
    assert_as_before(model, before)
