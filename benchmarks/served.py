"""What HTTP costs: `ulsam serve` under load beside the same work in a loop, and its end under load.

The loop decodes, transforms and runs the images of a folder, read into memory before, 32 at a time (`ulsam.runtime`
or PyTorch, as the service does). It runs for half of the time before the service and half after it. Clients are threads
of this process with a connection each, which send one image after the other; the result holds their
processor time, because they share the machine with the service. At last the service is asked to stop while they send:
what it says it answered must be what they got. Nothing else may run.

    ulsam export mobilenetv2_100.grocery81_slim75 --out model.onnx
    python benchmarks/served.py grocery81 model.onnx grocery81/test
"""

import argparse
import http.client
import itertools
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ulsam.base.provenance import processor
from ulsam.data.folder import image_paths
from ulsam.deploy.classifier import Classifier, open_classifier
from ulsam.training.predict import predict

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result, results/served_NAME.json")
    parser.add_argument("model", help="an exported model, or a model file")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--most", type=int, default=1000, help="images that are read of the folder")
    parser.add_argument("--seconds", type=float, default=120, help="of the service, and of the loop")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compute a batch, in both")
    args = parser.parse_args()
    images = [Path(path).read_bytes() for path in image_paths([args.images])[: args.most]]
    model = open_classifier(args.model, threads=args.threads, folded=True)
    loop_rate(model, images, 1)
    before = loop_rate(model, images, args.seconds / 2)
    served = service(args.model, images, args.clients, args.threads, args.seconds)
    after = loop_rate(model, images, args.seconds / 2)
    loop = (before + after) / 2
    result = {
        "what": "images a second of ulsam serve and of the same work in a loop; seconds a request",
        "command": f"python benchmarks/served.py {args.name} MODEL IMAGES --most {args.most}"
        f" --seconds {args.seconds:g} --clients {args.clients} --threads {args.threads}",
        "targets": "share_of_the_loop >= 0.8, p99_over_median < 3, exit_status, lost, broken and not_200 all 0",
        "images": len(images),
        "bytes_median": statistics.median(map(len, images)),
        "threads": args.threads,
        "seconds": args.seconds,
        "loop": {"images_per_second": loop, "before": before, "after": after, "batch": BATCH},
        "served": served,
        "share_of_the_loop": served["images_per_second"] / loop,
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("uvicorn", "fastapi", "onnxruntime", "torch")},
        },
    }
    text = json.dumps(result, indent=1) + "\n"
    Path("results", f"served_{args.name}.json").write_text(text)
    print(text)


def loop_rate(model: Classifier, images: Sequence[bytes], seconds: float) -> float:
    """Images a second in this process."""
    start, count = time.perf_counter(), 0
    streams = map(BytesIO, itertools.cycle(images))
    for _ in predict(streams, model.logits, model.preprocessing, model.classes, top=3, batch=BATCH):
        count += 1
        if count % BATCH == 0 and time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


def service(model: str, images: Sequence[bytes], n_clients: int, threads: int, seconds: float) -> dict[str, Any]:
    """Start a service, send to it for so long, and stop it while it is sent to."""
    words = [sys.executable, "-m", "ulsam", "serve", model, "--port", "0", "--threads", str(threads)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit("the service did not start")
    port = int(line.split("http://127.0.0.1:")[1].split(",")[0])
    clients = [Client(port, images, number) for number in range(n_clients)]
    for client in clients:
        client.start()
    time.sleep(2)  # not measured
    first, used, start = metrics(port), cpu(), time.perf_counter()
    for client in clients:
        client.seconds = []
    time.sleep(seconds)
    taken = [value for client in clients for value in client.seconds]
    wall, last = time.perf_counter() - start, metrics(port)
    client_cpu = cpu() - used
    process.send_signal(signal.SIGTERM)
    for client in clients:
        client.join()
    printed, _ = process.communicate()
    said, answered = int(printed.split("stopped: ")[1].split()[0]), sum(client.answered for client in clients)
    median, p99 = np.quantile(taken, (0.5, 0.99))
    batches = last["ulsam_batch_images_count"] - first["ulsam_batch_images_count"]
    return {
        "clients": n_clients,
        "images_per_second": len(taken) / wall,
        "seconds_median": median,
        "seconds_p99": p99,
        "p99_over_median": p99 / median,
        "images_per_batch": (last["ulsam_batch_images_sum"] - first["ulsam_batch_images_sum"]) / batches,
        "client_cpu_seconds": client_cpu,
        "service_cpu_seconds": last["process_cpu_seconds_total"] - first["process_cpu_seconds_total"],
        "memory_bytes": [entry["process_resident_memory_bytes"] for entry in (first, last)],
        "stopped": {
            "exit_status": process.returncode,
            "answered_by_the_service": said,
            "answers_that_clients_got": answered,
            "lost": said - answered,
            "broken": sum(client.broken for client in clients),
            "not_200": sum(client.odd for client in clients),
        },
    }


class Client(threading.Thread):
    """Sends one image after the other on one connection, until nobody answers."""

    def __init__(self, port: int, images: Sequence[bytes], number: int) -> None:
        super().__init__()
        self.port, self.images = port, images[number:] + images[:number]
        self.seconds: list[float] = []
        self.answered = self.odd = self.broken = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        headers = {"Content-Type": "application/octet-stream"}
        for image in itertools.cycle(self.images):
            start = time.perf_counter()
            try:
                connection.request("POST", "/predict", image, headers)
                answer = connection.getresponse()
                answer.read()
            except OSError:  # nobody there any more
                break
            except http.client.HTTPException:  # half an answer
                self.broken += 1
                break
            self.seconds.append(time.perf_counter() - start)
            self.answered += 1
            self.odd += answer.status != 200
        connection.close()


def metrics(port: int) -> dict[str, float]:
    """What the service counts, without labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {name: float(value) for name, value in (line.split() for line in lines if line.count(" ") == 1)}


def cpu() -> float:
    """Processor seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
