"""SPPO (arXiv 2405.00675) from prompts to published tables: every module directly in this folder or in assets/ is a stage of
dvc.yaml; nothing in runtime/ or tools/ can change a number; everything else is imported by stages."""
