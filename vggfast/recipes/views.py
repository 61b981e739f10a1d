"""What a network is shown of an image, and how its answers are averaged (arXiv 1409.1556, sections 3.2 and 4.2 to 4.4)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vggfast.dense import to_dense
from vggfast.loading import LoadedModel
from vggfast.preprocessing import Normalisation, rescale, unit_range
from vggfast.recipes import RecipeError

Crops = Literal["none", "center", "grid"]
GRID = 5  # crops of a scale lie on a regular grid of so many by so many


class View(NamedTuple):
    """One tensor that a network is given, and the part that its answer has in the image's."""

    pixels: Tensor  # [C, H, W]
    dense: bool
    weight: float


@dataclass(frozen=True)
class Views:
    """Which views of an image are classified.

    Args:
        size: height and width of the crops, in pixels.
        scales: lengths Q of the shorter edge that the image is rescaled to, in turn; None is the usual one, 256 for
            crops of 224 and in proportion for others.
        dense: the whole rescaled image, through the fully convolutional network (`vggfast.to_dense`).
        crops: "center" for the central crop, "grid" for 5x5 crops from border to border, or "none".
        flip: each view mirrored, too.

    Raises RecipeError where no view is left, or a scale is smaller than what is cropped from it.
    """

    size: int = 224
    scales: tuple[int, ...] | None = None
    dense: bool = False
    crops: Crops = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 32:
            raise RecipeError(f"size: expected at least 32 pixels, which VGG halves five times, got {self.size}")
        if self.scales is None:
            object.__setattr__(self, "scales", (self.size * 256 // 224,))
        if not self.scales:
            raise RecipeError("scales: expected at least one length of the shorter edge, got none")
        least = self.size if self.crops != "none" else 32
        if min(self.scales) < least:
            raise RecipeError(f"scales: expected none below {least} pixels, the size of a crop, got {self.scales}")
        if self.crops not in ("none", "center", "grid"):
            raise RecipeError(f"crops: expected none, center or grid, got {self.crops!r}")
        if self.crops == "none" and not self.dense:
            raise RecipeError("crops: expected center or grid, or dense evaluation, got neither")

    @property
    def count(self) -> int:
        """Views of one image."""
        kinds = {"none": 0, "center": 1, "grid": GRID * GRID}[self.crops] + self.dense
        return kinds * len(self.scales or ()) * (1 + self.flip)

    def of(self, image: Any) -> Iterator[View]:
        """The views of a PIL image or a tensor [C, H, W]: floats, from integers in [0, 1].

        Dense evaluation and crops have the same part in the answer, and all views of either (section 4.3).
        """
        scales = self.scales or ()
        kinds = self.dense + (self.crops != "none")
        for scale in scales:
            whole = unit_range(rescale(image, scale))
            shown = [(whole, True)] if self.dense else []
            shown += [(crop, False) for crop in self._crops(whole)]
            for pixels, dense in shown:
                of_its_kind = 1 if dense or self.crops == "center" else GRID * GRID
                weight = 1 / (kinds * of_its_kind * len(scales) * (1 + self.flip))
                yield View(pixels, dense, weight)
                if self.flip:
                    yield View(pixels.flip(-1), dense, weight)

    def _crops(self, whole: Tensor) -> Iterator[Tensor]:
        """Those of the rescaled image [C, H, W]."""
        rows, columns = (length - self.size for length in whole.shape[1:])
        if self.crops == "center":
            yield self._crop(whole, round(rows / 2), round(columns / 2))  # as torchvision rounds
        elif self.crops == "grid":
            for row in range(GRID):
                for column in range(GRID):
                    yield self._crop(whole, round(row * rows / (GRID - 1)), round(column * columns / (GRID - 1)))

    def _crop(self, whole: Tensor, top: int, left: int) -> Tensor:
        return whole[:, top : top + self.size, left : left + self.size]

    def __str__(self) -> str:
        crops = {
            "none": [],
            "center": [f"central crop of {self.size}"],
            "grid": [f"{GRID}x{GRID} crops of {self.size}"],
        }
        kinds = (["dense"] if self.dense else []) + crops[self.crops]
        scales = ", ".join(map(str, self.scales or ()))
        return (
            f"{' and '.join(kinds)}, shorter edge {scales}{', flipped too' if self.flip else ''}: {self.count} an image"
        )


class Classifier:
    """Models and views: images in, class probabilities out.

    The scores of a view become probabilities by softmax, for dense evaluation after the map of scores was averaged over
    its positions; probabilities are averaged over flips, crops and scales, then over the models (section 4.4).

    Args:
        models: what `vggfast.load_model` returns, or networks from [N, C, H, W] to [N, classes] with ImageNet's
            normalisation, in the dtype that they compute in; put into evaluation mode, and onto `device`.
        views: what each is shown.
        batch_size: crops that a network is given at a time; of larger views, fewer.
        autocast: dtype of mixed precision; None for none.
        normalised: the images are tensors that are normalised already.
        assumed: how images are normalised for a network whose checkpoint does not say; None is ImageNet's.

    Raises RecipeError for models that do not give the same number of scores, or are no VGG where `views.dense`.
    """

    def __init__(
        self,
        models: Sequence[LoadedModel | nn.Module],
        views: Views,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        autocast: torch.dtype | None = None,
        normalised: bool = False,
        assumed: Normalisation | None = None,
    ) -> None:
        self.views, self.device, self.batch_size, self.autocast = views, torch.device(device), batch_size, autocast
        self._members = [_Member(model, views, self.device, normalised, assumed) for model in models]
        if not self._members:
            raise RecipeError("models: expected at least one, got none")

    @torch.no_grad()
    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Probabilities [N, classes] in float64, on the CPU, of PIL images or tensors [C, H, W] of any sizes.

        Tensors are of integers (full range) or of floats in [0, 1]. Raises RecipeError where a network's answer is not
        finite.
        """
        answers = [self._answer(member, images) for member in self._members]
        if len({answer.shape for answer in answers}) > 1:
            counts = ", ".join(str(answer.shape[1]) for answer in answers)
            raise RecipeError(f"models: expected the same number of classes in each of an ensemble, got {counts}")
        return torch.stack(answers).mean(0)

    def _answer(self, member: "_Member", images: Sequence[Any]) -> Tensor:
        """The network's probabilities [N, classes]; views of one shape are classified together, whatever their image."""
        waiting: dict[tuple[bool, torch.Size], list[tuple[int, View]]] = {}
        parts: list[tuple[Tensor, Tensor]] = []  # which images, and what is to be added to their probabilities

        def classify(group: list[tuple[int, View]]) -> None:
            weights = torch.tensor([[view.weight] for _, view in group], dtype=torch.float64)
            pixels = torch.stack([view.pixels for _, view in group])
            probabilities = self._probabilities(member, pixels, group[0][1].dense)
            parts.append((torch.tensor([index for index, _ in group]), weights * probabilities))

        for index, image in enumerate(images):
            for view in self.views.of(member.prepare(image)):
                group = waiting.setdefault((view.dense, view.pixels.shape), [])
                group.append((index, view))
                if len(group) * view.pixels[0].numel() >= self.batch_size * self.views.size**2:
                    classify(group)
                    group.clear()
        for group in filter(None, waiting.values()):
            classify(group)
        answer = torch.zeros(len(images), parts[0][1].shape[1], dtype=torch.float64)
        for indices, probabilities in parts:
            answer.index_add_(0, indices, probabilities)
        return answer

    def _probabilities(self, member: "_Member", pixels: Tensor, dense: bool) -> Tensor:
        """Softmax of the scores of views [N, C, H, W]."""
        pixels = member.normalise(pixels.to(self.device))
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            scores: Tensor = member.dense(pixels).mean((2, 3)) if dense and member.dense else member.network(pixels)
        probabilities = scores.double().softmax(1).cpu()
        if not probabilities.isfinite().all():
            raise RecipeError("the network's scores are not finite: are its weights? Try without mixed precision")
        return probabilities


class _Member:
    """One network of an ensemble."""

    def __init__(
        self,
        model: LoadedModel | nn.Module,
        views: Views,
        device: torch.device,
        normalised: bool,
        assumed: Normalisation | None,
    ) -> None:
        network = model.model if isinstance(model, LoadedModel) else model
        self.network = network.to(device).eval()
        self.normalisation = assumed or Normalisation()
        if isinstance(model, LoadedModel) and (model.normalisation_known or assumed is None):
            self.normalisation = model.normalisation
        self.normalised = normalised
        weight = next((parameter for parameter in network.parameters() if parameter.ndim == 4), None)
        if weight is None:
            raise RecipeError(f"model: expected a convolutional network, got {type(network).__name__}")
        self.dtype, self.channels = weight.dtype, weight.shape[1]
        try:
            self.dense = to_dense(network, views.size) if views.dense else None
        except (TypeError, ValueError) as error:
            raise RecipeError(f"dense evaluation: {error}") from error

    def prepare(self, image: Any) -> Any:
        """The image with the channels that the network takes."""
        if not isinstance(image, Tensor):
            if self.channels not in (1, 3):
                raise RecipeError(f"the network takes {self.channels} channels: expected 1 or 3, as image files have")
            mode = "L" if self.channels == 1 else "RGB"
            return image if image.mode == mode else image.convert(mode)
        if image.ndim != 3 or image.shape[0] != self.channels:
            raise RecipeError(f"image: expected [{self.channels}, H, W], as the network takes, got {list(image.shape)}")
        return image

    def normalise(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        pixels = pixels if self.normalised else self.normalisation(pixels)
        return pixels.to(self.dtype, memory_format=torch.channels_last)
