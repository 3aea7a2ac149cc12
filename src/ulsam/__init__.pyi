"""The types of the public names, which `__init__.py` loads when they are first used."""

from ulsam.base.errors import Interrupted as Interrupted
from ulsam.base.errors import UlsamError as UlsamError
from ulsam.base.logs import show_progress as show_progress
from ulsam.deploy.bench import bench as bench
from ulsam.deploy.evaluate import evaluate as evaluate
from ulsam.deploy.evaluate_labels import evaluate_labels as evaluate_labels
from ulsam.deploy.export import export as export
from ulsam.deploy.hub import push as push
from ulsam.deploy.predict import predict as predict
from ulsam.deploy.quantize import quantize as quantize
from ulsam.explanation.explainer import explain as explain
from ulsam.explanation.inspect_maps import inspect as inspect
from ulsam.layer.inverted_residual import InvertedResidual as InvertedResidual
from ulsam.layer.ulsam import ULSAM as ULSAM
from ulsam.layer.ulsam import convert_released as convert_released
from ulsam.model.build import build as build
from ulsam.model.build import load as load
from ulsam.model.build import save as save
from ulsam.model.spec import Edit as Edit
from ulsam.model.spec import ModelSpec as ModelSpec
from ulsam.model.spec import apply as apply
from ulsam.model.spec import edits_of as edits_of
from ulsam.model.timm_spec import make_spec as make_spec
from ulsam.study.compare import compare as compare
from ulsam.study.slim import slim as slim
from ulsam.surgery.cost import cost as cost
from ulsam.surgery.edit import insert as insert
from ulsam.surgery.edit import remove as remove
from ulsam.surgery.edit import replace as replace
from ulsam.surgery.edit import undo as undo
from ulsam.surgery.find import candidates as candidates
from ulsam.surgery.fold import fold as fold
from ulsam.surgery.reconstruct import reconstruct as reconstruct
from ulsam.training.callbacks import Callback as Callback
from ulsam.training.config import TrainConfig as TrainConfig
from ulsam.training.settings import TrainSettings as TrainSettings
from ulsam.training.train import resume as resume
from ulsam.training.train import train as train

__version__: str
