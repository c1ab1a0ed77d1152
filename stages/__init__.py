"""SPPO (arXiv 2405.00675) from prompts to published tables: one module per stage of dvc.yaml."""
