"""A model's folder hashed for the second time, as a stage does that may resume, against hashing its bytes: seconds.

Ours looks the digests of unchanged large files up; the baseline reads every file, from the disk's cache in memory. The folder
has 1 GiB in four files: the ratio grows with its size.
"""

import functools
import hashlib
import os
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Comparison, compare_times, report, time_in_turn
from stages.artifacts import files
from stages.runtime import hashes

FILES, FILE_BYTES = 4, 2**28


def write_model(folder: Path, size: int) -> None:
    """Write FILES files of `size` bytes each."""
    folder.mkdir()
    for index in range(FILES):
        (folder / f"model-{index}.safetensors").write_bytes(os.urandom(size))


def hash_bytes(folder: Path) -> str:
    """Run the baseline: hash the bytes of all files."""
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "blake2b").digest())
    return total.hexdigest()


def compare(folder: Path, size: int) -> Comparison:
    """Compare both sides on a folder that is written here. Digests are kept in the scratch folder."""
    write_model(folder, size)
    time.sleep(hashes.SETTLED + 1)  # until a digest is kept
    files.digest(folder)
    seconds = time_in_turn({"ours": functools.partial(files.digest, folder), "baseline": functools.partial(hash_bytes, folder)})
    subject = "seconds the second time, against hashing all bytes"
    return compare_times(subject, f"{FILES * size / 2**30:.2g} GiB", seconds["ours"], seconds["baseline"], ">= 100")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # the scratch folder lies there too
        report([compare(Path(name, "model"), FILE_BYTES)])


if __name__ == "__main__":
    main()
