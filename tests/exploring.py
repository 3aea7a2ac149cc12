"""A running page of `ulsam explore`, with two tiny models whose maps are anything but uniform."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import uvicorn

from tiny import TINY_MODEL
from ulsam.apps.explore_models import ExploredModel
from ulsam.apps.explore_page import create_app
from ulsam.apps.listening import listen
from ulsam.explanation import Explainer
from ulsam.explanation.captions import model_name
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import build, make_spec
from ulsam.model.spec import Edit

CLASSES = ("wren", "<b>robin</b>", "a-bird-with-a-rather-long-name-without-a-single-space-in-it")
EDITS = (Edit("insert", "blocks.2", 2), Edit("insert", "blocks.3", 4))


def tiny_model(*edits: Edit, size: int = 64) -> ExploredModel:
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, CLASSES, edits, size=size)
    model = build(spec)[0]
    for layer in model.modules():
        if isinstance(layer, ULSAM):
            torch.nn.init.normal_(layer.pointwise.weight, std=30)
    return ExploredModel(f"runs/{len(edits)}/model.safetensors", model_name(spec), Explainer(model, spec))


@functools.cache
def two() -> tuple[ExploredModel, ExploredModel]:
    """One with two layers, and one without, which takes larger images."""
    return tiny_model(*EDITS), tiny_model(size=96)


@contextlib.contextmanager
def serving(models: Sequence[ExploredModel], **options: Any) -> Iterator[int]:
    """The port on which the page is served, from a thread of this process."""
    with listen("127.0.0.1", 0) as socket:
        server = uvicorn.Server(uvicorn.Config(create_app(models, **options), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield int(socket.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
