"""Other people's tools on edited models, through their own interfaces: each sees the layer, or says why it cannot."""

import copy
import functools
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fuse_by_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import ulsam
from calibrating import calibrated
from tiny import SETTINGS, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import load
from ulsam.surgery.edited import is_followed
from ulsam.surgery.layer_host import attach_layer
from ulsam.surgery.pruners import customized_pruners, keep_channels
from ulsam.training.config import TrainConfig
from ulsam.training.train import train

SIZE = (3, 48, 48)  # maps of 6 x 6 at the last blocks: small ones are flat, whatever the weights
FIRST, SECOND, LAST = "blocks.1.1", "blocks.1.2", "blocks.2.1"  # the blocks that can go
DYNAMIC = torch.export.Dim.DYNAMIC


def randomised(model: nn.Module) -> nn.Module:
    """``model`` in eval mode with weights and statistics that are all different from what a new one has."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_var" in name or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point() and (value.ndim < 2 or "ulsam" in name or "blocks.2.1" in name):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.eval()


def base() -> nn.Module:
    """A MobileNet-V2 of 6 blocks, as compilers and exporters take a second a block."""
    torch.manual_seed(0)
    blocks = decode_arch_def([["ds_r1_k3_s1_c8"], ["ir_r3_k3_s2_e3_c16"], ["ir_r2_k3_s2_e3_c24"]])
    return EfficientNet(blocks, num_classes=5, stem_size=8, num_features=64, act_layer=nn.ReLU6)


def inserted() -> nn.Module:
    return ulsam.insert(base(), f"{LAST},blocks.2.0.se", 4, input_size=SIZE)


def replaced() -> nn.Module:
    return ulsam.replace(base(), f"{SECOND},{LAST}", 4, input_size=SIZE)


def released() -> nn.Module:
    return ulsam.insert(ulsam.replace(base(), LAST, 4, form="released", input_size=SIZE), FIRST, 8, input_size=SIZE)


def removed() -> nn.Module:
    return ulsam.remove(base(), f"{SECOND},{LAST}", input_size=SIZE)


EDITED = pytest.mark.parametrize("make", [inserted, replaced, released])
#: For tools that take seconds a model: the one that holds both forms, behind a block and in a block's place.
EDITED_ONCE = pytest.mark.parametrize(
    "make", [pytest.param(inserted, marks=pytest.mark.slow), pytest.param(replaced, marks=pytest.mark.slow), released]
)


def images(batch: int = 2, height: int = 48, width: int = 48) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_gradients_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@torch.no_grad()
def assert_same(model: Callable[..., Any], other: Callable[..., Any], tolerance: float = 1e-5) -> None:
    x = images()
    expected, found = other(x), model(x)
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def without_layer(model: nn.Module) -> nn.Module:
    return ulsam.undo(copy.deepcopy(model))


def assert_layer_matters(model: nn.Module) -> None:
    """Or the comparisons above would not see that it is gone."""
    with torch.no_grad():
        change = model(images()) - without_layer(model)(images())
    assert float(change.abs().max()) > 1e-3


# torch.compile


@pytest.mark.parametrize("make", [released, pytest.param(removed, marks=pytest.mark.slow)])
def test_compiled_is_eager_whatever_was_compiled_before(make: Callable[[], nn.Module]) -> None:
    plain = randomised(base())
    assert_same(torch.compile(plain, backend="aot_eager"), plain)
    model = randomised(make())
    assert_layer_matters(model)
    assert_same(torch.compile(model, backend="aot_eager"), model)


@pytest.mark.slow
def test_an_edit_of_a_compiled_model_and_its_undoing_take_effect() -> None:
    model = randomised(base())
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(compiled, model)
    for edit in (
        lambda: ulsam.insert(compiled, LAST, 4, input_size=SIZE),
        lambda: ulsam.replace(compiled, SECOND, 4, input_size=SIZE),
        lambda: ulsam.remove(compiled, FIRST, input_size=SIZE),
        lambda: ulsam.undo(compiled),
        lambda: ulsam.insert(model, FIRST, 8, input_size=SIZE),
    ):
        before = model(images())
        assert edit() in (compiled, model)
        randomised(model)
        assert not torch.equal(model(images()), before)
        assert_same(compiled, model)


@pytest.mark.slow
def test_compiled_by_itself_and_edited_it_is_eager() -> None:
    model = randomised(base())
    model.compile(backend="aot_eager")
    model(images())
    ulsam.insert(model, LAST, 4, input_size=SIZE)
    assert_same(model, copy.deepcopy(randomised(model)))


@pytest.mark.slow
def test_training_compiled_gives_every_new_weight_the_gradient_of_eager() -> None:
    plain = base()
    torch.compile(plain, backend="aot_eager")(images()).sum().backward()
    eager = randomised(inserted()).train()
    compiled = copy.deepcopy(eager)
    for run in (eager, torch.compile(compiled, backend="aot_eager")):
        run(images(4)).square().sum().backward()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-3 * float(one.grad.abs().max()), msg=name)


@pytest.mark.slow
def test_a_compiled_training_after_another_one_trains_the_layers_as_eager_does(tmp_path: Path) -> None:
    """The layers of the second training were once left without a gradient: it ran the first one's code."""
    data = draw_splits(tmp_path / "data")
    trained = {}
    for name, edits, compiler, rate in (
        ("plain", [], "inductor", 0.1),
        ("compiled", ["insert blocks.3.0 g=2"], "inductor", 0.1),
        ("eager", ["insert blocks.3.0 g=2"], "none", 0.1),
        ("start", ["insert blocks.3.0 g=2"], "none", 1e-9),
    ):
        settings = {**SETTINGS, "data": str(data), "size": 96, "epochs": 1}
        settings |= {"compile": compiler, "edits": edits, "lr": rate}
        train(TrainConfig.from_mapping(settings), tmp_path / name)
        trained[name] = load(tmp_path / name / "model.safetensors")[0]
    one, other, start = (trained[name].blocks[3][0].ulsam for name in ("compiled", "eager", "start"))
    for weight, wanted, before in zip(one.parameters(), other.parameters(), start.parameters(), strict=True):
        moved = float((wanted - before).detach().abs().max())
        assert float((weight - wanted).detach().abs().max()) < 0.1 * moved


# copies, pickles, state dicts


@EDITED
def test_copies_and_pickles_hold_the_layer_and_can_be_undone(make: Callable[[], nn.Module]) -> None:
    model = randomised(make())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin, model, 0)
        assert ulsam.edits_of(twin) == ulsam.edits_of(model)
        assert_same(ulsam.undo(twin), without_layer(model), 0)


def test_other_names_and_a_checkpoint_of_the_base_model_stay() -> None:
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ulsam.insert(model, f"{LAST},{FIRST}", 4, input_size=SIZE)
    missing, unexpected = model.load_state_dict(before, strict=False)
    assert not unexpected and all(".ulsam." in name for name in missing) and missing
    new = {name for name, _ in model.named_parameters()} - set(dict(base().named_parameters()))
    assert new == set(missing)


@pytest.mark.parametrize("first", ["norm", "layer"])
def test_a_parametrized_module_and_an_insertion_behind_it_are_independent(first: str) -> None:
    model = randomised(base())
    model.bn2 = nn.Identity()  # or the layer would follow the BatchNorm
    conv = model.conv_head
    if first == "norm":
        parametrizations.weight_norm(conv)
    ulsam.insert(model, "conv_head", 4, input_size=SIZE)
    if first == "layer":
        parametrizations.weight_norm(conv)
    randomised(model.conv_head.ulsam)
    expected = model(images())
    assert_same(copy.deepcopy(model), model, 0)
    parametrize.remove_parametrizations(conv, "weight")
    torch.testing.assert_close(model(images()), expected)
    ulsam.undo(model)
    assert type(conv) is nn.Conv2d
    assert not torch.allclose(model(images()), expected)


# passes that fuse, convert and quantize


@EDITED
@pytest.mark.parametrize("transform", [torch.fx.symbolic_trace, fuse_by_fx], ids=["symbolic_trace", "fuse"])
def test_fx_keeps_the_layer(make: Callable[[], nn.Module], transform: Callable[[nn.Module], nn.Module]) -> None:
    model = randomised(make())
    assert_layer_matters(model)
    transformed = transform(copy.deepcopy(model))
    assert sum(isinstance(module, ULSAM) for module in transformed.modules()) == 2
    assert_same(transformed, model, 1e-5)


@pytest.mark.slow
@EDITED
@pytest.mark.filterwarnings("ignore")
def test_graph_mode_quantization_keeps_the_layer(make: Callable[[], nn.Module]) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = randomised(make())
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images(),))
    assert_same(prepared, model, 1e-5)
    quantized = convert_fx(prepared)
    layers = [module for module in quantized.modules() if isinstance(module, ULSAM)]
    assert len(layers) == 2
    with torch.no_grad():
        before = quantized(images())
        for layer in layers:  # each of them runs
            layer.depthwise.weight.mul_(-30)
            after = quantized(images())
            assert not torch.equal(before, after)
            before = after


class Small(nn.Module):
    """A convolution, its BatchNorm and an activation, and a block of these."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("place", ["conv", "bn", "relu", "tail"])
def test_eager_fusing_of_modules_keeps_the_layer_or_refuses(place: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomised(ulsam.insert(Small(), place, 2, input_size=SIZE))
    expected = model(images())
    try:
        fused = torch.ao.quantization.fuse_modules(copy.deepcopy(model), [["conv", "bn", "relu"]])
    except (NotImplementedError, AssertionError) as error:
        assert "LayerHost" in str(error)
        fused = torch.ao.quantization.fuse_modules(copy.deepcopy(model), [["tail.0", "tail.1"]])
    torch.testing.assert_close(fused(images()), expected)


@pytest.mark.parametrize("place", ["conv", "bn", "tail", "tail.1"])
def test_behind_a_convolution_that_a_batchnorm_follows_the_place_is_the_pair(place: str) -> None:
    model = Small()
    if place.startswith("tail"):  # the container holds the layer
        ulsam.insert(model, place, 2, input_size=SIZE)
        assert ulsam.edits_of(model) == ["insert tail g=2"]
    else:
        with pytest.warns(UserWarning, match=r"bn is a BatchNorm.*SyncBatchNorm"):
            ulsam.insert(model, place, 2, input_size=SIZE)
        assert ulsam.edits_of(model) == ["insert bn g=2"]
    randomised(model)
    assert_same(ulsam.fold(model, SIZE), model, 1e-5)
    assert_same(fuse_by_fx(copy.deepcopy(model)), model, 1e-5)
    if place.startswith("tail"):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
        assert_same(converted, model, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "repvit_m0_9",
        "mobileone_s0",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("levit_conv_128s", "fastvit_t8", "repghostnet_050")),
    ],
)
def test_timms_reparameterization_keeps_the_layers(name: str) -> None:
    torch.manual_seed(0)
    size = (3, 64, 64) if "levit" not in name else (3, 224, 224)
    model = timm.create_model(name, num_classes=5)
    children = {f"{stage}.{block}" for stage in "0123" for block in "01"}
    found = [c.name for c in ulsam.candidates(model, size)]
    places = [place for place in found if ".".join(place.split(".")[-2:]) in children][:2] or found[:2]
    ulsam.insert(model, places, 1, input_size=size)
    calibrated(model, size[1])  # or the outputs would hardly depend on the layers
    for layer in model.modules():
        if isinstance(layer, ULSAM):
            nn.init.normal_(layer.depthwise.weight, std=3)
    x = torch.randn(1, *size)
    with torch.no_grad():
        expected, plain = model(x), without_layer(model)(x)
        reparameterized = reparameterize_model(model)
        assert sum(isinstance(module, ULSAM) for module in reparameterized.modules()) == len(places)
        found_y = reparameterized(x)
    scale = float(expected.abs().max())
    assert float((found_y - expected).abs().max()) <= 1e-3 * scale < float((plain - expected).abs().max())


@pytest.mark.slow
def test_a_host_that_becomes_another_module_by_fuse_takes_the_layer_with_it() -> None:
    torch.manual_seed(0)
    model = timm.create_model("repvit_m0_9", num_classes=5)
    name = next(n for n, m in model.named_modules() if type(m).__name__ == "RepVggDw")
    ulsam.insert(model, name, 2, input_size=(3, 64, 64))
    randomised(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        fused = reparameterize_model(model)
    assert isinstance(fused.get_submodule(f"{name}.ulsam"), ULSAM) and isinstance(fused.get_submodule(name), nn.Conv2d)
    torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-3)
    for inside, block in ((f"{name}.conv", name), (f"{name}.conv.bn", f"{name}.conv")):
        with pytest.raises(UlsamError, match=f"lies inside {block}, which fuses"):
            ulsam.insert(timm.create_model("repvit_m0_9"), inside, 2, input_size=(3, 64, 64))


# wrapped models


class Forwarding(nn.Module):
    """A wrapper that looks like what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
@pytest.mark.parametrize("edit", [ulsam.replace, ulsam.insert, ulsam.remove])
def test_surgery_looks_through_wrappers(wrap: Callable[..., Any], edit: Callable[..., Any]) -> None:
    inner = base()
    wrapped = wrap(inner)
    assert edit(wrapped, LAST, input_size=SIZE) is wrapped
    assert ulsam.edits_of(wrapped) == ulsam.edits_of(inner) != []
    assert [c.name for c in ulsam.candidates(wrapped, SIZE)] == [c.name for c in ulsam.candidates(inner, SIZE)]
    ulsam.undo(wrapped)
    assert not ulsam.edits_of(inner)


def test_surgery_on_a_wrapper_of_another_kind_raises() -> None:
    wrapper = Forwarding(timm.create_model("mobilenetv2_035"))
    for edit in (ulsam.replace, ulsam.insert, ulsam.remove):
        with pytest.raises(UlsamError, match=r"no module of this Forwarding, which wraps the model: edit its \.inner"):
            edit(wrapper, "17", input_size=SIZE)
    assert not ulsam.edits_of(wrapper)
    ulsam.replace(wrapper, "inner.blocks.5.2", input_size=SIZE)
    assert ulsam.edits_of(wrapper) == ["replace inner.blocks.5.2 g=4"]


# exporters


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@EDITED_ONCE
@pytest.mark.parametrize(
    "dynamo", [pytest.param(True, marks=pytest.mark.slow, id="dynamo"), pytest.param(False, id="torchscript")]
)
@pytest.mark.filterwarnings("ignore")
def test_ones_own_onnx_export(make: Callable[[], nn.Module], dynamo: bool, tmp_path: Path) -> None:
    model, path, x = randomised(make()), tmp_path / "model.onnx", images()
    free: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch", 2: "height", 3: "width"}}, "input_names": ["x"]}
    if dynamo:
        free = {"dynamic_shapes": ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},), "verbose": False}
    torch.onnx.export(model, (x,), path, dynamo=dynamo, **free)
    assert {opset.domain for opset in onnx.load(path).opset_import} <= {"", "ai.onnx"}
    assert_same(lambda x: run_onnx(path, x), model)
    other = images(3, 32, 64)
    with torch.no_grad():
        expected = model(other)
    torch.testing.assert_close(run_onnx(path, other), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["equations", "folded"])
def test_a_layer_in_ones_own_onnx_file_is_few_nodes_without_loops(form: str, tmp_path: Path) -> None:
    layer = ULSAM(32, 4, form=form).eval()  # type: ignore[arg-type]
    path, x = tmp_path / "layer.onnx", torch.randn(2, 32, 7, 6)
    torch.onnx.export(
        layer, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)
    )
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert len(kinds) <= (11 if form == "equations" else 13), kinds
    assert not set(kinds) & {"Loop", "Scan", "If", "Split", "Concat", "Shape", "Reshape"}


@EDITED
@pytest.mark.filterwarnings("ignore")
def test_torchscript_by_both_ways(make: Callable[[], nn.Module]) -> None:
    model = randomised(make())
    classes = [type(module) for module in model.modules()]
    for program in (
        torch.jit.script(model),
        torch.jit.trace(model, images()),
        torch.jit.freeze(torch.jit.script(model)),
    ):
        assert "ulsam::" not in str(program.inlined_graph)
        assert_same(program, model)
    assert [type(module) for module in model.modules()] == classes  # scripting leaves the model as it is


WITHOUT_ULSAM = """
import sys, torch
sys.modules["ulsam"] = None  # importing it fails
x = torch.load(sys.argv[2])
for path in sys.argv[3:]:
    if path.endswith(".pt2a"):
        program = torch._inductor.aoti_load_package(path)
    elif path.endswith(".pt2"):
        program = torch.export.load(path).module()
    else:
        program = torch.jit.load(path)
    with torch.no_grad():
        torch.save(program(x), path + ".out")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_files_run_in_a_process_without_ulsam(tmp_path: Path) -> None:
    model, x = randomised(released()), images()
    torch.jit.script(model).save(tmp_path / "script.pt")
    torch.jit.trace(model, x).save(tmp_path / "trace.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    torch.save(x, tmp_path / "x")
    paths = [str(tmp_path / name) for name in ("script.pt", "trace.pt", "program.pt2")]
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_ULSAM, "x", str(tmp_path / "x"), *paths],
        env=environment, check=True, timeout=300,
    )  # fmt: skip
    for path in paths:
        assert_same(lambda _, path=path: torch.load(path + ".out"), model)


@EDITED_ONCE
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_export_takes_the_layer_apart(make: Callable[[], nn.Module], strict: bool) -> None:
    model, x = randomised(make()), images()
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: DYNAMIC},))
    assert "torch.ops.ulsam" not in program.graph_module.code
    assert_same(program.module(), model)
    assert_same(program.run_decompositions().module(), model)


@pytest.mark.slow
@EDITED_ONCE
def test_torch_export_of_a_model_in_training(make: Callable[[], nn.Module]) -> None:
    training = randomised(make()).train()
    exported = torch.export.export(copy.deepcopy(training), (images(4),)).module()
    torch.testing.assert_close(exported(images(4)), training(images(4)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ahead_of_time_compilation(tmp_path: Path) -> None:
    model, x = randomised(released()), images()
    program = torch.export.export(model, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    with torch.no_grad():
        assert_same(torch._inductor.aoti_load_package(path), model, 1e-5)


@pytest.mark.slow
@EDITED_ONCE
@pytest.mark.filterwarnings("ignore")
def test_openvino_converts_the_model_itself(make: Callable[[], nn.Module]) -> None:
    openvino = pytest.importorskip("openvino")
    model = randomised(make())
    converted = openvino.convert_model(model, example_input=images())
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_same(lambda x: torch.from_numpy(compiled(x.numpy())[0]), model, 1e-5)


@EDITED_ONCE
@pytest.mark.filterwarnings("ignore")
def test_executorch_takes_a_plain_export(make: Callable[[], nn.Module]) -> None:
    exir = pytest.importorskip("executorch.exir")
    runtime = pytest.importorskip("executorch.runtime")
    model, x = randomised(make()), images(1)
    program = torch.export.export(model, (x,)).run_decompositions()
    buffer = exir.to_edge_transform_and_lower(program).to_executorch().buffer
    method = runtime.Runtime.get().load_program(bytes(buffer)).load_method("forward")
    with torch.no_grad():
        torch.testing.assert_close(method.execute([x])[0], model(x), rtol=1e-3, atol=1e-3)


@EDITED_ONCE
@pytest.mark.filterwarnings("ignore")
def test_coremltools_takes_a_plain_export(make: Callable[[], nn.Module]) -> None:
    coremltools = pytest.importorskip("coremltools")
    program = torch.export.export(randomised(make()), (images(1),)).run_decompositions({})
    converted = coremltools.convert(program, convert_to="mlprogram", minimum_deployment_target=coremltools.target.iOS17)
    kinds = [op.op_type for op in next(iter(converted._mil_program.functions.values())).operations]
    assert kinds.count("max_pool") == 2 and "softmax" not in kinds and kinds.count("reduce_max") == 2


# what hangs on the layer's parts


def layer(form: str = "equations") -> ULSAM:
    torch.manual_seed(0)
    made = ULSAM(16, 4, form=form)  # type: ignore[arg-type]
    return randomised(made)  # type: ignore[return-value]


FEATURES = torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("form", ["equations", "released"])
@pytest.mark.parametrize(
    "change",
    [
        lambda part: prune.l1_unstructured(part, "weight", 0.5),
        lambda part: prune.random_structured(part, "weight", 0.5, dim=0),
        pytest.param(
            lambda part: nn.utils.weight_norm(part), marks=pytest.mark.filterwarnings("ignore::FutureWarning")
        ),
        lambda part: parametrizations.weight_norm(part),
        lambda part: parametrizations.spectral_norm(part),
    ],
    ids=["prune", "prune channels", "old weight_norm", "weight_norm", "spectral_norm"],
)
def test_pruned_and_normalized_weights_are_those_that_are_used(change: Callable[[nn.Module], Any], form: str) -> None:
    model = layer(form)
    for part in (model.depthwise, model.pointwise):
        change(part)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # the second backward pass raised where the weights were those of the first
        optimizer.zero_grad()
        model(FEATURES).square().sum().backward()
        optimizer.step()
    model.eval()
    y = model(FEATURES)
    with torch.no_grad():
        inference = model(FEATURES)
    fresh = layer(form)
    state = {name: value for name, value in model.state_dict().items() if name in fresh.state_dict()}
    fresh.load_state_dict(state, strict=False)
    for name in ("depthwise", "pointwise"):
        getattr(fresh, name).weight.data.copy_(getattr(model, name).weight)
    torch.testing.assert_close(y, fresh(FEATURES))
    torch.testing.assert_close(inference, fresh(FEATURES))
    torch.testing.assert_close(model.attention(FEATURES), fresh.attention(FEATURES))


def test_counters_that_hang_on_modules_count_both_convolutions() -> None:
    model, macs = layer(), []

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        macs.append(output.numel() * module.weight[0].numel())  # type: ignore[index, union-attr]

    handles = [part.register_forward_hook(count) for part in model.modules() if isinstance(part, nn.Conv2d)]
    hooked = model(FEATURES)
    assert sum(macs) == 2 * FEATURES.numel()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(hooked, model(FEATURES))


def test_pytorchs_counter_counts_the_layer_in_both_directions() -> None:
    model, x = layer(), FEATURES.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() == 4 * x.numel()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() >= 8 * x.numel()  # PyTorch counts the weights of grouped convolutions as whole


def test_gradient_hooks_on_the_parts_run() -> None:
    model, seen = layer(), []
    model.depthwise.register_full_backward_hook(lambda *_: seen.append("backward"))
    model(FEATURES.clone().requires_grad_()).sum().backward()
    assert seen == ["backward"]


# pruning of channels


@pytest.mark.parametrize("form", ["equations", "released"])
def test_a_layer_of_fewer_channels_is_what_is_left_of_it(form: str) -> None:
    model = layer(form)
    kept = [0, 3, 5, 6, 8, 11, 14, 15]
    small = copy.deepcopy(model)
    keep_channels(small, kept)
    silent = copy.deepcopy(model)  # with the other channels' part in the maps taken out
    with torch.no_grad():
        gone = [channel for channel in range(16) if channel not in kept]
        silent.pointwise.weight.view(-1)[gone] = 0
    torch.testing.assert_close(small(FEATURES[:, kept]), silent(FEATURES)[:, kept])
    assert small.train()(FEATURES[:, kept]).shape == (2, 8, 6, 5)
    fresh = ULSAM(8, 4, form=form)  # type: ignore[arg-type]
    fresh.load_state_dict(small.state_dict())
    for wrong in ([], [0, 1, 2, 4], list(range(4))):
        with pytest.raises(UlsamError, match="every subspace must keep as many channels"):
            keep_channels(copy.deepcopy(model), wrong)


@pytest.mark.parametrize("make", [inserted, replaced, released])
def test_torch_pruning_prunes_every_subspace_alike(make: Callable[[], nn.Module]) -> None:
    tp = pytest.importorskip("torch_pruning")
    model = randomised(make())
    options = {"importance": tp.importance.MagnitudeImportance(), "ignored_layers": [model.classifier]}
    before = sum(parameter.numel() for parameter in model.parameters())
    channels = [part.channels for part in model.modules() if isinstance(part, ULSAM)]
    groups = [part.groups for part in model.modules() if isinstance(part, ULSAM)]
    pruners = customized_pruners(model)
    tp.pruner.BasePruner(model, images(1), pruning_ratio=0.5, customized_pruners=pruners, **options).step()
    layers = [part for part in model.modules() if isinstance(part, ULSAM)]
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.8 * before
    assert [part.channels for part in layers] == [number // 2 for number in channels]
    assert [part.groups for part in layers] == groups
    model.train()(images(4)).sum().backward()
    assert all(part.depthwise.weight.grad.abs().sum() > 0 for part in layers)


def test_without_its_pruner_torch_pruning_makes_a_model_that_refuses_to_run() -> None:
    tp = pytest.importorskip("torch_pruning")
    model = randomised(replaced())
    options = {"importance": tp.importance.MagnitudeImportance(), "ignored_layers": [model.classifier]}
    tp.pruner.BasePruner(model, images(1), pruning_ratio=0.5, **options).step()
    with pytest.raises(UlsamError, match=r"ULSAM takes a feature map \[B, 16, H, W\]"):
        model(images(1))


# hosts of unusual kinds


class Named(nn.Module):
    """Calls its block by the name of the argument, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(input=x))


def test_a_host_may_be_called_by_keyword_and_scripted() -> None:
    model = Named()
    expected = nn.ReLU()(model.conv(images()))
    attach_layer(model.conv, nn.ReLU())
    torch.testing.assert_close(model.conv(input=images()), expected)
    torch.testing.assert_close(torch.jit.script(model.conv)(images()), expected)
    up = nn.ConvTranspose2d(3, 8, 3)  # has an optional second argument
    attach_layer(up, nn.ReLU())
    torch.testing.assert_close(torch.jit.script(up)(images()), up(images()))
    torch.testing.assert_close(up(images(), [100, 100][:0] or None), up(images()))


def test_a_patch_of_the_hosts_class_takes_effect() -> None:
    class Patched(Small):
        pass

    model = Patched()
    attach_layer(model, nn.Sigmoid())
    Patched.forward = lambda self, x: self.conv(x)  # type: ignore[method-assign]
    torch.testing.assert_close(model(images()), model.conv(images()).sigmoid())


def test_a_forward_that_hangs_on_a_part_runs() -> None:
    model = layer()
    wrapped, calls = model.depthwise.forward, []
    model.depthwise.forward = lambda x: calls.append(1) or wrapped(x) * 3  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        y = model(FEATURES)
    del model.depthwise.forward
    model.depthwise.weight.data *= 3
    assert calls
    torch.testing.assert_close(y, model(FEATURES))


class Switching(nn.Sequential):
    def other(self, x: Tensor) -> Tensor:
        return 2 * nn.Sequential.forward(self, x)


def test_a_container_whose_forward_is_another_one_is_refused() -> None:
    host = Switching(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    host.forward = host.other  # type: ignore[method-assign]
    expected = host(images())
    with pytest.raises(UlsamError, match="would no longer run"):
        attach_layer(host, nn.ReLU())
    torch.testing.assert_close(host(images()), expected)
    plain = Switching(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    attach_layer(plain, nn.ReLU())
    with pytest.raises(UlsamError, match="would no longer run"):
        plain.forward = plain.other  # type: ignore[method-assign]
    assert not is_followed(plain[:2])


def test_what_wraps_the_forward_around_the_layer_keeps_it_and_is_taken_off_before_the_undoing() -> None:
    model = randomised(inserted())
    expected = model(images())
    host = model.blocks[2][1]
    present = host.forward

    @functools.wraps(present)
    def logged(*args: Any, **kwargs: Any) -> Any:
        return present(*args, **kwargs)

    host.forward = logged
    torch.testing.assert_close(model(images()), expected)
    edits = ulsam.edits_of(model)
    with pytest.raises(UlsamError, match="take its hook off"):
        ulsam.undo(model)
    assert ulsam.edits_of(model) == edits  # none was undone
    host.forward = present
    ulsam.undo(model)
    with pytest.raises(UlsamError, match="would no longer run"):
        attach_layer(host, nn.ReLU())
        host.forward = lambda x: x


def test_accelerates_hooks_run_and_so_does_the_layer() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model = randomised(inserted())
    host = model.blocks[2][1]
    x = torch.randn(1, 24, 3, 3)
    expected = host(x)
    hooks.add_hook_to_module(host, Doubling())
    torch.testing.assert_close(host(x), 2 * expected)
    hooks.remove_hook_from_module(host)
    torch.testing.assert_close(host(x), expected)
    part = host.ulsam.depthwise
    hooks.add_hook_to_module(part, Doubling())
    hooked = host.ulsam(x)
    hooks.remove_hook_from_module(part)
    part.weight.data *= 2
    torch.testing.assert_close(hooked, host.ulsam(x))


def test_modules_that_are_compiled_by_themselves_are_refused() -> None:
    compiled = nn.Sequential(torch.compile(nn.Sequential(nn.Conv2d(3, 8, 1)), backend="aot_eager"), nn.Sigmoid())
    traced = nn.Sequential(torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1))), nn.Sigmoid())
    for model in (compiled, traced):
        with pytest.raises(UlsamError, match="is compiled or traced by itself"):
            ulsam.insert(model, "0", 2, input_size=SIZE)
        assert not ulsam.edits_of(model)


def test_a_wrapper_that_synchronizes_gradients_is_refused(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(base())
        with pytest.raises(UlsamError, match="edit the model before DistributedDataParallel wraps it"):
            ulsam.insert(wrapped, LAST, 4, input_size=SIZE)
    finally:
        dist.destroy_process_group()


class Shortcut(nn.Module):
    """The norm is on one of two branches behind the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.norm(x).relu()


def test_a_convolution_that_others_read_too_is_its_own_place() -> None:
    model = ulsam.insert(Shortcut(), "conv", 2, input_size=SIZE)
    assert ulsam.edits_of(model) == ["insert conv g=2"]


def test_edits_are_all_made_or_none() -> None:
    model = ulsam.replace(base(), SECOND, 4, input_size=SIZE)
    with pytest.raises(UlsamError, match="no module is named"):
        ulsam.apply(model, [f"insert {SECOND} g=2", f"replace {LAST}", "replace nosuch"], input_size=SIZE)
    assert ulsam.edits_of(model) == ["replace blocks.1.2 g=4"]


def test_an_edit_in_inference_mode_can_be_trained() -> None:
    model = base()
    with torch.inference_mode():
        ulsam.insert(model, LAST, 4, input_size=SIZE)
    model(images()).square().sum().backward()
    gradients = [parameter.grad for parameter in model.blocks[2][1].ulsam.parameters()]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_half_precision_maps_of_a_large_image_are_no_zeros() -> None:
    model = ULSAM(4, 2).half().eval()
    x = torch.ones(1, 4, 300, 300, dtype=torch.float16)
    maps = model._maps(x)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(1, 2), rtol=1e-2, atol=1e-2)


def test_the_attention_of_pruned_weights_in_training_trains_them_and_moves_no_statistics() -> None:
    model = layer("released").train()
    prune.l1_unstructured(model.depthwise, "weight", 0.5)
    model(FEATURES).sum().backward()
    before = [buffer.clone() for buffer in model.buffers()]
    model.zero_grad()
    model.attention(FEATURES).square().sum().backward()
    assert model.pointwise.weight.grad.abs().sum() > 0
    assert all(torch.equal(buffer, old) for buffer, old in zip(model.buffers(), before, strict=True))
    with pytest.raises(UlsamError, match=r"take it off first, as by prune\.remove"):
        model.fold()


def test_torch_pruning_refuses_a_layer_that_its_graph_hides() -> None:
    pytest.importorskip("torch_pruning")
    model = ulsam.insert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)), "0", 4, input_size=SIZE)
    with pytest.raises(UlsamError, match="would not see the layer inserted behind 0, a Conv2d"):
        customized_pruners(model)
