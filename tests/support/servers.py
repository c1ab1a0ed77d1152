"""Run the stand-ins for servers, support.endpoint and support.hub, in a thread of the test's process."""

import contextlib
import threading
from collections.abc import Iterator
from socketserver import BaseServer

POLL = 0.01
"""Seconds after which a server notices that it is to end, and for which a test waits in the end."""


@contextlib.contextmanager
def running(server: BaseServer) -> Iterator[None]:
    """Serve within the block, then close the server."""
    thread = threading.Thread(target=server.serve_forever, args=(POLL,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
