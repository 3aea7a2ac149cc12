"""Presets by name, and the specs of models."""

import pytest
import timm
import torch
from torch import nn

import ulsam.model.build
from seeded_models import REPLACED, SMALL, V2, image, seeded
from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import (
    PLACEMENTS,
    build,
    make_spec,
    meta_model,
    ulsam_parameters,
)
from ulsam.model.spec import Edit, ModelSpec

PRESETS = sorted(PLACEMENTS)
V1 = "ulsam_mobilenetv1_100_insert_13"


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
    with pytest.raises(UlsamError, match=r"the package has a trained model mobilenetv2_100\.grocery81_ulsam75$"):
        make_spec("mobilenetv2_100.grocery81_ulsam", ["a"])
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
