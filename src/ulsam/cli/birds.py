"""`ulsam birds OUT`: draw the generated bird data set as an image folder."""

import argparse
import re

from ulsam.cli.common import print_json

EXAMPLE = "ulsam birds birds --classes 4 --train 100 --val 20"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to make; it may exist if it is empty")
    parser.add_argument(
        "--classes", type=_classes, default=8, metavar="N", help="2 to 108 (default: 8), or names with commas"
    )
    for split, number in (("train", 60), ("val", 20), ("test", 0)):
        parser.add_argument(
            f"--{split}", type=int, default=number, metavar="N", help=f"images a class (default: {number})"
        )
    parser.add_argument("--size", type=int, default=96, metavar="PIXELS", help="side of the images (default: 96)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every drawing (default: 0)")


def run(args: argparse.Namespace) -> None:
    from ulsam.base.logs import progress
    from ulsam.data.birds import draw_birds

    counts = {split: getattr(args, split) for split in ("train", "val", "test")}
    classes = args.classes if isinstance(args.classes, int) else len(args.classes)
    with progress(total=classes * sum(counts.values()), unit=" birds") as bar:

        def count(done: int, _: int) -> None:
            bar.update(done - bar.n)

        draw_birds(args.out, args.classes, **counts, size=args.size, seed=args.seed, progress=count)
    if args.json:
        print_json({"folder": args.out, "classes": classes, **counts, "size": args.size, "seed": args.seed})
        return
    drawn = ", ".join(f"{number} {split}" for split, number in counts.items() if number)
    print(f"{args.out}: {classes} classes, {drawn} images a class of {args.size} px, seed {args.seed}")
    print(f"{args.out}/birds.json holds the field marks of each class, boxes.json where they lie in each image")


def _classes(text: str) -> int | list[str]:
    return int(text) if re.fullmatch(r"-?\d+", text) else [name.strip() for name in text.split(",")]
