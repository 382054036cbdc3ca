"""The runs of a page with their networks and data: which images it looks at, and what their offsets do."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segdcn.analysis.offset_study import study_split
from segdcn.data.dataset import Sample, spread_over
from segdcn.errors import UserError, one_line
from segdcn.inference.devices import find_device
from segdcn.inference.predictor import Predictor
from segdcn.models import sampling_layers
from segdcn.models.cost import network_cost
from segdcn.report.runs import PageRun
from segdcn.report.tables import Colour
from segdcn.runs.checkpoint import Checkpoint, read_checkpoint
from segdcn.runs.record import RunRecord

GALLERY_IMAGES, VIEWER_IMAGES = 3, 5
FEWEST_STUDIED, MOST_STUDIED = 4, 64  # images for effective dilations


@dataclass(frozen=True)
class ImageOptions:
    """How the parts of a page are made that need networks and images.

    open_dataset: gives the data set of a checkpoint; an error, in one line, where it is not at hand.
    trust: whether networks and data sets other than segdcn's may be built.
    budget: floating point operations that receptive fields may take, and effective dilations as many again; by default
        those of a command of its own.
    """

    open_dataset: Callable[[Checkpoint], Any]
    trust: bool = False
    budget: float = 2500e9


@dataclass(frozen=True)
class OpenedRun(PageRun):
    """A run with its network, and the images of its split; ``dataset`` is the one the samples are of."""

    predictor: Predictor
    dataset: Any
    samples: Sequence[Sample]

    @property
    def colours(self) -> dict[str, Colour]:
        """Of each class."""
        names, palette = self.predictor.class_names, self.predictor.palette
        return {name: (red, green, blue) for name, (red, green, blue) in zip(names, palette, strict=True)}


@dataclass(frozen=True)
class Image:
    """One that the page looks at: its place in the split, and why it was chosen."""

    index: int
    why: str
    sample: Sample


def open_runs(runs: Sequence[PageRun], options: ImageOptions, notes: list[str]) -> list[OpenedRun]:
    """Load networks and data: of all runs, or of none and ``notes`` says why."""
    try:
        return [_open(run, options) for run in runs]
    except Exception as error:  # a data set of a user's own may raise anything
        notes.append(left_out("Images, viewer and offsets", error))
        return []


def left_out(what: str, error: Exception) -> str:
    """A note on what a page lacks without a network or its data."""
    reason = one_line(error).replace("trust=true", "--trust")  # as this command has it
    moved = " A data set that was moved is found by --data ROOT." if isinstance(error, FileNotFoundError) else ""
    return f"{what} are left out: {reason}.{moved}"


def _open(run: PageRun, options: ImageOptions) -> OpenedRun:
    record, counts = run.record, run.counts
    checkpoint = read_checkpoint(record.checkpoint, options.trust)
    predictor = checkpoint.predictor(find_device("auto"))
    dataset = options.open_dataset(checkpoint)
    samples = dataset.split(record.split)
    if counts is not None:
        number = len(counts.names)  # fewer than there are, where trainer.limit_val_batches left some out
        first = counts.names[0] if number else None
        with contextlib.suppress(Exception):  # an image that cannot be read is told of where it would be shown
            first = samples[0].name
        if len(samples) < number or (number and first != counts.names[0]):
            raise UserError(f"the data at hand are not the {number} {record.split} images that were counted")
        samples = [samples[place] for place in range(number)] if number < len(samples) else samples
    return OpenedRun(**vars(run), predictor=predictor, dataset=dataset, samples=samples)


# --- which images -----------------------------------------------------------------------------------------------------


def choose_images(runs: Sequence[OpenedRun], notes: list[str]) -> list[Image]:
    """The images that the page looks at, those that can be read; the first ones are to be compared closely."""
    first, found = runs[0], dict[int, str]()
    miou = [run.counts.miou_of_images.tolist() for run in runs if run.counts is not None]
    if len(miou) == len(runs) == 1:
        found = {index: why for why, index in best_median_worst(miou[0]).items()}
    elif len(miou) == len(runs):
        found = dict.fromkeys(most_different(miou[0], miou[1], GALLERY_IMAGES), "most different")
    wanted = max(0, VIEWER_IMAGES - len(found))
    found |= dict.fromkeys(spread_over(len(first.samples), wanted, list(found)), "image")
    images = []
    for index, why in found.items():
        try:
            images.append(Image(index, why, first.samples[index]))
        except Exception as error:  # of a data set of a user's own, anything
            notes.append(f"Without the {why} image, number {index} of {first.record.split}: {one_line(error)}.")
    return images


def best_median_worst(miou: Sequence[float]) -> dict[str, int]:
    """Indices of the best, the median and the worst image; without those that have no figure (NaN).

    The median is the lower one of an even number; of equal figures the first image counts as the worse. Of fewer than
    three images none is named twice.
    """
    order = sorted((value, index) for index, value in enumerate(miou) if not math.isnan(value))
    if not order:
        return {}
    places = {"best": len(order) - 1, "worst": 0, "median": (len(order) - 1) // 2}
    found: dict[str, int] = {}
    for name, place in places.items():
        if order[place][1] not in found.values():
            found[name] = order[place][1]
    return {name: found[name] for name in ("best", "median", "worst") if name in found}


def most_different(first: Sequence[float], other: Sequence[float], count: int) -> list[int]:
    """Indices of the images whose mIoU differs most between two runs, the largest difference first."""
    differences = [(abs(a - b), -index) for index, (a, b) in enumerate(zip(first, other, strict=True))]
    known = sorted((pair for pair in differences if not math.isnan(pair[0])), reverse=True)
    return [-index for _, index in known[:count]]


# --- offsets ----------------------------------------------------------------------------------------------------------


def offset_study(subject: OpenedRun, budget: float) -> tuple[Mapping[str, Any], str] | None:
    """Effective dilations: from ``segdcn-analyze``'s file where it is of this checkpoint, else measured here.

    Here on as many images as ``budget`` floating point operations are enough for, within bounds. None for a network
    without deformable layers.
    """
    if not sampling_layers(subject.predictor.network):
        return None
    file = subject.record.folder / "analysis" / "analysis.json"
    known = _known_study(file, subject.record)
    if known is not None:
        return known, f"Measured by segdcn-analyze on {known['images']} images"
    flops = network_cost(subject.predictor.network, subject.samples[0].label.shape)["flops"]
    images = MOST_STUDIED if flops is None else int(budget / flops)
    indices = spread_over(len(subject.samples), min(MOST_STUDIED, max(FEWEST_STUDIED, images)))
    study = study_split(subject.predictor, subject.dataset, subject.record.split, subject.samples, indices)
    return study, f"Measured on {len(indices)} of the {len(subject.samples)} {subject.record.split} images"


def _known_study(file: Path, record: RunRecord) -> Mapping[str, Any] | None:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or known.get("checkpoint_sha256") != record.checkpoint_hash:
        return None
    if known.get("split") != record.split:
        return None
    return known if {"layers", "objects", "images"} <= set(known) else None
