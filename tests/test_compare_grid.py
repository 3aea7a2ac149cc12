"""What arms mean, and which runs a grid needs in which order."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tiny import SETTINGS, TINY_MODEL, draw, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.study.arms import Arm, check_arms, check_choosing, parse_arms
from ulsam.study.grid import Failed, Grid, Run, Try, at_the_edge, close_call, longest_is_best
from ulsam.study.paths import without_paths
from ulsam.training.config import TrainConfig

ARMS = ("base", "slim: insert blocks.2 g=4", "size=24; lr=0.03")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"))


def shared(data: str | Path = "data", **settings: Any) -> TrainConfig:
    return TrainConfig.from_mapping({**SETTINGS, "data": str(data), **settings})


def grid(*arms: str, **options: Any) -> Grid:
    return Grid(parse_arms(arms), shared(**options.pop("settings", {})), **options)


class Results:
    """What came of runs so far, by arm and name; and what to say of those that were not run."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Mapping[str, Any] | Failed] = {}

    def __call__(self, run: Run) -> Mapping[str, Any] | Failed | None:
        return self.found.get((run.arm.name, run.name))

    def add(self, run: Run, top1: float | None, loss: float = 1.0) -> None:
        assert (run.arm.name, run.name) not in self.found
        scores = {"top1": top1, "loss": loss}
        self.found[run.arm.name, run.name] = Failed("diverged") if top1 is None else {"scores": scores}


# arms


def test_an_arm_is_edits_and_settings_on_top_of_the_shared_ones() -> None:
    arm = Arm.parse("both: insert 17:1 g=8 form=released; size = 96; model_args={drop_rate: 0.1}; lr=1e-3")
    assert (arm.name, arm.slug, arm.edits) == ("both", "both", ("insert 17:1 g=8 form=released",))
    config = arm.config(shared(edits=["remove 16"]), seed=3)
    assert config.edits == ["remove 16", "insert 17:1 g=8 form=released"]
    assert (config.size, config.lr, config.model_args, config.seed) == (96, 0.001, {"drop_rate": 0.1}, 3)
    assert config.model == TINY_MODEL
    assert Arm.parse("small: base; size=24") == Arm("small", (), {"size": 24})
    assert Arm.parse(r"weights=C:\drop\n.safetensors").settings == {"weights": r"C:\drop\n.safetensors"}
    assert Arm.parse("m: model=a:b").settings == {"model": "a:b"}
    assert Arm.parse("ULSAM g=4: replace 14,17 g=4") == Arm("ULSAM g=4", ("replace 14,17 g=4",), {})
    assert Arm.parse("g=4: replace 14,17 g=4").name == "g=4"
    assert Arm.parse('model_args={"drop_rate": 0.1}').settings == {"model_args": {"drop_rate": 0.1}}
    assert Arm.parse("insert 17:1 g=8").name == "insert 17:1 g=8"
    assert Arm.parse("weights=/home/me/model.safetensors").name == "weights=model.safetensors"


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["base"], "two arms or more"),
        (["base", ""], "holds nothing"),
        (["base", "x: "], "holds nothing"),
        (["base", "turn 14"], "the arm 'turn 14': unknown edit 'turn'"),
        (["base", "x:remove 14"], "the arm 'x:remove 14': put a space after the colon"),
        (["base", "two words:replace 14 g=4; size=24"], "put a space after the colon"),
        (["base", "x:size=24"], "put a space after the colon"),
        (["base", "seed=3"], "the arm 'seed=3': `seed` is the same for all arms"),
        (["base", "data=x"], "`data` is the same for all arms"),
        (["base", "size=[1"], "cannot read size="),
        (["base", "???: size=24"], "needs a name"),
        (["base", "Base: size=24"], "two arms are called 'Base'"),
    ],
)
def test_arms_that_cannot_be_read(arms: list[str], message: str) -> None:
    with pytest.raises(UlsamError, match=message) as error:
        parse_arms(arms)
    assert "\n" not in str(error.value)


def test_an_arm_can_do_without_the_shared_teacher() -> None:
    taught = shared(teacher="model.safetensors", distill=0.7)
    assert Arm.parse("alone: teacher=null").config(taught) == Arm.parse("base").config(shared())
    assert Arm.parse("less: distill=0.2").config(taught).distill == 0.2
    with pytest.raises(UlsamError, match="the arm 'odd': `distill` needs a teacher"):
        Arm.parse("odd: teacher=null; distill=0.2").config(taught)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["base", "other: size=32"], "the arms 'base' and 'other' are the same model and spec"),
        (["base", "insert nowhere"], "the arm 'insert nowhere g=4' cannot be built: .*nowhere"),
        (["base", "big: model=no_such_model"], "the arm 'big' cannot be built: timm has no model"),
        (["base", "size=big"], "the arm 'size=big': `size` must be a whole number"),
        (["base", "color=red"], "the arm 'color=red': unknown setting 'color'"),
        (["base", "weights=missing.safetensors"], "the arm 'weights=missing.safetensors' cannot be built: no weight"),
        (["base", "taught: teacher=missing.safetensors"], "the arm 'taught' cannot be built: .*missing.safetensors"),
        (["base", "ulsam_lr=10"], "the arm 'ulsam_lr=10' cannot be built: `ulsam_lr` has nothing to act on"),
        (["base", "freeze=[nothing.here]"], "cannot be built: .*nothing.here"),
        (["base", "freeze=['*']"], "cannot be built: every parameter is frozen"),
        (["base", "rand_augment=foo"], "the arm 'rand_augment=foo' cannot be built: .*foo"),
        (["base", "accumulate=99"], "cannot be built: an epoch has 4 batches"),
    ],
)
def test_arms_that_cannot_be_built(arms: list[str], message: str, data: Path) -> None:
    with pytest.raises(UlsamError, match=message):
        check_arms(parse_arms(arms), shared(data))


def test_a_shared_rate_of_ulsam_layers_is_for_the_arms_that_have_some(data: Path) -> None:
    preset = "model=ulsam_mobilenetv2_100_replace_14"
    arms = parse_arms(["base", "remove blocks.2", "insert blocks.2", "insert blocks.2 layer=se", preset])
    scaled = shared(data, ulsam_lr=10.0)
    assert [arm.config(scaled).ulsam_lr for arm in arms] == [1, 1, 10, 1, 10]
    check_arms((arms[0], *arms[2:]), scaled)
    with pytest.raises(UlsamError, match="`ulsam_lr` has nothing to act on: no arm has a ULSAM layer"):
        check_arms(arms[:2], scaled)


def test_shared_images_for_reconstruction_are_for_the_arms_that_are_reconstructed(data: Path) -> None:
    torch.save(timm.create_model(TINY_MODEL, num_classes=3).state_dict(), data.parent / "base.pt")
    images = str(data / "val" / "class0")
    given = {"weights": str(data.parent / "base.pt"), "images_for_reconstruction": images}
    off, fitted = "off: remove blocks.3.0.se; reconstruct=no", "fitted: replace blocks.3.0.se width=3; reconstruct=no"
    arms = parse_arms(["base", "remove blocks.3.0.se", off, "insert blocks.2", fitted])
    used = [arm.config(shared(data, **given)).images_for_reconstruction for arm in arms]
    assert used == [None, images, None, None, images]
    check_arms(arms, shared(data, **given))
    with pytest.raises(UlsamError, match="`images_for_reconstruction` has nothing to reconstruct: no arm is"):
        check_arms((arms[0], *arms[2:4]), shared(data, **given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": (0.01, 0.03)}, "the arm 'size=24; lr=0.03' sets lr"),
        ({"seeds": 0}, "1 seed or more"),
        ({"tried_seeds": 0, "epochs": (1, 2)}, "tried with 1 seed or more"),
        ({"tried_seeds": 2}, "nothing to try"),
        ({"tried_within": -0.1}, "0 to 100 points"),
        ({"epochs": (2, 2)}, "number of epochs is given twice"),
        ({"settings": {"min_lr": 0.02, "lr": 0.05}, "rates": (0.01,)}, "sets lr|min_lr"),
    ],
)
def test_grids_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UlsamError, match=message):
        grid(*ARMS, **options)


def test_every_tried_rate_is_checked_before_training() -> None:
    with pytest.raises(UlsamError, match="the arm 'base': `min_lr`"):
        grid("base", "size=24", rates=(0.05, 0.001), settings={"min_lr": 0.002})


def test_choosing_needs_images_that_choosing_does_not_see(data: Path, tmp_path: Path) -> None:
    check_choosing(shared(data))
    with pytest.raises(UlsamError, match="leave `val_fraction` out"):
        check_choosing(shared(data, val_fraction=0.3))
    with pytest.raises(UlsamError, match="cannot be measured on train"):
        check_choosing(shared(data, val_split="train"))
    with pytest.raises(UlsamError, match="chosen on val, which the final runs are measured on"):
        check_choosing(shared(data), "val")
    with pytest.raises(UlsamError, match="has no split 'test' to choose on; it has train, val"):
        check_choosing(shared(data), "test")
    with pytest.raises(UlsamError, match="chosen on train, which is trained on"):
        check_choosing(shared(data), "train")
    draw(tmp_path, 4)
    with pytest.raises(UlsamError, match="needs an image folder or a table with val or test"):
        check_choosing(shared(tmp_path))


# which runs


def test_a_split_to_choose_on() -> None:
    settings = {"val_split": "test"}
    plan = grid("base", "size=24", rates=(0.01, 0.02), choose_split="val", tried_seeds=2, settings=settings)
    assert Grid.from_json(plan.to_json()) == plan
    look = Results()
    tried = plan.due(look)
    where = [(run.config.val_split, run.config.val_fraction, run.config.split_seed) for run in tried]
    assert where == [("val", None, 0)] * 8  # after training on all training images
    assert [run.config.seed for run in tried[:4]] == [0, 1, 0, 1]
    for run in tried:
        look.add(run, run.config.lr)
    assert {(run.config.val_split, run.config.val_fraction) for run in plan.due(look)} == {("test", None)}
    with pytest.raises(UlsamError, match="nothing to choose on val"):
        grid("base", "size=24", choose_split="val")


def test_all_rates_then_the_best_one_at_more_epochs_then_the_seeds() -> None:
    plan = grid("base", "slim: size=24", rates=(0.01, 0.02, 0.04), epochs=(1, 3), seeds=2)
    look = Results()
    top1 = {
        ("base", 0.01, 1): 0.5,
        ("base", 0.02, 1): 0.6,
        ("base", 0.04, 1): 0.6,  # as good: the earlier one is taken
        ("base", 0.02, 3): 0.55,  # more epochs do not help
        ("slim", 0.01, 1): None,  # fails
        ("slim", 0.02, 1): 0.3,
        ("slim", 0.04, 1): 0.4,
        ("slim", 0.04, 3): 0.7,
    }
    done = []
    while due := [run for run in plan.due(look) if run.name.startswith("choose")]:
        run = due[0]
        assert (run.config.val_fraction, run.config.split_seed, run.config.seed) == (0.2, 0, 0)
        assert run.config.val_every == run.config.epochs
        done.append((run.arm.name, run.config.lr, run.config.epochs))
        look.add(run, top1[done[-1]])
    assert sorted(done) == sorted(top1)
    assert done.index(("base", 0.04, 1)) < done.index(("slim", 0.01, 1))  # the base first
    assert [plan.chosen(arm, look) for arm in plan.arms] == [(0.02, 1), (0.04, 3)]
    finals = plan.due(look)
    names = [f"seed-{seed}-{choice}" for seed, choice in itertools.product((0, 1), ("0.02-1", "0.04-3"))]
    assert [(run.arm.name, run.name) for run in finals] == list(zip(["base", "slim"] * 2, names, strict=True))
    assert [(run.config.lr, run.config.epochs, run.config.seed) for run in finals[2:]] == [(0.02, 1, 1), (0.04, 3, 1)]
    assert {run.config.val_fraction for run in finals} == {None}
    assert plan.size == len(done) + len(finals)
    for run in finals:
        look.add(run, 0.5)
    assert plan.due(look) == []
    assert plan.tried(plan.arms[1], look)[0] == Try(0.01, 1, None, "diverged")


def test_the_mean_over_the_seeds_of_a_try_chooses() -> None:
    plan = grid("base", "size=24", rates=(0.01, 0.02), epochs=(1, 3), seeds=1, tried_seeds=2, settings={"seed": 7})
    base, look = plan.arms[0], Results()
    top1 = {(0.01, 1): (0.5, 0.7), (0.02, 1): (0.65, 0.4), (0.01, 3): (0.9, 0.2)}
    done = []
    while due := [run for run in plan.due(look) if run.arm == base and run.is_try]:
        config = due[0].config
        number = config.seed - 7
        assert config.split_seed == number and config.val_fraction == 0.2  # each seed holds out other images
        done.append(due[0].name)
        look.add(due[0], top1[config.lr, config.epochs][number])
        if (config.lr, config.epochs, number) == (0.02, 1, 0):
            assert plan.chosen(base, look) is None and len(plan.tries(base, look)) == 4  # the second seed is to come
    both = [f"{name}{seed}" for name in ("choose-0.01-1", "choose-0.02-1", "choose-0.01-3") for seed in ("", "-seed-8")]
    assert done == both
    assert plan.tried(base, look)[0] == Try(0.01, 1, pytest.approx(0.6), None, (0.5, 0.7), 1.0)
    assert plan.chosen(base, look) == (0.01, 1)
    (final,) = plan.finals(base, look)
    assert (final.name, final.config.split_seed) == ("seed-7-0.01-1", 0)
    assert plan.size == 2 * (3 * 2 + 1)
    assert Grid.from_json(json.loads(json.dumps(plan.to_json()))).tried_seeds == 2


def test_the_lower_loss_chooses_where_as_many_images_are_right() -> None:
    plan = grid("base", "size=24", rates=(0.01, 0.02, 0.04), epochs=(1, 3), seeds=1, tried_seeds=2)
    base, look = plan.arms[0], Results()
    found = {
        (0.01, 1): ((223, 1.0), (222, 1.1)),
        (0.02, 1): ((215, 1.1), (230, 0.8)),  # 445 of 592 as well, in another order of rounding
        (0.04, 1): ((222, 0.2), (222, 0.2)),  # an image less
        (0.02, 3): ((224, 0.9), (221, 0.96)),
    }
    while due := [run for run in plan.due(look) if run.arm == base and run.is_try]:
        right, loss = found[due[0].config.lr, due[0].config.epochs][due[0].config.seed]
        look.add(due[0], right / 296, loss)
    assert plan.chosen(base, look) == (0.02, 3)
    tries = plan.tried(base, look)
    assert [entry.loss for entry in tries] == pytest.approx([1.05, 0.95, 0.2, 0.93])
    assert at_the_edge(tries) is None  # the smallest rate is as good, but for its loss


def test_rates_close_to_the_best_get_the_further_epochs_too() -> None:
    plan = grid("base", "size=24", rates=(0.01, 0.02, 0.04, 0.08), epochs=(1, 3), seeds=1, tried_within=0.01)
    base, look = plan.arms[0], Results()
    top1 = {(0.01, 1): 0.594, (0.02, 1): 0.6, (0.04, 1): 0.58, (0.08, 1): None, (0.01, 3): 0.72, (0.02, 3): 0.71}
    while due := [run for run in plan.due(look) if run.arm == base and run.is_try]:
        look.add(due[0], top1.pop((due[0].config.lr, due[0].config.epochs)))
    assert not top1 and plan.chosen(base, look) == (0.01, 3)
    assert Grid.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    before = {name: value for name, value in plan.to_json().items() if name != "tried_within"}
    assert Grid.from_json(before).tried_within == 0  # a plan of before tried the best rate alone


def test_a_choice_against_the_loss_by_less_than_a_point_is_close() -> None:
    best, far, wild = Try(0.02, 2, 0.6, loss=1.5), Try(0.01, 2, 0.58, loss=1.2), Try(0.04, 2, None, "diverged")
    assert close_call([best, far, wild]) is None
    assert close_call([best, far, Try(0.04, 2, None)]) is None  # it has not ended
    near, nearer = Try(0.005, 2, 0.592, loss=1.4), Try(0.03, 2, 0.599, loss=1.45)
    assert close_call([far, nearer, best, near, wild]) == (best, near)
    assert close_call([best, Try(0.005, 2, 0.599, loss=1.6)]) is None


def test_so_is_one_that_dropped_a_rate_before_the_last_number_of_epochs() -> None:
    taken, dropped, longer = (
        Try(0.01, 4, 0.836, loss=0.78),
        Try(0.02, 4, 0.835, loss=0.70),
        Try(0.01, 8, 0.87, loss=0.6),
    )
    assert close_call([taken, dropped, longer]) == (taken, dropped)
    assert close_call([taken, dropped, longer, Try(0.02, 8, 0.85, loss=0.65)]) is None  # it had its chance
    assert close_call([taken, dropped, longer, Try(0.02, 8, 0.865, loss=0.5)])[0] is longer  # type: ignore[index]


def test_a_try_counts_only_with_all_its_seeds() -> None:
    plan = grid("base", "size=24", rates=(0.01, 0.02), seeds=1, tried_seeds=2)
    base, look = plan.arms[0], Results()
    for run, value in zip(plan.tries(base, look), (0.9, None, 0.5, 0.5), strict=True):
        look.add(run, value)
    assert plan.tried(base, look)[0] == Try(0.01, 2, None, "seed 1: diverged", (0.9,), 1.0)
    assert plan.chosen(base, look) == (0.02, 2)


def test_another_choice_is_another_run() -> None:
    """A winning rate is added, or a failed try succeeds later: the runs of the earlier choice are left as they are."""
    look = Results()
    plan = grid("base", "size=24", rates=(0.01, 0.02), seeds=1)
    while due := plan.due(look):
        look.add(due[0], {0.01: 0.5, 0.02: 0.6}[due[0].config.lr])
    more = grid("base", "size=24", rates=(0.01, 0.02, 0.04), seeds=1)
    for run in more.due(look):
        assert run.name == "choose-0.04-2"
        look.add(run, 0.7 if run.arm.name == "base" else 0.1)
    assert [(run.arm.name, run.name) for run in more.due(look)] == [("base", "seed-0-0.04-2")]
    assert plan.due(look) == []


def test_an_arm_whose_tries_all_fail_has_no_final_runs() -> None:
    plan = grid("base", "size=24", rates=(0.01, 0.02), seeds=1)
    look = Results()
    for run in plan.due(look):
        look.add(run, None if run.arm.name == "size=24" else 0.5)
    assert [(run.arm.name, run.name) for run in plan.due(look)] == [("base", "seed-0-0.01-2")]


def test_one_rate_is_no_choice() -> None:
    plan = grid("base", "size=24", rates=(0.07,), epochs=(3,), seeds=3)
    assert (plan.choosing, plan.size) == (False, 6)
    assert {(run.config.lr, run.config.epochs) for run in plan.due(Results())} == {(0.07, 3)}
    assert [run.config.seed for run in grid("base", "size=24", settings={"seed": 7}, seeds=2).due(Results())][::2] == [
        7,
        8,
    ]


def test_a_grid_survives_its_file_and_later_settings() -> None:
    plan = grid("base", "slim: insert blocks.2; size=24", rates=(0.01, 0.02), epochs=(1, 2))
    stored = json.loads(json.dumps(plan.to_json()))
    assert Grid.from_json(stored) == plan
    del stored["shared"]["split_seed"]  # as an earlier version wrote it
    assert Grid.from_json(stored) == plan
    with pytest.raises(UlsamError, match="not the plan of a comparison"):
        Grid.from_json({"arms": []})
    with pytest.raises(UlsamError, match="of an earlier version"):
        Grid.from_json({**plan.to_json(), "close": 1.0})


def test_the_edge_of_the_tried_rates() -> None:
    assert at_the_edge([Try(0.01, 1, 0.6), Try(0.02, 1, 0.5), Try(0.04, 1, None, "diverged")]) == "smallest"
    assert at_the_edge([Try(0.01, 1, 0.6), Try(0.02, 1, 0.5), Try(0.04, 1, None)]) is None  # it has not ended
    assert at_the_edge([Try(0.01, 1, 0.6)]) is None
    assert at_the_edge([Try(0.01, 1, None), Try(0.02, 1, None)]) is None


def test_the_most_epochs_that_were_tried() -> None:
    first = [Try(0.01, 2, 0.5), Try(0.02, 2, 0.6)]
    assert longest_is_best([*first, Try(0.02, 4, 0.7)])
    assert not longest_is_best([*first, Try(0.02, 4, 0.55)])
    assert not longest_is_best([*first, Try(0.02, 4, None)])  # it has not ended
    assert not longest_is_best([*first, Try(0.02, 4, None, "diverged")])
    assert not longest_is_best(first)


def test_no_path_is_published() -> None:
    found = without_paths(
        {
            "command": "ulsam compare /a/b/cub --arm 'old: weights=../w/model.safetensors; lr=0.1' --out ~/runs/x",
            "list": ["/a/b/c d.jpg", "torch/imagenet", "3/4", "cannot read ./x/y.png: gone"],
            "number": 3,
        }
    )
    assert found == {
        "command": "ulsam compare cub --arm 'old: weights=model.safetensors; lr=0.1' --out x",
        "list": ["c d.jpg", "torch/imagenet", "3/4", "cannot read y.png: gone"],
        "number": 3,
    }
