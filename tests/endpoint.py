"""A stand-in for an OpenAI-compatible endpoint on 127.0.0.1, to fail as real ones do."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

Reply = Callable[[int, str], tuple[int, Any]]
"""The number of the request, from 0, and the prompt -> the HTTP status and the answer, as JSON value or as text."""


@dataclass
class Endpoint:
    reply: Reply
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)


def chosen(first: float | None) -> tuple[int, Any]:
    """A chat completion in which m, the first output, has this probability and M the rest; None: neither is there."""
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
def serve(reply: Reply) -> Iterator[Endpoint]:
    """Answer POST requests by `reply` until the block ends."""
    endpoint, lock = Endpoint(reply), Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(endpoint.requests)
                endpoint.requests.append(request)
                endpoint.keys.add(self.headers["authorization"])
            status, answer = endpoint.reply(number, request["messages"][-1]["content"])
            body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.send_header("retry-after-ms", "1")  # the client waits as long as it is told: not to wait in tests
            self.end_headers()
            with suppress(ConnectionError):  # the client was killed
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
