"""Command-line tools, run with `python -m stages.tools NAME`. Nothing in this folder can affect results."""
