"""A running page of `ulsam explore`, with two tiny nets whose maps are anything but uniform."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Sequence

import torch
import uvicorn

from tiny import NET
from ulsam.explanation import Explainer
from ulsam.explanation.words import net_name
from ulsam.explorer.app import create_app
from ulsam.explorer.nets import Net
from ulsam.listening import listen
from ulsam.models import build, make_recipe
from ulsam.module import ULSAM
from ulsam.recipe import Edit

CLASSES = ("wren", "<b>robin</b>", "a-bird-with-a-rather-long-name-without-a-single-space-in-it")
EDITS = (Edit("insert", "blocks.2", 2), Edit("insert", "blocks.3", 4))


def tiny_net(*edits: Edit, size: int = 64) -> Net:
    torch.manual_seed(0)
    recipe = make_recipe(NET, CLASSES, edits, size=size)
    model = build(recipe)[0]
    for layer in model.modules():
        if isinstance(layer, ULSAM):
            torch.nn.init.normal_(layer.pointwise.weight, std=30)
    return Net(f"runs/{len(edits)}/model.safetensors", net_name(recipe), Explainer(model, recipe))


@functools.cache
def two() -> tuple[Net, Net]:
    """One with two layers, and one without, which takes larger pictures."""
    return tiny_net(*EDITS), tiny_net(size=96)


@contextlib.contextmanager
def serving(nets: Sequence[Net], **options: int) -> Iterator[int]:
    """The port on which the page is served, from a thread of this process."""
    with listen("127.0.0.1", 0) as socket:
        server = uvicorn.Server(uvicorn.Config(create_app(nets, **options), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield int(socket.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
