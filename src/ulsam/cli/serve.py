"""`ulsam serve MODEL`: classify images over HTTP."""

import argparse
import os
from dataclasses import fields

from ulsam.apps.service_limits import Limits
from ulsam.base.extras import extra
from ulsam.cli.common import add_device, add_model, model_from, print_json

EXAMPLE = "ulsam serve runs/mine/model.safetensors --port 8000 --max-images 8"
TEXTS = {
    "batch": "images that the model computes at once",
    "images": "images in one request",
    "megabytes": "megabytes of one request",
    "pixels": "width times height of an image, and of all that are decoded at once",
    "requests": "requests at once",
    "timeout": "for a request to arrive and be answered",
    "idle": "for which a connection is kept without a whole header of a request, or without its answer being taken",
}
SECONDS = ("timeout", "idle")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser, exported=True)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1); others need ULSAM_API_KEY"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default: 8000)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that compute a batch (default: one a core)")
    add_device(parser, "cpu")
    limits = parser.add_argument_group("limits; what lies above is refused")
    for field in fields(Limits):
        limits.add_argument(
            f"--{field.name}" if field.name in SECONDS else f"--max-{field.name}",
            dest=field.name,
            type=type(field.default),
            default=field.default,
            metavar="SECONDS" if field.name in SECONDS else "N",
            help=f"{TEXTS[field.name]} (default: {field.default:,})",
        )


def run(args: argparse.Namespace) -> None:
    """Serve, and say where and how much."""
    limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    with extra("serve", "ulsam serve needs"):
        from ulsam.apps.serve import KEY, serve

    def ready(url: str) -> None:
        if args.json:
            print_json({"model": args.model, "url": url})
        else:
            print(f"serving {args.model} at {url}, with a page at {url}/docs", flush=True)

    answered = serve(
        **model_from(args),
        host=args.host,
        port=args.port,
        api_key=os.environ.get(KEY),
        threads=args.threads,
        device=args.device,
        limits=limits,
        ready=ready,
    )
    if args.json:
        print_json({"answered": answered})
    else:
        print(f"stopped: {answered} requests answered")
