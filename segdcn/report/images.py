"""The parts of a page that need the data and the networks: images to compare, the viewer, effective dilations."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segdcn import UserError
from segdcn.analysis.offset_study import study_split
from segdcn.data.dataset import IGNORE_INDEX, Sample
from segdcn.drawing.decoration import one_line
from segdcn.drawing.panels import central_pixels
from segdcn.inference.devices import find_device
from segdcn.inference.predictor import Predictor
from segdcn.models import deformable_layers, plain_twin
from segdcn.models.cost import network_cost
from segdcn.report import choice, pictures
from segdcn.report.records import RunRecord
from segdcn.report.viewer import DEPTH, fields_per_image, view
from segdcn.runs.checkpoint import Checkpoint, read_checkpoint

OpenDataset = Callable[[Checkpoint], Any]
"""The data set of a checkpoint; an error, in one line, where it is not at hand."""

GALLERY_IMAGES, VIEWER_IMAGES = 3, 5
FEWEST_STUDIED, MOST_STUDIED = 4, 64  # images for effective dilations
VIEWER_BYTES = 7_500_000  # of a page's ten million; the pictures of the rest of the page take far less than the rest


@dataclass(frozen=True)
class Subject:
    """A run with its network, and the images of its split; ``dataset`` is the one the samples are of."""

    record: RunRecord
    predictor: Predictor
    dataset: Any
    samples: Sequence[Sample]


def open_subject(record: RunRecord, open_dataset: OpenDataset, trust: bool = False) -> Subject:
    """Load a run's checkpoint and data.

    trust: whether they may be other than segdcn's.

    Raises: UserError, one line: no checkpoint, or the data are not at hand.
    """
    checkpoint = read_checkpoint(record.checkpoint, trust)
    predictor = checkpoint.predictor(find_device("auto"))
    dataset = open_dataset(checkpoint)
    samples, counts = dataset.split(record.split), record.counts
    if counts is not None:
        number = len(counts.names)  # fewer than there are, where trainer.limit_val_batches left some out
        first = counts.names[0] if number else None
        with contextlib.suppress(Exception):  # an image that cannot be read is told of where it would be shown
            first = samples[0].name
        if len(samples) < number or (number and first != counts.names[0]):
            raise UserError(f"the data at hand are not the {number} {record.split} images that were counted")
        samples = [samples[place] for place in range(number)] if number < len(samples) else samples
    return Subject(record, predictor, dataset, samples)


@dataclass(frozen=True)
class Image:
    """One that the page looks at: its place in the split, and why it was chosen."""

    index: int
    why: str
    sample: Sample


def chosen_images(subjects: Sequence[Subject], notes: list[str]) -> list[Image]:
    """The images that the page looks at, those that can be read; the first ones are to be compared closely."""
    first = subjects[0]
    miou = [subject.record.counts.miou_of_images.tolist() for subject in subjects if subject.record.counts is not None]
    found: dict[int, str] = {}
    if len(subjects) == 1 and miou:
        found = {index: why for why, index in choice.best_median_worst(miou[0]).items()}
    elif len(miou) == len(subjects):
        found = dict.fromkeys(choice.most_different(miou[0], miou[1], GALLERY_IMAGES), "most different")
    wanted = VIEWER_IMAGES - len(found)
    found |= dict.fromkeys(choice.spread(len(first.samples), max(0, wanted), list(found)), "image")
    images = []
    for index, why in found.items():
        try:
            images.append(Image(index, why, first.samples[index]))
        except Exception as error:  # of a data set of a user's own, anything
            notes.append(f"Without the {why} image, number {index} of {first.record.split}: {one_line(error)}.")
    return images


def gallery(subjects: Sequence[Subject], images: Sequence[Image]) -> dict[str, Any]:
    """The first images with their layers to lay over each other: photograph, truth, predictions and errors."""
    shown, seen = [], set()
    for image in images[:GALLERY_IMAGES]:
        sample = image.sample
        predictions = [subject.predictor(sample.image).labels for subject in subjects]
        layers = [_layer("photo", pictures.photograph(sample.image), f"Photograph {sample.name}")]
        palette = subjects[0].predictor.palette
        for number, (subject, labels) in enumerate(zip(subjects, predictions, strict=True)):
            by = f" by {subject.record.name}" if len(subjects) > 1 else ""
            alt = f"Predicted classes of {sample.name}{by}: {_shares(labels, subject)}"
            layers.append(_layer(f"prediction{number}", pictures.labels(labels, palette), alt))
        alt = f"True classes of {sample.name}: {_shares(sample.label, subjects[0])}"
        layers.append(_layer("truth", pictures.labels(sample.label, palette), alt))
        if len(subjects) == 1:
            wrong = _wrong(predictions[0], sample.label)
            alt = f"Errors in {sample.name}: {wrong}"
            layers.append(_layer("errors", pictures.error_map(predictions[0], sample.label), alt))
        seen |= {int(k) for values in (*predictions, sample.label) for k in np.unique(values) if k != IGNORE_INDEX}
        detail = _detail(subjects, image.index)
        shown.append({"name": sample.name, "why": image.why, "detail": detail, "layers": layers})
    names = [subject.record.name for subject in subjects]
    single = len(subjects) == 1
    keys = [("photo", "photograph")]
    keys += [("prediction0", "prediction")] if single else [(f"prediction{i}", name) for i, name in enumerate(names)]
    keys += [("truth", "truth")] + ([("errors", "errors")] if single else [])
    predictor = subjects[0].predictor
    legend = [(predictor.class_names[k], tuple(predictor.palette[k])) for k in sorted(seen)]
    if single:
        legend += [("wrong", pictures.WRONG), ("not labelled", pictures.IGNORED)]
    return {
        "layers": keys,
        "sides": [
            ("left", "photo" if single else "prediction0"),
            ("right", "prediction0" if single else "prediction1"),
        ],
        "images": shown,
        "legend": legend,
        "pixelated": max(images[0].sample.image.shape[:2]) <= 256,
    }


def _layer(key: str, url: str, alt: str) -> dict[str, str]:
    return {"key": key, "url": url, "alt": alt}


def _detail(subjects: Sequence[Subject], index: int) -> str:
    figures = [s.record.counts.miou_of_images[index].item() for s in subjects if s.record.counts is not None]
    if len(figures) < len(subjects):
        return ""
    if len(subjects) == 1:
        return f"mIoU of the image {100 * figures[0]:.1f} %"
    names = (subject.record.name for subject in subjects)
    return "mIoU of the image: " + ", ".join(f"{n} {100 * v:.1f} %" for n, v in zip(names, figures, strict=True))


def _shares(labels: Any, subject: Subject, most: int = 4) -> str:
    classes, counts = np.unique(labels[labels != IGNORE_INDEX], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    names = subject.predictor.class_names
    return ", ".join(f"{names[classes[i]]} {counts[i] / labels.size:.0%}" for i in order) or "none"


def _wrong(prediction: Any, label: Any) -> str:
    valid = label != IGNORE_INDEX
    if not valid.any():
        return "no labelled pixels"
    return f"{(valid & (prediction != label)).sum() / valid.sum():.1%} of the labelled pixels are wrong"


def viewer(subjects: Sequence[Subject], images: Sequence[Image], budget: float) -> dict[str, Any]:
    """What the viewer shows, with its ``json``; images that would make the page too large are left out and counted.

    Of one run with deformable layers its own points are beside those of the same layers without offsets; of several
    the first run's are beside another's.
    """
    single = len(subjects) == 1
    deformed = bool(deformable_layers(subjects[0].predictor.network))
    networks = [(subject.record.name, subject.predictor.network) for subject in subjects]
    if single and deformed:
        networks = [
            ("learned offsets", networks[0][1]),
            ("the same layers, without offsets", plain_twin(networks[0][1])),
        ]
    first = subjects[0]
    size = images[0].sample.label.shape
    maps = len(images) * len(networks)
    fields = min(fields_per_image(network, (size[0], size[1]), maps, budget) for _, network in networks)
    try:
        shown = _entries(subjects, networks, images, fields)
    except Exception:
        if not fields:
            raise
        fields = 0  # of a network without gradients
        shown = _entries(subjects, networks, images, fields)
    entries = [entry for _, entry in shown]
    depth = max((len(network["layers"]) for entry in entries for network in entry["networks"]), default=0)
    groups = max((layer["groups"] for e in entries for n in e["networks"] for layer in n["layers"]), default=1)
    data = {
        "images": entries,
        "panes": [0, 1] if len(networks) > 1 else [0],
        "classes": list(first.predictor.class_names),
        "palette": [list(colour) for colour in first.predictor.palette],
    }
    return {
        "data": data,
        "images": [
            {"thumbnail": pictures.thumbnail(image.sample.image), "name": image.sample.name, "why": image.why}
            for image, _ in shown
        ],
        "depth": min(depth, DEPTH),
        "fields": fields,
        "panes": [name for name, _ in networks[:2]],
        "others": [(number, name) for number, (name, _) in enumerate(networks) if number > 0],
        "lead": _viewer_lead(single, deformed),
        "fine": _viewer_fine(fields, groups, len(images) - len(shown)),
    }


def _entries(
    subjects: Sequence[Subject], networks: Sequence[tuple[str, Any]], images: Sequence[Image], fields: int
) -> list[tuple[Image, dict[str, Any]]]:
    """What the viewer knows of the images, of as many as a page holds."""
    first, entries, total = subjects[0], list[tuple[Image, dict[str, Any]]](), 0
    for image in images:
        sample = image.sample
        start = _start(sample)
        entry = {
            "name": sample.name,
            "height": sample.label.shape[0],
            "width": sample.label.shape[1],
            "photo": pictures.photograph(sample.image),
            "truth": pictures.labels(sample.label, first.predictor.palette),
            "start": start,
            "networks": [
                {
                    **view(
                        network, subjects[min(number, len(subjects) - 1)].predictor.batch(sample.image), fields, start
                    ),
                    # a network without the offsets it was trained with was never meant to predict
                    "prediction": _prediction(subjects[number], sample) if number < len(subjects) else None,
                }
                for number, (_, network) in enumerate(networks)
            ],
        }
        weight = len(json.dumps(entry))
        if total + weight <= VIEWER_BYTES:
            total += weight
            entries.append((image, entry))
    return entries


def _prediction(subject: Subject, sample: Sample) -> str:
    return pictures.labels(subject.predictor(sample.image).labels, subject.predictor.palette)


def _start(sample: Sample) -> tuple[int, int]:
    """The pixel deepest inside the object: of the largest class but the most frequent one, where there are two."""
    pixels = central_pixels(sample.label, 2)
    return pixels[-1] if pixels else (sample.label.shape[0] // 2, sample.label.shape[1] // 2)


def _viewer_lead(single: bool, deformed: bool) -> str:
    if not single:
        return "Both networks see the same image and the same pixel."
    if deformed:
        return "On the left with the offsets that were learned, on the right on the regular grid of the same layers."
    return "This network has no deformable layers, so that its points form the regular grid."


def _viewer_fine(fields: int, groups: int, left_out: int) -> str:
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


def offset_study(subject: Subject, budget: float) -> tuple[Mapping[str, Any], str] | None:
    """Effective dilations: from ``segdcn-analyze``'s file where it is of this checkpoint, else measured here.

    Here on as many images as ``budget`` floating point operations are enough for, within bounds. None for a network
    without deformable layers.
    """
    if not deformable_layers(subject.predictor.network):
        return None
    file = subject.record.folder / "analysis" / "analysis.json"
    known = _known_study(file, subject.record)
    if known is not None:
        return known, f"Measured by segdcn-analyze on {known['images']} images"
    flops = network_cost(subject.predictor.network, subject.samples[0].label.shape)["flops"]
    images = MOST_STUDIED if flops is None else int(budget / flops)
    indices = choice.spread(len(subject.samples), min(MOST_STUDIED, max(FEWEST_STUDIED, images)))
    predictor = subject.predictor
    study = study_split(
        predictor.network,
        subject.dataset,
        subject.record.split,
        subject.samples,
        indices,
        predictor.transform,
        device=predictor.device,
    )
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
