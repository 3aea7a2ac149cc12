"""The operator: every backend against the definition in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.fx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from operator_cases import FORMS, ISAS, OPERATOR, UNUSUAL, Case, check, compiled, laid_out
from ulsam.base.errors import UlsamError
from ulsam.layer.ops import cpu, subspace_attention
from ulsam.layer.ulsam import ULSAM


@pytest.fixture(params=ISAS, ids=lambda isa: cpu.ISA_NAMES[isa])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    with cpu.instruction_set(request.param):
        yield int(request.param)


#: Of a row: one that fills less than a vector of 8 or 16, one that fills it, and one that takes two.
WIDTHS = [5, 7, 8, 14, 16, 27]

shapes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 9),
    st.one_of(st.integers(1, 9), st.integers(13, 17)),
    st.sampled_from([1, 2, 4, 8, 17, 29, 40, 90]),
)


@compiled
@settings(max_examples=150, deadline=None)
@given(
    shapes,
    st.sampled_from(FORMS + UNUSUAL),
    st.sampled_from(["normal", "relu", "quantized", "equal"]),
    st.sampled_from(["contiguous", "channels_last", "slice", "transposed", "expanded"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(ISAS),
    st.integers(0, 10**6),
)
def test_equals_the_definition_in_float64(
    sizes: tuple[int, ...], form: str, kind: str, layout: str, dtype: torch.dtype, isa: int, seed: int
) -> None:
    batch, groups, height, width, size = sizes
    spread = batch * height * width >= 8 and kind != "equal"
    assume(spread or not form.startswith("batch statistics"))
    case = Case((batch, groups * size, height, width), groups, form, kind, layout, dtype, seed)
    with cpu.instruction_set(isa):
        found = case.run("cpu")
    exact = case.run("reference", torch.float64)
    if form.startswith("batch statistics"):  # of equal values PyTorch's own float32 gradients are as far off
        _, variances, _, logit_variances = exact["moments"].split([groups * size, groups * size, groups, groups])
        assume(min(variances.min(), logit_variances.min()) >= 0.01)
    check(found, exact, case, dtype)


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 96, 14, 14), 4),
        ((2, 96, 14, 14), 16),
        ((1, 320, 7, 7), 16),
        ((2, 320, 7, 7), 4),
        ((1, 87, 5, 3), 3),
        ((5, 40, 2, 3), 40),
        ((1, 8, 112, 112), 2),
        ((2, 2048, 1, 1), 4),
    ],
)
def test_equals_the_definition_at_real_sizes(
    shape: tuple[int, ...], groups: int, form: str, layout: str, isa: int
) -> None:
    if form == "batch statistics" and shape[2:] == (1, 1):
        pytest.skip("two values a channel: their variance is 0 or all that there is")
    case = Case(shape, groups, form, "relu", layout, torch.float32, 1)
    check(case.run("cpu"), case.run("reference", torch.float64), case, torch.float32)


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["equations", "folded"])
def test_inference_past_the_dispatcher_gives_the_same_bits(form: Any, dtype: torch.dtype, layout: str) -> None:
    layer = ULSAM(40, 5, form=form).eval()
    x = laid_out(torch.randn(2, 40, 7, 5).to(dtype), layout)
    expected = layer(x)
    for no_gradients in (torch.no_grad(), torch.inference_mode()):
        with no_gradients:
            found = layer(x)
        assert torch.equal(found, expected) and found.stride() == expected.stride() and not found.requires_grad


@compiled
def test_inference_refuses_parameters_of_another_size() -> None:
    layer, x = ULSAM(8, 4).eval(), torch.randn(1, 8, 3, 3)
    layer.pointwise.weight = nn.Parameter(torch.randn(4, 1, 1, 1))
    with torch.no_grad(), pytest.raises(UlsamError, match="4 values on cpu, but the map needs 8"):
        layer(x)
    layer, layer.groups = ULSAM(8, 4).eval(), 3
    with torch.no_grad(), pytest.raises(UlsamError, match="groups=3 does not divide 8 channels"):
        layer(x)


@compiled
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_inference_follows_a_parametrisation(name: str) -> None:
    class Double(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return 2 * values

    layer, x = ULSAM(8, 4, form="released").eval().fold(), torch.randn(1, 8, 3, 3)
    nn.utils.parametrize.register_parametrization(layer.pointwise, name, Double())
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


class Wrapped(Tensor):
    """A tensor without memory of its own, as distributed and quantized ones are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Wrapped":
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*tree_map_only(Wrapped, lambda value: value.held, args), **(kwargs or {}))


@compiled
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operands_without_memory_of_their_own_are_read_through_the_operator(layout: str, gradients: bool) -> None:
    x = laid_out(torch.randn(2, 8, 5, 5), layout).requires_grad_(gradients)
    scale, weight = torch.randn(8), torch.randn(8)
    expected, _ = subspace_attention(x, scale, weight, 4)
    found, _ = subspace_attention(x, Wrapped(scale), Wrapped(weight), 4)
    torch.testing.assert_close(found, expected)
    layer = ULSAM(8, 4)
    layer.depthwise._parameters["weight"] = Wrapped(scale.view(8, 1, 1, 1))  # type: ignore[assignment]
    layer.pointwise.weight = nn.Parameter(weight.view(4, 2, 1, 1), requires_grad=False)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(layer(x), expected)


@compiled
def test_a_view_that_is_to_be_negated_is() -> None:
    x, layer = torch.randn(1, 8, 3, 3), ULSAM(8, 4)
    expected = layer(-x)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(layer(torch._neg_view(x)), expected)
    x.requires_grad_()
    dy = torch.randn_like(x)
    (found,) = torch.autograd.grad(layer(x), x, torch._neg_view(dy))
    (expected,) = torch.autograd.grad(layer(x), x, -dy)
    torch.testing.assert_close(found, expected)


def test_forward_mode_keeps_the_tangent() -> None:
    x, tangent, layer = torch.randn(1, 8, 3, 3), torch.randn(1, 8, 3, 3), ULSAM(8, 4)
    _, expected = torch.func.jvp(layer, (x,), (tangent,))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x, tangent))
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)


@pytest.mark.parametrize("wrong", ["scale", "bias", "logits", "dy"])
def test_the_operator_itself_refuses_operands_of_another_size(wrong: str) -> None:
    x, ones, bias = torch.randn(2, 8, 3, 3), torch.ones(8), torch.ones(4)
    given = {"scale": ones, "bias": bias, "logits": torch.ones(2, 4, 3, 3), "dy": x}
    given[wrong] = given[wrong].flatten()[:1] if given[wrong].ndim == 1 else given[wrong][:1]
    backward = torch.ops.ulsam.subspace_attention_backward.default
    with pytest.raises(UlsamError):
        backward(
            *(given["dy"], x, given["scale"], ones, ones, given["bias"], [], given["logits"], torch.empty(0)),
            *(True, 0.0, ""),
        )
    if wrong in ("scale", "bias"):
        with pytest.raises(UlsamError, match="has 1 values on cpu, but the map needs"):
            OPERATOR(x, given["scale"], ones, ones, given["bias"], [], 4, True, 0.0, "")


@compiled
@pytest.mark.parametrize("groups", [1, 2, 15])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", WIDTHS)
def test_minus_infinity_stays_where_it_is(width: int, layout: str, groups: int, isa: int) -> None:
    case = Case((1, 60, 5, width), groups, "equations", "normal", layout, torch.float32, 0)
    case.x[0, 45, 1:4, 1:4] = -float("inf")
    case.scale[:], case.weight[:] = 1.0, 0.1
    found, exact = case.run("cpu")["y"], case.run("reference")["y"]
    undefined = exact.isnan()  # -inf * 0 in the pixel whose window holds nothing else; x * (1 + 0) here
    assert undefined.sum() == 1 and torch.equal(found[undefined], case.x[undefined])
    torch.testing.assert_close(found[~undefined], exact[~undefined])


@compiled
@pytest.mark.parametrize("gradients", [False, True])
def test_those_who_look_on_see_the_operator(gradients: bool) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    layer, x = ULSAM(8, 4), torch.randn(1, 8, 3, 3)
    with torch.set_grad_enabled(gradients), Watch():
        layer(x)
    assert OPERATOR in seen
    with torch.set_grad_enabled(gradients), torch.profiler.profile() as profile:
        layer(x)
    assert "ulsam::subspace_attention" in {event.key for event in profile.key_averages()}


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_of_ties_goes_to_the_first_in_row_major_order(layout: str, isa: int) -> None:
    x = laid_out(torch.ones(1, 4, 3, 3), layout).requires_grad_()
    dy = torch.zeros(1, 4, 3, 3)
    dy[..., 2, 2] = 1.0
    dy = dy - 1 / 9
    y, _ = subspace_attention(x, torch.ones(4), torch.ones(4), 1, backend="cpu")
    y.backward(dy)
    # all windows' maxima are their top-left pixels: 4 windows at (0, 0), 2 at (0, 1), ..., 1 at (1, 1)
    logits = (4 * (dy - dy.mean((2, 3), keepdim=True)) / 9)[0, 0]
    sent = torch.zeros(3, 3)
    for i in range(3):
        for j in range(3):
            sent[max(i - 1, 0), max(j - 1, 0)] += logits[i, j]
    torch.testing.assert_close(x.grad, dy * (1 + 1 / 9) + sent)


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 13, 4, 2), (1, 39, 6, -1)])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_nan_spreads_as_in_pytorch(width: int, where: tuple[int, ...], layout: str, isa: int) -> None:
    case = Case((2, 40, 7, width), 8, "folded", "normal", layout, torch.float32, 0)
    case.x[where] = float("nan")
    found, exact = case.run("cpu"), case.run("reference")
    assert exact["y"].isnan().sum() == 5 * 7 * width  # its group, in its image
    for name in ("y", "dx", "dbias"):
        assert torch.equal(found[name].isnan(), exact[name].isnan()), name
    assert found["dscale"][where[1]].isnan()


@compiled
@pytest.mark.parametrize("broken", ["scale", "weight", "shift", "bias"])
def test_a_nan_among_the_parameters_spreads_too(broken: str, isa: int) -> None:
    case = Case((2, 40, 7, 5), 8, "folded", "normal", "channels_last", torch.float32, 0)
    getattr(case, broken)[3] = float("nan")
    assert torch.equal(case.run("cpu")["y"].isnan(), case.run("reference")["y"].isnan())
