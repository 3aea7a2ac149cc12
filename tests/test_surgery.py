"""Surgery on hand-written, timm and torchvision models: where edits fit, what they keep, and what is refused."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.surgery.cost import cost
from ulsam.surgery.edit import insert, remove, replace, undo
from ulsam.surgery.find import candidates
from ulsam.surgery.places import layer_names, match

SIZE = (3, 32, 32)


class Unit(nn.Module):
    """A shape-keeping block with parameters and BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Gated(nn.Module):
    """A block that takes a keyword, and one that gives a tuple."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.split = Two(channels)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        left, right = self.split(x)
        return self.conv(x) * scale + left * right


class Two(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


class Tokens(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


class Cbam(nn.Module):
    """Channel and spatial attention, as CBAM orders them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, channels, 1)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True)))
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(pooled))


class Branchy(nn.Module):
    """Branches outside any Sequential, a module used twice, one under two names, tokens, NHWC, plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU())
        self.left = Unit(12)
        self.right = nn.Sequential(Unit(12), Unit(12))
        self.twice = Unit(12)
        self.alias = Unit(12)
        self.same = self.alias
        self.gated = Gated(12)
        self.attention = Cbam(12)
        self.tokens = Tokens(12)
        self.last = Tokens(12)
        self.idle = Unit(12)
        self.head = nn.Linear(12, 5)
        self.shift = torch.full((1, 12, 1, 1), 0.25)  # neither parameter nor buffer
        self.table = {"scales": [torch.ones(12, 1, 1)]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.shift
        x = self.left(x) + self.right(x) * self.table["scales"][0]
        x = self.twice(self.twice(x))
        x = self.gated(self.alias(x), scale=0.5)
        x = self.attention(x)
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.tokens(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])
        return self.head(x.mean((2, 3)))


def snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, Tensor], dict[str, bool], int]:
    """Module identities, weights, modes and the number of hooks."""
    modules = {name: id(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    return modules, state, modes, sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_as_before(model: nn.Module, before: tuple[dict[str, int], dict[str, Tensor], dict[str, bool], int]) -> None:
    after = snapshot(model)
    assert list(after[0].items()) == list(before[0].items())
    assert list(after[1]) == list(before[1])
    assert all(torch.equal(value, before[1][name]) for name, value in after[1].items())
    assert after[2:] == before[2:]


def seeded(model: nn.Module) -> nn.Module:
    """Every parameter and statistic away from its initial value, so that the order of layers shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise / value[0].numel() ** 0.5)
            elif value.is_floating_point():
                value.copy_(noise * 0.1 + (0 if name.endswith(("bias", "running_mean")) else 1))
    return model.eval()


def image(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def make_model(name: str) -> nn.Module:
    if name == "branchy":
        return Branchy()
    source, _, leaf = name.rpartition("/")
    return getattr(torchvision.models, leaf)() if source else timm.create_model(leaf)


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


# ----------------------------------------------------------------------------------------------- insertion


def expected(model: nn.Module, name: str, layer: ULSAM, x: Tensor) -> Tensor:
    """The model's output with the layer put behind its place by hand: a hook that calls it."""
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, out: layer(out))
    with torch.no_grad():
        y = model(x)
    hook.remove()
    return y


PLACES = [
    ("mobilenetv1_100", "11:1", "blocks.3.4"),
    ("mobilenetv2_050", "17:1", "blocks.5.2"),
    ("mobilenetv2_050", "blocks.3.1", "blocks.3.1"),  # mid-stage
    ("mobilenetv2_050", "blocks.3", "blocks.3.3"),  # stage end, parent a Sequential
    ("mobilenetv2_050", "conv_stem", "bn1"),  # the two are one to whatever fuses them  # the root's attribute
    ("mobilenetv2_050", "blocks.2.1.bn2", "blocks.2.1.bn2"),  # outside Sequential parents
    ("mobilenetv3_small_100", "blocks.2.1.se", "blocks.2.1.se"),
    ("ecaresnet26t", "layer2.1.se", "layer2.1.se"),
    ("resnet18", "layer2", "layer2.1"),
    ("resnet18", "maxpool", "maxpool"),
    ("torchvision/mobilenet_v2", "17:1", "features.16"),
    ("torchvision/resnet18", "layer4.1.bn1", "layer4.1.bn1"),
    ("branchy", "left", "left"),
    ("branchy", "right", "right.1"),
    ("branchy", "gated", "gated"),
    ("branchy", "attention", "attention"),
]


@pytest.mark.parametrize(("model", "after", "host"), PLACES)
def test_an_inserted_layer_keeps_every_name_and_runs_at_its_place(model, after, host):
    base = seeded(make_model(model))
    fresh = insert(make_model(model), after, 2, input_size=(3, 64, 64)).eval()
    layer = fresh.get_submodule(f"{host}.ulsam")
    assert isinstance(layer, ULSAM)
    new = {f"{host}.ulsam.depthwise.weight", f"{host}.ulsam.pointwise.weight"}
    assert set(fresh.state_dict()) == set(base.state_dict()) | new
    assert [n for n, _ in fresh.named_parameters() if n not in new] == [n for n, _ in base.named_parameters()]
    missing, unexpected = fresh.load_state_dict(base.state_dict(), strict=False)
    assert (set(missing), unexpected) == (new, [])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3)).mul_(5)
        x = image(48)
        y = fresh(x)
        assert not torch.equal(y, base(x))
    assert torch.equal(y, expected(base, host, layer, x))


def test_a_replaced_block_is_the_layer_and_a_dropped_one_the_identity():
    base = seeded(Branchy())
    x = image()
    for edit, stands in [(replace, None), (remove, nn.Identity())]:
        model = edit(copy.deepcopy(base), "left", input_size=SIZE)
        manual = copy.deepcopy(base)
        manual.left = stands or model.left
        with torch.no_grad():
            torch.testing.assert_close(model(x), manual(x), rtol=0, atol=0)
        untouched = {k: v for k, v in base.state_dict().items() if not k.startswith("left.")}
        assert all(torch.equal(model.state_dict()[k], v) for k, v in untouched.items())
        assert not any(k.startswith("left.") for k in model.state_dict() if k not in untouched) or edit is replace


@pytest.mark.parametrize("edit", [replace, remove])
def test_a_sequential_stays_a_sequential(edit):
    """timm's gradient checkpointing walks the blocks of a stage."""
    model = edit(timm.create_model("resnet18"), "layer1", input_size=(3, 64, 64))
    assert isinstance(model.layer1, nn.Sequential)
    assert len(model.layer1) == 1
    model.set_grad_checkpointing()
    model.train()(image(64)).sum().backward()
    assert model.conv1.weight.grad is not None


def test_gradient_checkpointing_calls_an_inserted_layer():
    base = timm.create_model("mobilenetv2_100", num_classes=3)
    model = insert(base, "3:1,17:1", 4, input_size=(3, 64, 64)).train()
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing()
    x = image(64)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, msg=name)
    assert model.blocks[5][2].ulsam.depthwise.weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def inserted() -> nn.Module:
    model = insert(timm.create_model("mobilenetv3_small_050", num_classes=4), "conv_stem,blocks.1,blocks.3.0.se", 4)
    return seeded(model)


def test_an_inserted_model_survives_copy_pickle_and_save(inserted):
    x = image(48)
    y = inserted(x)
    torch.testing.assert_close(copy.deepcopy(inserted)(x), y, rtol=0, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(inserted))(x), y, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(inserted.state_dict(), file)
    fresh = timm.create_model("mobilenetv3_small_050", num_classes=4)
    insert(fresh, "conv_stem,blocks.1,blocks.3.0.se", 4)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(fresh.eval()(x), y, rtol=0, atol=0)
    double = copy.deepcopy(inserted).double()
    assert double(x.double()).dtype == torch.float64
    torch.testing.assert_close(double(x.double()), y.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow  # as the presets' tests do, which are not
def test_an_inserted_model_exports_and_compiles(inserted):
    x = image(48)
    y = inserted(x)
    exported = torch.export.export(inserted, (x,)).module()
    torch.testing.assert_close(exported(x), y)
    compiled = torch.compile(inserted, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize("edit", [insert, replace, remove])
def test_dtype_device_and_mode_follow_the_place(edit):
    model = Branchy().train()
    model.right.eval()
    model.right.double()
    edit(model, "left,right.0", input_size=SIZE) if edit is remove else edit(model, "left,right.0", 2, input_size=SIZE)
    place = {"left": model.left, "right": model.right[0]}
    if edit is insert:
        place = {name: module.ulsam for name, module in place.items()}
    assert place["left"].training
    assert not any(module.training for module in place["right"].modules())
    if edit is not remove:
        assert place["left"].pointwise.weight.dtype == torch.float32
        assert place["right"].pointwise.weight.dtype == torch.float64
    with torch.device("meta"):
        far = Branchy()
    edit(far, "left", input_size=SIZE)
    assert all(p.device.type == "meta" for p in far.parameters())


def test_a_parameterless_place_takes_the_models_dtype():
    model = insert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()).half(), "1", input_size=SIZE)
    assert model[1].ulsam.depthwise.weight.dtype == torch.float16


# ------------------------------------------------------------------------------------------------- removal


def test_remove_undoes_any_mix_of_edits():
    model = seeded(Branchy())
    before = snapshot(model)
    x = image()
    with torch.no_grad():
        y = model(x)
    insert(model, "stem,right,attention", 4, input_size=SIZE)
    replace(model, "left", 2, form="released", input_size=SIZE)
    insert(model, "left", 2, input_size=SIZE)
    remove(model, "right.0", input_size=SIZE)
    assert not torch.equal(model(x), y)
    assert undo(model) is model
    assert_as_before(model, before)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    with pytest.raises(UlsamError, match="holds no edit"):
        undo(model)


def test_remove_undoes_a_replaced_stage_with_a_layer_behind_it():
    model = timm.create_model("resnet18")
    before = snapshot(model)
    insert(replace(model, "layer1", input_size=(3, 64, 64)), "layer1", input_size=(3, 64, 64))
    assert isinstance(model.layer1[0].ulsam, ULSAM)
    assert_as_before(undo(model), before)


def test_what_comes_back_follows_the_models_dtype_mode_and_copies():
    model = seeded(Branchy())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    remove(replace(insert(model, "right", input_size=SIZE), "left", input_size=SIZE), "attention", input_size=SIZE)
    other = copy.deepcopy(model)
    model.to(torch.float64).train()
    undo(model)
    assert all(module.training for module in model.modules())
    assert {name: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()} == {
        name: torch.float64 for name, value in state.items() if value.is_floating_point()
    }
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in model.state_dict().items())
    assert any(module.training for module in model.modules())

    undo(other)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert other.left is not model.left
    assert not any(module.training for module in other.modules())
    assert not any(module._forward_hooks for module in other.modules())


def test_a_frozen_part_of_a_replaced_block_stays_frozen():
    model = Branchy().train()
    model.left.norm.eval()
    model.left.conv.weight.requires_grad_(False)
    undo(replace(model, "left", input_size=SIZE))
    assert model.left.training
    assert not model.left.norm.training
    assert not model.left.conv.weight.requires_grad


def test_remove_spares_a_layer_that_the_models_code_holds_and_hooks_of_others():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ULSAM(8), Unit(8))
    seen = []
    model[2].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    own = model[1]
    insert(model, "2", input_size=SIZE)
    undo(model)
    assert model[1] is own
    seen.clear()
    model(image())
    assert len(seen) == 1


class Fork(nn.Module):
    """Two arms, summed."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def trees(depth: int) -> st.SearchStrategy[object]:
    leaf = st.sampled_from(["unit", "conv", "relu"])
    branch = st.deferred(lambda: trees(depth - 1)) if depth else leaf
    return st.one_of(leaf, st.lists(branch, min_size=1, max_size=3), st.tuples(branch, branch))


def grow(tree: object) -> nn.Module:
    if isinstance(tree, list):
        return nn.Sequential(*map(grow, tree))
    if isinstance(tree, tuple):
        return Fork(grow(tree[0]), grow(tree[1]))
    return {"unit": lambda: Unit(6), "conv": lambda: nn.Conv2d(6, 6, 1), "relu": nn.ReLU}[str(tree)]()


@settings(max_examples=25, deadline=None)
@given(tree=trees(2), data=st.data())
def test_any_edits_of_any_model_are_undone(tree, data):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), grow(tree), nn.Conv2d(6, 2, 1)).eval()
    before = snapshot(model)
    x = image(9, batch=1)
    with torch.no_grad():
        y = model(x)
    size = (3, 9, 9)
    places = sorted(name for name, _ in model.named_modules() if name)
    for kind in data.draw(st.lists(st.sampled_from([insert, replace, remove]), min_size=1, max_size=4)):
        if kind is not insert:
            places = [c.name for c in candidates(model, size, leaves=True)]
        if not places:
            continue
        place = data.draw(st.sampled_from(places))
        try:
            kind(model, place, input_size=size) if kind is remove else kind(model, place, 2, input_size=size)
        except UlsamError as error:  # only a second layer at one place, or inside a layer, is refused
            assert kind is insert and ("already" in str(error) or "no module is named" in str(error)), error
        places = sorted(name for name, module in model.named_modules() if name and "." not in name)
    if any(isinstance(module, ULSAM | nn.Identity) for module in model.modules()):
        with torch.no_grad():
            assert model(x).shape == y.shape
        undo(model)
    assert_as_before(model, before)
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_a_hook_that_was_there_sees_the_output_of_the_new_layer():
    """timm takes intermediate features by such hooks."""
    model = seeded(Branchy())
    seen: list[Tensor] = []
    model.left.register_forward_hook(lambda module, args, out: seen.append(out))
    insert(model, "left", 2, input_size=SIZE)
    seen.clear()
    layer_in: list[Tensor] = []
    model.left.ulsam.register_forward_pre_hook(lambda module, args: layer_in.append(args[0]))
    model(image())
    assert torch.equal(seen[0], model.left.ulsam(layer_in[0]))
    assert not torch.equal(seen[0], layer_in[0])


class Grid(nn.Module):
    """Makes tensors of its own while it runs, without asking where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.linspace(0, 1, x.shape[2])
        return self.conv(x) + rows[:, None] + torch.zeros(x.shape[1:])


def test_a_model_that_makes_tensors_of_its_own_is_edited_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Grid(), nn.Conv2d(4, 4, 1))
    assert [c.name for c in candidates(model, SIZE, leaves=True)] == ["1", "1.conv", "2"]
    assert insert(model, "1", input_size=SIZE)(image()).shape == (2, 4, 32, 32)


def test_a_model_that_cannot_be_copied_is_refused_in_one_line():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.lines = (line for line in "ab")
    with pytest.raises(UlsamError, match=r"Sequential does not run on one image .* cannot pickle") as caught:
        candidates(model, SIZE)
    assert "\n" not in str(caught.value)
