"""Digests of large files that were hashed before: reading 16 GB of weights takes half a minute, looking them up no time.

Each file's digest is kept in the scratch folder, with everything by which the operating system tells that the file has not
changed. As Git does for its index, a file that changed within the last seconds is hashed anew: a clock is too coarse to tell
two changes in a row from one. What cannot be read or written here is no error: the file is hashed.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from io import BufferedReader
from pathlib import Path
from typing import Any

from stages.runtime import durable, scratch

FOLDER = scratch.FOLDER / "hashes"
LARGE = 2**26
"""Files of at least this many bytes are looked up."""
SETTLED = 2.0
"""Seconds since a file's last change after which another change is sure to get another time: FAT's times are even seconds."""

State = list[int]
"""Device, inode, size in bytes, and the times of the last changes of content and of inode in nanoseconds."""


def digest_file(path: Path) -> bytes:
    """Return the BLAKE2b digest (16 bytes) of a file's content. Raises OSError if the file cannot be read."""
    with path.open("rb") as file:
        state, now = _state(file.fileno()), time.time_ns()
        if state[2] < LARGE:
            return hash_content(file)
        entry = FOLDER / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
        if known := _look_up(entry, state):
            return known
        digest = hash_content(file)
        if now - max(state[3:]) > SETTLED * 1e9:  # a change from now on gives it another state
            with contextlib.suppress(OSError):
                durable.write(entry, json.dumps({"state": state, "digest": digest.hex()}))
    return digest


def hash_content(file: BufferedReader) -> bytes:
    """Return the BLAKE2b digest (16 bytes) of an open file's content, which is read in any case."""
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def _state(handle: int) -> State:
    status = os.fstat(handle)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _look_up(entry: Path, state: State) -> bytes | None:
    """Return the digest that an entry holds for a file in this state; None if there is none, or if it cannot be read."""
    try:
        known = durable.read_json(entry, _check_entry)
    except OSError:
        return None
    return known[1] if known and known[0] == state else None


def _check_entry(value: Any) -> tuple[State, bytes]:
    """Return an entry's state and digest. Raises ValueError, KeyError or TypeError if it is not as `digest_file` writes it."""
    if not re.fullmatch("[0-9a-f]{32}", value["digest"]):
        raise ValueError("not a digest of 16 bytes")
    return value["state"], bytes.fromhex(value["digest"])
