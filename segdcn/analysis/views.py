"""What a network samples for a few pixels of an image, as values and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from segdcn.analysis.layers import last_layers, record
from segdcn.analysis.sampling_points import trace
from segdcn.data.dataset import Sample
from segdcn.drawing.panels import central_pixels
from segdcn.inference.predictor import Predictor

Pixel = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class View:
    """An image and where the network samples it, for a few pixels.

    layers: their names, the last first; none of a network whose sampling cannot be followed.
    points: for each pixel those after one layer, two, ...; regular: those of all layers without offsets, or none.
    """

    sample: Sample
    tensor: Tensor
    pixels: list[Pixel]
    layers: list[str]
    points: list[list[NDArray[Any]]]
    regular: list[NDArray[Any]]

    def summary(self) -> dict[str, Any]:
        """Of all that is asked about the image, without the points."""
        size = list(self.sample.image.shape[:2])
        pixels = [list(pixel) for pixel in self.pixels]
        return {"image": self.sample.name, "size": size, "layers": self.layers, "pixels": pixels}

    def described(self) -> dict[str, Any]:
        """For sampling_N.json."""
        pixels = [
            {"pixel": list(pixel), "points": [[[round(y, 3), round(x, 3)] for y, x in d.tolist()] for d in depths]}
            for pixel, depths in zip(self.pixels, self.points, strict=True)
        ]
        return {**self.summary(), "pixels": pixels}


def view(predictor: Predictor, sample: Sample, pixels: Sequence[Pixel]) -> View:
    """Where a network samples an image for pixels, or for the middle of its three most frequent classes.

    pixels: (row, column); none are chosen by the labels, or where there are none by what the network sees.
    """
    image = predictor.batch(sample.image)
    size = (image.shape[2], image.shape[3])
    chosen = list(pixels) or central_pixels(sample.label)
    if not chosen:  # a benchmark's test split has no labels
        chosen = central_pixels(predictor(sample.image).labels)
    calls = record(predictor.network, image)[-3:] if last_layers(predictor.network) else []
    points = [[depth.numpy() for depth in trace(calls, pixel, size)] if calls else [] for pixel in chosen]
    regular: list[Any] = []
    if any(call.deformable for call in calls):
        undeformed = [call.undeformed() for call in calls]
        regular = [trace(undeformed, pixel, size)[-1].numpy() for pixel in chosen]
    return View(sample, image, chosen, [call.name for call in reversed(calls)], points, regular)
