"""The processes that train together: those that torchrun started, or this one alone."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's number among `world`; without torchrun, 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, the same bits on each."""
        values = values.clone()
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """What each process passed, in their order, on every one of them."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value)
        return values


def rank() -> int:
    """This process's number, from torchrun's environment; 0 without."""
    return int(os.environ.get("RANK", "0"))


def local_device(device: torch.device) -> torch.device:
    """`device`, or where torchrun started several processes on a machine with GPUs, this one's own."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the other processes, over NCCL on GPUs and gloo on CPUs, until the program ends.

    A process group that was there before is used, and left alone. So is that of an earlier run in the same program: were
    it left in between, torch would look for the others at the addresses that they had in it.
    """
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Processes(dist.get_rank(), dist.get_world_size())
    atexit.register(_leave)  # not after an exception: the others may be waiting for this process in a collective


def _leave() -> None:
    if dist.is_initialized():  # still
        dist.destroy_process_group()
