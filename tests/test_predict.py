"""Prediction in Python: what an image may be, how it is turned, and the names of its classes."""

import re
from pathlib import Path

import pytest
import torch
from small_vgg import narrow_vgg

import vggfast
from vggfast.recipes.evaluate import find
from vggfast.recipes.predict import open_model, predict
from vggfast.recipes.views import Views

Image = pytest.importorskip("PIL.Image")


def test_predict_in_python(tmp_path):
    grey = Image.new("L", (60, 60), 90)
    answers = predict([grey, torch.rand(1, 50, 50)], [narrow_vgg(in_channels=1)], Views(32), top=3)
    assert [len(each.answers) for each in answers] == [3, 3]
    assert re.fullmatch(r"class \d", answers[0].answers[0].name)


@pytest.fixture
def turned(tmp_path):
    """A photograph that the camera noted to be turned by a quarter, the same without the note, and one with a damaged note."""
    sideways = Image.new("RGB", (60, 40))
    sideways.paste((255, 0, 0), (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    (tmp_path / "a").mkdir()
    sideways.save(tmp_path / "a" / "turned.jpg", exif=exif, quality=95)
    sideways.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "a" / "upright.jpg", quality=95)
    sideways.save(tmp_path / "a" / "damaged.png", exif=b"nonsense")
    return tmp_path


def test_photographs_are_turned_upright_in_prediction_evaluation_and_training(turned):
    turned_jpg, upright_jpg, damaged_png = (
        turned / "a" / name for name in ("turned.jpg", "upright.jpg", "damaged.png")
    )
    first, second = predict([turned_jpg, upright_jpg], [narrow_vgg()], Views(32))
    for a, b in zip(first.answers, second.answers, strict=True):
        assert a.name == b.name
        assert a.probability == pytest.approx(b.probability, abs=0.01)
    read = {Path(sample.name).stem: sample.read() for sample in find(str(turned)).samples}
    assert read["turned"].size == read["upright"].size == (40, 60)
    assert read["turned"].getpixel((20, 5))[0] > 240 > 10 > read["turned"].getpixel((20, 55))[0]
    assert read["damaged"].size == (60, 40)
    pytest.importorskip("torchvision")
    from vggfast.recipes.images import ImageData, Share

    (turned / "b").mkdir()
    for path in (turned_jpg, upright_jpg):
        (turned / "b" / path.name).write_bytes(path.read_bytes())
    damaged_png.unlink()
    data = ImageData(str(turned), str(turned), 32, 4, 0, None, 0, "none", (32, 32), Share())
    images = torch.cat([images for images, _ in data.test_batches()])
    assert images[:, 0, :4].min() > 1.5 > -1.5 > images[:, 0, -4:].max()  # red above, black below, in all four
    assert len(images) == 4


def test_imagenets_names_where_there_are_1000_classes(tmp_path):
    pytest.importorskip("torchvision")
    vggfast.save_weights(narrow_vgg(num_classes=1000), tmp_path / "a.safetensors", size=32)
    [prediction] = predict([Image.new("RGB", (40, 40))], [open_model(tmp_path / "a.safetensors")])
    assert {answer.name for answer in prediction.answers} <= set(vggfast.VGG16_Weights.DEFAULT.meta["categories"])
