"""Quantized models: from drawn birds to int8, what stays in float32, and what is refused."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array

from serving import form, service
from tiny import SETTINGS, TINY_MODEL, options
from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.birds import draw_birds
from ulsam.data.images import read_image
from ulsam.deploy.byte_products import saturates
from ulsam.deploy.export import export
from ulsam.deploy.onnx_graph import ATTENTION
from ulsam.deploy.predict import predict
from ulsam.deploy.quantize import COVERED, map_statistics, quantize, quantize_graph
from ulsam.model.build import build, load, make_spec, save
from ulsam.model.spec import Edit

EDIT = "insert blocks.1.0 g=4"


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> Path:
    return draw_birds(tmp_path_factory.mktemp("birds") / "birds", classes=2, train=24, val=20, size=40)


def test_round_trip_from_images_to_int8(birds, tmp_path, capsys):
    """Train on drawn birds, fold and export, quantize, run without PyTorch, serve, and compare all by image."""
    run = tmp_path / "run"
    training = {**SETTINGS, "layout": "channels_last", "amp": "none", "compile": "none"}
    edit = ["--insert", "blocks.1.0", "--form", "released"]
    assert main(["train", str(birds), *edit, "--out", str(run), *options(training)]) == 0
    model, whole, small = (run / name for name in ("model.safetensors", "model.onnx", "model-int8.onnx"))
    assert main(["export", str(model), "--images", str(birds / "val")]) == 0
    assert main(["quantize", str(whole), str(birds), "--calibrate", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith(f"wrote     {small}, {small.stat().st_size:,} bytes, ")
    assert re.fullmatch(r"time      of an image x \d\.\d\d(: no faster here, .*)?", lines[-2])
    assert lines[-1].startswith("weights   7 bits" if saturates() else "weights   8 bits, for x86 with VNNI")
    assert small.stat().st_size < 0.6 * whole.stat().st_size  # of a model of 0.1 M parameters

    paths = sorted(map(str, (birds / "val").rglob("*.jpg")))
    answers = {path.name: list(runtime.load(path).predict(paths)) for path in (whole, small)}
    for exported, own in zip(answers[whole.name], predict(model, paths), strict=True):
        assert [name for name, _ in exported.classes] == [name for name, _ in own.classes]
        np.testing.assert_allclose(*([share for _, share in one.classes] for one in (exported, own)), atol=1e-5)
    with service(str(small), "--max-images", "40", folder=tmp_path / "service") as served:
        over_http = served.ask("/predict", *form([(path, Path(path).read_bytes()) for path in paths])).body
    for found, own in zip(over_http["predictions"], answers[small.name], strict=True):
        assert [one["name"] for one in found["classes"]] == [name for name, _ in own.classes]
        assert [one["probability"] for one in found["classes"]] == pytest.approx([p for _, p in own.classes], abs=1e-5)
    first = [[one.classes[0][0] for one in answer] for answer in answers.values()]
    same = np.mean([one == other for one, other in zip(*first, strict=True)])
    assert same >= 0.85
    shown = re.search(r"(\d+\.\d\d) % -> (\d+\.\d\d) %.* on 40 images; the same first class for (\d+\.\d) %", lines[-3])
    assert shown is not None
    truth = [Path(path).parent.name for path in paths]
    shares = [100 * np.mean([name == true for name, true in zip(names, truth, strict=True)]) for names in first]
    assert [float(word) for word in shown.groups()] == pytest.approx([*shares, 100 * same], abs=0.06)

    for path, share in ((whole, shares[0]), (small, shares[1])):
        assert main(["eval", str(path), str(birds), "--workers", "0"]) == 0
        assert f"top-1   {share:.2f} %" in capsys.readouterr().out


@pytest.fixture(scope="module")
def exported(birds, tmp_path_factory) -> Path:
    """A model that was not trained, as a model file and exported."""
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, sorted(path.name for path in (birds / "val").iterdir()), [Edit.parse(EDIT)], size=32)
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    save(build(spec)[0], spec, path.with_suffix(".safetensors"))
    assert main(["export", str(path.with_suffix(".safetensors"))]) == 0
    return path


def test_two_products_of_a_model_for_x86_without_vnni_fit_into_16_bits(birds, exported, tmp_path):
    """And it runs exactly everywhere, this machine's kernels included; a model of 8 bits would not fit."""
    out, largest = tmp_path / "small.onnx", {}
    for target in ("avx2", "vnni"):
        report = quantize(exported, str(birds), out, calibrate=4, measure=10, target=target)
        assert report.time_ratio is None and report.weight_bits == (7 if target == "avx2" else 8)
        weights = [to_array(tensor).astype(int) for tensor in onnx.load(out).graph.initializer if tensor.data_type == 3]
        largest[target] = max(abs(values).max() for values in weights)
        if target == "avx2":
            pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
            fast, exact = (runtime.open_model(out.read_bytes(), "it", as_written=way) for way in (False, True))
            close = np.abs(fast.logits(pixels) - exact.logits(pixels)).max()
            assert close < 0.05 * np.abs(exact.logits(pixels)).max()  # but for rounding
    assert 2 * 255 * largest["avx2"] < 2**15 <= 2 * 255 * largest["vnni"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64-static") is None, reason="no emulator of another processor")
def test_a_processor_without_vnni_is_known_by_its_products():
    code = "from ulsam.deploy.byte_products import saturates; print(saturates())"
    emulated = ["qemu-x86_64-static", "-cpu", "Haswell", sys.executable, "-c", code]
    done = subprocess.run(emulated, capture_output=True, text=True, timeout=600)
    assert done.stdout == "True\n", done.stderr


def test_an_unknown_target_is_named(exported, birds, tmp_path):
    with pytest.raises(UlsamError, match="unknown target 'sse'; valid: this, avx2, vnni, arm"):
        quantize(exported, str(birds), tmp_path / "small.onnx", target="sse")


@pytest.mark.slow
def test_only_normalization_other_attention_and_logits_stay_in_float(birds, exported, tmp_path):
    out = tmp_path / "small.onnx"
    report = quantize(exported, str(birds), out, calibrate=8, measure=10)
    assert (report.calibrated, report.images, report.bytes) == (8, 10, out.stat().st_size)
    made = onnx.load(out)
    onnx.checker.check_model(made, full_check=True)
    makes = {output: node for node in made.graph.node for output in node.output}
    weights = {tensor.name: to_array(tensor) for tensor in made.graph.initializer}
    convolutions = [node for node in made.graph.node if node.op_type == "Conv"]
    assert sum(ATTENTION in node.name for node in convolutions) == 3
    for node in convolutions:
        kernel = makes[node.input[1]]
        assert kernel.op_type == "DequantizeLinear"
        assert weights[kernel.input[0]].dtype == np.int8
        assert weights[kernel.input[1]].shape == weights[kernel.input[0]].shape[:1]  # a scale for each channel
        assert makes[node.input[0]].op_type == "DequantizeLinear"
    products = [node for node in made.graph.node if node.op_type == "Mul"]
    assert sum(ATTENTION in node.name for node in products) == 1 < len(products)
    for node in products[1:]:  # the first one is the normalization's
        small = [name in makes and makes[name].op_type == "DequantizeLinear" for name in node.input]
        assert all(small) == (ATTENTION in node.name)
    assert makes["logits"].op_type == "Gemm"
    (cast,) = [node for node in made.graph.node if "pixels" in node.input]
    (rows,) = [node for node in made.graph.node if cast.output[0] in node.input]
    assert (cast.op_type, rows.op_type) == ("Cast", "Reshape")  # normalized by rows, in float


@pytest.mark.slow
def test_a_range_leaves_out_what_few_images_reach(exported):
    """Of the normalized images, known exactly: 19 gray ones, and a black and white one."""
    grays = range(100, 119)
    images = [np.full((32, 32, 3), gray, np.uint8) for gray in grays]
    images.append(np.repeat(np.uint8([0, 255]), 16)[:, None, None].repeat(32, 1).repeat(3, 2))
    content = exported.read_bytes()
    graph = onnx.load_from_string(content).graph
    first = next(node.input[0] for node in graph.node if node.op_type == "Conv")
    low, high = map_statistics(content, images)[first][:2]
    seen = runtime.load(exported).preprocessing.normalize(np.stack(images)).reshape(20, -1)
    assert low == pytest.approx(np.quantile(seen.min(1), 1 - COVERED), abs=1e-5)
    assert high == pytest.approx(np.quantile(seen.max(1), COVERED), abs=1e-5)
    assert seen.min() < low < seen[0].max() and high < seen.max() - 1
    alone = map_statistics(content, images[-1:])[first][:2]
    assert alone == pytest.approx((seen.min(), seen.max()), abs=1e-5)


@pytest.mark.slow
def test_biases_take_up_what_rounding_the_weights_loses(birds, tmp_path):
    """In the means of each convolution's channels, on the maps of the model in float32."""
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, ["robin", "wren"], [Edit.parse(EDIT + " form=released")], size=32)
    model, _ = build(spec)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.bias, -1, 1)
    export(model.eval(), tmp_path / "model.onnx", spec=spec)
    opened, content = runtime.load(tmp_path / "model.onnx"), (tmp_path / "model.onnx").read_bytes()
    paths = sorted((birds / "train").rglob("*.jpg"))[:16]
    images = [opened.preprocessing.crop(np.asarray(read_image(path))) for path in paths]
    whole = onnx.load_from_string(content)
    ends = {node.name: (node.input[0], node.output[0]) for node in whole.graph.node if node.op_type == "Conv"}
    names = sorted({name for pair in ends.values() for name in pair})
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = runtime.open_session(whole.SerializeToString())
    maps = dict(zip(names, map(torch.from_numpy, session.run(names, opened.feed(np.stack(images)))), strict=True))

    defaults = {"pads": (0, 0), "strides": (1, 1)}

    given = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in whole.graph.initializer}
    biases = {node.name: given.get(node.input[2]) for node in whole.graph.node if len(node.input) == 3}
    made = onnx.load_from_string(quantize_graph(content, images, opened.metadata)).graph

    def shifts(corrected: bool) -> dict[str, float]:
        """How far the rounded weights move the channels' means, with the file's biases or those before."""
        values = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in made.initializer}
        for node in made.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in values:
                steps, scale = (values[name] for name in node.input[:2])
                values[node.output[0]] = steps * scale.reshape(-1, *[1] * (steps.ndim - 1))
        found = {}
        for node in made.node:
            if node.op_type == "Conv" and len(node.input) == 3:
                x, y = (maps[name] for name in ends[node.name])
                weight, bias = (values[name] for name in node.input[1:])
                bias = bias if corrected else biases[node.name]
                numbers = {entry.name: entry.ints or entry.i for entry in node.attribute}
                pads, stride = (list(numbers.get(name, default))[:2] for name, default in defaults.items())
                moved = torch.conv2d(x, weight, bias, stride, pads, groups=numbers.get("group", 1)) - y
                found[node.name] = float(moved.mean((0, 2, 3)).norm())
        return found

    corrected, left = shifts(True), shifts(False)
    assert corrected.keys() == left.keys() and len(left) > 10
    rounded = [name for name in left if left[name]]  # but weights of 1, which rounding leaves alone
    assert np.median([corrected[name] / left[name] for name in rounded]) < 0.2


@pytest.mark.slow
def test_a_model_for_normalized_images_is_quantized_too(birds, exported, tmp_path):
    out = tmp_path / "plain-int8.onnx"
    assert main(["export", str(exported.with_suffix(".safetensors")), "--no-preprocessing", "--out", str(out)]) == 0
    plain = out.rename(tmp_path / "plain.onnx")
    quantize(plain, str(birds), out, calibrate=8, measure=4)
    quantize(exported, str(birds), tmp_path / "whole-int8.onnx", calibrate=8, measure=4)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    found, expected = (runtime.load(path).logits(images) for path in (out, tmp_path / "whole-int8.onnx"))
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.slow
def test_a_model_file_is_exported_on_the_way(birds, exported, tmp_path):
    quantize(exported, str(birds), tmp_path / "a.onnx", calibrate=8, measure=4)
    quantize(exported.with_suffix(".safetensors"), str(birds), tmp_path / "b.onnx", calibrate=8, measure=4)
    one, other = (runtime.load(tmp_path / name) for name in ("a.onnx", "b.onnx"))
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(one.logits(images), other.logits(images))
    assert one.metadata == other.metadata


@pytest.mark.slow
def test_a_model_that_8_bits_ruin_is_refused(birds, exported, tmp_path):
    """One channel that nobody listens to takes up the whole range of a map, and the other channels drown in it."""
    model, spec = load(exported.with_suffix(".safetensors"))
    norm, head = model.get_submodule("bn2"), model.get_submodule("classifier")
    with torch.no_grad():
        norm.bias[0] = 1e6
        head.weight.normal_()
        head.weight[:, 0] = 0
    save(model, spec, tmp_path / "model.safetensors")
    paths = sorted(map(str, birds.rglob("*.jpg")))
    for path, said in zip(paths, list(predict(model, paths, spec=spec)), strict=True):  # what it says is the truth
        folder = tmp_path / "data" / Path(path).parts[-3] / said.classes[0][0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{len(list(folder.iterdir()))}.jpg").write_bytes(Path(path).read_bytes())
    with pytest.raises(UlsamError, match=r"worse than 1 point: top-1 100.00 % -> .*; nothing was written"):
        quantize(tmp_path / "model.safetensors", str(tmp_path / "data"), tmp_path / "small.onnx")
    assert not (tmp_path / "small.onnx").exists()


def test_mistakes_are_one_line(birds, exported, tmp_path, capsys):
    small = str(tmp_path / "small.onnx")
    assert main(["quantize", str(exported), str(birds), "--out", small, "--calibrate", "2", "--measure", "2"]) == 0
    for name in ("train/dodo", "train/wren", "val/dodo", "val/wren"):
        (tmp_path / "dodos" / name).mkdir(parents=True)
        first = next((birds / "train").rglob("*.jpg"))
        (tmp_path / "dodos" / name / "1.jpg").write_bytes(first.read_bytes())
    capsys.readouterr()
    for words, message in [
        ([small, str(birds)], "is quantized already"),
        ([str(exported), str(birds), "--out", str(tmp_path)], "a quantized model is a file called NAME.onnx"),
        ([str(exported), str(birds), "--out", str(tmp_path / "no" / "a.onnx")], "no such folder"),
        (
            [str(exported), str(birds), "--out", str(exported)],
            "is the model in float32, and would be lost: name another",
        ),
        ([str(exported), str(birds), "--calibrate", "0"], "must be 1 or more, not 0 and 1000"),
        ([str(exported), str(tmp_path / "dodos")], "the model knows no class 'dodo'"),
        ([str(exported), str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "none.safetensors"), str(birds)], "no model file"),
    ]:
        assert main(["quantize", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not exported.with_name("model-int8.onnx").exists()
