#!/usr/bin/env bash
# The tests on 64-bit Arm without an Arm machine: the extension is cross-compiled, and an Arm Python with torch runs under qemu, some
# thirty times as slowly. Debian or Ubuntu on x86-64, as root, for what apt installs.
#   scripts/arm_check.sh WORK_DIR [pytest's arguments; without any, the kernels' own tests]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mkdir -p "$1" && cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- -k neon tests/test_ops.py tests/test_linear.py tests/test_threads.py
torch=2.10.0 # the oldest that runs, and for Arm a CPU build
python=python3.11

if [ ! -d "$work/system" ]; then
  apt-get install -y -q g++-aarch64-linux-gnu qemu-user
  dpkg --add-architecture arm64
  apt-get update -q
  mkdir -p "$work/debs"
  packages=(libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libcrypt1
    $python $python-minimal lib$python lib$python-minimal lib$python-stdlib lib$python-dev)
  (cd "$work/debs" && apt-get download "${packages[@]/%/:arm64}")
  for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/system.part"; done
  mv "$work/system.part" "$work/system"
fi

if [ ! -d "$work/packages" ]; then
  python3 -m venv "$work/tools"
  arm=(--platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 --python-version 311)
  # With what they need named: pip would ask this machine's architecture which of torch's requirements hold.
  "$work/tools/bin/pip" install -q --no-deps --only-binary=:all: "${arm[@]}" --target "$work/packages.part" \
    "torch==$torch" filelock typing-extensions sympy mpmath networkx jinja2 markupsafe fsspec numpy safetensors \
    pytest pluggy iniconfig packaging pygments pytest-benchmark py-cpuinfo hypothesis sortedcontainers
  "$work/tools/bin/pip" install -q pybind11 --target "$work/headers"
  mv "$work/packages.part" "$work/packages"
fi

copy=$work/vggfast # beside the extension for Arm; the checkout keeps its own
rm -rf "$copy" && mkdir -p "$copy/objects"
cp -r "$root/csrc" "$root/tests" "$root/benchmarks" "$root/pyproject.toml" "$copy"
mkdir "$copy/vggfast"
(cd "$root/vggfast" && tar cf - --exclude='*.so' --exclude=__pycache__ .) | tar xf - -C "$copy/vggfast"
flags=(-std=c++17 -O3 -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000 '-DVGGFAST_VERSION="arm check"'
  '-DVGGFAST_CUDA_ARCHS=""' "-I$copy/csrc" -isystem "$work/headers/pybind11/include" -isystem "$work/packages/torch/include"
  -isystem "$work/packages/torch/include/torch/csrc/api/include" -isystem "$work/system/usr/include/$python"
  -isystem "$work/system/usr/include")
printf '%s\n' "$copy"/csrc/ops.cpp "$copy"/csrc/cpu/*.cpp |
  xargs -P "$(nproc)" -I{} sh -c 'source=$1; shift; aarch64-linux-gnu-g++ "$@" -c "$source" -o "'"$copy"'/objects/$(basename "$source").o"' \
    sh {} "${flags[@]}"
aarch64-linux-gnu-g++ "$copy"/objects/*.o -shared -L"$work/packages/torch/lib" -Wl,--no-as-needed -ltorch_cpu -ltorch \
  -Wl,--as-needed -Wl,--allow-shlib-undefined -o "$copy/vggfast/_C.cpython-311-aarch64-linux-gnu.so"

cd "$copy" # pytest's plug-in of hypothesis and its rewriting of assertions take minutes under qemu
exec env PYTHONPATH="$copy:$work/packages" PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=2 qemu-aarch64 -cpu neoverse-n1 -L "$work/system" \
  "$work/system/usr/bin/$python" -m pytest -p no:cacheprovider -p no:hypothesispytest --assert=plain "$@"
