"""The repository's documents and the commands in them."""

import re
from pathlib import Path

from stages.runtime.paths import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "data/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]


def commands(document: Path) -> list[str]:
    """Return the commands in a document's bash blocks, with their quotes and without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    return [re.sub(r"\s+#\s.*", "", line).strip() for block in blocks for line in block.splitlines() if line.strip()]


COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document)]
