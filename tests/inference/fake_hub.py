"""A fake Hugging Face Hub on this machine, with the endpoints that huggingface_hub uses to push and load a model."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants, file_download

TOKEN = "hf_test"
LFS = (".safetensors", ".png")
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class FakeHub:
    """The requests that it received and the files that it holds."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """large files, by SHA-256"""
    verified: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of each request, in order"""
    failing: dict[str, int] = field(default_factory=dict)
    """path pattern to HTTP status: requests that match fail with this status"""


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens on 127.0.0.1 until the end of the block."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub use `hub` instead of the real one, with a cache in the folder `cache` and no token."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # read from HF_ENDPOINT when it is imported
    for module in (constants, file_download):  # up to version 1.0, the latter has a copy
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = self.path.partition("?")[0]
        body = self._body()
        self.hub.requests.append((self.command, path))
        for pattern, status in self.hub.failing.items():
            if re.search(pattern, path):
                return self._answer(status, {"error": f"no {pattern} today"})
        if not path.startswith("/storage/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        for method, pattern, action in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return action(self, body, *match.groups())
        return self._answer(404, {"error": f"the fake hub has no {self.command} {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        name = f"{request['organization']}/{request['name']}"
        private = request.get("private") or request.get("visibility") == "private"
        known = name in self.hub.repos
        self.hub.repos.setdefault(name, Repo(private))
        self._answer(409 if known else 200, {"url": f"{self.hub.url}/{name}"})

    def info(self, body: bytes, name: str) -> None:
        if name not in self.hub.repos:
            return self._answer(404, {"error": "no such repo"}, {"X-Error-Code": "RepoNotFound"})
        repo = self.hub.repos[name]
        siblings = [{"rfilename": path} for path in repo.files]
        return self._answer(200, {"id": name, "private": repo.private, "sha": COMMIT, "siblings": siblings})

    def validate(self, body: bytes) -> None:
        front = json.loads(body)["content"].split("---\n")[1]
        yaml.safe_load(front)
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular"}
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {
                **{key: file[key] for key in ("oid", "size")},
                "actions": {
                    "upload": {"href": f"{self.hub.url}/storage/{file['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify/{file['oid']}"},
                },
            }
            for file in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        self.hub.objects[oid] = body
        self._answer(200)

    def verify(self, body: bytes, oid: str) -> None:
        content = self.hub.objects[oid]
        whole = hashlib.sha256(content).hexdigest() == oid and json.loads(body)["size"] == len(content)
        self.hub.verified |= {oid} if whole else set()
        self._answer(200 if whole else 400)

    def commit(self, body: bytes, name: str) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.repos[name].files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repos[name].files[value["path"]] = self.hub.objects[value["oid"]]
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def resolve(self, body: bytes, name: str, file: str) -> None:
        content = self.hub.repos[name].files.get(file)
        if content is None:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": etag})


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("GET",), f"/api/models/{REPO}(?:/revision/main)?", _Handler.info),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("POST",), f"/api/models/{REPO}/preupload/main", _Handler.preupload),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/storage/(.*)", _Handler.store),
    (("POST",), "/verify/(.*)", _Handler.verify),
    (("POST",), f"/api/models/{REPO}/commit/main", _Handler.commit),
    (("GET", "HEAD"), f"/{REPO}/resolve/[^/]+/(.*)", _Handler.resolve),
]
