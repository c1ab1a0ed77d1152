"""A small Hub: the routes that huggingface_hub asks, over HTTP on this machine."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]


class FakeHub:
    """repos: "models/ID" or "datasets/ID" -> {file name: bytes}; asked: the paths that were asked for; keys: the
    Authorization headers that came with them."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.keys: set[str] = set()
        self.endpoint = ""

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET."""
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path):
            key, rest = f"{found[1]}/{found[2]}", found[3] or ""
            if key not in self.repos:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            files = self.repos[key]
            if (at := re.match("/(?:revision|tree)/([^/]+)", rest)) and at[1] != self.commit(key):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if rest.startswith("/tree/"):
                body: object = [
                    {"type": "file", "path": name, "size": len(data), "oid": self.blob(data)} | self.lfs(name, data)
                    for name, data in files.items()
                ]
            else:
                siblings = [{"rfilename": name} for name in files]
                body = {"id": found[2], "sha": self.commit(key), "siblings": siblings, "private": False, "tags": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            key = f"{'datasets' if found[1] else 'models'}/{found[2]}"
            data = self.repos.get(key, {}).get(found[4]) if found[3] == self.commit(key) else None
            if data is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            headers = {"X-Repo-Commit": self.commit(key), "ETag": f'"{self.etag(found[4], data)}"'}
            return 200, headers, data
        return 404, {}, b""

    def etag(self, name: str, data: bytes) -> str:
        return hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else self.blob(data)

    def blob(self, data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def lfs(self, name: str, data: bytes) -> dict[str, object]:
        oid = hashlib.sha256(data).hexdigest()
        return {"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}} if name.endswith(".safetensors") else {}


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            fake.asked.append(path)
            fake.keys.add(self.headers["authorization"] or "")
            status, headers, body = fake.answer(path)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run Python in tmp_path with an empty Hub cache there; endpoint: a Hub, by default one that nobody answers at."""

    def run(
        *arguments: str, endpoint: str = "http://127.0.0.1:9", python: str = sys.executable
    ) -> subprocess.CompletedProcess[str]:
        settings = {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
        return subprocess.run([python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run
