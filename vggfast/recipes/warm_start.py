"""The paper's start of a deep network from a trained shallow one (arXiv 1409.1556, section 3.1)."""

import torch
from torch import Tensor, nn

import vggfast.models
from vggfast.recipes import RecipeError
from vggfast.weights import read_checkpoint

CONVOLUTIONS = 4  # of the shallow network that are taken over, from the first on
SHALLOW = ("vgg11", "vgg11_bn", "vgg11_lrn")  # configuration A in its forms


def apply(model: nn.Module, path: str) -> str:
    """Copy into `model` the first four convolutions and the fully connected layers of configuration A in `path`.

    Each goes to the layer of its name in the paper: conv1_1, conv2_1, conv3_1, conv3_2 and fc6, fc7, fc8; a BatchNorm
    behind such a convolution goes with it where both networks have one. `path` is a checkpoint.pt, a .safetensors or
    .pth file. What has another shape keeps its random values; the report names it.

    Raises RecipeError where `path` cannot be read, or holds another network.
    """
    try:
        state = read_checkpoint(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"warm start: {error}") from error
    source = _shallow_layers(state, path)
    target = layers_of(model)
    chosen = [name for name in source if name.startswith("conv") and not name.endswith(".bn")][:CONVOLUTIONS]
    chosen += [name for name in source if name.startswith("fc")]
    own = model.state_dict()
    copied, refused = [], []
    for name in chosen:
        for part in (name, f"{name}.bn"):
            if part not in source:
                continue
            if part not in target:
                refused.append(f"{part} (no such layer here)")
                continue
            entries = {
                target[part] + key.removeprefix(source[part]): value
                for key, value in state.items()
                if key.startswith(source[part])
            }
            wrong = [key for key, value in entries.items() if key not in own or own[key].shape != value.shape]
            if wrong:
                expected, got = (list(tensors[wrong[0]].shape) for tensors in (own, entries))
                refused.append(f"{part} ({wrong[0]}: expected {expected}, got {got})")
                continue
            model.load_state_dict(entries, strict=False)
            copied.append(part)
    if not copied:
        raise RecipeError(f"warm start: nothing in {path} fits {type(model).__name__}: {'; '.join(refused)}")
    kept = f"; left at random, because they do not fit: {'; '.join(refused)}" if refused else ""
    return f"warm start from {path}: {', '.join(copied)}{kept}"


def layers_of(model: nn.Module) -> dict[str, str]:
    """Prefixes of the state_dict's keys by the paper's names: conv1_1, with its BatchNorm as conv1_1.bn, …, fc6 to fc8."""
    names: dict[str, str] = {}
    block, number, latest = 1, 0, ""
    features, classifier = (getattr(model, part, None) for part in ("features", "classifier"))
    for index, layer in features.named_children() if isinstance(features, nn.Sequential) else ():
        if isinstance(layer, nn.MaxPool2d):
            block, number = block + 1, 0
        elif isinstance(layer, nn.Conv2d):
            number += 1
            latest = f"conv{block}_{number}"
            names[latest] = f"features.{index}."
        elif isinstance(layer, nn.BatchNorm2d):
            names[f"{latest}.bn"] = f"features.{index}."
    linear = [i for i, layer in classifier.named_children() if isinstance(layer, nn.Linear)] if classifier else []
    return names | {f"fc{6 + order}": f"classifier.{index}." for order, index in enumerate(linear)}


def _shallow_layers(state: dict[str, Tensor], path: str) -> dict[str, str]:
    features = {key for key in state if key.startswith("features.")}
    for name in SHALLOW:
        with torch.device("meta"):
            shallow = getattr(vggfast.models, name)(init_weights=False)
        if features == {key for key in shallow.state_dict() if key.startswith("features.")}:
            return layers_of(shallow)
    raise RecipeError(
        f"warm start: {path} holds no network of configuration A: expected the weights of {', '.join(SHALLOW)}, "
        f"got {', '.join(sorted(state)[:4])}, …"
    )
