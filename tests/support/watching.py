"""The server of `watch` in a thread of the test, folders of runs to list, and requests."""

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from fastvit_train.inference.watch.listing import RunList
from fastvit_train.inference.watch.server import HOST, WatchServer

SECRET = "what no page may show"
SUMMARY = {
    "model": "mc_vit_4_4_32",
    "dataset": "digits",
    "evaluated_on": "test",
    "recipe": "quickstart",
    "epochs": 2,
    "test_loss": 1.5,
    "test_accuracy": 0.5,
    "best_test_accuracy": 0.5,
    "train_seconds": 2.0,
    "device": "cpu",
    "images_per_second": 1000.0,
    "mixed_precision": "no",
    "parameters": 10,
    "model_size_mb": 0.1,
    "steps": 8,
}


@contextmanager
def serving(root: Path) -> Iterator[WatchServer]:
    """Serve the page about the runs in `root` inside the context."""
    with WatchServer(RunList(root), 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def epoch(number: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    row = {"epoch": number, "step": 4 * number, "train_loss": 2.0 / number, "test_loss": 2.1 / number, "seconds": 1.5}
    return {**row, "test_accuracy": 0.25, "images_per_second": 900.0, "peak_memory_mib": 100.0, **values}


def append(folder: Path, *rows: dict[str, Any], name: str = "metrics.jsonl") -> None:
    with (folder / name).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def ask(server: WatchServer, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
    """The answer to a request and its text; `_` in the names of headers stands for `-`."""
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=60)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def listed(server: WatchServer) -> dict[str, dict[str, Any]]:
    """The runs that the page lists, by name, in its order."""
    answer, text = ask(server, "/api/runs")
    assert answer.status == 200, text
    return {run["name"]: run for run in json.loads(text)["runs"]}


def dead_process() -> dict[str, object]:
    """What names the holder of a lock that has ended without releasing it."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = psutil.Process(process.pid).create_time()
    return {"pid": process.pid, "host": socket.gethostname(), "started": started}
