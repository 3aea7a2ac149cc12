"""Every setting has a range, which is checked when it is read, and no settings file costs much."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ulsam.base.errors import UlsamError
from ulsam.data.augment import TrainTransform
from ulsam.data.loading import Loader
from ulsam.training.config import TrainConfig, read_config

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
NUMBERS = [name for name, field in FIELDS.items() if str(field.type).split(" ")[0] in ("int", "float")]
UNBOUNDED = ("lr", "ulsam_lr", "clip_grad", "distill_features")  # any number that is finite
TAUGHT = {"teacher": "teacher.safetensors"}


@pytest.mark.parametrize(
    "value",
    [10**30, -(10**30), 10**400, float("inf"), float("nan"), "nan", "1e999", [], {}, "x" * 9999],
    ids=lambda value: str(value)[:9],
)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_range_is_one_line(name: str, value: Any) -> None:
    if name in UNBOUNDED and value == 10**30:
        return
    with pytest.raises(UlsamError, match=rf"^`({name}`|min_lr`, where)") as caught:
        TrainConfig.from_mapping({"data": "birds", **TAUGHT, name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_kind_is_one_line(name: str) -> None:
    for value in ([[[]]], {"a": [1]}, object(), b"x", 1 + 2j):
        if name in ("model_args",) and isinstance(value, dict):
            continue
        with pytest.raises(UlsamError) as caught:
            TrainConfig.from_mapping({"data": "birds", name: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "policy", ["rand-m999999-n99999-inc1", "rand-m9-n17", "rand-m9-mmax11", "rand-p1.5", "rand-m1.2.3", "augmix-w99-d2"]
)
def test_policies_of_very_many_steps_are_refused(policy: str) -> None:
    with pytest.raises(UlsamError, match=r"^`rand_augment` takes a number up to \d+ after \w+, not [\d.]+$"):
        TrainConfig("birds", rand_augment=policy)


@pytest.mark.parametrize(
    "policy", ["rand-m7-n2-mstd0.5", "rand-m9-mstd101-inc1", "rand-mstd1-tweights", "augmix-m3-w3", "3a"]
)
def test_usual_policies_pass(policy: str) -> None:
    config = TrainConfig("birds", rand_augment=policy)
    look = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "color_jitter": 0.0, "hflip": 0.0}
    options = {"crop_scale": (1, 1), "rand_augment": config.rand_augment, "random_erasing": 0.0}
    transform = TrainTransform((3, 8, 8), **options, **look)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    images = [transform(pixels, random.Random(seed))[0].numpy() for seed in range(20)]
    assert {image.shape for image in images} == {(8, 8, 3)}
    assert any(not np.array_equal(image, pixels) for image in images)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 20_000,
        "{a: " * 20_000,
        "- " * 20_000,
        "lr: " + "9" * 6000,
        "lr: 2001-99-99",
        "lr: !!int x",
        "lr: !!float x",
        "? {a: 1}\n: 2",
        "&a [*a]",
        "lr: 1\n" * 200_000,
        "\0",
        "!!binary x",
    ],
    ids=lambda text: text[:20],
)
def test_a_settings_file_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(UlsamError) as caught:
        TrainConfig.from_mapping(read_config(tmp_path / "settings.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["edits", "model_args", "lr", "data", "mean", "freeze"])
def test_a_value_that_refers_to_itself_very_often_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(
        f"{LAUGHS}{name}: {{b: *a11}}\nmean: &m [*m]\n" if name == "model_args" else f"{LAUGHS}{name}: *a11\n"
    )
    values = {key: value for key, value in read_config(tmp_path / "settings.yaml").items() if key == name}
    with pytest.raises(UlsamError, match=f"^`{name}` has more than 10000 entries$"):
        TrainConfig.from_mapping({"data": "birds", **values})


def test_reading_processes_are_bounded_whoever_asks_for_them() -> None:
    with pytest.raises(UlsamError, match="`workers` must be 0 to 512, not 100000"):
        Loader([], None, torch.device("cpu"), 100_000)  # type: ignore[arg-type]
