"""Reconstruction: it mends the layers behind an edit, towards the whole model's features, and leaves all else alone."""

import copy
import functools

import pytest
import timm
import torch
from torch import Tensor, nn

import ulsam
from ulsam.base.errors import UlsamError
from ulsam.surgery.places import match
from ulsam.surgery.reconstruct import Known, Scope, reconstruct


def images(number: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 96, 96, generator=generator) for _ in range(number)]


def trained(name: str = "mobilenetv2_035") -> nn.Module:
    """A model whose BatchNorm statistics are those of the images, as if it had been trained."""
    return copy.deepcopy(_trained(name))


@functools.cache
def _trained(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # some are 0 at first, and their blocks then add nothing
                module.weight.uniform_(0.5, 1.5)
        for batch in images() * 10:
            model(batch)
    return model.eval()


@torch.no_grad()
def features(model: nn.Module) -> Tensor:
    return torch.cat([model.forward_features(batch) for batch in images()])


@pytest.mark.parametrize("edit", ["remove", "replace"])
def test_the_next_kept_block_is_trained_and_nothing_else(edit: str) -> None:
    whole, model = trained(), trained()
    getattr(ulsam, edit)(model, "13,14,16,17", input_size=(3, 96, 96))
    before, wanted = copy.deepcopy(model.state_dict()), features(whole)
    damaged = float((features(model) - wanted).square().sum())
    found = reconstruct(model, images(), steps=60, rate=3e-3)
    assert [(entry.name, entry.edits) for entry in found] == [
        ("blocks.5.0", ("blocks.4.1", "blocks.4.2")),
        ("blocks.6.0", ("blocks.5.1", "blocks.5.2")),
    ]
    assert all(entry.after < 0.95 * entry.before for entry in found), found
    assert float((features(model) - wanted).square().sum()) < damaged
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    places = ("blocks.5.0.", "blocks.6.0.", "blocks.4.1.", "blocks.4.2.", "blocks.5.1.", "blocks.5.2.")
    assert changed and all(name.startswith(places) for name in changed), changed
    assert not any(module.training for module in model.modules())


def test_the_error_is_that_of_the_definition() -> None:
    whole, model = trained(), trained()
    ulsam.remove(model, "14", input_size=(3, 96, 96))
    (found,) = reconstruct(model, images(), steps=10)

    def behind(one: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = one.get_submodule(found.name).register_forward_hook(lambda *args: seen.append(args[2]))
        features(one)
        handle.remove()
        return torch.cat(seen)

    wanted = behind(whole)
    expected = float((behind(model) - wanted).square().sum() / wanted.square().sum())
    assert found.after == pytest.approx(expected, rel=1e-4)


def test_it_is_the_same_each_time_whatever_the_mode_and_moves_no_random_generator() -> None:
    models = [ulsam.replace(trained(), "14,17", width=4, input_size=(3, 96, 96)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].train()
    state = torch.get_rng_state()
    for model in models:
        reconstruct(model, images(), steps=10)
    assert torch.equal(state, torch.get_rng_state())
    assert models[1].training and models[1].blocks[5].training
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


@pytest.mark.slow
def test_what_two_edits_share_at_the_front_is_trained_once() -> None:
    known: Known = {}
    shared, fresh = [], []

    def edited(at: str) -> nn.Module:
        model = trained()
        torch.manual_seed(1)  # of the new layers
        return ulsam.replace(model, at, width=4, input_size=(3, 96, 96))

    for at in ("13,14,16", "13,14,17", "13,16", "13,14,16"):
        shared.append(edited(at))
        found = reconstruct(shared[-1], images(), steps=5, known=known)
        fresh.append(edited(at))
        assert reconstruct(fresh[-1], images(), steps=5) == found
        for name, value in fresh[-1].state_dict().items():
            assert torch.equal(value, shared[-1].state_dict()[name]), (at, name)
    assert len(known) == 5  # of eight segments: the first of 13,14 once, and all of the last edit are known


@pytest.mark.slow
def test_jointly_everything_behind_the_first_place_learns_the_last_map() -> None:
    whole, model = trained(), trained()
    ulsam.remove(model, "14,17", input_size=(3, 96, 96))
    before, wanted = copy.deepcopy(model.state_dict()), features(whole)
    (found,) = reconstruct(model, images(), scope="joint", steps=60)
    assert (found.name, found.edits) == ("bn2", ("blocks.4.2", "blocks.5.2"))
    assert found.after < 0.7 * found.before
    left = float((features(model) - wanted).square().sum() / wanted.square().sum())
    assert left == pytest.approx(found.after, rel=1e-3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"blocks", "conv_head", "bn2"}
    assert {name[:8] for name in changed if name.startswith("blocks")} == {"blocks.5", "blocks.6"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "mobilenetv1_100", "regnetx_002")),
        "mobilenetv3_small_050",
    ],
)
def test_other_families(name: str) -> None:
    model = trained(name)
    place = [c.name for c in ulsam.candidates(model, (3, 96, 96)) if c.name.count(".") == 2 or "layer" in c.name][-2]
    ulsam.remove(model, place, input_size=(3, 96, 96))
    batches = images(2)
    (found,) = reconstruct(model, batches, steps=40, rate=3e-3)
    assert found.edits == (place,) and found.after < found.before, found


@pytest.mark.parametrize(
    ("name", "edit", "trained_block"),
    [
        ("regnety_002", "s3.b4", "s4.b1"),  # a stage that is no Sequential
        ("convnext_atto", "stages.2.blocks.5", "stages.3.downsample"),
        pytest.param(
            "ghostnet_100", "blocks.8.1", "blocks.8.2", marks=pytest.mark.slow
        ),  # each of its blocks holds two modules of one class
    ],
)
def test_a_block_is_trained_and_not_the_stage_around_it(name: str, edit: str, trained_block: str) -> None:
    model = ulsam.remove(timm.create_model(name), edit, input_size=(3, 96, 96))
    (found,) = reconstruct(model, images(1), steps=1)
    assert found.name == trained_block


class Branches(nn.Module):
    """Two branches whose blocks are called in turn, and what joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.block(3)
        self.left, self.right = (nn.ModuleList([self.block(8) for _ in range(3)]) for _ in range(2))
        self.join = self.block(8)

    def block(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        left = right = self.stem(x)
        for ours, others in zip(self.left, self.right, strict=True):
            left, right = ours(left), others(right)
        joined: Tensor = self.join(left + right)
        return joined


@pytest.mark.parametrize(
    ("edits", "wanted"),
    [
        (["left.0"], [("left.1", ("left.0",))]),
        (["right.0", "left.1"], [("right.1", ("right.0",)), ("left.2", ("left.1",))]),
        (["left.1", "left.2"], [("join", ("left.1", "left.2"))]),
        (["left.2", "right.2"], [("join", ("left.2", "right.2"))]),
        (["left.1", "right.1", "left.2"], [("right.2", ("right.1",)), ("join", ("left.1", "left.2"))]),
    ],
)
def test_the_next_block_is_one_that_the_place_feeds(
    edits: list[str], wanted: list[tuple[str, tuple[str, ...]]]
) -> None:
    """And not the one that the model calls next, on another branch, where nothing is broken."""
    torch.manual_seed(0)
    model = Branches()
    batches = [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    for batch in batches * 10:
        model(batch)  # its statistics become those of the images
    ulsam.remove(model.eval(), ",".join(edits), input_size=(3, 16, 16))
    found = reconstruct(model, batches, steps=60, rate=1e-2)
    assert [(entry.name, entry.edits) for entry in found] == wanted
    assert all(entry.after < 0.9 * entry.before for entry in found), found


class Detour(nn.Module):
    """The second of two blocks is added to what they were given, so that it does not feed the last one directly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.join = (Branches.block(self, n) for n in (3, 8, 8, 8))  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        joined: Tensor = self.join(x + self.second(self.first(x)))
        return joined


@pytest.mark.parametrize(
    ("model_of", "edits", "name"),
    [(Detour, "first,second", "join"), (Branches, "left.1,left.2", "join")],
)
def test_parts_between_which_the_model_computes_are_not_trained_as_one(
    model_of: type[nn.Module], edits: str, name: str
) -> None:
    """What is said of the error is true of the model."""
    torch.manual_seed(0)
    model = model_of()
    batches = [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    for batch in batches * 10:
        model(batch)
    whole = copy.deepcopy(model.eval())
    ulsam.replace(model, edits, layer="se", input_size=(3, 16, 16))

    @torch.no_grad()
    def error() -> float:
        pairs = [(model(batch), whole(batch)) for batch in batches]
        return float(sum((x - y).square().sum() for x, y in pairs) / sum(y.square().sum() for _, y in pairs))

    before = error()
    (found,) = reconstruct(model, batches, steps=60, rate=1e-2)
    assert found.name == name
    assert (found.before, found.after) == (pytest.approx(before, rel=1e-3), pytest.approx(error(), rel=1e-3))
    assert found.after < 0.9 * before


@pytest.mark.parametrize(("edits", "frozen"), [("16,17", "blocks.6.0"), ("9,10", "blocks.4")])
def test_what_is_frozen_between_is_computed_between(edits: str, frozen: str) -> None:
    model = ulsam.replace(trained(), edits, input_size=(3, 96, 96))
    (found,) = reconstruct(model, images(), steps=20, rate=1e-3, freeze=frozen)
    assert found.after < found.before


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place, self.other, self.join = (nn.Conv2d(n, n, 3, padding=1) for n in (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        placed, other = self.place(x), self.other(x)
        x += placed
        joined: Tensor = self.join(x + other)
        return joined


class Keywords(InPlace):
    """A block that is called with a keyword takes no single map, and is passed over."""

    def forward(self, x: Tensor) -> Tensor:
        joined: Tensor = self.join(self.scaled(self.place(x), scale=2.0))
        return joined

    def scaled(self, x: Tensor, scale: float) -> Tensor:
        found: Tensor = self.other(input=x * scale)
        return found


@pytest.mark.parametrize("model_of", [InPlace, Keywords])
def test_a_block_that_takes_the_map_as_it_is_trained(model_of: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = ulsam.remove(model_of().eval(), "place", input_size=(3, 16, 16))
    (found,) = reconstruct(model, [torch.randn(8, 3, 16, 16)] * 2, steps=60, rate=1e-2)
    assert found.name == "join"
    assert found.after < 0.9 * found.before


@pytest.mark.parametrize(
    ("freeze", "name"),
    [
        ("blocks.5.0", "blocks.5.1"),  # the next block that may change is trained
        ("blocks.5.0.conv_pw,blocks.5.0.bn1", "blocks.5.0"),  # a part of it
        ("blocks.5", "blocks.6.0"),
        ("blocks.5,blocks.6,conv_head", "blocks.4.2"),  # the new layer alone
        ("blocks.*,conv_head", None),
    ],
)
@pytest.mark.parametrize("scope", ["block", pytest.param("joint", marks=pytest.mark.slow)])
def test_what_is_frozen_stays_as_it_is(freeze: str, name: str | None, scope: Scope) -> None:
    model = ulsam.replace(trained(), "14", input_size=(3, 96, 96))
    before = copy.deepcopy(model.state_dict())
    found = reconstruct(model, images(), steps=20, rate=3e-3, freeze=freeze, scope=scope)
    if scope == "block":
        assert [entry.name for entry in found] == ([name] if name else [])
    frozen = tuple(f"{one}." for one in match(model, freeze))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith(frozen) for key in changed), changed
    assert bool(changed) == any(entry.after < entry.before for entry in found)


def test_a_block_with_nothing_behind_it_is_left_and_new_layers_there_are_trained() -> None:
    def body() -> nn.Sequential:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        return nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    assert reconstruct(ulsam.remove(body(), "1", input_size=(3, 9, 9)), images()) == []
    (found,) = reconstruct(ulsam.replace(body(), "1", input_size=(3, 9, 9)), images(), steps=20)
    assert (found.name, found.edits) == ("1", ("1",)) and found.after <= found.before


@pytest.mark.parametrize("scope", ["block", pytest.param("joint", marks=pytest.mark.slow)])
def test_undo_gives_the_kept_blocks_their_weights_of_before(scope: Scope) -> None:
    model = ulsam.remove(trained(), "13,14,17", input_size=(3, 96, 96))
    for steps in (5, 3):  # twice, and the second time towards the whole model too
        found = reconstruct(model, images(), scope=scope, steps=steps, rate=3e-3)
        assert all(entry.after < entry.before for entry in found), found
    moved = copy.deepcopy(model).double()
    for one, dtype in ((model, torch.float32), (moved, torch.float64)):
        undone, whole = ulsam.undo(one).state_dict(), trained().state_dict()
        assert undone.keys() == whole.keys()
        assert all(
            torch.equal(value, whole[name].to(dtype if value.is_floating_point() else value.dtype))
            for name, value in undone.items()
        )


def test_a_second_reconstruction_aims_at_the_whole_model() -> None:
    once, twice = (ulsam.remove(trained(), "14", input_size=(3, 96, 96)) for _ in range(2))
    (first,) = reconstruct(once, images(), steps=20)
    reconstruct(twice, images(), steps=10)
    (second,) = reconstruct(twice, images(), steps=10)
    assert 0.5 * first.after < second.before < first.before


def test_undo_keeps_what_was_trained_since_and_says_so() -> None:
    model = ulsam.remove(trained(), "14,17", input_size=(3, 96, 96))
    reconstruct(model, images(), steps=5, rate=3e-3)
    with torch.no_grad():
        model.blocks[5][0].conv_pw.weight.mul_(1.01)
    tuned = copy.deepcopy(model.blocks[5][0].state_dict())
    with pytest.warns(
        UserWarning, match=r"^blocks\.5\.0: reconstructed for the edit and trained since, so not as before"
    ):
        ulsam.undo(model)
    assert all(torch.equal(value, tuned[name]) for name, value in model.blocks[5][0].state_dict().items())
    whole = trained().blocks[6].state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in model.blocks[6].state_dict().items())


def test_nothing_to_reconstruct() -> None:
    model = trained()
    assert reconstruct(model, images()) == []
    assert reconstruct(ulsam.insert(model, "17", input_size=(3, 96, 96)), images()) == []


def test_what_cannot_be_reconstructed_says_why() -> None:
    model = ulsam.remove(trained(), "14", input_size=(3, 96, 96))
    with pytest.raises(UlsamError, match="no images"):
        reconstruct(model, [])
    with pytest.raises(UlsamError, match="unknown scope 'all'; valid: block, joint"):
        reconstruct(model, images(), scope="all")  # type: ignore[arg-type]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UlsamError, match="diverged"):
        reconstruct(model, images(), steps=5, rate=1e30)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.conv_stem.weight.fill_(float("nan"))
    with pytest.raises(UlsamError, match=r"NaN or infinity at blocks\.5\.0"):
        reconstruct(model, images())
