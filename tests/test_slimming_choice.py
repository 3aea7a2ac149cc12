"""Which blocks slimming chooses: by damage, by measured time, and after reconstruction."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import ulsam
from slimming_runs import CLASSES, SETTINGS, SIZE, kept, save_untrained
from tiny import draw_splits, options
from ulsam.base import logs
from ulsam.base.errors import UlsamError
from ulsam.base.timing import Timing, time_in_turn
from ulsam.cli import main
from ulsam.data.opening import open_data
from ulsam.model.build import load, save
from ulsam.study.slim import slim
from ulsam.study.slim_blocks import Block, SwitchableModel
from ulsam.study.slim_budget import Budget
from ulsam.study.slim_choose import BlockSearch
from ulsam.study.slim_damage import SampleScore
from ulsam.study.slim_latency import call_of, check_engine
from ulsam.study.slim_progress import SearchProgress
from ulsam.study.slim_record import SlimRecord
from ulsam.study.slim_report import choice_lines
from ulsam.surgery.cost import cost
from ulsam.training.evaluate import ALONE, evaluate_batches
from ulsam.training.sample import draw_sample


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=12, val=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "model.safetensors")


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
    record.data["blocks"] = [block.entry() for block in blocks]
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
    record.data["blocks"] = [block.entry() for block in blocks]
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
    record.data["blocks"] = [block.entry() for block in blocks]
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


def test_a_log_says_how_far_the_search_is(tmp_path, logged):
    """Two of four blocks are to go; with no seconds between two lines, each measurement has one."""
    asked = Budget("macs", 0.85)
    record = SlimRecord(tmp_path / "out", asked.entry())
    blocks = [Block(f"b{n}", n, "Block", (8, 4, 4), 1, cost(nn.Conv2d(3, 3, 1), SIZE).macs // 10) for n in range(4)]
    passes = []

    def score(sets):
        passes.append(len(sets))
        return [SampleScore(float(len(names)), 0.5) for names in sets]

    dataclasses.replace(search_of(asked, blocks, record), score=score, log_interval=0.0).choose()
    said = [int(number) for number in re.findall(r"sets measured so far: (\d+)", logged())]
    assert said == list(itertools.accumulate(passes))
    assert said[-1] == len(record.get("measured")) == 1 + 4 + 6  # as it is, each block, every two of them


@pytest.mark.parametrize(("interval", "said"), [(0.0, [1, 3, 4]), (1000.0, [])])
def test_a_log_says_how_long_the_rest_takes(interval, said, logged):
    with logs.progress(total=5, shown=False) as bar:
        progress = SearchProgress(bar, "fewer `images`", interval)
        for sets in (1, 2, 1):
            progress.count(sets, 60.0 * sets)
    lines = logged().splitlines()
    assert [int(re.search(r"sets measured so far: (\d+)", line)[1]) for line in lines] == said
    left = [f"about {more} min 0 s left for up to {more} more" for more in (4, 2, 1)]
    assert all(rest in line for rest, line in zip(left, lines, strict=False))
