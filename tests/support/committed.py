"""The results that are committed. Those in the working tree may be of another run: on a machine whose results differ, or of an
experiment."""

import subprocess

from stages.runtime.paths import ROOT


def read_committed(name: str) -> str:
    """Return the text of a file of the repository at HEAD or, before there is one, in the working tree. name: its path."""
    done = subprocess.run(["git", "show", f"HEAD:./{name}"], cwd=ROOT, capture_output=True, check=False)
    return (ROOT / name).read_text(encoding="utf-8") if done.returncode else done.stdout.decode()
