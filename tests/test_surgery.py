"""Edits and their undoing: what an edited model computes, and that it comes back as it was."""

import copy
import io
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from seeded_models import seeded
from surgery_models import SIZE, Branchy, Unit, assert_as_before, make_model, snapshot
from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.surgery.edit import insert, remove, replace, undo
from ulsam.surgery.find import candidates


def image(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


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
    base = seeded(make_model(model), variance=1.0)
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
    base = seeded(Branchy(), variance=1.0)
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
    return seeded(model, variance=1.0)


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
    model = seeded(Branchy(), variance=1.0)
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
    model = seeded(Branchy(), variance=1.0)
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
    model = seeded(Branchy(), variance=1.0)
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
