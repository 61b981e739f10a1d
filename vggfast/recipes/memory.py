"""The C library's allocator, in a process that does nothing but train."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3), malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let malloc keep what a training step frees, for the next step; for CPUs. Where the C library has no mallopt, nothing.

    By default glibc gives every large block back to the system, which clears it, page by page, when it is asked for
    again: of VGG11's gradients alone 515 MB in each step. It changes the whole process, so this is for commands.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
