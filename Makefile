# `make repro` and `make test` do all set-up on a fresh machine with Python 3, a C++ compiler, Git and a package index.

# Every path below is relative to the folder of this file.
ifneq ($(strip $(MAKEFILE_LIST)),Makefile)
$(error this Makefile works in its own folder only: use `make -C FOLDER TARGET`)
endif

SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/main/bin:$(PATH)
unexport PYTHONSAFEPATH  # with it, `python -m stages` would not find the stages in this folder

.PHONY: help env repro base status verify sync attest seeds test test-all check coverage mutants torture bench gpu-check clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

env:  ## install the three environments into .venv
	@requirements/install.sh

repro: env data/models/base  ## run the miniature experiment, from prompts to tables; a second run computes only what changed
	@python -m stages.tools timings start
	SPPO_PROGRESS=1 dvc repro
	@python -m stages.tools timings show
	@python -m stages.tools drift
	@echo "See reports/index.html, or reports/*.md; plots: dvc plots show"

data/models/base: | env
	@dvc pull --quiet --remote miniature assets-policy assets-ranker || \
	echo "data/remote lacks the base policy or the ranker named in dvc.lock: both are trained here"

base: env  ## train the miniature's base policy and ranker here, which `make repro` otherwise takes from data/remote
	dvc repro --force assets-policy assets-ranker

status: env  ## list the stages that `make repro` would run
	@dvc repro --quiet code  # a stage sees a change of its code only through the fingerprints that `code` writes
	@dvc repro --dry

verify: env  ## check that every artifact exists, matches its hash and schema, and reproduces the reports
	@python -m stages.tools verify

sync: env  ## update generated files: tables in README.md and docs/, plots in dvc.yaml, recipes/*/dvc.yaml
	@python -m stages.tools sync

attest: env  ## record this machine and the results of this run in reproductions/NAME.json
	@python -m stages.tools attest

seeds: env  ## measure the noise between runs: run the miniature with five seeds, and write reports/seeds.md (an hour)
	@python -m stages.tools seeds

test: check  ## run format, lint and type checks and all but the slowest tests
	pytest -m "not slowest" --durations=40

test-all: check  ## run the slowest tests as well, with more examples per property test
	SPPO_FUZZ=150 pytest -m "" --hypothesis-profile=full --durations=40

check: env  ## run the format, lint and type checks only
	ruff format --check stages tests benchmarks gpu_check
	ruff check stages tests benchmarks gpu_check
	mypy

coverage: env  ## measure which code `make test` runs, in all processes and environments
	@rm -rf scratch/coverage && mkdir -p scratch/coverage
	@coverage run -m pytest -m "not slowest"; status=$$?; \
	coverage combine --quiet && coverage html --quiet && coverage report && echo "Line by line: scratch/coverage/html/index.html"; \
	exit $$status

mutants: env  ## mutation tests: change the meaning of the code in one place at a time, and write docs/mutants.md
	PYTHONPATH=.:tests python -m support.mutants

torture: env  ## stress-test resume: kill every stage 20 times, cut the power, try odd input, and write docs/torture.md (some hours)
	PYTHONPATH=.:tests python -m support.torture

bench: env  ## compare the stages' speed with the usual implementations, and write benchmarks/results.md (half an hour)
	@requirements/install.sh bench
	python -m benchmarks

gpu-check: env  ## check the GPU code on this machine's NVIDIA GPU, and write docs/gpu/DEVICE.md (at most 8 minutes)
	python -m gpu_check

# Names may contain spaces: they are kept apart by NUL bytes, and quoted. A recipe that is a link is another repository's, and
# of links only data and reports themselves are followed, which may be on another disk.
clean:  ## list and remove unfinished work: scratch/ and partial files, also in recipes/; results and caches stay
	@mapfile -d '' folders < <( \
		find ./data ./reports -maxdepth 0 -print0 2>/dev/null; \
		find ./recipes -mindepth 2 -maxdepth 2 '(' -name data -o -name reports ')' -print0 2>/dev/null); \
	mapfile -d '' found < <( \
		find ./scratch -maxdepth 0 -print0 2>/dev/null; \
		find ./recipes -mindepth 2 -maxdepth 2 -name scratch -print0 2>/dev/null; \
		[ "$${#folders[@]}" = 0 ] || find -H "$${folders[@]}" -name '.*.partial' -prune -print0 2>/dev/null); \
	if [ "$${#found[@]}" = 0 ]; then echo "Nothing to remove"; exit; fi; \
	echo "Removing:"; \
	du -shc -- "$${found[@]}"; \
	rm -rf -- "$${found[@]}"
