"""Builds vggfast._C with ninja: C++ for every instruction set, against torch's stable ABI.

The metadata is in pyproject.toml. Environment: MAX_JOBS limits the compile jobs, CXX names the compiler.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = "0.1.0"
TORCH_TARGET = "0x020a000000000000"  # run on torch 2.10 and everything newer


def sources() -> list[Path]:
    return sorted([ROOT / "csrc/ops.cpp", *ROOT.glob("csrc/cpu/*.cpp")])


def compile_flags() -> list[str]:
    import pybind11
    from torch.utils.cpp_extension import include_paths

    includes = [str(ROOT / "csrc"), *include_paths(), pybind11.get_include(), sysconfig.get_paths()["include"]]
    return [
        *["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-unknown-pragmas"],
        "-Wno-maybe-uninitialized",  # gcc 12 gives it for its own AVX-512 header
        *os.environ.get("CXXFLAGS", "").split(),
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f'-DVGGFAST_VERSION=\\"{VERSION}\\"',
        '-DVGGFAST_CUDA_ARCHS=\\"\\"',
        *[f"-I{path}" if "csrc" in path else f"-isystem {path}" for path in includes],
    ]


def link_flags() -> list[str]:
    from torch.utils.cpp_extension import library_paths

    # Named as needed libraries, torch's are found by name in the process that has imported torch: no path is written down.
    libraries = ["-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-Wl,--as-needed"]
    return ["-shared", *os.environ.get("LDFLAGS", "").split(), *[f"-L{path}" for path in library_paths()], *libraries]


def ninja_file(output: Path, work: Path) -> str:
    """One compile rule, one link rule, one edge a source file."""
    cxx = os.environ.get("CXX", "g++")
    lines = [
        f"cxx = {cxx}",
        f"flags = {' '.join(compile_flags())}",
        f"link = {' '.join(link_flags())}",
        "rule compile\n command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
        "rule link\n command = $cxx $in $link -o $out",
    ]
    objects = []
    for source in sources():
        objects.append(work / source.relative_to(ROOT).with_suffix(".o"))
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {output}: link {' '.join(map(str, objects))}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output, work = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(output, work))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["ninja", "-C", str(work), "-j", jobs], check=True)


setup(version=VERSION, ext_modules=[Extension("vggfast._C", [])], cmdclass={"build_ext": NinjaBuild})
