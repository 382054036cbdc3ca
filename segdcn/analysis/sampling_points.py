"""Where stacked layers look: the sampling points of the paper's Figure 6. Legend: H x W pixels, M points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segdcn.analysis.layers import LayerCall, record
from segdcn.errors import UserError


def sampling_points(
    network: nn.Module, image: Tensor, pixels: Sequence[tuple[int, int]], layers: int = 3
) -> list[list[Tensor]]:
    """The points of the image that the last deformable layers sample for a few chosen pixels.

    A network without deformable layers is followed through its last three 3x3 convolutions; see ``trace``.

    Args:
        network: in evaluation mode.
        image: (1, 3, H, W), normalised as in training.
        pixels: (row, col) of the chosen pixels in the image.
        layers: how many layers to chain at most.

    Returns:
        for each pixel the points after one layer, after two, and so on.

    Raises:
        ValueError: no 3x3 layer, network in training mode, pixel outside the image, wrong shape.
    """
    if image.ndim != 4 or len(image) != 1:
        raise UserError(f"sampling_points needs one image (1, 3, H, W), got {tuple(image.shape)}")
    if layers < 1:
        raise UserError(f"layers must be at least 1, got {layers}")
    calls = record(network, image)[-layers:]
    return [trace(calls, pixel, (image.shape[2], image.shape[3])) for pixel in pixels]


def trace(calls: Sequence[LayerCall], pixel: tuple[int, int], image_size: tuple[int, int]) -> list[Tensor]:
    """The points of the image that a chain of layers samples for one pixel, layer by layer from the last.

    Source: Dai et al. 2017, Figure 6. The unit over the pixel is followed through its kernel taps, from the last
    layer back: three 3x3 layers give 9, 81 and 9^3 = 729 points. A tap continues from the cell nearest to it
    (half to even), with the offsets predicted there. A tap outside the map samples nothing: it stays in the list as
    one point and is not expanded further. Only layers that follow each other at one resolution are chained; the
    chain ends where the map size changes. Of several images and offset groups the first is shown.

    Args:
        calls: what ``record`` returned, in the order of the run.
        pixel: (row, col) in the image.
        image_size: (H, W).

    Returns:
        float32 (M, 2) of (y, x) in image pixels, points outside included, for each layer of the chain.

    Raises:
        ValueError: the pixel lies outside the image.
    """
    row, col = pixel
    height, width = image_size
    if not (0 <= row < height and 0 <= col < width):
        raise UserError(f"pixel (row {row}, col {col}) lies outside the image of {height} x {width} pixels")
    layers = chain(calls)
    points = _rescale(torch.tensor([pixel]), image_size, layers[0].output_size).round()  # the unit over the pixel
    depths = []
    for call in layers:
        points = _expand(points, call)
        depths.append(_rescale(points, call.input_size, image_size))
    return depths


def chain(calls: Sequence[LayerCall]) -> list[LayerCall]:
    """The calls, last first, as far as each one's output has the size of the next one's input."""
    found = [calls[-1]]
    for call in reversed(calls[:-1]):
        if call.output_size != found[-1].input_size:
            break
        found.append(call)
    return found


def _expand(points: Tensor, call: LayerCall) -> Tensor:
    """Points in the layer's output map (M, 2) -> the points that it samples in its input map (M', 2)."""
    cells = points.round()
    inside = ((cells >= 0) & (cells < torch.tensor(call.output_size))).all(dim=1)
    rows, columns = cells[inside].long().unbind(dim=1)
    sampled = call.taps[0, 0][:, :, rows, columns].permute(2, 0, 1).flatten(0, 1)  # (M_inside * kh * kw, 2)
    return torch.cat([sampled, _rescale(points[~inside], call.output_size, call.input_size)])


def _rescale(points: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Points (M, 2) on a map of another size; a pixel's centre has the integer coordinate."""
    return (points + 0.5) * (torch.tensor(new_size) / torch.tensor(old_size)) - 0.5
