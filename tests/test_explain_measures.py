"""Numbers about attention maps and class activation maps, against naive references."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from explaining import images, one_pixel, random, tiny_model
from tiny import TINY_MODEL
from ulsam.base.errors import UlsamError
from ulsam.data.birds import draw_birds, mark_boxes
from ulsam.explanation import Explainer, measures, perturb
from ulsam.explanation.cam import upsampled
from ulsam.explanation.explainer import LayerMaps
from ulsam.explanation.explanation import attention_row
from ulsam.explanation.map_numbers import CAM, MapNumbers
from ulsam.explanation.regions import BIRD, at_size, mark_areas
from ulsam.model.spec import Edit, ModelSpec
from ulsam.training.evaluate import spec_transform

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
    found = mark_boxes(path)
    assert found is not None
    size, boxes = found
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
