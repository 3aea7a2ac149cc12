"""Pretrained weights: from the cache, or fetched; without a network that is known within seconds."""

import concurrent.futures
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ulsam.base.logs import say
from ulsam.model.presets import PLACEMENTS
from ulsam.model.weights import read_weights

TIMEOUT = 3.0
"""Seconds after which a server that has not answered counts as out of reach, name look-up and all."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as timm calls them
_Found = TypeVar("_Found")


def timm_weights(name: str) -> dict[str, Any]:
    """What `timm.create_model` takes as ``pretrained_cfg_overlay`` to load a model's weights without a network.

    Args:
        name: of a timm model; of a preset, whose base model's weights they are. Empty where timm knows no weights.

    Raises:
        OSError: they are not in the cache, and cannot be fetched.

    >>> timm_weights("mobilenetv1_050") if timm.is_model("mobilenetv1_050") else {}
    {}
    """
    config = timm.get_pretrained_cfg(PLACEMENTS[name][0] if name in PLACEMENTS else name)
    if config is None or not config.has_weights:
        return {}
    if config.hf_hub_id is None:
        url = str(config.url)
        if not Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name).exists():
            check_url(url, "it is not in the cache, and ")
        return {}  # timm fetches it
    given = config.hf_hub_filename
    safe = given and given.rpartition(".")[0] + ".safetensors"
    repository, names = str(config.hf_hub_id), [*dict.fromkeys([safe, given])] if given else _WEIGHTS
    file = _cached(repository, names) or _fetched(repository, names)
    if file.suffix == ".bin":
        read_weights(file)  # raises where it holds code, which some versions of timm would run
    return {"file": str(file), "custom_load": config.custom_load}


def hub_folder(model: str) -> Path:
    """The folder with ``config.json`` and the weights of a model of the hub, the newest ones if there is a network.

    Args:
        model: ``USER/MODEL``, or ``USER/MODEL@REVISION``.

    Raises:
        OSError: there are none, or they are not in the cache and cannot be fetched.
    """
    repository, _, revision = model.partition("@")
    try:
        config = _fetched(repository, ["config.json"], revision)
    except TimeoutError as error:
        found = _cached(repository, ["config.json"], revision)
        if found is None:
            raise
        say(f"note    {model} is taken from the cache: {error}")
        config = found
    commit = config.parent.name
    weights = _cached(repository, _WEIGHTS, commit) or _fetched(repository, _WEIGHTS, commit)
    if weights.suffix == ".bin":
        read_weights(weights)
    return config.parent


def _cached(repository: str, names: Sequence[str], revision: str = "") -> Path | None:
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None, local_files_only=True))
        except EntryNotFoundError:
            continue
    return None


def _fetched(repository: str, names: Sequence[str], revision: str = "") -> Path:
    """The first of these files that the repository has."""
    for name in names:
        url = hf_hub_url(repository, name, revision=revision or None)
        try:
            _within(TIMEOUT, lambda url=url: get_hf_file_metadata(url, timeout=TIMEOUT))  # type: ignore[misc]
            return Path(hf_hub_download(repository, name, revision=revision or None, etag_timeout=TIMEOUT))
        except GatedRepoError as error:
            raise PermissionError(f"{repository} wants its terms accepted, and `hf auth login`.") from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            where = f"{repository}{revision and '@'}{revision}"
            raise FileNotFoundError(f"the hub has no {where}, or it is private: `hf auth login`.") from error
        except OfflineModeIsEnabled as error:
            raise TimeoutError("it is not in the cache, and HF_HUB_OFFLINE is set.") from error
        except Exception as error:  # of the connection: each version of the hub's client has its own types
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            raise TimeoutError(f"it is not in the cache, and {urlsplit(url).netloc} cannot be reached.") from error
    raise FileNotFoundError(f"the hub's {repository} has no {' or '.join(names)}.")


def check_url(url: str, context: str = "") -> None:
    """Raise TimeoutError, whose message begins with ``context``, unless the server answers, whatever it says."""

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            return

    try:
        _within(TIMEOUT, ask)
    except (OSError, TimeoutError) as error:
        raise TimeoutError(f"{context}{urlsplit(url).netloc} cannot be reached.") from error


def _within(seconds: float, call: Callable[[], _Found]) -> _Found:
    """What ``call`` returns or raises; TimeoutError after so long, whatever it waits for."""
    done: concurrent.futures.Future[_Found] = concurrent.futures.Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return done.result(timeout=seconds)
