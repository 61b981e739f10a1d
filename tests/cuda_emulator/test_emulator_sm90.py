"""The emulator on sm_90's asynchronous machinery: it accepts a correct pipeline and catches every planted bug."""

from __future__ import annotations

import ctypes

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

WRONG = "wrong result"
DEADLOCK = "deadlock: .* for a phase of an mbarrier"
IN_FLIGHT = "wgmma reads shared memory: (in flight|uninitialised)"
# In the order of planted_sm90.cpp's enum, what the message must say.
BUGS = {
    "missing_full_wait": IN_FLIGHT,
    "wrong_parity": f"{IN_FLIGHT}|{DEADLOCK}",
    "missing_empty_wait": "(race: asynchronous products read it|in flight: another bulk copy)|more arrivals|race: nobody",
    "released_before_the_product": f"filled again too early|race: asynchronous products|in flight|{DEADLOCK}",
    "too_few_bytes": "more bytes landed|in flight",
    "too_many_bytes": f"{DEADLOCK}.*lacks 0 of 1 arrivals and 128 bytes",
    "too_many_arrivals": "mbarrier.arrive: more arrivals than the phase takes|in flight|" + DEADLOCK,
    "missing_proxy_fence": "dirty: written by ordinary stores",
    "proxy_fence_after_barrier": "dirty: written by ordinary stores",
    "other_swizzle_in_map": WRONG,
    "no_swizzle_in_descriptor": "expected a descriptor of the 128-byte swizzle",
    "misaligned_descriptor": WRONG,
    "base_offset_of_the_matrix": "expected a descriptor of the 128-byte swizzle",
    "past_the_tile": IN_FLIGHT + "|race|" + WRONG,
    "missing_products_wait": "asynchronous products it never waited for",
    "accumulators_read_early": WRONG,
    "accumulators_written_early": "accumulators were written while a product on them was in flight",
    "missing_wgmma_fence": "no wgmma.fence since",
    "warp_left_out": "a warp of the warpgroup did not take part|warps of a warpgroup ask for different products",
    "lane_differs": "lanes of a warp ask for different products",
    "missing_init_fence": "no fence.mbarrier_init and barrier made the mbarrier visible",
    "missing_init_barrier": "no mbarrier was initialised there|no barrier orders it after the mbarrier's initialisation",
    "mbarrier_read": "an mbarrier: only its own instructions may touch it",
    "stage_read_without_wait": "in flight|uninitialised",
    "registers_never_freed": "setmaxnreg.inc: waits for registers that nobody gives back",
    "coordinate_as_element_offset": WRONG,
    "copy_left_in_flight": "the block ends with bulk copies (in flight|that nobody waited for)",
}
NUMBERS = {name: number for number, name in enumerate(("none", *BUGS))}
ROWS, TILE_ROWS, BLOCKS = 64, 72, 5


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The emulator with planted_sm90.cpp in place of the project's kernels."""
    folder = tmp_path_factory.mktemp("planted_sm90")
    objects = build_runtime(folder, interface=False)
    compile_object(HERE / "planted_sm90.cpp", folder / "planted.o", CSRC, KERNEL_FLAGS)
    return link([*objects, folder / "planted.o"], folder / "planted.so")


def run(planted: Emulator, bug: str, seed: int, shift: int = 0) -> None:
    planted.reset(seed)
    a = torch.randint(-4, 5, (TILE_ROWS, BLOCKS * 64), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    out = planted.allocate(ROWS * 64, torch.float32)
    function = planted.library.emu_planted_sm90
    function.restype = ctypes.c_char_p
    message = function(NUMBERS[bug], shift, ctypes.c_void_p(planted.upload(a)), ctypes.c_void_p(out))
    if message is not None:
        raise EmulatorError(message.decode())
    want = a[shift : shift + ROWS].float().view(ROWS, BLOCKS, 64).sum(1)
    if not torch.equal(planted.download(out, (ROWS, 64), torch.float32), want):
        raise EmulatorError(WRONG)


def test_every_bug_is_listed(planted: Emulator) -> None:
    assert planted.library.emu_planted_sm90_bugs() == len(NUMBERS)


@pytest.mark.parametrize("seed", range(1, 11))
def test_correct_kernel_is_accepted(planted: Emulator, seed: int) -> None:
    run(planted, "none", seed)
    statistics = planted.statistics()
    assert statistics.tma_boxes == BLOCKS
    assert statistics.wgmma == BLOCKS * 4 * 4  # steps of 16 elements, warps
    assert statistics.registers_moved == 128 * (168 - 40 + 232 - 168)


@pytest.mark.parametrize("shift", range(1, 9))
def test_a_descriptor_may_start_at_any_row(planted: Emulator, shift: int) -> None:
    """The swizzle is of each row's own address: the copy engine wrote with it, and the start of the matrix does not enter."""
    run(planted, "none", shift, shift)


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(planted: Emulator, bug: str, seed: int) -> None:
    with pytest.raises(EmulatorError, match=BUGS[bug]):
        run(planted, bug, seed)


TAKEN = {"base": 1 << 20, "extents": (128, 9, 64), "strides": (256, 2304), "box": (64, 1, 64), "swizzle": 3}
REFUSED = {
    "base not at 16 bytes": {"base": (1 << 20) + 8},
    "stride not a multiple of 16 bytes": {"extents": (124, 9, 64), "strides": (248, 2304)},
    "stride of 2^40 bytes": {"strides": (256, 1 << 40)},
    "overlapping rows": {"strides": (128, 2304)},
    "box of more than 256": {"box": (64, 1, 257)},
    "empty box": {"box": (64, 0, 64)},
    "empty tensor": {"extents": (128, 0, 64)},
    "box wider than the swizzle": {"box": (128, 1, 64)},
    "box not a multiple of 16 bytes": {"box": (60, 1, 64)},
    "box of 64 elements in a 32-byte swizzle": {"swizzle": 1},
}


@pytest.mark.parametrize("change", [{}, *REFUSED.values()], ids=["taken", *REFUSED])
def test_tensor_maps_that_the_driver_refuses(planted: Emulator, change: dict[str, object]) -> None:
    case = TAKEN | change
    arrays = [(ctypes.c_uint64 * 3)(*case["extents"]), (ctypes.c_uint64 * 2)(*case["strides"])]
    box = (ctypes.c_uint32 * 3)(*case["box"])
    result = planted.library.emu_encode(ctypes.c_uint64(case["base"]), *arrays, box, case["swizzle"])
    assert (result != 0) == bool(change)
