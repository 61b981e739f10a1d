"""64-bit Arm's kernels on any machine: cross-compiled, emulated, and their machine code read.

An Arm machine runs all other tests on these kernels, as x86-64 does on its own; here it is what can be shown without one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
DRIVER = HERE.parent / "cpu_sanitizers/driver.cpp"
PREFIX = "aarch64-linux-gnu-"
MISSING = [tool for tool in (f"{PREFIX}g++", f"{PREFIX}objdump", "qemu-aarch64") if shutil.which(tool) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"without {', '.join(MISSING)}: apt install g++-aarch64-linux-gnu qemu-user"
)


def output_of(*arguments: object) -> str:
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
    return done.stdout


def compile_cpp(source: Path, target: Path, *flags: str, csrc: Path = CSRC) -> Path:
    warnings = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Werror")
    output_of(f"{PREFIX}g++", "-std=c++17", *warnings, f"-I{csrc}", *flags, source, "-o", target)
    return target


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as setup.py compiles them."""
    return compile_cpp(CSRC / "cpu/neon.cpp", tmp_path_factory.mktemp("neon") / "neon.o", "-O3", "-fPIC", "-c")


def test_every_schedule_agrees_with_the_direct_kernel_and_stays_in_its_buffers(neon: Path, tmp_path: Path) -> None:
    objects = [neon, compile_cpp(DRIVER, tmp_path / "driver.o", "-O1", "-c")]
    for name in ("schedule", "schedule_amx", "schedule_grad_weight", "isa", "baseline"):
        objects.append(compile_cpp(CSRC / f"cpu/{name}.cpp", tmp_path / f"{name}.o", "-O1", "-c"))
    program = tmp_path / "driver"
    output_of(f"{PREFIX}g++", "-static", *objects, "-o", program, "-lpthread")
    assert output_of("qemu-aarch64", program, "neon") == "neon: 7551 calls\n"


def run_vec(tmp_path: Path, csrc: Path = CSRC) -> subprocess.CompletedProcess[str]:
    # The expected values are rounded after each operation.
    program = compile_cpp(HERE / "vec.cpp", tmp_path / "vec", "-O2", "-ffp-contract=off", "-static", csrc=csrc)
    return subprocess.run(["qemu-aarch64", program], capture_output=True, text=True)


def test_operations_on_vectors(tmp_path: Path) -> None:
    done = run_vec(tmp_path)
    assert (done.returncode, done.stdout) == (0, "all agree\n"), done.stdout + done.stderr


MUTATIONS = {
    "a pool that loses NaN": ("vorrq_u32(vcgtq_f32(a.reg, b.reg), vmvnq_u32(vceqq_f32(a.reg, a.reg)))", "vcgtq_f32(a.reg, b.reg)"),
    "a ReLU of -0 that is +0": ("vbslq_f32(vcltq_f32(v.reg, floor.reg), floor.reg, v.reg)", "vmaxq_f32(floor.reg, v.reg)"),
    "gates that NaN shuts": ("vmvnq_u32(vclezq_f32(v.reg))", "vcgtzq_f32(v.reg)"),
    "halves that are rounded down": ("vshrq_n_u32(u, 16), vdupq_n_u32(1)", "vshrq_n_u32(u, 16), vdupq_n_u32(0)"),
    "NaN that becomes infinity": ("vbslq_u32(vceqq_f32(reg, reg), even, vdupq_n_u32(0x7fc00000))", "even"),
    "an argmax of the next channel": ("{0, -2, -4, -6}", "{-2, -4, -6, 0}"),
    "half a transposition": ("v[1].reg = low(b, d), v[2].reg = high(a, c)", "v[2].reg = low(b, d), v[1].reg = high(a, c)"),
    "a product that is rounded": ("vfmaq_f32(c.reg, a.reg, b.reg)", "vaddq_f32(c.reg, vmulq_f32(a.reg, b.reg))"),
    "a lane too many": ("i < 4 && i < n; ++i) p[i]", "i < 4 && i <= n; ++i) p[i]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_noticed(name: str, tmp_path: Path) -> None:
    old, new = MUTATIONS[name]
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    file = csrc / "cpu/vec_neon.h"
    assert file.read_text().count(old) == 1, f"expected once: {old}"
    file.write_text(file.read_text().replace(old, new))
    done = run_vec(tmp_path, csrc)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "expected" in done.stdout


def longest_loop(function: str) -> list[str]:
    """Of a function in objdump's listing: the instructions of the loop that has the most multiply-adds."""
    lines = re.findall(r"^ *([0-9a-f]+):\s+(.*)$", function, re.MULTILINE)
    place = {address: i for i, (address, _) in enumerate(lines)}
    bodies: list[list[str]] = [[]]
    for i, (_, instruction) in enumerate(lines):
        jump = re.match(r"(?:b\.\w+|cbn?z\s+\w+,)\s+([0-9a-f]+)", instruction)
        if jump and place.get(jump[1], i) < i:
            bodies.append([text for _, text in lines[place[jump[1]] : i + 1]])
    return max(bodies, key=lambda body: sum("fmla" in text for text in body))


@pytest.mark.parametrize("vecs", [2, 4])
def test_sums_of_winograds_products_stay_in_registers(neon: Path, vecs: int) -> None:
    """Six rows of four vectors, or of the two of half a block, and four steps: multiply-adds, beside few other instructions and
    none that use the stack."""
    listing = output_of(f"{PREFIX}objdump", "-d", "--no-show-raw-insn", neon)
    functions = [
        f
        for f in re.split(r"\n(?=[0-9a-f]+ <)", listing)
        if f"multiply_rows_in_stepsILi6ELi{vecs}E" in f.splitlines()[0]
    ]
    # Forward, forward that adds, both with and without asking for U, and the gradient of the filters.
    assert len(functions) == 5
    for function in functions:
        body = longest_loop(function)
        assert sum("fmla" in text for text in body) == 24 * vecs
        assert not [text for text in body if "[sp" in text]
        assert len(body) - 24 * vecs <= 69
