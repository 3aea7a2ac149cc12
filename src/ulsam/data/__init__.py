"""Folders, data-set names, the generated set, transforms and loaders."""

from ulsam.data.folder import Folder, Sample, class_counts, find_splits, imbalance_note, index_like, scan, split
from ulsam.data.pictures import UnreadablePicture, read_picture

__all__ = [
    "Folder",
    "Sample",
    "UnreadablePicture",
    "class_counts",
    "find_splits",
    "imbalance_note",
    "index_like",
    "read_picture",
    "scan",
    "split",
]
