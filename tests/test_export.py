"""What is exported is what the model is: ULSAM's graph against the definition, whole files against the model."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import ulsam
from tiny import TINY_MODEL, draw
from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.preprocessing import Preprocessing
from ulsam.deploy.export import export
from ulsam.deploy.onnx_graph import ATTENTION, onnx_graph
from ulsam.deploy.openvino_core import openvino_core
from ulsam.deploy.parity import Parity, compared, read_images
from ulsam.layer.ops.reference import subspace_attention
from ulsam.model.build import build, load, make_spec, save
from ulsam.model.spec import Edit, ModelSpec
from ulsam.training.evaluate import spec_transform

CLASSES = ("wren", "Zaunkönig", "finch")
SPEC = make_spec(TINY_MODEL, CLASSES, size=48)
GROUPS = (1, 4, 16, 32)


def layers(form: str) -> nn.Sequential:
    """One folded layer of 32 channels for each number of groups, with weights of either sign."""
    torch.manual_seed(0)
    made = [ulsam.ULSAM(32, groups, form=form) for groups in GROUPS]
    for layer in made:
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        for name, buffer in layer.named_buffers():
            if "running" in name:
                nn.init.uniform_(buffer, 0.5, 2)
    return nn.Sequential(*[layer.eval().fold() for layer in made]).eval()


def exactly(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """What the layers output by the definition, in float64."""
    x = x.double()
    for layer in model:
        scale, shift, weight, bias, norms, eps = layer._operands()
        values = [None if value is None else value.detach().double() for value in (scale, shift, weight, bias)]
        x, _ = subspace_attention(x, *values, norms, layer.groups, layer.form != "equations", eps)
    return x


@pytest.mark.parametrize(
    ("form", "free"),
    [
        pytest.param("equations", {0: "batch"}, marks=pytest.mark.slow),
        ("equations", {0: "batch", 2: "height", 3: "width"}),
        ("released", {0: "batch"}),
        pytest.param("released", {0: "batch", 2: "height", 3: "width"}, marks=pytest.mark.slow),
    ],
    ids=["equations-fixed", "equations-dynamic", "released-fixed", "released-dynamic"],
)
def test_a_layer_is_few_nodes_that_follow_the_definition(form, free):
    model = layers(form)
    graph = onnx_graph(model, torch.zeros(2, 32, 7, 6), free)
    onnx.checker.check_model(graph, full_check=True)
    nodes = graph.graph.node
    assert not {node.op_type for node in nodes} & {"Loop", "Scan", "If", "Split", "Concat", "Slice", "Gather"}
    for place in range(len(GROUPS)):
        own = [node.op_type for node in nodes if node.name.startswith(f"{place}/{ATTENTION}/")]
        dynamic = len(free) == 3
        softmax = {"Div", "Exp", "ReduceMax", "ReduceSum", "Sub"} if dynamic else {"Reshape", "Softmax"}
        assert len(own) == 8 + 2 * (form == "released") + 2 * dynamic
        assert set(own) - {"Relu"} == {"Conv", "MaxPool", "Mul"} | softmax
    assert len({node.name for node in nodes}) == len(nodes)

    inferred = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True).graph
    known = {value.name: value.type.tensor_type for value in [*inferred.value_info, *inferred.output]}
    assert all(output in known for node in nodes for output in node.output)
    dims = [dim.dim_param or dim.dim_value for dim in known["logits"].shape.dim]
    assert dims == (["batch", 32, "height", "width"] if len(free) == 3 else ["batch", 32, 7, 6])

    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for size in [(7, 6), (1, 1), (13, 4)][: 3 if len(free) == 3 else 1]:
        for scale in (1.0, 1e-4, 1e4):
            for batch in (1, 3):
                x = scale * torch.randn(batch, 32, *size)
                (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
                expected = exactly(model, x).numpy()
                assert np.isfinite(found).all()
                if scale <= 1:
                    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    for value in (1e4, -1e4):  # a flat map is multiplied by 1 + 1 / (H * W), whatever its height
        flat = np.full((2, 32, 7, 6), value, np.float32)
        (found,) = session.run(None, {session.get_inputs()[0].name: flat})
        assert np.abs(found / flat - (1 + 1 / 42) ** len(GROUPS)).max() <= 1e-5


def test_a_wide_layer_is_no_more_nodes():
    """Its weights are above what the exporter folds by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(ulsam.ULSAM(2048, 8, form="released").eval().fold())
    made = onnx_graph(model, torch.zeros(2, 2048, 3, 2), {0: "batch"})
    assert len(made.graph.node) == 10
    x = torch.randn(2, 2048, 3, 2)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, exactly(model, x).numpy(), rtol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model with both forms of the layer, whose images get different answers."""
    torch.manual_seed(0)
    edits = [Edit("insert", "blocks.1.0", 4, "released"), Edit("insert", "blocks.2.0", 8)]
    spec = make_spec(TINY_MODEL, CLASSES, edits, size=48)
    built, _ = build(spec)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    nn.init.normal_(built.get_submodule("classifier").weight)
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    save(built, spec, path)
    return path


@pytest.fixture
def small() -> nn.Module:
    """A model that is exported at once, with both forms of the layer."""
    torch.manual_seed(0)
    attention = [ulsam.ULSAM(8, 2, form="released"), ulsam.ULSAM(8)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), *attention, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model.append(nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw(folder, 3, size=60)
    (folder / "class0" / "broken.png").write_bytes(b"no image")
    return folder


def outputs(model: nn.Module, spec: ModelSpec, images: np.ndarray) -> np.ndarray:
    """The model's own outputs for bytes [B, H, W, 3]."""
    with torch.no_grad():
        return model(spec_transform(spec).normalize(torch.from_numpy(images))).numpy()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_the_file_is_the_model_and_says_what_it_is(model, images, capsys):
    assert main(["export", str(model), "--images", str(images)]) == 0
    out = model.with_suffix(".onnx")
    wrote, compared = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote     {out}, {out.stat().st_size:,} bytes"
    assert compared.startswith("compared  9 images: the same first class for 9, largest difference of a logit ")

    made = onnx.load(out)
    onnx.checker.check_model(made, full_check=True)
    (given,), (output,) = made.graph.input, made.graph.output
    dims = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (given, output)]
    assert (given.name, output.name, dims) == ("pixels", "logits", [["batch", 48, 48, 3], ["batch", 3]])
    notes = {entry.key: entry.value for entry in made.metadata_props}
    spec = load(model)[1]
    assert json.loads(notes["classes"]) == list(CLASSES)
    assert (notes["spec"], notes["ulsam_version"]) == (spec.to_json(), ulsam.__version__)
    look = Preprocessing.from_json(notes["preprocessing"])
    assert (look.size, look.interpolation, look.crop_pct) == ((48, 48), spec.interpolation, spec.crop_pct)
    assert b".py" not in out.read_bytes()  # where the code lay is nobody's business

    opened = runtime.load(out)
    for batch in (1, 5):
        pixels = noise(batch, 48, 48)
        np.testing.assert_allclose(opened.logits(pixels), outputs(*load(model), pixels), atol=1e-4)
    with pytest.raises(UlsamError, match=r"the model does not take uint8 \[1, 64, 64, 3\]"):
        opened.logits(noise(1, 64, 64))


@pytest.mark.slow
def test_height_and_width_may_be_left_open(small, tmp_path):
    parity = export(small, tmp_path / "open.onnx", spec=SPEC, dynamic_size=True)
    assert (parity.images, parity.same, parity.drawn) == (20, 20, True)  # 4 of them at another size
    model = runtime.load(tmp_path / "open.onnx")
    for size in [(48, 48), (33, 80), (129, 64)]:
        images = noise(2, *size)
        np.testing.assert_allclose(model.logits(images), outputs(small, SPEC, images), atol=1e-4)


@pytest.mark.slow
def test_a_map_of_one_pixel_may_grow(tmp_path):
    """At 32 px the model's last maps are 1x1, which is no reason to take them for 1x1 at every size."""
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, CLASSES, [Edit("insert", "blocks.1.0", 4)], size=32)
    model = build(spec)[0].eval()
    export(model, tmp_path / "open.onnx", spec=spec, dynamic_size=True)
    exported = runtime.load(tmp_path / "open.onnx")
    assert exported.any_size
    for size in [(32, 32), (33, 70), (96, 64)]:
        images = noise(2, *size)
        np.testing.assert_allclose(exported.logits(images), outputs(model, spec, images), atol=1e-4)


def test_a_model_for_one_size_cannot_leave_it_open(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 2, 5, 5), nn.Flatten(), nn.Linear(2 * 9 * 9, 3)).eval()
    with pytest.raises(
        UlsamError, match=r"free batch, height, width: .* for one size\? then leave that fixed"
    ) as caught:
        export(model, tmp_path / "model.onnx", spec=SPEC, dynamic_size=True)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_normalized_images_may_be_the_input(small, tmp_path):
    export(small, tmp_path / "plain.onnx", spec=SPEC, preprocessing=False)
    made = onnx.load(tmp_path / "plain.onnx")
    assert [dim.dim_value for dim in made.graph.input[0].type.tensor_type.shape.dim] == [0, 3, 48, 48]
    images, model = noise(3, 48, 48), runtime.load(tmp_path / "plain.onnx")
    np.testing.assert_allclose(model.logits(images), outputs(small, SPEC, images), atol=1e-4)


class Sly(nn.Module):
    """Outputs something else when it is exported."""

    def __init__(self, model: nn.Module, change: float) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) + (self.change if torch.compiler.is_exporting() else 0.0)


def test_another_output_is_refused_and_leaves_no_file(small, tmp_path):
    with pytest.raises(UlsamError, match="gives other outputs than the model: 16 generated images"):
        export(Sly(small, 0.5), tmp_path / "sly.onnx", spec=SPEC)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_fails_is_one_line(small):
    def run(images: np.ndarray) -> np.ndarray:
        raise RuntimeError("out of luck\nat line 3")

    with pytest.raises(UlsamError) as caught:
        compared(small, run, spec_transform(SPEC).preprocessing, list(noise(2, 48, 48)))
    assert str(caught.value) == "the exported model fails on images of 48x48: out of luck; nothing was written"


@pytest.mark.parametrize(
    ("found", "sound"),
    [(Parity(4, 4, 0.9e-3, 1.0), True), (Parity(4, 4, 1.1e-3, 1.0), False), (Parity(4, 4, np.nan, 1.0), False)],
)
def test_what_parity_lets_pass(found, sound):
    whole = Parity(2, 1, 0.0, 0.5) + found
    assert (whole.images, whole.same, whole.largest) == (6, 5, 1.0)
    if sound:
        whole.check("onnx")
    else:
        with pytest.raises(UlsamError, match="nothing was written"):
            whole.check("onnx")


def test_images_to_compare_on_are_spread_over_all(tmp_path):
    draw(tmp_path, 100, classes=2, size=8, noise=0)
    paths = sorted(map(str, tmp_path.rglob("*.png")))
    look = Preprocessing((8, 8), "bilinear", 1.0, (0.5,) * 3, (0.5,) * 3)
    reds = [int(image[0, 0, 0]) for image in read_images(paths, look)]
    assert reds == [200] * 32 + [60] * 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{folder}", "{folder} is a folder without model.safetensors"),
        ("{model} --to tensorrt", "--to: 'tensorrt' is not one of onnx, openvino, executorch, coreml, tflite"),
        ("{model} --out {folder}/none/model.onnx", "cannot write {folder}/none/model.onnx: no such folder"),
        ("{model} --out {folder}/model.pt", "{folder}/model.pt: a file is called NAME.onnx, NAME.xml, NAME.pte"),
        ("{model} --to onnx --out {folder}/m.pte", "a file for onnx is called NAME.onnx, not {folder}/m.pte"),
        ("{model} --images {folder}/empty", "no images in the folder {folder}/empty"),
        ("{model} --out {folder}/model.onnx --images {folder}/a.png", "no image to compare"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(b"no image")
    names = {"model": model, "folder": tmp_path}
    assert main(["export", *words.format(**names).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ulsam: error: {message.format(**names)}") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "empty"]


@pytest.mark.slow
def test_openvino_runs_the_file(small, tmp_path):
    pytest.importorskip("openvino")
    out = tmp_path / "model.xml"
    assert export(small, out, "openvino", spec=SPEC, dynamic_size=True).same == 20
    read = openvino_core().read_model(out)
    assert json.loads(read.get_rt_info(["ulsam", "classes"]).value) == list(CLASSES)
    compiled = openvino_core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for images in (noise(1, 48, 48), noise(3, 64, 40)):
        np.testing.assert_allclose(compiled(images)[0], outputs(small, SPEC, images), atol=1e-4)


def test_executorch_runs_the_file(small, tmp_path):
    pytest.importorskip("executorch")
    from executorch.runtime import Runtime

    out = tmp_path / "model.pte"
    assert export(small, out, "executorch", spec=SPEC).same == 16
    program = Runtime.get().load_program(out)
    images = noise(1, 48, 48)
    (found,) = program.load_method("forward").execute([torch.from_numpy(images)])
    np.testing.assert_allclose(found.numpy(), outputs(small, SPEC, images), atol=1e-4)
    assert json.loads(program.load_method("classes").execute([])[0]) == list(CLASSES)
    with pytest.raises(UlsamError, match="for one size"):
        export(small, out, "executorch", spec=SPEC, dynamic_size=True)
