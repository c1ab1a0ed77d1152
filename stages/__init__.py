"""SPPO (arXiv 2405.00675) from prompts to published tables: one module per stage of dvc.yaml."""

import os

# Before torch loads OpenMP, whose threads else burn whole cores waiting for each other: several times slower where
# another process wants a core too, no faster where none does.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
