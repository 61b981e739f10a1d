"""What nvcc makes of the kernels: no warnings, no spills, and the instructions that the design counts on.

The emulator cannot see these. Neither needs a GPU, only NVIDIA's compiler and, for the instructions, its disassembler.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_emulator_harness import CSRC, JOBS, KERNEL_SOURCES, WIDE_SOURCES, WIDE_TILES

ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas", "-Xptxas=-v")
REGISTER_FILE = 65536
# Fragments of 16x8 a warp holds, times the two mma steps of a stage: the mma instructions of an unrolled main loop.
MMA_PER_STAGE = {"m128n128": 4 * 8 * 2, "m256n64": 4 * 8 * 2, "m64n64": 2 * 4 * 2}
TILES = tuple(MMA_PER_STAGE)  # in the order of TileId


def package_folders(package: str) -> list[pathlib.Path]:
    spec = importlib.util.find_spec(package)
    return [pathlib.Path(folder) for folder in spec.submodule_search_locations or []] if spec else []


def find_tool(name: str) -> str | None:
    """``name`` from CUDA_HOME, PATH, NVIDIA's compiler wheels or triton, which ships the disassemblers."""
    folders = [pathlib.Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    folders += [folder / "cu13" / "bin" for folder in package_folders("nvidia")]
    folders += [folder / "backends" / "nvidia" / "bin" for folder in package_folders("triton")]
    on_path = shutil.which(name)
    return on_path or next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


@dataclasses.dataclass
class Kernel:
    """One kernel in one cubin, by its readable name."""

    name: str
    mangled: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    cubin: pathlib.Path

    @property
    def tile(self) -> str | None:
        number = re.search(r"TileIdE(\d)", self.mangled)
        return TILES[int(number.group(1))] if number else None


REPORT = re.compile(
    r"Compiling entry function '(?P<mangled>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_kernels(nvcc: str, architecture: str, folder: pathlib.Path) -> list[Kernel]:
    def compile_source(source: str) -> list[Kernel]:
        cubin = folder / f"{source.replace('/', '_')}_{architecture}.cubin"
        path = CSRC / "cuda" / f"{source}.cu"
        command = [nvcc, *FLAGS, f"-arch={architecture}", f"-I{CSRC}", "-cubin", str(path), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        kernels = []
        for entry in REPORT.finditer(done.stderr):
            mangled = entry["mangled"]
            numbers = [int(entry[name]) for name in ("registers", "stack", "stores", "loads")]
            kernels.append(Kernel(re.search(r"sm80\d\d(\w+?)_kernel", mangled)[1], mangled, *numbers, cubin))
        return kernels

    with ThreadPoolExecutor(JOBS) as pool:
        return [kernel for kernels in pool.map(compile_source, KERNEL_SOURCES) for kernel in kernels]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc in CUDA_HOME, on PATH or in NVIDIA's compiler wheels: machine code was not checked")
    return compile_kernels(nvcc, request.param, tmp_path_factory.mktemp("cubin"))


def test_every_instantiation_is_there(kernels: list[Kernel]) -> None:
    """3 tiles x 3 types forward, and masked or not for grad_input; two tiles for 16-bit grad_weight, one for fp32."""
    names = [kernel.name for kernel in kernels]
    counts = {"forward": 9, "grad_input": 18, "grad_weight": 5, "reduce_splits": 3, "first_layer": 3}
    counts |= {"max_pool2x2": 3, "grad_preact": 3}
    assert {name: names.count(name) for name in set(names)} == counts


def test_nothing_spills(kernels: list[Kernel]) -> None:
    spilling = [k.mangled for k in kernels if k.stack or k.spill_stores or k.spill_loads]
    assert spilling == []


def test_two_large_blocks_fit_an_sm(kernels: list[Kernel]) -> None:
    """128 threads each: the latency of one block's barrier is hidden by the other's products."""
    for kernel in kernels:
        blocks = 4 if kernel.name == "first_layer" or (kernel.tile == "m64n64" and kernel.name == "forward") else 2
        if kernel.tile or kernel.name == "first_layer":
            assert kernel.registers * 128 * blocks <= REGISTER_FILE, kernel.mangled


def disassemble(cuobjdump: str, cubin: pathlib.Path) -> dict[str, list[str]]:
    """Opcodes of every kernel's machine code, by mangled name."""
    environment = os.environ | {"PATH": f"{pathlib.Path(cuobjdump).parent}:{os.environ['PATH']}"}
    done = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True, env=environment)
    opcode = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    functions = done.stdout.split("Function : ")[1:]
    return {text.split(maxsplit=1)[0]: opcode.findall(text) for text in functions}


def test_the_main_loops_are_made_of_the_instructions_they_are_designed_for(kernels: list[Kernel]) -> None:
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump in CUDA_HOME, on PATH or in triton: instructions were not checked")
    code: dict[str, list[str]] = {}
    for cubin in {kernel.cubin for kernel in kernels}:
        code |= disassemble(cuobjdump, cubin)
    for kernel in kernels:
        opcodes = code[kernel.mangled]
        counts = {
            name: sum(op.split(".")[0] == name for op in opcodes) for name in ("HMMA", "LDSM", "LDGSTS", "LDL", "STL")
        }
        assert counts["LDL"] == counts["STL"] == 0, kernel.mangled
        if kernel.name == "first_layer":
            assert min(counts["HMMA"], counts["LDSM"]) > 0, kernel.mangled
        elif kernel.tile:
            assert counts["HMMA"] >= MMA_PER_STAGE[kernel.tile], kernel.mangled
            assert counts["LDGSTS"] > 0, kernel.mangled
            # Transposed fp32 operands cannot come through ldmatrix; grad_weight has nothing else.
            transposed_only = kernel.name == "grad_weight" and "TFloat32" in kernel.mangled
            assert transposed_only == (counts["LDSM"] == 0), kernel.mangled


def test_asm_and_launches_stay_where_they_belong() -> None:
    for path in sorted((CSRC / "cuda").rglob("*.*")):
        text = path.read_text()
        assert path.parent.name == "ptx" or not re.search(r"\basm\b", text), f"{path}: asm belongs in cuda/ptx"
        assert "<<<" not in text, f"{path}: launch through cuda/launch.cuh"
        assert "emulat" not in text.lower(), f"{path}: kernels do not know how they are tested"


# ---- The kernels of sm_90, for sm_90a alone.

# wgmma instructions of one stage: steps of 32 bytes, times slabs of 64 rows or taps of a filter row.
WGMMA_PER_STAGE = {
    "forward": {"m256n64": 8, "m256n128": 8, "m128n256": 4, "m128n128": 4},
    "grad_input": {"m256n64": 8, "m256n128": 8, "m128n256": 4, "m128n128": 4},
    "forward_patch": {"m256n64": 8, "m256n128": 8, "m128n128": 4},  # one tap, in a loop over nine
    "grad_input_patch": {"m256n64": 8, "m256n128": 8, "m128n128": 4},
    "grad_weight": {"m128n128": 12, "m128n64": 12, "m64n64": 6},
}


ELEMENTS = ("BFloat16", "Float16")
OTHER_KERNELS = [*(("finish_splits", element) for element in (*ELEMENTS, "TFloat32")), ("mirror_filters", "TFloat32")]


@dataclasses.dataclass
class WideKernel:
    kernel: Kernel
    warnings: str
    opcodes: list[str]

    @property
    def tile(self) -> str | None:
        number = re.search(r"WideTileE(\d)", self.kernel.mangled)
        return WIDE_TILES[int(number[1])] if number else None

    @property
    def element(self) -> str:
        return re.search(r"BFloat16|TFloat32|Float16", self.kernel.mangled)[0]


@pytest.fixture(scope="module")
def wide_kernels(tmp_path_factory: pytest.TempPathFactory) -> list[WideKernel]:
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        pytest.skip("no nvcc or no cuobjdump: the machine code of sm_90's kernels was not checked")
    folder = tmp_path_factory.mktemp("cubin_sm90")

    def compile_source(source: str) -> list[WideKernel]:
        cubin = folder / f"{source.replace('/', '_')}.cubin"
        path = CSRC / "cuda" / f"{source}.cu"
        target = "-gencode=arch=compute_90a,code=sm_90a"
        command = [nvcc, *FLAGS, "--expt-relaxed-constexpr", target, f"-I{CSRC}", "-cubin", str(path), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        code = disassemble(cuobjdump, cubin)
        kernels = []
        for entry in REPORT.finditer(done.stderr):
            numbers = [int(entry[name]) for name in ("registers", "stack", "stores", "loads")]
            kernel = Kernel(re.search(r"sm90\d\d(\w+?)_kernel", entry["mangled"])[1], entry["mangled"], *numbers, cubin)
            kernels.append(WideKernel(kernel, done.stderr, code[entry["mangled"]]))
        return kernels

    with ThreadPoolExecutor(JOBS) as pool:
        return [kernel for kernels in pool.map(compile_source, WIDE_SOURCES) for kernel in kernels]


def test_sm90_machine_code(wide_kernels: list[WideKernel]) -> None:
    """Tensor cores fed by the copy engine, no local memory, registers as the split between the warpgroups plans them."""
    others = [wide for wide in wide_kernels if wide.tile is None]
    assert sorted((wide.kernel.name, wide.element) for wide in others) == OTHER_KERNELS
    assert all(wide.kernel.stack == wide.kernel.spill_stores == 0 for wide in others)
    wide_kernels = [wide for wide in wide_kernels if wide.tile is not None]
    found = sorted((wide.kernel.name, wide.tile, wide.element) for wide in wide_kernels)
    assert found == sorted(
        (name, tile, element)
        for name, tiles in WGMMA_PER_STAGE.items()
        for tile in tiles
        for element in (*ELEMENTS, *(["TFloat32"] if name in ("forward", "grad_input") else []))
    )
    for wide in wide_kernels:
        kernel, label = wide.kernel, wide.kernel.mangled
        # ptxas says so when it has to serialise products, or ignores a register move.
        assert not re.search(r"C7\d\d\d|serializ|setmaxnreg ignored", wide.warnings), wide.warnings
        counts = {
            op: sum(code.split(".")[0] == op for code in wide.opcodes)
            for op in ("HGMMA", "UTMALDG", "USETMAXREG", "LDL", "STL", "HMMA")
        }
        assert counts["HGMMA"] == WGMMA_PER_STAGE[kernel.name][wide.tile], label
        products = {code for code in wide.opcodes if code.startswith("HGMMA")}
        assert all((".TF32" in code) == (wide.element == "TFloat32") for code in products), (label, products)
        assert counts["UTMALDG"] > 0, label
        assert counts["USETMAXREG"] == 2, label
        assert counts["LDL"] == counts["STL"] == counts["HMMA"] == kernel.stack == 0, label
        # 384 threads share 64 K registers, in units of 8: what setmaxnreg redistributes.
        assert kernel.registers == 65536 // 384 // 8 * 8, label
