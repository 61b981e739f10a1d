"""Image files: found in class folders, and read with Pillow."""

import os
from pathlib import Path
from typing import Any

from vggfast.recipes import RecipeError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


class Unreadable(Exception):
    """An image file that cannot be read; says why."""


def read(path: str | os.PathLike[str], upright: bool = False) -> Any:
    """The image as a PIL image in grey ("L") or in RGB; `upright` turns it as the camera noted.

    Raises Unreadable where the file is missing, damaged or no image.
    """
    from PIL import Image, ImageOps

    if not os.path.isfile(path):
        what = "is a folder; expected an image file" if os.path.isdir(path) else "does not exist"
        raise Unreadable(f"{path} {what}")
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image) if upright else image
            return image if image.mode in ("L", "RGB") else image.convert("RGB")
    except Exception as error:  # Pillow's readers raise a dozen types for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Unreadable(f"{path} cannot be read as an image ({reason})") from error


def in_class_folders(root: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Classes and labelled files of `root`/<class>/…, in torchvision's order. Raises RecipeError where there are none."""
    if not root.is_dir():
        raise RecipeError(
            f"no data folder {root}: expected digits, mnist, fake, or a folder of <class>/… images. Check --data"
        )
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    files = [
        (Path(folder) / name, label)
        for label, class_name in enumerate(classes)
        for folder, _, names in sorted(os.walk(root / class_name, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES)
    ]
    if not files:
        raise RecipeError(
            f"{root}: expected one folder of images ({', '.join(SUFFIXES)}) for each class, got {sorted(os.listdir(root))[:8]}"
        )
    return classes, files
