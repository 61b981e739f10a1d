"""Checkpoint files: downloaded, read without running code, written; and what is said of those that cannot be read."""

import json
import os
import pickle
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vggfast import keras_weights
from vggfast.atomic_files import atomic_write

SUFFIXES = (".pth", ".pt", ".safetensors", ".ckpt", ".bin", *keras_weights.SUFFIXES)
_WRAPPERS = ("state_dict", "model", "model_state_dict")  # training checkpoints keep the state_dict under one of these
_PREFIXES = ("module.", "_orig_mod.")  # left in the keys by DistributedDataParallel and by torch.compile


def fetch(url: str, progress: bool, check_hash: bool) -> Path:
    """Where `url` lies in torch.hub's cache; downloads it there unless a file of that name is there already."""
    name = os.path.basename(urlparse(url).path)
    if not name:
        raise ValueError(f"weights: expected a URL that ends in a file name, got {url!r}")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if cached.exists():
        return cached
    sha256_prefix = cached.stem.rpartition("-")[2] if check_hash else None
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cached), sha256_prefix, progress)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash differs
        raise OSError(
            f"cannot download {url}: {error}\nWithout a network, download it elsewhere and put it at\n  {cached}\n"
            "where it is then found, or pass the path of a local copy as `weights`."
        ) from error
    return cached


def _read_file(path: Path) -> Any:
    """What a .safetensors file or a torch.save file holds; RuntimeError that says why it cannot be read."""
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"weights: expected a checkpoint file ({', '.join(SUFFIXES)}), {path} {what}")
    with path.open("rb") as file:
        head = file.read(64)
    again = "If it was downloaded, delete it and download it again."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise RuntimeError(
            f"{path}: expected a checkpoint, got a web page (a log-in or error page of the server?). {again}"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in keras_weights.SUFFIXES:
            return keras_weights.read(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:  # h5py's, which says what to install
        raise
    except Exception as error:  # zip, pickle and safetensors readers raise a dozen types on damaged files
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise RuntimeError(
                f"{path}: expected a state_dict (names and tensors), got pickled Python objects, which can run any code "
                "when loaded. If you trust the file, torch.load(path, weights_only=False) it yourself and save its "
                "state_dict() anew."
            ) from error
        reason = (str(error).splitlines() or [""])[0]
        raise RuntimeError(
            f"{path}: expected a checkpoint saved by torch.save, safetensors or Keras, got {path.stat().st_size} bytes that "
            f"cannot be read, damaged or cut short ({type(error).__name__}: {reason}). {again}"
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The names and tensors in a file, on the CPU, out of their wrappers and with no prefixes.

    Raises FileNotFoundError, or RuntimeError that says why it cannot be read or is no state_dict.
    """
    state = _read_file(path)
    if isinstance(state, Mapping):
        # "model" may be the model's settings, beside "model_state_dict".
        state = next((state[key] for key in _WRAPPERS if _holds_tensors(state.get(key))), state)
    if not _holds_tensors(state):
        keys = f" with keys {', '.join(map(repr, list(state)[:8]))}" if isinstance(state, Mapping) else ""
        raise RuntimeError(
            f"{path}: expected a state_dict (names and tensors), alone or under one of {', '.join(_WRAPPERS)}; "
            f"got {type(state).__name__}{keys}"
        )
    # An epoch or a name beside the tensors is none of the model's entries.
    state = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    while any(key.startswith(_PREFIXES) for key in state):  # one within the other, in either order
        for prefix in _PREFIXES:
            nn.modules.utils.consume_prefix_in_state_dict_if_present(state, prefix)
    state.pop("n_averaged", None)  # what torch.optim.swa_utils.AveragedModel counts beside its average
    odd = [key for key, value in state.items() if not _is_plain(value)]
    if odd:  # what reads them later would fail each in its own way, some with half of a model loaded
        raise RuntimeError(
            f"{path}: expected dense tensors of real numbers, got sparse, quantised or complex ones, or ones without data: "
            f"{', '.join(odd[:4])}{', …' if odd[4:] else ''}"
        )
    return state


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not (value.is_quantized or value.is_complex() or value.is_meta)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its model, parsed where it is JSON; nothing for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return {name: _parsed(text) for name, text in (file.metadata() or {}).items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def save_tensors(state: Mapping[str, Tensor], path: Path, about: Mapping[str, Any]) -> None:
    """Write `state` to `path` itself, with `about` as JSON in its metadata. Raises OSError where the disk refuses."""
    tensors, written = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in written:  # of tied layers; safetensors refuses memory that has two names
            tensor = tensor.clone()
        tensors[name] = tensor
        written.add(tensor.data_ptr())
    try:
        save_file(tensors, path, {name: json.dumps(value) for name, value in about.items()})
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Give a safetensors file's metadata a fixed order, without which files of the same content differ by chance."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def write_safetensors(state: Mapping[str, Tensor], path: Path, about: Mapping[str, Any]) -> None:
    """Write `state`, with `about` as JSON in its metadata; `path` is either what it was or the whole new file.

    Raises OSError where the disk refuses.
    """
    with atomic_write(path) as temporary:
        try:
            save_tensors(state, temporary, about)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error}") from error
