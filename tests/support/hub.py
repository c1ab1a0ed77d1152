"""A small stand-in for the Hugging Face Hub: the routes that huggingface_hub requests, over HTTP on this machine."""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ruamel.yaml import YAML

from stages.runtime.paths import ROOT
from support import servers, stage_client, stage_server

Response = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""

NOBODY = "http://127.0.0.1:9"
"""An endpoint at which no Hub answers."""
TOKEN = "hf_secret"
"""The access token that may write."""
LICENSES = {"apache-2.0", "mit", "llama3", "gemma"}
"""Some of the licences that the Hub accepts in a card."""


class FakeHub:
    """The contents of a Hub and what it was asked for.

    repos: "models/ID" or "datasets/ID" -> {file name: bytes}. requested: the paths of all requests. keys: the Authorization
    headers that came with them. respond: path -> response to a GET; a test may replace it. objects: SHA-256 -> content of the
    large files that were uploaded. refuse: SHA-256 of a large file -> whether to refuse its upload; a test may replace it.
    commits: the operations of each commit.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requested: list[str] = []
        self.keys: set[str] = set()
        self.endpoint = ""
        self.respond: Callable[[str], Response] = self.serve_path
        self.objects: dict[str, bytes] = {}
        self.refuse: Callable[[str], bool] = lambda oid: False
        self.commits: list[list[dict[str, Any]]] = []

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

    def receive(self, path: str, body: bytes, key: str) -> Response:
        """Return the response to a POST or PUT, and do what it asks for. key: its Authorization header."""
        if match := re.fullmatch("/lfs/([0-9a-f]{64})", path):  # as at the Hub, the address itself is the permission
            return self._store_object(match[1], body)
        if path == "/api/validate-yaml":
            return validate_card(json.loads(body)["content"])
        if key != f"Bearer {TOKEN}":
            return 401, {}, b"{}"
        if path == "/api/repos/create":
            return self._create_repo(json.loads(body))
        if match := re.fullmatch("/api/models/([^/]+/[^/]+)/preupload/main", path):
            return reply({"files": [self._choose_mode(match[1], entry["path"]) for entry in json.loads(body)["files"]]})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return reply({"transfer": "basic", "objects": [self._offer(entry) for entry in json.loads(body)["objects"]]})
        if match := re.fullmatch("/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        return 404, {}, b""

    def _create_repo(self, asked: dict[str, Any]) -> Response:
        repo = f"{asked['organization']}/{asked['name']}"
        exists = f"models/{repo}" in self.repos
        self.repos.setdefault(f"models/{repo}", {})
        return reply({"url": f"{self.endpoint}/{repo}"}, 409 if exists else 200)

    def _choose_mode(self, repo: str, name: str) -> dict[str, Any]:
        data = self.repos[f"models/{repo}"].get(name)
        oid = None if data is None or is_large(name) else hash_blob(data)
        return {"path": name, "uploadMode": "lfs" if is_large(name) else "regular", "shouldIgnore": False, "oid": oid}

    def _offer(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Say where to upload a large file, or nothing if it is here."""
        actions = {"upload": {"href": f"{self.endpoint}/lfs/{entry['oid']}"}}
        return {key: entry[key] for key in ("oid", "size")} | ({} if entry["oid"] in self.objects else {"actions": actions})

    def _store_object(self, oid: str, body: bytes) -> Response:
        if self.refuse(oid) or hashlib.sha256(body).hexdigest() != oid:
            return 403, {}, b"refused"
        self.objects[oid] = body
        return 200, {}, b""

    def _commit(self, repo: str, operations: list[dict[str, Any]]) -> Response:
        files = dict(self.repos[f"models/{repo}"])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        self.repos[f"models/{repo}"] = files
        self.commits.append(operations)
        oid = self.commit(f"models/{repo}")
        return reply({"commitUrl": f"{self.endpoint}/{repo}/commit/{oid}", "commitOid": oid})


def reply(body: object, status: int = 200) -> Response:
    """Return a response of JSON."""
    return status, {"Content-Type": "application/json"}, json.dumps(body).encode()


def validate_card(text: str) -> Response:
    """Return the response to a card whose metadata is to be checked: 400 unless its licence is one of LICENSES."""
    metadata = YAML(typ="safe").load(text.split("---\n")[1])
    known = metadata.get("license") in LICENSES
    errors = [] if known else [{"message": '"license" must be one of ' + ", ".join(sorted(LICENSES))}]
    return reply({"errors": errors, "warnings": []}, 200 if known else 400)


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

    def do_POST(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requested.append(path)
        body = self.rfile.read(int(self.headers["content-length"]))
        status, headers, content = hub.receive(path, body, self.headers["authorization"] or "")
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    """Serve an empty Hub, whose address is its `endpoint`."""
    hub = FakeHub()
    server = Server(hub)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    with servers.running(server):
        yield hub


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run_python(
    folder: Path, *arguments: str, endpoint: str = NOBODY, python: str = sys.executable, token: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run Python with `arguments` in a folder that holds the Hub cache, empty at first.

    endpoint: the Hub's address. token: the access token to use there; none by default.
    """
    settings = {"HF_TOKEN": token} if token else {}
    settings |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    before, others = (without_hub(variables) for variables in (stage_server.ENVIRONMENT, os.environ))
    environment = others | settings
    if arguments[0] == "-m" and python == sys.executable and stage_client.is_served(arguments[1], before, others):
        return stage_server.run(arguments[1], folder, [*arguments[2:]], environment, route=stage_server.HUB)
    return subprocess.run([python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def without_hub(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out the Hub's variables, which no library reads that the servers of stage_server.HUB import."""
    return {name: value for name, value in environment.items() if not name.startswith("HF_")}
