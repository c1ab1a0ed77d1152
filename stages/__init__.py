"""SPPO (arXiv 2405.00675) from prompts to published tables: one module per stage of dvc.yaml."""

import gc
import os
import sys

from stages import processes

# Under DVC, or a launcher of several processes: before the imports that take seconds, in which either may be killed.
if os.environ.keys() & {"DVC_STAGE", "LOCAL_RANK"}:
    processes.end_with_launcher()

# Before torch loads OpenMP, whose threads else burn whole cores waiting for each other: several times slower where
# another process wants a core too, no faster where none does.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Progress bars, ours and the libraries', are for terminals; tqdm reads this when it is imported.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

# torch and vLLM make millions of lasting objects while they are imported: Python's default, a collection every 700 new
# ones, looks through them over and over and doubles the time of the import.
gc.set_threshold(100_000)
