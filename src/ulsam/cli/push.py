"""`ulsam push MODEL TARGET`: put a trained model on the Hugging Face hub, or into a folder of that form."""

import argparse

from ulsam.base.errors import printable
from ulsam.cli.common import print_json

EXAMPLE = """\
ulsam push runs/mine hf-hub:USER/NAME
ulsam push runs/mine for-the-hub"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="a run's folder, or a .safetensors model file")
    parser.add_argument("target", metavar="TARGET", help="hf-hub:USER/NAME, which is uploaded, or a new folder")
    parser.add_argument("--private", action="store_true", help="if the repository is new, show it to nobody else")


def run(args: argparse.Namespace) -> None:
    """Write or upload, and say where it is."""
    from ulsam.deploy.hub import push

    where = push(args.model, args.target, private=args.private)
    if args.json:
        print_json({"model": args.model, "target": where})
    elif where == args.target:
        print(f"wrote   the folder {printable(where)}; the target hf-hub:USER/NAME uploads it")
    else:
        print(f"pushed  {printable(where)}")
