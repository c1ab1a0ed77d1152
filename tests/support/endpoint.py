"""A stand-in for an OpenAI-compatible endpoint on 127.0.0.1 that can fail as real ones do."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from support import servers

Reply = Callable[[int, str], tuple[int, Any]]
"""The number of the request, from 0, and the prompt -> the HTTP status and the answer, a JSON value or text."""


class Handler(BaseHTTPRequestHandler):
    server: "Endpoint"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        number = self.server.record(request, self.headers["authorization"])
        status, answer = self.server.reply(number, request["messages"][-1]["content"])
        body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.send_header("retry-after-ms", "1")  # the client honours this, so that tests do not wait
        self.end_headers()
        with suppress(ConnectionError):  # the client was killed
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Endpoint(ThreadingHTTPServer):
    """Answers POST requests by `reply` and keeps what it was sent."""

    def __init__(self, reply: Reply, headers: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.headers = headers
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self._lock = Lock()

    def record(self, request: dict[str, Any], key: str) -> int:
        """Keep a request and its authorization header. Returns its number, from 0."""
        with self._lock:
            self.requests.append(request)
            self.keys.add(key)
            return len(self.requests) - 1


def chosen(first: float | None) -> tuple[int, Any]:
    """Make a chat completion in which m, the first output, has this probability and M the rest; None: neither is likely."""
    if first is None:
        likely = {"The": -0.1, "Both": -3.0}
    else:
        likely = {name: math.log(p) for name, p in (("m", first), ("M", 1 - first)) if p > 0}
    entries = [{"token": token, "logprob": value, "bytes": None} for token, value in likely.items()]
    text = entries[0]["token"]
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": text},
                "logprobs": {"content": [{**entries[0], "top_logprobs": entries}]},
            }
        ],
        "usage": {"prompt_tokens": 399, "completion_tokens": 1, "total_tokens": 400},
    }


@contextmanager
def serve(reply: Reply, headers: dict[str, str] | None = None) -> Iterator[Endpoint]:
    """Run an endpoint within the block. headers: those of its answers."""
    endpoint = Endpoint(reply, headers or {"content-type": "application/json"})
    with servers.running(endpoint):
        yield endpoint
