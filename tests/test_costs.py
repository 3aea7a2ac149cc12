"""Counts against numbers made by hand, against PyTorch's own counter on the running model, and against the paper."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.surgery.cost import cost
from ulsam.surgery.edit import insert, replace
from ulsam.surgery.trace import default_input_size


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


class SelfAttention(nn.Module):
    """Two matrix products of N x N x C, on tokens of N = H * W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).mT).chunk(3, dim=-1)
        return ((q @ k.mT).softmax(-1) @ v).mT.view_as(x)


class Product(SelfAttention):
    """The same through PyTorch's fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).mT).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v).mT.view_as(x)


@pytest.mark.parametrize(
    ("layer", "size", "params", "macs", "activations"),
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 10, 14), 8 * 27 + 8, 8 * 27 * 5 * 7, 8 * 5 * 7),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (8, 6, 6), 8 * 9, 8 * 9 * 36, 8 * 36),
        (nn.Conv2d(8, 12, 1, groups=4), (8, 5, 5), 12 * 2 + 12, 12 * 2 * 25, 12 * 25),
        (nn.Conv2d(4, 6, 3, dilation=2), (4, 9, 9), 6 * 36 + 6, 6 * 36 * 25, 6 * 25),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 3, 3), 4 * 6 * 4 + 6, 4 * 6 * 4 * 9, 6 * 36),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), (3, 4, 4), 490, 480, 10),
        (nn.BatchNorm2d(5), (5, 4, 4), 10, 0, 0),
        (SelfAttention(6), (6, 4, 2), 6 * 18 + 18, 8 * 6 * 18 + 2 * 8 * 8 * 6, 8 * 18 + 64 + 48),
        (ULSAM(512, 4), (512, 14, 14), 1024, 200_704, (512 + 4) * 196),
        (ULSAM(512, 16), (512, 14, 14), 1024, 200_704, (512 + 16) * 196),
        (ULSAM(32, 4, form="released"), (32, 7, 7), 5 * 32 + 3 * 4, 2 * 32 * 49, 36 * 49),
    ],
)
def test_counts_made_by_hand(layer, size, params, macs, activations):
    found = cost(layer, size)
    assert (found.params, found.macs, found.activations) == (params, macs, activations)
    assert found.input_size == size


def test_the_fused_attention_operator_costs_its_two_products():
    assert cost(Product(6), (6, 4, 2)).macs == cost(SelfAttention(6), (6, 4, 2)).macs


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("mobilenetv1_100", 4_231_976, 568_740_352),
        ("mobilenetv2_100", 3_504_872, 300_774_272),
        ("resnet18", 11_689_512, 1_814_073_344),
    ],
)
def test_known_models(name, params, macs):
    found = cost(meta(name))
    assert (found.params, found.macs) == (params, macs)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mobilenetv1_100", 64),
        ("mobilenetv2_100", 64),
        ("mobilenetv3_small_100", 64),
        ("ecaresnet26t", 64),
        ("efficientnet_lite0", 64),
        ("ghostnet_100", 64),
        ("mobilevit_xxs", 64),
        ("vit_tiny_patch16_224", 224),
    ],
)
def test_torchs_counter_on_the_running_model_agrees(name, size):
    model = timm.create_model(name).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, 3, size, size))
    found = cost(model, (3, size, size))
    assert found.macs * 2 == counter.get_total_flops()
    assert found.params == sum(p.numel() for p in model.parameters())
    assert_rows_add_up(found)


def assert_rows_add_up(found: object) -> None:
    for key in ("params", "macs", "activations"):
        assert sum(getattr(row, key) for row in found.rows) == getattr(found, key), key
    assert len({row.name for row in found.rows}) == len(found.rows)


def test_rows_are_the_blocks_of_the_model():
    found = cost(meta("mobilenetv2_100"))
    names = [row.name for row in found.rows]
    assert names[:3] == ["conv_stem", "bn1", "blocks.0.0"]
    assert names[-3:] == ["conv_head", "bn2", "classifier"]
    assert len(names) == 1 + 1 + 17 + 3
    row = next(row for row in found.rows if row.name == "blocks.5.2")
    expanded = 960 * 160 + 960 * 9 + 960 * 160
    assert (row.type, row.output_shape) == ("InvertedResidual", (1, 160, 7, 7))
    assert (row.params, row.macs) == (expanded + 2 * (960 + 960 + 160), expanded * 49)
    assert row.activations == (960 + 960 + 160) * 49


def test_inserted_and_replaced_layers_have_rows_of_their_own():
    base = cost(meta("mobilenetv2_100"))
    model = insert(meta("mobilenetv2_100"), "17:1,blocks.2.1.bn2", 4)
    replace(model, "14", 8)
    insert(model, "14:1", 8)
    found = cost(model)
    rows = {row.name: row for row in found.rows}
    assert (rows["blocks.5.2.ulsam"].type, rows["blocks.5.2.ulsam"].params) == ("ULSAM", 320)
    assert rows["blocks.5.2.ulsam"].macs == 320 * 49
    assert rows["blocks.2.1.bn2.ulsam"].params == 2 * 192
    assert (rows["blocks.4.2"].type, rows["blocks.4.2"].params, rows["blocks.4.2"].macs) == ("ULSAM", 192, 192 * 196)
    assert rows["blocks.4.2.ulsam"].params == 192
    old = {row.name: row for row in base.rows}
    for name in ["blocks.5.2", "blocks.2.1", "classifier"]:
        assert rows[name] == old[name]
    assert found.params == base.params + 320 + 384 + 192 + 192 - old["blocks.4.2"].params
    assert_rows_add_up(found)


class Shared(nn.Module):
    """One module in two containers and in a block, one weight in two modules, and work outside any block."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.first = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False))
        self.second = nn.Sequential(self.first[0], nn.Conv2d(4, 4, 1, bias=False))
        self.third = nn.Conv2d(4, 4, 1, bias=False)
        self.third.weight = self.second[1].weight
        self.block = nn.Sequential(Holder(self.third))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.third(self.second(self.first(x))))
        return torch.einsum("bchw,cd->bdhw", x, self.scale)


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_what_is_shared_is_counted_once_and_what_runs_twice_twice():
    found = cost(Shared(), (4, 5, 5))
    assert found.params == 16 + 16 + 16 == sum(p.numel() for p in Shared().parameters())
    assert found.macs == (2 + 1 + 2 + 1) * 16 * 25
    assert_rows_add_up(found)
    rows = {row.name: row for row in found.rows}
    assert rows["second.0"].macs == 2 * 16 * 25  # one row holds both runs
    assert "first.0" not in rows
    assert (rows[""].type, rows[""].params, rows[""].macs) == ("Shared", 16, 16 * 25)


def test_the_papers_rule_leaves_out_batchnorm_and_nothing_else():
    model = meta("mobilenetv2_100")
    norms = sum(
        p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)
    )
    exact, paper = cost(model), cost(model, rule="paper")
    assert norms > 0
    assert paper.params == exact.params - norms
    assert (paper.macs, paper.activations) == (exact.macs, exact.activations)
    assert_rows_add_up(paper)
    assert cost(ULSAM(8, 2, form="released"), (8, 4, 4), rule="paper").params == 2 * 8 + 8 + 2


def test_the_model_is_neither_run_nor_changed():
    model = timm.create_model("mobilenetv2_050").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    random = torch.get_rng_state()
    cost(model, (3, 64, 64))
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(parameter.device.type == "cpu" and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())  # statistics too
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


@pytest.mark.parametrize("change", ["half", "double", "channels_last", "eval", "frozen", "meta"])
def test_the_count_does_not_depend_on_the_models_state(change):
    model = timm.create_model("mobilenetv2_050")
    before = cost(model, (3, 64, 64))
    if change == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif change == "frozen":
        model.requires_grad_(False)
    elif change == "meta":
        model.to("meta")
    else:
        getattr(model, change)()
    assert cost(model, (3, 64, 64)) == before


def test_the_size_comes_from_timm_or_the_first_convolution():
    assert default_input_size(meta("mobilenetv2_100")) == (3, 224, 224)
    assert cost(meta("efficientnet_b1")).input_size == (3, 240, 240)
    assert cost(timm.create_model("mobilenetv2_050", in_chans=1)).input_size == (1, 224, 224)
    model = timm.create_model("mobilenetv2_050")
    small, large = cost(model, (3, 64, 64)), cost(model, (3, 128, 128))
    assert small.params == large.params
    assert large.macs - model.classifier.weight.numel() == 4 * (small.macs - model.classifier.weight.numel())


def test_the_table_says_what_was_counted_and_how():
    found = cost(insert(meta("mobilenetv2_100"), "17:1"), rule="paper")
    lines = str(found).splitlines()
    assert lines[0].split() == ["block", "type", "output", "params", "MACs", "activations"]
    assert any(line.split()[:5] == ["blocks.5.2.ulsam", "ULSAM", "160x7x7", "320", "15,680"] for line in lines)
    assert lines[-2].split()[:3] == ["total", f"{found.params:,}", f"{found.macs:,}"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "One 3x224x224 image" in lines[-1]
    assert "all parameters but BatchNorm's" in lines[-1]
    assert "which the paper calls FLOPs" in lines[-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: cost(model, rule="papers"), "unknown counting rule 'papers'; valid: exact, paper"),
        (lambda model: cost(model, 224), "input_size is C, H, W of one image, three whole numbers, not 224"),
        (lambda model: cost(model, (224, 224)), "three whole numbers"),
        (lambda model: cost(model, (3, 0, 32)), "three whole numbers"),
        (lambda model: cost(model, (3, 32.5, 32)), "three whole numbers"),
        (lambda model: cost(model, (1, 32, 32)), r"Sequential does not run on one image of \[1, 32, 32\] \(C, H, W\)"),
        (lambda model: cost(model, (3, 2, 2)), "does not run on one image"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UlsamError, match=message) as caught:
        call(nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert "\n" not in str(caught.value)
