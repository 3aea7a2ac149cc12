"""What a model looks at: class activation maps and explanations, against naive references."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import ulsam
from explaining import images, one_pixel, random, tiny_model
from tiny import draw
from ulsam.base.errors import NotFinite, UlsamError
from ulsam.deploy.predict import predict
from ulsam.explanation import Explainer
from ulsam.explanation.cam import cam_layer, grad_cam_plus_plus
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import save
from ulsam.model.spec import Edit
from ulsam.training.evaluate import spec_transform

# ------------------------------------------------------------------------------------------ class activation maps


def test_grad_cam_plus_plus_equals_the_papers_derivatives() -> None:
    """alpha from the second and third derivatives of Y = exp(score), by autograd, for pooling and a layer."""
    features = random(2, 3, 2, 2).relu().double().requires_grad_()
    weight = random(3, seed=1).double()
    score = (features.mean((2, 3)) * weight).sum(1)
    (gradients,) = torch.autograd.grad(score.sum(), features, retain_graph=True)
    y = score.exp().sum()
    (first,) = torch.autograd.grad(y, features, create_graph=True)
    second, third = torch.zeros_like(features), torch.zeros_like(features)
    for place in itertools.product(*map(range, features.shape)):
        (row,) = torch.autograd.grad(first[place], features, create_graph=True)
        (deep,) = torch.autograd.grad(row[place], features, retain_graph=True)
        second[place], third[place] = row[place].detach(), deep[place]
    alpha = second / (2 * second + features.sum((2, 3), keepdim=True) * third)
    expected = ((alpha * first.relu()).sum((2, 3), keepdim=True) * features).sum(1).relu().detach()
    expected /= expected.amax((1, 2), keepdim=True)
    found = grad_cam_plus_plus(features.detach(), gradients)
    assert torch.allclose(found, expected)
    assert found.amax((1, 2)).tolist() == pytest.approx([1, 1])


def test_a_cam_of_nothing_is_zero_and_one_of_negative_features_finite() -> None:
    assert not grad_cam_plus_plus(random(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)).any()
    found = grad_cam_plus_plus(-10 * random(1, 3, 4, 4).abs() + 1, torch.ones(1, 3, 4, 4))
    assert found.isfinite().all() and found.min() >= 0


def test_a_model_of_one_pixel_has_its_cam_there() -> None:
    explainer = one_pixel()
    assert explainer.cam_layer == "see"
    expected = np.zeros((16, 16))
    expected[3, 11] = 1
    for found in explainer(images(3, 16), targets=[0] * 3):
        assert np.array_equal(found.cam, expected)
    for found in explainer(images(3, 16), targets=[1] * 3):
        assert not found.cam.any()  # nothing that it sees speaks for "dark"


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "test_byobnet", "mobilenetv3_small_050"]
)
def test_the_cam_is_of_the_last_map_before_the_pooling(name: str) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    x = random(2, 3, 96, 96)
    found: list[Tensor] = []
    handle = model.get_submodule(cam_layer(model, x[:1])).register_forward_hook(lambda *args: found.append(args[2]))
    with torch.no_grad():
        features = model.forward_features(x)
    handle.remove()
    assert features.shape[2] > 1 and torch.equal(found[0], features)


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", 160), ("vit_tiny_patch16_224", 224), ("deit3_small_patch16_224", 224)]
)
def test_token_models_are_refused(name: str, size: int) -> None:
    with pytest.raises(UlsamError, match="this VisionTransformer has no feature map"):
        cam_layer(timm.create_model(name), torch.zeros(1, 3, size, size))


def test_images_too_small_are_refused() -> None:
    with pytest.raises(UlsamError, match="has no feature map"):
        cam_layer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 3, 3, 3))


# ------------------------------------------------------------------------------------------ explanations


def test_an_explanation_holds_what_the_model_and_its_layers_say(tmp_path: Path) -> None:
    model, spec = tiny_model(Edit("insert", "blocks.2", 2, form="released"), Edit("insert", "blocks.3", 4, width=8))
    draw(tmp_path, 1)
    paths = sorted(map(str, tmp_path.rglob("*.png")))
    expected = list(predict(model, paths, spec=spec))
    inputs: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ULSAM)}
    assert list(layers) == ["blocks.2.0.ulsam", "blocks.3.0.ulsam.0"]
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    model.eval()
    for path, prediction in zip(paths, expected, strict=True):
        found = ulsam.explain(model, path, spec)
        assert [name for name, _ in found.top()] == [name for name, _ in prediction.classes]
        assert [share for _, share in found.top()] == pytest.approx([share for _, share in prediction.classes])
        assert found.classes[found.target] == prediction.classes[0][0]
        assert [layer.name for layer in found.layers] == list(layers)
        for layer in found.layers:
            maps = layers[layer.name].attention(inputs[layer.name])[0].detach().numpy()
            assert np.allclose(layer.maps, maps, atol=1e-6)
            assert layer.maps.sum((1, 2)) == pytest.approx(np.ones(len(maps)), abs=1e-5)
        assert np.array_equal(found.pixels, spec_transform(spec).pixels(np.asarray(Image.open(path))).numpy())


def test_a_batch_gives_what_single_images_give_and_the_model_is_left_as_it_was() -> None:
    model, spec = tiny_model(Edit("insert", "blocks.2", 2))
    model.train()
    model.bn1.eval()
    next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    kept = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    explainer = Explainer(model, spec)
    together = explainer(images(3), targets=[2, 0, 1])
    alone = [explainer([one], [target])[0] for one, target in zip(images(3), [2, 0, 1], strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.target == other.target
        assert np.allclose(one.cam, other.cam, atol=1e-4)
        assert np.allclose(one.probabilities, other.probabilities, atol=1e-5)
        assert np.allclose(one.layers[0].maps, other.layers[0].maps, atol=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == kept
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_folded_model_is_explained_as_the_model_itself() -> None:
    model, spec = tiny_model(Edit("insert", "blocks.2", 2, form="released"))
    (plain,), (folded,) = (Explainer(one, spec)(images(1)) for one in (model.eval(), ulsam.fold(model, (3, 64, 64))))
    assert folded.layers[0].form == "folded"
    assert np.allclose(plain.layers[0].maps, folded.layers[0].maps, atol=1e-5)
    assert np.allclose(plain.cam, folded.cam, atol=1e-3)
    assert np.allclose(plain.probabilities, folded.probabilities, atol=1e-4)


def test_explain_takes_a_model_file_and_names_mistakes(tmp_path: Path) -> None:
    model, spec = tiny_model()
    save(model, spec, tmp_path / "model.safetensors")
    image = Image.new("RGB", (70, 90), (200, 30, 30))
    found = ulsam.explain(tmp_path / "model.safetensors", image, target="b")
    assert (found.classes[found.target], found.layers) == ("b", ())
    assert np.array_equal(found.cam, ulsam.explain(model, np.asarray(image), spec, target="b").cam)
    for arguments, message in [
        ((model, image), "a model in memory needs its `spec`"),
        ((tmp_path / "model.safetensors", image, spec), "which holds its own spec: leave `spec` out"),
        ((model, np.zeros((4, 4)), spec), r"uint8 \[H, W, 3\], not float64 \[4, 4\]"),
        ((model, tmp_path / "no.jpg", spec), "no.jpg: no such file"),
    ]:
        with pytest.raises(UlsamError, match=message):
            ulsam.explain(*arguments)
    with pytest.raises(UlsamError, match="no class 'wren': it knows a, b, c"):
        ulsam.explain(model, image, spec, target="wren")
    with torch.no_grad():
        model.get_classifier().bias.fill_(math.nan)
    with pytest.raises(NotFinite):
        ulsam.explain(model, image, spec)
