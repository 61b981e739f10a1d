"""Keras's weight files, of all its versions: what they hold gives Keras's own answers, calculated here as they are defined."""

import itertools
import sys
import zipfile

import numpy
import pytest
import torch
from small_vgg import NARROW_D, narrow_vgg

from vggfast import keras_weights, load_model
from vggfast.models import cfgs
from vggfast.preprocessing import CAFFE
from vggfast.weight_layouts import architecture, to_torchvision
from vggfast.weights import read_checkpoint

BLOCKS = (2, 2, 3, 3, 3)
LAYERS = [f"block{b}_conv{i}" for b, count in enumerate(BLOCKS, 1) for i in range(1, count + 1)]
HEAD = ["fc1", "fc2", "predictions"]


def keras_arrays(seed=0, grid=7, in_channels=3):
    """Kernels [H, W, C_in, C_out] and [in, out], and biases, of a VGG16 of few channels."""
    draw = numpy.random.default_rng(seed)
    widths = [c for c in NARROW_D if c != "M"]
    arrays, c_in = {}, in_channels
    for name, width in zip(LAYERS, widths, strict=True):
        kernel = draw.normal(size=(3, 3, c_in, width)) * (2 / (9 * c_in)) ** 0.5
        arrays[name], c_in = (kernel.astype("f4"), draw.normal(size=width).astype("f4") / 10), width
    sizes = [grid * grid * c_in, 16, 12, 5]
    for name, inputs, outputs in zip(HEAD, sizes, sizes[1:], strict=False):
        kernel = draw.normal(size=(inputs, outputs)) * (2 / inputs) ** 0.5
        arrays[name] = kernel.astype("f4"), draw.normal(size=outputs).astype("f4") / 10
    return arrays


def keras_forward(arrays, x):
    """Keras's VGG16 without the softmax, in float64, on images [N, H, W, C]: every sum as it is written."""
    x = x.astype("f8")
    for name in LAYERS:
        kernel, bias = (array.astype("f8") for array in arrays[name])
        padded = numpy.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1:3]
        x = bias + sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))
        x = numpy.maximum(x, 0)
        if LAYERS.index(name) + 1 in numpy.cumsum(BLOCKS):
            n, height, width, channels = x.shape
            x = (
                x[:, : height // 2 * 2, : width // 2 * 2]
                .reshape(n, height // 2, 2, width // 2, 2, channels)
                .max((2, 4))
            )
    x = x.reshape(len(x), -1)  # height, width, channel
    for name in HEAD:
        x = x @ arrays[name][0] + arrays[name][1]
        x = x if name == "predictions" else numpy.maximum(x, 0)
    return x


def scores(model, x):
    """In float64."""
    with torch.no_grad():
        return model.double()(x)


def write_legacy(path, arrays, names=("kernel:0", "bias:0"), inside="", old=False):
    """Keras 1 and 2: a group a layer, with the names of its weights; in a whole model below model_weights."""
    h5py = pytest.importorskip("h5py", reason="Keras's files are HDF5: pip install h5py")
    with h5py.File(path, "w") as file:
        root = file.create_group(inside) if inside else file
        root.attrs["layer_names"] = [name.encode() for name in arrays]
        for name, pair in arrays.items():
            group = root.create_group(name)
            full = [f"{name}_{end}" if old else f"{name}/{end}" for end in names]
            group.attrs["weight_names"] = [each.encode() for each in full]
            for each, array in zip(full, pair, strict=True):
                group[each] = array
        if inside:
            file["optimizer_weights/Adam/m/block1_conv1/kernel:0"] = numpy.zeros((3, 3, 3, 4), "f4")


def write_keras3(path, arrays, named=True):
    """Keras 3: layers/conv2d_1/vars/0, with the layer's own name as an attribute."""
    h5py = pytest.importorskip("h5py", reason="Keras's files are HDF5: pip install h5py")
    with h5py.File(path, "w") as file:
        counts = {"conv2d": 0, "dense": 0}
        for name, pair in arrays.items():
            kind = "conv2d" if pair[0].ndim == 4 else "dense"
            number, counts[kind] = counts[kind], counts[kind] + 1
            group = file.create_group(f"layers/{kind}_{number}/vars" if number else f"layers/{kind}/vars")
            if named:
                group.attrs["name"] = name
            for index, array in enumerate(pair):
                group[str(index)] = array
        file.create_group("layers/flatten/vars")


def write_archive(path, arrays):
    write_keras3(path.with_suffix(".h5"), arrays)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".h5"), "model.weights.h5")
        archive.writestr("config.json", "{}")


KERAS = {
    "keras1.h5": lambda path, arrays: write_legacy(path, arrays, ("W_1:0", "b_1:0"), old=True),
    "keras2.h5": write_legacy,
    "whole_model.hdf5": lambda path, arrays: write_legacy(path, arrays, inside="model_weights"),
    "model_of_keras3.h5": lambda path, arrays: write_legacy(path, arrays, ("kernel", "bias"), inside="model_weights"),
    "keras3.weights.h5": write_keras3,
    "counted.weights.h5": lambda path, arrays: write_keras3(path, arrays, named=False),
    "archive.keras": write_archive,
}


@pytest.mark.parametrize("name", KERAS)
def test_kerass_files(name, tmp_path):
    arrays = keras_arrays()
    KERAS[name](tmp_path / name, arrays)
    loaded = load_model(tmp_path / name)
    assert (loaded.layout, loaded.normalisation, loaded.normalisation_known) == ("keras", CAFFE, True)
    x = numpy.random.default_rng(5).uniform(-100, 100, (1, 224, 230, 3)).astype("f4")
    got = scores(loaded.model, torch.from_numpy(x).permute(0, 3, 1, 2).double()).numpy()
    expected = keras_forward(arrays, x)
    assert expected.std() > 1
    numpy.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * abs(expected).max())


@pytest.mark.parametrize("letter", "ABDE")
def test_layers_that_are_only_counted(letter):
    widths = [3, *(width for width in cfgs[letter] if width != "M")]
    state = {
        f"conv2d_{index}.kernel" if index else "conv2d.kernel": torch.zeros(3, 3, *pair, device="meta")
        for index, pair in enumerate(itertools.pairwise(widths))
    }
    found = architecture(to_torchvision(keras_weights._with_names(state)))
    assert list(found.cfg) == cfgs[letter]


def test_caffes_preprocessing():
    """Oxford's: BGR from 0 to 255, less the mean of each channel."""
    image = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)
    expected = torch.tensor([255 - 103.939, 127.5 - 116.779, -123.68]).view(3, 1, 1)
    torch.testing.assert_close(CAFFE(image), expected)


def test_kerass_networks_for_other_sizes(tmp_path):
    arrays = keras_arrays(grid=2)
    write_legacy(tmp_path / "a.h5", arrays)
    x = numpy.random.default_rng(5).normal(size=(2, 64, 64, 3))
    got = scores(load_model(tmp_path / "a.h5").model, torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    numpy.testing.assert_allclose(got, keras_forward(arrays, x), rtol=1e-9, atol=1e-9)


def test_keras_without_its_top(tmp_path):
    arrays = {name: pair for name, pair in keras_arrays().items() if name not in HEAD}
    write_keras3(tmp_path / "notop.weights.h5", arrays)
    with pytest.raises(ValueError, match="holds no classifier"):
        load_model(tmp_path / "notop.weights.h5")
    model = narrow_vgg(NARROW_D)
    state = read_checkpoint(tmp_path / "notop.weights.h5")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("classifier.") for key in missing)
    assert torch.equal(model.features[0].weight, torch.from_numpy(arrays["block1_conv1"][0]).permute(3, 2, 0, 1))


def test_keras_files_that_cannot_be_read(tmp_path, monkeypatch):
    arrays = keras_arrays()
    arrays["block1_conv2"] = (arrays["block1_conv2"][0].transpose(3, 2, 0, 1), arrays["block1_conv2"][1])
    write_legacy(tmp_path / "theano.h5", arrays)
    with pytest.raises(RuntimeError, match=r"expected a kernel \[H, W, C_in, C_out\], got \[4, 4, 3, 3\]: .* Theano"):
        load_model(tmp_path / "theano.h5")
    (tmp_path / "noise.h5").write_bytes(b"noise" * 99)
    with pytest.raises(RuntimeError, match=r"noise.h5: expected a checkpoint .* got 495 bytes that cannot be read"):
        load_model(tmp_path / "noise.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="read with h5py, which is not installed: pip install h5py"):
        load_model(tmp_path / "theano.h5")
