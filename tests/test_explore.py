"""The server of `ulsam explore`, asked over real sockets: what it answers, what it refuses, how it starts and ends."""

import base64
import dataclasses
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

import ulsam.apps
from exploring import CLASSES, serving, two
from tiny import command
from ulsam.apps import explore_page as app
from ulsam.apps.explore_views import said
from ulsam.cli import main
from ulsam.explanation import Explanation
from ulsam.explanation.drawing import colored
from ulsam.explanation.panel import panel
from ulsam.model.build import save

LIMIT = 300_000


def png(size: tuple[int, int] = (90, 70), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A whole, tiny file that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(two(), max_bytes=LIMIT) as port:
        yield port


def ask(port: int, path: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[int, Any, Any]:
    """Status, headers, and the body, from JSON if it is that."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status, answer.headers, json.loads(content) if is_json else content
    finally:
        connection.close()


def explained(content: bytes) -> list[Explanation]:
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    return [model.explainer([model.explainer.transform.pixels(pixels)])[0] for model in two()]


def image(uri: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


# ------------------------------------------------------------------------------------------ answers


def test_the_page_gets_what_the_models_find(port: int) -> None:
    content = png()
    found = explained(content)
    status, _, answer = ask(port, "/explain?name=a.png", content)
    assert status == 200
    for one, model in zip(found, answer["models"], strict=True):
        assert [(name, share) for name, _, share in model["top"]] == [
            (name, pytest.approx(share, abs=1e-5)) for name, share in one.top()
        ]
        assert (model["width"], model["height"]) == one.pixels.shape[1::-1]
        assert model["photo"].startswith("data:image/jpeg;base64,")
        assert model["cam"]["of"] == one.top(1)[0][0]
        drawn = image(model["cam"]["image"])
        assert (
            min(drawn.shape[:2]) >= 112 and np.abs(drawn - colored(one.cam, drawn.shape[1::-1]).astype(int)).max() <= 8
        )
        assert len(model["layers"]) == len(one.layers)
        for layer, view in zip(one.layers, model["layers"], strict=True):
            assert len(view["maps"]) == len(layer.maps)
            top = max(2.0, *layer.peak)
            for (_, drawn), values in zip(view["maps"], layer.maps * layer.maps[0].size / top, strict=True):
                expected = colored(values, image(drawn).shape[1::-1])
                assert np.abs(image(drawn) - expected.astype(int)).max() <= 8
    assert [len(model["layers"]) for model in answer["models"]] == [2, 0]
    named = [one.top(1)[0][0] for one in found]
    assert all(name in answer["said"] for name in named)


def test_a_panel_is_that_of_the_model_beside_the_next_one(port: int) -> None:
    content = png()
    found = explained(content)
    names = [f"A, {two()[0].name}", f"B, {two()[1].name}"]
    for number, other in ((0, 1), (1, 0)):
        status, headers, drawn = ask(port, f"/panel/{number}?name=my%20bird.png", content)
        assert (status, headers["content-type"]) == (200, "image/png")
        expected = panel(found[number], found[other], title="my bird.png", names=(names[number], names[other]))
        assert Image.open(io.BytesIO(drawn)).size == expected.size
        assert np.mean(np.asarray(Image.open(io.BytesIO(drawn))) != np.asarray(expected)) < 0.01
    assert ask(port, "/panel/2", content)[0] == 422
    assert ask(port, "/panel/-1", content)[0] == 422


def test_a_model_alone_has_its_panel_and_its_say() -> None:
    with serving(two()[:1]) as port:
        content = png()
        (one, _) = explained(content)
        said = ask(port, "/explain", content)[2]["said"]
        assert said.startswith(one.top(1)[0][0]) and said.endswith("%")
        drawn = Image.open(io.BytesIO(ask(port, "/panel/0", content)[2]))
        assert drawn.size == panel(one).size
        assert ask(port, "/panel/1", content)[0] == 422


def test_images_asked_about_at_a_time_are_not_mixed_up(port: int) -> None:
    contents = [png(seed=seed) for seed in range(app.PLACES)]
    alone = [ask(port, "/explain", content)[2] for content in contents]
    with ThreadPoolExecutor(len(contents)) as pool:
        together = [answer[2] for answer in pool.map(lambda content: ask(port, "/explain", content), contents)]
    for one, other in zip(alone, together, strict=True):
        assert [model["photo"] for model in one["models"]] == [model["photo"] for model in other["models"]]
        shares = [[share for _, _, share in model["top"]] for answer in (one, other) for model in answer["models"]]
        assert shares[:2] == [pytest.approx(each, abs=1e-5) for each in shares[2:]]
    assert len({json.dumps(answer["models"][0]["photo"]) for answer in alone}) == len(contents)


def test_models_of_different_classes_are_not_said_to_disagree() -> None:
    one, _ = explained(png())
    other = dataclasses.replace(one, classes=tuple(f"my {name}" for name in one.classes))
    assert said([one, one]).startswith("Both models say ")
    named = one.top(1)[0][0], other.top(1)[0][0]
    assert said([one, other]) == "The models know different classes: A says {}, B says {}".format(*named)


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 422, "a.png: empty file"),
        (b"no image at all", 422, "a.png: not an image in a known format"),
        (png()[:5000], 422, "a.png: truncated"),
        (huge_png(20_000, 20_000), 422, "a.png: larger than 89000000 pixels"),
        (png((1, 101)), 422, "a.png: one side is more than 100 times as long as the other"),
        (bytes(LIMIT + 1), 413, "larger than 0.3 MB, the most that is taken (see --max-mb)"),
        (bytes(5 * LIMIT), 413, "larger than 0.3 MB"),
        (iter([bytes(LIMIT), b"x"]), 413, "larger than 0.3 MB"),  # chunked: the header states no length
    ],
    ids=["empty", "text", "truncated", "bomb", "line", "large", "very large", "chunked"],
)
def test_what_is_no_image_or_too_large_is_refused(port: int, content: Any, status: int, message: str) -> None:
    found, headers, answer = ask(port, "/explain?name=a.png", content)
    assert found == status and message in answer["detail"] and "\n" not in answer["detail"]
    assert headers["x-content-type-options"] == "nosniff"


def test_strange_names_of_files_stay_on_their_line(port: int) -> None:
    detail = ask(port, "/explain?name=%0A%1B%5B2J" + "x" * 500, b"?")[2]["detail"]
    assert detail.isprintable() and len(detail) < 400


def test_a_fifth_image_is_refused_and_the_four_are_answered(port: int) -> None:
    content = png()
    head = f"POST /explain HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    held = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(app.PLACES)]
    try:
        for one in held:
            one.sendall(head + content[:-1])
        deadline = 50
        while (answer := ask(port, "/explain", content))[0] == 200 and (deadline := deadline - 1):
            pass  # the last of the four may not have been taken in yet
        assert answer[0] == 429 and "4 images" in answer[2]["detail"] and answer[1]["retry-after"] == "1"
        for one in held:
            one.sendall(content[-1:])
            assert one.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
    finally:
        for one in held:
            one.close()
    assert ask(port, "/explain", content)[0] == 200


@pytest.mark.slow
def test_uploads_that_stop_or_stall_give_their_place_back() -> None:
    with serving(two(), timeout=0.3) as port:
        head = f"POST /explain HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1000\r\n\r\n".encode()
        for _ in range(2 * app.PLACES):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as gone:
                gone.sendall(head + b"x")
        with socket.create_connection(("127.0.0.1", port), timeout=30) as stalled:
            stalled.sendall(head + b"x")
            answer = stalled.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 408") and b"the upload took more than 0.3 seconds" in answer
        assert ask(port, "/explain", png())[0] == 200


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Host": "evil.example"}, "not served as 'evil.example'"),
        ({"Host": "127.0.0.1.evil.example:{port}"}, "not served as"),
        ({"Host": "["}, "cannot be read"),
        ({"Origin": "http://evil.example"}, "other addresses may not ask"),
        ({"Origin": "http://127.0.0.1:1"}, "other addresses may not ask"),
        ({"Origin": "null"}, "other addresses may not ask"),
    ],
)
def test_other_hosts_and_origins_are_refused(port: int, headers: dict[str, str], message: str) -> None:
    sent = {name: value.format(port=port) for name, value in headers.items()}
    for path, method in (("/explain", "POST"), ("/panel/0", "POST"), ("/models", "GET"), ("/", "GET")):
        status, got, answer = ask(port, path, png() if method == "POST" else None, method, **sent)
        assert status == 403 and message in answer["detail"]
        assert "default-src 'none'" in got["content-security-policy"]


def test_this_page_itself_may_ask_under_any_address_and_localhost(port: int) -> None:
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "192.168.0.7"):
        assert ask(port, "/explain", png(), Host=host, Origin=f"http://{host}")[0] == 200


def test_the_page_is_its_own_and_nothing_else_is_served(port: int) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, content = ask(port, path, method="GET")
        assert (status, headers.get_content_type(), headers["x-content-type-options"]) == (200, kind, "nosniff")
        assert re.match(r"default-src 'none'; script-src 'self';", headers["content-security-policy"])
        text = content.decode().replace("xmlns='http://www.w3.org/2000/svg'", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import", text)
        assert not re.search(r"<script(?! src=\"page\.js\")|<style|\sstyle=|\son[a-z]+=", text)
    for path in ("/docs", "/openapi.json", "/../app.py", "/page.html", "/%2e%2e/serve.py"):
        assert ask(port, path, method="GET")[0] == 404
    assert ask(port, "/explain", method="GET")[0] == 405
    answer = ask(port, "/models", method="GET")[2]
    assert [(model["name"], model["attention"]) for model in answer["models"]] == [
        (two()[0].name, True),
        (two()[1].name, False),
    ]
    assert answer["max_bytes"] == LIMIT


def test_no_file_is_written(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python reports what is opened for writing, by whichever thread of this process."""
    written: list[object] = []

    def note(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(args[0])

    watching = True
    sys.addaudithook(note)
    try:
        (tmp_path / "seen").write_text("")
        for path in ("/explain", "/panel/0"):
            assert ask(port, path, png((200, 300)))[0] == 200
        assert ask(port, "/explain", bytes(LIMIT + 1))[0] == 413
    finally:
        watching = False
    assert written == [str(tmp_path / "seen")] or written == [tmp_path / "seen"]


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    explainer = two()[0].explainer
    save(explainer.model, explainer.spec, path)
    return str(path)


@pytest.mark.slow
def test_the_command_prints_its_address_and_ends_with_ctrl_c(file: str, tmp_path: Path) -> None:
    with command(["explore", file, file, "--port", "0", "--max-mb", "1"], cwd=tmp_path) as server:
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+  \(Ctrl-C ends it\)\n", line)
        port = urlsplit(line.split()[0]).port
        assert port is not None
        answer = ask(port, "/models", method="GET")[2]
        assert answer["max_bytes"] == 1_000_000 and [model["file"] for model in answer["models"]] == [file, file]
        answer = ask(port, "/explain", png())[2]
        assert {name for name, _, _ in answer["models"][0]["top"]} == set(CLASSES)
        with socket.create_connection(("127.0.0.1", port)):  # one that is left open keeps nobody waiting
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0
        assert (server.stdout.read(), server.stderr.read()) == ("", "")
    assert not list(tmp_path.iterdir())


def test_mistakes_get_one_line(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = str(taken.getsockname()[1])
        for arguments, message in [
            (
                [file, "--port", busy],
                f"cannot listen on port {busy} of 127.0.0.1: address already in use; name another",
            ),
            ([file, "--port", "65536"], "--port must be 0 to 65535, not 65536"),
            ([file, "--max-mb", "0"], "--max-mb must be 1 or more, not 0"),
            ([file, "--host", "256.0.0.1", "--port", "0"], "cannot listen on 256.0.0.1: "),
            ([str(tmp_path / "no.safetensors"), "--port", "0"], "no.safetensors"),
        ]:
            assert main(["explore", *arguments]) == 2
            printed = capsys.readouterr()
            assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["explore", "model.safetensors"]) == 2
    assert "pip install 'ulsam[explore]'" in capsys.readouterr().err


def test_the_page_comes_with_the_package() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    packed = project["tool"]["setuptools"]["package-data"]["ulsam.apps"]
    folder = Path(ulsam.apps.__file__).parent
    assert sorted(packed) == sorted(path.name for path in folder.iterdir() if path.suffix not in (".py", ""))
