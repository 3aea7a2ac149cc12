"""Every preset through one suite, building from specs and weights, and model files, hostile ones too."""

import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ulsam.model.build
from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import (
    PLACEMENTS,
    UNSAVED,
    build,
    load,
    load_weights,
    make_spec,
    meta_model,
    read_spec,
    read_weights,
    save,
    ulsam_parameters,
)
from ulsam.model.spec import Edit, ModelSpec
from ulsam.surgery.edit import undo

PRESETS = sorted(PLACEMENTS)
V1 = "ulsam_mobilenetv1_100_insert_13"
V2 = "ulsam_mobilenetv2_100_insert_17"
REPLACED = "ulsam_mobilenetv2_100_replace_14_17"
SMALL = "mobilenetv2_050"


def seeded(model: nn.Module) -> nn.Module:
    """Weights that depend on PyTorch's generator alone, scaled so that the output is neither flat nor huge."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif value.is_floating_point():
                value.copy_(noise * 0.1 + (0 if name.endswith(("bias", "running_mean")) else 1))
    return model.eval()


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


class Made(dict[str, nn.Module]):
    """Each preset when it is first asked for, seeded and in eval mode."""

    def __missing__(self, name: str) -> nn.Module:
        self[name] = seeded(timm.create_model(name))
        return self[name]


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return Made()


@pytest.fixture(scope="module")
def bases() -> dict[str, nn.Module]:
    return {name: timm.create_model(name).eval() for name in sorted({base for base, _ in PLACEMENTS.values()})}


def test_names_are_timms_and_hold_no_dot():
    for name in [*PRESETS, "mobilenetv1_075", "mobilenetv1_050"]:
        assert timm.is_model(name)
        assert "." not in name
    assert set(timm.list_models("ulsam_*")) == set(PRESETS)


#: one of each base and kind; the others differ in their width and places
FEW = [
    "ulsam_mobilenetv1_100_replace_12",
    "ulsam_mobilenetv2_100_insert_17",
    "ulsam_mobilenetv2_100_replace_14_17",
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW)) for name in PRESETS])
class TestPreset:
    def test_holds_its_layers_where_it_says(self, name, models):
        edit = PLACEMENTS[name][1]
        layers = {place: module for place, module in models[name].named_modules() if isinstance(module, ULSAM)}
        assert len(layers) == len(Edit.parse(edit).at.split(","))
        assert all(layer.groups == 4 and layer.form == "equations" for layer in layers.values())
        assert all(place.endswith(".ulsam") == edit.startswith("insert") for place in layers)

    def test_default_configuration_is_the_bases(self, name, models, bases):
        base = bases[PLACEMENTS[name][0]]
        own = models[name].pretrained_cfg
        assert models[name].default_cfg == own
        assert own["architecture"] == name
        assert {**own, "architecture": ""} == {**base.pretrained_cfg, "architecture": ""}
        resolve = timm.data.resolve_model_data_config
        assert resolve(models[name]) == resolve(base)
        registered = timm.get_pretrained_cfg(name)
        assert (registered.input_size, registered.classifier) == ((3, 224, 224), "classifier")

    def test_runs_forward_and_backward_at_odd_sizes(self, name, models):
        model = models[name]
        for height, width in [(33, 47), (64, 40)]:
            y = model(image(height, width))
            assert y.shape == (2, 1000)
            model.zero_grad()
            y.square().mean().backward()
            for parameter in ulsam_parameters(model):
                gradient = model.get_parameter(parameter).grad
                assert torch.isfinite(gradient).all()
                assert gradient.abs().sum() > 0
        model.zero_grad()

    def test_parts_make_the_whole(self, name, models, bases):
        model, base, x = models[name], bases[PLACEMENTS[name][0]], image(33, 47)
        with torch.no_grad():
            features = model.forward_features(x)
            assert features.shape == base.forward_features(x).shape
            torch.testing.assert_close(model.forward_head(features), model(x))
            assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
            final, maps = model.forward_intermediates(x, indices=5)
            torch.testing.assert_close(final, features)
            expected = base.forward_intermediates(x, indices=5, intermediates_only=True)
            assert [found.shape for found in maps] == [wanted.shape for wanted in expected]

    def test_the_classifier_can_be_replaced_and_keywords_are_honoured(self, name):
        model = timm.create_model(name, num_classes=7, in_chans=1, groups=8, form="released", drop_rate=0.1)
        layers = [module for module in model.modules() if isinstance(module, ULSAM)]
        assert layers and all(layer.groups == 8 and layer.form == "released" for layer in layers)
        assert model.eval()(image(channels=1)).shape == (2, 7)
        assert model.drop_rate == 0.1
        model.reset_classifier(3)
        assert model(image(channels=1)).shape == (2, 3)
        assert model.get_classifier().out_features == model.num_classes == 3
        model.reset_classifier(0)
        assert model(image(channels=1)).shape == (2, model.num_features)

    def test_gives_features_as_the_base_does(self, name, models, bases):
        model = timm.create_model(name, features_only=True, out_indices=(1, 3, 4))
        info = [bases[PLACEMENTS[name][0]].feature_info[index] for index in (1, 3, 4)]
        assert model.feature_info.channels() == [stage["num_chs"] for stage in info]
        assert model.feature_info.reduction() == [stage["reduction"] for stage in info]
        state = model.state_dict()
        assert set(ulsam_parameters(model)) == set(ulsam_parameters(models[name]))
        model.load_state_dict({key: value for key, value in models[name].state_dict().items() if key in state})
        with torch.no_grad():
            maps = model.eval()(image())
            whole = models[name].forward_intermediates(image(), indices=[1, 3, 4], intermediates_only=True)
        for one, other in zip(maps, whole, strict=True):
            torch.testing.assert_close(one, other)  # the layers are in the features too


@pytest.mark.parametrize("name", [REPLACED, *(pytest.param(n, marks=pytest.mark.slow) for n in PRESETS)])
def test_presets_export(name, models):
    x = image(32, 48, batch=1)
    exported = torch.export.export(models[name], (x,)).module()
    torch.testing.assert_close(exported(x), models[name](x))


@pytest.mark.slow
@pytest.mark.parametrize("name", [V2, *(pytest.param(n, marks=pytest.mark.slow) for n in PRESETS)])
def test_presets_compile_without_a_graph_break(name, models):
    torch.compiler.reset()
    x = image(32, 32)
    compiled = torch.compile(models[name], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), models[name](x))


#: Mean and standard deviation of the seeded models' logits.
GOLDEN = {
    V1: (0.024886923695914446, 0.6627192076701971),
    V2: (-0.08398431394994259, 2.921766323863309),
    REPLACED: (-0.1328885673652403, 2.7980878186737215),
    "ulsam_mobilenetv1_050_replace_12": (0.008061275568557904, 0.3950315855384218),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_output(name, models):
    with torch.no_grad():
        y = models[name](image()).double()
    assert (y.mean().item(), y.std().item()) == pytest.approx(GOLDEN[name], rel=1e-3)


@pytest.mark.parametrize("name", [V2, REPLACED])
@pytest.mark.parametrize("feature_cls", ["hook", "fx", "getter"])
def test_features_in_timms_other_ways(name, feature_cls, models):
    """Each way gives the maps of the default way, with the layers in it."""
    options = {"features_only": True, "out_indices": (2, 4)}
    model = timm.create_model(name, feature_cls=feature_cls, **options).eval()
    assert [type(m) for m in model.modules()].count(ULSAM) == [type(m) for m in models[name].modules()].count(ULSAM)
    base = timm.create_model("mobilenetv2_100", feature_cls=feature_cls, **options).eval()
    x = image(64, 64)
    with torch.no_grad():
        maps, plain = model(x), base(x)
        assert [m.shape for m in maps] == [m.shape for m in plain]
        layers = [m for m in model.modules() if isinstance(m, ULSAM)]
        for layer in layers:  # they are run: with NaN in their weights so is the last map
            layer.pointwise.weight.fill_(float("nan"))
        assert model(x)[-1].isnan().any()


def test_a_mistaken_keyword_is_named():
    with pytest.raises(UlsamError, match=r"blocks\.5\.2: groups=7 does not divide 160"):
        timm.create_model(V2, groups=7)
    with pytest.raises(UlsamError, match="unknown form 'best'"):
        timm.create_model(V2, form="best")


# -------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """A state dict of the small base model."""
    return seeded(timm.create_model(SMALL)).state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained) -> Path:
    """Weight files of one model in the ways that people write them."""
    path = tmp_path_factory.mktemp("weights")
    backbone = {name: value for name, value in trained.items() if not name.startswith("classifier.")}
    save_file(trained, path / "whole.safetensors")
    save_file(backbone, path / "backbone.safetensors")
    torch.save(trained, path / "plain.pth")
    torch.save({"state_dict": trained, "epoch": 3, "args": {"lr": 0.1}}, path / "nested.pth.tar")
    torch.save({"model": {f"module.{name}": value for name, value in trained.items()}}, path / "parallel.pt")
    return path


@pytest.mark.parametrize(
    ("file", "heads", "edit"),
    [
        ("whole.safetensors", 0, "replace 14,17"),
        ("whole.safetensors", 0, "insert 17:1"),
        ("whole.safetensors", 0, "remove 14"),
        ("backbone.safetensors", 2, "replace 14"),
        ("plain.pth", 0, "insert 3:1"),
        ("nested.pth.tar", 0, "replace 17"),
        ("parallel.pt", 0, "remove 17"),
    ],
)
def test_base_weights_fill_every_untouched_layer(folder, trained, file, heads, edit):
    spec = make_spec(SMALL, [str(n) for n in range(1000)], [Edit.parse(edit)], size=64)
    model, notes = build(spec, weights=folder / file)
    assert len(notes) == heads
    state = model.state_dict()
    touched = {name for name in state if name not in trained}
    assert touched == set(ulsam_parameters(model))
    same = [name for name in state if name in trained and not (heads and name.startswith("classifier."))]
    assert all(torch.equal(state[name], trained[name]) for name in same)
    assert model.training
    back = undo(model).state_dict()
    assert all(torch.equal(back[name], trained[name]) for name in trained if not (heads and name.startswith("class")))


def test_a_head_of_another_size_starts_fresh_and_is_said(folder, trained):
    model, notes = build(make_spec(SMALL, ["a", "b"], [Edit("replace", "17")]), weights=folder / "whole.safetensors")
    assert notes == [
        "classifier.weight: [1000, 1280] there, [2, 1280] here: skipped, starts fresh",
        "classifier.bias: [1000] there, [2] here: skipped, starts fresh",
    ]
    assert torch.equal(model.conv_stem.weight, trained["conv_stem.weight"])


def test_weights_of_the_edited_model_fill_the_layers_too(tmp_path):
    for edit in ["replace 14,17 g=2", "insert 17:1 form=released", "remove 14"]:
        spec = make_spec(SMALL, ["a", "b"], [Edit.parse(edit)])
        state = seeded(build(spec)[0]).state_dict()
        save_file(state, tmp_path / "edited.safetensors")
        model, notes = build(spec, weights=tmp_path / "edited.safetensors")
        assert notes == []
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("more", ["replace 17", "remove 17"])
@pytest.mark.parametrize("first", ["replace 14", "insert 14", "remove 14"])
def test_weights_of_a_model_with_fewer_edits_fill_the_rest(first, more):
    before = seeded(build(ModelSpec(SMALL, ("a", "b"), (Edit.parse(first),), input_size=(3, 32, 32)))[0])
    model, _ = build(ModelSpec(SMALL, ("a", "b"), (Edit.parse(first), Edit.parse(more)), input_size=(3, 32, 32)))
    old, state = before.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    assert load_weights(model, old) == []
    for name, value in model.state_dict().items():
        expected = state if name.startswith("blocks.5.2.") else old  # the new layer stays as it was
        assert torch.equal(value, expected[name]), name
    del old["blocks.4.0.conv_pw.weight"]
    with pytest.raises(UlsamError, match=r"blocks\.4\.0\.conv_pw\.weight is missing"):
        load_weights(model, old)


def test_presets_take_their_bases_weights(folder, tmp_path):
    state = seeded(timm.create_model("mobilenetv2_100", num_classes=10)).state_dict()
    save_file(state, tmp_path / "base.safetensors")
    for name in [V2, REPLACED]:
        model, notes = build(make_spec(name, [str(n) for n in range(10)]), weights=tmp_path / "base.safetensors")
        assert notes == []
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k not in ulsam_parameters(model))
    overlay = {"file": str(tmp_path / "base.safetensors"), "num_classes": 10}
    model = timm.create_model(REPLACED, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k not in ulsam_parameters(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.0.bn1.weight"), r"blocks\.1\.0\.bn1\.weight is missing$"),
        (lambda s: s.update(extra=torch.ones(1)), "extra belongs to no layer$"),
        (
            lambda s: s.update({"conv_stem.weight": torch.ones(3)}),
            r"conv_stem\.weight: \[3\] there, \[16, 3, 3, 3\] here",
        ),
        (lambda s: s.update({"blocks.5.2.bn1.weight": torch.ones(3)}), r"blocks\.5\.2\.bn1\.weight has another shape$"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.2.")], r"is missing \(and \d+ more\)$"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(trained, change, message):
    state = dict(trained)
    change(state)
    model, _ = build(make_spec(SMALL, [str(n) for n in range(1000)], [Edit("replace", "17")]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UlsamError, match=message) as caught:
        load_weights(model, state, "w.pth")
    assert str(caught.value).startswith("w.pth does not fit this model: ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_refused(folder):
    with pytest.raises(UlsamError, match=r"backbone\.safetensors does not fit this model: .* more\)$"):
        build(make_spec("resnet18", ["a", "b"]), weights=folder / "backbone.safetensors")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["bomb.pth", "bomb.safetensors", "bomb.bin"])
def test_a_pickle_with_code_in_it_is_not_run(tmp_path, name):
    sprung = tmp_path / "sprung"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Bomb(sprung)}, tmp_path / name)
    for call in (read_weights, load, read_spec):
        with pytest.raises(UlsamError) as caught:
            call(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(sprung)))
    with pytest.raises(UlsamError):
        read_weights(tmp_path / name)
    assert not sprung.exists()
    pickle.loads((tmp_path / name).read_bytes())  # the bomb is a real one
    assert sprung.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": [1]}, {3: torch.ones(1)}, torch.ones(2), None])
def test_a_checkpoint_that_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UlsamError, match=r"x\.pth (is no state dict|holds no weights)") as caught:
        read_weights(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_truncated_checkpoints_are_refused(folder, tmp_path):
    for name in ["plain.pth", "whole.safetensors"]:
        whole = (folder / name).read_bytes()
        for tenth in range(10):
            (tmp_path / name).write_bytes(whole[: len(whole) * tenth // 10])
            with pytest.raises(UlsamError, match="holds no weights that can be read safely") as caught:
                read_weights(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(UlsamError, match=r"no weight file .*nothing\.pth"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(UlsamError, match=r"is a folder without model\.safetensors$"):
        read_weights(tmp_path)


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
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    spec = make_spec(SMALL, ["a", "b"], [Edit("replace", "17")], size=64)
    save(build(spec)[0], spec, path)
    return path


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


# -------------------------------------------------------------------------------------------------- specs


def test_the_spec_of_a_model_has_timms_data_configuration():
    spec = make_spec("mobilenetv1_100", ["a"])
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg("mobilenetv1_100").to_dict())
    for key in ("input_size", "interpolation", "crop_pct", "mean", "std"):
        assert getattr(spec, key) == config[key], key
    assert make_spec("ulsam_mobilenetv1_100_insert_11", ["a"]).mean == spec.mean
    given = make_spec(SMALL, ["a"], size=96, interpolation="bilinear", crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert given.input_size == (3, 96, 96)
    assert (given.interpolation, given.crop_pct, given.mean, given.std) == ("bilinear", 1.0, (0.5,) * 3, (0.5,) * 3)
    gray = make_spec(SMALL, ["a"], model_args={"in_chans": 1})
    assert (gray.input_size, len(gray.mean), len(gray.std)) == ((1, 224, 224), 1, 1)


@pytest.mark.slow
def test_edits_are_traced_at_the_specs_size():
    """A model with a fixed input size runs at that size alone; one that folds pixels into channels hides these."""
    fixed = make_spec(
        "maxvit_rmlp_pico_rw_256", ["a"], [Edit("insert", "stages.0")], size=128, model_args={"img_size": 128}
    )
    assert any(isinstance(module, ULSAM) for module in meta_model(fixed).modules())
    folding = make_spec("tresnet_m", ["a"], [Edit("replace", "body.layer1.1")])
    assert isinstance(meta_model(folding).body.layer1[1], ULSAM)


def test_mistakes_in_a_spec_are_named():
    with pytest.raises(UlsamError, match="timm has no model 'mobilenet_v9'"):
        make_spec("mobilenet_v9", ["a"])
    with pytest.raises(UlsamError, match=r"timm has no model 'resnet18\.nope': Invalid pretrained tag"):
        make_spec("resnet18.nope", ["a"])
    with pytest.raises(UlsamError, match="model arguments may not hold features_only"):
        build(ModelSpec("resnet18", ("a",), model_args={"features_only": True}))
    with pytest.raises(UlsamError, match="timm cannot build resnet18"):
        build(ModelSpec("resnet18", ("a",), model_args={"depth": 3}))
    with pytest.raises(UlsamError, match="no module is named 'blocks'"):
        build(ModelSpec("resnet18", ("a",), edits=(Edit("insert", "blocks"),)))


def test_a_sketch_has_shapes_and_no_memory(models):
    shapes = {name: value.shape for name, value in models[V2].state_dict().items()}
    model = meta_model(make_spec(V2, [str(n) for n in range(1000)]))
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])


def test_ulsam_parameters_are_those_of_the_layers(models):
    assert ulsam_parameters(models[V2]) == ["blocks.5.2.ulsam.depthwise.weight", "blocks.5.2.ulsam.pointwise.weight"]
    assert ulsam_parameters(nn.Conv2d(3, 3, 1)) == []
    assert set(ulsam.model.build.__all__) <= set(dir(ulsam.model.build))
