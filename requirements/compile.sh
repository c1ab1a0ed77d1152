#!/usr/bin/env bash
# Compile every requirements/*.in into the exact versions, with hashes, that `make env` installs.
# Versions in the current *.txt files are kept where the *.in files allow them; to move them, pass uv's options:
# requirements/compile.sh --upgrade-package pandas (or --upgrade).
# The CPU files need a CPU build of torch: from find-links (UV_FIND_LINKS or PIP_FIND_LINKS) where set, else from PyTorch's
# CPU index. A find-links folder must hold the official wheel: its hash becomes the required one.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-uv}
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
cpu=(); [ -n "$UV_FIND_LINKS" ] || cpu=(--torch-backend cpu)
options=(--quiet --no-header --generate-hashes --python-version 3.11 "$@")
compile() { "$uv" pip compile "${options[@]}" "$@"; }
for environment in main rank harness; do
  source=$environment.in; [ -f "$environment-cpu.in" ] && source=$environment-cpu.in
  compile "$source" shared.in --override cpu-overrides.txt "${cpu[@]}" --output-file "$environment-cpu.txt"
  source=$environment.in; [ -f "$environment-gpu.in" ] && source=$environment-gpu.in
  UV_FIND_LINKS="" compile "$source" shared.in --python-platform x86_64-manylinux_2_28 --output-file "$environment-gpu.txt"
done
compile coverage.in --output-file coverage.txt
compile dev.in --constraint main-cpu.txt --override cpu-overrides.txt --override dev-overrides.txt "${cpu[@]}" \
  --output-file dev.txt
compile lint.in --constraint dev.txt --output-file lint.txt
compile dvc.in --constraint main-cpu.txt --output-file dvc.txt
compile bench.in --no-deps --output-file bench.txt
compile uv.in --output-file uv.txt
