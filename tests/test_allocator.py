"""Memory of tensors: a later one finds what an earlier one left, and Linux is asked for huge pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vggfast import vgg11

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


HUGE = """
import sys, torch, vggfast

def asked_for(tensor):
    place, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in open("/proc/self/smaps"):
        first, *rest = line.split()
        if "-" in first and ":" not in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= place < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise SystemExit("no such place")

if sys.argv[1] == "keep" and not vggfast.keep_freed_memory():
    raise SystemExit("this C library has no mallopt")
model = vggfast.vgg11(num_classes=10)
print(*(asked_for(t) for t in (torch.ones(12 << 20), model.classifier[0].weight, model.classifier[3].weight)))
"""


def said_by(script: str, how: str) -> str:
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))
    }
    done = subprocess.run([sys.executable, "-c", script, how], env=plain, capture_output=True, text=True, timeout=120)
    if "no mallopt" in done.stderr:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def faults_of_a_later_tensor(how: str) -> int:
    return int(said_by(SCRIPT, how))


def test_memory_is_used_again() -> None:
    """Pages are 2 MB at most where the system makes them huge."""
    assert faults_of_a_later_tensor("plain") >= 24
    assert faults_of_a_later_tensor("keep") < 8


@pytest.mark.skipif(not os.path.isdir("/sys/kernel/mm/transparent_hugepage"), reason="this system has no huge pages")
def test_huge_pages_are_asked_for() -> None:
    """Of a process of its own; without the call only a model's fully connected weights, which each pass reads."""
    assert said_by(HUGE, "plain") == "False True True"
    assert said_by(HUGE, "keep") == "True True True"


def test_a_tensor_without_memory_needs_no_pages() -> None:
    with torch.device("meta"):
        assert vgg11().classifier[0].weight.is_meta
    with FakeTensorMode():
        assert isinstance(vgg11().classifier[0].weight, FakeTensor)
    assert type(vgg11(num_classes=2).classifier[0]) is torch.nn.Linear
