"""`ulsam check DATA`: look for what is wrong with an image folder or a table."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ulsam.base.errors import UlsamError, printable
from ulsam.base.files import write_atomic
from ulsam.cli.common import print_json
from ulsam.cli.written_files import check_written

if TYPE_CHECKING:
    from ulsam.data.check import Checked, ImagePair

EXAMPLE = """\
ulsam check images
ulsam check images --sheet augmented.png --config recipes/cub200.yaml"""
SHOWN = 10


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="image folder: train/ with val/ or test/, or class folders alone; or a CSV of paths and labels",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where the images of a CSV lie (default: beside it)")
    parser.add_argument("--sheet", metavar="FILE.png", help="also draw what augmentation makes of training images")
    parser.add_argument("-c", "--config", metavar="YAML", help="settings of training, of which --sheet takes its own")
    parser.add_argument("-j", "--workers", type=int, metavar="N", help="threads that read images (default: one a core)")


def run(args: argparse.Namespace) -> None:
    """Print what was found; another layout, or what training refuses, is an error that names the remedy."""
    from ulsam.data.check import check, entry
    from ulsam.data.label_table import is_table
    from ulsam.data.layouts import check_layout

    if args.workers is not None and args.workers < 1:
        raise UlsamError(f"--workers must be 1 or more, not {args.workers}")
    if args.config and not args.sheet:
        raise UlsamError("--config is for --sheet FILE.png")
    check_written(args, [args.data])
    if not is_table(args.data):
        check_layout(args.data)
    found = check(args.data, args.workers, data_dir=args.data_dir)
    if args.sheet:
        write_atomic(args.sheet, _sheet(args.data, args.data_dir, args.config))
    if args.json:
        print_json({"data": args.data, **entry(found), "sheet": args.sheet})
    else:
        print(*map(printable, _lines(found)), sep="\n")
        if args.sheet:
            print(f"sheet     {args.sheet}: the whole image, then what training makes of it")
    if found.refused:
        raise UlsamError(f"training on it is refused: {found.refused}")


def _sheet(data: str, data_dir: str | None, config: str | None) -> bytes:
    from ulsam.data.labelled import labelled
    from ulsam.training.augmentation_sheet import augmentation_sheet
    from ulsam.training.config import TrainConfig, read_config

    settings: dict[str, Any] = {**(read_config(config) if config else {}), "data": data}
    samples = labelled(data, data_dir=data_dir).read("train", min_classes=1).samples
    return augmentation_sheet([path for path, _ in samples], TrainConfig.from_mapping(settings))


def _lines(checked: "Checked") -> list[str]:
    lines = [
        f"{name:<9} {checked.images[name]} images of {len(counts)} classes, {min(counts.values())} to "
        f"{max(counts.values())} a class"
        for name, counts in checked.splits.items()
    ]
    if checked.sides:
        lines.append("sides     {} to {} px, half of them up to {} px".format(*(checked.sides[n] for n in (0, 2, 1))))
    lines += _listed("broken", checked.broken)
    lines += _listed("leak", list(map(_pair, checked.leaks)), "in two splits: results on the second one are too good")
    lines += _listed("conflict", list(map(_pair, checked.conflicts)), "in two classes: one of them is wrong")
    lines += _listed("duplicate", list(map(_pair, checked.duplicates)))
    lines += [f"note      {note}" for note in checked.notes]
    if not checked.refused and len(lines) == len(checked.splits) + bool(checked.sides):
        lines.append("found     nothing that is wrong")
    return lines


def _pair(pair: "ImagePair") -> str:
    return f"{pair.first} {'=' if pair.identical else '~'} {pair.second}"


def _listed(title: str, entries: Sequence[str], why: str = "") -> list[str]:
    """A line each for the first ones, and how many there are."""
    if not entries:
        return []
    total = f"{title:<9} {len(entries)}{why and ' '}{why}" + (f"; the first {SHOWN}:" if len(entries) > SHOWN else ":")
    return [total, *(f"  {entry}" for entry in entries[:SHOWN])]
