# make repro and make test do all the set-up on a fresh machine: Python 3.11, a C++ compiler, Git, and a package index.

SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/main/bin:$(PATH)

.PHONY: help env repro verify readme test test-all check torture bench clean

help:
	@echo "make env       install the three environments into .venv"
	@echo "make repro     run the miniature experiment, prompts to tables; again: only what changed"
	@echo "make verify    read every artifact: present, unharmed, of its schema, and the reports made again of them"
	@echo "make readme    copy tables into README.md and docs/, as a test wants them"
	@echo "make test      format, lint, types and all tests but the slowest"
	@echo "make test-all  the slowest tests too"
	@echo "make check     format, lint and types only"
	@echo "make torture   kill every stage twenty times and see what it costs: docs/torture.md, half an hour"
	@echo "make bench     measure the stages' speed against what people run today: benchmarks/results.md"
	@echo "make clean     remove unfinished work (scratch/, of recipes too); results and caches stay"

env:
	@requirements/install.sh

repro: env
	@python -m stages.timings start
	dvc repro
	@python -m stages.timings show
	@echo "Look at reports/alpaca_eval.md, reports/open_llm_leaderboard.md and the others beside them; plots: dvc plots show"

verify: env
	@python -m stages.verify

readme: env
	@python -m stages.readme

test: check
	pytest -m "not slowest" --durations=15

test-all: check
	pytest -m "" --durations=15

check: env
	ruff format --check stages tests benchmarks
	ruff check stages tests benchmarks
	mypy

clean:
	@found="$$(ls -d scratch recipes/*/scratch 2>/dev/null; \
		find {.,recipes/*}/{data,reports} -name '.*.partial' -prune 2>/dev/null)"; \
	if [ -z "$$found" ]; then echo "there is nothing to remove"; exit; fi; \
	freed=$$(du -shc $$found | tail -1 | cut -f1); rm -rf $$found; echo "removed $$freed:" $$found

torture: env
	PYTHONPATH=. python tests/torture.py

bench: env
	@requirements/install.sh bench
	python -m benchmarks
