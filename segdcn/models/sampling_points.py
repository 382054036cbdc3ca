"""Where stacked deformable layers look: the sampling points of the paper's Figure 6."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segdcn.ops import DeformConv2d, kernel_points


@dataclass
class _LayerCall:
    """One pass through a deformable layer: where each cell of its output map samples its input map."""

    taps: Tensor  # (kh * kw, 2, H_out, W_out), (y, x) in pixels of the input map
    input_size: tuple[int, int]

    @property
    def output_size(self) -> tuple[int, int]:
        return self.taps.shape[2], self.taps.shape[3]


def sampling_points(network: nn.Module, image: Tensor, pixels: list[tuple[int, int]], layers: int = 3) -> list[Tensor]:
    """The points of the image that the last deformable layers sample for a few chosen pixels.

    Source: Dai et al. 2017, Figure 6. The unit over the pixel is followed through its kernel taps, from the
    last deformable layer back through at most ``layers`` of them: three 3x3 layers give 9^3 = 729 points. A
    tap continues from the cell nearest to it, with the offsets predicted there. A tap outside the map samples
    nothing: it stays in the list as one point and is not expanded further. Only layers that follow each other
    at one resolution are chained; the chain ends where the map size changes. Of several offset groups the
    first is shown.

    Args:
        network: a network in evaluation mode that holds DeformConv2d layers.
        image: (1, 3, H, W), normalised as in training.
        pixels: (row, col) of the chosen pixels in the image.
        layers: how many deformable layers to chain at most.

    Returns:
        for each pixel a float tensor (M, 2) of (y, x) in image pixels, on the CPU, points outside included.

    Raises:
        ValueError: no deformable layer, network in training mode, pixel outside the image, wrong shape.
    """
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(f"sampling_points needs one image (1, 3, H, W), got {tuple(image.shape)}")
    if network.training:
        raise ValueError("sampling_points needs network.eval(): in training mode it would change the statistics")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    height, width = image.shape[2:]
    for row, col in pixels:
        if not (0 <= row < height and 0 <= col < width):
            raise ValueError(f"pixel (row {row}, col {col}) lies outside the image of {height} x {width} pixels")

    chain = _last_chain(_record_calls(network, image), layers)
    result = []
    for pixel in pixels:
        unit = _rescale(torch.tensor([pixel]), (height, width), chain[0].output_size)
        points = unit.round()  # the unit over the pixel
        for call in chain:
            points = _expand(points, call)
        result.append(_rescale(points, chain[-1].input_size, (height, width)))
    return result


def _record_calls(network: nn.Module, image: Tensor) -> list[_LayerCall]:
    """Run the network once; the calls of its deformable layers in the order of the run."""
    calls: list[_LayerCall] = []

    def record(layer: DeformConv2d, inputs: tuple[Tensor, ...], predicted: Tensor) -> None:
        offset, _ = layer.split_branch(predicted)
        y, x = kernel_points(offset, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        taps = torch.stack((y[0, 0], x[0, 0]), dim=1)  # of image 0, offset group 0
        calls.append(_LayerCall(taps.float().cpu(), (inputs[0].shape[2], inputs[0].shape[3])))

    hooks = [
        module.offset.register_forward_hook(
            lambda _branch, inputs, predicted, layer=module: record(layer, inputs, predicted)
        )
        for module in network.modules()
        if isinstance(module, DeformConv2d)
    ]
    if not hooks:
        raise ValueError("the network has no deformable layers, so there are no sampling points to show")
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _last_chain(calls: list[_LayerCall], layers: int) -> list[_LayerCall]:
    """The last calls, last first, as far as each one's output has the size of the next one's input."""
    chain = [calls[-1]]
    for call in reversed(calls[-layers:-1]):
        if call.output_size != chain[-1].input_size:
            break
        chain.append(call)
    return chain


def _expand(points: Tensor, call: _LayerCall) -> Tensor:
    """Points in the layer's output map (M, 2) -> the points that it samples in its input map (M', 2)."""
    cells = points.round()
    inside = ((cells >= 0) & (cells < torch.tensor(call.output_size))).all(dim=1)
    rows, columns = cells[inside].long().unbind(dim=1)
    sampled = call.taps[:, :, rows, columns].permute(2, 0, 1).flatten(0, 1)  # (M_inside * kh * kw, 2)
    return torch.cat([sampled, _rescale(points[~inside], call.output_size, call.input_size)])


def _rescale(points: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Points (M, 2) on a map of another size; a pixel's centre has the integer coordinate."""
    return (points + 0.5) * (torch.tensor(new_size) / torch.tensor(old_size)) - 0.5
