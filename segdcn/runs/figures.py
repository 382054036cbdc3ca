"""The figures of a split as files of a run's folder: metrics.json and counts.npz."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segdcn.errors import MissingFileError, UserError, is_passing
from segdcn.evaluation.counts import Counts
from segdcn.evaluation.evaluator import EvaluationResult
from segdcn.runs.files import write_bytes, write_json
from segdcn.runs.record import RunRecord

COUNTS_FILE = "counts.npz"  # beside metrics.json


def write_figures(result: EvaluationResult, split: str, conditions: Mapping[str, Any], folder: Path) -> None:
    """Write metrics.json, figures and ``conditions`` as one flat object, and counts.npz beside it.

    Of a split without labels (a benchmark's test split) there are neither figures nor counts.

    result: figures under ``<split>/miou``, ``<split>/iou/<class>`` and so on.
    conditions: what the figures depend on: protocol, inference, checkpoint, seed.
    """
    figures = {} if math.isnan(result.figures[f"{split}/miou"]) else result.figures
    if figures:
        write_counts(folder / COUNTS_FILE, result.counts)
    write_json(folder / "metrics.json", {**figures, "split": split, "images": result.images, **conditions})


def write_counts(path: Path, counts: Counts) -> None:
    """Write ``counts`` atomically; texts and numbers only, no pickle."""
    content = io.BytesIO()
    np.savez_compressed(
        content,
        names=np.array(list(counts.names), dtype=np.str_),
        class_names=np.array(list(counts.class_names), dtype=np.str_),
        images=counts.images.numpy(),
        confusion=counts.confusion.numpy(),
    )
    write_bytes(path, content.getvalue())


def read_counts(path: Path) -> Counts:
    """Read a counts.npz.

    Raises: FileNotFoundError, or ValueError when it is damaged or its parts do not fit; one line each.
    """
    if not path.is_file():
        raise MissingFileError(f"no pixel counts at {path}: segdcn-evaluate writes them")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names, class_names = ([str(name) for name in arrays[key]] for key in ("names", "class_names"))
            images, confusion = (torch.from_numpy(arrays[key].astype(np.int64)) for key in ("images", "confusion"))
    except Exception as error:  # a damaged archive raises many kinds: zip, zlib, key, value
        if is_passing(error):
            raise
        raise UserError(f"{path} cannot be read: it is damaged ({type(error).__name__}); evaluate again") from error
    n, k = len(names), len(class_names)
    if images.shape != (n, 3, k) or confusion.shape != (k, k):
        raise UserError(f"{path} does not fit together: {n} images, {k} classes, counts {tuple(images.shape)}")
    return Counts(names, class_names, images, confusion)


def find_counts(run: RunRecord) -> Counts:
    """The run's own counts, or those of a later evaluation of the same checkpoint, protocol and inference.

    Raises: UserError, one line, where there are none, or none that can be read.
    """
    reason = UserError("the pixel counts of single images were not kept")
    if (run.folder / COUNTS_FILE).is_file():
        try:
            return read_counts(run.folder / COUNTS_FILE)
        except UserError as error:
            reason = error
    later = run.evaluation(run.split)
    if later is None or any(later.metrics.get(key) != run.metrics.get(key) for key in ("protocol", "inference")):
        raise reason
    try:
        return read_counts(later.folder / COUNTS_FILE)
    except MissingFileError:
        raise reason from None
