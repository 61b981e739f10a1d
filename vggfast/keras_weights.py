"""Keras's weight files: HDF5 as `save_weights` and `save` write it, old and new, and the .keras archive. Needs h5py."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".h5", ".hdf5", ".keras")
_PARTS = {"kernel": "kernel", "W": "kernel", "bias": "bias", "b": "bias"}
# block1_conv1/kernel:0, block1_conv1_W_1:0, block1_conv1/kernel: Keras 2, 1 and 3
_LEGACY = re.compile(r"(?P<layer>[^/]+?)[/_](?P<part>kernel|bias|W|b)(?:_\d+)?(?::0)?$")
_NUMBERED = re.compile(r"(conv2d|dense)(?:_(\d+))?$")  # how Keras 3 calls layers in files without their names
_CONVOLUTIONS_OF_A_BLOCK = {8: (1, 1, 2, 2, 2), 10: (2,) * 5, 13: (2, 2, 3, 3, 3), 16: (2, 2, 4, 4, 4)}
_HEAD = ("fc1", "fc2", "predictions")


def read(path: Path) -> dict[str, Tensor]:
    """The arrays of a Keras file as {"block1_conv1.kernel": [3, 3, C_in, C_out], "fc1.bias": [4096], ...}.

    Layers keep their names where the file has them; else they are named by their order, as VGG's. Raises ImportError
    where h5py is missing, OSError or KeyError (the file is damaged).
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"{path}: Keras's files are read with h5py, which is not installed: pip install h5py"
        ) from error
    source: Any = path
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            source = io.BytesIO(archive.read("model.weights.h5"))
    state: dict[str, Tensor] = {}
    with h5py.File(source, "r") as file:

        def visit(name: str, entry: Any) -> None:
            if isinstance(entry, h5py.Dataset) and not name.startswith("optimizer") and (key := _key(name, entry)):
                state[key] = torch.from_numpy(entry[()])

        file.visititems(visit)
    return _with_names(state)


def _key(path: str, dataset: Any) -> str | None:
    """layer.kernel or layer.bias for the dataset at `path`, None for others."""
    folders = path.split("/")
    if len(folders) >= 3 and folders[-2] == "vars":  # Keras 3: layers/conv2d_1/vars/0, and the layer's name beside
        part = {"0": "kernel", "1": "bias"}.get(folders[-1])
        return f"{dataset.parent.attrs.get('name', folders[-3])}.{part}" if part else None
    match = _LEGACY.search(path)
    return f"{match['layer']}.{_PARTS[match['part']]}" if match else None


def _with_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with VGG's names for layers that the file only counts: conv2d, conv2d_1, …, dense, dense_1, …"""
    layers = {key.rpartition(".")[0] for key in state}
    counted = {layer: match for layer in layers if (match := _NUMBERED.fullmatch(layer))}
    convolutions, dense = (
        sorted((layer for layer in counted if counted[layer][1] == kind), key=lambda layer: int(counted[layer][2] or 0))
        for kind in ("conv2d", "dense")
    )
    names: dict[str, str] = {}
    if blocks := _CONVOLUTIONS_OF_A_BLOCK.get(len(convolutions)):
        ours = (f"block{block}_conv{n}" for block, count in enumerate(blocks, 1) for n in range(1, count + 1))
        names.update(zip(convolutions, ours, strict=True))
    if len(dense) == len(_HEAD):
        names.update(zip(dense, _HEAD, strict=True))
    return {
        f"{names.get(layer, layer)}.{part}": value
        for key, value in state.items()
        for layer, _, part in [key.rpartition(".")]
    }
