"""A user's mistake costs one line and exit status 2: no traceback, and nothing is left on disk."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiny import SETTINGS, TINY_MODEL, draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.model.build import build, save
from ulsam.model.spec import ModelSpec
from ulsam.training.config import TrainConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good data set and many bad ones, settings and weights."""
    root = tmp_path_factory.mktemp("place")
    draw_splits(root / "data", train=6, val=2)
    draw_splits(root / "one", train=2, val=1, classes=1)
    (root / "empty").mkdir()
    (root / "hollow" / "robin").mkdir(parents=True)
    (root / "hollow" / "wren").mkdir()
    draw_splits(root / "twice", train=2, val=1)
    (root / "twice" / "valid").mkdir()
    draw_splits(root / "other", train=2, val=1)
    (root / "other" / "val" / "class0").rename(root / "other" / "val" / "wren")
    texts = {
        "list.yaml": "- 1\n- 2\n",
        "broken.yaml": "data: [1, 2\nlr: 3\n",
        "empty.yaml": "",
        "typo.yaml": "data: data\nbatchsize: 4\n",
        "type.yaml": "data: data\naccumulate: three\n",
        "float.yaml": "data: data\naccumulate: 1.5\n",
        "nodata.yaml": "epochs: 1\n",
        "edits.yaml": "data: data\nedits: [replace]\n",
        "hook.yaml": "data: !!python/object/apply:os.mkdir [proof]\n",
        "weights.pt": "no weights",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "latin.yaml").write_bytes("data: Zaunkönig".encode("latin-1"))
    save_file({"conv.weight": torch.zeros(2)}, root / "other.safetensors")
    two = ModelSpec(TINY_MODEL, ("robin", "wren"))
    save(build(two)[0], two, root / "teacher.safetensors")
    return root


CASES = {
    # data
    "": "no data given: name an image folder or a data set",
    "nowhere": "no such folder: nowhere",
    "list.yaml": "not a folder: list.yaml",
    "empty": "empty has no class folders: expected one subfolder of images for each class",
    "hollow": "no image in any of the 2 class folders of hollow",
    "one": "holds images of 1 class (class0), at least 2 are needed",
    "twice": "twice has two folders for val, val and valid: keep one of them",
    "other": "has classes that were not trained on: wren",
    "data --val-split holiday": "data has no split 'holiday'; it has train, val",
    "data --val-fraction 2": "must lie between 0 and 1",
    "torch/cifar10": "torch/cifar10 needs --data-dir",
    "torch/cifar10 --data-dir empty": "cannot open torch/cifar10, split 'train', in empty: Dataset not found",
    "data --batch-size 100": "18 training images do not fill one batch of 100 for 1 process(es): use --batch-size 18",
    "data --accumulate 9": "an epoch has 2 batches, fewer than --accumulate 9",
    "data --batch-size 1": "BatchNorm cannot train on one image at a time here: use --batch-size 2 or more",
    # model
    "data --model mobilnetv2_100": "timm has no model 'mobilnetv2_100'; nearest: mobilenetv2_100",
    "data --insert blocks.99": "no module is named 'blocks.99'; nearest names:",
    "data --replace 14": "layer number 14: the paper's numbers exist for MobileNet-V1 and V2 alone",
    "data --insert blocks.2 --groups 5": "groups=5 does not divide 32 channels; valid: [1, 2, 4, 8, 16, 32]",
    "data --groups 4": "--groups has nothing to act on: add --replace AT or --insert AT",
    "data --insert blocks.2 --form best": "--form: 'best' is not one of equations, released",
    "data --weights nowhere.pt": "no weight file nowhere.pt",
    "data --weights weights.pt": "weights.pt holds no weights that can be read safely",
    "data --weights other.safetensors": "does not fit this model",
    "data --weights other.safetensors --pretrained": "--pretrained and --weights exclude each other",
    "data --pretrained --model mobilenetv1_050": "no hub weights of mobilenetv1_050 to be had: No pretrained",
    'data --pretrained --model-args {"width":"x"}': "timm cannot build",
    "data --freeze blocks.77": "no module is named 'blocks.77'",
    "data --freeze *": "every parameter is frozen: leave something to train out of --freeze",
    'data --model-args {"width":"x"}': "timm cannot build",
    'data --model-args {"pretrained":true}': "model arguments may not hold pretrained",
    'data --in-chans 1 --model-args {"in_chans":2}': "--in-chans is 1, and 2 in --model-args: leave one of them out",
    'data --model-args {"in_chans":"x"}': "--in-chans is a whole number from 1 to 64, not 'x'",
    "data --in-chans 1 --color-jitter 0.3": "--color-jitter works on RGB images, not on those of 1 channels",
    "data --in-chans 2 --rand-augment rand-m5": "--rand-augment works on RGB images, not on those of 2 channels",
    "data --in-chans 1 --mean 0.5 0.5 0.5": "--mean takes a number for each of the 1 channels",
    # teacher
    "data --teacher nowhere.safetensors": "no model file nowhere.safetensors",
    "data --teacher weights.pt": "weights.pt is no safetensors file, or is cut off",
    "data --teacher other.safetensors": "other.safetensors holds weights without a spec",
    "data --teacher teacher.safetensors": "cannot teach: it knows 2 classes, the data has 3",
    "data --distill 0.3": "--distill needs a teacher: name the model file of a trained model",
    "data --distill-features 1": "--distill-features needs a teacher",
    "data --teacher teacher.safetensors --distill 0": "the teacher would teach nothing",
    "data --ulsam-lr 2": "--ulsam-lr has nothing to act on: this model has no ULSAM layer that is trained",
    # values
    "data --ulsam-lr 0": "--ulsam-lr must be above 0, not 0.0",
    "data --teacher teacher.safetensors --distill 2": "--distill must lie between 0 and 1, not 2.0",
    "data --lr 0": "--lr must be above 0, not 0.0",
    "data --lr nan": "--lr must be above 0, not nan",
    "data --epochs 0": "--epochs must be 1 or more, not 0",
    "data --workers -1": "--workers must be 0 or more, not -1",
    "data --seed -1": "--seed must be 0 or more, not -1",
    "data --min-lr -1": "--min-lr must be 0 or more, not -1.0",
    "data --min-lr 0.1 --lr 0.01": "--min-lr, where the schedule ends, is 0.1: above its peak --lr, 0.01",
    "data --warmup-epochs 2 --epochs 2": "--warmup-epochs is 2.0, which leaves nothing of 2 epochs",
    "data --threads 1000000": "--threads must be 1024 or less, not 1000000",
    "data --momentum 0": "--momentum must lie between 0 and 1, both excluded, not 0.0",
    "data --smoothing 2": "--smoothing must lie between 0 and 1, not 2.0",
    "data --crop-pct 0": "--crop-pct must lie between 0.1 and 1.5, not 0.0",
    "data --crop-scale 0.5": "--crop-scale takes two shares of the area",
    "data --mean 0.5,0.5": "--mean takes a number for each of the 3 channels, not [0.5, 0.5]",
    "data --mean 0.5,x,0.5": "--mean: must be a number, not 'x'",
    "data --mean 0.5": "--mean takes a number for each of the 3 channels, not [0.5]",
    "data --std 0.5 0.5 0": "--std must be above 0 in every channel",
    "data --interpolation cubic": "--interpolation must be bilinear or bicubic, not 'cubic'",
    "data --opt adamv": "timm has no optimizer 'adamv'; nearest: adam",
    "data --opt adahessian": "the optimizer adahessian needs a second backward pass",
    'data --opt lamb --opt-args {"beta":1}': "the optimizer lamb does not take --opt-args {'beta': 1}",
    "data --sched step --decay-epochs 20 --epochs 2": "--decay-epochs",
    "data --opt adamw --momentum 0.5": "the optimizer adamw takes no --momentum: leave it out",
    "data --class-names names.txt": "--class-names is for data sets by name, and data names its classes: leave it out",
    "data --data-dir elsewhere": "--data-dir is for tables and data sets by name, and data is a folder: leave it out",
    "data --decay-epochs 2": "--decay-epochs is for --sched step, not cosine: leave it out",
    "data --mixup 0.2 --batch-size 3": "--mixup and --cutmix need an even batch size, not 3",
    "data --rand-augment nonsense": "unknown policy --rand-augment nonsense; write e.g. rand-m7-n2-mstd0.5",
    "data --rand-augment rand-m999999-n2": "--rand-augment takes a number up to 30 after m, not 999999",
    "data --workers 100000": "--workers must be 512 or less, not 100000",
    "data --amp fp16": "--amp fp16 needs a CUDA GPU; on cpu use bf16 or none",
    "data --device toaster": "no device 'toaster' here",
    "data --device openvino": "; use --device cpu, cuda, mps or xpu; those of other engines are for an exported model",
    "data --device meta": "no device 'meta' here",
    # settings file
    "--config nowhere.yaml": "cannot read the settings in nowhere.yaml: no such file or directory",
    "--config list.yaml": "list.yaml holds no settings; write lines such as 'epochs: 10'",
    "--config empty.yaml": "empty.yaml holds no settings",
    "--config broken.yaml": "broken.yaml is not YAML: ",
    "--config latin.yaml": "cannot read the settings in latin.yaml: ",
    "--config hook.yaml": "hook.yaml is not YAML: could not determine a constructor",
    "--config typo.yaml": "unknown setting 'batchsize'; did you mean batch_size?",
    "--config type.yaml": "--accumulate must be a whole number, not 'three'",
    "--config float.yaml": "--accumulate must be a whole number, not 1.5",
    "--config nodata.yaml": "no data given",
    "--config edits.yaml": "cannot read the edit 'replace'; write it as 'replace 14,17 g=4 form=equations'",
    # resuming
    "--resume nowhere": "nowhere is not the folder of a run: there is no config.yaml in it",
    "--resume data --config typo.yaml": "--resume continues in its own folder with its own settings",
}


@pytest.mark.parametrize("words", CASES)
def test_a_mistake_is_one_line(
    words: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = sorted(os.listdir())
    given = words.split(" ") if words else []
    rest = {name: value for name, value in SETTINGS.items() if "--" + name.replace("_", "-") not in given}
    new_run = [] if "--resume" in given else ["--out", str(tmp_path / "run")]
    assert main(["train", *given, *new_run, *(options(rest) if new_run else [])]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ulsam: error: ")
    assert err.count("\n") == 1
    assert CASES[words] in err
    assert sorted(os.listdir()) == before
    assert os.listdir(tmp_path) == (["run"] if "BatchNorm" in err else [])  # which shows in the first step


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data --lr fast", "--lr: must be a number, not 'fast'"),
        ("data --sched best", "--sched: 'best' is not one of cosine, tanh, poly, step, multistep, constant"),
        ("data --nonsense", "no option --nonsense"),
        ("data more", "unexpected argument 'more'"),
        ("--out", "--out: expected one argument"),
    ],
)
def test_what_cannot_be_parsed(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_resume_with_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(place), "--out", "elsewhere"]) == 2
    assert "leave --out and --config out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 3}, "`data` must be text, not 3"),
        ({"pretrained": "yes"}, "`pretrained` must be true or false, not 'yes'"),
        ({"edits": "replace 14"}, "`edits` must be a list, not 'replace 14'"),
        ({"edits": [14]}, "`edits` must be text, not 14"),
        ({"lr": "fast"}, "`lr` must be a number, not 'fast'"),
        ({"lr": True}, "`lr` must be a number, not True"),
        ({"model_args": []}, r"`model_args` must be a JSON object, not \[\]"),
        ({"sampler": None}, "`sampler` must be one of shuffle, balanced, not None"),
        ({3: 4}, "unknown setting 3"),
    ],
)
def test_settings_of_the_wrong_type(values: dict[str, object], message: str) -> None:
    with pytest.raises(UlsamError, match=message):
        TrainConfig.from_mapping({"data": "birds", **values})


@pytest.mark.parametrize("text", ["[1]", "{width: 1}", ""])
def test_model_args_that_are_no_json_object(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "data", "--model-args", text]) == 2
    assert f"--model-args: {text!r} is no JSON object such as" in capsys.readouterr().err


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in ("passes over the training images (default: 10)", "the random crop in training (default: 0.25 1.0)"):
        assert text in out
