"""The layer against a naive per-subspace loop, against the released module's numbers, and its properties."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM, convert_released

GOLDEN = Path(__file__).parent / "golden" / "released_ulsam.safetensors"
FORMS = ["equations", "released", "folded"]


def naive(layer: ULSAM, x: Tensor) -> Tensor:
    """The equations, one subspace, one image and one pixel at a time (eval mode)."""

    def norm(n: nn.BatchNorm2d, value: Tensor, c: int) -> Tensor:
        return (value - n.running_mean[c]) / torch.sqrt(n.running_var[c] + n.eps) * n.weight[c] + n.bias[c]

    size = layer.channels // layer.groups
    height, width = x.shape[2:]
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for n in range(layer.groups):
            logits = torch.zeros(height, width, dtype=x.dtype)
            for k in range(size):
                c = n * size + k
                scaled = layer.depthwise.weight[c, 0, 0, 0] * x[b, c]
                if layer.form != "equations":
                    scaled = scaled + layer.depthwise.bias[c]
                    if layer.form == "released":
                        scaled = norm(layer.depthwise_norm, scaled, c)
                    scaled = scaled.clamp(min=0)
                for i in range(height):
                    for j in range(width):
                        window = scaled[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
                        logits[i, j] += layer.pointwise.weight[n, k, 0, 0] * window.max()
            if layer.form != "equations":
                logits = logits + layer.pointwise.bias[n]
                if layer.form == "released":
                    logits = norm(layer.pointwise_norm, logits, n)
                logits = logits.clamp(min=0)
            weights = torch.exp(logits - logits.max())
            attention = weights / weights.sum()
            for k in range(size):
                c = n * size + k
                out[b, c] = attention * x[b, c] + x[b, c]
    return out


def randomised(channels: int, groups: int, form: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> ULSAM:
    """A layer whose every parameter and statistic is away from its initial value, in eval mode."""
    layer = ULSAM(channels, groups, form=form, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if value.dtype.is_floating_point:
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
                value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise * 2)
    return layer


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 5),
    size=st.integers(1, 4),
    batch=st.integers(1, 2),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 2**16),
)
def test_equals_the_naive_loop(groups, size, batch, height, width, form, seed):
    layer = randomised(groups * size, groups, form, seed)
    x = torch.randn(batch, groups * size, height, width, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_maps_sum_to_one_and_explain_the_output(form):
    layer = randomised(12, 3, form)
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    maps = layer.attention(x)
    assert maps.shape == (2, 3, 5, 7)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(layer(x), x * (1 + maps.repeat_interleave(4, dim=1)))


@pytest.mark.parametrize(("form", "count"), [("equations", 2 * 48), ("released", 5 * 48 + 3 * 8)])
def test_parameter_count_is_the_papers(form, count):
    assert sum(p.numel() for p in ULSAM(48, 8, form=form).parameters()) == count


@pytest.mark.parametrize("case", range(3))
def test_golden_vectors_of_the_released_module(case):
    check_golden(GOLDEN, case)


@pytest.mark.parametrize("case", range(6))
def test_all_golden_vectors_of_the_released_module(case):
    path = Path(__file__).parents[2] / "shared" / "golden" / "reference_ulsam.safetensors"
    if not path.exists():
        pytest.skip("the full reference file is not beside this checkout")
    check_golden(path, case)


def check_golden(path: Path, case: int) -> None:
    """Outputs, gradients and running statistics to |a - b| <= 1e-5 max(1, max|b|)."""
    with safe_open(path, "pt") as file:
        sizes = json.loads(file.metadata()[f"case{case}"])
        prefix = f"case{case}."
        golden = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118

    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(name): v for k, v in golden.items() if k.startswith(name)}

    def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
        assert actual.shape == expected.shape, what
        assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()), what

    layer = ULSAM(sizes["channels"], sizes["groups"], form="released", momentum=0.9)
    layer.load_state_dict(convert_released(part("state.")))
    before = copy.deepcopy(layer)
    layer.eval()
    close(layer(golden["x"]), golden["y_eval"], "eval output")
    close(layer.fold()(golden["x"]), golden["y_eval"], "folded output")
    if "y_train" not in golden:
        assert (sizes["height"], sizes["width"]) == (1, 1)
        return
    x = golden["x"].requires_grad_()
    y = layer.train()(x)
    y.backward(golden["grad_y"])
    exact = copy.deepcopy(before).double().train()
    exact(golden["x"].detach().double()).backward(golden["grad_y"].double())
    close(y, golden["y_train"], "train output")
    close(x.grad, golden["grad_x"], "input gradient")
    gradients = convert_released(part("grad."))
    assert set(gradients) == {name for name, _ in layer.named_parameters()}
    for name, parameter in exact.named_parameters():  # what rounding did to the golden numbers is no fault of ours
        size = max(1.0, gradients[name].abs().max().item())
        error = (layer.get_parameter(name).grad - gradients[name]).abs().max().item()
        rounding = (parameter.grad - gradients[name]).abs().max().item()
        assert rounding <= 1.5e-5 * size, name
        assert error <= 2e-5 * size + rounding, name
        # plain PyTorch, in the place of the C kernels, sums up to 1.1e-5 away
        close(layer.get_parameter(name).grad, parameter.grad.float(), name, 2e-5)
    after = convert_released(part("after_train."))
    assert len(after) == 4
    for name, value in after.items():
        close(layer.state_dict()[name], value, name)


def test_released_keys_inside_a_model_keep_their_prefix():
    state = {"stem.weight": torch.ones(3), "att.subspaces.0.bn_point.bias": torch.ones(1)}
    state["att.subspaces.1.bn_point.bias"] = torch.zeros(1)
    converted = convert_released(state)
    assert set(converted) == {"stem.weight", "att.pointwise_norm.bias"}
    assert converted["att.pointwise_norm.bias"].tolist() == [1, 0]


def test_released_state_with_a_gap_or_without_the_module_is_refused():
    with pytest.raises(UlsamError, match="without a gap"):
        convert_released({"subspaces.0.bn_point.bias": torch.ones(1), "subspaces.2.bn_point.bias": torch.ones(1)})
    with pytest.raises(UlsamError, match="no key"):
        convert_released({"conv.weight": torch.ones(1)})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float64_even_with_large_logits(form, dtype):
    layer = randomised(16, 4, form, seed=3)
    x = torch.randn(2, 16, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20
    low = ULSAM(16, 4, form=form, dtype=dtype).eval()
    low.load_state_dict(layer.state_dict())
    y = low(x.to(dtype))
    assert y.dtype == dtype
    assert low.attention(x.to(dtype)).dtype == torch.float32
    torch.testing.assert_close(low.attention(x.to(dtype)).sum((2, 3)), torch.ones(2, 4))
    exact = ULSAM(16, 4, form=form, dtype=torch.float64).eval()
    exact.load_state_dict(low.state_dict())
    reference = exact(x.to(dtype).double())
    near = ((y.double() - reference).abs() <= 2e-2 * reference.abs() + 1e-3).double().mean()
    assert near > 0.999  # a peak between two nearly equal logits may move in half precision; all else agrees


def test_half_precision_maps_over_many_pixels_do_not_vanish():
    layer = ULSAM(8, 2, dtype=torch.float16)
    maps = layer.attention(torch.zeros(1, 8, 256, 256, dtype=torch.float16))
    torch.testing.assert_close(maps, torch.full_like(maps, 1 / 65536))


@pytest.mark.parametrize("form", FORMS)
def test_layout_is_kept_and_changes_no_number(form):
    layer = randomised(24, 4, form)
    x = torch.randn(2, 24, 9, 5, dtype=torch.float64)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous()
    torch.testing.assert_close(last, layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_right(form):
    layer = randomised(6, 2, form)
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_fold_equals_the_layer_and_leaves_it_alone():
    layer = randomised(20, 5, "released", dtype=torch.float32).train()
    x = torch.randn(2, 20, 6, 6)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    folded = layer.fold()
    assert folded.form == "folded"
    assert not folded.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert layer.training
    assert all(m.training for m in layer.modules())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    torch.testing.assert_close(folded(x), layer.eval()(x), rtol=1e-5, atol=1e-5)
    plain = ULSAM(20, 5)
    copy = plain.fold()
    assert copy.depthwise.weight is not plain.depthwise.weight
    assert torch.equal(copy(x), plain(x))


@pytest.mark.parametrize("form", FORMS)
def test_export_with_dynamic_batch_height_and_width(form):
    layer = randomised(16, 4, form, dtype=torch.float32)
    shape = {0: torch.export.Dim("b"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    exported = torch.export.export(layer, (torch.randn(2, 16, 8, 6),), dynamic_shapes=(shape,)).module()
    for size in [(1, 16, 5, 9), (3, 16, 14, 14)]:
        x = torch.randn(size)
        torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("form", ["equations", "released"])
def test_compiles_without_a_graph_break(form):
    layer = randomised(8, 2, form, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in [(2, 8, 6, 6), (1, 8, 5, 7)]:
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_fx_traces_it(form):
    model = nn.Sequential(randomised(8, 2, form, dtype=torch.float32)).train()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 8, 6, 5)
    for mode in (True, False):  # traced once, it follows the mode
        torch.testing.assert_close(traced.train(mode)(x), model.train(mode)(x))


def test_autocast_keeps_the_dtype_that_flows_through():
    layer = ULSAM(8, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert layer(torch.randn(1, 8, 4, 4)).dtype == torch.float32


def test_near_identity_at_initialization():
    x = torch.rand(1, 64, 14, 14) + 0.5
    change = (ULSAM(64)(x) / x - 1).mean().item()
    assert change == pytest.approx(1 / 196, rel=1e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ULSAM(160, 3), r"groups=3 does not divide 160 channels; valid: \[1, 2, 4, 5, 8, 10, 16"),
        (lambda: ULSAM(160, 0), "does not divide"),
        (lambda: ULSAM(8, "2"), "channels and groups are whole numbers, not 8 and '2'"),
        (lambda: ULSAM(8.0), "channels and groups are whole numbers, not 8.0 and 4"),
        (lambda: ULSAM(0), "channels must be 1 or more"),
        (lambda: ULSAM(8, form="paper"), "unknown form 'paper'; valid: equations, released, folded"),
        (lambda: ULSAM(8)(torch.ones(1, 4, 2, 2)), r"\[B, 8, H, W\], not \[1, 4, 2, 2\]"),
        (lambda: ULSAM(8)(torch.ones(2, 49, 8)), r"looks like tokens \[B, N, C\]"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(UlsamError, match=message):
        build()


def test_exact_zeros_leave_the_gradient_finite():
    """Max-pooling ties (ReLU'd inputs are full of exact zeros) must not make gradients non-finite."""
    layer = ULSAM(8, 2)
    torch.nn.init.constant_(layer.depthwise.weight, 0.5)  # below 0 the zeros win everywhere, and the gradient is 0
    x = F.relu(torch.randn(2, 8, 6, 6) - 1).requires_grad_()
    layer(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert layer.depthwise.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_package_is_light_and_its_names_are_what_they_say():
    code = (
        "import sys, ulsam\n"
        "assert not {'torch', 'timm', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "model = __import__('torch').nn.Sequential(ulsam.ULSAM(8))\n"
        "for _ in range(2):\n"  # a name that is also a module's would turn into the module at its second use
        "    for name in dir(ulsam):\n"
        "        value = getattr(ulsam, name)\n"
        "        assert name.startswith('_') or callable(value), name\n"
        "print(ulsam.cost(model, (8, 4, 4)).params)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("16\n", "")


def composed(layer: ULSAM, x: Tensor) -> Tensor:
    """The layer by its definition, in which its own parts are called."""
    h = torch.relu(layer.depthwise_norm(layer.depthwise(x)))
    logits = torch.relu(layer.pointwise_norm(layer.pointwise(F.max_pool2d(h, 3, 1, 1))))
    maps = logits.flatten(2).softmax(-1).view_as(logits)
    return x + x * maps.repeat_interleave(layer.channels // layer.groups, 1)


def half_frozen(layer: ULSAM) -> None:
    layer.pointwise_norm.eval()


def without_statistics(layer: ULSAM) -> None:
    layer.depthwise_norm = nn.BatchNorm2d(8, track_running_stats=False)


def without_weights(layer: ULSAM) -> None:
    layer.depthwise_norm = nn.BatchNorm2d(8, affine=False)


def frozen(layer: ULSAM) -> None:
    layer.depthwise_norm, layer.pointwise_norm = FrozenBatchNorm2d(8), FrozenBatchNorm2d(2)


def other_eps(layer: ULSAM) -> None:
    layer.pointwise_norm.eps = 1.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [half_frozen, without_statistics, without_weights, frozen, other_eps])
def test_norms_of_every_kind_compute_what_they_do_alone(change: Callable[[ULSAM], None], training: bool) -> None:
    layer = randomised(8, 2, "released").train(training)
    change(layer)
    layer.double()
    twin, x = copy.deepcopy(layer), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), composed(twin, x))
    for (name, value), other in zip(layer.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_converted_to_synchronized_batchnorm_it_computes_the_same() -> None:
    layer = randomised(8, 2, "released").eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    assert isinstance(converted.depthwise_norm, nn.SyncBatchNorm)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(converted(x), layer(x))


def test_one_value_a_channel_is_refused_as_by_batchnorm():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ULSAM(8, 2, form="released")(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_batchnorms(momentum):
    """Against two nn.BatchNorm2d in the composed definition, in float64."""
    layer = randomised(12, 3, "released")
    for norm in (layer.depthwise_norm, layer.pointwise_norm):
        norm.momentum = momentum
    composed = copy.deepcopy(layer).train()
    layer.train()
    for step in range(3):
        x = torch.randn(4, 12, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        layer(x)
        h = composed.depthwise_norm(composed.depthwise(x)).relu()
        composed.pointwise_norm(composed.pointwise(F.max_pool2d(h, 3, stride=1, padding=1)))
    for name, value in composed.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, msg=name)
