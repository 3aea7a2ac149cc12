"""Folders, data-set names, the generated set, transforms and loaders."""

from ulsam.data.folder import Folder, Sample, class_counts, find_splits, imbalance_note, index_like, scan, split
from ulsam.data.images import UnreadableImage, read_image

__all__ = [
    "Folder",
    "Sample",
    "UnreadableImage",
    "class_counts",
    "find_splits",
    "imbalance_note",
    "index_like",
    "read_image",
    "scan",
    "split",
]
