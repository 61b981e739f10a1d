"""The C library's allocator, where tensors on a CPU get their memory, and the size of that memory's pages."""

import ctypes
import os
from pathlib import Path

from torch import Tensor

from vggfast import _C

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3), malloc.h
NEVER = -1
SMALLEST_HEAP = 1 << 30  # bytes


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the next tensor; whether the C library could be told so (glibc can).

    By default glibc gives every large block back to the system, which clears it, page by page, when it is asked for
    again: of VGG11's gradients alone 515 MB in each training step. With this the process keeps the most memory that it
    ever used. What it uses from now on lies in huge pages, where Linux grants them: in a virtual machine memory is read
    up to twice as fast then. It holds for the whole process, whatever its libraries allocate; so it is for programs to
    call, once, at their start and before they build a model, and no library does.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER)):
        return False
    _grow_heap(libc)
    return True


def _grow_heap(libc: ctypes.CDLL) -> None:
    """Addresses for half of the machine's memory, asked to become huge pages where they are used; none is used yet."""
    if _read("/proc/sys/vm/overcommit_memory") == "2":  # where even addresses count as memory
        return
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    while size >= SMALLEST_HEAP:
        block = libc.malloc(size)
        if block:
            _C.wish_huge_pages(block, size)
            libc.free(block)
            return
        size //= 2


def wish_huge_pages(tensor: Tensor) -> None:
    """Ask Linux for huge pages where this tensor's memory, which nothing has been written to, is on a CPU."""
    storage = tensor.untyped_storage()
    if storage.device.type == "cpu":
        _C.wish_huge_pages(storage.data_ptr(), storage.nbytes())


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
