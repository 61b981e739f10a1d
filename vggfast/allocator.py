"""The C library's allocator, where tensors on a CPU get their memory."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3), malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the next tensor; whether the C library could be told so (glibc can).

    By default glibc gives every large block back to the system, which clears it, page by page, when it is asked for
    again: of VGG11's gradients alone 515 MB in each training step. With this the process keeps the most memory that it
    ever used. It holds for the whole process, whatever its libraries allocate, and from now on; so it is for programs
    to call, once, at their start, and no library does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
