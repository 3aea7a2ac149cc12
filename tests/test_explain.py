"""What a model looks at: class activation maps, attention maps, and numbers about them, against naive references."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

import ulsam
from tiny import TINY_MODEL, draw
from ulsam.base.errors import NotFinite, UlsamError
from ulsam.data.birds import draw_birds, mark_boxes
from ulsam.deploy.predict import predict
from ulsam.explanation import Explainer, measures, perturb
from ulsam.explanation.cam import cam_layer, grad_cam_plus_plus, upsampled
from ulsam.explanation.explainer import LayerMaps
from ulsam.explanation.explanation import attention_row
from ulsam.explanation.map_numbers import CAM, MapNumbers
from ulsam.explanation.regions import BIRD, at_size, mark_areas
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import build, make_spec, save
from ulsam.model.spec import Edit, ModelSpec
from ulsam.training.evaluate import spec_transform


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_model(*edits: Edit) -> tuple[nn.Module, ModelSpec]:
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, ["a", "b", "c"], edits, size=64)
    return build(spec)[0], spec


def images(number: int, size: int = 64, seed: int = 0) -> list[Tensor]:
    drawn = torch.randint(256, (number, size, size, 3), generator=torch.Generator().manual_seed(seed))
    return list(drawn.to(torch.uint8))


class Spot(nn.Module):
    """Gray of the pixel in row 3 and column 11 of 16, and 0 everywhere else: [B, 3, 16, 16] -> [B, 1, 16, 16]."""

    def forward(self, x: Tensor) -> Tensor:
        there = torch.zeros_like(x[:1, :1])
        there[:, :, 3, 11] = 1
        return x.mean(1, keepdim=True).relu() * there


class OnePixel(nn.Module):
    """Says "bright" by one pixel of the image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.weight = Spot(), nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        pixel = self.weight * self.see(x).sum((1, 2, 3))
        return torch.stack([pixel, torch.ones_like(pixel)], 1)


def one_pixel() -> Explainer:
    look = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return Explainer(
        OnePixel(), ModelSpec("one pixel", ("bright", "dark"), input_size=(3, 16, 16), crop_pct=1.0, **look)
    )


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


def test_token_models_and_images_too_small_are_refused() -> None:
    with pytest.raises(UlsamError, match="this VisionTransformer has no feature map"):
        cam_layer(timm.create_model("test_vit"), torch.zeros(1, 3, 160, 160))
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


# ------------------------------------------------------------------------------------------ measures


def some_maps(groups: int = 4, height: int = 5, width: int = 7) -> np.ndarray:
    return random(groups, height, width, seed=2).flatten(1).mul(2).softmax(1).view(groups, height, width).numpy()


def test_measures_of_maps_equal_naive_loops() -> None:
    maps = some_maps()
    flat = maps.reshape(4, -1).astype(np.float64)
    entropies = [-sum(p * math.log(p) for p in one) / math.log(35) for one in flat]
    assert measures.entropy_share(maps) == pytest.approx(entropies, rel=1e-5)
    assert measures.peak(maps) == pytest.approx([35 * max(one) for one in flat], rel=1e-6)
    pairs = list(itertools.combinations(flat, 2))
    assert measures.correlations(maps) == pytest.approx([np.corrcoef(a, b)[0, 1] for a, b in pairs], abs=1e-9)
    expected = np.mean([jensenshannon(a, b, base=2) ** 2 for a, b in pairs])
    assert measures.divergence(maps) == pytest.approx(expected, abs=1e-6)
    layer = LayerMaps("x", None, "equations", maps)
    assert (layer.entropy_share, layer.peak) == (pytest.approx(entropies), pytest.approx(measures.peak(maps)))


def test_flat_and_equal_maps_agree_as_they_should() -> None:
    maps = some_maps()
    flat = np.full_like(maps, 1 / 35)
    assert not measures.correlations(flat).size and measures.divergence(flat) == 0
    assert measures.correlations(np.stack([maps[0], maps[0], flat[0]])) == pytest.approx([1])
    assert measures.divergence(np.stack([maps[0], maps[0]])) == pytest.approx(0, abs=1e-12)
    assert not measures.correlations(maps[:1]).size and measures.divergence(maps[:1]) is None
    assert measures.entropy_share(np.ones((2, 1, 1))).tolist() == [1, 1]


def test_frequency_content_equals_a_naive_fourier_sum() -> None:
    x = random(2, 3, 4, 6)
    power, weighted = measures.radial_content(x)
    expected = np.zeros((2, 3))
    for u, v in itertools.product(range(4), range(6)):
        if (u, v) == (0, 0):
            continue
        wave = np.exp(-2j * np.pi * (u * np.arange(4)[:, None] / 4 + v * np.arange(6) / 6))
        strength = np.abs((x.numpy() * wave).sum((2, 3))) ** 2
        # cycles over 6 pixels, the width: of 4 rows, u cycles over the height are 6 / 4 u over the width
        radius = math.hypot(min(u, 4 - u) * 6 / 4, min(v, 6 - v))
        expected += np.stack([strength.sum(0), radius * strength.sum(0)])
    assert np.allclose([power.numpy(), weighted.numpy()], expected, rtol=1e-6)


def test_subspaces_of_distinct_frequencies_lie_further_apart_than_chance() -> None:
    power = torch.ones(32)
    distinct, chance = measures.spread_by_chance(power, torch.arange(32) // 8 + random(32) * 0.01, 4)
    assert distinct == pytest.approx(np.std([0, 1, 2, 3]), abs=0.01) and (chance < distinct).all()
    alike, chance = measures.spread_by_chance(power, torch.arange(32) % 8.0, 4)
    assert alike == 0 and (chance >= alike).all()


# ------------------------------------------------------------------------------------------ deletion, insertion, drop


def test_curves_equal_a_naive_loop() -> None:
    model, spec = tiny_model()
    explainer = Explainer(model.eval(), spec)
    inputs, saliency = explainer.images(images(2)), upsampled(random(2, 3, 3).abs(), (64, 64))
    targets = torch.tensor([1, 2])

    def scores(x: Tensor) -> Tensor:
        return model(x).softmax(1)

    curves = [
        perturb.deletion_curves(scores, inputs, saliency, targets, steps=4),
        perturb.insertion_curves(scores, inputs, saliency, targets, steps=4),
    ]
    with torch.no_grad():
        for number, step in itertools.product(range(2), range(5)):
            order = sorted(range(64 * 64), key=lambda pixel: -float(saliency[number].flatten()[pixel]))
            changed = torch.zeros(64 * 64, dtype=torch.bool)
            changed[order[: 64 * 64 * step // 4]] = True
            gone = inputs[number].clone()
            gone[:, changed.view(64, 64)] = 0
            expected = scores(gone[None])[0, targets[number]]
            assert curves[0][number, step] == pytest.approx(float(expected), abs=1e-5)
    whole = scores(inputs).detach().gather(1, targets[:, None])[:, 0]
    assert torch.allclose(curves[0][:, 0], whole, atol=1e-5) and torch.allclose(curves[1][:, -1], whole, atol=1e-5)
    for each in curves:
        assert perturb.area_under(each) == pytest.approx(np.trapezoid(each.numpy(), dx=0.25, axis=1), rel=1e-6)


def test_deleting_where_the_model_looks_is_faster_than_elsewhere() -> None:
    explainer = one_pixel()
    images = torch.full((1, 3, 16, 16), 0.9)
    target = torch.tensor([0])

    def scores(x: Tensor) -> Tensor:
        return explainer.model(x).softmax(1)

    there = torch.zeros(1, 16, 16)
    there[0, 3, 11] = 1
    right, wrong = (
        float(perturb.area_under(perturb.deletion_curves(scores, images, saliency, target))[0])
        for saliency in (there, -there)
    )
    chance = [
        float(perturb.area_under(perturb.deletion_curves(scores, images, random(1, 16, 16, seed=seed), target))[0])
        for seed in range(5)
    ]
    assert right <= min(chance) <= max(chance) <= wrong and right < np.mean(chance) < wrong
    kept = perturb.kept_confidence(scores, images, there, target)
    assert torch.allclose(kept, scores(images)[:, 0])
    assert perturb.kept_confidence(scores, images, 1 - there, target) < kept


# ------------------------------------------------------------------------------------------ numbers over images


def test_numbers_are_means_over_images_of_what_the_explanations_say() -> None:
    model, spec = tiny_model(Edit("insert", "blocks.2", 4))
    with torch.no_grad():
        model.get_submodule("blocks.2.0.ulsam").depthwise.weight.mul_(30)
    numbers = MapNumbers(model, spec)
    chunks = images(5)
    found = []
    for first, truths in ((0, ["a", None, "c"]), (3, ["a", "b"])):
        batch = numbers.explainer(chunks[first : first + 3])
        numbers.add(batch, truths, [None] * len(batch))
        found += batch
    result = numbers.result()
    assert (result["images"], result["marks"]) == (5, None)
    (about,) = result["layers"]
    shares = np.array([one.layers[0].entropy_share for one in found])
    assert [one["mean"] for one in about["entropy_share"]] == pytest.approx(shares.mean(0))
    assert [one["standard_error"] for one in about["entropy_share"]] == pytest.approx(shares.std(0, ddof=1) / 5**0.5)
    labels = ["a", found[1].top(1)[0][0], "c", "a", "b"]
    for name, entry in about["entropy_of_class"].items():
        own = [shares[number].mean() for number, label in enumerate(labels) if label == name]
        assert entry["mean"] == pytest.approx(np.mean(own))
    assert about["correlation"]["mean"] == pytest.approx(
        np.mean([measures.correlations(o.layers[0].maps).mean() for o in found])
    )
    inputs, results = flow(model, "blocks.2.0.ulsam", numbers.explainer.images(chunks))
    for name, features in (("before", inputs), ("after", results)):
        power, weighted = (each.view(4, -1).sum(1) for each in measures.radial_content(features))
        assert about["frequency"][name]["cycles_per_width"] == pytest.approx((weighted / power).tolist(), rel=1e-4)
    assert about["frequency"]["before"]["cycles_per_width"] != about["frequency"]["after"]["cycles_per_width"]
    assert 0 <= about["frequency"]["before"]["random_groups_as_far_apart"] <= 1


def flow(model: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the output of a layer."""
    kept: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: kept.append((args[0], out)))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return kept[0]


def test_the_right_cam_beats_chance_in_the_numbers() -> None:
    numbers = MapNumbers((explainer := one_pixel()).model, explainer.spec)
    drawn = images(6, 16)
    for one in drawn:
        one[3, 11] = 255
    numbers.add(numbers.explainer(drawn), [None] * 6, [None] * 6)
    cam = numbers.result()["cam"]
    assert cam["deletion"]["mean"] < cam["deletion_random"]["mean"]
    assert cam["insertion"]["mean"] > cam["insertion_random"]["mean"]
    for kind in ("deletion", "insertion"):
        pairs = np.subtract(numbers.cam[kind], numbers.cam[f"{kind}_random"])
        assert cam[f"{kind}_minus_random"]["mean"] == pytest.approx(pairs.mean())
        assert cam[f"{kind}_minus_random"]["standard_error"] == pytest.approx(pairs.std(ddof=1) / 6**0.5)
    assert cam["average_drop"]["mean"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UlsamError, match="no image to take numbers from"):
        MapNumbers(explainer.model, explainer.spec).result()


def test_field_marks_are_found_where_they_were_drawn(tmp_path: Path) -> None:
    root = draw_birds(tmp_path / "birds", classes=2, train=1, val=1, size=64)
    path = sorted(root.glob("val/*/*.jpg"))[0]
    told = mark_boxes(path)
    assert told is not None
    size, boxes = told
    spec = ModelSpec(TINY_MODEL, ("a", "b"), input_size=(3, 64, 64), crop_pct=1.0)
    areas = mark_areas(path, spec_transform(spec))
    assert size == 64 and areas is not None and set(areas) == {BIRD, *boxes}
    for name, (x0, y0, x1, y1) in boxes.items():
        expected = np.zeros((64, 64))
        expected[y0:y1, x0:x1] = 1
        assert np.allclose(areas[name], expected)
        assert areas[BIRD][y0:y1, x0:x1].all()
        assert at_size(areas[name], 4, 4).mean() == pytest.approx(expected.mean())
        assert measures.share_within(np.full((4, 4), 1 / 16), at_size(areas[name], 4, 4)) == pytest.approx(
            expected.mean()
        )
    cropped = mark_areas(path, spec_transform(ModelSpec(TINY_MODEL, ("a", "b"), input_size=(3, 32, 32), crop_pct=0.5)))
    assert cropped is not None  # the middle quarter of the image, at its own size
    for name, area in cropped.items():
        assert np.allclose(area, areas[name][16:48, 16:48])
    other = tmp_path / "other" / "val" / "a"
    other.mkdir(parents=True)
    assert mark_areas(other / "1.jpg", spec_transform(spec)) is None
    for name in ("birds.json", "boxes.json"):
        (tmp_path / "other" / name).write_text("{}")
    with pytest.raises(UlsamError, match="are not those of ulsam birds"):
        mark_boxes(other / "2.jpg")


def test_numbers_of_marks_are_shares_of_mass() -> None:
    model, spec = tiny_model(Edit("insert", "blocks.2", 2))
    numbers = MapNumbers(model, spec, curves=False)
    area = np.zeros((64, 64), np.float32)
    area[:32, :32] = 1
    batch = numbers.explainer(images(2))
    numbers.add(batch, ["a", "b"], [{"bill": area}, {"bill": area}])
    result = numbers.result()
    assert set(result["cam"]) == {"layer"}
    marks = result["marks"]
    assert marks["area"]["bill"]["mean"] == 0.25
    quarter = [one.cam[: len(one.cam) // 2, : len(one.cam) // 2].sum() / one.cam.sum() for one in batch]
    assert marks[CAM]["bill"]["mean"] == pytest.approx(np.mean(quarter), rel=1e-5)
    first = [one.layers[0].maps[0] for one in batch]
    name = "blocks.2.0.ulsam, map 1"
    expected = np.mean([each[: len(each) // 2, : len(each) // 2].sum() for each in first])
    assert marks[name]["bill"]["mean"] == pytest.approx(expected, rel=1e-5)
    assert marks[name]["bill"]["times_area"] == pytest.approx(expected / 0.25, rel=1e-5)


def test_a_layer_of_nearly_uniform_maps_is_said_to_do_little():
    """And it does: what its maps change, against uniform ones, is below the bound that decides."""
    uniform = np.full((2, 7, 7), 1 / 49, np.float32)
    ripple = np.zeros((2, 7, 7), np.float32)
    ripple[:, 0, 0], ripple[:, 6, 6] = 0.009, -0.009
    for maps, note in (
        (uniform, "nearly uniform: this layer does little"),
        (uniform + ripple, "nearly uniform: this layer does little"),
        (uniform + 1.2 * ripple, ""),
    ):
        row = attention_row(LayerMaps("x", None, "equations", maps))
        assert row.note == note
        assert row.heading == "x: 2 maps of 7 × 7" + ("; " + note if note else "")
        x = np.random.default_rng(0).normal(size=(2, 7, 7))
        effect = np.linalg.norm((maps - uniform) * x) / np.linalg.norm(x)
        assert effect <= measures.max_effect(maps)
    fine = np.full((1, 64, 64), 1 / 4096, np.float32)
    fine[0, 0, 0] = 0.005  # twenty times uniform, and yet next to nothing
    assert attention_row(LayerMaps("x", None, "equations", fine)).note == "weak: this layer does little"
