"""A network applied to images of any size.

Legend: K classes, H x W pixels.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from segdcn.data import decoding
from segdcn.data.dataset import file_errors
from segdcn.data.transforms import EvalTransform
from segdcn.drawing.panels import overlay
from segdcn.errors import UserError, is_out_of_memory
from segdcn.inference.devices import free_memory
from segdcn.inference.photographs import TAKEN, Array, Photo, as_rgb, read_photo, tensor_pixels
from segdcn.inference.windows import Inference, slide_classes
from segdcn.models.folding import folded

# Up to so many pixels an image is seen whole, whatever memory there is; no window of its own choice is smaller.
SMALL_SIDE = 512
PROBE_SIDE = 128
# Peak memory of a run over the largest inputs and outputs of one module, which the operators' own buffers and the
# maps that wait for the head exceed: measured 2.8 (resnet_tiny) to 3.2 (resnet50, mobilenet_v2).
MEMORY_FACTOR = 4


@dataclass
class Prediction:
    """What a network sees in one image.

    image: uint8 (H, W, 3) RGB, as the network saw it: upright, without alpha.
    labels: uint8 (H, W), 0..K-1.
    class_names, palette: K names, K RGB colours.
    inference: how the network was applied, in words.
    """

    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    class_names: Sequence[str]
    palette: Sequence[Sequence[int]]
    inference: str
    _compute: Callable[[], npt.NDArray[np.float32]] = field(repr=False)

    @cached_property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """float32 (K, H, W), softmax of the logits.

        They take 4·K bytes a pixel, so that they are not kept unless ``predictor(..., probabilities=True)`` asked for
        them: the network is applied a second time when they are first looked at.
        """
        return self._compute()

    def overlay(self, alpha: float = 0.5, legend: str = "present") -> Image.Image:
        """The classes' colours over the image, with a legend; see ``segdcn.drawing.panels.overlay``."""
        return overlay(self.image, self.labels, self.class_names, self.palette, alpha, legend)

    def palette_image(self) -> Image.Image:
        """The labels as a palette image: a viewer shows the colours, numpy reads the class numbers."""
        picture = Image.fromarray(self.labels)
        picture.putpalette([value for colour in self.palette for value in colour])
        return picture


class Predictor:
    """Applies one network to images; called as ``predictor(image)``, see ``__call__``.

    Args:
        network: normalised images (1, 3, H, W) → logits (1, K, H, W).
        class_names, palette: K names, K RGB colours.
        transform: uint8 (H, W, 3) → float32 (3, H, W) by its ``image``.
        inference: scales, mirror images and windows. Without a window an image is seen whole as long as memory
            allows, and by windows as large as memory allows beyond.
        device: where the network is.
        max_pixels: the most pixels (of the scaled image) that are seen at once; None asks the device's free memory.
        bits: how many of a 16-bit image's bits are used, as in training; None is all 16.
    """

    def __init__(
        self,
        network: nn.Module,
        class_names: Sequence[str],
        palette: Sequence[Sequence[int]],
        transform: EvalTransform,
        inference: Inference | None = None,
        device: torch.device | None = None,
        max_pixels: int | None = None,
        bits: int | None = None,
    ) -> None:
        if max_pixels is not None and max_pixels < 1:
            raise UserError(f"max_pixels must be positive, got {max_pixels}")
        self.device = device or torch.device("cpu")
        self.network = network.to(self.device).eval()
        self.class_names, self.palette = list(class_names), [tuple(colour) for colour in palette]
        self.inference = inference or Inference()
        self.max_pixels = max_pixels
        self.transform = transform
        self.bits = bits

    @overload
    def __call__(self, image: Photo, probabilities: bool = False) -> Prediction: ...

    @overload
    def __call__(self, image: list[Photo], probabilities: bool = False) -> list[Prediction]: ...

    def __call__(self, image: Photo | list[Photo], probabilities: bool = False) -> Prediction | list[Prediction]:
        """Predict an image, or each one of a list.

        Args:
            image: a file's path; a PIL image; RGB, RGBA or grey pixels as an array, uint8 or uint16, of shape
                (H, W, 3), (H, W, 4), (H, W, 1) or (H, W); or as a tensor, uint8 of shape (3, H, W), (1, H, W) or
                (H, W), on any device. Alpha is dropped, 16 bits are scaled to 8, and files and PIL images are turned
                upright as their EXIF orientation asks. Images of a list may differ in kind and size: they are seen one
                by one.
            probabilities: keep the probabilities, instead of a second run when they are looked at.

        Raises:
            ValueError, FileNotFoundError: one line; a file that is no image, pixels of another kind, or not enough
                memory for the image.
        """
        if isinstance(image, list):
            return [self(one, probabilities) for one in image]
        pixels = self._pixels(image)
        inference = self._inference_for(*pixels.shape[:2])
        kept: npt.NDArray[np.float32] | None = None
        with torch.inference_mode(), _one_line_when_memory_ends(pixels):
            if not probabilities and inference.window is not None and inference.single_run:
                # normalised window by window: of the whole image that would take eight times its pixels
                stored = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device)
                windows = partial(self._normalised, folded(self.network, pixels.shape[:2]))
                classes = slide_classes(windows, stored, inference.window, inference.steps)
            else:
                logits = self._logits(pixels, inference, probabilities)
                classes = logits.argmax(dim=1).to(torch.uint8)
                kept = _softmax(logits) if probabilities else None
            labels = classes[0].cpu().numpy()

        def compute() -> npt.NDArray[np.float32]:
            if kept is not None:
                return kept
            with torch.inference_mode(), _one_line_when_memory_ends(pixels):
                return _softmax(self._logits(pixels, inference, probabilities=True))

        return Prediction(pixels, labels, self.class_names, self.palette, str(inference), compute)

    def _pixels(self, image: Photo) -> npt.NDArray[np.uint8]:
        """What was given as uint8 (H, W, 3)."""
        if isinstance(image, np.ndarray):
            return as_rgb(image, self.bits)
        if isinstance(image, Tensor):
            return as_rgb(tensor_pixels(image))
        if isinstance(image, Image.Image):
            with file_errors("the PIL image"):
                pixels = decoding.opened(image, self.bits)
            return as_rgb(pixels)
        if isinstance(image, str | os.PathLike):
            return read_photo(Path(image), self.bits)
        raise UserError(f"an image must be {TAKEN}, got {type(image).__name__}")

    def _normalised(self, network: nn.Module, windows: Tensor) -> Tensor:
        """A network's logits for stored pixels, uint8 (1, 3, H, W)."""
        pixels = np.ascontiguousarray(windows[0].permute(1, 2, 0).cpu().numpy())
        logits: Tensor = network(self.batch(pixels))
        return logits

    def _logits(self, pixels: npt.NDArray[np.uint8], inference: Inference, probabilities: bool) -> Tensor:
        """Logits (1, K, H, W) of the whole image at once; ValueError where they would not fit the memory."""
        height, width = pixels.shape[:2]
        if inference.window is not None:  # else the image is small enough
            maps = 1 + 2 * (not inference.single_run) + probabilities
            needed = height * width * (4 * maps * len(self.class_names) + 24 * max(1, *inference.scales) ** 2)
            free = free_memory(self.device)
            if needed > free:
                raise UserError(
                    f"too large: {width}×{height} pixels need about {needed / 1e9:.1f} GB for all classes' maps,"
                    f" {free / 1e9:.1f} GB are free: leave out probabilities, scales and flip"
                )
        logits: Tensor = inference(folded(self.network, (height, width)), self.batch(pixels))
        return logits

    def batch(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """Pixels as the network takes them: uint8 (H, W, 3) -> float32 (1, 3, H, W) on its device."""
        return self.transform.image(pixels)[None].to(self.device)

    def _inference_for(self, height: int, width: int) -> Inference:
        """With windows of our own choice where the image is too large to be seen whole and none are asked for."""
        pixels = height * width * max(self.inference.scales) ** 2
        if self.inference.window is not None or (self.max_pixels is None and pixels <= SMALL_SIDE**2):
            return self.inference
        limit = self.max_pixels or max(SMALL_SIDE**2, self._affordable_pixels())
        if pixels <= limit:
            return self.inference
        side = math.isqrt(limit)
        side -= side % 32 if side >= 64 else 0  # whole cells of every output stride
        return replace(self.inference, window=(side, side))

    def _affordable_pixels(self) -> int:
        """Pixels whose run takes half of the free memory: the other half is the image's own and its result's."""
        return int(free_memory(self.device) / 2 / self._bytes_per_pixel)

    @cached_property
    def _bytes_per_pixel(self) -> float:
        """Memory of a run, from the tensors that go through the modules for a small image."""
        largest = 0

        def measure(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal largest
            largest = max(largest, _bytes(inputs) + _bytes(output))

        hooks = [module.register_forward_hook(measure) for module in self.network.modules()]
        try:
            with torch.inference_mode():
                self.network(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, device=self.device))
        finally:
            for hook in hooks:
                hook.remove()
        return MEMORY_FACTOR * largest / PROBE_SIDE**2


def _bytes(values: Any) -> int:
    """Of all tensors in a module's inputs or outputs."""
    if isinstance(values, Tensor):
        return values.nbytes
    if isinstance(values, Mapping):  # torchvision's backbones
        return sum(map(_bytes, values.values()))
    if isinstance(values, Sequence) and not isinstance(values, str):
        return sum(map(_bytes, values))
    return 0


def _softmax(logits: Tensor) -> npt.NDArray[np.float32]:
    result: npt.NDArray[np.float32] = logits[0].float().softmax(dim=0).cpu().numpy()
    return result


@contextlib.contextmanager
def _one_line_when_memory_ends(pixels: Array) -> Iterator[None]:
    """torch's words for it differ by device and are many lines."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{pixels.shape[1]}×{pixels.shape[0]} pixels need more memory than there is: give a smaller window, such"
            " as inference.window=[512,512]"
        ) from error
