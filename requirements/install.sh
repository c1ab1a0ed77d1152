#!/usr/bin/env bash
# Install the environments .venv/main, .venv/rank and .venv/harness from the compiled requirement files, checking every hash.
# With the argument `bench`: install .venv/bench instead, the main environment's packages plus those of `make bench`.
# The builds of torch and vLLM follow the machine: GPU if nvidia-smi lists one, else CPU (override with BUILD=cpu or BUILD=gpu).
# Does nothing when the environments already match the requirement files.
# Any python3 can install uv, which takes Python 3.11 from this machine or, if there is none, downloads it.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "requirements/install.sh: error: $1" >&2; exit 1; }

target=${1:-}
case $target in ''|bench) ;; *) echo "usage: requirements/install.sh [bench]" >&2; exit 1 ;; esac

build=${BUILD:-}
if [ -z "$build" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then build=gpu; else build=cpu; fi
fi
case $build in cpu|gpu) ;; *) fail "BUILD is '$build': set it to cpu or gpu, or unset it" ;; esac

if [ "$target" = bench ]; then
  files=(requirements/{main-"$build",bench,uv}.txt)
else
  files=(requirements/{main-"$build",rank-$build,harness-$build,dev,coverage,uv}.txt)
fi
shim=stages/engines/mkl_shim.c  # for portable numerics
stamp=.venv/${target:+$target-}installed-$({ echo "$build"; cat "${files[@]}" "$shim"; } | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

system=$(uname -s) machine=$(uname -m)
[ "$system" = Linux ] || fail "the packages are pinned for Linux, and this is $system: use a container, such as .devcontainer/"
command -v g++ >/dev/null ||
  fail "no C++ compiler (g++), which DeepSpeed and vLLM need: install it (Debian, Ubuntu: apt-get install g++)"
echo "Installing the $build build of ${target:-all three environments} into .venv (several GB; takes minutes the first time)"
uv=.venv/uv/bin/uv
if ! .venv/uv/bin/python -c '' 2>/dev/null; then
  python3 -m venv --clear .venv/uv >/dev/null 2>&1 ||
    fail "python3 is missing or cannot make virtual environments: install it with its module venv (Debian, Ubuntu: apt-get \
install python3-venv)"
fi
.venv/uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/uv.txt

options=()
if [ "$build" = cpu ]; then
  # The CPU build of torch comes from pip's find-links (PIP_FIND_LINKS) if set, else from PyTorch's CPU index: the same file,
  # as its hash proves.
  export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
  [ -n "$UV_FIND_LINKS" ] || options+=(--torch-backend cpu)
fi
sync() {  # NAME REQUIREMENTS...
  local name=$1; shift
  local output hint="see the lines above"
  if ! ".venv/$name/bin/python" -c '' 2>/dev/null; then  # missing, or made with a Python that has been removed
    rm -rf ".venv/$name"
    output=$($uv venv --quiet --python 3.11 ".venv/$name" 2>&1) ||
      fail "Python 3.11 is not installed, and uv cannot download it ($(echo $output)): install Python 3.11, from your \
distribution or python.org, or set UV_PYTHON_INSTALL_MIRROR to a mirror that this machine can reach"
  fi
  [ "$machine" = x86_64 ] || hint="the packages are pinned for x86_64, and some have no files for $machine"
  $uv pip sync --quiet --require-hashes --compile-bytecode --python ".venv/$name" "${options[@]}" "$@" ||
    fail "the packages of .venv/$name cannot be installed: $hint"
}
if [ "$target" = bench ]; then
  sync bench requirements/{main-"$build",bench}.txt
else
  sync main requirements/{main-"$build",dev}.txt
  sync rank requirements/{rank-"$build",coverage}.txt
  sync harness requirements/{harness-"$build",coverage}.txt
  g++ -x c -O2 -shared -fPIC -o .venv/mkl_shim.so.partial "$shim"
  mv .venv/mkl_shim.so.partial .venv/mkl_shim.so  # at once: a running stage may use the old one
fi
rm -f .venv/${target:+$target-}installed-*
touch "$stamp"
echo "Installed $(".venv/${target:-main}/bin/python" -c 'import torch; print("torch", torch.__version__)'); .venv takes $(du -sh .venv | cut -f1)"
