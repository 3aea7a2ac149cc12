"""Pretrained models by name: what they are, how their classes are called and matched, and what lacks is one line."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import nn

import ulsam
from tiny import TINY_MODEL, draw
from ulsam.base.class_names import class_numbers
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.model.build import build, load, make_spec, save, spec_of_name
from ulsam.model.spec import Edit

TAGGED = f"{TINY_MODEL}.r160_in1k"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with all weights of timm's tiny model for ImageNet."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model(TINY_MODEL).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in the hub's format, with a model of three classes."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("hub")
    model = timm.create_model(TINY_MODEL, num_classes=3, pretrained_cfg_overlay={"input_size": (3, 48, 48)})
    timm.models.save_for_hf(model, folder, model_config={"label_names": ["class0", "class1", "class2"]})
    return f"local-dir:{folder}"


def test_a_timm_name_with_a_weight_file_is_that_model(weights: Path) -> None:
    model, spec = load(TINY_MODEL, weights=weights)
    known = timm.create_model(TINY_MODEL, checkpoint_path=str(weights)).eval()
    x = torch.randn(2, *spec.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), known(x))
    assert not model.training
    assert spec == spec_of_name(TINY_MODEL)
    assert spec.classes[0] == "n01440764 tench, Tinca tinca"
    assert [name.split()[0] for name in spec.classes] == ImageNetInfo().label_names()


def test_a_weight_file_decides_on_the_classes(tmp_path: Path) -> None:
    torch.save({"state_dict": timm.create_model(TINY_MODEL, num_classes=4).state_dict()}, tmp_path / "four.pth.tar")
    assert load(TINY_MODEL, weights=tmp_path / "four.pth.tar")[1].classes == ("0", "1", "2", "3")


def test_weights_without_a_classifier_are_refused(weights: Path, tmp_path: Path) -> None:
    save_file(timm.create_model(TINY_MODEL, num_classes=0).state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(UlsamError, match=r"backbone.safetensors does not fit .*: classifier.weight: not there$"):
        load(TINY_MODEL, weights=tmp_path / "backbone.safetensors")


def test_a_folder_in_the_format_of_the_hub_gives_its_labels(hub: str) -> None:
    model, spec = load(hub)
    theirs = timm.create_model(hub, pretrained=True).eval()
    x = torch.randn(2, *spec.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), theirs(x))
    assert (spec.base, spec.classes, spec.input_size) == (TINY_MODEL, ("class0", "class1", "class2"), (3, 48, 48))


@pytest.mark.parametrize("thresholds", [5, "abc", {"a": 1}, [None, 0.5, 0.5]])
def test_thresholds_that_are_none_are_one_line(thresholds: Any, hub: str, tmp_path: Path) -> None:
    folder = shutil.copytree(hub.removeprefix("local-dir:"), tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "thresholds": thresholds}))
    with pytest.raises(UlsamError, match=r"^the thresholds in the config.json of \S+ are no list of numbers$"):
        load(f"local-dir:{folder}")


def test_a_model_of_the_hub_can_be_saved_and_opened(hub: str, tmp_path: Path) -> None:
    model, spec = load(hub)
    save(model, spec, tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors")[1] == spec


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "its config.json names no architecture"),
        ({"architecture": "nonsuch", "num_classes": 3}, "timm has no model 'nonsuch'"),
        (
            {"architecture": TINY_MODEL, "num_classes": 3, "model_args": {"checkpoint_path": "x.pth"}},
            "model arguments may not hold checkpoint_path",
        ),
    ],
)
def test_what_is_no_model_of_timm_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UlsamError, match=message):
        load(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (TINY_MODEL, {}),
            r"is a model without weights: `pretrained=True` loads timm's, `weights=FILE` those in a file$",
        ),
        ((f"{TINY_MODEL}.nonsuch", {}), "Invalid pretrained tag"),
        (("test_eficientnet", {"pretrained": True}), f"nearest: {TINY_MODEL}"),
        ((TINY_MODEL, {"pretrained": True, "weights": "w.pth"}), "give `pretrained` or `weights`, not both"),
        (("hf-hub:me/birds", {"weights": "w.pth"}), "hf-hub:me/birds has its own weights"),
        (("hf-hub:a/b/c", {}), "no model hf-hub:a/b/c to be had"),
        (("mobilenetv1_050", {"pretrained": True}), "No pretrained weights exist"),
    ],
)
def test_a_name_that_is_no_whole_model_is_one_line(arguments: tuple[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UlsamError, match=message) as caught:
        load(arguments[0], **arguments[1])
    assert "\n" not in str(caught.value)


def test_options_for_a_name_are_refused_with_a_file(tmp_path: Path) -> None:
    spec = make_spec(TINY_MODEL, ["a", "b"], size=32)
    save(build(spec)[0], spec, tmp_path / "model.safetensors")
    with pytest.raises(UlsamError, match=r"^`pretrained` is for a timm name; .*model.safetensors has its own weights$"):
        load(tmp_path / "model.safetensors", pretrained=True)


def test_wordnet_ids_match_classes() -> None:
    classes = [*spec_of_name(TINY_MODEL).classes, "mine"]
    names = ["n03888257", "n01440764", "mine", "tench", "n99999999", "n02085620-Chihuahua", "n014407641"]
    found = class_numbers(names, classes)
    assert found == {"n03888257": 701, "n01440764": 0, "mine": 1000, "n02085620-Chihuahua": 151}
    assert class_numbers(["n01440764"], ["n01440764 young", "n01440764 old"]) == {}  # either could be meant


def _imagenette(root: Path) -> Path:
    draw(root / "val", 4, classes=2)
    (root / "val" / "class0").rename(root / "val" / "n03888257")
    (root / "val" / "class1").rename(root / "val" / "n01440764")
    (root / "train").mkdir()
    return root


def test_a_subset_of_imagenet_is_measured_by_its_ids(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that says parachute of all images is right for the parachutes, among all 1000 classes."""
    state = load(TINY_MODEL, weights=weights)[0].state_dict()
    state["classifier.weight"].zero_()
    state["classifier.bias"] = nn.functional.one_hot(torch.tensor(701), 1000).float() * 9
    save_file(state, tmp_path / "parachutes.safetensors")
    data = _imagenette(tmp_path / "data")
    options = ["--weights", str(tmp_path / "parachutes.safetensors"), "--workers", "0", "--device", "cpu", "--json"]
    assert main(["eval", TINY_MODEL, str(data), *options]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert (scores["images"], scores["top1"]) == (8, 0.5)
    row = scores["per_class"]["n03888257 parachute, chute"]
    assert (row["images"], row["named"], row["top1"], row["precision"]) == (4, 8, 1.0, 0.5)


def test_commands_take_a_model_by_name(
    hub: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(Path("val"), 1)
    image = "val/class0/000.png"
    assert main(["predict", hub, image, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"].keys() == {"class0", "class1", "class2"}
    assert main(["predict", TINY_MODEL, image, "--weights", str(weights), "--top", "1"]) == 0
    assert image in capsys.readouterr().out
    assert main(["explain", hub, "val", "--out", "explained"]) == 0
    assert "3 images" in capsys.readouterr().out
    assert main(["info", hub]) == 0
    assert "classes     3: class0, class1, class2" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["export", "eval", "predict", "explain", "quantize", "serve", "inspect", "slim"])
def test_a_name_without_weights_names_the_options(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path, 1)
    rest = {"export": [], "serve": ["--port", "0"], "slim": [str(tmp_path), "--macs", "0.8"]}
    assert main([command, TINY_MODEL, *rest.get(command, [str(tmp_path)])]) == 2
    error = capsys.readouterr().err
    remedy = "--pretrained loads timm's, --weights FILE those in a file"
    assert error.startswith(f"ulsam: error: {TINY_MODEL} is a model without weights: {remedy}")
    assert error.count("\n") == 1


@contextlib.contextmanager
def _silent_server() -> Iterator[str]:
    """An address that takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


_TIMED = """
import os, sys, time
import ulsam.model.build
before = dict(os.environ)
for name in sys.argv[1:]:
    begin = time.monotonic()
    try:
        ulsam.model.build.load(name)
    except ulsam.UlsamError as error:
        print(f"{time.monotonic() - begin:.2f} {error}")
assert dict(os.environ) == before
"""


def _tried(endpoint: str, cache: Path, *names: str, **more: str) -> list[tuple[float, str]]:
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache), **more}
    command = [sys.executable, "-c", _TIMED, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return [(float(seconds), text) for seconds, _, text in lines]


@pytest.mark.slow
def test_without_an_answer_a_name_is_given_up_within_seconds(tmp_path: Path) -> None:
    with _silent_server() as endpoint:
        found = _tried(endpoint, tmp_path, TAGGED, "hf-hub:me/birds")
    where = endpoint.removeprefix("http://")
    for (seconds, text), name in zip(found, (TAGGED, "hf-hub:me/birds"), strict=True):
        assert seconds < 8  # 3 of them for the answer, the others for a busy machine
        assert f"{name} to be had: it is not in the cache, and {where} cannot be reached." in text


@pytest.mark.slow
def test_offline_mode_and_a_closed_port_are_known_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    ((seconds, text),) = _tried(closed, tmp_path, TAGGED)
    assert seconds < 3 and "cannot be reached" in text and "Name a weight file by `weights`" in text
    ((seconds, text),) = _tried(closed, tmp_path, "hf-hub:me/birds", HF_HUB_OFFLINE="1")
    assert seconds < 1 and text.endswith("it is not in the cache, and HF_HUB_OFFLINE is set.")


def _in_cache(cache: Path, name: str) -> Path:
    """An empty commit of a repository, as huggingface_hub keeps it: a folder a commit, and the commit of a branch."""
    commit = "0123456789" * 4
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    return repository / "snapshots" / commit


@pytest.mark.slow
def test_what_is_in_the_cache_needs_no_network(weights: Path, tmp_path: Path) -> None:
    """timm's models, and one that `ulsam push` wrote, with edits."""
    of_timm = _in_cache(tmp_path, f"timm/{TAGGED}")
    of_timm.mkdir()
    (of_timm / "model.safetensors").write_bytes(weights.read_bytes())
    config = {
        "architecture": TINY_MODEL,
        "num_classes": 1000,
        "pretrained_cfg": {"num_classes": 1000, "input_size": [3, 64, 64]},
    }
    (of_timm / "config.json").write_text(json.dumps(config))
    spec = make_spec(TINY_MODEL, ("wren", "robin"), [Edit("insert", "blocks.2", 4)], size=48)
    save(build(spec)[0], spec, tmp_path / "birds.safetensors")
    ulsam.push(tmp_path / "birds.safetensors", _in_cache(tmp_path, "me/birds"))
    begin = time.monotonic()
    with _silent_server() as endpoint:
        assert _tried(endpoint, tmp_path, TAGGED, f"hf-hub:timm/{TAGGED}", "hf-hub:me/birds") == []  # no error
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_a_model_by_name_is_slimmed_from_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its classes are then called as the folders are; a second start resumes."""
    torch.manual_seed(0)
    model = timm.create_model(TINY_MODEL, num_classes=2, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    labels = ["n01440764 tench", "n01443537 goldfish"]
    timm.models.save_for_hf(model, tmp_path / "hub", model_config={"label_names": labels})
    draw(tmp_path / "data", 6, classes=2)
    for number, label in enumerate(labels):
        (tmp_path / "data" / f"class{number}").rename(tmp_path / "data" / label.split()[0])
    words = ["slim", f"local-dir:{tmp_path / 'hub'}", str(tmp_path / "data"), "--macs", "0.999", "--images", "6"]
    words += ["--reconstruct-images", "8", "--device", "cpu", "--workers", "0", "--epochs", "1", "--batch-size", "4"]
    words += ["--out", str(tmp_path / "out"), "--warmup-epochs", "0", "--amp", "none", "--compile", "none"]
    assert main([*words, "--no-train"]) == 0
    content = (tmp_path / "out" / "original.safetensors").read_bytes()
    assert main(words) == 0
    assert (tmp_path / "out" / "original.safetensors").read_bytes() == content
    assert load(tmp_path / "out" / "original.safetensors")[1].classes == ("n01440764", "n01443537")
    assert load(tmp_path / "out")[1].edits
