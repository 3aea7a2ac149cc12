"""Put a trained model on the Hugging Face hub, or into a folder of the same form, which timm reads too."""

import copy
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ulsam import __version__
from ulsam.base.errors import UlsamError, first_line
from ulsam.base.files import check_empty, read_json, whole_folder, write_atomic, write_json
from ulsam.deploy.model_card import model_card
from ulsam.model.given import model_and_spec
from ulsam.model.hub import check_url
from ulsam.model.spec import ModelSpec
from ulsam.model.trained import locate

HUB = "hf-hub:"
FILES = ("README.md", "config.json", "model.safetensors", "ulsam.json")


def push(model: str | os.PathLike[str], target: str | os.PathLike[str], *, private: bool = False) -> str:
    """Write a model in timm's hub format, and upload it if ``target`` is a name of the hub.

    ``model.safetensors`` is the model file itself. ``config.json`` is timm's: architecture, label names and how images
    are read, so `timm.create_model` loads a model without edits. ``ulsam.json`` is the spec, and ``README.md`` the
    model card, from the run's ``summary.json`` if there is one; a folder that was written by this function keeps its
    card, with the new name. `ulsam.load` takes the folder, and the file.

    Args:
        model: a model file, or the folder of a run.
        target: ``hf-hub:USER/NAME``, whose files of these names are replaced; or a new folder. The hub wants a token:
            ``hf auth login``, or the environment variable ``HF_TOKEN``.
        private: whether only you see a repository that is made.

    Returns:
        The folder, or the address of the model on the hub.

    Raises:
        UlsamError: no such model, a folder with something in it, no name of a hub, or the hub refuses or does not
            answer.

    >>> push("missing.safetensors", "birds")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no model file missing.safetensors
    """
    file = locate(model)
    trained, spec = model_and_spec(file)
    name = os.fspath(target)
    if not name.startswith(HUB):
        if private:
            raise UlsamError("`private` is for hf-hub:USER/NAME: a folder is uploaded by nobody")
        check_empty(Path(target))
        with whole_folder(Path(target)) as folder:
            _write(folder, file, trained, spec, f"USER/{Path(os.path.abspath(target)).name}")
        return name
    repository = name.removeprefix(HUB)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UlsamError(f"a model on the hub is called hf-hub:USER/NAME, not {name}")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), file, trained, spec, repository)
        return _upload(Path(folder), repository, private)


def _write(folder: Path, file: Path, model: nn.Module, spec: ModelSpec, name: str) -> None:
    summary, card = file.with_name("summary.json"), file.with_name("README.md")
    shutil.copyfile(file, folder / "model.safetensors")
    write_json(folder / "config.json", hub_config(model, spec))
    write_atomic(folder / "ulsam.json", json.dumps(json.loads(spec.to_json()), indent=1, ensure_ascii=False) + "\n")
    if file.with_name("ulsam.json").exists() and card.exists():  # pushed before; a card may have been written on
        text = re.sub(r'hf-hub:USER/[^\s"]+', lambda _: HUB + name, card.read_text(encoding="utf-8"))
    else:
        text = model_card(name, spec, read_json(summary) if summary.exists() else None)
    write_atomic(folder / "README.md", text)


def hub_config(model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    """What ``config.json`` holds in timm's hub format.

    >>> from ulsam.model.build import build
    >>> spec = ModelSpec("mobilenetv2_035", ("wren", "robin"), input_size=(3, 96, 96))
    >>> found = hub_config(build(spec)[0], spec)
    >>> found["architecture"], found["label_names"], found["pretrained_cfg"]["input_size"]
    ('mobilenetv2_035', ['wren', 'robin'], [3, 96, 96])
    """
    from timm.models._hub import save_config_for_hf  # which its own upload calls

    plain: Any = copy.copy(model)  # as timm would write it, but with the model's own channels
    plain.pretrained_cfg = {**plain.pretrained_cfg, "mean": spec.mean, "std": spec.std}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(plain, str(path), {"label_names": list(spec.classes)}, dict(spec.model_args))
        config = read_json(path)
    pretrained = config["pretrained_cfg"]
    for other in ("test_input_size", "test_crop_pct", "pool_size", "license", "tag"):  # of the base model's weights
        pretrained.pop(other, None)
    pretrained |= {
        "input_size": list(spec.input_size),
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "num_classes": len(spec.classes),
    }
    if spec.input_size[0] != 3:
        pretrained["first_conv"] = None  # else timm takes its weights for those of RGB, and adapts them once more
    own = {} if spec.thresholds is None else {"thresholds": list(spec.thresholds)}
    return {**config, "architecture": spec.base, **own}


def _upload(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(library_name="ulsam", library_version=__version__)
    try:
        check_url(constants.ENDPOINT)
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Add model", allow_patterns=list(FILES)
        )
    except LocalTokenNotFoundError as error:
        raise UlsamError("the hub wants a token: `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UlsamError(f"the hub refuses {repository}: `hf auth login` with a token that may write") from error
        raise UlsamError(f"the hub refuses {repository}: {first_line(error)}") from error
    except Exception as error:  # of the connection, or a name: each version of the hub's client has its own types
        raise UlsamError(f"cannot upload {repository}: {first_line(error)}") from error
    return str(made)
