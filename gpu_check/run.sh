#!/usr/bin/env bash
# Install what is missing from folders of wheels, without an index, and run the GPU check: gpu_check/run.sh [PART..]
# PART: the folders that gpu_check/pack.sh made. Nothing is installed outside a temporary folder; what the machine's Python
# (PYTHON, by default python3) has is used as it is. The table is written to gpu-check.md in this folder, or to OUT.
# Options of `python -m gpu_check` in ARGS, for example ARGS=--rehearsal.
set -euo pipefail

python=${PYTHON:-python3}
out=$(realpath "${OUT:-gpu-check.md}")
here=$(cd "$(dirname "$0")" && pwd)
parts=()
for part in "$@"; do parts+=("$(cd "$part" && pwd)"); done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

code=$(dirname "$here")
if [ -e "$here/code.tar.gz" ]; then
  code=$work/code
  mkdir "$code"
  tar -xzf "$here/code.tar.gz" -C "$code"
fi
cd "$code"
missing=$("$python" - gpu_check/packages.txt <<'PYTHON'
import sys
from importlib import metadata

for line in open(sys.argv[1], encoding="utf-8"):
    name = line.strip()
    if name and not name.startswith("#"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            print(name)
PYTHON
)
if [ -n "$missing" ]; then
  echo "Installing into a temporary folder: ${missing//$'\n'/ }"
  links=()
  for part in "${parts[@]}"; do links+=(--find-links "$part"); done
  # shellcheck disable=SC2086 # one word for each package
  "$python" -m pip install --quiet --no-index --no-deps --no-cache-dir "${links[@]}" --target "$work/site" $missing
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
# shellcheck disable=SC2086 # several options
PYTHONUNBUFFERED=1 "$python" -m gpu_check --out "$out" ${ARGS:-}
