#!/usr/bin/env bash
# Compile every requirements/*.in into the exact versions that `make env` installs.
# The CPU files need a CPU torch: from find-links (UV_FIND_LINKS) where there is one, else from PyTorch's CPU index.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-uv}
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
cpu=(); [ -n "$UV_FIND_LINKS" ] || cpu=(--torch-backend cpu)
compile() { "$uv" pip compile --quiet --no-header --python-version 3.11 "$@"; }
for environment in main rank harness; do
  source=$environment.in; [ -f "$environment-cpu.in" ] && source=$environment-cpu.in
  compile "$source" --override cpu-overrides.txt "${cpu[@]}" --output-file "$environment-cpu.txt"
  source=$environment.in; [ -f "$environment-gpu.in" ] && source=$environment-gpu.in
  UV_FIND_LINKS="" compile "$source" --python-platform x86_64-manylinux_2_28 --output-file "$environment-gpu.txt"
done
compile dev.in --constraint main-cpu.txt --override cpu-overrides.txt "${cpu[@]}" --output-file dev.txt
compile bench.in --no-deps --output-file bench.txt
