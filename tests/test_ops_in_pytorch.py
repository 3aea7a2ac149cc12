"""The operator as PyTorch uses it: compiled, exported, differentiated, transformed."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn

from operator_cases import FORMS, ISAS, OPERATOR, Case, compiled, laid_out, operands
from ulsam.base.errors import UlsamError
from ulsam.layer.ops import cpu, subspace_attention
from ulsam.layer.ulsam import ULSAM


@pytest.fixture(params=ISAS, ids=lambda isa: cpu.ISA_NAMES[isa])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    with cpu.instruction_set(request.param):
        yield int(request.param)


# as PyTorch uses it


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype, norms: bool) -> None:
    torch.library.opcheck(OPERATOR, (*operands(dtype, norms), 1e-5, ""))


@pytest.mark.parametrize("norms", [False, True])
def test_gradcheck(norms: bool) -> None:
    x, *vectors, gammas, groups, relu = operands(torch.float64, norms)
    leaves = [value.detach().double().requires_grad_() for value in (x, *vectors, *gammas)]

    def y(*given: Tensor) -> Tensor:
        return OPERATOR(*given[:5], list(given[5:]), groups, relu, 1e-3, "")[0]

    assert torch.autograd.gradcheck(y, leaves)


@pytest.mark.parametrize("form", ["equations", "released", "folded"])
def test_compile_holds_the_operator_and_export_pytorchs_own(form: str) -> None:
    layer = ULSAM(16, 4, form=form).eval()
    x = torch.randn(2, 16, 6, 5)
    with torch.no_grad():
        expected = layer(x)
        graphs: list[str] = []

        def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
            graphs.append(graph.code)
            return graph.forward

        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=keep)(x), expected)
        assert cpu.LIBRARY is None or "subspace_attention" in graphs[0]
        for strict in (False, True):
            program = torch.export.export(layer, (x,), strict=strict)
            torch.testing.assert_close(program.module()(x), expected)
            assert {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"} == {
                "aten"
            }


@compiled
def test_compile_trains_as_eager_does() -> None:
    results = []
    for wrap in (lambda layer: layer, lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        layer = ULSAM(16, 4, form="released")
        x = torch.randn(2, 16, 6, 5, requires_grad=True)
        wrap(layer)(x).square().sum().backward()
        results.append(
            [x.grad, layer.depthwise.weight.grad, layer.depthwise_norm.running_var, layer.pointwise_norm.bias.grad]
        )
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("form", ["equations", "released"])
def test_ddp_has_the_gradients_of_the_model_alone(form: str, tmp_path: Path) -> None:
    alone = nn.Sequential(nn.Conv2d(3, 8, 1), ULSAM(8, 2, form=form))
    model, steps = copy.deepcopy(alone), torch.randn(2, 2, 3, 5, 5)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        distributed = nn.parallel.DistributedDataParallel(model)
        for images in steps:  # parameters without a gradient would stop the second step
            distributed(images).square().sum().backward()
            alone(images).square().sum().backward()
    finally:
        dist.destroy_process_group()
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_input_as_it_is(dtype: torch.dtype) -> None:
    case = Case((2, 12, 5, 4), 3, "folded", "normal", "contiguous", dtype, 0)
    expected = case.run(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run(None)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@compiled
@pytest.mark.parametrize("form", FORMS)
def test_training_keeps_the_input_and_tiny_maps(form: str) -> None:
    case = Case((4, 96, 14, 14), 16, form, "relu", "channels_last", torch.float32, 0)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        case.run("cpu")
    assert sum(kept.values()) <= 1.25 * case.x.nbytes


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form: str) -> None:
    """A gradient penalty: every operand's gradient of the squared gradients, against float64."""

    def penalty(dtype: torch.dtype) -> list[Tensor]:
        case = Case((2, 12, 5, 4), 3, form, "normal", "contiguous", dtype, 0)
        folded = [value.to(dtype).requires_grad_() for value in (case.scale, case.weight, case.shift, case.bias)]
        gammas = [norm.to(dtype).requires_grad_() for norm in case.norms] if form == "batch statistics" else []
        x = case.x.requires_grad_()
        rest = {} if form == "equations" else {"shift": folded[2], "bias": folded[3], "relu": True, "norms": gammas}
        y, _ = subspace_attention(x, folded[0], folded[1], 3, eps=0.1, **rest)
        leaves = [x, *folded[: 2 if form == "equations" else 4], *gammas]
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    gradients, wanted = penalty(torch.float32), penalty(torch.float64)
    largest = max(exact.abs().max().item() for exact in wanted)  # some are 0, as a sum of such values
    for found, exact in zip(gradients, wanted, strict=True):
        assert (found - exact).abs().max() <= 1e-4 * max(1.0, exact.abs().max().item()) + 1e-6 * largest


@pytest.mark.parametrize("shape", [(1, 8, 0, 5), (2, 8, 5, 0), (0, 8, 5, 5)])
@pytest.mark.parametrize("form", ["equations", "released"])
def test_an_empty_map_stays_one(shape: tuple[int, ...], form: Any) -> None:
    for layout in ("contiguous", "channels_last"):
        x = laid_out(torch.randn(shape), layout).requires_grad_()
        y = ULSAM(8, 2, form=form).eval()(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        with torch.inference_mode():
            assert ULSAM(8, 2, form=form).eval()(x).shape == x.shape


def test_transforms_of_torch_func() -> None:
    layer, x = ULSAM(8, 4), torch.randn(2, 8, 5, 5)
    exact = copy.deepcopy(layer).double()
    tangent, wanted = (torch.func.jvp(f, (v,), (v,))[1] for f, v in ((layer, x), (exact, x.double())))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(tangent.double(), wanted, rtol=1e-5, atol=1e-5)
    parameters = dict(layer.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(layer, p, x).square().sum())(parameters)
    layer(x).square().sum().backward()
    torch.testing.assert_close(
        gradient, {name: value.grad for name, value in layer.named_parameters()}, rtol=1e-4, atol=1e-4
    )
    each = torch.func.vmap(layer)(x[:, None])
    torch.testing.assert_close(each[:, 0], layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 49, 8)}, r"looks like tokens \[B, N, C\]"),
        ({"groups": 3}, "groups=3 does not divide 8 channels"),
        ({"groups": 0}, "groups=0 does not divide 8 channels"),
        ({"scale": torch.ones(1)}, "an operand has 1 values on cpu, but the map needs 8 on cpu"),
        ({"weight": torch.ones(9)}, "an operand has 9 values on cpu, but the map needs 8 on cpu"),
        ({"bias": torch.ones(1)}, "an operand has 1 values on cpu, but the map needs 4 on cpu"),
        ({"scale": torch.ones(8, device="meta")}, "an operand has 8 values on meta, but the map needs 8 on cpu"),
        ({"norms": [torch.ones(8)] * 2}, "norms are the weight and bias of two BatchNorms, not 2 tensors"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(1, 8, 4, 4), "scale": torch.ones(8), "weight": torch.ones(8), "groups": 4, **change}
    with pytest.raises(UlsamError, match=message):
        subspace_attention(**given)


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("place", [(0, 0), (0, 2), (2, 2), (4, -1)])
@pytest.mark.parametrize("width", [5, 7, 14])
def test_infinity_times_zero_is_nan(width: int, place: tuple[int, int], layout: str, isa: int) -> None:
    case = Case((2, 40, 5, width), 8, "folded", "normal", layout, torch.float32, 0)
    case.scale[1] = 0.0
    case.x[0, 1, *place] = float("inf")
    found, exact = case.run("cpu")["y"], case.run("reference")["y"]
    assert exact.isnan().any()
    assert torch.equal(found.isnan(), exact.isnan())
