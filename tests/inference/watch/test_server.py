"""The server of `watch`: what it refuses, that it only reads, its reports."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvit_train.cli.main import main
from fastvit_train.inference.watch.answers import PAGE
from fastvit_train.inference.watch.listing import RunList
from fastvit_train.inference.watch.server import HOST, WatchServer
from fastvit_train.runs.lock import HOLDER, RunLock
from tests.support import environment, one_line_error
from tests.support.watching import SECRET, append, ask, dead_process, epoch, listed


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:PORT"}, 200),
        ({"Origin": "http://127.0.0.1:PORT"}, 200),
        ({"Host": "localhost:PORT", "Origin": "http://localhost:PORT"}, 200),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:PORT"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": "127.0.0.1:PORT.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "https://127.0.0.1:PORT"}, 403),
        ({"Origin": "http://localhost:PORT"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
    ids=str,
)
def test_other_hosts_and_origins_are_refused(
    headers: dict[str, str], status: int, make_run: Callable[..., Path], server: WatchServer
) -> None:
    make_run("a")
    given = {name: value.replace("PORT", str(server.server_port)) for name, value in headers.items()}
    for path in ("/", "/api/runs", "/watch.js"):
        answer, text = ask(server, path, **given)
        assert answer.status == status
        if status == 403:
            assert server.url in text and "ssh -L" in text and "mc_vit" not in text


def test_no_request_without_a_host_is_answered(server: WatchServer) -> None:
    for request in (b"GET / HTTP/1.0\r\n\r\n", b"GET /\r\n\r\n"):
        with socket.create_connection((HOST, server.server_port)) as connection:
            connection.sendall(request)
            answer = connection.makefile("rb").read()
        assert b"only http://127.0.0.1" in answer and b"<html" not in answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "MAKE"])
def test_only_reading_is_allowed(method: str, server: WatchServer) -> None:
    for path in ("/", "/api/runs", "/report"):
        answer, text = ask(server, path, method)
        assert answer.status == 405 and answer.getheader("Allow") == "GET, HEAD" and "only reads" in text


def test_head_is_get_without_the_content(make_run: Callable[..., Path], server: WatchServer) -> None:
    make_run("a")
    for path in (*PAGE, "/api/runs"):
        with socket.create_connection((HOST, server.server_port)) as connection:
            connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: {HOST}:{server.server_port}\r\n".encode())
            connection.sendall(b"Connection: close\r\n\r\n")
            head, _, rest = connection.makefile("rb").read().decode().partition("\r\n\r\n")
        _, content = ask(server, path)
        assert head.startswith("HTTP/1.1 200 ") and rest == ""
        assert f"Content-Length: {len(content.encode())}\r\n" in head


def test_every_answer_has_the_headers_that_keep_others_out(make_run: Callable[..., Path], server: WatchServer) -> None:
    make_run("a")
    one = f"run={listed(server)['a']['id']}"
    paths = (
        *PAGE,
        "/api/runs",
        f"/api/curves?{one}",
        f"/api/comparison?{one}",
        f"/report?{one}",
        "/none",
        "/api/curves",
    )
    for answer in [
        *(ask(server, path)[0] for path in paths),
        ask(server, "/", "POST")[0],
        ask(server, "/", Host="x")[0],
    ]:
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("X-Frame-Options") == "DENY"
        assert answer.getheader("Referrer-Policy") == "no-referrer"
        assert answer.getheader("Cache-Control") == "no-store"
        policy = str(answer.getheader("Content-Security-Policy"))
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert ("connect-src 'self'" in policy) != ("sandbox allow-scripts;" in policy)
        assert "'unsafe-inline'" not in policy or "sandbox allow-scripts;" in policy


@pytest.mark.parametrize(
    "request_line", [b"\xff\xfe\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET " + b"x" * 70_000 + b"\r\n"]
)
def test_what_is_no_request_is_answered_with_a_line(request_line: bytes, server: WatchServer) -> None:
    with socket.create_connection((HOST, server.server_port)) as connection:
        connection.sendall(request_line)
        answer = connection.makefile("rb").read()
    assert b"<html" not in answer.lower() and b"Traceback" not in answer
    assert ask(server, "/")[0].status == 200


OUTSIDE = (
    *(
        "/../secret.txt",
        "/../../etc/passwd",
        "/..%2fsecret.txt",
        "/%2e%2e/secret.txt",
        "//secret.txt",
        "/a/metrics.jsonl",
    ),
    *(
        "/report?run=../secret.txt",
        "/report?run=..%2fsecret.txt",
        "/api/curves?run=a",
        "/report?run=%00",
        "/watch.css/..",
    ),
    *(
        "/report.html",
        "/runs/a",
        "/api/",
        "/watch.html",
        "/server.py",
        "/\\..\\secret.txt",
        "/?/../secret.txt",
    ),
)


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_path_leads_to_another_file(path: str, make_run: Callable[..., Path], server: WatchServer) -> None:
    make_run("a")
    answer, text = ask(server, path)
    assert answer.status == (200 if path.startswith("/?") else 404)
    assert SECRET not in text and "root:" not in text


def test_symbolic_links_out_of_the_folder_are_not_followed(
    make_run: Callable[..., Path], runs: Path, tmp_path: Path, server: WatchServer
) -> None:
    shutil.copytree(make_run("inside"), tmp_path / "outside")
    secret = tmp_path / "secret.jsonl"
    append(tmp_path, epoch(1, note=SECRET, train_loss=1.2345), name="secret.jsonl")
    (runs / "linked").symlink_to(tmp_path / "outside")
    (runs / "sweep").symlink_to(tmp_path)
    (runs / "alias").symlink_to(runs / "inside")
    for name in ("metrics.jsonl", "steps.jsonl", "summary.json", "config.yaml"):
        folder = make_run(f"link to {name}")
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    (make_run("report") / "report.html").symlink_to(tmp_path / "secret.txt")
    os.utime(tmp_path / "secret.txt", (4e9, 4e9))  # a report that is newer than the metrics is served
    found = listed(server)
    assert "linked" not in found and not any(name.startswith("sweep") for name in found)
    assert found["alias"]["state"] == found["inside"]["state"] == found["report"]["state"] == "finished"
    for name, run in found.items():
        if name.startswith("link to"):
            assert run["state"] == "damaged" and "symbolic link out of" in run["note"]
        for path in ("/report", "/api/curves", "/api/comparison"):
            _, text = ask(server, f"{path}?run={run['id']}")
            assert SECRET not in text and "1.2345" not in text


def test_a_report_that_is_current_is_served_in_a_sandbox_and_otherwise_one_is_made(
    make_run: Callable[..., Path], server: WatchServer
) -> None:
    folder = make_run("a <b>bold")
    address = f"/report?run={listed(server)['a <b>bold']['id']}"
    answer, text = ask(server, address)
    assert answer.status == 200 and "shows the run&#39;s files alone" in text and "Report on a &lt;b&gt;" in text
    assert "<b>bold" not in text and not (folder / "report.html").exists()
    (folder / "report.html").write_text("<p>written by report</p>")
    answer, text = ask(server, address)
    assert text == "<p>written by report</p>"
    assert str(answer.getheader("Content-Security-Policy")).startswith("sandbox allow-scripts; default-src 'none'")
    later = (folder / "report.html").stat().st_mtime_ns + 10**9
    append(folder, epoch(3))
    os.utime(folder / "metrics.jsonl", ns=(later, later))
    assert "Report on a &lt;b&gt;" in ask(server, address)[1]


def tree(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything in a folder: times, permissions and content."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mtime_ns, status.st_mode, path.read_bytes() if path.is_file() else b"")
    return found


def test_nothing_is_written(make_run: Callable[..., Path], runs: Path, server: WatchServer) -> None:
    lock = RunLock(make_run("training", finished=False))
    lock.acquire()
    make_run("finished")
    (make_run("killed", finished=False) / HOLDER).write_text(json.dumps(dead_process()))
    before = tree(runs)
    ids = [run["id"] for run in listed(server).values()]
    for path in (*PAGE, "/api/runs", *(f"{path}?run={one}" for path in ("/report", "/api/curves") for one in ids)):
        assert ask(server, path)[0].status == 200
    assert ask(server, f"/api/comparison?{'&'.join(f'run={one}' for one in ids)}")[0].status == 200
    assert tree(runs) == before
    lock.release()


def test_a_run_that_is_removed_meanwhile_is_not_found(
    make_run: Callable[..., Path], server: WatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run("a")
    address = f"/api/curves?run={listed(server)['a']['id']}"
    find = RunList.find

    def find_and_remove(self: RunList, ids: list[str]) -> Any:
        found = find(self, ids)
        (folder / "report.html").unlink()
        return [replace(run, folder=folder / "gone") for run in found]

    (folder / "report.html").touch()
    monkeypatch.setattr(RunList, "find", find_and_remove)
    assert ask(server, address)[0].status in (200, 404)
    assert ask(server, "/api/runs")[0].status == 200


def test_the_page_needs_no_other_site_and_makes_no_html_of_text(server: WatchServer) -> None:
    assert server.server_address[0] == HOST == "127.0.0.1"
    for path in PAGE:
        answer, text = ask(server, path)
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, path  # SVG's name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), path
        assert str(answer.getheader("Content-Type")).startswith(PAGE[path][2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], ["missing does not exist", "give the folder that holds the runs", "watch runs"]),
        (["a-file"], ["a-file is not a folder", "give the folder"]),
        (["runs/a"], ["runs/a is a run", "give the folder that holds it: watch ", "/runs"]),
        (["runs", "runs"], ["one folder"]),
        (["runs", "--port", "65536"], ["--port 65536 is out of range", "allowed: 1 to 65535, or 0"]),
        (["runs", "--port", "-1"], ["--port -1 is out of range"]),
        (["runs", "--port", "x"], ["--port", "'x'", "a whole number"]),
        (["runs", "--port", "USED"], ["--port USED is in use", "give another one", "or 0"]),
    ],
    ids=str,
)
def test_a_mistake_is_answered_with_one_line(
    arguments: list[str],
    words: list[str],
    make_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("a")
    (tmp_path / "a-file").touch()
    monkeypatch.chdir(tmp_path)
    with socket.create_server((HOST, 0)) as used:
        port = str(used.getsockname()[1])
        with pytest.raises(SystemExit) as stop:
            main(["watch", *(argument.replace("USED", port) for argument in arguments)])
    assert stop.value.code == 2
    line = one_line_error(capsys.readouterr().err)
    assert all(word.replace("USED", port) in line for word in words), line


@pytest.mark.slow
def test_ctrl_c_and_sigterm_end_it_at_once(runs: Path) -> None:
    command = [sys.executable, "-m", "fastvit_train", "watch", str(runs), "--port", "0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment(), **pipes) for _ in range(2)]
    for process, number, status in zip(processes, (signal.SIGINT, signal.SIGTERM), (130, 0), strict=True):
        line = process.stdout.readline()  # type: ignore[union-attr]
        port = re.fullmatch(rf"watching {re.escape(str(runs))} at http://127\.0\.0\.1:(\d+)/ .*\n", line)
        assert port, line
        connection = http.client.HTTPConnection(HOST, int(port[1]), timeout=60)
        connection.request("GET", "/")  # and the connection stays open, as a browser's does
        assert connection.getresponse().status == 200
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == status and out == "" and "Traceback" not in errors
        connection.close()
