"""Files that are either the old version or the new one, never half of one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file to write to; on success it becomes `path`, on an exception it is removed.

    The rename is atomic because both names are on one file system, and durable because the data are on the disk before
    the rename and the directory after it. Raises OSError where the disk refuses (full, read-only, ...).
    """
    # A directory of its own, since who writes may have temporary files, too: safetensors does.
    directory = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary = directory / path.name
    try:
        directory.mkdir(exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner can read
        _fsync(temporary)
        os.replace(temporary, path)
        with suppress(PermissionError):  # of a directory that may be written to, but not listed
            _fsync(path.parent)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Delete the temporary directories that processes killed while writing `path` left beside it; not those of one that lives."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        process = leftover.name.split(".")[-2]
        if not (process.isdecimal() and _lives(int(process))):
            shutil.rmtree(leftover, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return process != os.getpid()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
