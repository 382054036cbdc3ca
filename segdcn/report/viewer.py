"""What the viewer of a page needs of each image: where each layer samples, and receptive fields of a few pixels.

The page follows the taps itself, for any pixel that is clicked, as ``segdcn.analysis.trace`` does. Receptive fields
take a run of the network each, so they are made here for a grid of pixels.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segdcn.analysis import LayerCall, aggregates, chain, effective_receptive_field, last_layers, record
from segdcn.data.dataset import Sample
from segdcn.drawing.panels import central_pixels
from segdcn.models import plain_twin, sampling_layers
from segdcn.models.cost import network_cost
from segdcn.report import pictures
from segdcn.report.images import Image, OpenedRun

DEPTH = 3  # 9, 81, 729 points
FIELD_RUNS = 3  # a receptive field is a run forward and about two backward
# a grid of fewer pixels than MIN_FIELDS shows nothing
MIN_FIELDS, MAX_FIELDS = 6, 49
VIEWER_BYTES = 7_500_000  # of a page's ten million; the pictures of the rest of the page take far less than the rest


class Pane(NamedTuple):
    """A network that the viewer shows.

    run: whose images it is given.  predicts: a network without the offsets it was trained with was never meant to.
    regular: whether its layers are shown without their offsets.
    """

    name: str
    network: nn.Module
    run: OpenedRun
    predicts: bool = True
    regular: bool = False


def viewer(runs: Sequence[OpenedRun], images: Sequence[Image], budget: float) -> dict[str, Any]:
    """What the viewer shows; images that would make the page too large are left out and counted.

    Of one run with deformable layers its own points are beside those of the same layers without offsets; of several
    the first run's are beside another's.

    budget: floating point operations of all receptive fields.
    """
    first = runs[0]
    panes = [Pane(run.name, run.predictor.network, run) for run in runs]
    lead = "Both networks see the same image and the same pixel."
    if len(runs) == 1:
        network = first.predictor.network
        lead = "This network has no deformable layers, so that its points form the regular grid."
        if sampling_layers(network):
            lead = (
                "On the left with the offsets that were learned, on the right on the regular grid of the same layers."
            )
            panes = [
                Pane("learned offsets", network, first),
                Pane("the same layers, without offsets", plain_twin(network), first, predicts=False, regular=True),
            ]
    height, width = images[0].sample.label.shape
    pairs = len(images) * len(panes)
    fields = min(fields_per_image(pane.network, (height, width), pairs, budget) for pane in panes)
    if len(runs) == 1 and aggregates(first.predictor.network):
        fields = 0  # there is no such network without its offsets, to run it
    try:
        shown = _entries(panes, images, fields)
    except Exception:
        if not fields:
            raise
        fields = 0  # of a network without gradients
        shown = _entries(panes, images, fields)
    followed = [network["layers"] for _, entry in shown for network in entry["networks"]]
    groups = max((layer["groups"] for layers in followed for layer in layers), default=1)
    return {
        "data": {
            "images": [entry for _, entry in shown],
            "panes": [0, 1] if len(panes) > 1 else [0],
            "classes": list(first.predictor.class_names),
            "palette": [list(colour) for colour in first.predictor.palette],
        },
        "images": [
            {"thumbnail": pictures.thumbnail(image.sample.image), "name": image.sample.name, "why": image.why}
            for image, _ in shown
        ],
        "depth": min(max(map(len, followed), default=0), DEPTH),
        "fields": fields,
        "panes": [pane.name for pane in panes[:2]],
        "others": [(number, pane.name) for number, pane in enumerate(panes) if number > 0],
        "lead": lead,
        "fine": _fine_print(fields, groups, len(images) - len(shown)),
    }


def _entries(panes: Sequence[Pane], images: Sequence[Image], fields: int) -> list[tuple[Image, dict[str, Any]]]:
    """What the page's script is given of the images, of as many as a page holds."""
    entries, total = [], 0
    for image in images:
        sample = image.sample
        start = _start(sample)
        entry = {
            "name": sample.name,
            "height": sample.label.shape[0],
            "width": sample.label.shape[1],
            "photo": pictures.photograph(sample.image),
            "truth": pictures.labels(sample.label, panes[0].run.predictor.palette),
            "start": start,
            "networks": [
                {
                    **view(pane.network, pane.run.predictor.batch(sample.image), fields, start, pane.regular),
                    "prediction": _prediction(pane.run, sample) if pane.predicts else None,
                }
                for pane in panes
            ],
        }
        size = len(json.dumps(entry))
        if total + size <= VIEWER_BYTES:
            total += size
            entries.append((image, entry))
    return entries


def _prediction(run: OpenedRun, sample: Sample) -> str:
    return pictures.labels(run.predictor(sample.image).labels, run.predictor.palette)


def _start(sample: Sample) -> tuple[int, int]:
    """The pixel deepest inside the object: of the largest class but the most frequent one, where there are two."""
    pixels = central_pixels(sample.label, 2)
    return pixels[-1] if pixels else (sample.label.shape[0] // 2, sample.label.shape[1] // 2)


def _fine_print(fields: int, groups: int, left_out: int) -> str:
    parts = [
        "The receptive field is the gradient, by the image, of the class predicted at a pixel (Luo et al. 2016),"
        f" smoothed a little and scaled by its own maximum; {fields} pixels of each image have one."
        if fields
        else "Receptive fields would take too long here, or the network has none, and were left out."
    ]
    if groups > 1:
        parts.append(f"The points are those of the first of {groups} offset groups.")
    if left_out:
        parts.append(f"{left_out} more image{'' if left_out == 1 else 's'} would have made this file too large.")
    return " ".join(parts)


def fields_per_image(network: nn.Module, size: tuple[int, int], maps: int, budget: float) -> int:
    """How many receptive fields each of ``maps`` pairs of an image and a network gets; 0 where they cost too much.

    budget: floating point operations of all of them.
    """
    flops = network_cost(network, size)["flops"]
    if flops is None:
        return 0
    affordable = int(budget / (FIELD_RUNS * flops * max(1, maps)))
    return min(affordable, MAX_FIELDS) if affordable >= MIN_FIELDS else 0


def pixel_grid(size: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """At most ``count`` pixels (row, column) in the centres of equal cells that are about as wide as high."""
    height, width = size
    rows = max(1, min(count, height, round(math.sqrt(count * height / width))))
    columns = max(1, min(count // rows, width))
    return [
        (int((row + 0.5) * height / rows), int((column + 0.5) * width / columns))
        for row in range(rows)
        for column in range(columns)
    ]


def view(
    network: nn.Module, image: Tensor, fields: int, start: tuple[int, int], regular: bool = False
) -> dict[str, Any]:
    """A network on an image, for the viewer: ``layers`` (last first) and ``fields`` (None without).

    Args:
        network: in evaluation mode.
        image: (1, 3, H, W), normalised.
        fields: how many receptive fields: of the pixel ``start``, and of a grid.
        regular: tell of the layers without their offsets.
    """
    size = (image.shape[2], image.shape[3])
    calls = record(network, image, last_layers(network, DEPTH))
    atlas = None
    if fields:
        pixels = [start, *pixel_grid(size, fields - 1)]
        found = effective_receptive_field(network, image, pixels).numpy()
        atlas = {**pictures.field_atlas(found), "pixels": pixels}
    followed = [call.undeformed() if regular else call for call in chain(calls[-DEPTH:])]
    return {"layers": [_layer(call) for call in followed], "fields": atlas}


def _layer(call: LayerCall) -> dict[str, Any]:
    return {
        "name": call.name,
        "input": list(call.input_size),
        "output": list(call.output_size),
        "kernel": list(call.kernel_size),
        "stride": list(call.stride),
        "padding": list(call.padding),
        "dilation": list(call.dilation),
        "groups": call.taps.shape[1],
        # (K, 2, Ho, Wo), little-endian float32, of the first offset group; the page knows the regular grid itself
        "taps": _base64(call.taps[0, 0]) if call.deformable else None,
    }


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()).decode("ascii")
