"""The HTTP service in processes of its own: right answers, limits, a clean end, nothing on disk."""

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import schemathesis
import torch
from hypothesis import strategies as st
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance
from torch import nn

from serving import KEY, PNG, Service, form, reply, service
from tiny import TINY_MODEL, draw
from ulsam import runtime
from ulsam.apps.service import _about, create_app
from ulsam.apps.service_engine import ServiceEngine
from ulsam.apps.service_limits import Limits
from ulsam.apps.service_metrics import Metrics
from ulsam.cli import main
from ulsam.data.preprocessing import Preprocessing
from ulsam.deploy.export import export
from ulsam.model.build import build, make_spec, save
from ulsam.model.spec import Edit

CHROMIUM = os.environ.get("ULSAM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model file, the same model exported, and images."""
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, ("class0", "class1", "class2"), [Edit("insert", "blocks.1.0", 4)], size=48)
    model, _ = build(spec)
    nn.init.normal_(model.get_submodule("classifier").weight, std=5)
    root = tmp_path_factory.mktemp("serve")
    save(model, spec, root / "model.safetensors")
    export(model, root / "model.onnx", spec=spec)
    draw(root / "images", 8, size=70)
    photograph = np.random.default_rng(0).integers(0, 256, (800, 900, 3), dtype=np.uint8)  # above 1 MB
    Image.fromarray(photograph).save(root / "images" / "class0" / "large.jpg", quality=98)
    return root


@pytest.fixture(scope="module")
def served(world):
    with service(str(world / "model.onnx"), folder=world / "served") as one:
        yield one


@pytest.fixture(scope="module")
def strict(world):
    """A service with tight limits and a key."""
    limits = "--max-requests 2 --timeout 1.5 --idle 1 --max-pixels 10000 --max-megabytes 1 --max-images 3"
    with service(str(world / "model.onnx"), *limits.split(), folder=world / "strict", ULSAM_API_KEY=KEY) as one:
        yield one


def paths(world: Path) -> list[Path]:
    return sorted((world / "images").rglob("*.*"))


def shares(prediction: dict[str, Any]) -> dict[str, float]:
    return {one["name"]: one["probability"] for one in prediction["classes"]}


def head(length: int, *lines: str) -> bytes:
    headers = [f"Content-Length: {length}", "Content-Type: image/png", f"Authorization: Bearer {KEY}", *lines]
    return "\r\n".join(["POST /predict HTTP/1.1", "Host: here", *headers, "", ""]).encode()


def test_answers_are_those_of_predict(served, world, capsys):
    files = paths(world)
    assert main(["predict", str(world / "model.onnx"), *map(str, files), "--json", "--top", "2"]) == 0
    expected = [json.loads(line)["classes"] for line in capsys.readouterr().out.splitlines()]
    assert len({tuple(one) for one in expected}) > 1
    alone = [served.ask("/predict?top=2", path.read_bytes()).body["predictions"] for path in files]
    body, headers = form([(path.name, path.read_bytes()) for path in files])
    together = served.ask("/predict?top=2", body, headers).body["predictions"]
    for path, wanted, (one,), other in zip(files, expected, alone, together, strict=True):
        assert (one["image"], one["error"], other["image"], other["error"]) == (None, None, path.name, None)
        for found in (shares(one), shares(other)):
            assert list(found) == list(wanted)
            assert found == pytest.approx(wanted, abs=2e-5)


def test_an_image_that_is_none_has_an_error_in_its_place(served, world):
    good = paths(world)[0].read_bytes()
    body, headers = form([("no.jpg", b"nothing"), ("good.png", good), ("cut.png", good[:900])])
    found = served.ask("/predict", body, headers)
    assert found.status == 200
    assert [one["error"] for one in found.body["predictions"]] == [
        "not an image in a known format, or cut off within its header",
        None,
        "truncated",
    ]
    assert [len(one["classes"]) for one in found.body["predictions"]] == [0, 3, 0]
    body, headers = form([("no.jpg", b"nothing"), ("", b"")])
    found = served.ask("/predict", body, headers)
    assert found.status == 422
    assert found.body["detail"].startswith("no.jpg: not an image in a known format")


def test_an_exported_model_is_served_without_pytorch(served):
    assert "libtorch" not in Path(f"/proc/{served.process.pid}/maps").read_text()


def test_many_clients_each_get_their_own_answer(served, world):
    files = paths(world)
    model = runtime.load(world / "model.onnx", threads=1)
    expected = {path: dict(one.classes) for path, one in zip(files, model.predict(files), strict=True)}
    before, wrong = served.metric("ulsam_batch_images_count"), []

    def client(number: int) -> None:
        with contextlib.closing(served.connect()) as connection:
            for turn in range(10):
                path = files[(7 * number + turn) % len(files)]
                connection.request("POST", "/predict", path.read_bytes(), PNG)
                found = reply(connection)
                if found.status != 200 or shares(found.body["predictions"][0]) != pytest.approx(
                    expected[path], abs=2e-5
                ):
                    wrong.append((path, found))

    run([threading.Thread(target=client, args=(number,)) for number in range(12)])
    assert wrong == []
    assert 0 < served.metric("ulsam_batch_images_count") - before <= 120


def run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Brightness:
    """A model of two outputs that holds its first batch until it is let go, and keeps the sizes of its batches."""

    classes = ("dark", "light")
    preprocessing = Preprocessing((4, 4), "nearest", 1.0, (0.5,) * 3, (0.5,) * 3)
    thresholds = None

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()

    def logits(self, images):
        self.sizes.append(len(images))
        assert self.go.wait(20)
        light = images.mean((1, 2, 3)) / 255
        return np.stack([1 - light, light], 1).astype(np.float32)


def gray(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, value).save(stream, "png")
    return stream.getvalue()


def test_what_waits_is_computed_together_and_a_request_given_up_harms_no_other():
    async def scene() -> tuple[list[int], list[Any]]:
        model, limits = Brightness(), Limits(batch=4)
        engine = ServiceEngine(model, limits, Metrics(limits))
        tasks = [asyncio.create_task(engine.probabilities(gray(20 * number))) for number in range(10)]
        while not model.sizes or engine._batches._queue.qsize() + sum(model.sizes) < 10:
            await asyncio.sleep(0.01)
        tasks[0].cancel()
        tasks[6].cancel()
        model.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.close()
        return model.sizes, found

    sizes, found = asyncio.run(asyncio.wait_for(scene(), 20))
    assert sum(sizes) == 10
    assert max(sizes) == 4
    for number, shares in enumerate(found):
        if number in (0, 6):
            assert isinstance(shares, asyncio.CancelledError)
        else:
            assert shares[1] == pytest.approx(1 / (1 + np.exp(1 - 2 * 20 * number / 255)), abs=1e-4)


def test_no_answer_in_time_is_a_503_that_says_when_to_come_back():
    async def scene() -> tuple[list[dict[str, Any]], bytes]:
        model, limits = Brightness(), Limits(timeout=0.2)
        engine = ServiceEngine(model, limits, Metrics(limits))
        app = create_app(engine, limits, None)
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": gray(9), "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "http_version": "1.1"}
        await app({**scope, "headers": [(b"content-type", b"image/png")]}, receive, send)
        model.go.set()
        await engine.close()
        return sent, engine.metrics.text()

    (start, body), metrics = asyncio.run(scene())
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert json.loads(body["body"]) == {"detail": "no answer within 0.2 seconds"}
    assert b'ulsam_requests_total{status="503"} 1.0' in metrics


def test_what_is_too_large_or_of_another_kind_is_refused(strict, world):
    lock = {"Authorization": f"Bearer {KEY}"}
    small, headers = gray(90), {**PNG, **lock}
    assert strict.ask("/predict", small, headers).status == 200
    large = bytes(5_000_000)
    for body in (large, iter([large[:800_000]] * 6)):  # announced, and in pieces of unknown number
        with contextlib.closing(strict.connect()) as connection:
            connection.request("POST", "/predict", body, headers, encode_chunked=not isinstance(body, bytes))
            found = reply(connection)
        assert (found.status, found.body) == (413, {"detail": "the body must be 1000000 bytes or less"})
    body, kind = form([("a", small)] * 4)
    found = strict.ask("/predict", body, {**kind, **lock})
    assert (found.status, "Maximum number of files is 3" in found.body["detail"]) == (413, True)
    found = strict.ask("/predict", gray(9, (101, 100)), headers)
    assert (found.status, found.body) == (422, {"detail": "larger than 10000 pixels, the most that is read"})
    found = strict.ask("/predict", gray(9, (101, 1)), headers)
    assert (found.status, found.body) == (422, {"detail": "one side is more than 100 times as long as the other"})
    for refused in (
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {**PNG, "Content-Encoding": "gzip"},
    ):
        assert strict.ask("/predict", small, {**refused, **lock}).status == 415
    for query in ("top=0", "top=x", "top=1001"):
        found = strict.ask(f"/predict?{query}", small, headers)
        assert (found.status, found.body["detail"].startswith("top: ")) == (422, True)
    for broken in ("", "; boundary=other", "; boundary=cut; charset=undefined"):
        found = strict.ask("/predict", body[:200], {"Content-Type": f"multipart/form-data{broken}", **lock})
        assert (found.status, found.body["detail"].startswith("no f")) == (422, True)


def test_the_key_is_asked_for(strict):
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        for path, body in (("/predict", gray(9)), ("/metrics", None)):
            found = strict.ask(path, body, {**PNG, **given})
            assert (found.status, found.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert strict.ask("/health").body == {"status": "ok"}
    assert strict.ask("/metrics", headers={"Authorization": f"Bearer {KEY}"}).status == 200
    operation = strict.ask("/openapi.json").body["paths"]["/predict"]["post"]
    assert (operation["security"], "401" in operation["responses"]) == ([{"HTTPBearer": []}], True)


def test_slow_clients_are_let_go_and_too_many_are_sent_away(strict):
    slow = [strict.raw(head(1000) + b"begin") for _ in range(2)]  # all that are let in
    loris = strict.raw(b"POST /predict HTTP/1.1\r\nHo")
    while strict.metric("ulsam_requests_in_progress") < 2:
        time.sleep(0.02)
    found = strict.ask("/predict", gray(9), {**PNG, "Authorization": f"Bearer {KEY}"})
    assert (found.status, found.headers["Retry-After"]) == (503, "1")
    with contextlib.suppress(OSError):  # a byte now and then does not help
        for letter in "st: here\r\nA: " + "b" * 100:
            loris.sendall(letter.encode())
            time.sleep(0.1)
    assert loris.recv(99) == b""
    for connection in slow:
        assert b" 408 " in connection.recv(99)
    assert strict.metric("ulsam_requests_in_progress") == 0
    assert strict.ask("/predict", gray(9), {**PNG, "Authorization": f"Bearer {KEY}"}).status == 200
    for connection in (*slow, loris):
        connection.close()


def test_who_takes_no_answers_is_let_go_and_holds_no_place(strict):
    with contextlib.closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", strict.port))
        connection.settimeout(30)
        page = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: here\r\n\r\n"
        wanted = 50  # of more than a megabyte each, of which the system holds a few
        connection.sendall(wanted * page)
        before = strict.metric("process_open_fds")
        while strict.metric("process_open_fds") >= before:
            time.sleep(0.05)
        with contextlib.suppress(ConnectionResetError):
            assert sum(map(len, iter(lambda: connection.recv(2**20), b""))) < wanted * 1_000_000


def test_a_request_that_breaks_after_its_answer_ends_its_connection_alone(strict):
    lines = ["POST /health HTTP/1.1", "Host: here", "Transfer-Encoding: chunked", "", "3\r\nabc\r\n"]
    with contextlib.closing(strict.raw("\r\n".join(lines).encode())) as connection:
        assert b" 405 " in connection.recv(999)
        with contextlib.suppress(OSError):
            connection.sendall(b"no number of bytes\r\n")
            assert b"HTTP" not in connection.recv(999)
    assert strict.ask("/health").status == 200


def test_requests_that_are_cut_off_or_broken_leave_nothing_behind(served):
    strip = gray(9, (60_000, 1_000))

    def hostile() -> None:
        for sent in (head(100_000) + bytes(50_000), b"\x16\x03\x01" * 50, b"GET / HTTP/9.9\r\n\r\n", head(-1)):
            served.raw(sent).close()
        for sent in (head(9, "Content-Length: 8"), b"POST /predict HTTP/1.1\r\n" + b"a: b\r\n" * 9000):
            with contextlib.closing(served.raw(sent)) as connection, contextlib.suppress(ConnectionResetError):
                assert connection.recv(99).split()[1:2] in ([b"400"], [b"431"])
        assert served.ask("/predict", bytes(20_000_000)).status == 413
        assert served.ask("/predict", strip).status == 422

    def at_rest() -> float:
        while served.metric("ulsam_requests_in_progress"):
            time.sleep(0.02)
        return served.metric("process_resident_memory_bytes")

    for _ in range(3):
        hostile()
    before = at_rest()
    for _ in range(10):
        hostile()
    assert at_rest() - before < 15e6
    assert served.ask("/health").status == 200


def test_asked_to_stop_it_answers_what_is_in_flight_and_loses_nothing(world):
    files = [path.read_bytes() for path in paths(world)]
    answered, refused, odd = [], [], []
    with service(str(world / "model.onnx"), folder=world / "drained") as one:
        late = one.raw(head(len(files[0])) + files[0][:50])

        def client(number: int) -> None:
            for turn in range(10_000):
                try:
                    found = one.ask("/predict", files[(number + turn) % len(files)])
                except OSError:  # turned away without a byte
                    refused.append(number)
                    return
                except Exception as error:  # half an answer
                    odd.append(error)
                    return
                (answered if found.status == 200 else odd).append(found)

        clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in clients:
            thread.start()
        while len(answered) < 40:
            time.sleep(0.01)
        one.process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join()
        assert one.process.poll() is None  # a request is still on its way
        late.sendall(files[0][50:])
        with contextlib.closing(late):
            text = b"".join(iter(lambda: late.recv(9999), b""))
        assert text.startswith(b"HTTP/1.1 200")
        assert text.count(b"HTTP/1.1") == 1
        assert b"connection: close" in text.lower()
        printed = one.ended()
    assert (odd, sorted(refused)) == ([], list(range(8)))
    assert printed == f"stopped: {len(answered) + 1} requests answered\n"


@pytest.mark.slow
def test_a_request_that_comes_as_its_connection_is_closed_is_answered_or_not_begun(world):
    """Idle connections are closed half a second after the signal; requests come from before that on until after it."""
    image = gray(9)
    with service(str(world / "model.onnx"), "--max-requests", "1000", folder=world / "closing") as one:
        connections = [one.raw(b"") for _ in range(300)]
        assert one.ask("/health").status == 200  # it was accepted last
        one.process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        answers = 0
        for connection in connections:
            time.sleep(0.0015)
            with contextlib.suppress(OSError):
                connection.sendall(head(len(image)) + image)
        for connection in connections:
            with contextlib.closing(connection), contextlib.suppress(ConnectionResetError):
                text = b"".join(iter(lambda one=connection: one.recv(9999), b""))
                assert text == b"" or (text.startswith(b"HTTP/1.1 200") and text.endswith(b"}]}"))
                answers += bool(text)
        assert one.ended() == f"stopped: {answers} requests answered\n"


def test_a_model_file_is_served_folded_and_ctrl_c_ends_it(world):
    from ulsam.deploy.predict import predict

    path = paths(world)[3]
    (expected,) = predict(world / "model.safetensors", [path])
    with service(str(world / "model.safetensors"), "--threads", "1", folder=world / "torch") as one:
        found = one.ask("/predict", path.read_bytes())
        assert shares(found.body["predictions"][0]) == pytest.approx(dict(expected.classes), abs=2e-5)
        assert one.stop(signal.SIGINT) == "stopped: 1 requests answered\n"


def test_the_page_and_all_that_it_names_come_from_the_service(served):
    page = served.ask("/docs").body
    named = re.findall(r"""(?:src|href|url)(?:=|: )['"]([^'"]+)""", page)
    assert len(named) == 4, named  # script, style, icon, and the interface's description
    for address in named:
        assert address.startswith("/") and not address.startswith("//")
        with contextlib.closing(served.connect()) as connection:
            connection.request("GET", address)
            found = connection.getresponse()
            assert (found.status, len(found.read()) > 1000) == (200, True)
    assert served.ask("/static-offline-docs/../core.py").status == 404


def test_the_root_leads_to_a_page_about_the_model(served):
    with contextlib.closing(served.connect()) as connection:
        connection.request("GET", "/")
        found = connection.getresponse()
        found.read()
    assert (found.status, found.headers["location"]) == (307, "docs")
    about = served.ask("/openapi.json").body["info"]
    assert about["title"] == "ulsam serve: model.onnx"
    assert r"the model model\.onnx." in about["description"]
    assert "3 classes: class0, class1, class2." in about["description"]
    assert "curl -F images=@bird.jpg 'http://HOST:PORT/predict?top=3'" in about["description"]


def test_a_service_with_a_key_does_not_list_its_classes():
    locked, free = (_about("a*b.onnx", ["x"] * 201, Limits(), locked=locked) for locked in (True, False))
    assert "classes" not in locked and 'curl -H "Authorization: Bearer KEY"' in locked
    assert free.endswith(" and 1 more.") and r"a\*b\.onnx" in free


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_shows_the_interface_and_asks_nobody_else(served):
    from playwright.sync_api import expect, sync_playwright

    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{served.port}/docs")
        for path in ("/predict", "/health", "/metrics"):
            expect(page.locator(f"[data-path='{path}']")).to_be_visible()
        browser.close()
    assert asked
    assert all(url.startswith((f"http://127.0.0.1:{served.port}/", "data:")) for url in asked), asked


def check_conforms(one: Service, examples: int) -> None:
    """Requests made from the OpenAPI page, and such as break it, get answers that the page names, and no 5xx."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{one.port}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert [operation.path for operation in operations] == ["/predict", "/health", "/metrics"]
    for operation in operations:
        requests = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode))

        @hypothesis.given(requests)
        @hypothesis.settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        def conforms(case):
            # what is no image is refused, though the schema cannot distinguish it from one
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        conforms()


@pytest.mark.slow
def test_requests_made_from_the_schema_get_answers_that_it_names(served):
    check_conforms(served, 15)


@pytest.mark.slow
def test_many_requests_made_from_the_schema_get_answers_that_it_names(served):
    before = served.metric("process_resident_memory_bytes")
    check_conforms(served, 1000)
    assert served.metric("process_resident_memory_bytes") - before < 40e6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0", "--port", "0"], "0.0.0.0 can be reached from elsewhere: set ULSAM_API_KEY"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid: "),
        (["--port", "99999"], "--port must be 0 to 65535, not 99999"),
        (["--max-batch", "1"], "the limit of batch must be 2 or more, not 1"),
        (["--max-pixels", "90000000"], "the limit of pixels must be 89000000 or less"),
        (["--timeout", "nan"], "the limit of timeout must be 0.1 or more, not nan"),
        (["--idle", "0"], "the limit of idle must be 1 or more, not 0"),
        (["--port", "0", "--threads", "0"], "--threads must be 1 or more, not 0"),
        (["--port", "0"], "no exported model missing.onnx"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["serve", "missing.onnx", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_taken_port_an_unfit_key_and_a_missing_package_are_reported(served, monkeypatch, capsys):
    assert main(["serve", "missing.onnx", "--port", str(served.port)]) == 2
    assert "address already in use" in capsys.readouterr().err.lower()
    monkeypatch.setenv("ULSAM_API_KEY", "two words")
    assert main(["serve", "missing.onnx"]) == 2
    assert "ULSAM_API_KEY must be ASCII" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "ulsam.apps.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "missing.onnx"]) == 2
    message = "ulsam: error: ulsam serve needs uvicorn, which is not installed: pip install 'ulsam[serve]'\n"
    assert capsys.readouterr().err == message
