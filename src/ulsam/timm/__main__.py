"""``python -m ulsam.timm SCRIPT ...`` runs one of timm's scripts, which then knows our models by name.

So do the Python processes that the script starts, by `sitecustomize.py` beside this file.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from ulsam.timm.sitecustomize import register_on_import


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ulsam.timm: error: {message}\n")


def main() -> None:
    """Run the script as ``python SCRIPT ...`` does; ``sys.argv[0]`` is its absolute path."""
    parser = _Parser(
        prog="python -m ulsam.timm",
        description="Run one of timm's scripts, or your own, with the model names of ulsam.",
        epilog="Example: python -m ulsam.timm validate.py DATA --model ulsam_mobilenetv2_100_replace_14_17",
    )
    parser.add_argument("script", metavar="SCRIPT", nargs="?", help="path of a script, such as train.py of timm")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the script's own arguments")
    args = parser.parse_args()
    if not args.script:
        parser.error("name a script, such as validate.py in a checkout of timm")
    script = Path(args.script).absolute()
    if not script.is_file():
        parser.error(f"there is no script {script}; give the path of a file, such as validate.py in a checkout of timm")

    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    sys.argv = [str(script), *args.arguments]
    register_on_import()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
