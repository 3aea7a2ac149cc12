"""Paths and classes in arrays are those that were given."""

import copy
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from ulsam.data.sample_list import SampleList
from ulsam.data.sources import FolderImages

SAMPLES = [("", 2), ("a/Zaunkönig 1.jpg", 0), ("b/鳥.png", 70_000), ("c/" + "x" * 300, 1)]


def test_a_list_gives_back_what_it_was_made_of():
    found = SampleList(iter(SAMPLES))
    assert list(found) == SAMPLES == [found[number] for number in range(4)]
    assert (found[-1], len(found), len(SampleList())) == (SAMPLES[-1], 4, 0)
    assert list(found[1:3]) == SAMPLES[1:3]
    assert list(found.take(np.array([3, 0]))) == [SAMPLES[3], SAMPLES[0]]
    assert list(found.with_labels(found.labels + 1)) == [(path, label + 1) for path, label in SAMPLES]
    assert found == SampleList(SAMPLES) == SAMPLES
    assert found != SAMPLES[:3]
    with pytest.raises(IndexError):
        found[4]


def test_copies_and_pickles_hold_the_same():
    images = FolderImages(SAMPLES, ("a", "b", "c"))
    for other in (copy.deepcopy(images), pickle.loads(pickle.dumps(images))):
        assert other == images
        assert list(other.samples) == SAMPLES


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are text there")
def test_a_name_that_is_no_text_stays_what_it_is(tmp_path: Path):
    name = os.fsencode(tmp_path) + b"/\xff\xfe.jpg"
    Path(os.fsdecode(name)).write_bytes(b"1")
    (found,) = SampleList([(os.fsdecode(name), 0)])
    assert os.path.getsize(found[0]) == 1
