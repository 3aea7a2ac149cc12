"""Model files that somebody made: each is loaded, or refused in one line, within 5 seconds and 500 MB."""

import functools
import itertools
import json
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from attack import alone

from ulsam.base.errors import UlsamError
from ulsam.model.build import build, load, make_spec, save
from ulsam.model.spec import Edit

SECONDS, MEGABYTES = 5.0, 500.0
NUMBERS = (-1, 0, 1, 99, 4_096, 10**6, 2**31, 2**63, 10**400, 0.5, float("nan"), True, None, "9", [9], [9] * 10**5, {})


def attack(count: int = 300, seed: int = 0) -> tuple[dict[str, Any], list[str]]:
    """All files that are listed here, and ``count`` of changed bytes."""
    fell, loaded, total, worst = [], 0, 0, {"seconds": 0.0, "megabytes": 0.0}
    with tempfile.TemporaryDirectory(prefix="ulsam-attack-") as root:
        path = Path(root) / "model.safetensors"
        for name, content in _files(Path(root), count, np.random.default_rng(seed)):
            path.unlink(missing_ok=True)
            content.rename(path) if isinstance(content, Path) else path.write_bytes(content)
            answer = alone(functools.partial(_opened, path), 60.0)
            total += 1
            loaded += answer["found"] == "loaded"
            for key in worst:
                worst[key] = max(worst[key], round(answer[key], 2))
            if answer["seconds"] > SECONDS or answer["megabytes"] > MEGABYTES:
                fell.append(f"{name}: {answer['seconds']:.1f} s, {answer['megabytes']:.0f} MB: {answer['found'][:200]}")
            elif answer["found"] != "loaded" and not answer["found"].startswith("refused"):
                fell.append(f"{name}: {answer['found'][:300]}")
    return {"files": total, "loaded": loaded, "refused": total - loaded, "worst": worst}, fell


def _opened(path: Path) -> str:
    try:
        load(path)
    except UlsamError as error:
        text = str(error)
        return f"refused: {text}" if "\n" not in text else f"several lines: {text}"
    return "loaded"


def _files(root: Path, count: int, random: np.random.Generator) -> Iterator[tuple[str, bytes | Path]]:
    spec = make_spec("test_efficientnet", ("a", "b"), [Edit("insert", "blocks.2", 4)], size=32)
    save(build(spec)[0], spec, root / "sound")
    sound = (root / "sound").read_bytes()
    yield from _specs(sound)
    yield from _structure(root, sound)
    for number in range(count):
        changed = bytearray(sound)
        length = struct.unpack_from("<Q", sound)[0]
        last = 8 if number % 3 == 0 else 8 + length if number % 3 == 1 else len(sound)
        for place in random.integers(0, last, random.integers(1, 30)):
            changed[place] = random.integers(256)
        yield f"changed bytes {number}", bytes(changed if number % 5 else changed[: random.integers(len(sound))])


def _file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _parts(sound: bytes) -> tuple[dict[str, Any], bytes, str, dict[str, Any]]:
    """Header, data, and the key and the value of the spec."""
    length = struct.unpack_from("<Q", sound)[0]
    header = json.loads(sound[8 : 8 + length])
    key, text = next(iter(header["__metadata__"].items()))
    return header, sound[8 + length :], key, json.loads(text)


def _with_spec(sound: bytes, spec: Any) -> bytes:
    header, data, key, _ = _parts(sound)
    text = spec if isinstance(spec, str) else json.dumps(spec)
    return _file({**header, "__metadata__": {key: text}}, data)


def _specs(sound: bytes) -> Iterator[tuple[str, bytes]]:
    """Specs that ask for much, or are none."""
    spec = _parts(sound)[3]
    for key, value in itertools.product(spec, NUMBERS):
        yield f"{key} is {str(value)[:30]}", _with_spec(sound, {**spec, key: value})
    for name in timm.list_models()[::9]:
        yield f"base {name}", _with_spec(sound, {**spec, "base": name, "edits": []})
    arguments = {
        "swin_tiny_patch4_window7_224": ["img_size", "window_size", "depths", "embed_dim", "num_heads", "patch_size"],
        "vit_tiny_patch16_224": [
            "img_size",
            "depth",
            "embed_dim",
            "num_heads",
            "patch_size",
            "mlp_ratio",
            "reg_tokens",
        ],
        "mobilenetv2_100": [
            "num_classes",
            "in_chans",
            "drop_rate",
            "channel_multiplier",
            "depth_multiplier",
            "stem_size",
        ],
        "resnet18": ["layers", "cardinality", "base_width", "stem_width", "output_stride", "block", "act_layer"],
        "convnext_atto": ["depths", "dims", "kernel_sizes", "patch_size", "norm_layer"],
        "maxvit_tiny_tf_224": ["img_size", "depths", "embed_dim", "stem_width"],
    }
    values: tuple[Any, ...] = (
        9_999,
        12_096,
        -5,
        2**40,
        [9_999] * 4,
        [3] * 9_999,
        "os.system",
        {"a": 1},
        1e308,
        "torch.nn.ReLU",
    )
    for base, names in arguments.items():
        for name, value in itertools.product(names, values):
            wanted = {**spec, "base": base, "edits": [], "model_args": {name: value}}
            yield f"{base} {name}={str(value)[:30]}", _with_spec(sound, wanted)
    edit = spec["edits"][0]
    for number in (200, 5_000):
        yield f"{number} edits", _with_spec(sound, {**spec, "edits": [edit] * number})
        yield (
            f"an edit of {number} places",
            _with_spec(sound, {**spec, "edits": ["insert " + "blocks.2," * number + "blocks.1"]}),
        )
    for text in (
        "insert **",
        "insert " + "*" * 5_000,
        "insert " + "?*" * 60 + "x",
        "replace blocks.2 g=1" + "0" * 5_000,
    ):
        yield f"edit {text[:30]}", _with_spec(sound, {**spec, "edits": [text]})
    yield "100,000 classes", _with_spec(sound, {**spec, "classes": [str(n) for n in range(100_000)]})
    yield "a class of 10 MB", _with_spec(sound, {**spec, "classes": ["a", "b" * 10**7]})
    yield "brackets", _with_spec(sound, "[" * 10**6)
    yield "a spec of digits", _with_spec(sound, "9" * 10**6)
    yield "a spec twice", _with_spec(sound, json.dumps(spec) * 2)
    for text in (
        "",
        "null",
        "[]",
        "\ud800",
        "\0",
        "NaN",
        '{"base": "hf-hub:timm/resnet18"}',
        '{"base": "../../etc/passwd"}',
    ):
        yield f"spec {text!r}", _with_spec(sound, text)
    for base in (
        "hf-hub:timm/resnet18.a1_in1k",
        "local-dir:/etc",
        "https://example.com/x",
        "resnet18.a1_in1k",
        "x" * 10**6,
    ):
        yield f"base {base[:40]}", _with_spec(sound, {**spec, "base": base, "edits": []})


def _structure(root: Path, sound: bytes) -> Iterator[tuple[str, bytes | Path]]:
    """Files whose tensors are not what they say, and files of other kinds."""
    header, data, _, _ = _parts(sound)
    tensors = [name for name in header if name != "__metadata__"]
    one = header[tensors[0]]
    for key, values in {
        "shape": ([0], [2**40, 0], [2**62, 4], [-1], [1] * 10_000, "x", None, [1.5], [2**31 + 8]),
        "dtype": ("F64", "I8", "BOOL", "F8_E4M3", "U64", "X", None, 3, "C64"),
        "data_offsets": ([0, 0], [0, 2**62], [5, 1], [-4, 4], [2**64, 2**64 + 4], "x", [0], [0, 1, 2]),
    }.items():
        for value in values:
            yield f"{key} {str(value)[:30]}", _file({**header, tensors[0]: {**one, key: value}}, data)
    yield "a tensor missing", _file({name: value for name, value in header.items() if name != tensors[0]}, data)
    yield "a tensor more", _file({**header, "more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data)
    many = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(200_000)}
    yield "200,000 empty tensors", _file({**many, "__metadata__": header["__metadata__"]})
    yield "a name with commands to a terminal", _file({**header, "\x1b[2J\n": one}, data)
    yield "two of a name", _file(json.dumps(header).encode()[:-1] + b"," + json.dumps(header).encode()[1:], data)
    for length in (0, 1, 2**31, 2**63, 2**64 - 1, len(sound)):
        yield f"a header of {length} bytes", struct.pack("<Q", length) + sound[8:]
    yield "a header of 99 MB", _file(b"{" + b" " * 99_000_000 + b"}")
    yield "a header of brackets", _file(b'{"a":' * 500_000)
    yield "a header that is no text", _file(b"\xff" * 1000)
    for size in (0, 1, 7, 8, 9, 100, len(sound) // 2, len(sound) - 1):
        yield f"cut to {size} bytes", sound[:size]
    yield "a byte behind it", sound + b"\0"
    yield "all zeros", bytes(10**6)
    sparse = root / "sparse"
    for shape in ([2**31 + 8], [2**16, 2**15 + 1], [3, 2**30]):
        size = int(np.prod(shape, dtype=np.int64))
        huge = _file(
            {**header, "huge": {"dtype": "U8", "shape": shape, "data_offsets": [len(data), len(data) + size]}}, data
        )
        with sparse.open("wb") as file:
            file.write(huge)
            file.truncate(len(huge) + size)
        yield f"a tensor of {size} elements", sparse
    code = b"\x80\x04cos\nsystem\n(S'touch /tmp/ulsam-attack-was-here'\ntR."
    torch.save({"a": torch.zeros(3)}, root / "pickle")
    yield "a pickle", code
    yield "a checkpoint", (root / "pickle").read_bytes()
    yield "zip", b"PK\x03\x04" + bytes(1000)
    yield "text", b"hello\n" * 1000
    yield "onnx", b"\x08\x08\x12\x07pytorch" + bytes(100)
