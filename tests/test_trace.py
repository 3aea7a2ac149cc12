"""What the pass of a copy finds, against the running model."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulsam.base.errors import UlsamError
from ulsam.surgery.trace import default_input_size, trace


class Odd(nn.Module):
    """Operators that change their input, by one tensor and by two, and one that changes no values but the shape."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.mul(2).relu_().clamp_(max=3).neg_()
        y += x.mean(1, keepdim=True)
        return y.squeeze_(0).unsqueeze_(0).flatten(2).logical_not_()


class Own(nn.Module):
    """What is computed on tensors of its own decides the shape, and how often a part is called."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        size = torch.tensor(x.shape[-2:]).float().div_(4).ceil_()
        for _ in range(int(torch.ones((), dtype=torch.long).add_(2))):
            x = self.again(x)
        x = F.adaptive_avg_pool2d(x, [int(n) for n in size])
        norm = F.batch_norm(torch.full((1, 2, 1, 1), 3.0), torch.zeros(2), torch.ones(2))
        return x[..., : int(norm[0, 0, 0, 0].round())]


class InPlace(nn.Module):
    def __init__(self, to: torch.dtype, name: str) -> None:
        super().__init__()
        self.to_dtype, self.operator = to, name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(x.to(self.to_dtype), self.operator)()


class Looking(nn.Module):
    """Looks at values, as a detector does: no pass on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.again = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)) + torch.rand(())
        found = torch.nonzero(x.abs().sum(1) >= 0)
        for _ in range(2 if float(x.sum()) != 0 else 1):
            x = self.again(x)
        return x[:, :, : int(found[:, 1].max()) + 1]


NETS = {
    "looking": Looking,
    "own": Own,
    "odd": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Hardswish(True), Odd()),
    "own statistics": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    **{
        name: lambda name=name: timm.create_model(name, num_classes=3)
        for name in ("mobilenetv2_035", "mobilenetv3_small_050", "efficientnet_b0", "resnet18")
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_shapes_are_those_of_the_running_model(name: str, dtype: torch.dtype) -> None:
    model = NETS[name]().eval().to(dtype)
    found = trace(model, (3, 33, 47))
    outputs: dict[str, list[Any]] = {part: [] for part, _ in model.named_modules()}
    for part, module in model.named_modules():
        module.register_forward_hook(lambda _, args, output, part=part: outputs[part].append(output))
    with torch.no_grad():
        model(torch.randn(1, 3, 33, 47, dtype=dtype))
    assert {part: flow.calls for part, flow in found.items()} == {part: len(seen) for part, seen in outputs.items()}
    for part, seen in outputs.items():
        if len(seen) == 1:
            assert found[part].output_shape == tuple(seen[0].shape), part


@pytest.mark.parametrize(
    "wrong",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), InPlace(torch.long, "sigmoid_")),
        nn.Sequential(nn.Conv2d(3, 8, 3), InPlace(torch.bool, "neg_")),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4, affine=False)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.BatchNorm2d(8)),
    ],
)
def test_what_cannot_take_its_map_is_noticed(wrong: nn.Module) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        wrong.eval()(torch.randn(1, 3, 16, 16))
    with pytest.raises(UlsamError, match=r"Sequential does not run on one image of \[3, 16, 16\]"):
        trace(wrong, (3, 16, 16))


@pytest.mark.parametrize(
    "prepare", [lambda model: model, torch.compile, lambda model: model.half(), lambda model: model.train()]
)
def test_a_real_pass_leaves_the_model_alone(prepare: Callable[[nn.Module], nn.Module]) -> None:
    model = prepare(Looking())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    mode, generator = model.training, torch.get_rng_state()
    first, second = trace(model, (3, 12, 12)), trace(model, (3, 12, 12))
    assert first == second
    assert first[""].macs == 12 * 12 * (3 * 3 * 9 + 2 * 3 * 3)
    assert model.training == mode and torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_an_edit_put_aside_is_not_copied() -> None:
    class Uncopyable(nn.Conv2d):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    model = nn.Sequential(Looking(), Uncopyable(3, 3, 1))
    model[1] = nn.Identity()
    vars(model[1])["replaced_module"] = (Uncopyable(3, 3, 1), torch.device("cpu"), torch.float32)
    assert trace(model, (3, 12, 12))["1"].calls == 1


def test_a_compiled_method_belongs_to_the_copy() -> None:
    model = nn.Sequential(Looking()).train()
    model[0].forward = torch.compile(model[0].forward, backend="eager")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert trace(model, (3, 12, 12))["0.again"].calls == 2
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_a_function_of_the_model_itself_is_refused() -> None:
    model = nn.Sequential(Looking()).train()
    run = model[0].forward
    model[0].forward = lambda x: run(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UlsamError, match=r"0\.forward is a function that would run the model itself"):
        trace(model, (3, 12, 12))
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_the_reason_is_that_of_the_real_pass() -> None:
    with pytest.raises(UlsamError, match=r"expected input\[1, 4, 12, 12\] to have 3 channels"):
        trace(Looking(), (4, 12, 12))
    with pytest.raises(UlsamError, match=r"nonzero\(\) raises"):  # a meta_model has no values
        trace(Looking().to("meta"), (3, 12, 12))


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("mobilenetv3_small_050", 3, (3, 224, 224)),
        ("mobilenetv3_small_050", 1, (1, 224, 224)),
        ("tresnet_m", 3, (3, 224, 224)),  # pixels become channels in front of its first convolution
        ("tresnet_m", 4, (4, 224, 224)),
        ("csatv2", 3, (3, 512, 512)),
    ],
)
def test_the_default_size_is_what_the_model_takes(name: str, channels: int, size: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, in_chans=channels)
    assert default_input_size(model) == size
    assert trace(model)[""].calls == 1
