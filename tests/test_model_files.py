"""Model files: exact round trips, and files that are damaged, hostile or too large."""

import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seeded_models import SMALL, V2, image, save_replaced, seeded
from ulsam.base.errors import UlsamError
from ulsam.model.build import (
    UNSAVED,
    build,
    load,
    make_spec,
    meta_model,
    read_spec,
    read_weights,
    save,
)
from ulsam.model.spec import Edit, ModelSpec

# ---------------------------------------------------------------------------------------------- model files


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(SMALL, ["Zaunkönig", "鷦鷯", 'a"b', "x, y\n"], [Edit("replace", "14,17", 8)], size=64),
        make_spec(SMALL, ["a"], [Edit("insert", "5,blocks.5", 2, "released"), Edit("remove", "14")], crop_pct=1.0),
        pytest.param(
            make_spec(V2, ["a", "b", "c"], model_args={"groups": 8, "drop_rate": 0.2}), marks=pytest.mark.slow
        ),
        make_spec(
            "mobilenetv1_050", ["a", "b"], [Edit("replace", "blocks.3.4,blocks.*.5")], model_args={"in_chans": 1}
        ),
        make_spec("resnet18", ["a", "b"], [Edit("replace", "layer1"), Edit("insert", "layer2")], mean=(0, 0, 0.0)),
        pytest.param(
            make_spec("mobilenetv3_small_050.lamb_in1k", ["a", "b"], [Edit("insert", "blocks.1")]),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda spec: spec.base,
)
def test_a_model_file_round_trip_is_exact(spec, tmp_path):
    model, _ = build(spec)
    seeded(model)
    save(model, spec, tmp_path / "model.safetensors")
    again, same = load(tmp_path / "model.safetensors")
    assert same == spec == read_spec(tmp_path / "model.safetensors")
    assert not any(module.training for module in again.modules())
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    x = image(channels=spec.input_size[0])
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_model_that_is_not_its_specs_is_not_saved(tmp_path):
    spec = make_spec(SMALL, ["a", "b"])
    other, _ = build(make_spec(SMALL, ["a", "b"], [Edit("insert", "17")]))
    with pytest.raises(
        UlsamError, match=r"the model is not what its spec builds: blocks\.5\.2\.ulsam.* expected nothing"
    ):
        save(other, spec, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UlsamError, match="cannot write"):
        save(build(spec)[0], spec, tmp_path / "no" / "model.safetensors")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return save_replaced(tmp_path_factory.mktemp("file") / "model.safetensors")


@pytest.fixture(scope="module")
def entries(file) -> dict[str, Any]:
    """What the file's spec holds."""
    return json.loads(read_spec(file).to_json())


@pytest.mark.parametrize("where", [".", "run"])
def test_the_folder_of_a_run_is_its_model(file, tmp_path, where):
    (tmp_path / where).mkdir(exist_ok=True)
    shutil.copy(file, tmp_path / where / "model.safetensors")
    model, spec = load(tmp_path)
    assert spec == read_spec(file)
    assert all(map(torch.equal, model.state_dict().values(), load(file)[0].state_dict().values()))


def test_a_folder_without_a_model_names_those_in_it(file, tmp_path):
    with pytest.raises(UlsamError, match=r"is a folder without model\.safetensors$"):
        load(tmp_path)
    for seed in "ab":
        (tmp_path / seed).mkdir()
        shutil.copy(file, tmp_path / seed / "model.safetensors")
    with pytest.raises(UlsamError, match=r"; it has a/model\.safetensors, b/model\.safetensors$"):
        read_spec(tmp_path)


def test_a_file_cut_off_anywhere_gives_one_line(file, tmp_path):
    whole = file.read_bytes()
    (head,) = struct.unpack("<Q", whole[:8])
    cut = tmp_path / "cut.safetensors"
    for length in [*(len(whole) * tenth // 10 for tenth in range(10)), 4, 8, 8 + head // 2, 8 + head, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(UlsamError, match=r"cut\.safetensors is no safetensors file, or is cut off") as caught:
            load(cut)
        assert "\n" not in str(caught.value)


def test_an_exported_model_is_called_so(tmp_path):
    exported = tmp_path / "model.onnx"
    exported.write_bytes(b"\x08\x08")
    with pytest.raises(UlsamError, match=r"model\.onnx is an exported model; this takes the \.safetensors model file"):
        load(exported)


def test_nobody_is_advised_to_run_a_file(tmp_path):
    torch.save({"a": Edit("remove", "14")}, tmp_path / "model.pt")
    with pytest.raises(UlsamError, match="holds no weights that can be read safely: ") as caught:
        read_weights(tmp_path / "model.pt")
    assert "Edit" in str(caught.value)
    assert "weights_only=False" not in str(caught.value)


def with_spec(file: Path, path: Path, text: str) -> Path:
    """A copy of a model file with other metadata, its tensors as they were."""
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"] = {"ulsam": text}
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + whole[8 + length :])
    return path


NESTED = "[" * 100_000
HOSTILE = [
    ({"base": "hf-hub:timm/resnet18.a1_in1k"}, "timm has no model 'hf-hub:timm/resnet18.a1_in1k'"),
    ({"base": "local-dir:/etc"}, "timm has no model 'local-dir:/etc'"),
    ({"base": "resnet18.x://evil"}, "timm has no model"),
    ({"base": "../../resnet18"}, "timm has no model"),
    ({"base": 5}, "not the spec of a model"),
    ({"base": None}, "not the spec of a model"),
    ({"base": "resnet18"}, "layer number 17: the paper's numbers exist for"),
    ({"base": "resnet18", "edits": []}, "is not what its spec builds"),
    ({"base": "vit_giant_patch14_dinov2", "edits": []}, "is not what its spec builds"),
    ({"base": "vit_tiny_patch16_224", "edits": [], "model_args": {"depth": 10_000}}, "tensors, that many more"),
    ({"classes": "ab"}, "not the spec of a model"),
    ({"classes": [1, 2]}, "not the spec of a model"),
    ({"classes": ["x"] * 2}, "two classes are called 'x'"),
    ({"classes": [str(n) for n in range(50_000)]}, "is not what its spec builds: classifier."),
    ({"edits": ["explode 14"]}, "unknown edit 'explode'"),
    ({"edits": ["replace 14 g=4 cmd=rm"]}, "cannot read the edit"),
    ({"edits": ["replace 14"] * 2}, "is a ULSAM layer already"),
    ({"edits": ["replace 14,17"]}, "is not what its spec builds"),
    ({"edits": ["replace 17 g=7"]}, "does not divide"),
    ({"edits": ["replace " + 700_000 * "14," + "17"]}, "an edit has 2100010 characters: name its places by globs"),
    ({"edits": ["replace 14 g=4"] * 201}, "a model has at most 200 edits, of 20000 characters in all; these are 201"),
    ({"edits": ["replace " + "14," * 500 + "17"] * 20}, "of 20000 characters in all"),
    ({"edits": [["replace 17"]]}, "not the spec of a model"),
    ({"model_args": {"pretrained": True}}, "model arguments may not hold pretrained"),
    ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model arguments may not hold checkpoint_path"),
    ({"model_args": {"pretrained_cfg": {"url": "http://x"}}}, "model arguments may not hold pretrained_cfg"),
    ({"model_args": {"pretrained_cfg_overlay": {"hf_hub_id": "x"}}}, "model arguments may not hold"),
    ({"model_args": {"cache_dir": "/"}}, "model arguments may not hold cache_dir"),
    ({"model_args": {"num_classes": 10}}, "timm cannot build"),
    ({"model_args": {"nonsense": [[[]]]}}, "timm cannot build"),
    ({"model_args": {"act_layer": "no_such"}}, "timm cannot build"),
    ({"model_args": {"in_chans": -1}}, "in_chans -1 is not input_size's 3"),
    ({"model_args": {"depth": 10**8}}, "no argument of a model may be above 10000"),
    ({"interpolation": "\x1b[2J"}, "interpolation is one of"),
    ({"crop_pct": 1e-9}, "crop_pct is between 0.1 and 1.5"),
    ({"model_args": {"block_args": 3}}, "timm cannot build"),
    ({"model_args": {"head_conv": 100_000_000}}, "no argument of a model may be above 10000"),
    ({"model_args": ["pretrained"]}, "not the spec of a model"),
    ({"input_size": [3, 10**9, 10**9]}, "input_size is C, H, W, each from 1 to 8192"),
    ({"input_size": [3, 0, 64]}, "input_size is C, H, W"),
    ({"input_size": [3, 64]}, "input_size is C, H, W"),
    ({"input_size": [3, 64, 64.0]}, "not the spec of a model"),
    ({"crop_pct": "abc"}, "not the spec of a model"),
    ({"crop_pct": float("nan")}, "crop_pct is between 0.1 and 1.5, not nan"),
    ({"crop_pct": 1e9}, "crop_pct is between 0.1 and 1.5"),
    ({"std": [0, 0, 0]}, "stds above 0"),
    ({"mean": [1.0]}, "3 channels need as many means"),
    ({"mean": "123"}, "not the spec of a model"),
    ({"mean": [10**400, 0, 0]}, "not the spec of a model"),
    ({"interpolation": {"a": NESTED[:1000]}}, "not the spec of a model"),
    ({"surprise": 1}, "unknown entries ['surprise']"),
    ("", "not the spec of a model"),
    ("[]", "not the spec of a model"),
    ("null", "not the spec of a model"),
    ("not json", "not the spec of a model"),
    ("{}", "not the spec of a model: KeyError 'base'"),
    (NESTED, "not the spec of a model"),
    ('{"base": ' + "1" * 5000 + "}", "not the spec of a model"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[f"{n}-{str(c)[:40]}" for n, (c, _) in enumerate(HOSTILE)])
def test_hostile_metadata_gives_one_line_and_fetches_and_allocates_nothing(
    change, message, file, entries, tmp_path, monkeypatch
):
    made: list[str] = []
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *args, **kwargs: made.append("fetched"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: made.append("fetched"))
    monkeypatch.setattr("socket.socket.connect", lambda *args: made.append("connected"))
    text = change if isinstance(change, str) else json.dumps({**entries, **change})
    path = with_spec(file, tmp_path / "hostile.safetensors", text)
    allocated = 0
    empty = nn.Parameter.__new__

    def watch(cls: type, data: Tensor | None = None, *args: object, **kwargs: object) -> nn.Parameter:
        nonlocal allocated
        allocated += 0 if data is None or data.is_meta else data.numel()
        return empty(cls, data, *args, **kwargs)

    monkeypatch.setattr(nn.Parameter, "__new__", watch)
    with pytest.raises(UlsamError) as caught:
        load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert made == []
    assert allocated == 0


@pytest.mark.parametrize(
    ("base", "arguments", "edits"),
    [  # tables for each pair of positions of a large image, which no file holds
        ("swin_tiny_patch4_window7_224", {"img_size": 8008, "embed_dim": 24, "num_heads": [1] * 4}, ()),
        # blocks that were taken out, which no file holds either
        ("resnet18", {"layers": [1, 1, 150, 1]}, ("remove " + ",".join(f"layer3.{n}" for n in range(1, 150)),)),
    ],
)
def test_a_model_that_takes_far_more_memory_than_its_weights_is_refused(base, arguments, edits, tmp_path):
    spec = ModelSpec(base, ("a", "b"), tuple(map(Edit.parse, edits)), arguments)
    state = {name: torch.zeros(value.shape) for name, value in meta_model(spec).state_dict().items()}
    size = sum(value.nbytes for value in state.values())
    save_file(state, tmp_path / "model.safetensors", {"ulsam": spec.to_json()})
    with pytest.raises(
        UlsamError, match=r"is not what its spec builds: \d+ MB in memory of [\d.]+ MB of wei"
    ) as caught:
        load(tmp_path / "model.safetensors")
    assert int(re.search(r"(\d+) MB in memory", str(caught.value))[1]) * 1e6 > 4 * size + UNSAVED


def test_a_model_that_fills_huge_tables_value_by_value_is_refused_on_the_way(file, tmp_path):
    spec = ModelSpec("maxvit_tiny_tf_224", ("a", "b"), model_args={"img_size": 9999})
    path = with_spec(file, tmp_path / "model.safetensors", spec.to_json())
    with pytest.raises(UlsamError, match=r"is not what its spec builds: it holds \d+ tensors, that many more"):
        load(path)


def test_a_file_with_its_own_spec_passes_through_the_same_door(file, tmp_path):
    path = with_spec(file, tmp_path / "kind.safetensors", read_spec(file).to_json())
    assert load(path)[1] == read_spec(file)


def test_other_metadata_and_missing_tensors_are_refused(file, tmp_path):
    state = read_weights(file)
    text = read_spec(file).to_json()
    state.pop("conv_stem.weight")
    save_file(state, tmp_path / "less.safetensors", metadata={"ulsam": text})
    with pytest.raises(UlsamError, match=r"conv_stem\.weight is nothing, expected \(16, 3, 3, 3\)"):
        load(tmp_path / "less.safetensors")
    save_file(state, tmp_path / "none.safetensors", metadata={"format": "pt"})
    with pytest.raises(UlsamError, match="holds weights without a spec"):
        load(tmp_path / "none.safetensors")
