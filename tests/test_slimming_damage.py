"""The blocks that slimming can replace, and the damage of replacing them."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import ulsam
from slimming_runs import CLASSES, SETTINGS, SIZE, kept, save_untrained
from tiny import draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.images import read_pixels
from ulsam.data.opening import open_data
from ulsam.model.build import load, read_spec
from ulsam.study.slim import slim
from ulsam.study.slim_blocks import SwitchableModel, find_blocks
from ulsam.study.slim_damage import score
from ulsam.study.slim_stacked import can_stack, scores_together
from ulsam.surgery.cost import cost
from ulsam.training.evaluate import ALONE, evaluate_batches, spec_transform
from ulsam.training.sample import draw_sample


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=12, val=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "model.safetensors")


# blocks


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("mobilenetv3_small_050", "blocks.1.1 blocks.2.1 blocks.2.2 blocks.3.0 blocks.3.1 blocks.4.1 blocks.4.2"),
        ("resnet18", "layer1.0 layer1.1 layer2.1 layer3.1 layer4.1"),  # layer1 itself is no block
        pytest.param(  # nor is a convolution in one
            "regnetx_002", "s3.b2 s3.b3 s3.b4 s4.b2 s4.b3 s4.b4 s4.b5 s4.b6 s4.b7", marks=pytest.mark.slow
        ),
        ("mobilenetv1_100", "4 6 8 9 10 11 12 14"),  # which has no shortcut
    ],
)
def test_blocks_of_models_and_what_they_save(name, places):
    model = timm.create_model(name, num_classes=3)
    blocks, _, notes = find_blocks(model, SIZE, {"groups": 2, "form": "released"})
    assert [block.place for block in blocks] == places.split()
    assert notes == []
    before, at = cost(model, SIZE), [block.name for block in blocks]
    ulsam.replace(model, at[1:3], groups=2, form="released", input_size=SIZE)
    after = cost(model, SIZE)
    assert before.params - after.params == sum(block.params for block in blocks[1:3])
    assert before.macs - after.macs == sum(block.macs for block in blocks[1:3])


def test_blocks_that_groups_do_not_fit_are_left_out_and_said():
    model = timm.create_model("mobilenetv2_035")
    blocks, _, notes = find_blocks(model, SIZE, {"groups": 16})
    assert {block.shape[0] for block in blocks} == {16, 32}
    assert "blocks.1.1 is left out: 16 groups do not divide its 8 channels" in notes
    with pytest.raises(UlsamError, match=r"has no block to replace: blocks\.1\.1 is left out: 9 groups"):
        find_blocks(model, SIZE, {"groups": 9})


def test_single_convolutions_are_replaced_where_they_are_named():
    (block,), _, _ = find_blocks(timm.create_model("resnet18"), SIZE, {}, "layer1.0.conv1")
    assert (block.place, block.params) == ("layer1.0.conv1", 9 * 64 * 64 - 2 * 64)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    with pytest.raises(UlsamError, match=r"H, W\] \(single convolutions: name them by `at`\)$"):
        find_blocks(plain, SIZE, {})
    assert [block.name for block in find_blocks(plain, SIZE, {}, "2")[0]] == ["2"]


def test_a_switched_model_is_the_edited_one_and_then_as_it_was():
    model = timm.create_model("mobilenetv2_035", num_classes=3).eval()
    x, state = torch.randn(2, *SIZE), copy.deepcopy(model.state_dict())
    before, names = model(x), ["blocks.4.1", "blocks.5.2"]
    switched = SwitchableModel(model, [*names, "blocks.5.1"], {"groups": 2}, SIZE)
    torch.manual_seed(5)
    again = SwitchableModel(model, [*names, "blocks.5.1"], {"groups": 2}, SIZE)  # whatever the generator is at
    edited = ulsam.replace(copy.deepcopy(model), names, groups=2, input_size=SIZE)
    for name in names:
        edited.get_submodule(name).load_state_dict(switched.new[name].state_dict())
    with switched.replaced(names) as replaced:
        after = replaced(x)
    assert torch.equal(after, edited(x))
    with again.replaced(names) as replaced:
        assert torch.equal(after, replaced(x))
    assert not torch.equal(after, before)
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_narrow_blocks_are_fitted_to_the_blocks_before_the_damage_is_measured():
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=3)
    model(torch.randn(16, *SIZE))  # BatchNorm gets statistics
    names, x = ["blocks.3.1", "blocks.4.1"], torch.randn(32, *SIZE)
    _, switched, _ = find_blocks(model.eval(), SIZE, {"layer": "inverted_residual", "width": 4}, names)

    def distances() -> list[float]:
        found = []
        for name in names:
            with switched.replaced([name]) as replaced:
                found.append((replaced.forward_features(x) - before).square().mean().item())
        return found

    with torch.no_grad():
        before = model.forward_features(x)
        as_removed = distances()
        switched.reconstruct([x])
        assert all(fitted < 0.9 * removed for fitted, removed in zip(distances(), as_removed, strict=True))
        assert torch.equal(model.forward_features(x), before)


@pytest.mark.slow
def test_slimming_fits_on_the_images_of_the_fine_tuning_or_not_at_all(model, data, tmp_path):
    losses = []
    for number in (16, 0):
        layer, settings = {"layer": "inverted_residual", "width": 4}, {**SETTINGS, "reconstruct_images": number}
        out = tmp_path / str(number)
        slim(model, str(data), out, fine_tune=False, macs=0.97, at="17", layer=layer, settings=settings)
        (alone,) = (entry for entry in kept(out)["measured"] if entry["blocks"] == ["17"])
        losses.append(alone["loss"])
        assert list(kept(out).get("reconstructed", {})) == (["blocks.5.2"] if number else [])
    assert losses[0] != losses[1]
    loaded, spec = load(model)
    images, _, _ = open_data(str(data))
    removed = ulsam.remove(loaded, "17", input_size=SIZE)
    sample = draw_sample(images, spec, 400, ALONE)
    scores = evaluate_batches(removed, sample.batches, len(CLASSES), world=ALONE)
    assert losses[1] == pytest.approx(scores.loss, rel=1e-5)  # a new layer is the identity


# damage


def test_the_score_is_that_of_one_image_after_the_other(model, data):
    loaded, spec = load(model)
    images, _, _ = open_data(str(data))
    sample = draw_sample(images, spec, 20, ALONE, batch_size=8)
    assert sample.count == 20
    switched = SwitchableModel(loaded, ["blocks.5.1", "blocks.5.2"], {}, SIZE)
    with switched.replaced(["blocks.5.2"]) as replaced:
        found = score(replaced, sample, CLASSES, ALONE)

    edited = ulsam.replace(load(model)[0], "17", input_size=SIZE)
    edited.blocks[5][2].load_state_dict(switched.new["blocks.5.2"].state_dict())
    transform, seen = spec_transform(spec), []
    for path, label in images.samples:
        image = transform.normalize(transform.pixels(read_pixels(path, transform.reduction))[None])
        with torch.no_grad():
            logits = edited(image)
        seen.append((image, label, F.cross_entropy(logits, torch.tensor([label])).item(), int(logits.argmax())))
    chosen = [
        next(entry for entry in seen if torch.equal(entry[0][0], image))
        for batch in sample.batches
        for image in batch.images
    ]
    assert found.loss == pytest.approx(sum(loss for *_, loss, _ in chosen) / 20, rel=1e-5)
    assert found.top1 == sum(label == guess for _, label, _, guess in chosen) / 20
    assert len({id(entry) for entry in chosen}) == 20  # no image twice


@pytest.mark.parametrize("layer", ["ulsam", "none"])
def test_sets_measured_together_have_the_scores_that_each_has_alone(model, data, layer):
    loaded, spec = load(model)
    sample = draw_sample(open_data(str(data))[0], spec, 20, ALONE, batch_size=8)
    blocks, switched, _ = find_blocks(loaded, SIZE, {} if layer == "ulsam" else {"layer": "none"})
    names = [block.name for block in blocks]
    sets = [names[4:6], names[:2], [names[9]], [], names, [names[0], names[9]], names[2:8]]
    before = loaded(sample.images[0])
    assert can_stack(switched, sample.images[0][:2])
    together = scores_together(switched, sets, sample.batches)
    for some, found in zip(sets, together, strict=True):
        with switched.replaced(some) as replaced:
            alone = score(replaced, sample, CLASSES, ALONE)
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)
        assert found.top1 == alone.top1
    assert len({round(found.loss, 6) for found in together}) == len(sets)
    assert torch.equal(loaded(sample.images[0]), before)


def test_a_pass_over_sets_computes_what_they_share_once(model, data):
    loaded, spec = load(model)
    sample = draw_sample(open_data(str(data))[0], spec, 8, ALONE)
    blocks, switched, _ = find_blocks(loaded, SIZE, {})
    names, rows = [block.name for block in blocks], []
    loaded.conv_stem.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    loaded.conv_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    scores_together(switched, [[names[0]], names[:2], [names[9]]], sample.batches)
    assert rows == [8, 24]


def test_variants_are_not_stacked_where_a_connection_leads_around_a_block():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(torch.cat([x, self.block(x)], 1).mean((2, 3)))

    class Mixed(Around):  # which runs with a longer batch, and mixes the variants
        def forward(self, x):
            x = self.block(self.first(x))
            return self.last(torch.cat([x, x.flip(0)], 1).mean((2, 3)))

    for kind in (Around, Mixed):
        switched = SwitchableModel(kind().eval(), ["block"], {"layer": "none"}, SIZE)
        assert not can_stack(switched, torch.randn(2, *SIZE))
        assert isinstance(switched.model.block, nn.Sequential)


def test_slimming_chooses_alike_whether_sets_are_measured_together_or_alone(model, data, tmp_path):
    out = tmp_path / "out"
    found = slim(model, str(data), out, fine_tune=False, macs=0.9, at="10,13,14,16,17", settings=SETTINGS)
    loaded, spec = load(model)
    sample = draw_sample(open_data(str(data))[0], spec, 400, ALONE)
    blocks, switched, _ = find_blocks(loaded, SIZE, {}, "10,13,14,16,17")
    names = {block.place: block.name for block in blocks}

    def alone(sets):
        for some in sets:
            with switched.replaced(some) as replaced:
                yield score(replaced, sample, CLASSES, ALONE)

    sets = [entry["blocks"] for entry in found["measured"]]
    expected = [one.loss for one in alone([[names[place] for place in places] for places in sets])]
    assert [entry["loss"] for entry in found["measured"]] == pytest.approx(expected, rel=1e-5)
    losses = dict(zip(map(tuple, sets), expected, strict=True))
    assert found["chosen"]["blocks"] == min(found["chosen"]["rivals"], key=lambda places: losses[tuple(places)])


def test_slimming_says_what_it_will_measure_and_for_how_long(model, data, tmp_path, capsys):
    argv = ["slim", str(model), str(data), "--out", str(tmp_path / "out"), "--macs", "0.9", "--no-train"]
    assert main([*argv, "--at", "10,13,14,16,17", *options(SETTINGS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = next(line for line in lines if line.startswith("plan "))
    assert plan.startswith("plan    5 blocks one by one, up to ")
    assert plan.endswith("to shorten it: fewer --images, a smaller --max-sets, blocks named by --at")
    most = [int(number) for number in re.findall(r"up to (\d+) sets", plan)]
    (time_line,) = [line for line in lines if line.startswith("time ")]
    assert time_line.startswith(f"time    up to {sum(most)} sets to measure, about ")
    assert lines.index(plan) < lines.index(time_line)
    measured = len(kept(tmp_path / "out")["measured"])
    assert 6 < measured <= 6 + sum(most)


def test_the_sample_is_the_same_one_each_time_and_wherever_the_images_lie(model, data, tmp_path):
    spec = read_spec(model)
    shutil.copytree(data, tmp_path / "moved")
    samples = [draw_sample(open_data(str(root))[0], spec, 10, ALONE) for root in (data, data, tmp_path / "moved")]
    assert len({sample.names for sample in samples}) == 1
    for sample in samples[1:]:
        assert torch.equal(sample.batches[0].images, samples[0].batches[0].images)
    assert draw_sample(open_data(str(data))[0], spec, 10_000, ALONE).count == 36


@pytest.mark.parametrize("taken, number, common", [(20, 16, 0), (20, 20, 4), (36, 9, 9), (0, 36, 0)])
def test_a_sample_apart_from_another_shares_as_few_images_as_can_be(model, data, taken, number, common):
    images, spec = open_data(str(data))[0], read_spec(model)
    others = draw_sample(images, spec, number, ALONE, apart_from=taken)
    first = draw_sample(images, spec, taken, ALONE).images if taken else []
    seen = {hash(image.numpy().tobytes()) for batch in first for image in batch}
    mine = {hash(image.numpy().tobytes()) for batch in others.images for image in batch}
    assert (others.count, len(mine), len(mine & seen)) == (number, number, common)


def test_an_unreadable_image_of_the_sample_is_left_out(model, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "class0" / "000.png").write_bytes(b"broken")
    sample = draw_sample(open_data(str(tmp_path / "data"))[0], read_spec(model), 36, ALONE)
    assert (sample.count, len(sample.unreadable)) == (35, 1)
    assert sum(len(batch.labels) for batch in sample.batches) == 35


def test_validation_images_are_not_looked_at(model, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data / "train", other / "train")
    for name in CLASSES[:2]:
        (other / "val" / name).mkdir(parents=True)
        (other / "val" / name / "1.png").write_bytes(b"not read")
    found = [
        slim(model, str(root), tmp_path / f"out-{root.name}", fine_tune=False, macs=0.97, at="16,17", settings=SETTINGS)
        for root in (data, other)
    ]
    assert found[0]["measured"] == found[1]["measured"]
    assert found[0]["chosen"] == found[1]["chosen"]
