"""Check whether images and weight files are what they were, and whether a model has seen images before."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator

from ulsam.base.files import check_readable
from ulsam.data.labelled import images_root
from ulsam.data.sources import AnyImages, FolderImages, StreamImages
from ulsam.model.trained import locate
from ulsam.training import parts
from ulsam.training.config import TrainConfig


def data_digest(config: TrainConfig, *others: str | None) -> str | None:
    """SHA-256 of the classes and of the names and file sizes of all images, in hexadecimal; None for a stream.

    Whatever is held out, and wherever the folder lies, it is the same; of a named data set the sizes are not known.

    Args:
        config: names the data, and the splits to train and to measure on.
        others: further splits; None is none.

    Raises:
        UlsamError: the data is not usable.

    >>> import tempfile
    >>> from ulsam.data.birds import draw_birds
    >>> one, two = (
    ...     TrainConfig(str(draw_birds(tempfile.mkdtemp() + "/birds", classes=2, train=4, val=1, size=32)), seed=seed)
    ...     for seed in range(2)
    ... )
    >>> data_digest(one) == data_digest(two)
    True
    """
    train, val, _ = parts.open_images(config)
    if isinstance(train, StreamImages):
        return None
    more = [parts.open_images(dataclasses.replace(config, val_split=name))[1] for name in others if name is not None]
    root = images_root(config.data, config.data_dir)
    found = {line for images in (train, val, *more) for line in _images(images, root)}
    lines = [*sorted(found), *train.classes]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def file_digests(configs: Iterable[TrainConfig]) -> dict[str, str]:
    """SHA-256, in hexadecimal, of each weight file and teacher that the settings name.

    >>> file_digests([TrainConfig("birds")])
    {}
    """
    files = sorted({name for config in configs for name in (config.weights, config.teacher) if name})
    for name in files:
        check_readable(locate(name), "file")
    return {name: hashlib.sha256(locate(name).read_bytes()).hexdigest() for name in files}


def _images(images: AnyImages, root: str) -> Iterator[str]:
    if isinstance(images, FolderImages):
        for path, label in images.samples:
            line = f"{os.path.relpath(path, root)} {os.stat(path).st_size}"
            yield f"{line} {images.folder.words(label)}" if images.in_table else line
    else:
        yield from (f"{images.split} {name}" for name in images.names)
