"""The operator: every backend against the definition in float64, as PyTorch uses it, and the choice of the backend."""

import copy
import ctypes.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.fx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.layer.ops import cpu, subspace_attention, which_backend
from ulsam.layer.ulsam import ULSAM

OPERATOR = torch.ops.ulsam.subspace_attention.default
compiled = pytest.mark.skipif(cpu.LIBRARY is None, reason="installed without the C kernels")
ISAS = [1] if cpu.LIBRARY is None else list(range(1, cpu.LIBRARY.ulsam_isa() + 1))


@pytest.fixture(params=ISAS, ids=lambda isa: cpu.ISA_NAMES[isa])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    with cpu.instruction_set(request.param):
        yield int(request.param)


def values(kind: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Inputs as they occur: ReLU'd ones are full of exact zeros, quantized and equal ones of ties."""
    x = torch.randn(*shape, generator=generator)
    if kind == "relu":
        return x.relu()
    if kind == "quantized":
        return (2 * x).round() / 2
    return torch.full_like(x, 0.75) if kind == "equal" else x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        wide = torch.zeros(x.shape[0], x.shape[1] + 2, x.shape[2] + 1, x.shape[3] + 3, dtype=x.dtype)
        wide[:, 1:-1, :-1, 2:-1] = x
        return wide[:, 1:-1, :-1, 2:-1]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:1].expand(*x.shape)
    return x.contiguous()


class Case:
    """Random operands; `run` gives y, the moments and every gradient."""

    def __init__(
        self, shape: Sequence[int], groups: int, form: str, kind: str, layout: str, dtype: torch.dtype, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        channels = shape[1]
        self.x = laid_out(values(kind, shape, generator).to(dtype), layout)
        self.dy = torch.randn(*shape, generator=generator).to(dtype)
        normal = [torch.randn(size, generator=generator) for size in (channels, channels, channels, groups)]
        self.scale, self.shift, self.weight, self.bias = normal
        self.weight = self.weight / (channels / groups) ** 0.5
        self.norms = [torch.rand(size, generator=generator) + 0.5 for size in (channels, channels, groups, groups)]
        self.groups, self.form = groups, form

    def run(self, backend: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        def leaf(value: Tensor) -> Tensor:
            return value.detach().to(dtype or value.dtype).requires_grad_()

        operands = {"x": self.x.detach().to(dtype or self.x.dtype).requires_grad_()}
        operands |= {"scale": leaf(self.scale), "weight": leaf(self.weight)}
        if self.form not in ("equations", "no shift"):
            operands |= {"shift": leaf(self.shift), "bias": leaf(self.bias)}
        norms = [leaf(norm) for norm in self.norms] if self.form.startswith("batch statistics") else []
        relu = self.form not in ("equations", "no relu", "batch statistics, no relu")
        y, moments = subspace_attention(**operands, groups=self.groups, norms=norms, relu=relu, backend=backend)
        y.backward(self.dy.to(y.dtype))
        gradients = {f"d{name}": value.grad for name, value in operands.items()}
        gradients |= {f"dnorm{n}": norm.grad for n, norm in enumerate(norms)}
        return {"y": y.detach(), "moments": moments, **gradients}


def on_threads(case: Case) -> list[dict[str, Tensor]]:
    """The case's results on one thread, two and three."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run("cpu"))
    finally:
        torch.set_num_threads(before)
    return results


FORMS = ["equations", "folded", "batch statistics"]
UNUSUAL = ["no shift", "no relu", "batch statistics, no relu"]  # no layer of ours is one of these
shapes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 9),
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


def check(found: dict[str, Tensor], exact: dict[str, Tensor], case: Case, dtype: torch.dtype) -> None:
    """y to 1e-6 (bfloat16: 1e-2) of the largest value; gradients relative to what their sums are made of."""
    assert found.keys() == exact.keys()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    if case.form.startswith("batch statistics"):
        tolerance = max(tolerance, 2e-5)  # divides by the spread of few, nearly equal values
    for name, value in exact.items():
        if not value.numel():
            continue
        size = value.abs().max().item()
        if name.startswith("d") and name != "dx":
            size = max(size, 0.1 * (case.x.abs().max() * case.dy.abs().max()).item() * case.x[:, 0].numel() ** 0.5, 1.0)
            size *= 10 if case.form.startswith("batch statistics") else 1
        bound = 5 * tolerance if name != "y" else tolerance
        assert (found[name].double() - value).abs().max().item() <= bound * max(size, 1e-3), name
    assert found["y"].dtype == found["dx"].dtype == dtype
    dense = case.x.is_contiguous() or case.x.is_contiguous(memory_format=torch.channels_last)
    assert found["y"].stride() == (case.x if dense else case.x.contiguous()).stride()


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
def test_minus_infinity_stays_where_it_is(layout: str, groups: int, isa: int) -> None:
    case = Case((1, 60, 5, 5), groups, "equations", "normal", layout, torch.float32, 0)
    case.x[0, 45, 1:4, 1:4] = -float("inf")
    case.scale[:], case.weight[:] = 1.0, 0.1
    found, exact = case.run("cpu")["y"], case.run("reference")["y"]
    undefined = exact.isnan()  # -inf * 0 in the pixel whose window holds nothing else; x * (1 + 0) here
    assert undefined.sum() == 1 and torch.equal(found[undefined], case.x[undefined])
    torch.testing.assert_close(found[~undefined], exact[~undefined])


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [40, 96, 320])
def test_threads_may_share_an_image(channels: int, layout: str) -> None:
    found = on_threads(Case((1, channels, 28, 28), 8, "folded", "relu", layout, torch.float32, 0))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


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
@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 13, 4, 2), (1, 39, 6, 4)])
def test_a_nan_spreads_as_in_pytorch(where: tuple[int, ...], layout: str, isa: int) -> None:
    case = Case((2, 40, 7, 5), 8, "folded", "normal", layout, torch.float32, 0)
    case.x[where] = float("nan")
    found, exact = case.run("cpu"), case.run("reference")
    assert exact["y"].isnan().sum() == 5 * 35  # its group, in its image
    for name in ("y", "dx", "dbias"):
        assert torch.equal(found[name].isnan(), exact[name].isnan()), name
    assert found["dscale"][where[1]].isnan()


@compiled
@pytest.mark.parametrize("broken", ["scale", "weight", "shift", "bias"])
def test_a_nan_among_the_parameters_spreads_too(broken: str, isa: int) -> None:
    case = Case((2, 40, 7, 5), 8, "folded", "normal", "channels_last", torch.float32, 0)
    getattr(case, broken)[3] = float("nan")
    assert torch.equal(case.run("cpu")["y"].isnan(), case.run("reference")["y"].isnan())


@compiled
@pytest.mark.parametrize("form", FORMS)
def test_threads_change_nothing_but_the_order_of_sums(form: str) -> None:
    results = on_threads(Case((1, 96, 14, 14), 4, form, "normal", "channels_last", torch.float32, 0))
    for found in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)


@compiled
def test_several_python_threads_at_once() -> None:
    cases = [Case((2, 8 * n, 9, 9), 4, "folded", "normal", "contiguous", torch.float32, n) for n in range(1, 9)]
    alone = [case.run("cpu") for case in cases]
    found: list[list[dict[str, Tensor]]] = [[] for _ in cases]

    def work(n: int) -> None:
        for _ in range(20):
            found[n].append(cases[n].run("cpu"))

    threads = [threading.Thread(target=work, args=[n]) for n in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, expected in enumerate(alone):
        assert len(found[n]) == 20
        assert all(torch.equal(run[name], expected[name]) for run in found[n] for name in expected)


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_works_where_its_parent_has_threads() -> None:
    code = """
import os, torch
from ulsam.layer.ops import subspace_attention
torch.set_num_threads(2)
x = torch.randn(4, 32, 14, 14)
y = subspace_attention(x, torch.ones(32), torch.ones(32), 4)[0]
child = os.fork()
if child == 0:
    same = torch.equal(subspace_attention(x, torch.ones(32), torch.ones(32), 4)[0], y)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "2"})


# as PyTorch uses it


def operands(dtype: torch.dtype, norms: bool) -> tuple[Any, ...]:
    case = Case((2, 12, 5, 4), 3, "folded", "normal", "channels_last", dtype, 0)
    vectors = [value.requires_grad_() for value in (case.scale, case.shift, case.weight, case.bias)]
    return (case.x.requires_grad_(), *vectors, [norm.requires_grad_() for norm in case.norms] if norms else [], 3, True)


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
@pytest.mark.parametrize("place", [(0, 0), (0, 2), (2, 2), (4, 4)])
def test_infinity_times_zero_is_nan(place: tuple[int, int], layout: str, isa: int) -> None:
    case = Case((2, 40, 5, 5), 8, "folded", "normal", layout, torch.float32, 0)
    case.scale[1] = 0.0
    case.x[0, 1, *place] = float("inf")
    found, exact = case.run("cpu")["y"], case.run("reference")["y"]
    assert exact.isnan().any()
    assert torch.equal(found.isnan(), exact.isnan())


@compiled
def test_a_thread_that_ends_frees_its_memory() -> None:
    layer, x = ULSAM(64, 16).eval(), torch.randn(1, 64, 112, 112).contiguous(memory_format=torch.channels_last)

    def work() -> None:
        with torch.no_grad():
            layer(x)

    def megabytes() -> float:
        for _ in range(20):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return float(psutil.Process().memory_info().rss / 2**20)

    first, second, third = (megabytes() for _ in range(3))
    assert min(second - first, third - second) < 20  # 4 MB a thread would make 80; the allocator may grow once


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    assert cpu.load(path)[1].startswith(f"ulsam was installed without them: there is no file {path}; ")
    path.with_name("kernels.txt").write_text("no C compiler was found: install gcc or clang, or set CC\n")
    assert cpu.load(path)[1] == (
        "ulsam was installed without them: no C compiler was found: install gcc or clang, or set CC; "
        "pip install with --force-reinstall --no-deps --no-cache-dir then compiles them"
    )
    path.write_bytes(b"no library")
    library, reason = cpu.load(path)
    assert library is None
    assert reason.startswith(f"{path} cannot be loaded: ")


THREADS = """
import ctypes, os, struct, sys, torch
from ulsam.layer.ops import subspace_attention
from ulsam.layer.ops import cpu

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
x = torch.randn(6, 32, 28, 28)
operands = torch.ones(32), torch.ones(32), 4
expected = subspace_attention(x, *operands, backend="reference")[0]
torch.set_num_threads(3)
found = []
for only in sys.argv[1:]:
    kept = dict(zip(cpu.OPENMP, cpu.openmp()))
    if only == "llvm":
        kept["GOMP_parallel"] = 0
    elif only == "none":
        kept = dict.fromkeys(kept, 0)
    cpu.LIBRARY.ulsam_use_openmp(struct.pack("6q", *kept.values()))
    before = threads()
    found.append(subspace_attention(x, *operands)[0])
    print(only, threads() - before)
before = threads()
torch.relu(torch.randn(3_000_000))  # on PyTorch's own threads
print("pytorch", threads() - before)
for y in found:
    torch.testing.assert_close(y, expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(
    "preloaded", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("omp", "iomp5"))]
)
@compiled
def test_the_kernels_use_the_threads_of_pytorchs_openmp(preloaded: str | None) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS="3")
    kinds = ["none", "gnu"]
    if preloaded:  # its functions come before those of the library that PyTorch was built with
        library = ctypes.util.find_library(preloaded)
        if library is None:
            pytest.skip(f"there is no lib{preloaded}")
        environment["LD_PRELOAD"] = library
        kinds = ["none", "llvm", "gnu"]
    done = subprocess.run(
        [sys.executable, "-c", THREADS, *kinds], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    started = dict(line.split() for line in done.stdout.splitlines())
    assert started.pop("none") == "0"
    assert int(started.pop(kinds[1])) >= 2  # LLVM's starts one more, a monitor
    assert set(started.values()) == {"0"}  # the same threads are used again, by PyTorch too


# the choice


@pytest.fixture
def plain() -> Iterator[Tensor]:
    yield torch.randn(1, 8, 4, 4)


@pytest.mark.parametrize(
    ("dtype", "wanted", "expected"),
    [
        (torch.float64, None, ("reference", "the cpu backend takes float32 and bfloat16, not float64")),
        (torch.float16, "cpu", ("reference", "the cpu backend takes float32 and bfloat16, not float16")),
        (torch.float32, "reference", ("reference", "asked for")),
    ],
)
def test_which_backend(dtype: torch.dtype, wanted: Any, expected: tuple[str, str], plain: Tensor) -> None:
    assert which_backend(plain.to(dtype), wanted) == expected


def test_other_devices_have_the_reference() -> None:
    assert which_backend(torch.ones(1, device="meta"))[0] == "reference"
    assert subspace_attention(torch.ones(1, 4, 2, 2, device="meta"), *[torch.ones(4, device="meta")] * 2, 2)[0].is_meta


def test_an_unknown_backend_is_named(plain: Tensor) -> None:
    with pytest.raises(UlsamError, match="there is no backend 'cuda'; valid: reference, cpu"):
        subspace_attention(plain, torch.ones(8), torch.ones(8), 2, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["reference", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cpu", "", "opencl"))]
)
def test_the_environment_forces_a_backend(name: str) -> None:
    code = "import torch; from ulsam.layer.ops import which_backend; print(which_backend(torch.ones(1, 8, 4, 4))[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ULSAM_BACKEND": name}, capture_output=True, text=True
    )
    if name == "opencl":
        assert "UlsamError: ULSAM_BACKEND=opencl: there is no such backend; valid: reference, cpu" in done.stderr
    else:
        assert done.stdout.strip() == ("reference" if cpu.LIBRARY is None else name or "cpu")


WITHOUT = """
import sys, warnings, torch
from ulsam.layer.ops import cpu, operator, reference, subspace_attention, which_backend
from ulsam.layer.ulsam import ULSAM

x, layer = torch.randn(1, 8, 4, 4), ULSAM(8, 2).requires_grad_(False)
reason = "the C kernels are not there: " + cpu.WHY_NONE
assert which_backend(x) == ("reference", reason) and "there is no file" in reason, which_backend(x)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    subspace_attention(x, torch.ones(8), torch.ones(8), 2, backend="reference")
    subspace_attention(x.double(), torch.ones(8), torch.ones(8), 2)
    torch.export.export(layer, (x,), strict=True)
    assert not said, said
    if "compiled" in sys.argv:
        layer = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(2):
        layer(x)  # this line
message = "ULSAM runs in plain PyTorch, several times slower than its C kernels: " + cpu.WHY_NONE
assert [str(warning.message) for warning in said] == [message], said
with open(__file__, encoding="utf-8") as script:
    assert "this line" in script.readlines()[said[0].lineno - 1] and said[0].filename == __file__, said
given = (x, torch.ones(8), None, torch.ones(8), None, [], 2, False, 0.0)
found = torch.ops.ulsam.subspace_attention.default(*given, "")[0]
torch.testing.assert_close(found, reference.subspace_attention(*given)[0])
"""


@pytest.fixture(scope="module")
def without_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it is where nothing could be compiled, and what is tried there."""
    folder, package = tmp_path_factory.mktemp("without"), Path(cpu.__file__).parents[2]
    shutil.copytree(package, folder / "ulsam", ignore=shutil.ignore_patterns("kernels.*", "__pyc*", "weights"))
    (folder / "tried.py").write_text(WITHOUT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_without_kernels_the_reference_does_it_and_one_warning_says_so(how: str, without_kernels: Path) -> None:
    done = run_in(without_kernels, str(without_kernels / "tried.py"), how)
    assert done.returncode == 0, done.stderr


def run_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with the package in this folder."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": ""}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


def with_isa(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ULSAM_ISA": name}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "name", [pytest.param(cpu.ISA_NAMES[isa], marks=[pytest.mark.slow] * (isa != ISAS[0])) for isa in ISAS]
)
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    done = with_isa(name, "-c", "from ulsam.layer.ops import cpu; print(cpu.ISA_NAMES[cpu.chosen_isa()])")
    assert done.stdout == f"{name}\n", done.stderr


BEYOND = [name for name in cpu.ISA_NAMES[ISAS[-1] + 1 :] if cpu.LIBRARY]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SSE9", *(pytest.param(name, marks=pytest.mark.slow) for name in BEYOND)])
def test_an_instruction_set_that_is_not_there_is_refused(name: str) -> None:
    """The second kind runs where the processor lacks one."""
    done = with_isa(name, "-m", "ulsam", "doctor")
    known, here = cpu.ISA_NAMES[1:], [cpu.ISA_NAMES[isa] for isa in ISAS]
    why = f"this processor has none; valid: {', '.join(here)}"
    if name not in known:
        why = f"there is no such instruction set; valid: {', '.join(known)}"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"ulsam: error: ULSAM_ISA={name}: {why}\n")


def backend_in_float32(report: str) -> str:
    rows = [line.split() for line in report.splitlines() if line.startswith("cpu ")]
    return next(row[2] for row in rows if row[1] == "float32")


@compiled
def test_doctor_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert backend_in_float32(report) == "cpu"
    assert "no C kernels" not in report
    assert f"torch {torch.__version__}" in report


@pytest.mark.slow
def test_doctor_says_why_there_are_no_kernels(without_kernels: Path) -> None:
    report = run_in(without_kernels, "-m", "ulsam", "doctor").stdout
    assert backend_in_float32(report) == "reference"
    assert "cpu     no C kernels: ulsam was installed without them: there is no file" in report
