"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; and that these would notice.

``driver.cpp`` runs every entry of ``csrc/cpu/schedule.h`` for every schedule, dtype and kind of image on buffers of exact size; with
``exact/cpu/scratch.h`` so is what a job works in.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from vggfast import _C

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = ("avx512", "amx", "avx2", "baseline")  # slowest to compile first
COMMON = ("-std=c++17", "-g1")
OPTIMISED = {"amx": "-O1"}  # the emulated tiles; elsewhere -O0 saves more time in compiling than it costs in running
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)
AMX_CALLS = 3669  # of bfloat16, and of float32 what is done in pieces
ONLY_BASELINE = '#include "cpu/kernels.h"\nnamespace vggfast::cpu {\nconst Kernels kernels_avx2{"-"}, kernels_avx512{"-"}, kernels_amx{"-"}, kernels_amx_emulated{"-"};\n}\n'

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers' builds need g++: apt install g++")


def command(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stderr}"


def build(folder: Path, names: tuple[str, ...], flags: tuple[str, ...], csrc: Path = CSRC) -> dict[str, Path]:
    """Objects of ``names``: files of csrc/cpu, the driver, or "only_baseline" in place of the other instruction sets."""
    (folder / "only_baseline.cpp").write_text(ONLY_BASELINE)

    def compile_one(name: str) -> tuple[str, Path]:
        root = {"driver": HERE, "only_baseline": folder}.get(name, csrc / "cpu")
        target = folder / f"{name}.o"
        every = (*COMMON, OPTIMISED.get(name, "-O0"), *flags, f"-I{HERE / 'exact'}", f"-I{csrc}")
        command(["g++", *every, "-c", str(root / f"{name}.cpp"), "-o", str(target)])
        return name, target

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(compile_one, names))


def link(program: Path, objects: dict[str, Path], flags: tuple[str, ...]) -> Path:
    command(["g++", *flags, *map(str, objects.values()), "-o", str(program), "-lpthread"])
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without address randomisation where that can be had: the sanitizers of older compilers reserve fixed ranges."""
    fixed = ["setarch", "-R"]
    if shutil.which("setarch") is None or subprocess.run([*fixed, "true"], capture_output=True).returncode != 0:
        fixed = []
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}  # leak detection needs ptrace, which containers often forbid
    return subprocess.run([*fixed, program, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def address_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(
        tmp_path_factory.mktemp("address"),
        (*KERNELS, "driver", "schedule", "schedule_amx", "schedule_grad_weight", "isa"),
        ADDRESS,
    )


@pytest.fixture(scope="module")
def thread_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(
        tmp_path_factory.mktemp("thread"),
        ("baseline", "driver", "schedule", "schedule_amx", "schedule_grad_weight", "isa", "only_baseline"),
        THREAD,
    )


def test_no_access_outside_a_buffer_and_no_undefined_behaviour(
    address_objects: dict[str, Path], tmp_path: Path
) -> None:
    program = link(tmp_path / "driver", address_objects, ADDRESS)
    with ThreadPoolExecutor(2) as pool:
        for isa, done in zip(_C.cpu_isas(), pool.map(lambda isa: run(program, isa), _C.cpu_isas()), strict=True):
            assert done.returncode == 0, f"{isa}:\n{done.stdout}{done.stderr}"
            assert done.stdout == f"{isa}: {AMX_CALLS if isa.startswith('amx') else 7551} calls\n"


def test_no_data_race(thread_objects: dict[str, Path], tmp_path: Path) -> None:
    done = run(link(tmp_path / "driver", thread_objects, THREAD), "baseline", "few")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "baseline: 287 calls\n"


class Mutation(NamedTuple):
    file: str
    old: str
    new: str
    isa: str
    compiled: str  # the one source that sees the change
    report: str


MUTATIONS = {
    "whole vectors at the edge": Mutation(
        "image.inl",
        "return lanes == Vec::width ? Vec::load(p) : Vec::load_first(p, lanes);",
        "return lanes > 0 ? Vec::load(p) : Vec::zero();",
        "baseline",
        "baseline",
        "heap-buffer-overflow",
    ),
    "a mask one lane too wide": Mutation(
        "vec_avx2.h",
        "{_mm256_maskload_ps(p, first(n))}",
        "{_mm256_and_ps(_mm256_maskload_ps(p, first(n + 1)), _mm256_castsi256_ps(first(n)))}",
        "avx2",
        "avx2",
        "SEGV",
    ),
    "a workspace one float short": Mutation(
        "schedule.cpp",
        "return ceil_div(w.out, k.block) * 9 * x.c * k.block;",
        "return ceil_div(w.out, k.block) * 9 * x.c * k.block - 1;",
        "baseline",
        "schedule",
        "heap-buffer-overflow",
    ),
    "a job's memory one row short": Mutation(
        "schedule.cpp",
        "scratch((plan.band + 2) * (x.w + 2) * x.c + 3 * x.w * k.block + k.width));",
        "scratch((plan.band + 2) * (x.w + 2) * x.c + 2 * x.w * k.block + k.width));",
        "baseline",
        "schedule",
        "heap-buffer-overflow",
    ),
    "a tile stored past the last row": Mutation(
        "winograd.inl",
        "if (k + kLine * Vec::width <= out.c && h + height <= out.h && w + width <= out.w) {",
        "if (k + kLine * Vec::width <= out.c && h + height - 1 <= out.h && w + width <= out.w) {",
        "baseline",
        "baseline",
        "heap-buffer-overflow",
    ),
    "weights read past the last column": Mutation(
        "linear.inl",
        "w[s] = s < outs ? load_lanes(p, lanes) : Vec::zero();",
        "w[s] = s < outs ? Vec::load(p) : Vec::zero();",
        "baseline",
        "baseline",
        "heap-buffer-overflow",
    ),
    "AMX's results past the last channel": Mutation(
        "amx.inl",
        "store_lanes(b, to + Vec::width, lanes_from(k + Vec::width, out.c));",
        "b.store(to + Vec::width);",
        "amx_emulated",
        "amx",
        "heap-buffer-overflow",
    ),
    "tiles of 32 rows stored where fewer are": Mutation(
        "pieces.inl",
        "if (rows == 32) {",
        "if (rows >= 4) {",
        "amx_emulated",
        "amx",
        "heap-buffer-overflow",
    ),
    "threads that share a sum": Mutation(
        "schedule_grad_weight.cpp",
        "float* sum = sums + part * part_size;",
        "float* sum = sums;",
        "baseline",
        "schedule_grad_weight",
        "ThreadSanitizer: data race",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_reported(
    name: str, address_objects: dict[str, Path], thread_objects: dict[str, Path], tmp_path: Path
) -> None:
    mutation = MUTATIONS[name]
    if mutation.isa not in _C.cpu_isas():
        pytest.skip(f"plants a bug in code for {mutation.isa}, which this CPU does not run")
    threads = "ThreadSanitizer" in mutation.report
    objects, flags = (thread_objects, THREAD) if threads else (address_objects, ADDRESS)
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    file = csrc / "cpu" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file}: expected once: {mutation.old}"
    file.write_text(text.replace(mutation.old, mutation.new))
    mutated = build(tmp_path, (mutation.compiled,), flags, csrc)
    program = link(tmp_path / "mutant", {**objects, **mutated}, flags)
    done = run(program, mutation.isa, *(["few"] if threads else []))
    assert done.returncode not in (0, 2), f"not noticed, or only in the results: {done.stdout}"
    assert mutation.report in done.stderr, done.stderr
