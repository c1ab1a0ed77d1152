#!/usr/bin/env bash
# Make the environments .venv/main, .venv/rank and .venv/harness from the compiled requirement files.
# The build of torch and vLLM follows the machine: GPU where nvidia-smi lists one, else CPU (BUILD=cpu|gpu overrides).
# Run again, it does only what a changed requirement file asks for.
# With the argument `bench`: .venv/bench instead, the main environment's packages and those of `make bench`.
set -euo pipefail
cd "$(dirname "$0")/.."

build=${BUILD:-}
if [ -z "$build" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then build=gpu; else build=cpu; fi
fi
case $build in cpu|gpu) ;; *) echo "BUILD is '$build': cpu or gpu" >&2; exit 1 ;; esac

files=(requirements/{main,rank,harness}-$build.txt requirements/dev.txt)
[ "${1:-}" = bench ] && files=(requirements/main-$build.txt requirements/bench.txt)
stamp=.venv/${1:+$1-}installed-$({ echo "$build"; cat "${files[@]}"; } | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

if ! command -v g++ >/dev/null; then
  echo "No C++ compiler (g++) found: DeepSpeed and vLLM need one. On Debian or Ubuntu: apt-get install g++" >&2
  exit 1
fi
echo "Installing the $build build of ${1:-the three environments} into .venv (some GB; a few minutes the first time)"
uv=.venv/uv/bin/uv
[ -x $uv ] || { python3 -m venv .venv/uv && .venv/uv/bin/python -m pip install --quiet uv==0.13.9; }

options=()
if [ "$build" = cpu ]; then
  # A CPU torch comes from where pip is told to look (PIP_FIND_LINKS), else from PyTorch's own CPU index.
  export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
  [ -n "$UV_FIND_LINKS" ] || options+=(--torch-backend cpu)
fi
sync() {  # NAME REQUIREMENTS...
  local name=$1; shift
  [ -x ".venv/$name/bin/python" ] || $uv venv --quiet --python 3.11 ".venv/$name"
  $uv pip sync --quiet --compile-bytecode --python ".venv/$name" "${options[@]}" "$@"
}
if [ "${1:-}" = bench ]; then
  sync bench "${files[@]}"
else
  sync main requirements/main-$build.txt requirements/dev.txt
  sync rank requirements/rank-$build.txt
  sync harness requirements/harness-$build.txt
fi
rm -f .venv/${1:+$1-}installed-*
touch "$stamp"
echo "Installed: $(.venv/${1:-main}/bin/python -c 'import torch; print("torch", torch.__version__)'), $(du -sh .venv | cut -f1) in .venv"
