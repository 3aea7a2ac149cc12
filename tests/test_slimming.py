"""Slimming on a tiny model: blocks, damage and time, and the whole of it, stopped and started again too."""

import copy
import dataclasses
import itertools
import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import ulsam
from tiny import draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.base.timing import Timing, time_in_turn
from ulsam.cli import main
from ulsam.data.images import read_pixels
from ulsam.data.loading import eval_loader
from ulsam.data.opening import open_data
from ulsam.model.build import build, load, make_spec, read_spec, save
from ulsam.model.spec import Edit
from ulsam.study.slim import _result, fine_tuning, slim
from ulsam.study.slim_blocks import Block, SwitchableModel, find_blocks
from ulsam.study.slim_budget import Budget
from ulsam.study.slim_choose import BlockSearch
from ulsam.study.slim_damage import SampleScore, score
from ulsam.study.slim_latency import call_of, check_engine
from ulsam.study.slim_record import SlimRecord
from ulsam.study.slim_report import choice_lines
from ulsam.study.slim_stacked import can_stack, scores_together
from ulsam.surgery.cost import cost
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import ALONE, evaluate_batches, spec_transform
from ulsam.training.parts import open_images, spec_of_run
from ulsam.training.sample import draw_sample

SIZE = (3, 32, 32)
CLASSES = ("class0", "class1", "class2")
SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 8,
    "workers": 0,
    "threads": 1,
    "device": "cpu",
    "layout": "contiguous",
    "amp": "none",
    "compile": "none",
    "clip_grad": 9.0,
    "reconstruct_images": 0,  # new layers as they are made: fitting them has tests of its own
}
AT = "13,14,16,17"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=12, val=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with ten residual blocks, not trained: enough to have scores."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    spec = make_spec("mobilenetv2_035", CLASSES, size=32)
    torch.manual_seed(0)
    save(build(spec)[0], spec, path)
    return path


@pytest.fixture(scope="module")
def slimmed(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a slimming that nothing happened to."""
    out = tmp_path_factory.mktemp("slimmed") / "out"
    slim(model, str(data), out, params=0.85, at=AT, settings=SETTINGS)
    return out


def kept(out: Path) -> dict[str, Any]:
    return json.loads((out / "slim.json").read_text())


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


# time


def test_calls_take_turns():
    order: list[str] = []
    found = time_in_turn({name: lambda name=name: order.append(name) for name in "abc"}, 0, 2000)
    timed = order[9:]  # three of each to warm up
    assert {entry.turns for entry in found.values()} == {15}
    assert all(sorted(timed[first : first + 3]) == list("abc") for first in range(0, 45, 3))
    assert len({tuple(timed[first : first + 3]) for first in range(0, 45, 3)}) > 1  # shuffled
    assert found["a"].ratio == 1
    low, high = found["b"].ratio_quartiles
    assert low <= found["b"].ratio <= high


@pytest.mark.slow
def test_onnx_runtime_puts_out_what_the_model_does():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    check_engine("onnxruntime")
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), ulsam.ULSAM(8, form="released")).eval()
    model[1].running_mean += 0.1
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    found = call_of(model, (3, 12, 12), "onnxruntime", batch=2, threads=1)()
    assert torch.allclose(torch.from_numpy(found), model(images), atol=1e-5)


@pytest.mark.slow  # real times: on a busy machine a block may save none
# of one small image, ONNX Runtime takes no less time with a block replaced
@pytest.mark.parametrize(("engine", "batch"), [("eager", "1"), ("onnxruntime", "64")])
def test_a_budget_of_time_is_met_by_the_model_that_was_timed(model, data, tmp_path, capsys, engine, batch):
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    argv = ["slim", str(model), str(data), "--out", str(tmp_path / "out"), "--latency", "0.93", "--no-train"]
    argv += ["--latency-seconds", "0", "--latency-threads", "1", "--max-sets", "4", "--groups", "2"]
    argv += ["--engine", engine, "--latency-batch", batch, *options(SETTINGS)]
    status, shown = main(argv), capsys.readouterr()
    if status:  # a busy machine: no blocks were timed to be fast enough
        assert re.search(r"of the time: --latency must be that or more|none of the \d+ blocks saves time", shown.err)
        return
    found = kept(tmp_path / "out")
    timed = {tuple(entry["blocks"]): entry["ratio"] for entry in found["timed"]}
    assert timed[tuple(found["chosen"]["blocks"])] <= 0.93
    assert [entry["blocks"] for entry in found["timings"]] == [[], *([block["place"]] for block in found["blocks"])]
    assert "time saved" in shown.out
    assert f"chosen  {', '.join(found['chosen']['blocks'])}: " in shown.out


def search_of(asked, blocks, record, reconstructed=None, kind=BlockSearch):
    """A search among blocks b0, b1, ... whose damage is their number plus 1; nothing is built or timed for it."""
    model = nn.Conv2d(3, 3, 1)
    return kind(
        asked,
        blocks,
        SwitchableModel(nn.Sequential(model), ["0"], {"groups": 1}, SIZE),
        cost(model, SIZE),
        lambda sets: [SampleScore(sum(1.0 + int(name[1:]) for name in names), 0.5) for names in sets],
        record,
        lambda: None,
        reconstructed,
    )


@pytest.mark.parametrize(
    ("single", "times", "chosen", "how"),
    [
        (0.9, {(0, 1): 0.79}, (0, 1), "timed"),
        (0.9, {(0, 1): 0.85, (0, 2): 0.78}, (0, 2), "timed"),  # of two blocks too, the next by damage
        (0.9, {(0, 1, 2): 0.8}, (0, 1, 2), "timed"),  # any two are too slow; more is asked for
        (0.9, {}, (0, 1, 2, 3), "all"),  # more is asked for than blocks promise, but all together are
        (0.96, {(0, 1, 2, 3): 0.79}, (0, 1, 2, 3), "timed"),  # what each saves is too little, but all together reach it
        (0.97, {(0, 1, 2): 0.79}, (0, 1, 2), "timed"),  # what each saves adds up to 0.12, and all together save 0.3
    ],
)
def test_a_set_that_is_slower_than_its_blocks_promise_is_not_taken(tmp_path, single, times, chosen, how):
    """Four blocks that save the same time each; 0.8 is asked for."""
    blocks = [Block(f"b{n}", n, "Block", (8, 4, 4), 1, 1) for n in range(4)]
    asked = Budget("latency", 0.8)
    record = SlimRecord(tmp_path / "out", asked.entry())
    ratios = {(): 1.0, **{(n,): single for n in range(4)}}
    others = {key: {2: 0.85, 3: 1.05}[size] for size in (2, 3) for key in itertools.combinations(range(4), size)}
    entries = {
        key: {"blocks": [str(n) for n in key], "seconds": 1.0, "ratio": ratio, "turns": 15}
        for key, ratio in {**ratios, **others, (0, 1, 2, 3): 0.7, **times}.items()
    }
    record.put("timings", [entries[key] for key in ratios])
    record.put("timed", [entry for key, entry in entries.items() if key not in ratios])
    search_of(asked, blocks, record).choose()
    found = SlimRecord(tmp_path / "out", asked.entry()).get("chosen")
    assert found["blocks"] == [str(n) for n in chosen]
    assert found["how"] == how
    slow = [rival for rival in found["rivals"] if rival != found["blocks"]]
    assert all(entries[tuple(map(int, rival))]["ratio"] > 0.8 for rival in slow)
    record.data["model"] = {"params": 100, "macs": 100}
    record.data["blocks"] = [{**dataclasses.asdict(block), "place": block.place} for block in blocks]
    reason = {
        "timed": f"of {1 + len(slow)} sets that were timed, by damage, the first"
        if slow
        else "the least damage of the",
        "all": "all blocks that save time reach 0.8 of the time; no smaller set was found",
    }[how]
    assert choice_lines(record.data)[-1].startswith(f"chosen  {', '.join(found['blocks'])}: {reason}")
    assert any(entry["blocks"] == found["blocks"] for entry in record.get("measured"))


def test_several_sets_that_are_fast_enough_are_compared_after_reconstruction(tmp_path):
    """Four blocks, of which one is to go; b1 is too slow, and reconstruction turns the order of the others round."""
    blocks = [Block(f"b{n}", n, "Block", (8, 4, 4), 1, 1) for n in range(4)]
    asked = Budget("latency", 0.9, reconstruct_sets=2)
    record = SlimRecord(tmp_path / "out", asked.entry())
    sets = [((), 1.0), ((0,), 0.85), ((1,), 0.85), ((2,), 0.85), ((3,), 0.85)]
    entries = [{"blocks": [str(n) for n in key], "seconds": 1.0, "ratio": ratio, "turns": 15} for key, ratio in sets]
    record.put("timings", entries)
    together = {**entries[0], "blocks": ["0", "1", "2", "3"], "ratio": 0.5}
    record.put("timed", [entries[1], {**entries[2], "ratio": 0.95}, entries[3], entries[4], together])
    search_of(asked, blocks, record, lambda names: SampleScore(1.0 - 0.1 * int(names[0][1:]), 0.5)).choose()
    found = record.get("chosen")
    assert (found["blocks"], found["rivals"]) == (["2"], [["0"], ["2"], ["1"]])  # the fourth is not needed
    assert [entry["blocks"] for entry in record.get("measured_reconstructed")] == [["0"], ["2"]]
    record.data["model"] = {"params": 100, "macs": 100}
    record.data["blocks"] = [{**dataclasses.asdict(block), "place": block.place} for block in blocks]
    reason = choice_lines(record.data)[-1]
    assert reason.startswith(
        "chosen  2: the least loss after reconstruction of 2 sets; before it 0 was first: of 3 sets"
    )
    assert "1 more reaches it and 1 is too slow, and one that was not timed may be better" in reason


def test_layer_none_takes_no_options():
    with pytest.raises(UlsamError, match="the layer none takes no groups, width or form: the blocks are removed"):
        Budget("macs", 0.75, layer={"layer": "none", "groups": 4})


def test_a_set_that_was_fast_enough_by_chance_is_not_taken(tmp_path):
    """Three blocks, of which one is to go; b1, of less damage than b2, is fast enough at its first timing alone."""
    readings = {(0, 1, 2): [0.7, 0.7], (0,): [0.95], (1,): [0.89, 0.92], (2,): [0.88, 0.86]}

    class Clocked(BlockSearch):
        def _time(self, sets):
            ratios = {(): 1.0, (0,): 0.9, (1,): 0.9, (2,): 0.9}
            if len(sets) == 1:
                ratios = {tuple(sorted(sets[0])): readings[tuple(sorted(sets[0]))].pop(0)}
            return {frozenset(numbers): Timing(1.0, ratio, (ratio, ratio), 15) for numbers, ratio in ratios.items()}

    asked = Budget("latency", 0.9)
    record = SlimRecord(tmp_path / "out", asked.entry())
    blocks = [Block(f"b{n}", n, "Block", (8, 4, 4), 1, 1) for n in range(3)]
    search_of(asked, blocks, record, kind=Clocked).choose()
    assert record.get("chosen")["blocks"] == ["2"]
    assert {tuple(entry["blocks"]): entry["ratio"] for entry in record.get("timed")} == {
        ("0", "1", "2"): 0.7,
        ("0",): 0.95,
        ("1",): 0.92,
        ("2",): 0.88,
    }


@pytest.mark.parametrize(
    ("most", "chosen", "measured"), [(0, "0", []), (1, "0", ["0"]), (2, "1", ["0", "1"]), (9, "2", ["0", "1", "2"])]
)
def test_of_the_sets_of_least_damage_the_best_after_reconstruction_is_chosen(tmp_path, logged, most, chosen, measured):
    """One of three blocks is to go; reconstruction turns their order round."""
    asked = Budget("macs", 0.9, reconstruct_sets=most)
    model, calls = nn.Conv2d(3, 3, 1), []

    def reconstructed(names):
        calls.append(names)
        return SampleScore(1.5 - 0.1 * int(names[0][1:]), 0.5)

    blocks = [Block(f"b{n}", n, "Block", (8, 4, 4), 1, cost(model, SIZE).macs // 5) for n in range(3)]
    for _ in range(2):  # what was measured is not measured again
        record = SlimRecord(tmp_path / "out", asked.entry())
        BlockSearch(
            asked,
            blocks,
            SwitchableModel(nn.Sequential(model), ["0"], {"groups": 1}, SIZE),
            cost(model, SIZE),
            lambda sets: [SampleScore(1.0 + sum(1 + int(name[1:]) for name in names), 0.5) for names in sets],
            record,
            lambda: None,
            reconstructed,
        ).choose()
        assert record.get("chosen")["blocks"] == [chosen]
    assert calls == [[f"b{number}"] for number in measured]
    assert record.get("chosen")["rivals"] == [["0"], ["1"], ["2"]]
    record.data["model"] = {"params": 100, "macs": 100}
    record.data["blocks"] = [{**dataclasses.asdict(block), "place": block.place} for block in blocks]
    lines = choice_lines(record.data)
    assert ("before it 0 was first" in lines[-1]) == (chosen != "0")
    assert any(("reconstructed: loss" in line) == bool(measured) for line in lines if "loss change" in line)
    assert ("damage  1: loss +2.0000, +0.4000 after reconstruction" in logged()) == (most > 1)


# the whole


@pytest.fixture(scope="module")
def calibrated(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with BatchNorm statistics of the images, without which nothing can be reconstructed."""
    loaded, spec = load(model)
    batches = draw_sample(open_data(str(data))[0], spec, 36, ALONE).images
    with torch.no_grad():
        for _ in range(30):
            loaded.train()(torch.cat(batches))
    path = tmp_path_factory.mktemp("calibrated") / "model.safetensors"
    save(loaded.eval(), spec, path)
    return path


def test_sets_are_compared_by_what_reconstruction_leaves(calibrated, data, tmp_path):
    """As `ulsam.reconstruct` does it, on images apart from those of the damage."""
    settings = {**SETTINGS, "reconstruct_images": 8}
    given = {"fine_tune": False, "macs": 0.97, "at": "16,17", "layer": {"layer": "none"}, "images": 16}
    found = slim(calibrated, str(data), tmp_path / "out", **given, settings=settings)
    assert [entry["blocks"] for entry in found["measured_reconstructed"]] == found["chosen"]["rivals"][:4]
    best = min(found["measured_reconstructed"], key=lambda entry: entry["loss"])
    assert found["chosen"]["blocks"] == best["blocks"]
    edited, spec = load(calibrated)
    images, _, _ = open_data(str(data))
    ulsam.remove(edited, ",".join(best["blocks"]), input_size=SIZE)
    found = ulsam.reconstruct(edited, draw_sample(images, spec, 8, ALONE, apart_from=16).images, steps=200)
    assert found[0].after < found[0].before
    scores = evaluate_batches(edited, draw_sample(images, spec, 16, ALONE).batches, len(CLASSES), world=ALONE)
    assert best["loss"] == pytest.approx(scores.loss, rel=1e-3)  # 200 steps spread rounding errors
    assert yaml.safe_load((tmp_path / "out" / "train.yaml").read_text())["edits"] == [f"remove {best['blocks'][0]}"]


@pytest.mark.slow
def test_images_for_reconstruction_are_used_in_the_choice(calibrated, data, tmp_path):
    losses = []
    for folder in ("train", "val"):
        other = {"images_for_reconstruction": str(data / folder)} if folder == "val" else {}
        settings = {**SETTINGS, "reconstruct_images": 8, **other}
        given = {"fine_tune": False, "macs": 0.97, "at": "14", "layer": {"layer": "none"}}
        found = slim(calibrated, str(data), tmp_path / folder, **given, settings=settings)
        losses.append(found["measured_reconstructed"][0]["loss"])
    assert losses[0] != losses[1]


def test_the_slimmed_model_keeps_to_the_budget_and_is_reported(model, data, slimmed, capsys):
    found = kept(slimmed)
    loaded, spec = load(slimmed / "run" / "model.safetensors")
    original, _ = load(model)
    assert cost(loaded, SIZE).params <= 0.85 * cost(original, SIZE).params
    assert spec.edits == (Edit("replace", ",".join(found["chosen"]["blocks"])),)
    scores = {tuple(entry["blocks"]): entry["loss"] for entry in found["measured"]}
    assert scores[tuple(found["chosen"]["blocks"])] == min(scores[tuple(rival)] for rival in found["chosen"]["rivals"])
    settings = yaml.safe_load((slimmed / "run" / "config.yaml").read_text())
    assert settings["teacher"] == settings["weights"] == str(model)
    assert settings["distill"] == 0.5
    result = found["result"]
    assert result["slimmed"] == json.loads((slimmed / "run" / "summary.json").read_text())["scores"]
    assert result["original"]["images"] == result["slimmed"]["images"] == 9


def test_the_original_is_measured_in_the_precision_of_the_run(model, data, slimmed):
    """Whose settings may say auto, where the run then chose."""
    summary = json.loads((slimmed / "run" / "summary.json").read_text())
    summary["config"] |= {"amp": "bf16", "layout": "channels_last"}
    loaded, seen = load(model)
    found = _result(loaded, TrainConfig.from_mapping({**summary["config"], "amp": "auto", "layout": "auto"}), summary)
    batches = eval_loader(open_data(str(data))[1], spec_transform(seen), batch_size=8, workers=0, device=ALONE.device)
    scores = [evaluate_batches(load(model)[0], batches, 3, amp=amp).loss for amp in (torch.bfloat16, None)]
    assert found["original"]["loss"] == pytest.approx(scores[0], rel=1e-6) != scores[1]


def test_a_finished_slimming_is_reported_again_and_nothing_is_done_twice(model, data, slimmed, capsys):
    before = {
        path: path.stat().st_mtime_ns for path in slimmed.rglob("*") if path.name not in ("slim.json", "train.yaml")
    }
    figures = kept(slimmed)
    argv = ["slim", str(model), str(data), "--out", str(slimmed), "--params", "0.85", "--at", AT, *options(SETTINGS)]
    assert main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert kept(slimmed) == figures
    assert f"{slimmed}/run/model.safetensors" in capsys.readouterr().out
    for change, message in [
        (["--params", "0.8"], "other settings: share was 0.85 and is 0.8 now"),
        (["--groups", "2"], "other settings: layer was {} and is {'groups': 2} now"),
        (["--epochs", "2"], "run holds a run with epochs 1, not 2: put that back"),
    ]:
        assert main([*argv, *change]) == 2
        assert message in capsys.readouterr().err
    at = argv.index("--clip-grad")
    assert main(argv[:at] + argv[at + 2 :]) == 2
    assert "run holds a run with clip_grad 9.0, not None: put that back" in capsys.readouterr().err
    assert kept(slimmed) == figures
    assert yaml.safe_load((slimmed / "train.yaml").read_text())["epochs"] == 1


@pytest.mark.slow
def test_what_another_version_wrote_is_refused_in_one_line(model, data, slimmed, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    found = kept(slimmed)
    del found["budget"]["reconstruct_sets"]
    (out / "slim.json").write_text(json.dumps(found))
    argv = ["slim", str(model), str(data), "--out", str(out), "--params", "0.85", "--at", AT, *options(SETTINGS)]
    assert main(argv) == 2
    line = f"{out / 'slim.json'} is of another version of ulsam, which knew no reconstruct_sets: choose another --out"
    assert capsys.readouterr().err.splitlines()[-1] == f"ulsam: error: {line}"


def test_a_model_with_edits_is_slimmed_further(data, tmp_path, capsys):
    spec = make_spec("mobilenetv2_035", CLASSES, [Edit("replace", "17", 2)], size=32)
    save(build(spec)[0], spec, tmp_path / "model.safetensors")
    argv = ["slim", str(tmp_path / "model.safetensors"), str(data), "--macs", "0.97", "--layer", "eca", "--no-train"]
    out = tmp_path / "the out"
    assert main([*argv, "--at", "14,16", "--out", str(out), *options(SETTINGS)]) == 0
    chosen = kept(out)["chosen"]["blocks"]
    config = TrainConfig.from_mapping(yaml.safe_load((out / "train.yaml").read_text()))
    assert config.edits == ["replace 17 g=2", f"replace {','.join(chosen)} layer=eca"]
    model, notes = build(spec_of_run(config, CLASSES), weights=config.weights)
    assert notes == []
    original = load(tmp_path / "model.safetensors")[0]
    assert torch.equal(model.blocks[5][2].pointwise.weight, original.blocks[5][2].pointwise.weight)
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"next    ulsam train --config '{out}/train.yaml' --out '{out}/run'"
    )


def wait_for(event: Any) -> None:
    end = time.monotonic() + 120
    while not event():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_log_says_how_far_the_search_is(model, data, tmp_path, monkeypatch, logged):
    monkeypatch.setattr("ulsam.study.slim_progress.INTERVAL", 0.0)  # a line for each pass
    for again in range(2):
        slim(model, str(data), tmp_path / "out", macs=0.97, at="16,17", fine_tune=False, settings=SETTINGS)
        lines = [line for line in logged().splitlines() if line.startswith("damage ")]
        sets = len(kept(tmp_path / "out")["measured"])
        numbers = [int(re.search(r"so far: (\d+)", line)[1]) for line in lines]
        assert numbers == ([] if again else [1, *range(3, sets + 1)])  # the base, both blocks, and the others


@pytest.mark.slow
def test_killed_and_stopped_it_resumes_to_the_same_end(model, data, slimmed, interpreter, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    argv = ["slim", str(model), str(data), "--out", str(out), "--params", "0.85", "--at", AT]
    argv += options({**SETTINGS, "save_seconds": 0})
    pid = interpreter.start(argv, log)
    wait_for(lambda: (out / "slim.json").exists() and len(kept(out).get("measured", [])) >= 3)
    assert interpreter.kill(pid) == -signal.SIGKILL
    measured = kept(out)["measured"]
    pid = interpreter.start(argv, log)
    wait_for((out / "run" / "checkpoint.pt").exists)
    code = interpreter.kill(pid, signal.SIGINT)
    assert kept(out)["measured"][: len(measured)] == measured
    assert code == 130, log.read_text()
    assert f"resume with the same arguments and --out {out}" in log.read_text()
    assert interpreter.run(argv, log) == 0
    mine, theirs = kept(out), kept(slimmed)
    assert mine["measured"] == theirs["measured"]
    assert mine["chosen"] == theirs["chosen"]
    assert mine["result"] == theirs["result"]
    models = [(folder / "run" / "model.safetensors").read_bytes() for folder in (out, slimmed)]
    assert models[0] == models[1]


@pytest.mark.slow
def test_the_images_that_the_original_was_not_trained_on_stay_held_out(model, data, tmp_path, logged):
    """Class folders, where a run holds images out by its seed."""
    run = tmp_path / "run"
    run.mkdir()
    beside, alone = Path(shutil.copy(model, run / "model.safetensors")), Path(shutil.copy(model, tmp_path))
    before = TrainConfig(str(data / "train"), seed=3, val_fraction=0.5)
    (run / "config.yaml").write_text(before.to_yaml())
    trained_on = set(open_images(before)[0].names)
    options = {"at": "17", "macs": 0.97, "fine_tune": False}
    for number, (path, given) in enumerate([(beside, {}), (beside, {"seed": 7}), (alone, {})]):
        slim(path, before.data, tmp_path / f"out{number}", settings={**SETTINGS, **given}, **options)
        said = "the held-out images may be ones that" in logged()
        config = TrainConfig.from_mapping(yaml.safe_load((tmp_path / f"out{number}" / "train.yaml").read_text()))
        measured = set(open_images(config)[1].names)
        assert said == bool(measured & trained_on) == (path == alone)
    spec = read_spec(model)
    assert fine_tuning(beside, spec, before.data, {"split_seed": 5, "val_fraction": 0.1}).split_seed == 5
    assert fine_tuning(beside, spec, str(data), {"val_split": "val"}).val_fraction is None


# mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give exactly one budget: --macs, --params or --latency, a share such as 0.75"),
        ("--macs 0.8 --params 0.8", "give exactly one budget"),
        ("--macs 1", "--macs is the share of the model's own MACs to keep, between 0 and 1, both excluded, e.g. 0.75"),
        ("--latency 1.5", "--latency is the share of the model's own time to keep"),
        ("--macs nan", "between 0 and 1"),
        (
            "--macs 0.1",
            "all 10 blocks that save MACs, replaced, leave 0.587 of the MACs: --macs must be that or more, not 0.1",
        ),
        ("--params 0.9 --at 17 --groups 3", "has no block to replace: blocks.5.2 is left out: 3 groups do not divide"),
        ("--macs 0.9 --at 15", "blocks.5.0 cannot be replaced: `ulsam candidates` lists the blocks that can"),
        ("--macs 0.9 --at blocks.77", "no module is named 'blocks.77'"),
        ("--macs 0.9 --layer se --groups 2", "groups and form are for ULSAM alone"),
        ("--macs 0.9 --images 0", "--images must be 1 or more, not 0"),
        ("--latency 0.9 --engine tensorrt", "--engine: 'tensorrt' is not one of eager, onnxruntime"),
        ("--macs 0.9 --lr 0", "--lr must be above 0"),
        ("--macs 0.9 --freeze layer9", "no module is named 'layer9'"),
        ("--macs 0.9 --out full", "full is not an empty folder: it holds no slim.json to resume from; name one"),
        ("--macs 0.9 --out taken", "taken/slim.json is not what slimming wrote: choose another --out"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(model, data, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "slim.json").write_text("{}")
    assert main(["slim", str(model), str(data), *options(SETTINGS), *words.split()]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert message in printed[-1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "letter.txt", "slim.json", "taken"]


def test_other_classes_are_refused(model, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "class1").rename(tmp_path / "data" / split / "wren")
    assert main(["slim", str(model), str(tmp_path / "data"), "--macs", "0.9", "--out", str(tmp_path / "out")]) == 2
    assert (
        f"has other classes than {model} was trained on: 'class2' where the model has 'class1'"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_settings_that_slimming_decides_are_refused(model, data, tmp_path):
    with pytest.raises(UlsamError, match="slimming decides teacher: leave it out of the settings"):
        slim(model, str(data), tmp_path / "out", macs=0.9, settings={"teacher": str(model)})


def test_a_model_without_a_place_is_refused(data, tmp_path, capsys):
    spec = make_spec("test_vit", CLASSES, model_args={"img_size": 32}, size=32)
    save(build(spec)[0], spec, tmp_path / "vit.safetensors")
    assert main(["slim", str(tmp_path / "vit.safetensors"), str(data), "--macs", "0.9", *options(SETTINGS)]) == 2
    assert "has no block to replace that takes and outputs the same feature map [B, C, H, W]" in capsys.readouterr().err
