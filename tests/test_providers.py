"""An exported model on other devices of ONNX Runtime: it runs there, or the command says why not.

Run the file with onnxruntime-openvino or onnxruntime-gpu in the place of onnxruntime to run what is skipped.
"""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from tiny import TINY_MODEL, draw_splits
from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.base.providers import PROVIDERS
from ulsam.cli import main
from ulsam.deploy.evaluate import evaluate
from ulsam.deploy.export import export
from ulsam.model.build import build, make_spec
from ulsam.model.spec import Edit

HERE = [name for name, (provider, _) in PROVIDERS.items() if provider in onnxruntime.get_available_providers()]
ELSEWHERE = [name for name in PROVIDERS if name not in HERE]
CUDA = torch.cuda.is_available()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, ("class0", "class1", "class2"), [Edit("insert", "blocks.1.0", 4)], size=32)
    model, _ = build(spec)
    torch.nn.init.normal_(model.get_submodule("classifier").weight)
    root = tmp_path_factory.mktemp("providers")
    export(model, root / "model.onnx", spec=spec)
    draw_splits(root / "data", train=1, val=2, size=40)
    return root


@pytest.mark.parametrize("device", ELSEWHERE)
def test_a_device_that_is_not_installed_is_named_with_its_package(device, world):
    package = PROVIDERS[device][1]
    with pytest.raises(UlsamError) as caught:
        runtime.load(world / "model.onnx", device=device)
    assert str(caught.value) == (
        f"`device={device}`: the ONNX Runtime that is installed here runs on {', '.join(HERE)}; for {device} install"
        f" {package} in its place"
    )


@pytest.mark.parametrize("words", ["eval MODEL DATA", "predict MODEL DATA", "serve MODEL --port 0"])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        (ELSEWHERE[0], f"--device {ELSEWHERE[0]}: the ONNX Runtime that is installed here runs on"),
        ("mps", "--device mps: an exported model runs on cpu, cuda, tensorrt, coreml, openvino, directml"),
    ],
)
def test_commands_do_not_run_elsewhere_instead(words, device, message, world, capsys):
    names = {"MODEL": str(world / "model.onnx"), "DATA": str(world / "data")}
    assert main([*(names.get(word, word) for word in words.split()), "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ulsam: error: {message}") and error.count("\n") == 1


def test_auto_is_the_cpu(world):
    one, other = (evaluate(world / "model.onnx", world / "data", workers=0, device=it) for it in ("auto", "cpu"))
    assert one.scores.images == 6
    assert one.scores.loss == other.scores.loss


@pytest.mark.skipif("openvino" not in HERE, reason="needs onnxruntime-openvino")
def test_openvino_runs_the_file(world):
    model = runtime.load(world / "model.onnx", device="openvino", threads=1)
    assert model._session.get_providers()[0] == "OpenVINOExecutionProvider"
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = runtime.load(world / "model.onnx").logits(images)
    assert np.abs(model.logits(images) - expected).max() <= 2e-2 * np.abs(expected).max()  # bfloat16, where it can
    found, there = (evaluate(world / "model.onnx", world / "data", workers=0, device=it) for it in ("cpu", "openvino"))
    assert there.scores.images == found.scores.images == 6
    assert there.scores.loss == pytest.approx(found.scores.loss, rel=1e-2)


@pytest.mark.skipif("cuda" not in HERE or CUDA, reason="needs onnxruntime-gpu where there is no GPU")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_what_onnx_runtime_would_run_on_the_cpu_is_refused(device, world):
    """It knows the device, cannot start it, and would take the CPU."""
    provider = PROVIDERS[device][0]
    content = (world / "model.onnx").read_bytes()
    code = (
        f"import onnxruntime, sys; s = onnxruntime.InferenceSession(sys.stdin.buffer.read(), providers=[{provider!r}])"
    )
    alone = [sys.executable, "-c", f"{code}; print(s.get_providers())"]
    assert subprocess.run(alone, input=content, capture_output=True).stdout.endswith(b"['CPUExecutionProvider']\n")
    with pytest.raises(UlsamError, match=rf"^`device={device}`: {provider} (does not start|fails) here: \S") as caught:
        runtime.load(world / "model.onnx", device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("cuda" not in HERE or not CUDA, reason="needs onnxruntime-gpu and a GPU")
def test_cuda_runs_the_file(world):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = runtime.load(world / "model.onnx").logits(images)
    found = runtime.load(world / "model.onnx", device="cuda").logits(images)
    assert np.abs(found - expected).max() <= 1e-2 * np.abs(expected).max()  # TF32
