"""The emulator's own tests: it accepts a correct kernel and catches every planted bug, whatever the schedule."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from cuda_emulator_harness import (
    CSRC,
    HERE,
    KERNEL_FLAGS,
    Emulator,
    EmulatorError,
    build_runtime,
    compile_object,
    link,
)

# In the order of planted.cpp's enum, what the message must say.
BUGS = {
    "missing_barrier": "shared memory: (race: another thread wrote it since the last barrier|in flight|uninitialised)",
    "missing_wait": "in flight: an asynchronous copy into it was not waited for",
    "early_refill": "race: another thread reads it since|another thread wrote it since|in flight",
    "skipped_barrier": "deadlock: 63 threads wait at a barrier, 0 in a warp operation, 1 have ended",
    "diverged_warp": r"deadlock: .* 1 of 32 lanes arrived at shfl",
    "global_read_out_of_bounds": "read of 4 bytes of global memory: out of bounds",
    "global_write_out_of_bounds": "write of 4 bytes of global memory: out of bounds",
    "shared_out_of_bounds": "read of 4 bytes of shared memory: out of bounds",
    "uninitialised_shared": "shared memory: uninitialised",
    "uninitialised_global": "global memory: (uninitialised|race: written by another thread)",
    "two_writers": "write of 4 bytes of global memory: race",
    "write_to_input": "global memory: read-only",
    "misaligned_vector": "misaligned",
    "unwaited_copy": "asynchronous copies it never waited for",
    "wild_pointer": "unallocated memory: out of bounds",
}
WITHOUT_LINE = ("skipped_barrier", "diverged_warp", "unwaited_copy")
NUMBERS = {name: number for number, name in enumerate(("none", *BUGS))}
THREADS = 64


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The emulator with planted.cpp in place of the project's kernels."""
    folder = tmp_path_factory.mktemp("planted")
    objects = build_runtime(folder, interface=False)
    compile_object(HERE / "planted.cpp", folder / "planted.o", CSRC, KERNEL_FLAGS)
    return link([*objects, folder / "planted.o"], folder / "planted.so")


def run(planted: Emulator, bug: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    planted.reset(seed)
    x = torch.arange(2 * THREADS, dtype=torch.float32)
    out = planted.allocate(THREADS, torch.float32)
    function = planted.library.emu_planted
    function.restype = ctypes.c_char_p
    message = function(NUMBERS[bug], ctypes.c_void_p(planted.upload(x)), ctypes.c_void_p(out))
    if message is not None:
        raise EmulatorError(message.decode())
    return x, planted.download(out, (THREADS,), torch.float32)


def test_every_bug_is_listed(planted: Emulator) -> None:
    assert planted.library.emu_planted_bugs() == len(NUMBERS)


@pytest.mark.parametrize("seed", range(1, 6))
def test_correct_kernel_is_accepted(planted: Emulator, seed: int) -> None:
    x, out = run(planted, "none", seed)
    assert torch.equal(out, (x[:THREADS] + x[THREADS:]).flip(0))


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(planted: Emulator, bug: str, seed: int) -> None:
    with pytest.raises(EmulatorError, match=BUGS[bug]) as caught:
        run(planted, bug, seed)
    message = str(caught.value)
    assert message.startswith("vggfast: kernel planted: ")
    assert re.search(r"block \(0, 0, 0\), thread \(\d+, 0, 0\)$", message)
    if bug not in WITHOUT_LINE:
        assert re.search(r"planted\.cpp:\d+|sm80\.cuh:\d+", message), message


@pytest.mark.parametrize(("which", "reason"), [(0, "cudaFuncSetAttribute"), (1, "empty grid")])
def test_launches_that_cuda_refuses(planted: Emulator, which: int, reason: str) -> None:
    planted.reset(1)
    function = planted.library.emu_refused_launch
    function.restype = ctypes.c_char_p
    addresses = (planted.allocate(2 * THREADS, torch.float32), planted.allocate(THREADS, torch.float32))
    assert reason in function(which, *map(ctypes.c_void_p, addresses)).decode()


def test_outputs_left_unwritten_are_noticed(planted: Emulator) -> None:
    planted.reset(1)
    out = planted.allocate(THREADS, torch.float32)
    with pytest.raises(EmulatorError, match="256 bytes of an output were never written"):
        planted.download(out, (THREADS,), torch.float32)
