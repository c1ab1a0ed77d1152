#!/usr/bin/env bash
# Pack the GPU check for a machine without a package index: gpu_check/pack.sh FOLDER
# Makes FOLDER/part-1, part-2, .. of at most 64 MB each: the committed code, run.sh, and wheels for Python 3.12 on Linux x86-64.
# The machine itself must have Python 3.12 with torch, transformers and accelerate.
# Needs Git, a package index, and a Python whose pip makes DeepSpeed's wheel (PYTHON, by default python3).
set -euo pipefail

[ $# = 1 ] || { echo "usage: gpu_check/pack.sh FOLDER" >&2; exit 1; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
[ -z "$(ls -A "$folder")" ] || { echo "gpu_check/pack.sh: error: $folder is not empty: name a new folder" >&2; exit 1; }
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=$((64 * 1000 * 1000))

platforms=()
for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
mkdir "$folder/wheels"
while read -r name; do
  case $name in ''|'#'*) continue ;; esac
  pinned=$(grep -io "^$name==[^ ]*" requirements/main-gpu.txt) ||
    { echo "gpu_check/pack.sh: error: requirements/main-gpu.txt does not have $name: correct gpu_check/packages.txt" >&2; exit 1; }
  if [ "$name" = deepspeed ]; then  # a source package; without its compiled operations, its wheel fits any Python
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" "$pinned"
  else
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      "${platforms[@]}" --dest "$folder/wheels" "$pinned"
  fi
done < gpu_check/packages.txt

number=1 size=0
mkdir "$folder/part-1"
git archive --format=tar.gz --output "$folder/part-1/code.tar.gz" HEAD \
  stages benchmarks gpu_check params.yaml dvc.yaml requirements
cp gpu_check/run.sh "$folder/part-1/"
size=$(stat -c %s "$folder/part-1/code.tar.gz")
for wheel in "$folder"/wheels/*.whl; do
  bytes=$(stat -c %s "$wheel")
  if [ $((size + bytes)) -gt $limit ]; then
    number=$((number + 1)) size=0
    mkdir "$folder/part-$number"
  fi
  size=$((size + bytes))
  [ $bytes -le $limit ] || echo "gpu_check/pack.sh: warning: $(basename "$wheel") alone has more than 64 MB" >&2
  mv "$wheel" "$folder/part-$number/"
done
rmdir "$folder/wheels"
du -sh "$folder"/part-*
echo "Carry these folders to the machine, then run there: bash part-1/run.sh part-*"
