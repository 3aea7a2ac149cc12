"""What happens to an image between decoding and the model, against the libraries whose results it must match."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp, kstest
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter, RandomResizedCrop, functional

from ulsam.data.augment import EvalTransform, Normalize, TrainTransform, jittered, random_crop, random_erasing

LOOK = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear"}
PLAIN = {"hflip": 0.0, "color_jitter": 0.0, "rand_augment": None, "random_erasing": 0.0, "crop_scale": (0.25, 1.0)}
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
DRAWS = 1500
RARE = 1e-4  # a distribution test that is right fails this seldom, and the seeds are fixed


def train_transform(size=(24, 32), **options) -> TrainTransform:
    return TrainTransform((3, *size), **{**LOOK, **PLAIN, **options})


def scene(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colors with a little noise."""
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    y, x = np.mgrid[:height, :width][..., None]
    return (128 + 90 * np.sin(x / 9 + np.arange(3)) * np.cos(y / 7) + noise).clip(0, 255).astype(np.uint8)


# crop


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([0.08, 0.25, 0.9]), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_crops_lie_within_the_image(width, height, least, seed):
    top, left, crop_height, crop_width = random_crop(width, height, (least, 1.0), random.Random(seed))
    assert crop_height >= 1
    assert crop_width >= 1
    assert 0 <= top <= height - crop_height
    assert 0 <= left <= width - crop_width


@pytest.mark.parametrize(("width", "height"), [(227, 227), (160, 213), (300, 80)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.25, 1.0)])
def test_crops_are_distributed_as_torchvision_draws_them(width, height, scale):
    torch.manual_seed(0)
    generator, image = random.Random(0), Image.new("RGB", (width, height))
    ours = np.array([random_crop(width, height, scale, generator) for _ in range(DRAWS)])
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(DRAWS)])
    for left, right in zip(ours.T, theirs.T, strict=True):
        assert ks_2samp(left, right).pvalue > RARE
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > RARE
    assert ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > RARE


@pytest.mark.parametrize(("width", "height"), [(100, 10), (10, 100), (7, 7), (1, 50)])
def test_what_no_crop_fits_is_cropped_as_torchvision_does(width, height):
    class Never(random.Random):
        def uniform(self, a, b):
            return 4.0  # of a crop larger than the image

    theirs = RandomResizedCrop.get_params(Image.new("RGB", (width, height)), [4.0, 4.0], [3 / 4, 4 / 3])
    assert random_crop(width, height, (4.0, 4.0), Never()) == theirs


@given(
    st.integers(20, 120),
    st.integers(20, 120),
    st.sampled_from(["bilinear", "bicubic"]),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_cropped_and_resized_pixels_are_pillows(width, height, interpolation, flip, seed):
    pixels = scene(width, height, seed)
    image, erased = train_transform(interpolation=interpolation, hflip=float(flip))(pixels, random.Random(seed))
    top, left, crop_height, crop_width = random_crop(width, height, (0.25, 1.0), random.Random(seed))
    cut = Image.fromarray(pixels).crop((left, top, left + crop_width, top + crop_height))
    naive = np.asarray(cut.resize((32, 24), FILTERS[interpolation]), int)
    assert erased is None
    assert image.shape == (24, 32, 3)
    apart = np.abs((naive[:, ::-1] if flip else naive) - image.numpy())
    assert apart.max() <= 2  # of 255: both round between the two directions, which bicubic's weights then enlarge
    assert (apart > 1).mean() <= 0.01


def test_a_flip_is_exact_and_as_frequent_as_asked():
    pixels = scene(24, 24)
    whole = {"crop_scale": (1.0, 1.0), "size": (24, 24)}
    flipping, keeping = train_transform(hflip=0.3, **whole), train_transform(**whole)
    flipped = 0
    for seed in range(DRAWS):
        image, _ = flipping(pixels, random.Random(seed))
        plain, _ = keeping(pixels, random.Random(seed))
        turned = torch.equal(image, plain.flip(1))
        assert turned or torch.equal(image, plain)
        flipped += turned
    assert abs(flipped - 0.3 * DRAWS) < 4 * math.sqrt(0.21 * DRAWS)


# reduction


@given(st.integers(8, 3000), st.integers(8, 3000), st.sampled_from([0.08, 0.25, 0.8]), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_no_crop_of_a_reduced_image_is_smaller_than_the_input(width, height, least, seed):
    transform = train_transform((32, 32), crop_scale=(least, 1.0))
    factor = transform.reduction(width, height)
    assert factor in (1, 2, 4, 8)
    assert factor == transform.reduction(height, width)
    if factor > 1:
        crop = random_crop(-(-width // factor), -(-height // factor), (least, 1.0), random.Random(seed))
        assert min(crop.width, crop.height) >= 31  # rounding


def test_reduction_is_used_where_it_can_be():
    transform = train_transform((160, 160))
    assert [transform.reduction(side, side) for side in (227, 700, 740, 1480, 2960, 9000)] == [1, 1, 2, 4, 8, 8]
    measuring = EvalTransform((3, 160, 160), **LOOK, crop_pct=0.875)
    assert [measuring.reduction(side, 2000) for side in (227, 700, 740, 1480)] == [1, 1, 2, 4]


# jitter


def jittered_naively(image, strength: float, generator: random.Random):
    """With torchvision's functions, on whatever they take."""
    kinds = ["brightness", "contrast", "saturation"]
    generator.shuffle(kinds)
    for kind in kinds:
        adjust = getattr(functional, f"adjust_{kind}")
        image = adjust(image, generator.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


@given(st.floats(0.05, 2), st.integers(0, 9999))
@settings(max_examples=60, deadline=None)
def test_jitter_is_torchvisions(strength, seed):
    image = scene(20, 14, seed)
    ours = jittered(torch.from_numpy(image.copy()), strength, random.Random(seed)).numpy().astype(int)
    floats = jittered_naively(torch.from_numpy(image).permute(2, 0, 1) / 255, strength, random.Random(seed))
    assert np.abs(ours - 255 * floats.permute(1, 2, 0).numpy()).max() < 1
    pillow = np.asarray(jittered_naively(Image.fromarray(image), strength, random.Random(seed)), int)
    assert np.abs(ours - pillow).mean() < 1 + 1.5 * (1 + strength)  # Pillow cuts fractions off after each step


def test_jitter_leaves_its_input_alone():
    image = torch.from_numpy(scene(20, 14))
    kept = image.clone()
    jittered(image, 0.4, random.Random(0))
    assert torch.equal(image, kept)


def test_jitter_is_distributed_as_torchvision_draws_it():
    torch.manual_seed(0)
    image, generator, theirs = scene(12, 12), random.Random(0), ColorJitter(0.4, 0.4, 0.4)
    ours = [jittered(torch.from_numpy(image), 0.4, generator).numpy() for _ in range(DRAWS)]
    naive = [np.asarray(theirs(Image.fromarray(image))) for _ in range(DRAWS)]
    for statistic in (np.mean, np.std, lambda x: (x.max(-1).astype(int) - x.min(-1)).mean()):
        assert ks_2samp([statistic(x) for x in ours], [statistic(x) for x in naive]).pvalue > RARE


@pytest.mark.parametrize(("policy", "jitter"), [(None, True), ("rand-m7-n2", False), ("original", False), ("3a", True)])
def test_a_policy_switches_jitter_off_as_timm_does(policy, jitter):
    theirs = create_transform((3, 32, 32), is_training=True, auto_augment=policy, color_jitter=0.4)
    assert any(isinstance(part, ColorJitter) for part in theirs.transforms) == jitter
    assert bool(train_transform(rand_augment=policy, color_jitter=0.4).jitter) == jitter


# policy


def test_a_policy_is_timms_and_drawn_from_the_generator():
    pixels = scene(40, 40)
    transform = train_transform((32, 32), rand_augment="rand-m9-n2-mstd0.5")
    plain = train_transform((32, 32))
    changed = 0
    for seed in range(20):
        image, _ = transform(pixels, random.Random(seed))
        random.seed(seed + 1)
        np.random.seed(seed + 1)
        assert torch.equal(image, transform(pixels, random.Random(seed))[0])
        changed += not torch.equal(image, plain(pixels, random.Random(seed))[0])
    assert changed > 5


# erasing


def test_erasing_is_distributed_as_timm_draws_it():
    generator = random.Random(0)
    boxes = [box for _ in range(DRAWS) if (box := random_erasing(32, 48, generator))]
    random.seed(1)
    theirs = []
    for _ in range(DRAWS):
        rows, columns = torch.where(RandomErasing(1.0, device="cpu")(torch.ones(1, 32, 48))[0] == 0)
        if len(rows):
            top, left = int(rows.min()), int(columns.min())
            theirs.append((top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left))
    assert abs(len(boxes) - len(theirs)) < 20
    for left, right in zip(np.array(boxes).T, np.array(theirs).T, strict=True):
        assert ks_2samp(left, right).pvalue > RARE


def test_erasing_is_as_frequent_as_asked():
    transform = train_transform(random_erasing=0.25)
    found = sum(transform(scene(32, 24), random.Random(seed))[1] is not None for seed in range(DRAWS))
    assert abs(found - 0.25 * DRAWS) < 4 * math.sqrt(0.1875 * DRAWS)


# generators of neighboring images


def test_draws_of_neighboring_positions_are_independent():
    first = [random.Random(3 << 96 | 1 << 64 | position).random() for position in range(DRAWS)]
    assert kstest(first, "uniform").pvalue > RARE
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 4 / math.sqrt(DRAWS)
    other = [random.Random(3 << 96 | 2 << 64 | position).random() for position in range(DRAWS)]
    assert abs(np.corrcoef(first, other)[0, 1]) < 4 / math.sqrt(DRAWS)


# normalizing and measuring


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_normalizing_a_batch(batch, height, width, seed):
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8))
    out = Normalize(LOOK["mean"], LOOK["std"])(images)
    mean, std = (torch.tensor(LOOK[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(out.double(), (images.permute(0, 3, 1, 2) / 255.0 - mean) / std, atol=1e-6)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(40, 40), (60, 33), (20, 50)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 1.2])
def test_measuring_is_timms_transform(size, crop_pct):
    image = Image.fromarray(scene(*size))
    theirs = create_transform((3, 32, 32), crop_pct=crop_pct, **LOOK)(image)
    ours = EvalTransform((3, 32, 32), crop_pct=crop_pct, **LOOK)
    assert torch.allclose(ours(image), theirs, atol=1e-5)
    assert torch.equal(ours(image), ours.normalize(ours.pixels(np.asarray(image))[None])[0])


def test_threads_do_not_change_an_image():
    transform = train_transform((256, 256), color_jitter=0.4)
    pixels, threads = scene(300, 280), torch.get_num_threads()
    try:
        for seed in range(12):
            torch.set_num_threads(1)
            alone, _ = transform(pixels, random.Random(seed))
            torch.set_num_threads(2)
            assert torch.equal(alone, transform(pixels, random.Random(seed))[0])
    finally:
        torch.set_num_threads(threads)
