"""Checkpoints of training runs: written whole or not at all, and checked when read."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggfast.atomic_files import atomic_write
from vggfast.recipes import RecipeError

FORMAT = "vggfast checkpoint 2"
KEYS = ("config", "progress", "history", "model", "average", "optimizer", "schedule", "scaler")


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """`atomic_write` to a file of a run's output folder. Raises RecipeError where the disk refuses."""
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise RecipeError(
            f"cannot write {path} ({error}). What was there before is untouched; free some space or choose another "
            "--output, then go on with --resume"
        ) from error


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (a dict with the entries of `KEYS`) to `path`, atomically. Raises RecipeError if the disk refuses."""
    with output_file(path) as temporary:
        try:
            torch.save({"format": FORMAT, **state}, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise OSError(str(error).splitlines()[0]) from error


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read what `save` wrote, tensors on the CPU. Only data are unpickled, never code.

    With `mmap` a tensor is read from the disk when it is first used.

    Raises RecipeError where the file is missing, damaged (every entry's CRC-32 is checked), or something else.
    """
    if not path.is_file():
        raise RecipeError(
            f"no checkpoint to resume from: expected the file {path}, which an earlier run with the same --output "
            "writes. Leave out --resume to start from the beginning"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch reads flipped bits in a tensor without noticing
        if damaged is not None:
            raise zipfile.BadZipFile(f"CRC mismatch in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # zip and pickle readers raise a dozen types on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"{path} cannot be read as a checkpoint ({reason}): it is damaged or not a checkpoint. Restore it from a "
            "copy, or start again with --overwrite"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or any(key not in state for key in KEYS):
        got = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
        raise RecipeError(
            f"{path} is not a checkpoint of this program: expected {FORMAT!r} with {', '.join(KEYS)}, got {got}. "
            "Start again with --overwrite"
        )
    return state


@contextmanager
def as_expected(path: Path) -> Iterator[None]:
    """RecipeError where what was read from the checkpoint `path` has other types or names inside than this program's."""
    try:
        yield
    except (RecipeError, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a setting or an optimiser's state of another form leads to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"{path} holds other things than a checkpoint of this program ({type(error).__name__}: {reason}): it was "
            "changed, or written by another version. Restore it from a copy, or start again with --overwrite"
        ) from error


def load_weights_into(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy the parameters and buffers `state` into `model`.

    Raises RecipeError, naming the first difference, where `state` belongs to another architecture.
    """
    wanted = model.state_dict()
    for name in [*wanted, *state]:
        expected = tuple(wanted[name].shape) if name in wanted else "no such entry"
        got = tuple(state[name].shape) if name in state else "no such entry"
        if expected != got:
            raise RecipeError(
                f"{path} holds another architecture: {name}: expected {expected}, got {got}. Give --model, and the "
                "data, of the run that wrote it, or start again with --overwrite"
            )
    model.load_state_dict(dict(state))
