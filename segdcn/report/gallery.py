"""Images of a page to compare: photograph, truth, predictions and errors laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from segdcn.data.dataset import IGNORE_INDEX, Sample
from segdcn.drawing.numbers import percent
from segdcn.report import pictures
from segdcn.report.images import GALLERY_IMAGES, Image, OpenedRun


def gallery(runs: Sequence[OpenedRun], images: Sequence[Image]) -> dict[str, Any]:
    """The first of the images, with their layers; of one run or of several side by side."""
    single, predictor = len(runs) == 1, runs[0].predictor
    shown, classes = [], set[int]()
    for image in images[:GALLERY_IMAGES]:
        predictions = [run.predictor(image.sample.image).labels for run in runs]
        layers = _layers(runs, image.sample, predictions)
        shown.append(
            {"name": image.sample.name, "why": image.why, "detail": _miou(runs, image.index), "layers": layers}
        )
        classes |= {int(number) for values in (*predictions, image.sample.label) for number in np.unique(values)}
    legend = [(predictor.class_names[k], tuple(predictor.palette[k])) for k in sorted(classes - {IGNORE_INDEX})]
    if single:
        keys = [("photo", "photograph"), ("prediction0", "prediction"), ("truth", "truth"), ("errors", "errors")]
        legend += [("wrong", pictures.WRONG), ("not labelled", pictures.IGNORED)]
    else:
        predicted = [(f"prediction{number}", run.name) for number, run in enumerate(runs)]
        keys = [("photo", "photograph"), *predicted, ("truth", "truth")]
    left, right = ("photo", "prediction0") if single else ("prediction0", "prediction1")
    return {
        **_heading(runs),
        "layers": keys,
        "sides": [("left", left), ("right", right)],
        "images": shown,
        "legend": legend,
        "pixelated": max(images[0].sample.image.shape[:2]) <= 256,
    }


def _heading(runs: Sequence[OpenedRun]) -> dict[str, str]:
    heading, why = "Images", ""
    if all(run.counts is not None for run in runs):
        heading, why = (
            ("Best, median and worst images", "By the mean IoU over the classes that occur in the image. ")
            if len(runs) == 1
            else (
                "Where they disagree most",
                f"The images whose own mean IoU differs most between {runs[0].name} and {runs[1].name}. ",
            )
        )
    return {"heading": heading, "lead": f"{why}Move the line in a picture to see what lies under it."}


def _layers(runs: Sequence[OpenedRun], sample: Sample, predictions: Sequence[Any]) -> list[dict[str, str]]:
    palette = runs[0].predictor.palette
    layers = [_layer("photo", pictures.photograph(sample.image), f"Photograph {sample.name}")]
    for number, (run, prediction) in enumerate(zip(runs, predictions, strict=True)):
        by = f" by {run.name}" if len(runs) > 1 else ""
        alt = f"Predicted classes of {sample.name}{by}: {_shares(prediction, run)}"
        layers.append(_layer(f"prediction{number}", pictures.labels(prediction, palette), alt))
    alt = f"True classes of {sample.name}: {_shares(sample.label, runs[0])}"
    layers.append(_layer("truth", pictures.labels(sample.label, palette), alt))
    if len(runs) == 1:
        alt = f"Errors in {sample.name}: {_wrong(predictions[0], sample.label)}"
        layers.append(_layer("errors", pictures.error_map(predictions[0], sample.label), alt))
    return layers


def _layer(key: str, url: str, alt: str) -> dict[str, str]:
    return {"key": key, "url": url, "alt": alt}


def _miou(runs: Sequence[OpenedRun], index: int) -> str:
    """Of the image in each run, in words; empty where it was not counted."""
    figures = [percent(run.counts.miou_of_images[index].item(), 1) for run in runs if run.counts is not None]
    if len(figures) < len(runs):
        return ""
    if len(runs) == 1:
        return f"mIoU of the image {figures[0]} %"
    named = (f"{run.name} {figure} %" for run, figure in zip(runs, figures, strict=True))
    return f"mIoU of the image: {', '.join(named)}"


def _shares(labels: Any, run: OpenedRun) -> str:
    classes, counts = np.unique(labels[labels != IGNORE_INDEX], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:4]
    names = run.predictor.class_names
    return ", ".join(f"{names[classes[i]]} {counts[i] / labels.size:.0%}" for i in order) or "none"


def _wrong(prediction: Any, label: Any) -> str:
    valid = label != IGNORE_INDEX
    if not valid.any():
        return "no labelled pixels"
    return f"{(valid & (prediction != label)).sum() / valid.sum():.1%} of the labelled pixels are wrong"
