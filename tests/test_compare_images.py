"""The arms of a comparison see the same images in the same order, whatever their models."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch

from tiny import SETTINGS, draw_splits
from ulsam.base.distributed import World
from ulsam.study.arms import parse_arms
from ulsam.training import parts
from ulsam.training.config import TrainConfig
from ulsam.training.loop import Trainer


def test_all_arms_see_the_same_batches_and_mixtures(tmp_path: Path) -> None:
    """The order, the augmentation, mixup and what is held out depend on seed, epoch and place, never on the model."""
    shared = TrainConfig.from_mapping({**SETTINGS, "data": str(draw_splits(tmp_path / "data"))})
    strong = {"mixup": 0.5, "rand_augment": "rand-m7-n2-mstd0.5", "random_erasing": 0.5, "drop_rate": 0.3}
    same = {"mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}  # which models bring of their own
    settings = {**strong, **same, "val_fraction": 0.25, "split_seed": 0, "layout": "contiguous", "amp": "none"}
    shared = dataclasses.replace(shared, **settings)
    arms = parse_arms(["base", "insert blocks.2 g=4", "model=test_resnet"])
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    names: dict[tuple[str, int], Any] = {}
    for arm, seed in itertools.product(arms, (0, 1)):
        config = arm.config(shared, seed=seed, compile="none")
        trainer = Trainer(config, tmp_path, World(0, 1, torch.device("cpu")))
        trainer.prepare()
        batches = seen.setdefault((arm.name, seed), [])
        trainer.model.register_forward_pre_hook(lambda _, args, batches=batches: batches.append(args[0].clone()))
        for epoch in range(2):
            trainer.at.epoch, trainer.at.batch = epoch, 0
            stream = trainer._begin_epoch()
            for _ in range(trainer.epoch_updates):
                trainer._update(stream, False, False)
        names[arm.name, seed] = parts.open_images(config)[1].names
    for seed in (0, 1):
        first, *others = (torch.stack(seen[arm.name, seed]) for arm in arms)
        assert len(first) == 2 * (36 - 9) // 8
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(seen["base", 0][0], seen["base", 1][0])
    assert not torch.equal(seen["base", 0][0], seen["base", 0][3])
    assert len({tuple(found) for found in names.values()}) == 1
