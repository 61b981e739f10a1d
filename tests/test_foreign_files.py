"""Files of checkpoints that others wrote, or that were changed: messages, whatever is in them."""

import json
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file
from small_vgg import narrow_vgg
from test_train import StopAt, tiny_model

from vggfast.recipes import RecipeError, warm_start
from vggfast.recipes.predict import default_scales, default_size, open_model, predict
from vggfast.recipes.train import TrainConfig, _start, fit
from vggfast.recipes.views import Views

FIRST = "features.0.weight"
CHANGED = {
    "no axes": {FIRST: torch.tensor(1.0)},
    "a filter without pixels": {FIRST: torch.zeros(4, 3, 0, 0)},
    "a filter that is no square": {FIRST: torch.zeros(4, 3, 3, 5)},
    "no channels": {FIRST: torch.zeros(4, 0, 3, 3)},
    "complex": {FIRST: torch.zeros(4, 3, 3, 3, dtype=torch.complex64)},
    "sparse": {FIRST: torch.zeros(4, 3, 3, 3).to_sparse()},
    "no data": {FIRST: torch.zeros(4, 3, 3, 3, device="meta")},
    "a vector for a matrix": {"classifier.0.weight": torch.zeros(16)},
}
KERAS = {
    "a bias alone": {"block1_conv1.bias": torch.zeros(8)},
    "no channels": {"block1_conv1.kernel": torch.zeros(3, 3, 3, 0), "fc1.kernel": torch.zeros(7, 7)},
}


@pytest.mark.parametrize(
    "state", [*({**narrow_vgg().state_dict(), **change} for change in CHANGED.values()), *KERAS.values()],
    ids=[*CHANGED, *(f"Keras: {what}" for what in KERAS)],
)  # fmt: skip
def test_weights_of_other_shapes_and_kinds(tmp_path, state):
    path = str(tmp_path / "x.pth")
    torch.save(state, path)
    model = narrow_vgg()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for use in (open_model, lambda path: _start(model, TrainConfig.recipe("digits", weights=path))):
        with pytest.raises(RecipeError):
            use(path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with suppress(RecipeError):  # what fits may be taken over
        warm_start.apply(model, path)


@pytest.mark.parametrize(
    "said",
    [{"size": 10**9}, {"size": -5}, {"size": 64, "scale": 10**30}, {"size": True},
     {"mean": [10**400] * 3, "std": [1, 1, 1]}, {"mean": [float("nan")] * 3, "std": [1, 1, 1]}, {"mean": [0, 0, 0], "std": [1, 0, 1]}],
)  # fmt: skip
def test_preprocessing_that_cannot_be_is_left_out(tmp_path, said):
    save_file(narrow_vgg().state_dict(), tmp_path / "x.safetensors", {"preprocessing": json.dumps(said)})
    model = open_model(tmp_path / "x.safetensors")
    assert (model.size or 64, model.scale, model.normalisation_known) == (64, None, False)
    views = Views(size=default_size([model], 64), scales=default_scales([model], 64))
    (found,) = predict([torch.rand(3, 70, 80)], [model], views)
    assert sum(answer.probability for answer in found.answers) == pytest.approx(1, abs=0.5)


def go_on(output: str) -> None:
    fit(TrainConfig.resumed(output), resume=True, model=tiny_model(3))


def test_a_checkpoint_that_was_changed_inside(tmp_path):
    config = TrainConfig.recipe("fake", limit=8, batch_size=4, epochs=2, output=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        fit(config, model=tiny_model(3), listener=StopAt(1, 1))
    path = tmp_path / "checkpoint.pt"
    good = torch.load(path, weights_only=True)
    changes = [
        *({name: 5} for name in ("config", "progress", "history", "model", "optimizer", "schedule")),
        *({"config": {**good["config"], name: [3]}} for name in ("data", "epochs", "scale", "unknown")),
        {"config": {**good["config"], "batch_size": 2.5}},
        {"history": [{"accuracy": 1}]},
        {"optimizer": {"state": {}, "param_groups": []}},
        *(
            {"progress": {**good["progress"], **wrong}}
            for wrong in ({"epoch": "x"}, {"epoch": 99}, {"step": -1}, {"sums": 3})
        ),
    ]
    for change in changes:
        torch.save({**good, **change}, path)
        with pytest.raises(RecipeError):
            go_on(str(tmp_path))
