"""`ulsam predict MODEL IMAGES...`: classify images."""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ulsam.base.errors import UlsamError, printable
from ulsam.base.extras import extra, installed
from ulsam.base.files import write_atomic
from ulsam.base.text_table import as_csv
from ulsam.cli.common import add_device, add_model, model_from, print_json
from ulsam.cli.written_files import check_written

if TYPE_CHECKING:
    from ulsam.training.predict import Prediction

EXAMPLE = """\
ulsam predict runs/mine/model.safetensors images/test --top 1 --csv found.csv
ulsam predict runs/mine/model.safetensors images --features features.npz"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser, exported=True)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders of them, or addresses (https://...); - reads them from standard input, one a line",
    )
    parser.add_argument(
        "--topk",
        "--top",
        dest="top",
        type=int,
        metavar="N",
        help="classes to name an image (default: 3; of several labels an image those that reach their thresholds)",
    )
    parser.add_argument("--csv", metavar="FILE", help="also write a row an image: path, classes, probabilities")
    parser.add_argument("--parquet", metavar="FILE", help="the same as an Apache Parquet file")
    parser.add_argument(
        "--features", metavar="FILE", help="also write the pooled features of each image: NAME.npz or NAME.csv"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Print a line an image; fails in the end if one of them cannot be read."""
    from ulsam.base.logs import progress
    from ulsam.data.folder import image_paths
    from ulsam.deploy.classifier import open_classifier
    from ulsam.training.predict import predict

    check_written(args, [args.model, *args.images])
    if args.parquet:
        with extra("parquet", "--parquet needs"):
            import pyarrow  # noqa: F401
    paths = image_paths(_listed(args.images))
    predictions: list[Prediction] = []
    features: list[Any] = []
    opened = open_classifier(
        **model_from(args), device=args.device, features=features.append if args.features else None
    )
    top = 3 if args.top is None and opened.thresholds is None else args.top
    answers = predict(paths, opened.logits, opened.preprocessing, opened.classes, top=top, thresholds=opened.thresholds)
    barred = installed("tqdm") and not sys.stdout.isatty()  # where lines are seen, they are the progress
    with progress(total=len(paths), unit=" images") if barred else contextlib.nullcontext() as bar:
        for prediction in answers:
            predictions.append(prediction)
            _show(prediction, args.json)
            if bar is not None:
                bar.update()
    if args.csv:
        header, rows = _table(predictions)
        write_atomic(args.csv, as_csv([header, *(["" if value is None else value for value in row] for row in rows)]))
    if args.parquet:
        write_atomic(args.parquet, _parquet(*_table(predictions)))
    if args.features:
        write_atomic(
            args.features, _features([each.path for each in predictions if not each.error], features, args.features)
        )
    if failed := sum(each.error is not None for each in predictions):
        raise UlsamError(f"{failed} of {len(predictions)} images could not be read; they are named above")


def _listed(names: Sequence[str]) -> list[str]:
    """The names, with the lines of standard input in the place of -."""
    if "-" not in names:
        return list(names)
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError:  # no text, so no paths either
        text = "\0"
    if "\0" in text:
        raise UlsamError(
            "- reads the paths of images from standard input, one a line: that holds the bytes of a file, or names of "
            "`find -print0`; name the image itself, or use `find -print`"
        )
    if not (lines := [line for line in map(str.strip, text.splitlines()) if line]):
        raise UlsamError("- reads the paths of images from standard input, one a line: there was none")
    return [path for name in names for path in (lines if name == "-" else [name])]


def _show(prediction: "Prediction", as_json: bool) -> None:
    if as_json:
        named = {name: round(share, 6) for name, share in prediction.classes}
        print_json({"path": prediction.path, "classes": named, "error": prediction.error})
    elif prediction.error:
        print(f"unreadable {prediction.error}")
    else:
        named_text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in prediction.classes)
        print(printable(f"{prediction.path}: {named_text or 'no label'}"))


def _table(predictions: Sequence["Prediction"]) -> tuple[list[str], list[list[Any]]]:
    """A row an image, as long as the header; None where an image has no such class, or no error."""
    most = max(len(one.classes) for one in predictions)
    header = ["path", "error", *(f"{what}_{rank}" for rank in range(1, most + 1) for what in ("class", "probability"))]
    rows = [[one.path, one.error, *(value for pair in one.classes for value in pair)] for one in predictions]
    return header, [row + [None] * (len(header) - len(row)) for row in rows]


def _parquet(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """The content of a file with texts and float64."""
    import pyarrow
    from pyarrow import parquet

    kinds = [pyarrow.float64() if name.startswith("probability_") else pyarrow.string() for name in header]
    columns = [pyarrow.array([row[place] for row in rows], kind) for place, kind in enumerate(kinds)]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns, names=list(header)), buffer)
    return buffer.getvalue()


def _features(paths: Sequence[str], batches: Sequence[Any], file: str) -> bytes | str:
    """The content of a file with ``paths`` [N] and ``features`` [N, F], as arrays of NumPy or a row an image."""
    import numpy as np

    features = np.concatenate(batches) if batches else np.empty((0, 0), np.float32)
    if file.lower().endswith(".npz"):
        buffer = io.BytesIO()
        np.savez(buffer, paths=np.array(paths, dtype=np.str_), features=features)
        return buffer.getvalue()
    header = ["path", *(f"f{number}" for number in range(features.shape[1]))]
    return as_csv([header, *([path, *row] for path, row in zip(paths, features.tolist(), strict=True))])
