#!/usr/bin/env bash
# The extension for macOS on Apple silicon without a Mac: compiled by Clang (of the ziglang package, which brings Apple's headers) and
# linked with the libraries of torch's wheel, as setup.py does it there. Whether it runs, only a Mac can tell.
#   scripts/macos_check.sh WORK_DIR
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mkdir -p "$1" && cd "$1" && pwd)
torch=2.13.0

if [ ! -d "$work/torch" ]; then
  python3 -m venv "$work/tools"
  "$work/tools/bin/pip" install -q ziglang ninja pybind11 "setuptools>=77" "torch==$torch" numpy
  "$work/tools/bin/pip" install -q --no-deps --only-binary=:all: --platform macosx_11_0_arm64 --platform macosx_14_0_arm64 \
    --target "$work/torch.part" "torch==$torch"
  mv "$work/torch.part/torch" "$work/torch"
fi

copy=$work/vggfast
rm -rf "$copy" && mkdir -p "$copy"
(cd "$root" && git ls-files -z setup.py pyproject.toml README.md LICENSE csrc vggfast | xargs -0 tar cf -) | tar xf - -C "$copy"
cd "$copy"
# The folder of the Mac's libraries goes before this system's.
export _PYTHON_HOST_PLATFORM=macosx-11.0-arm64 VGGFAST_CUDA=0 CXX="$work/tools/bin/python -m ziglang c++ -target aarch64-macos"
LDFLAGS="-L$work/torch/lib" "$work/tools/bin/python" setup.py -q build_ext --build-lib "$work/built" --build-temp "$work/temp" \
  >"$work/build.log" 2>&1 || { tail -n 20 "$work/build.log"; exit 1; }
echo "compiled and linked"
