"""`ulsam explore MODEL...`: a local web page to ask models about images."""

import argparse

from ulsam.cli.common import print_json

EXAMPLE = "ulsam explore runs/mine/model.safetensors runs/base/model.safetensors"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="models to compare: model files, run folders, timm names with a tag, or hf-hub:USER/MODEL",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="name or address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8765, help="0 takes any free one (default: 8765)")
    parser.add_argument(
        "--max-mb", type=int, default=20, metavar="MB", help="largest image file that is taken (default: 20)"
    )


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    from ulsam.apps.explore import serve

    def ready(url: str, public: bool) -> None:
        if args.json:
            print_json({"url": url, "public": public})
            return
        print(f"{url}  (Ctrl-C ends it)", flush=True)
        if public:
            print("Everyone who can reach this machine can use the page: it asks for no password.", flush=True)

    serve(args.models, host=args.host, port=args.port, max_mb=args.max_mb, ready=ready)
