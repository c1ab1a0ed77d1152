"""Where the repository is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository's root: the folder of stages/, requirements/ and .venv."""
