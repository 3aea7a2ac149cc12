"""The service decodes a bounded number of pixels at once, returns their memory, and ends without waiting."""

import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from serving import service
from tiny import TINY_MODEL
from ulsam.apps.service_readers import Readers
from ulsam.data.images import MAX_PIXELS, UnreadableImage, image_pixels
from ulsam.deploy.export import export
from ulsam.model.build import build, make_spec


def test_pixels_in_flight_are_bounded() -> None:
    readers = Readers(threads=6, pixels=100)
    lock, now, most = threading.Lock(), [0], [0]

    def decode(pixels: int) -> int:
        readers.take(pixels)
        with lock:
            now[0] += pixels
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= pixels
        readers.give_back(pixels)
        return pixels

    sizes = [10, 60, 100, 150, 1, 50] * 3
    futures = [readers.submit(decode, size) for size in sizes]
    assert [future.result(timeout=20) for future in futures] == sizes
    assert 100 <= most[0] <= 150  # the one that is larger was alone
    readers.close(5)


def test_an_error_goes_to_who_asked_and_the_thread_stays() -> None:
    readers = Readers(threads=1, pixels=1)
    with pytest.raises(ZeroDivisionError):
        readers.submit(divmod, 1, 0).result(timeout=20)
    assert readers.submit(divmod, 7, 2).result(timeout=20) == (3, 1)
    readers.close(5)


def test_what_is_given_up_before_its_turn_is_never_decoded() -> None:
    readers, go, called = Readers(threads=1, pixels=1), threading.Event(), []
    busy = readers.submit(go.wait, 20)
    while not busy.running():
        time.sleep(0.001)
    assert readers.submit(called.append, 1).cancel()
    go.set()
    readers.close(5)
    assert called == []


def test_a_decoder_that_never_ends_keeps_no_program_alive() -> None:
    code = (
        "from ulsam.apps.service_readers import Readers; import time; readers = Readers(2, 9); "
        "[readers.submit(time.sleep, 600) for _ in range(5)]; time.sleep(0.1); readers.close(0.1); print('closed')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed\n", "")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pixels_are_counted_by_the_header(format: str) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (300, 200)).save(stream, format)
    assert image_pixels(stream) == 60_000
    with pytest.raises(UnreadableImage, match="larger than 59999 pixels"):
        image_pixels(stream, max_pixels=59_999)
    with pytest.raises(UnreadableImage, match="empty file"):
        image_pixels(io.BytesIO(), max_pixels=MAX_PIXELS)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no size of a process to go by")
def test_large_images_of_many_clients_take_the_memory_of_one_and_return_it(tmp_path: Path) -> None:
    spec = make_spec(TINY_MODEL, ("a", "b"), size=32)
    export(build(spec)[0], tmp_path / "model.onnx", spec=spec)
    stream = io.BytesIO()
    Image.new("RGB", (5000, 4000), (9, 99, 7)).save(stream, "tiff", compression="tiff_deflate")
    statuses: list[int] = []
    with service(str(tmp_path / "model.onnx"), "--max-pixels", "20000000", folder=tmp_path / "here") as one:

        def client() -> None:
            statuses.append(one.ask("/predict", stream.getvalue(), {"Content-Type": "image/tiff"}).status)

        client()
        before = one.metric("process_resident_memory_bytes")
        threads = [threading.Thread(target=client) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        peak = int(Path(f"/proc/{one.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        assert statuses == [200] * 7
        assert peak - before < 320e6  # 16 bytes a pixel
        assert one.metric("process_resident_memory_bytes") - before < 40e6
