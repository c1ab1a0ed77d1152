"""Tools for people, run with `python -m stages.tools NAME`. Nothing in this folder can change a number."""
