"""`python -m ulsam.timm`: a script started by it behaves as if started directly, and knows our models by name."""

import csv
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import ulsam.model.presets  # registers MODEL
import ulsam.timm

MODEL = "ulsam_mobilenetv2_100_replace_14_17"
HOOK = Path(ulsam.timm.__file__).parent
SOURCE = os.environ.get("ULSAM_TIMM_SOURCE")  # a checkout of timm


def python(*arguments: object, path: object = "", **options: object) -> subprocess.CompletedProcess[str]:
    """Run Python with `path` as its PYTHONPATH."""
    command = [sys.executable, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, **options)


def launch(script: object, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return python("-m", "ulsam.timm", script, *arguments, **options)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


LIKE_TIMMS = """
import argparse, json, multiprocessing, subprocess, sys
import timm
import beside

def is_known(name):
    return timm.is_model(name)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--spawn", action="store_true")
    args = parser.parse_args()
    if args.child:
        print(is_known(args.model))
        sys.exit()
    model = timm.create_model(args.model, num_classes=beside.CLASSES)
    command = [sys.executable, __file__, "--model", args.model, "--child"]
    if args.spawn:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            known = pool.apply(is_known, (args.model,))
    else:
        known = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip() == "True"
    print(json.dumps([model.num_classes, known]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("spawn", [[], pytest.param(["--spawn"], marks=pytest.mark.slow)], ids=["started", "spawned"])
def test_the_names_reach_the_script_and_its_children(spawn, tmp_path):
    script = write(tmp_path / "scripts" / "script.py", LIKE_TIMMS)
    write(script.parent / "beside.py", "CLASSES = 7")
    write(tmp_path / "beside.py", "raise ImportError('the working folder is not on the path of a script')")
    done = launch("scripts/script.py", "--model", MODEL, *spawn, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout), done.stderr) == ([7, True], "")


DESCRIBE = """
import json, sys
main = sys.modules["__main__"]
print(json.dumps([sys.argv, sys.path, __name__, __file__, __spec__, __package__, main.__dict__ is globals()]))
print("to stderr", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("options", [(), ("-P",)], ids=["plain", "safe path"])
def test_a_script_sees_what_it_sees_when_started_directly(options, tmp_path):
    script = write(tmp_path / "scripts" / "describe.py", DESCRIBE)
    arguments = ["--model", "a b", "-h", "--", "x"]
    directly = python(*options, script, *arguments, cwd=tmp_path)
    launched = python(*options, "-m", "ulsam.timm", script, *arguments, cwd=tmp_path)
    assert json.loads(directly.stdout)[0] == [str(script), *arguments]
    # a plain script's package is None or "", by how it is run; both mean that it is in none
    assert launched.stdout.replace('""', "null") == directly.stdout
    assert (launched.returncode, launched.stderr) == (3, "to stderr\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a script, such as"),
        (
            ("nowhere.py", "--model", "x"),
            f"there is no script {os.path.abspath('nowhere.py')}; give the path of a file",
        ),
        ((HOOK,), f"there is no script {HOOK}; give the path of a file"),
    ],
    ids=["none", "missing", "folder"],
)
def test_a_missing_script_is_one_line(arguments, message):
    done = python("-m", "ulsam.timm", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"ulsam.timm: error: {message}")
    assert done.stderr.count("\n") == 1


def test_python_without_timm_starts_as_before():
    code = "import json, sys; print(json.dumps([sys.path, sorted(sys.modules)]))"
    before, after = (json.loads(python("-c", code, path=path).stdout) for path in ("", HOOK))
    assert after[0] == before[0]
    light = {"__future__", "importlib", "importlib._bootstrap", "importlib._bootstrap_external", "importlib.machinery"}
    light |= {"_contextvars", "_py_warnings", "importlib._abc", "importlib.util"}  # what those import in Python 3.14
    assert set(after[1]) - set(before[1]) <= {*light, "sitecustomize", "warnings"}


COUNT_TWICE = """
import subprocess, sys
count = "import sys, timm; print(len(timm.list_models('ulsam_*')), sys.modules['sitecustomize'].__file__)"
exec(count)
subprocess.run([sys.executable, "-c", count])
"""


@pytest.mark.slow
def test_the_users_sitecustomize_runs_too_and_may_import_timm(tmp_path):
    users = write(tmp_path / "site" / "sitecustomize.py", "import sys, timm; print('hello', file=sys.stderr)")
    done = launch(write(tmp_path / "script.py", COUNT_TWICE), path=users.parent)
    assert (done.returncode, done.stderr) == (0, "hello\nhello\n")
    assert sorted(done.stdout.splitlines()) == [f"13 {users}"] * 2


def test_a_child_in_an_environment_without_ulsam_is_left_alone(tmp_path):
    venv.create(tmp_path / "venv")
    other = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    script = write(tmp_path / "script.py", f"import subprocess; subprocess.run([{str(other)!r}, 'child.py'])")
    write(tmp_path / "timm.py", "print('another timm')")
    write(tmp_path / "child.py", "import timm")
    done = launch(script, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("another timm\n", "")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of four images, in the folders that timm's scripts expect."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "validation"):
        for name, color in {"red": (200, 0, 0), "blue": (0, 0, 200)}.items():
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (72, 72), color).save(root / split / name / f"{number}.png")
    return root


def timms(script: str, *arguments: object) -> str:
    """Run a script of the checkout, by its own name, in the checkout; what it prints."""
    done = launch(script, *arguments, path=os.environ.get("PYTHONPATH", ""), cwd=SOURCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = ("--img-size", 64, "-b", 2, "--device", "cpu")
LOADER = ("--num-classes", 2, "-j", 1, "--no-prefetcher")


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory):
    """What train.py writes after an epoch."""
    runs = tmp_path_factory.mktemp("runs")
    schedule = ("--epochs", 1, "--warmup-epochs", 0, "--lr", 0.001)
    timms("train.py", "--data-dir", images, "--model", MODEL, *LOADER, *SMALL, *schedule, "--output", runs)
    (found,) = runs.glob("*/last.pth.tar")
    return found


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE, reason="ULSAM_TIMM_SOURCE names no checkout of timm")
class TestTimmsScripts:
    def test_validate(self, images, checkpoint):
        data = ("--data-dir", images, "--split", "validation")
        out = timms("validate.py", *data, "--model", MODEL, *LOADER, *SMALL, "--checkpoint", checkpoint)
        assert json.loads(out.partition("--result")[2])["model"] == MODEL

    def test_inference(self, images, checkpoint, tmp_path):
        pytest.importorskip("pandas", reason="inference.py needs pandas")
        data = ("--data-dir", images / "validation", "--split", "", "--fullname", "--topk", 1)
        saved = ("--results-dir", tmp_path, "--results-file", "out.csv", "--results-format", "csv")
        model = ("--model", MODEL, "--num-classes", 2, "--checkpoint", checkpoint)
        timms("inference.py", *data, *model, "-j", 1, *SMALL, *saved)
        with open(tmp_path / "out.csv") as file:
            assert len(list(csv.DictReader(file))) == 8

    def test_onnx_export(self, checkpoint, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime", reason="timm's check runs the file")
        model = ("--model", MODEL, "--num-classes", 2, "--checkpoint", checkpoint, "--img-size", 64)
        timms("onnx_export.py", tmp_path / "model.onnx", *model, "--check-forward")
        trained = timm.create_model(MODEL, num_classes=2, checkpoint_path=str(checkpoint)).eval()
        image = torch.randn(1, 3, 64, 64)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), trained(image).detach(), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        ("options", "measured"),
        [(("--bench", "both"), {"infer", "train"}), (("--bench", "inference", "--torchscript"), {"infer"})],
        ids=["both", "torchscript"],
    )
    def test_benchmark(self, options, measured):
        steps = ("--num-warm-iter", 1, "--num-bench-iter", 5, "--no-retry")
        out = timms("benchmark.py", "--model", MODEL, *SMALL, *steps, *options)
        found = json.loads(out.partition("--result")[2])
        assert found["model"] == MODEL
        assert {name.partition("_")[0] for name in found if name.endswith("_samples_per_sec")} == measured

    def test_bulk_runner(self, images, checkpoint, tmp_path):
        names = write(tmp_path / "names.txt", MODEL)
        child = ("validate.py", "--data-dir", images, "--split", "validation", *LOADER, "--checkpoint", checkpoint)
        timms("bulk_runner.py", "--model-list", names, "--results-file", tmp_path / "out.csv", *child, *SMALL[2:])
        with open(tmp_path / "out.csv") as file:
            assert [row["model"] for row in csv.DictReader(file)] == [MODEL]
