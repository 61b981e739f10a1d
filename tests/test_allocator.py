"""``keep_freed_memory``: a tensor that follows one of its size finds memory that need not be cleared again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch, vggfast

if sys.argv[1] == "keep" and not vggfast.keep_freed_memory():
    raise SystemExit("this C library has no mallopt")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 << 20)  # 48 MB: more than glibc would ever learn to keep by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


faults()
# What alignment leaves around a tensor waits in a list of up to seven such pieces, apart from the tensor's own place,
# which by itself is too small for the next one: so the first few may not meet.
print(min(faults() for turn in range(20)))
"""


def faults_of_a_later_tensor(how: str) -> int:
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], env=plain, capture_output=True, text=True, timeout=120)
    if "no mallopt" in done.stderr:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_is_used_again() -> None:
    """Pages are 2 MB at most where the system makes them huge."""
    assert faults_of_a_later_tensor("plain") >= 24
    assert faults_of_a_later_tensor("keep") < 8
