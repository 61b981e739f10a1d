"""Builds vggfast._C with ninja: C++ for every instruction set, CUDA for every tensor-core GPU, against torch's stable ABI.

The metadata is in pyproject.toml. Environment: MAX_JOBS limits the compile jobs, CXX names the compiler (else g++ or clang++), CUDA_HOME a
CUDA toolkit to use in place of the compiler wheels, TORCH_CUDA_ARCH_LIST (as "8.0;9.0+PTX") the GPUs; VGGFAST_CUDA=0 leaves CUDA out,
VGGFAST_CUDA=1 makes a missing CUDA compiler an error. Whether a GPU or a CUDA build of torch is present makes no difference.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = "0.1.0"
TORCH_TARGET = "0x020a000000000000"  # run on torch 2.10 and everything newer


CUDA_ARCHS = "8.0+PTX;9.0"


def find_cxx() -> str:
    """The C++ compiler's command: CXX, or what is on PATH."""
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    if cxx is None:
        raise RuntimeError(
            "no C++ compiler: neither g++ nor clang++ is on PATH. Install one (apt install g++), or name it in CXX"
        )
    return cxx


def toolkit(nvcc: Path) -> Path:
    """The folder of include and lib, which nvcc knows: what is on PATH may be a script that calls the compiler."""
    told = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True)
    return Path(
        next(line for line in told.stderr.splitlines() if line.startswith("#$ TOP=")).removeprefix("#$ TOP=")
    ).resolve()


def find_nvcc() -> Path | None:
    """The CUDA compiler: CUDA_HOME's, the wheels' that pyproject.toml requires, or the one on PATH."""
    if os.environ.get("VGGFAST_CUDA") == "0":
        return None
    candidates = [Path(os.environ["CUDA_HOME"]) / "bin/nvcc"] if "CUDA_HOME" in os.environ else []
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations or [] if wheels else []:
        candidates.append(Path(folder) / "cu13/bin/nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    found = next((nvcc for nvcc in candidates if nvcc.is_file()), None)
    if found and cuda_archs():
        return found
    message = "no nvcc in CUDA_HOME, in NVIDIA's compiler wheels (see pyproject.toml) or on PATH"
    if found:
        message = "TORCH_CUDA_ARCH_LIST names no GPU of compute capability 8.0 or newer"
    if os.environ.get("VGGFAST_CUDA") == "1":
        raise RuntimeError(f"VGGFAST_CUDA=1, but {message}")
    print(f"vggfast: building without CUDA kernels: {message}")
    return None


def cuda_archs() -> list[str]:
    """The GPUs to compile for, as in TORCH_CUDA_ARCH_LIST: "8.0+PTX" is machine code for 8.0 and PTX for what comes later.

    Images with torch set that list for torch. What it names before 8.0 has no kernel here, nor would one compile.
    """
    named = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,") or CUDA_ARCHS)
    return [arch for arch in named if not re.match(r"[1-7]\.", arch)]


def gencode_flags() -> list[str]:
    flags = []
    for arch in cuda_archs():
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def hopper_flags() -> list[str]:
    """For csrc/cuda/sm90: wgmma and setmaxnreg exist in machine code for 9.0a alone, whatever else is compiled for."""
    return ["-gencode=arch=compute_90a,code=sm_90a"]


def sources(cuda: bool) -> list[Path]:
    found = [ROOT / "csrc/ops.cpp", *ROOT.glob("csrc/cpu/*.cpp")]
    if cuda:
        found += [*ROOT.glob("csrc/cuda/*.cpp"), *ROOT.glob("csrc/cuda/**/*.cu")]
    return sorted(found)


def compile_flags(nvcc: Path | None) -> list[str]:
    import pybind11
    from torch.utils.cpp_extension import include_paths

    system = [pybind11.get_include(), *include_paths(), sysconfig.get_paths()["include"]]
    cuda = ["-DVGGFAST_CUDA", "-DUSE_CUDA", f"-isystem {toolkit(nvcc) / 'include'}"] if nvcc else []
    return [
        *["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-unknown-pragmas"],
        # GCC 12 gives these for its own AVX-512 header; Clang does not know the first, unless told not to mind
        *["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-uninitialized"],
        *os.environ.get("CXXFLAGS", "").split(),
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f'-DVGGFAST_VERSION=\\"{VERSION}\\"',
        f'-DVGGFAST_CUDA_ARCHS=\\"{",".join(cuda_archs()) if nvcc else ""}\\"',
        f"-I{ROOT / 'csrc'}",
        *[f"-isystem {path}" for path in system],
        *cuda,
    ]


def nvcc_flags(gencode: list[str]) -> list[str]:
    host = "-fPIC,-fvisibility=hidden,-Wall"
    extra = os.environ.get("NVCC_FLAGS", "").split()
    return [
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        f"-Xcompiler={host}",
        f"-I{ROOT / 'csrc'}",
        *gencode,
        *extra,
    ]


def link_flags(nvcc: Path | None) -> list[str]:
    from torch.utils.cpp_extension import library_paths

    shared = ["-shared", *os.environ.get("LDFLAGS", "").split(), *[f"-L{path}" for path in library_paths()]]
    if sysconfig.get_platform().startswith("macosx"):  # Python's symbols are those of the program that loads this
        rpath = "-Wl,-rpath,@loader_path/../torch/lib"  # of the same site-packages
        return [*shared, "-ltorch_cpu", "-ltorch", "-undefined dynamic_lookup", rpath]
    # Named as needed libraries, torch's are found by name in the process that has imported torch: no path is written down.
    libraries = ["-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-Wl,--as-needed"]
    if nvcc:  # CUDA's runtime goes in statically: a machine without a GPU need not have it
        root = toolkit(nvcc)
        folders = [
            f"-L{folder}"
            for folder in (root / "lib", root / "lib64", *root.glob("targets/*-linux/lib"))
            if folder.is_dir()
        ]
        libraries += [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return [*shared, *libraries]


def ninja_file(output: Path, work: Path) -> str:
    """One rule a language, one edge a source file."""
    nvcc = find_nvcc()
    cxx = find_cxx()
    lines = [
        f"cxx = {cxx}",
        f"nvcc = {nvcc} -ccbin {cxx}",
        f"cxx_flags = {' '.join(compile_flags(nvcc))}",
        f"nvcc_flags = {' '.join(nvcc_flags(gencode_flags()))}",
        f"hopper_flags = {' '.join(nvcc_flags(hopper_flags()))}",
        f"link = {' '.join(link_flags(nvcc))}",
        "rule cpp\n command = $cxx $cxx_flags -MMD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
        "rule cu\n command = $nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
        "rule cu_hopper\n command = $nvcc $hopper_flags -MMD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
        "rule link\n command = $cxx $in $link -o $out",
    ]
    objects = []
    for source in sources(cuda=nvcc is not None):
        objects.append(work / source.relative_to(ROOT).with_suffix(source.suffix + ".o"))
        rule = "cu_hopper" if source.suffix == ".cu" and source.parent.name == "sm90" else source.suffix[1:]
        lines.append(f"build {objects[-1]}: {rule} {source}")
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
