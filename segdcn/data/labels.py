"""Labels looked at before a training: classes that are nowhere, pixels that are all ignored, objects drawn as 255."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segdcn.data.dataset import (
    IGNORE_INDEX,
    Array,
    DataError,
    ImageMaskFiles,
    MaskColoursError,
    Sample,
    SegmentationDataset,
)

NEEDED = ("train", "val")
AT_LEAST = 50  # samples of a split
AT_MOST = 1000  # where a class does not turn up: half a minute, of large masks
MUCH = 0.5  # share of ignored pixels that is spoken of; published data sets ignore a tenth, coarse labels up to a half


@dataclass(frozen=True)
class SplitLabels:
    """What was seen in the labels of one split.

    read, total: samples looked at, and all.
    pixels: (256,), how many have each label.
    """

    split: str
    read: int
    total: int
    pixels: NDArray[np.int64]

    @property
    def labelled(self) -> int:
        """Pixels that are not ignored."""
        return int(self.pixels[:IGNORE_INDEX].sum())

    def __str__(self) -> str:
        some = f" looked at, of {self.total:,}" if self.read < self.total else ""
        return f"{self.read:,} {self.split} image{'' if self.read == 1 else 's'}{some}"


def labels_before_training(dataset: SegmentationDataset) -> list[str]:
    """Look at some labels of train and val, and say in one line each what is odd about them.

    Raises: DataError where a training would learn nothing: two classes, one of which is drawn as 255; and where masks
        have colours that are of no class.
    """
    found = []
    for split in NEEDED:
        try:
            found.append(read_some_labels(dataset, split))
        except MaskColoursError:
            raise
        except Exception:  # what is missing or cannot be read, a training names
            continue
    if wrong := white_objects(found, dataset.class_names):
        raise DataError(wrong)
    return label_notes(found, dataset.class_names)


def read_some_labels(dataset: SegmentationDataset, split: str) -> SplitLabels:
    """Read labels here and there in a split, until every class was seen; images are not read where they are files.

    What cannot be read is passed over: a training, and ``segdcn-data check``, name it.

    Raises: MaskColoursError for a mask whose colours are of no class.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training says them
        samples = dataset.split(split)
    pixels, read = np.zeros(256, np.int64), 0
    for index in np.random.default_rng(0).permutation(len(samples))[:AT_MOST].tolist():
        try:
            pixels += count_labels(label_of(samples, index))
        except MaskColoursError:
            raise
        except Exception:  # whatever a data set of the user's own raises
            continue
        read += 1
        if read >= AT_LEAST and pixels[: len(dataset.class_names)].all():
            break
    return SplitLabels(split, read, len(samples), pixels)


def white_objects(found: Sequence[SplitLabels], class_names: Sequence[str]) -> str | None:
    """What to do where train, of two classes, holds 0 and 255 alone, as most programs draw a mask; else None."""
    for labels in found:
        if labels.split == "train" and len(class_names) == 2 and np.flatnonzero(labels.pixels).tolist() == [0, 255]:
            return (
                f"train masks hold 0 and 255 alone, and 255 is ignored: {class_names[1]!r} would have no pixel to learn"
                f" from ({labels}). Make its pixels 1, or add 'dataset.mapping={{255:1}}' to the command"
                " (dataset=folder; mapping={255: 1} of an ImageMaskFiles)"
            )
    return None


def label_notes(found: Sequence[SplitLabels], class_names: Sequence[str]) -> list[str]:
    """What a user may not know of the labels of train and val, one line each."""
    notes = []
    for labels in found:
        if labels.read == 0:
            continue
        ignored = labels.pixels[IGNORE_INDEX] / labels.pixels.sum()
        absent = [name for k, name in enumerate(class_names) if not labels.pixels[k]]
        if not labels.labelled:
            notes.append(f"{labels.split} has no labelled pixel: all are {IGNORE_INDEX} (ignored) in {labels}")
            continue
        if absent:
            notes.append(f"{labels.split} has no pixel of {', '.join(absent)}: seen in none of {labels}")
        if ignored > MUCH:
            notes.append(f"{labels.split} has {100 * ignored:.1f} % ignored pixels ({IGNORE_INDEX}) in {labels}")
    return notes


def count_labels(label: Array) -> NDArray[np.int64]:
    """How many pixels have each label, (256,)."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(label), 256):  # numpy makes 8 bytes of each pixel: some rows at a time
        counts += np.bincount(label[start : start + 256].ravel(), minlength=256)
    return counts


def label_of(samples: Sequence[Sample], index: int) -> Array:
    """The label of one sample; where samples are files its image is not read."""
    if not isinstance(samples, ImageMaskFiles):
        _, label, _ = samples[index]
        return label
    mask = samples.pairs[index].mask
    if mask is None:  # the whole image is ignored; its size is not worth a look at it
        return np.full((1, 1), IGNORE_INDEX, np.uint8)
    return samples.label(mask)
