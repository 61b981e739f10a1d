"""WebDataset's shards: tar files of samples, read at random by an index of where each file begins.

The files of a sample follow each other and share the path up to the first dot of its last part: 000017.jpg and
000017.cls, which holds the class, as a number or a name. Random access is what gives an exact resume, a share of every
batch to each process and an order that no number of workers changes; so the tar files must be local and uncompressed.
"""

import itertools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vggfast.recipes import RecipeError

IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "ppm", "pgm", "pbm", "bmp", "tif", "tiff", "webp"}
BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Sample:
    """An image in a shard: its bytes, and its class as it is written there."""

    shard: Path
    name: str
    offset: int
    size: int
    label: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def is_shards(data: str) -> bool:
    """Whether `data` names shards, and no folder of images: "x-{000..003}.tar", "x.tar", or a folder of .tar files."""
    return data.endswith(".tar") or any(Path(data).glob("*.tar"))


def find(data: str) -> list[Path]:
    """The shards that `data` names, in order; RecipeError for one that is not there."""
    named = data.endswith(".tar")
    shards = [Path(name) for name in expand(data)] if named else sorted(Path(data).glob("*.tar"))
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        what = "is no file" if missing[0].exists() else "is not there"
        raise RecipeError(f"{data}: expected {len(shards)} shards, {missing[0]} {what}. Check the path")
    return shards


def expand(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for, as in a shell: {000..003} counts, {train,val} lists."""
    parts = BRACES.split(pattern)  # outside and inside braces in turn
    choices = [_choices(part, pattern) if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(names) for names in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if not dots:
        return inside.split(",")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise RecipeError(f"{pattern}: expected two numbers in braces, as {{000..003}}, got {{{inside}}}")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def read_index(shards: list[Path]) -> list[Sample]:
    """The samples of all shards, in order; RecipeError for a shard that is damaged or compressed, or holds none."""
    samples = [sample for shard in shards for sample in _samples(shard)]
    if not samples:
        raise RecipeError(
            f"{', '.join(map(str, shards[:4]))}: expected pairs of files as 000017.jpg and 000017.cls, got none"
        )
    return samples


def _samples(shard: Path) -> Iterator[Sample]:
    image: tuple[str, int, int] | None = None
    label: str | None = None
    key = ""
    try:
        with shard.open("rb") as whole:
            whole.seek(max(0, shard.stat().st_size - tarfile.BLOCKSIZE))
            if whole.read().strip(b"\0"):  # tarfile takes a file cut off between two members for a whole one
                raise tarfile.ReadError("its end is missing")
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if folder + slash + stem != key:
                    key, image, label = folder + slash + stem, None, None
                if suffix.lower() in IMAGE_SUFFIXES:
                    image = member.name, member.offset_data, member.size
                elif suffix.lower() == "cls":
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    label = content.read().decode().strip()
                if image is not None and label is not None:
                    yield Sample(shard, *image, label)
                    image = label = None
    except (tarfile.TarError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(
            f"{shard} cannot be read as a shard ({error}): expected an uncompressed tar file. Unpack or repair it"
        ) from error


def classes_of(samples: list[Sample]) -> list[str]:
    """Names of the classes: those in the samples, sorted, or where they are numbers, "0" to the greatest."""
    labels = {sample.label for sample in samples}
    if all(label.isdecimal() for label in labels):
        return [str(number) for number in range(max(map(int, labels)) + 1)]
    return sorted(labels)


def targets(samples: list[Sample], classes: list[str], place: str) -> list[int]:
    """The numbers of the samples' classes among `classes`, which are those of `place`; RecipeError for another class."""
    number = {name: index for index, name in enumerate(classes)}
    found = [number.get(sample.label, number.get(_canonical(sample.label))) for sample in samples]
    if None in found:
        sample = samples[found.index(None)]
        raise RecipeError(
            f"{sample} is of class {sample.label!r}: expected the classes {', '.join(classes[:8])}"
            f"{', …' if len(classes) > 8 else ''} of {place}"
        )
    return [index for index in found if index is not None]


def _canonical(label: str) -> str:
    """Of a number its shortest form, as `classes_of` names classes that are all numbers."""
    return str(int(label)) if label.isdecimal() else label
