"""Image files: found in class folders, and decoded with Pillow."""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from vggfast.recipes import RecipeError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


class Unreadable(Exception):
    """An image file that cannot be read; says why."""


def decode(content: bytes) -> Any:
    """The image in a file's bytes as a PIL image in grey ("L") or RGB, turned upright as the camera noted.

    Raises whatever Pillow raises for what is damaged, and ValueError for what is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(content)) as image:
            image.load()
            image = _upright(_of_bytes(image))
            return image if image.mode in ("L", "RGB") else image.convert("RGB")
    except UnidentifiedImageError:  # its own message has an address
        raise ValueError("in no format that Pillow knows" if content else "empty") from None


def _of_bytes(image: Any) -> Any:
    """Greys of 16 bits as the 8 most significant ones: Pillow would cut off all that is above 255."""
    from PIL import Image

    # Of PNG older Pillows make "I", of PGM all do, with 65535 for white whatever white is in the file.
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not wide:
        return image
    made = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    made.info = image.info
    if exif := image.getexif():
        made.info["exif"] = exif.tobytes()
    return made


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged note about the camera leaves the pixels as they are; Pillow raises many types
        return image


def reason(error: Exception) -> str:
    """One line of what is wrong with an image: Pillow's readers raise a dozen types for damaged files."""
    return (str(error) or type(error).__name__).splitlines()[0]


def content(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file; OSError for what is none, as a pipe, which would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is a folder" if os.path.isdir(path) else "it is no regular file, but a pipe or a device")
    return Path(path).read_bytes()


def read(path: str | os.PathLike[str]) -> Any:
    """The image in a file, as `decode` gives it. Raises Unreadable where the file is missing, damaged or no image."""
    if not os.path.exists(path) or os.path.isdir(path):
        what = "is a folder; expected an image file" if os.path.isdir(path) else "does not exist"
        raise Unreadable(f"{path} {what}")
    return read_bytes(os.fspath(path), lambda: content(path))


def read_bytes(name: str, content: Callable[[], bytes]) -> Any:
    """The image called `name` whose file's bytes `content` returns; Unreadable where it cannot be read."""
    try:
        return decode(content())
    except Exception as error:
        raise Unreadable(f"{name} cannot be read as an image ({reason(error)})") from error


def _raise(error: OSError) -> None:
    raise error


def in_class_folders(root: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Classes and labelled files of `root`/<class>/…, in torchvision's order. Raises RecipeError where there are none."""
    if not root.is_dir():
        raise RecipeError(
            f'no data folder {root}: expected digits, mnist, fake, a folder of <class>/… images, or shards as "data/{{000..003}}.tar". '
            "Check --data"
        )
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    files = [
        (Path(folder) / name, label)
        for label, class_name in enumerate(classes)
        for folder, _, names in sorted(os.walk(root / class_name, onerror=_raise, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES)
    ]
    if not files:
        raise RecipeError(
            f"{root}: expected one folder of images ({', '.join(SUFFIXES)}) for each class, got {sorted(os.listdir(root))[:8]}"
        )
    return classes, files
