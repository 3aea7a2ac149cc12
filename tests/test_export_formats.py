"""Files for phones and in half precision: they are the model too, and say what they are."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import nn

from tiny import TINY_MODEL, draw_splits
from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.deploy.export import SUFFIXES, engine_of, export, format_of
from ulsam.deploy.onnx_graph import with_attention
from ulsam.deploy.openvino_core import openvino_core
from ulsam.deploy.parity import HALF_TOLERANCE
from ulsam.model.build import build, load, make_spec, save
from ulsam.model.spec import Edit
from ulsam.surgery.fold import fold
from ulsam.training.evaluate import spec_transform

PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
CLASSES = ("class0", "Zaunkönig", "class2")
INSERTED = [Edit("insert", "blocks.1.0", 4, "released"), Edit("insert", "blocks.2.0", 8)]
REPLACED = [Edit("replace", "14", 4, "released"), Edit("replace", "17", 4)]
MODELS = {
    "inserted": make_spec(TINY_MODEL, CLASSES, INSERTED, size=48),
    "replaced": make_spec("mobilenetv2_050", CLASSES, REPLACED, size=64),
}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["inserted", pytest.param("replaced", marks=pytest.mark.slow)])
def saved(request, tmp_path_factory) -> Path:
    """A model file with both forms of the layer, whose weights are of either sign and whose answers differ."""
    torch.manual_seed(0)
    spec = MODELS[request.param]
    model, _ = build(spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    nn.init.normal_(model.get_submodule("classifier").weight)
    path = tmp_path_factory.mktemp("formats") / "model.safetensors"
    save(model, spec, path)
    return path


def images_for(path: Path) -> np.ndarray:
    """RGB bytes [4, H, W, 3] at the model's size."""
    _, height, width = load(path)[1].input_size
    return IMAGES[:, :height, :width]


def outputs(path: Path, images: np.ndarray) -> np.ndarray:
    """The model's own outputs, not folded."""
    model, spec = load(path)
    with torch.no_grad():
        return model.eval()(spec_transform(spec).normalize(torch.from_numpy(images))).numpy()


def near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return found.shape == expected.shape and np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def file_size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def is_half(found: np.ndarray, whole: np.ndarray) -> bool:
    return found.dtype == np.float16 and np.array_equal(found, whole.astype(np.float16))


def ran(package: str) -> dict[str, Any]:
    """The names of the page's example that imports this package, which is run in this folder."""
    (example,) = (text for text in re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.M | re.S) if package in text)
    names: dict[str, Any] = {}
    exec(compile(example, PAGE.name, "exec"), names)
    return names


def test_the_suffix_means_the_format():
    assert [format_of(f"runs/a{suffix}") for suffix in SUFFIXES.values()] == list(SUFFIXES)
    with pytest.raises(UlsamError, match=r"^a\.pt: a file is called NAME\.onnx, .* or NAME\.tflite$"):
        format_of("a.pt")


def test_half_is_float16_inside_and_float32_outside(saved, tmp_path, capsys):
    assert main(["export", str(saved), "--half", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    file = saved.with_name("model-fp16.onnx")
    assert (said["file"], said["format"], said["bytes"]) == (str(file), "onnx", file.stat().st_size)
    assert said["parity"]["same"] == 16
    export(saved, tmp_path / "whole.onnx")
    assert file.stat().st_size == pytest.approx((tmp_path / "whole.onnx").stat().st_size / 2, rel=0.08)

    made, whole = onnx.load(file), onnx.load(tmp_path / "whole.onnx")
    onnx.checker.check_model(made, full_check=True)
    types = [value.type.tensor_type.elem_type for value in (*made.graph.input, *made.graph.output)]
    assert types == [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT]
    computing = [node for node in made.graph.node if node.op_type in ("Conv", "Gemm")]
    weights, before = ({one.name: to_array(one) for one in it.graph.initializer} for it in (made, whole))
    others = [node for node in whole.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(computing) == len(others) > 20
    for node, other in zip(computing, others, strict=True):
        assert all(is_half(weights[a], before[b]) for a, b in zip(node.input[1:], other.input[1:], strict=True))

    opened = runtime.load(file)
    assert opened.metadata["precision"] == "float16"
    assert "precision" not in runtime.load(tmp_path / "whole.onnx").metadata
    found, expected = opened.logits(images_for(saved)), outputs(saved, images_for(saved))
    assert found.dtype == np.float32
    assert near(found, expected, HALF_TOLERANCE) and not near(found, expected, 1e-5)


@pytest.mark.slow
def test_half_takes_open_sizes_and_normalized_images(tmp_path):
    spec = MODELS["inserted"]
    model = build(spec)[0].eval()
    export(model, tmp_path / "a.onnx", spec=spec, half=True, dynamic_size=True, preprocessing=False)
    images = IMAGES[:, :60, :40]
    normalized = spec_transform(spec).normalize(torch.from_numpy(images))
    with torch.no_grad():
        expected = model(normalized).numpy()
    assert near(runtime.load(tmp_path / "a.onnx").logits(images), expected, HALF_TOLERANCE)


@pytest.mark.slow
def test_openvino_stores_weights_in_half(tmp_path):
    pytest.importorskip("openvino")
    spec = MODELS["inserted"]
    model = build(spec)[0].eval()
    for name, half in (("whole", False), ("half", True)):
        assert export(model, tmp_path / f"{name}.xml", spec=spec, half=half).same == 16
    assert file_size(tmp_path / "half.bin") == pytest.approx(file_size(tmp_path / "whole.bin") / 2, rel=0.02)
    read = openvino_core().read_model(tmp_path / "half.xml")
    assert read.get_rt_info(["ulsam", "precision"]).value == "float16"
    run = openvino_core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels = IMAGES[:, :48, :48]
    with torch.no_grad():
        expected = model(spec_transform(spec).normalize(torch.from_numpy(pixels))).numpy()
    assert near(run(pixels)[0], expected, HALF_TOLERANCE)


@pytest.mark.slow
def test_a_signal_after_two_exports_to_openvino_is_handled() -> None:
    """As by a training in the same notebook; two cores, freed in the order of their making, end the process."""
    pytest.importorskip("openvino")
    program = (
        "import gc, signal, torch\n"
        "from torch import nn\n"
        "from ulsam.deploy.engines import openvino_engine\n"
        "def convert(): return openvino_engine(nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8), {}, {}, False)\n"
        "signal.signal(signal.SIGINT, lambda *_: print('handled'))\n"
        "first, second = convert(), convert()\n"
        "del first; gc.collect(); del second; gc.collect()\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    run = subprocess.run([sys.executable, "-X", "faulthandler", "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "handled\n"), run.stderr


def test_what_float16_cannot_hold_is_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[3].weight *= 1e6
    spec = make_spec(TINY_MODEL, CLASSES, size=48)
    assert export(model, tmp_path / "whole.onnx", spec=spec).same == 16
    with pytest.raises(UlsamError, match="the model for onnx gives other outputs than the model: 16 generated images"):
        export(model, tmp_path / "half.onnx", spec=spec, half=True)
    with pytest.raises(UlsamError, match="ExecuTorch is in float32"):
        export(model, tmp_path / "half.pte", spec=spec, half=True)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.onnx"]


def test_a_file_in_half_precision_is_not_quantized(tmp_path, capsys):
    spec = make_spec(TINY_MODEL, ("class0", "class1"), size=32)
    export(build(spec)[0], tmp_path / "half.onnx", spec=spec, half=True)
    draw_splits(tmp_path / "data", train=1, val=1, classes=2, size=32)
    words = ["quantize", str(tmp_path / "half.onnx"), str(tmp_path / "data")]
    assert main(words) == 2
    assert "half.onnx is in float16: name the file in float32, or the model file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "half", [pytest.param(False, id="float32"), pytest.param(True, id="half", marks=pytest.mark.slow)]
)
def test_bytes_go_into_a_cast_and_nowhere_else(half):
    """TensorRT has no other operation on bytes."""
    spec = MODELS["inserted"]
    graph = onnx.load_from_string(engine_of(build(spec)[0], spec, half=half).files[".onnx"]).graph
    assert [node.op_type for node in graph.node if graph.input[0].name in node.input] == ["Cast"]


@pytest.mark.slow
def test_the_page_names_the_nodes_that_tensorrt_is_given():
    (said,) = re.findall(r"^- \*\*Nodes\.\*\*(.*?)^- ", PAGE.read_text(), re.M | re.S)
    spec = MODELS["replaced"]
    graph = onnx.load_from_string(engine_of(build(spec)[0], spec, half=True).files[".onnx"]).graph
    assert {node.op_type for node in graph.node} == set(re.findall(r"`(\w+)`", said))
    assert {node.domain for node in graph.node} == {""}


def test_without_its_package_a_format_says_what_to_install(tmp_path, capsys):
    for package, name, extra in [("coremltools", "a.mlpackage", "coreml"), ("litert_torch", "a.tflite", "tflite")]:
        try:
            __import__(package)
        except ImportError:
            spec = make_spec(TINY_MODEL, CLASSES, size=32)
            with pytest.raises(UlsamError, match=rf"needs.* {package}, which is not .*pip install 'ulsam\[{extra}\]'"):
                export(build(spec)[0], tmp_path / name, spec=spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "half", [pytest.param(False, id="float32"), pytest.param(True, id="half", marks=pytest.mark.slow)]
)
def test_core_ml_has_the_models_weights_and_operations(saved, half, tmp_path, monkeypatch, capsys):
    """Its program and weights are read back from the package, and computed operation by operation."""
    pytest.importorskip("coremltools")
    import core_ml

    package = tmp_path / "model.mlpackage"
    for _ in range(2):  # the second one takes the place of the first
        assert main(["export", str(saved), "--out", str(package), *["--half"] * half]) == 0
    wrote, compared = capsys.readouterr().out.splitlines()[-2:]
    assert wrote == f"wrote     {package}, {file_size(package):,} bytes"
    assert compared.startswith("not compared: Core ML runs on macOS alone") or "the same first class for 16" in compared
    assert [path.name for path in tmp_path.iterdir()] == ["model.mlpackage"]
    assert {path.name for path in package.iterdir()} == {"Manifest.json", "Data"}

    spec = load(saved)[1]
    about = core_ml.described(package)
    (given,), (output,) = about.input, about.output
    _, height, width = spec.input_size
    assert (given.name, given.type.imageType.height, given.type.imageType.width) == ("pixels", height, width)
    assert (output.name, list(output.type.multiArrayType.shape)) == ("logits", [1, len(CLASSES)])
    notes = dict(about.metadata.userDefined)
    assert json.loads(notes["classes"]) == list(CLASSES)
    assert (notes["spec"], notes.get("precision")) == (spec.to_json(), "float16" if half else None)
    assert json.loads(notes["preprocessing"])["mean"] == list(spec.mean)
    monkeypatch.chdir(tmp_path)
    assert ran("coremltools")["classes"] == list(CLASSES)
    assert not any(
        word in file.read_bytes() for file in package.rglob("*") if file.is_file() for word in (b".py", b"/tmp")
    )

    operations = core_ml.program(package).operations
    plain, names = with_attention(fold(load(saved)[0], spec.input_size, channels_last=False))
    assert len(names) == 2
    kinds = [op.op_type for op in operations]
    assert kinds.count("softmax") == kinds.count("max_pool") == 2
    assert set(kinds) & {"split", "concat", "gather", "slice_by_index", "while_loop", "cond"} == set()
    wanted = [part for part in plain.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    found = [op for op in operations if op.op_type in ("conv", "linear")]
    assert len(found) == len(wanted) > 20
    for op, part in zip(found, wanted, strict=True):
        for tensor, own in ((op.weight, part.weight), (op.bias, part.bias)):
            assert (tensor is None) == (own is None)
            if own is not None:
                exact = own.detach().numpy()
                assert is_half(tensor.val, exact) if half else np.array_equal(tensor.val, exact)

    images = images_for(saved)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    logits = torch.cat([core_ml.run(package, image[None]) for image in pixels])
    assert logits.dtype == torch.float32
    assert near(logits.numpy(), outputs(saved, images), HALF_TOLERANCE if half else 1e-4)


def test_core_ml_takes_normalized_arrays(tmp_path):
    pytest.importorskip("coremltools")
    import core_ml

    spec = MODELS["inserted"]
    model = build(spec)[0].eval()
    parity = export(model, tmp_path / "a.mlpackage", spec=spec, preprocessing=False)
    assert parity.images == 16 or (parity.images == 0 and "macOS" in str(parity) and not parity.within(1))
    (given,) = core_ml.described(tmp_path / "a.mlpackage").input
    assert (given.name, list(given.type.multiArrayType.shape)) == ("x", [1, 3, 48, 48])
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert near(core_ml.run(tmp_path / "a.mlpackage", x).numpy(), model(x).numpy(), 1e-4)


def test_core_ml_replaces_packages_alone(tmp_path):
    """A folder with other things in it stays, and a model that cannot be exported leaves no file."""
    pytest.importorskip("coremltools")
    spec = make_spec(TINY_MODEL, CLASSES, size=48)
    folder = tmp_path / "mine.mlpackage"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(UlsamError, match=r"cannot write .*mine\.mlpackage: it is a folder"):
        export(model, folder, spec=spec)
    with pytest.raises(UlsamError, match="for one size"):
        export(model, tmp_path / "a.mlpackage", spec=spec, dynamic_size=True)
    with pytest.raises(UlsamError, match=r"^this FromImage cannot be exported to Core ML: [^\n]*$"):
        export(nn.Sequential(model, Strange()), tmp_path / "a.mlpackage", spec=spec)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine.mlpackage", "notes.txt"]


class Strange(nn.Module):
    """Something that Core ML has no operation for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.special.bessel_j0(x)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
def test_litert_runs_the_file(saved, half, tmp_path, monkeypatch, capsys):
    pytest.importorskip("litert_torch")
    from ai_edge_litert.interpreter import Interpreter

    file = tmp_path / "model.tflite"
    assert main(["export", str(saved), "--to", "tflite", "--out", str(file), *["--half"] * half]) == 0
    assert "compared  16 generated images: the same first class for 16" in capsys.readouterr().out
    interpreter = Interpreter(model_path=str(file))
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["pixels"], "outputs": ["logits"]}}
    runner = interpreter.get_signature_runner()
    assert runner.get_input_details()["pixels"]["dtype"] is np.uint8
    images = images_for(saved)
    found = np.concatenate([runner(pixels=image[None])["logits"] for image in images])
    assert near(found, outputs(saved, images), HALF_TOLERANCE if half else 1e-4)

    monkeypatch.chdir(tmp_path)
    black = outputs(saved, np.zeros_like(images[:1]))
    assert ran("ai_edge_litert")["found"] == CLASSES[black.argmax()]

    kinds = {entry["op_name"] for entry in interpreter._get_ops_details()}
    assert {"SOFTMAX", "MAX_POOL_2D", "CONV_2D", "DEPTHWISE_CONV_2D"} <= kinds
    assert not any(kind.startswith(("Flex", "STABLEHLO", "GATHER", "SPLIT", "WHILE")) for kind in kinds)
    assert (np.float16 in {entry["dtype"] for entry in interpreter.get_tensor_details()}) == half
    assert file_size(file) < (0.75 if half else 1.35) * saved.stat().st_size
    with zipfile.ZipFile(file) as archive:
        notes = {name: archive.read(name).decode() for name in archive.namelist()}
    assert json.loads(notes["classes"]) == list(CLASSES)
    assert (notes["spec"], notes.get("precision")) == (load(saved)[1].to_json(), "float16" if half else None)


@pytest.mark.slow
def test_litert_takes_normalized_arrays_of_one_size(tmp_path):
    pytest.importorskip("litert_torch")
    from ai_edge_litert.interpreter import Interpreter

    spec = MODELS["inserted"]
    model = build(spec)[0].eval()
    with pytest.raises(UlsamError, match="for one size"):
        export(model, tmp_path / "a.tflite", spec=spec, dynamic_size=True)
    assert export(model, tmp_path / "a.tflite", spec=spec, preprocessing=False).same == 16
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = model(x).numpy()
    found = Interpreter(model_path=str(tmp_path / "a.tflite")).get_signature_runner()(x=x.numpy())["logits"]
    assert near(found, expected, 1e-4)
