"""What is compared: each arm is one model, as a short text of edits and settings."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from ulsam.base.distributed import World
from ulsam.base.errors import UlsamError
from ulsam.data.labelled import splits_of
from ulsam.data.opening import is_named
from ulsam.data.sources import check_one_class
from ulsam.model.presets import PLACEMENTS
from ulsam.model.spec import Edit
from ulsam.study.paths import without_paths
from ulsam.training import parts
from ulsam.training.config import TrainConfig
from ulsam.training.dry_run import dry_run
from ulsam.training.from_model_file import settings_from

#: Settings that are one and the same for all arms: what is trained and measured on, and what `compare` decides itself.
COMMON = (
    *("data", "data_dir", "train_split", "val_split", "val_fraction", "fold", "split_seed", "class_names"),
    *("seed", "val_every", "edits"),
)

_NO_CHOICE = (
    "every run is measured once, after its last epoch, so that no arm's epoch is chosen by its score: leave keep and "
    "patience out of the settings"
)


@dataclass(frozen=True)
class Arm:
    """One model of a comparison: edits and settings on top of those that all arms share.

    >>> Arm.parse("small: remove 14,17; size=96")
    Arm(name='small', edits=('remove 14,17',), settings={'size': 96})
    >>> Arm.parse("replace 14,17  g=8").name
    'replace 14,17 g=8'

    Raises:
        UlsamError: an edit or a setting that cannot be read, or a name without a letter or digit.
    """

    name: str
    edits: tuple[str, ...]
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Read ``[NAME: ]ITEM[; ITEM ...]``: an item is an edit or ``setting=value``; ``base`` is no change.

        Raises:
            UlsamError: see above; the line names the arm.
        """
        named = re.match(r"([^:;]*):(?:\s+(.*))?$", text.strip(), re.DOTALL)
        if named and _begins_with_setting(text):  # its value may hold a colon too
            named = None
        given, body = (named[1].strip(), named[2] or "") if named else ("", text)
        items = [item.strip() for item in body.split(";") if item.strip()]
        edits: list[str] = []
        settings: dict[str, Any] = {}
        if not items:
            raise UlsamError(f"the arm {text!r} holds nothing: write base, an edit, or setting=value; several with ;")
        for item in items:
            if item == "base":
                continue
            setting = re.match(r"(\w+)\s*=(.*)$", item, re.DOTALL)
            try:
                if re.match(r"[^:=]*:(replace|insert|remove|base|\w+\s*=)", item):
                    raise UlsamError("put a space after the colon that ends the name")
                if not setting:
                    edits.append(str(Edit.parse(item)))
                    continue
                settings |= _setting(setting[1], setting[2].strip())
            except UlsamError as error:
                raise UlsamError(f"the arm {text!r}: {error}") from error
        changes = [*edits, *(f"{key}={without_paths(value)}" for key, value in settings.items())]
        name = without_paths(given) or "; ".join(changes) or "base"
        if not re.search(r"[A-Za-z0-9]", name):
            raise UlsamError(f"the arm {text!r} needs a name with a letter or a digit")
        return cls(name, tuple(edits), settings)

    @property
    def slug(self) -> str:
        """The name of its folder.

        >>> Arm.parse("replace 14,17 g=4").slug
        'replace-14-17-g-4'
        """
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.") or "arm"

    def with_model_file(self, shared: TrainConfig) -> "Arm":
        """The arm with what its model file stands for, if its ``model`` is one: architecture, edits, image, weights.

        So its file need not be there when the comparison is reported. Images have the shared size, if there is one.

        Raises:
            UlsamError: it is not a model file, or the arm names weights too; the line names the arm.

        >>> arm = Arm.parse("ours: model=mobilenetv2_100.grocery81_slim75; size=96").with_model_file(TrainConfig("d"))
        >>> arm.edits, arm.settings["model"], arm.settings["size"]
        (('replace 4,7,9,10,11,13 layer=inverted_residual width=32',), 'mobilenetv2_100', 96)
        """
        if not isinstance(self.settings.get("model"), str):
            return self
        common = {name: getattr(shared, name) for name in ("size", "in_chans")}
        try:
            found = settings_from({**common, **self.settings, "edits": self.edits})
        except UlsamError as error:
            raise UlsamError(f"the arm {self.name!r}: {error}") from error
        edits = tuple(found.pop("edits", self.edits))
        return dataclasses.replace(self, edits=edits, settings={**self.settings, **found})

    def config(self, shared: TrainConfig, **decided: Any) -> TrainConfig:
        """The settings of one of its runs: those that all arms share, its own, and what was ``decided`` for the run.

        Of the shared settings ``ulsam_lr`` is left out where the model has no ULSAM layer, those of distillation where
        the arm has ``teacher=null``, and ``images_for_reconstruction`` where nothing is reconstructed.

        Raises:
            UlsamError: they do not go together; the line names the arm.

        >>> Arm.parse("size=96").config(TrainConfig("birds"), seed=3).size
        96
        """
        values = dataclasses.asdict(shared)
        edits = [*values["edits"], *self.edits]
        if self.settings.get("model", shared.model) not in PLACEMENTS and not any(map(_is_ulsam, edits)):
            del values["ulsam_lr"]
        behind = self.settings.get("reconstruct", shared.reconstruct)
        if not any(_is_reconstructed(edit, behind) for edit in edits):
            del values["images_for_reconstruction"]
        if self.settings.get("teacher", shared.teacher) is None:
            values = {name: value for name, value in values.items() if not name.startswith("distill")}
        try:
            return TrainConfig.from_mapping({**values, **self.settings, "edits": edits, **decided})
        except UlsamError as error:
            raise UlsamError(f"the arm {self.name!r}: {error}") from error


def parse_arms(texts: Sequence[str]) -> tuple[Arm, ...]:
    """Read the arms; the first one is what the others are compared with.

    Raises:
        UlsamError: fewer than two, one that cannot be read, or two of one name.

    >>> [arm.name for arm in parse_arms(["base", "removal: remove 14"])]
    ['base', 'removal']
    """
    arms = tuple(Arm.parse(text) for text in texts)
    if len(arms) < 2:
        raise UlsamError("a comparison needs two arms or more, such as base and 'replace 14,17 g=4': see `arms`")
    slugs = [arm.slug for arm in arms]
    for number, arm in enumerate(arms):
        if arm.slug in slugs[:number]:
            raise UlsamError(f"two arms are called {arm.name!r}: give one another name, NAME: {texts[number]}")
    return arms


def check_shared(shared: TrainConfig) -> None:
    """Raise unless the settings that all arms share are theirs to give.

    Raises:
        UlsamError: they hold edits, so that even ``base`` would be an edited model, or what `compare` decides itself.

    >>> check_shared(TrainConfig("birds", val_every=5))
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: every run is measured once, after its last epoch: leave `val_every` out
    """
    if shared.edits:
        raise UlsamError(
            "edits in the shared settings, or of a model file there, would change every arm, base too: give edits with "
            "`arms`, and that file as the `model` of one"
        )
    if shared.val_every != 1:
        raise UlsamError("every run is measured once, after its last epoch: leave `val_every` out")
    if shared.keep != TrainConfig.keep or shared.patience is not None:
        raise UlsamError(_NO_CHOICE)
    if shared.split_seed is not None:
        raise UlsamError("the same images are held out for all runs: leave `split_seed` out of the settings")


def check_arms(arms: Sequence[Arm], shared: TrainConfig) -> None:
    """Build every arm, without training, so that a mistake shows before the first run.

    Raises:
        UlsamError: the data is not usable, two arms are the same, an arm cannot be built or trained, which the line
            names, or ``shared.ulsam_lr`` has nothing to act on.
    """
    configs = [arm.config(shared) for arm in arms]
    if shared.ulsam_lr != 1 and all(config.ulsam_lr == 1 for config in configs):
        raise UlsamError("`ulsam_lr` has nothing to act on: no arm has a ULSAM layer")
    if shared.images_for_reconstruction and not any(config.images_for_reconstruction for config in configs):
        raise UlsamError("`images_for_reconstruction` has nothing to reconstruct: no arm is edited and reconstructed")
    for number, config in enumerate(configs):
        if config in configs[:number]:
            twin = arms[configs.index(config)].name
            raise UlsamError(f"the arms {twin!r} and {arms[number].name!r} are the same model and spec: leave one out")
    images, _, _ = parts.open_images(shared)
    check_one_class(images, "a comparison")
    for arm, config in zip(arms, configs, strict=True):
        try:
            dry_run(config, images, World(0, 1, torch.device("cpu")))
        except UlsamError as error:
            raise UlsamError(f"the arm {arm.name!r} cannot be built: {error}") from error


def check_choosing(shared: TrainConfig, choose_split: str | None = None) -> None:
    """Raise unless learning rates can be chosen on images that the final runs are not measured on.

    Args:
        shared: settings of all arms.
        choose_split: the split to choose on; None: held-out training images.

    Raises:
        UlsamError: the data has no ``val/`` or ``test/`` of its own, or the settings measure elsewhere.
    """
    if is_named(shared.data) or not {"val", "test"}.intersection(splits_of(shared.data)):
        raise UlsamError(
            f"choosing learning rates or epochs needs an image folder or a table with val or test, which {shared.data} "
            "is not: the final runs are measured on images that choosing did not see"
        )
    if shared.val_fraction is not None or shared.fold is not None:
        what = "fold" if shared.val_fraction is None else "val_fraction"
        raise UlsamError(f"choosing holds images out by itself, and measures on val/ or test/: leave `{what}` out")
    if shared.val_split == shared.train_split:
        raise UlsamError(f"the final runs cannot be measured on {shared.val_split}, which is trained on")
    if choose_split is None:
        return
    splits = splits_of(shared.data)
    if choose_split not in splits:
        raise UlsamError(f"{shared.data} has no split {choose_split!r} to choose on; it has {', '.join(splits)}")
    final = shared.val_split or next(name for name in ("val", "test") if name in splits)
    if choose_split in (final, shared.train_split):
        use = "the final runs are measured on" if choose_split == final else "is trained on"
        raise UlsamError(
            f"rates cannot be chosen on {choose_split}, which {use}: name another split, or another `val_split`"
        )


def _is_ulsam(edit: str) -> bool:
    """Whether the edit puts a ULSAM layer in."""
    return Edit.parse(edit).groups is not None


def _is_reconstructed(edit: str, behind: bool) -> bool:
    """Whether there is something to reconstruct: ``behind`` the edit, or its own inverted residual in any case."""
    parsed = Edit.parse(edit)
    return parsed.kind != "insert" and (behind or parsed.width is not None)


def _begins_with_setting(text: str) -> bool:
    found = re.match(r"\s*(\w+)\s*=", text)
    return found is not None and found[1] in {field.name for field in dataclasses.fields(TrainConfig)}


def _setting(name: str, text: str) -> dict[str, Any]:
    """A setting's value as YAML reads it; whether it fits is seen where the settings are made."""
    if name in ("keep", "patience"):
        raise UlsamError(_NO_CHOICE)
    if name in COMMON:
        raise UlsamError(f"`{name}` is the same for all arms: give it once, for the whole comparison")
    try:
        return {name: yaml.safe_load(text)}
    except yaml.YAMLError as error:
        raise UlsamError(f"cannot read {name}={text}: {' '.join(str(error).split())}") from error
