"""timm's optimizers and schedules by name: their groups, their rates, their state, and runs that resume with them."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from stopping import stop_after
from tiny import SETTINGS, draw_splits
from ulsam.base.distributed import World
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.training.checkpoint import read_checkpoint, write_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.loop import Trainer
from ulsam.training.optimizers import load_optimizer, make_optimizer, optimizer_names
from ulsam.training.train import resume, train

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training images: 4 updates an epoch."""
    return draw_splits(tmp_path_factory.mktemp("data"))


def config(data: Path | str, **settings: Any) -> TrainConfig:
    return TrainConfig.from_mapping({**SETTINGS, "data": str(data), "amp": "none", "lr": 0.01, **settings})


def net() -> nn.Module:
    torch.manual_seed(0)
    stem, depthwise = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, groups=8)
    return nn.Sequential(stem, nn.BatchNorm2d(8), depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def optimizer_for(model: nn.Module, opt: str, **opt_args: Any) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return make_optimizer(groups, opt, opt_args, lr=0.01, momentum=0.9)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        loss = nn.functional.cross_entropy(model(torch.randn(6, 3, 9, 9, generator=generator)), torch.arange(6) % 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("opt", optimizer_names())
def test_every_optimizer_goes_on_where_its_state_was_saved(opt: str) -> None:
    unbroken = net()
    optimizer = optimizer_for(unbroken, opt)
    start = {name: value.clone() for name, value in unbroken.state_dict().items()}
    steps(unbroken, optimizer, 0, 3)
    buffer = io.BytesIO()
    torch.save([unbroken.state_dict(), optimizer.state_dict()], buffer)
    steps(unbroken, optimizer, 3, 6)
    weights, state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    resumed = net()
    resumed.load_state_dict(weights)
    again = optimizer_for(resumed, opt)
    load_optimizer(again, state, opt)
    steps(resumed, again, 3, 6)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(start["0.weight"], weights["0.weight"])


def test_the_names_are_those_of_timm_that_need_nothing_more() -> None:
    names = optimizer_names()
    assert {"sgd", "adamw", "lamb", "adan", "lion", "muon", "madgrad", "rmsproptf"} <= set(names)
    assert not {"adahessian", "kron", "bnbadam", "fusedadam"} & set(names)


def test_arguments_reach_the_optimizer() -> None:
    given = optimizer_for(net(), "lamb", betas=[0.8, 0.9], max_grad_norm=2.0)
    expected = create_optimizer_v2(net().parameters(), opt="lamb", lr=0.01, betas=(0.8, 0.9), max_grad_norm=2.0)
    for name in ("betas", "max_grad_norm", "eps", "lr"):
        assert given.param_groups[0][name] == expected.param_groups[0][name]
    settings = config("birds", opt="lamb", opt_args={"betas": [0.8, 0.9]})
    assert TrainConfig.from_mapping({**vars(settings)}) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opt": "lamp"}, r"^timm has no optimizer 'lamp'; nearest: lamb, "),
        ({"opt": "SGD"}, r"^timm has no optimizer 'SGD'; nearest: sgd"),
        ({"opt": "adahessian"}, r"^the optimizer adahessian needs a second backward pass: take another one"),
        ({"opt": "bnbadam8bit"}, r"^the optimizer bnbadam8bit needs the package bitsandbytes, which ulsam does not"),
        ({"opt": "fusedlamb"}, r"^the optimizer fusedlamb needs the package apex, "),
        ({"opt": "kron"}, r"^the optimizer kron draws random numbers in its steps"),
        ({"opt": "lookahead_adam"}, r"^lookahead's averages are no part of a checkpoint: take adam alone$"),
        ({"opt": "lamb", "opt_args": {"beta": 1}}, r"^the optimizer lamb does not take `opt_args` {'beta': 1}: "),
        ({"opt": "adan", "opt_args": {"betas": "x"}}, r"^the optimizer adan does not take `opt_args` {'betas': 'x'}: "),
        ({"opt_args": {"betas": [0.9, 0.99]}}, r"^opt_args: the optimizer sgd takes no betas$"),
        ({"opt": "lion", "opt_args": {"eps": 1}}, r"^opt_args: the optimizer lion takes no eps$"),
        ({"opt": "adamw", "opt_args": {"lr": 1}}, r"^`opt_args` cannot hold lr: it has a setting of its own"),
        ({"opt": "adamw", "opt_args": {"layer_decay": 0.9}}, r"^`opt_args` cannot hold layer_decay"),
        ({"opt": "nadamw", "opt_args": {"momentum": 0.9}}, r"^`opt_args` cannot hold momentum"),
        ({"opt": "lars", "momentum": 1.5}, r"^`momentum` must lie between 0 and 1"),
        (
            {"sched": "plateau"},
            r"^`sched` must be one of cosine, tanh, poly, step, multistep, constant, not 'plateau'$",
        ),
        ({"sched": "multistep"}, r"^`sched=multistep` needs `decay_milestones`"),
        ({"sched": "multistep", "decay_milestones": [2]}, r"^`decay_milestones` must rise, within the 2 epochs, not"),
        ({"sched": "multistep", "decay_milestones": [1.5, 1]}, r"^`decay_milestones` must rise"),
        ({"sched": "multistep", "decay_milestones": [math.nan]}, r"^`decay_milestones` must rise"),
        ({"decay_milestones": [1]}, r"^`decay_milestones` is for `sched` multistep, not cosine: leave it out$"),
        ({"decay_rate": 0.5}, r"^`decay_rate` is for `sched` step and multistep and poly, not cosine: leave it out$"),
        ({"sched": "step", "decay_rate": 0}, r"^`decay_rate` must be above 0, not 0.0$"),
        (
            {"sched": "step", "min_lr": 1e-5},
            r"^`min_lr` is for `sched` cosine and tanh and poly, not step: leave it out$",
        ),
    ],
)
def test_what_is_no_optimizer_or_schedule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UlsamError, match=message) as caught:
        config("birds", **settings)
    assert "\n" not in str(caught.value)


def test_the_state_of_another_optimizer_is_refused() -> None:
    def state(opt: str) -> dict[str, Any]:
        model = net()
        optimizer = optimizer_for(model, opt)
        steps(model, optimizer, 0, 2)
        return optimizer.state_dict()

    load_optimizer(optimizer_for(net(), "lamb"), state("lamb"), "lamb")
    lamb = state("lamb")
    groups, states = lamb["param_groups"], lamb["state"]
    for wrong in (
        state("adan"),
        state("lion"),
        {**lamb, "param_groups": groups[:1]},
        {**lamb, "param_groups": [{**group, "step": "2"} for group in groups]},
        {**lamb, "param_groups": [{**group, "eps": 1.0} for group in groups]},
        {**lamb, "state": {**states, 0: {"exp_avg": states[0]["exp_avg"]}}},
        {**lamb, "state": {**states, 0: {**states[0], "exp_avg": torch.zeros(7)}}},
        {**lamb, "state": {**states, 0: {**states[0], "exp_avg": 3}}},
    ):
        with pytest.raises(ValueError, match=r"of its optimizer is not that of lamb$|shorter than"):
            load_optimizer(optimizer_for(net(), "lamb"), wrong, "lamb")


# runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"opt": "lamb", "sched": "step", "decay_epochs": 1, "edits": ["insert blocks.2"], "ulsam_lr": 2.0},
        {"opt": "adan", "sched": "poly", "opt_args": {"betas": [0.9, 0.9, 0.9]}, "ema": 0.9},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                {"opt": "madgradw", "sched": "tanh", "clip_grad": 1.0, "accumulate": 2},
                {"opt": "sgd", "sched": "multistep", "decay_milestones": [1.5], "warmup_epochs": 1},
                {"opt": "muon", "sched": "constant"},
            )
        ),
    ],
    ids=lambda settings: settings["opt"],
)
def test_a_stopped_run_ends_in_the_same_weights(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    chosen = config(data, epochs=3, mixup=0.3, **settings)
    whole = train(chosen, tmp_path / "whole")
    for folder, updates in (("early", 1), ("late", 5)):
        with stop_after(updates), pytest.raises(Interrupted):
            train(chosen, tmp_path / folder)
        state = read_checkpoint(tmp_path / folder)
        assert state is not None and state["position"]["updates"] == updates + 1
        summary = resume(tmp_path / folder)
        assert (tmp_path / folder / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / "model.safetensors"
        ).read_bytes()
        assert [row["lr"] for row in summary["epochs"]] == [row["lr"] for row in whole["epochs"]]


def test_a_checkpoint_of_before_these_settings_is_resumed(data: Path, tmp_path: Path) -> None:
    chosen = config(data)
    with stop_after(2), pytest.raises(Interrupted):
        train(chosen, tmp_path / "run")
    state = read_checkpoint(tmp_path / "run")
    assert state is not None
    for name in ("opt_args", "sched", "decay_rate", "decay_epochs", "decay_milestones"):
        del state["settings"][name]
    del state["version"]
    write_checkpoint(tmp_path / "run", state)
    resume(tmp_path / "run")
    train(chosen, tmp_path / "whole")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


# rates: 3 epochs of 4 updates, of which the first 2 are the warm-up


def rates(data: Path, run: Path, **settings: Any) -> list[float]:
    trainer = Trainer(config(data, epochs=3, lr=0.2, warmup_epochs=0.5, **settings), run, ALONE)
    trainer.prepare()
    found = []
    for update in range(1, 13):
        trainer.training_step.schedule.step_update(update)
        found.append(trainer.optimizer.param_groups[0]["lr"])
    return found


def test_each_schedule_warms_up_and_then_falls_as_it_says(data: Path, tmp_path: Path) -> None:
    def tanh(step: int) -> float:
        return 0.02 + 0.09 * (1 - math.tanh(-7 + 10 * step / 13))

    expected: dict[str, tuple[dict[str, Any], list[float]]] = {
        "constant": ({}, [0.2] * 11),
        "step": ({"decay_epochs": 1, "decay_rate": 0.5}, [0.2] * 3 + [0.1] * 4 + [0.05] * 4),
        "multistep": ({"decay_milestones": [1, 2.5]}, [0.2] * 3 + [0.02] * 6 + [0.002] * 2),
        "poly": (
            {"decay_rate": 2, "min_lr": 0.02},
            [0.02 + 0.18 * (1 - step / 13) ** 2 for step in range(2, 13)],
        ),
        "tanh": ({"min_lr": 0.02}, [tanh(step) for step in range(2, 13)]),
        "cosine": ({"min_lr": 0.02}, [0.02 + 0.09 * (1 + math.cos(math.pi * step / 13)) for step in range(2, 13)]),
    }
    for sched, (settings, after) in expected.items():
        first = tanh(2) / 2 if sched == "tanh" else 0.1
        assert rates(data, tmp_path, sched=sched, **settings) == pytest.approx([first, *after]), sched
    plain = rates(data, tmp_path, sched="poly")
    assert plain == pytest.approx([0.1] + [0.2 * (1 - step / 13) for step in range(2, 13)])
    assert rates(data, tmp_path, sched="step") == rates(data, tmp_path, sched="multistep", decay_milestones=[1, 2])
