"""A small stand-in for the Hugging Face Hub: the routes that huggingface_hub requests, over HTTP on this machine."""

import contextlib
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

from stages.runtime.paths import ROOT

Response = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""

NOBODY = "http://127.0.0.1:9"
"""An endpoint at which no Hub answers."""


class FakeHub:
    """The contents of a Hub and what it was asked for.

    repos: "models/ID" or "datasets/ID" -> {file name: bytes}. requested: the paths of all requests. keys: the Authorization
    headers that came with them. respond: path -> response; a test may replace it.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requested: list[str] = []
        self.keys: set[str] = set()
        self.endpoint = ""
        self.respond: Callable[[str], Response] = self.serve_path

    def commit(self, repo: str) -> str:
        """Return the only commit of a repository."""
        return hashlib.sha1(repo.encode()).hexdigest()

    def serve_path(self, path: str) -> Response:
        """Return the response to a GET."""
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path):
            return self._describe_repo(f"{match[1]}/{match[2]}", match[2], match[3] or "")
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._serve_file(f"{'datasets' if match[1] else 'models'}/{match[2]}", match[3], match[4])
        return 404, {}, b""

    def _describe_repo(self, key: str, repo: str, route: str) -> Response:
        if key not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision = re.match("/(?:revision|tree)/([^/]+)", route)
        if revision and revision[1] not in (self.commit(key), "main"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.repos[key]
        if route.startswith("/tree/"):
            body: object = [describe_file(name, data) for name, data in files.items()]
        else:
            siblings = [{"rfilename": name} for name in files]
            body = {"id": repo, "sha": self.commit(key), "siblings": siblings, "private": False, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()

    def _serve_file(self, key: str, revision: str, name: str) -> Response:
        data = self.repos.get(key, {}).get(name) if revision == self.commit(key) else None
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha256(data).hexdigest() if is_large(name) else hash_blob(data)
        return 200, {"X-Repo-Commit": revision, "ETag": f'"{etag}"'}, data


def describe_file(name: str, data: bytes) -> dict[str, object]:
    """Return a file's entry in the listing of a repository."""
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": hash_blob(data)}
    if is_large(name):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def is_large(name: str) -> bool:
    """Return whether the Hub stores a file in Git LFS, which names it by its SHA-256."""
    return name.endswith(".safetensors")


def hash_blob(data: bytes) -> str:
    """Return the SHA-1 by which Git names a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Server(ThreadingHTTPServer):
    def __init__(self, hub: FakeHub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requested.append(path)
        hub.keys.add(self.headers["authorization"] or "")
        status, headers, body = hub.respond(path)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    """Serve an empty Hub, whose address is its `endpoint`."""
    hub = FakeHub()
    server = Server(hub)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run_python(
    folder: Path, *arguments: str, endpoint: str = NOBODY, python: str = sys.executable
) -> "subprocess.CompletedProcess[str]":
    """Run Python with `arguments` in a folder that holds the Hub cache, empty at first. endpoint: the Hub's address."""
    settings = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
    return subprocess.run([python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
